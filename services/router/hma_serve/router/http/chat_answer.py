"""The answer of `/v1/chat/completions`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from hma_serve.router.completion import Delta, Finished, Prepared
from hma_serve.router.http.answers import Answer
from hma_serve.router.http.generation_body import GenerationBody
from hma_serve.router.http.tool_calls import Parsed, ToolCall, ToolCallParser
from hma_serve.text import Conversation, Tokenizer
from hma_serve.v1 import common_pb2

_NEWS = ("delta", "logprobs", "token_ids", "prompt_token_ids")


class ChatAnswer(Answer):
    """Choices with a `message`, or with a `delta` when streamed."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, prepared: Prepared, body: GenerationBody, tokenizer: Tokenizer, created: int) -> None:
        super().__init__(prepared, body, tokenizer, created)
        [prompt] = body.request.prompts
        has_tools = isinstance(prompt, Conversation) and prompt.tools is not None
        # Without tools, whatever looks like a call is text.
        self._parsers = [ToolCallParser() for _ in prepared.jobs] if has_tools else None
        self._calls = [0] * len(prepared.jobs)

    def opening(self) -> Iterator[dict[str, Any]]:
        """Who speaks, once for each choice."""
        for index in range(len(self._prepared.jobs)):
            yield self._chunk(_choice(index, "delta", {"role": "assistant", "content": self._begun()}))

    def delta_chunk(self, event: Delta) -> dict[str, Any] | None:
        """More of one completion; None where that says nothing, as while a call is held back."""
        chunk = super().delta_chunk(event)
        return chunk if chunk and ("usage" in chunk or any(map(chunk["choices"][0].get, _NEWS))) else None

    def _delta_choice(self, event: Delta) -> dict[str, Any]:
        parsed = self._parsed(event)
        said: dict[str, Any] = {"content": parsed.text} if parsed.text else {}
        if parsed.calls:
            calls = enumerate(map(_call, parsed.calls), start=self._calls[event.index])
            said["tool_calls"] = [{"index": position, **call} for position, call in calls]
            self._calls[event.index] += len(parsed.calls)
        return _choice(event.index, "delta", said) | {"logprobs": self._logprobs(event)}

    def _last_choice(self, index: int) -> dict[str, Any]:
        rest = self._rest(index)
        return _choice(index, "delta", {"content": rest} if rest else {})

    def _whole_choice(self, joined: Delta) -> dict[str, Any]:
        parsed = self._parsed(joined)
        content = self._begun() + parsed.text + self._rest(joined.index)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if parsed.calls:
            message |= {"content": content or None, "tool_calls": list(map(_call, parsed.calls))}
            self._calls[joined.index] = len(parsed.calls)
        return _choice(joined.index, "message", message) | {"logprobs": self._logprobs(joined)}

    def _finish_reason(self, event: Finished) -> str:
        reason = super()._finish_reason(event)
        return "tool_calls" if reason == "stop" and self._calls[event.index] else reason

    def _parsed(self, event: Delta) -> Parsed:
        return Parsed(event.text) if self._parsers is None else self._parsers[event.index].push(event.text)

    def _rest(self, index: int) -> str:
        return "" if self._parsers is None else self._parsers[index].finish()

    def _begun(self) -> str:
        """What the assistant has said already, if that is echoed."""
        [prompt] = self._body.request.prompts
        if not self._body.echo or not isinstance(prompt, Conversation):
            return ""
        last = prompt.messages[-1]
        return str(last["content"]) if last["role"] == "assistant" else ""

    def _logprobs(self, event: Delta) -> dict[str, Any] | None:
        if not event.logprobs:
            return None
        content = [
            self._logprob(entry.chosen) | {"top_logprobs": [self._logprob(top) for top in entry.top]}
            for entry in event.logprobs
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, entry: common_pb2.TokenLogprob) -> dict[str, Any]:
        """A token with its bytes, which say what half of a character is."""
        return {
            "token": self._token_text(entry.token_id),
            "logprob": entry.logprob,
            "bytes": list(self._tokenizer.token_bytes(entry.token_id)),
        }


def _choice(index: int, name: str, said: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, name: said, "logprobs": None, "finish_reason": None, "stop_reason": None}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
