"""The bytes behind each token of a byte-level vocabulary.

GPT-2's vocabulary (and Qwen's, and Llama 3's) writes every byte as one printable character. Undoing that once per
token at load time makes detokenising a concatenation of bytes, which is what lets it be incremental with bounded work.
"""

from __future__ import annotations

from collections.abc import Mapping


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + position): byte for position, byte in enumerate(others)})
    return table


_BYTES = _byte_of_character()


def token_to_bytes(token: str) -> bytes:
    """The bytes of one vocabulary entry.

    An entry with any character outside the alphabet (an added token with a space, say) stands for its own UTF-8, which
    is the rule of the `tokenizers` library's ByteLevel decoder.
    """
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()


def byte_table(vocabulary: Mapping[str, int]) -> list[bytes]:
    """The bytes of every id; ids that no token has map to nothing."""
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        table[token_id] = token_to_bytes(token)
    return table
