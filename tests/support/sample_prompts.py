"""Prompts out of a text: seeded, as long as asked for, in tokens of the demo model."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from hma_serve.checkpoint import resolve_checkpoint
from hma_serve.text import Tokenizer

_TEXT = Path(__file__).parents[1] / "golden" / "text" / "sample.txt"


@cache
def _tokens() -> tuple[int, ...]:
    return tuple(Tokenizer.from_directory(resolve_checkpoint("demo")).encode(_TEXT.read_text()))


def sample_prompt(length: int, seed: int) -> list[int]:
    """Pieces of the text in a seeded order, so that no two seeds share more than their pieces."""
    draw, text = random.Random(seed), _tokens()
    prompt: list[int] = []
    while len(prompt) < length:
        start = draw.randrange(len(text) - 48)
        prompt += text[start : start + 48]
    return prompt[:length]
