"""Who computes what in the next step.

Every running sequence that needs one token gets it in every step. What is left of the step's token budget goes to
sequences that have more to compute (the end of a prompt, a whole prompt without prefill, output of an earlier attempt),
in pieces, so that nobody's prompt stalls the others for longer than one budget.

Among those, higher priorities go first. Within a priority everyone gets an equal part, so that the last few tokens of
one prompt never wait behind the whole of another; what some leave goes to the nearest deadline first, then to who
joined first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import groupby

from hma_serve.decode.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Share:
    """One sequence's part of a step.

    Attributes:
        sequence: Whose.
        start: Position of the first token to compute.
        count: Tokens to compute.
        samples: Whether the step reaches the sequence's last token, and so gives the next.
        carried: The row of the step before whose drawn token is this share's only token, because the host does not know
            it yet; None: the tokens are known.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    carried: int | None

    @classmethod
    def of(cls, sequence: Sequence, count: int) -> Share:
        """The first `count` pending tokens."""
        start = sequence.computed
        carried = sequence.row if start >= len(sequence.tokens) else None
        return cls(sequence, start, count, count == sequence.pending, carried)

    @property
    def tokens(self) -> Items[int]:
        """The tokens to compute; empty when they are carried."""
        return self.sequence.tokens[self.start : self.start + self.count]


class Scheduler:
    """The running sequences, in the order in which they joined.

    Args:
        step_tokens: Tokens that a step computes at most; at least as many as sequences can run.
    """

    def __init__(self, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self._running: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._running.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return self._running.get(sequence.stream) is sequence

    def join(self, sequence: Sequence) -> None:
        """Lets a sequence run; its packed KV is complete."""
        self._running[sequence.stream] = sequence

    def leave(self, stream: int) -> None:
        """Takes a sequence out, between two steps. Idempotent."""
        self._running.pop(stream, None)

    def next_step(self) -> list[Share]:
        """The next step's work; empty when nothing can be computed. Single tokens come first."""
        shares = [Share.of(sequence, 1) for sequence in self if sequence.pending == 1]
        budget = self.step_tokens - len(shares)
        # Sorting is stable: equals stay in the order in which they joined.
        longer = sorted((sequence for sequence in self if sequence.pending > 1), key=_urgency)
        for _, equals in groupby(longer, key=lambda sequence: sequence.priority):
            for sequence, count in _parts(list(equals), budget):
                shares.append(Share.of(sequence, count))
                budget -= count
        return shares


def _urgency(sequence: Sequence) -> tuple[int, float]:
    return -sequence.priority, math.inf if sequence.deadline is None else sequence.deadline


def _parts(sequences: list[Sequence], budget: int) -> Iterator[tuple[Sequence, int]]:
    """Divides a budget: an equal part for each, at least one token, and what is left over to the first."""
    equal = max(1, budget // len(sequences))
    spare = budget - sum(min(sequence.pending, equal) for sequence in sequences)
    for sequence in sequences:
        more = min(max(0, sequence.pending - equal), max(0, spare))
        count = min(sequence.pending, equal, budget) + more
        spare -= more
        budget -= count
        if count > 0:
            yield sequence, count
