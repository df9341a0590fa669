"""The answer of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hma_serve.router.completion import Delta, Prepared
from hma_serve.router.http.answers import Answer
from hma_serve.router.http.generation_body import GenerationBody
from hma_serve.text import Tokenizer


class CompletionAnswer(Answer):
    """Choices with a `text`."""

    id_prefix = "cmpl"
    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, prepared: Prepared, body: GenerationBody, tokenizer: Tokenizer, created: int) -> None:
        super().__init__(prepared, body, tokenizer, created)
        self._offsets = [0] * len(prepared.jobs)

    def opening(self) -> Iterator[dict[str, Any]]:
        """The prompts, if they are echoed."""
        if self._body.echo:
            for index in range(len(self._prepared.jobs)):
                yield self._chunk(_choice(index, self._prompt(index)))

    def _delta_choice(self, event: Delta) -> dict[str, Any]:
        return _choice(event.index, event.text) | {"logprobs": self._logprobs(event)}

    def _last_choice(self, index: int) -> dict[str, Any]:
        return _choice(index, "")

    def _whole_choice(self, joined: Delta) -> dict[str, Any]:
        text = self._prompt(joined.index) + joined.text if self._body.echo else joined.text
        return _choice(joined.index, text) | {"logprobs": self._logprobs(joined)}

    def _prompt(self, index: int) -> str:
        return self._tokenizer.decode(self._prepared.jobs[index].prompt)

    def _logprobs(self, event: Delta) -> dict[str, Any] | None:
        """OpenAI's four parallel lists."""
        if not event.logprobs:
            return None
        tokens = [self._token_text(token_id) for token_id in event.token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[event.index])
            self._offsets[event.index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.chosen.logprob for entry in event.logprobs],
            "top_logprobs": [
                # The token itself comes beside the likeliest, which need not hold it: one more than was asked for.
                {self._token_text(each.token_id): each.logprob for each in (*entry.top, entry.chosen)}
                for entry in event.logprobs
            ],
            "text_offset": offsets,
        }


def _choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
