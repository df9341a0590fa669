"""The text: read, made uniform, and split so that what is measured was never trained on."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from pathlib import Path

from hma_serve.core.errors import InvalidArgument

_SECTION_CHARS = 64 << 10
_HELD_OUT_EVERY = 128
_MAX_CORPUS_BYTES = 4 << 30
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " ", "\t": " ", "\r": None, "_": None})


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus split by whole sections.

    Attributes:
        train: Sections to learn from.
        held_out: Every 128th section of 64 Ki characters; the same books, other passages.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_corpus(path: Path) -> Corpus:
    """Reads UTF-8 text, gzipped or not.

    Raises:
        InvalidArgument: It cannot be read, is not UTF-8 or is too short to split.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            text = file.read(_MAX_CORPUS_BYTES).decode()
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"cannot read the corpus {path}: {error}", field="corpus") from error
    sections = _sections(normalise(text))
    held_out = tuple(sections[_HELD_OUT_EVERY // 2 :: _HELD_OUT_EVERY])
    if not held_out:
        needed = _SECTION_CHARS * _HELD_OUT_EVERY // 2 >> 20
        raise InvalidArgument(f"the corpus {path} is too short: at least {needed} MiB are needed", field="corpus")
    kept = (section for index, section in enumerate(sections) if index % _HELD_OUT_EVERY != _HELD_OUT_EVERY // 2)
    return Corpus(tuple(kept), held_out)


def normalise(text: str) -> str:
    """Straight quotes, single spaces, at most one empty line: what a person at a keyboard types."""
    text = re.sub(r" +", " ", text.translate(_PLAIN))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text))


def _sections(text: str) -> list[str]:
    """Cuts at paragraph ends, so that no sentence straddles the split."""
    sections, start = [], 0
    while start < len(text):
        cut = text.find("\n\n", start + _SECTION_CHARS)
        end = len(text) if cut < 0 else cut + 2
        sections.append(text[start:end])
        start = end
    return sections
