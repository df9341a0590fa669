"""Token ids to text, one token at a time, never splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

_UTF8 = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """Turns one completion's tokens into text as they come.

    Bytes of an unfinished character (three at most) wait for the tokens that finish it; bytes that can never become a
    character turn into U+FFFD at once. The concatenation of all pieces and of `finish()` equals the one-shot decode,
    however the tokens were grouped. Work per token is proportional to its own bytes.

    Args:
        table: The bytes of each token id; ids beyond it are nothing.
    """

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = _UTF8(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        if token_id >= len(self._table):
            return ""
        return self._decoder.decode(self._table[token_id])

    def push_all(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        return "".join([self.push(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)
