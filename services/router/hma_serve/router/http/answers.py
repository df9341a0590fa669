"""Completions in OpenAI's shape: one object, or a stream of chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hma_serve.router.completion import Delta, Finished, Prepared
from hma_serve.router.http.completion_body import CompletionBody
from hma_serve.text import Tokenizer
from hma_serve.v1 import common_pb2

_REASONS = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}


class Answer:
    """What all chunks of one answer, or the whole answer, have in common.

    Args:
        prepared: The request.
        body: How the client wants it.
        tokenizer: For echoed prompts and the texts of single tokens.
        created: Unix seconds.
    """

    def __init__(self, prepared: Prepared, body: CompletionBody, tokenizer: Tokenizer, created: int) -> None:
        self._prepared = prepared
        self._body = body
        self._tokenizer = tokenizer
        self._head = {
            "id": f"cmpl-{prepared.request_id}",
            "object": "text_completion",
            "created": created,
            "model": prepared.model,
        }
        self._offsets = [0] * len(prepared.jobs)
        self._seen = [False] * len(prepared.jobs)
        self._tokens = [0] * len(prepared.jobs)
        self._cached = 0

    # Streaming.

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks that come before any token: the prompts, if they are echoed."""
        if self._body.echo:
            for index, job in enumerate(self._prepared.jobs):
                yield self._chunk(self._choice(index, self._prompt_text(job.prompt)))

    def delta_chunk(self, event: Delta) -> dict[str, Any]:
        """More of one completion."""
        return self._chunk(self._delta_choice(event))

    def finish_chunk(self, event: Finished) -> dict[str, Any]:
        """The end of one completion."""
        self._note_end(event)
        return self._chunk(self._ended(self._choice(event.index, ""), event))

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, with no choices, for `stream_options.include_usage`."""
        return {**self._head, "choices": [], "usage": self.usage()}

    # All at once.

    def whole(self, deltas: Sequence[Delta], ends: Sequence[Finished]) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = []
        for end in sorted(ends, key=lambda event: event.index):
            self._note_end(end)
            own = [delta for delta in deltas if delta.index == end.index]
            joined = Delta(
                end.index,
                "".join(delta.text for delta in own),
                tuple(token for delta in own for token in delta.token_ids),
                tuple(logprobs for delta in own for logprobs in delta.logprobs),
            )
            choice = self._ended(self._delta_choice(joined), end)
            if self._body.echo:
                choice["text"] = self._prompt_text(self._prepared.jobs[end.index].prompt) + choice["text"]
            choices.append(choice)
        return {**self._head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        prompt, completion = self._prepared.prompt_tokens, sum(self._tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    # Parts.

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._body.continuous_usage:
            chunk["usage"] = self.usage()
        return chunk

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def _delta_choice(self, event: Delta) -> dict[str, Any]:
        choice = self._choice(event.index, event.text)
        self._tokens[event.index] += len(event.token_ids)
        if event.logprobs:
            choice["logprobs"] = self._logprobs(event)
        if self._body.return_token_ids:
            choice["token_ids"] = list(event.token_ids)
            if not self._seen[event.index]:
                self._seen[event.index] = True
                choice["prompt_token_ids"] = list(self._prepared.jobs[event.index].prompt)
        return choice

    def _ended(self, choice: dict[str, Any], event: Finished) -> dict[str, Any]:
        choice["finish_reason"] = _REASONS.get(event.reason, "stop")
        choice["stop_reason"] = event.stop_match
        return choice

    def _note_end(self, event: Finished) -> None:
        self._cached += event.cached_tokens

    def _prompt_text(self, prompt: Sequence[int]) -> str:
        return self._tokenizer.decode(prompt)

    def _logprobs(self, event: Delta) -> dict[str, Any]:
        """OpenAI's four parallel lists."""
        tokens = [self._token_text(token_id) for token_id in event.token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[event.index])
            self._offsets[event.index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.chosen.logprob for entry in event.logprobs],
            "top_logprobs": [
                {self._token_text(top.token_id): top.logprob for top in entry.top} for entry in event.logprobs
            ],
            "text_offset": offsets,
        }

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer.decode((token_id,), skip_special=False)
