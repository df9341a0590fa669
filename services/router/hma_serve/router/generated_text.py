"""One completion's tokens as text: detokenized, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hma_serve.core.request import StopConditions
from hma_serve.text import StopStringMatcher, Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """What a batch of tokens added.

    Attributes:
        text: Text that may be shown now; empty while a character is incomplete or a stop string may be forming.
        taken: How many of the tokens belong to the completion; fewer than given only after a match.
        matched: The stop string that ended the completion, if one did.
    """

    text: str
    taken: int
    matched: str | None = None


class GeneratedText:
    """Turns the tokens of one completion into text.

    Stop strings are looked for in what the tokens after the first `min_tokens` say.

    Args:
        tokenizer: The model's.
        stop: The completion's stop conditions.
    """

    def __init__(self, tokenizer: Tokenizer, stop: StopConditions) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._matcher = StopStringMatcher(stop.stop_strings)
        self._plain = not stop.stop_strings
        self._exempt = stop.min_tokens
        self._keep_stop = stop.include_stop

    def push(self, token_ids: Iterable[int]) -> Piece:
        """Takes the next tokens; after a match no more may come."""
        if self._plain:
            ids = tuple(token_ids)
            return Piece(self._detokenizer.push_all(ids), len(ids))
        shown: list[str] = []
        taken = 0
        for token_id in token_ids:
            taken += 1
            piece = self._detokenizer.push(token_id)
            if self._exempt > 0:
                self._exempt -= 1
                shown.append(piece)
                continue
            found = self._matcher.push(piece)
            shown.append(found.text)
            if found.matched is not None:
                shown.append(found.matched if self._keep_stop else "")
                return Piece("".join(shown), taken, found.matched)
        return Piece("".join(shown), taken)

    def finish(self) -> Piece:
        """What was held back, when the completion ended by itself; its last character may complete a stop string."""
        tail = self._detokenizer.finish()
        if self._plain or self._exempt > 0:
            return Piece(tail, 0)
        found = self._matcher.push(tail)
        if found.matched is not None:
            return Piece(found.text + (found.matched if self._keep_stop else ""), 0, found.matched)
        return Piece(found.text + self._matcher.finish(), 0)
