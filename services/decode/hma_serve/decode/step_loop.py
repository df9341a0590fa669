"""Steps one after the other, or one ahead of the host: when each begins, is drawn, and is taken.

Without overlap a step is begun, drawn and taken in one turn. With overlap the next step's forward pass begins before
the last one's tokens are known: its inputs are still on the device. While it runs, the last step's tokens are taken
(stop conditions, messages, grammars), and then the running step is drawn, which needs what the grammars now allow. The
order of draws, and so the text, is the same.

What overlap costs: a sequence that turns out to have ended is computed once more, and that token is thrown away. Its
pages must not change hands before that step is over, so `leave` says when they may.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from hma_serve.decode.runner import DrawnTokens, Step, StepRunner
from hma_serve.decode.sampling_batch import SamplingBatches
from hma_serve.decode.scheduler import Scheduler, Share
from hma_serve.decode.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token and its logprob."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """What a step drew for one sequence.

    Attributes:
        sequence: Whose.
        token: The token.
        logprob: Its own, if asked for.
        top: The likeliest tokens, best first, as many as were asked for.
    """

    sequence: Sequence
    token: int
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()


class StepFailed(Exception):
    """A step, or the one that ran ahead of it, was lost.

    Attributes:
        sequences: Everyone in these steps.
    """

    def __init__(self, sequences: Items[Sequence]) -> None:
        super().__init__(f"a step with {len(sequences)} sequences failed")
        self.sequences = sequences


@dataclass(slots=True, eq=False)
class _Flight:
    """A step under way."""

    shares: Items[Share]
    step: Step
    after: list[Callable[[], None]] = field(default_factory=list)

    @property
    def sampling(self) -> list[Sequence]:
        return [share.sequence for share in self.shares if share.samples]

    def carries(self, sequence: Sequence) -> bool:
        return any(share.sequence is sequence for share in self.shares)


class StepLoop:
    """Runs the scheduler's steps.

    Args:
        scheduler: Decides who computes what.
        runner: Computes.
        batches: Prepares draws.
        overlap: Begin the next step before the last one's tokens are known.
    """

    def __init__(
        self, scheduler: Scheduler, runner: StepRunner, batches: SamplingBatches, *, overlap: bool = False
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._batches = batches
        self.overlap = overlap
        self._flight: _Flight | None = None

    @property
    def idle(self) -> bool:
        """Whether no step is under way."""
        return self._flight is None

    def leave(self, sequence: Sequence, release: Callable[[], None]) -> None:
        """Takes a sequence out; `release` is called as soon as no step under way computes it: perhaps now."""
        self._scheduler.leave(sequence.stream)

        def done() -> None:
            self._batches.leave(sequence)
            release()

        if self._flight is not None and self._flight.carries(sequence):
            self._flight.after.append(done)
        else:
            done()

    def turn(self, take: Callable[[Items[Share], Items[Token]], None]) -> Items[Share]:
        """Begins a step if there is one to begin, and takes one if there is one to take.

        Args:
            take: Told what a step computed and drew; sequences may leave and others join meanwhile.

        Returns:
            What the step that was taken has computed; empty: none was taken.

        Raises:
            StepFailed: From what the runner raised.
        """
        before, drawn = self._flight, None
        shares = self._scheduler.next_step()
        try:
            ahead = self._begin(shares) if shares else None
            drawn = before.step.drawn() if before is not None else None
        except Exception as exc:
            raise self._lost(before, shares) from exc
        self._flight = ahead
        if before is not None and drawn is not None:
            self._take(before, drawn, take)
        taken = before
        if ahead is not None:
            self._draw(ahead, take)
            taken = before if self.overlap else ahead
        return taken.shares if taken is not None else ()

    def settle(self, take: Callable[[Items[Share], Items[Token]], None]) -> None:
        """Takes the step under way, if one is, and begins none: afterwards host and device know the same."""
        before, self._flight = self._flight, None
        if before is None:
            return
        try:
            drawn = before.step.drawn()
        except Exception as exc:
            raise self._lost(before, ()) from exc
        self._take(before, drawn, take)

    def _begin(self, shares: Items[Share]) -> _Flight:
        flight = _Flight(shares, self._runner.begin(shares))
        for share in shares:
            share.sequence.computed += share.count
        for row, sequence in enumerate(flight.sampling):
            sequence.row = row
            sequence.awaited += 1
        return flight

    def _draw(self, flight: _Flight, take: Callable[[Items[Share], Items[Token]], None]) -> None:
        drawn = None
        try:
            sampling = flight.sampling
            rows, inputs = self._batches.rows(sampling), self._batches.inputs(sampling)
            flight.step.draw(rows, inputs, self._batches.occurrences)
            drawn = None if self.overlap else flight.step.drawn()
        except Exception as exc:
            raise self._lost(flight, ()) from exc
        if drawn is not None:
            self._flight = None
            self._take(flight, drawn, take)

    def _take(self, flight: _Flight, drawn: DrawnTokens, take: Callable[[Items[Share], Items[Token]], None]) -> None:
        sampling = flight.sampling
        for sequence in sampling:
            sequence.awaited -= 1
        # Who has left meanwhile gets nothing.
        tokens = [token for token in _tokens(sampling, drawn) if token.sequence in self._scheduler]
        for action in flight.after:
            action()
        take(flight.shares, tokens)

    def _lost(self, flight: _Flight | None, shares: Items[Share]) -> StepFailed:
        """Nothing is under way any more."""
        last = None if self._flight is flight else self._flight
        flights = [each for each in (flight, last) if each is not None]
        self._flight = None
        for each in flights:
            # The device may still write to pages that are free in a moment.
            with contextlib.suppress(Exception):
                each.step.drawn()
            for action in each.after:
                action()
            each.after.clear()
        everyone = [share.sequence for each in flights for share in each.shares]
        return StepFailed(list(dict.fromkeys([*everyone, *(share.sequence for share in shares)])))


def _tokens(sampling: Items[Sequence], drawn: DrawnTokens) -> list[Token]:
    tokens, reported = [], 0
    for sequence, token in zip(sampling, drawn.tokens, strict=True):
        wanted = sequence.sampling.logprobs
        if wanted is None:
            tokens.append(Token(sequence, token))
            continue
        pairs = zip(drawn.top_tokens[reported][:wanted], drawn.top_logprobs[reported][:wanted], strict=True)
        tokens.append(Token(sequence, token, drawn.chosen[reported], tuple(Alternative(*pair) for pair in pairs)))
        reported += 1
    return tokens
