"""A checkpoint's tokenizer: text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from hma_serve.core.errors import FailedPrecondition, InvalidArgument, NotFound
from hma_serve.text.byte_level import byte_table
from hma_serve.text.detokenizer import IncrementalDetokenizer

_FILE = "tokenizer.json"


class Tokenizer:
    """The tokenizer of one checkpoint; immutable and safe to share between threads.

    Args:
        definition: The text of a `tokenizer.json` with a byte-level decoder.

    Raises:
        FailedPrecondition: The definition cannot be read, or its decoder is another one.
    """

    def __init__(self, definition: str) -> None:
        _require_byte_level(definition)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as exc:  # the library raises bare Exception
            raise FailedPrecondition(f"{_FILE} cannot be used: {exc}", field="--model") from exc
        # A prompt is never cut or filled up behind the caller's back.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._table = byte_table(self._tokenizer.get_vocab(with_added_tokens=True))
        self._special = frozenset(
            token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._visible = [b"" if token_id in self._special else data for token_id, data in enumerate(self._table)]

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Reads the checkpoint's `tokenizer.json`; blocks for the time of a file read and a parse (0.5 s for Qwen3).

        Raises:
            NotFound: There is no such file.
            FailedPrecondition: It cannot be used.
        """
        try:
            definition = (directory / _FILE).read_text(encoding="utf-8")
        except FileNotFoundError as exc:
            raise NotFound(f"{directory} has no {_FILE}; --model needs a complete checkpoint", field="--model") from exc
        except UnicodeDecodeError as exc:
            raise FailedPrecondition(f"{directory / _FILE} is not UTF-8", field="--model") from exc
        return cls(definition)

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return len(self._table)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that have no text of their own, such as end of sequence."""
        return self._special

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Releases the interpreter lock while it works: other threads run on.

        Args:
            text: Special tokens that are written in it count as such.
            add_special: Add the special tokens that the checkpoint's own post-processor adds. A rendered conversation
                has all of its own.

        Raises:
            InvalidArgument: The text has a lone surrogate, which no UTF-8 can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidArgument("the text has a lone surrogate and is not valid Unicode", field="prompt") from exc
        # The batch call is the one that lets go of the lock; `encode` keeps it for its whole duration.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `token_ids`; ids without a token are nothing."""
        table = self._visible if skip_special else self._table
        return b"".join([table[i] for i in token_ids if i < len(table)]).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, special or not; an id without a token has none."""
        return self._table[token_id] if token_id < len(self._table) else b""

    def detokenizer(self, *, skip_special: bool = True) -> IncrementalDetokenizer:
        """A detokenizer for one completion."""
        return IncrementalDetokenizer(self._visible if skip_special else self._table)


def _require_byte_level(definition: str) -> None:
    try:
        parsed: Any = json.loads(definition)
        decoder = parsed["decoder"]["type"]
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise FailedPrecondition(f"{_FILE} is not a tokenizer definition with a decoder", field="--model") from exc
    if decoder != "ByteLevel":
        raise FailedPrecondition(
            f"{_FILE} has a {decoder} decoder; only byte-level vocabularies (Qwen, Llama 3, GPT-2) are supported",
            field="--model",
        )
