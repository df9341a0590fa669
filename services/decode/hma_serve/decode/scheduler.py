"""Who computes what in the next step.

Every running sequence that needs one token gets it in every step. What is left of the step's token budget goes to
sequences that have more to compute (the end of a prompt, a whole prompt without prefill, output of an earlier attempt),
first come first served and in pieces, so that nobody's prompt stalls the others for longer than one budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hma_serve.decode.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Share:
    """One sequence's part of a step.

    Attributes:
        sequence: Whose.
        count: Pending tokens to compute, from the first.
    """

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, and so gives the next."""
        return self.count == self.sequence.pending


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

    def join(self, sequence: Sequence) -> None:
        """Lets a sequence run; its packed KV is complete."""
        self._running[sequence.stream] = sequence

    def leave(self, stream: int) -> None:
        """Takes a sequence out, between two steps. Idempotent."""
        self._running.pop(stream, None)

    def next_step(self) -> list[Share]:
        """The next step's work; empty when nothing runs. Single tokens come first."""
        single = [Share(sequence, 1) for sequence in self if sequence.pending == 1]
        budget = self.step_tokens - len(single)
        longer = []
        for sequence in self:
            if sequence.pending > 1 and budget > 0:
                share = Share(sequence, min(sequence.pending, budget))
                longer.append(share)
                budget -= share.count
        return single + longer
