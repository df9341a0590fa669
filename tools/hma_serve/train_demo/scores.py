"""The few numbers that say what a demo checkpoint can do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hma_serve.train_demo.tasks import DISTRACTORS

COPY_TOKENS = 32
COPY_DISTANCE = 1000

CUE_TOKENS = 16
"""Tokens given again before a copy goes on. In prose fewer often stand in several places, and any of them is right."""

SHORT_CUE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Copying:
    """How well a 32-token passage comes out when it begins again 1,000 tokens later, as shares of its tokens.

    Attributes:
        guided: Right given all the passage's true tokens before: what each single step can do.
        alone: Right when the model goes on from its own tokens: after one mistake it usually loses the thread.
    """

    guided: float
    alone: float


@dataclass(frozen=True, slots=True)
class Scores:
    """What a checkpoint can do.

    Attributes:
        nats_per_byte: Held-out loss, windows of 2,048 tokens, per byte of UTF-8 text.
        prose: Copying of held-out prose.
        random: Copying of random tokens amid prose.
        short_cue: Copying of held-out prose after the short cue.
        found: Share of look-ups among 20 distractors answered exactly.
        samples: Number of copies of each kind, and of look-ups.
    """

    nats_per_byte: float
    prose: Copying
    random: Copying
    short_cue: Copying
    found: float
    samples: int

    def lines(self) -> list[str]:
        """For people to read."""
        return [
            f"held-out loss: {self.nats_per_byte:.4f} nats per byte ({self.nats_per_byte / math.log(2):.4f} bits)",
            _copy_line("tokens of prose", CUE_TOKENS, self.prose),
            _copy_line("random tokens", CUE_TOKENS, self.random),
            _copy_line("tokens of prose", SHORT_CUE_TOKENS, self.short_cue),
            f"look-up among {DISTRACTORS} distractors: {self.found:.1%} exact",
        ]


def _copy_line(what: str, cue: int, score: Copying) -> str:
    return (
        f"{COPY_TOKENS} {what} copied from {COPY_DISTANCE:,} tokens back after a cue of {cue}: "
        f"{score.guided:.1%} right, on its own {score.alone:.1%}"
    )
