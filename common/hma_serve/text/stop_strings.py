"""Finding stop strings in text that arrives in pieces, without ever showing a part of one.

Text that may still become a stop string is held back; everything else is released at once. The result depends on the
text alone, not on how it was cut: the match that *ends* first wins, and among those that end together the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """What one piece of text led to.

    Attributes:
        text: Text that is now certain not to be part of a stop string; with `matched`, what precedes the stop string.
        matched: The stop string that ended the text, if one did.
    """

    text: str
    matched: str | None = None


class _Progress:
    """How far the text's end matches one stop string (Knuth, Morris and Pratt)."""

    __slots__ = ("_fallback", "_pattern", "matched")

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._fallback = _borders(pattern)
        self.matched = 0

    def advance(self, character: str) -> bool:
        """Takes one character; True when it completes the pattern (which ends the matcher's life)."""
        matched = self.matched
        while matched and self._pattern[matched] != character:
            matched = self._fallback[matched - 1]
        if self._pattern[matched] == character:
            matched += 1
        self.matched = matched
        return matched == len(self._pattern)


def _borders(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[position] != pattern[length]:
            length = borders[length - 1]
        if pattern[position] == pattern[length]:
            length += 1
        borders[position] = length
    return borders


class StopStringMatcher:
    """Watches one completion's text for stop strings.

    Holds back fewer characters than the longest stop string has. After a match it must not be used again.

    Args:
        stop_strings: None of them empty.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        # The longest first, so that of two matches that end together the longer one is seen first.
        self._patterns = sorted(set(stop_strings), key=lambda text: (-len(text), text))
        self._progress = [_Progress(pattern) for pattern in self._patterns]
        self._held = ""

    def push(self, piece: str) -> StopMatch:
        """Takes the next piece of text; returns what may be shown now."""
        if not self._progress:
            return StopMatch(piece)
        text = self._held + piece
        for position, character in enumerate(piece, start=len(self._held)):
            matched = self._advance(character)
            if matched is not None:
                return StopMatch(text[: position + 1 - len(matched)], matched)
        keep = max(progress.matched for progress in self._progress)
        self._held = text[len(text) - keep :]
        return StopMatch(text[: len(text) - keep])

    def finish(self) -> str:
        """The text that was held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        found = None
        for progress, pattern in zip(self._progress, self._patterns, strict=True):
            if progress.advance(character) and found is None:
                found = pattern
        return found
