"""The answer of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hma_serve.router.completion import Delta
from hma_serve.router.http.answers import Answer
from hma_serve.text import Conversation
from hma_serve.v1 import common_pb2


class ChatAnswer(Answer):
    """Choices with a `message`, or with a `delta` when streamed."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def opening(self) -> Iterator[dict[str, Any]]:
        """Who speaks, once for each choice."""
        for index in range(len(self._prepared.jobs)):
            yield self._chunk(_choice(index, "delta", {"role": "assistant", "content": self._begun()}))

    def _delta_choice(self, event: Delta) -> dict[str, Any]:
        return _choice(event.index, "delta", {"content": event.text}) | {"logprobs": self._logprobs(event)}

    def _last_choice(self, index: int) -> dict[str, Any]:
        return _choice(index, "delta", {})

    def _whole_choice(self, joined: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": self._begun() + joined.text, "refusal": None}
        return _choice(joined.index, "message", message) | {"logprobs": self._logprobs(joined)}

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
