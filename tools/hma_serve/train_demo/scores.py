"""The few numbers that say what a demo checkpoint can do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hma_serve.train_demo.tasks import DISTRACTORS

COPY_TOKENS = 32
COPY_DISTANCE = 1000


@dataclass(frozen=True, slots=True)
class Scores:
    """What a checkpoint can do.

    Attributes:
        nats_per_byte: Held-out loss, windows of 2,048 tokens, per byte of UTF-8 text.
        copied_prose: Share of tokens right when a 32-token passage of held-out prose begins again 1,000 tokens later.
        copied_random: The same for 32 random tokens amid prose.
        found: Share of look-ups among 20 distractors answered exactly.
        samples: Number of copies of each kind, and of look-ups.
    """

    nats_per_byte: float
    copied_prose: float
    copied_random: float
    found: float
    samples: int

    def lines(self) -> list[str]:
        """For people to read."""
        return [
            f"held-out loss: {self.nats_per_byte:.4f} nats per byte ({self.nats_per_byte / math.log(2):.4f} bits)",
            f"{COPY_TOKENS} tokens of prose copied from {COPY_DISTANCE:,} tokens back: {self.copied_prose:.1%} right",
            f"{COPY_TOKENS} random tokens copied from {COPY_DISTANCE:,} tokens back: {self.copied_random:.1%} right",
            f"look-up among {DISTRACTORS} distractors: {self.found:.1%} exact",
        ]
