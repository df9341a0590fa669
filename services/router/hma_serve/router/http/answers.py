"""Answers in OpenAI's shapes: one object, or a stream of chunks. What both endpoints have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from hma_serve.router.completion import Delta, Finished, Prepared
from hma_serve.router.http.generation_body import GenerationBody
from hma_serve.text import Tokenizer
from hma_serve.v1 import common_pb2

_REASONS = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}


class Answer(ABC):
    """One answer: what its chunks, or all of it, have in common.

    Args:
        prepared: The request.
        body: How the client wants it.
        tokenizer: For echoed prompts and the texts of single tokens.
        created: Unix seconds.
    """

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_name: ClassVar[str]

    def __init__(self, prepared: Prepared, body: GenerationBody, tokenizer: Tokenizer, created: int) -> None:
        self._prepared = prepared
        self._body = body
        self._tokenizer = tokenizer
        self._head = {
            "id": f"{self.id_prefix}-{prepared.request_id}",
            "object": self.chunk_name if body.stream else self.object_name,
            "created": created,
            "model": prepared.model,
        }
        self._seen = [False] * len(prepared.jobs)
        self._tokens = [0] * len(prepared.jobs)
        self._copies = len(prepared.jobs) // len(prepared.prompts)
        self._cached = 0
        self._migrations = 0

    # Streaming.

    @abstractmethod
    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks that come before any token."""

    def delta_chunk(self, event: Delta) -> dict[str, Any] | None:
        """More of one completion; None: nothing is to be sent of it."""
        self._count(event)
        return self._chunk(self._with_ids(self._delta_choice(event), event))

    def finish_chunk(self, event: Finished) -> dict[str, Any]:
        """The end of one completion."""
        self._end(event)
        return self._chunk(self._ended(self._last_choice(event.index), event))

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, with no choices, for `stream_options.include_usage`."""
        return {**self._head, "choices": [], "usage": self._usage()}

    # All at once.

    def whole(self, deltas: Sequence[Delta], ends: Sequence[Finished]) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = []
        for end in sorted(ends, key=lambda event: event.index):
            joined = _joined(end.index, deltas)
            self._count(joined)
            self._end(end)
            choices.append(self._ended(self._with_ids(self._whole_choice(joined), joined), end))
        return {**self._head, "choices": choices, "usage": self._usage()}

    # What the endpoints' shapes differ in.

    @abstractmethod
    def _delta_choice(self, event: Delta) -> dict[str, Any]:
        """The choice of a chunk with more text."""

    @abstractmethod
    def _last_choice(self, index: int) -> dict[str, Any]:
        """The choice of a completion's last chunk, without its reason."""

    @abstractmethod
    def _whole_choice(self, joined: Delta) -> dict[str, Any]:
        """A whole completion, without its reason."""

    # Parts.

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._body.continuous_usage:
            chunk["usage"] = self._usage()
        return chunk

    def _count(self, event: Delta) -> None:
        self._tokens[event.index] += len(event.token_ids)

    def _end(self, event: Finished) -> None:
        # A prompt counts once, however many completions it has, and so does what a cache held of it.
        if event.index % self._copies == 0:
            self._cached += event.cached_tokens
        self._migrations += event.migrations

    def _usage(self) -> dict[str, Any]:
        """Tokens so far, and how often completions had to move to another decode worker, if any did."""
        prompt, completion = self._prepared.prompt_tokens, sum(self._tokens)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }
        return usage | {"migrations": self._migrations} if self._migrations else usage

    def _with_ids(self, choice: dict[str, Any], event: Delta) -> dict[str, Any]:
        if self._body.return_token_ids:
            choice["token_ids"] = list(event.token_ids)
            if not self._seen[event.index]:
                self._seen[event.index] = True
                choice["prompt_token_ids"] = list(self._prepared.jobs[event.index].prompt)
        return choice

    def _ended(self, choice: dict[str, Any], event: Finished) -> dict[str, Any]:
        choice["finish_reason"] = self._finish_reason(event)
        choice["stop_reason"] = event.stop_match
        return choice

    def _finish_reason(self, event: Finished) -> str:
        return _REASONS.get(event.reason, "stop")

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer.decode((token_id,), skip_special=False)


def _joined(index: int, deltas: Sequence[Delta]) -> Delta:
    own = [delta for delta in deltas if delta.index == index]
    return Delta(
        index,
        "".join(delta.text for delta in own),
        tuple(token for delta in own for token in delta.token_ids),
        tuple(logprobs for delta in own for logprobs in delta.logprobs),
    )
