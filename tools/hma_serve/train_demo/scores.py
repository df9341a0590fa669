"""The few numbers that say what a demo checkpoint can do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hma_serve.train_demo.tasks import DISTRACTORS

COPY_TOKENS = 32
COPY_DISTANCE = 1000


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
        found: Share of look-ups among 20 distractors answered exactly.
        samples: Number of copies of each kind, and of look-ups.
    """

    nats_per_byte: float
    prose: Copying
    random: Copying
    found: float
    samples: int

    def lines(self) -> list[str]:
        """For people to read."""
        back = f"copied from {COPY_DISTANCE:,} tokens back"
        return [
            f"held-out loss: {self.nats_per_byte:.4f} nats per byte ({self.nats_per_byte / math.log(2):.4f} bits)",
            f"{COPY_TOKENS} tokens of prose {back}: {self.prose.guided:.1%} right, on its own {self.prose.alone:.1%}",
            f"{COPY_TOKENS} random tokens {back}: {self.random.guided:.1%} right, on its own {self.random.alone:.1%}",
            f"look-up among {DISTRACTORS} distractors: {self.found:.1%} exact",
        ]
