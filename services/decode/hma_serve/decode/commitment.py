"""How much memory a request is given when: all that it may ever need before it starts, or as it goes.

*Full*: a request is admitted when there are pages for its prompt and all of `max_tokens`; nothing can go wrong later.

*Over*: it is admitted with pages for its prompt; those for its output are taken between steps, as it grows. When they
run out, somebody is *paused*: its computed pages are taken away, its packed prompt pages are not, and when there is
room it computes its prompt's rest and its own output again and goes on. First to be paused is who waits for its KV and
so loses nothing, then who comes last: of the lowest priority the youngest. Nobody is admitted while anybody is paused.

Somebody always advances: a request is admitted only if each could still grow to its full length were all others
paused (`PagePool.can_finish_each`), and who comes first is never paused for another's sake.

Either way a step finds all pages that it needs: `prepare` is called before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Protocol

from hma_serve.core.errors import ResourceExhausted
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.pages import Need, PagePool, Reservation
from hma_serve.decode.scheduler import Scheduler
from hma_serve.decode.sequence import Sequence
from hma_serve.decode.step_loop import StepLoop

_RETRY_AFTER = 0.2


class Commitment(Protocol):
    """Gives pages to requests."""

    @property
    def paused(self) -> int:
        """Sequences that wait for memory in order to go on."""
        ...

    @property
    def pauses(self) -> int:
        """How often one was paused."""
        ...

    @property
    def free_tokens(self) -> int:
        """Unquantised tokens that are free for new requests."""
        ...

    def reserve(self, need: Need, keys: Items[bytes], tokens: int) -> Reservation:
        """Takes a request's first pages.

        Args:
            need: All that it may ever need; fits an empty pool.
            keys: Of its packed groups.
            tokens: That it has, prompt and earlier output.

        Raises:
            ResourceExhausted: They are not free.
        """
        ...

    def join(self, sequence: Sequence) -> None:
        """Lets a sequence run as soon as it can; its packed KV is complete."""
        ...

    def leave(self, sequence: Sequence) -> None:
        """It ends; its pages are freed by whoever calls this."""
        ...

    def prepare(self, settle: Callable[[], None]) -> None:
        """Gives all running sequences the pages of the next step.

        Args:
            settle: Takes the step under way, if one is; sequences may end meanwhile.
        """
        ...


class FullCommitment:
    """See the module.

    Args:
        pool: The pages.
        scheduler: Who runs.
    """

    paused = 0
    pauses = 0

    def __init__(self, pool: PagePool, scheduler: Scheduler) -> None:
        self._pool = pool
        self._scheduler = scheduler

    @property
    def free_tokens(self) -> int:
        """See `Commitment`."""
        return self._pool.free_tokens

    def reserve(self, need: Need, keys: Items[bytes], tokens: int) -> Reservation:
        """See `Commitment`."""
        if not self._pool.can_reserve(need, keys):
            raise _full()
        return self._pool.reserve(need, keys)

    def join(self, sequence: Sequence) -> None:
        """See `Commitment`."""
        self._scheduler.join(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Nothing to forget."""

    def prepare(self, settle: Callable[[], None]) -> None:
        """They have them."""


class OverCommitment:
    """See the module.

    Args:
        pool: The pages.
        scheduler: Who runs.
        steps: Told who is paused.
    """

    def __init__(self, pool: PagePool, scheduler: Scheduler, steps: StepLoop) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self._steps = steps
        self._held: dict[Reservation, Sequence | None] = {}  # oldest first; None: its KV is to come
        self.pauses = 0

    @property
    def paused(self) -> int:
        """See `Commitment`."""
        return len(self._paused())

    @property
    def free_tokens(self) -> int:
        """See `Commitment`."""
        return 0 if self._paused() else self._pool.free_tokens

    def reserve(self, need: Need, keys: Items[bytes], tokens: int) -> Reservation:
        """See `Commitment`."""
        if self._paused():
            raise _full()
        # With room for the first new token, so that nobody is paused at once.
        groups = min(need.plain_groups, math.ceil((tokens + 1) / GROUP_TOKENS) - need.packed_groups)
        pages = self._reserved(need, keys, groups)
        if not self._pool.can_finish_each():
            # Old prefixes between the pages of others may have taken more extents than there need be.
            self._pool.free(pages)
            self._pool.forget_idle_prefixes()
            pages = self._reserved(need, keys, groups)
            if not self._pool.can_finish_each():
                self._pool.free(pages)
                raise _full()
        self._held[pages] = None
        return pages

    def join(self, sequence: Sequence) -> None:
        """See `Commitment`."""
        self._held[sequence.pages] = sequence
        if not _missing(sequence):
            self._scheduler.join(sequence)

    def leave(self, sequence: Sequence) -> None:
        """See `Commitment`."""
        self._held.pop(sequence.pages, None)

    def prepare(self, settle: Callable[[], None]) -> None:
        """See `Commitment`."""
        # What is under way may hold pages of somebody who has left, and tokens of somebody who must be paused.
        stuck = self._paused() and not len(self._scheduler)
        if stuck or not self._pool.can_grow(sum(map(_missing, self._scheduler))):
            settle()
        for sequence in self._joined():
            if sequence in self._scheduler:
                self._grow(sequence)
        self._resume()

    def _grow(self, sequence: Sequence) -> None:
        missing = _missing(sequence)
        while missing and not self._pool.can_grow(missing):
            victim = self._victim()
            self._pause(victim)
            if victim is sequence.pages:
                return
        if missing:
            self._pool.grow(sequence.pages, missing)

    def _resume(self) -> None:
        """In order, and nobody overtakes."""
        for sequence in self._paused():
            missing = _missing(sequence, ahead=1)
            while not len(self._scheduler) and not self._pool.can_grow(missing):
                self._pause(self._victim())
            if not self._pool.can_grow(missing):
                return
            self._pool.grow(sequence.pages, missing)
            self._scheduler.join(sequence)

    def _victim(self) -> Reservation:
        """Who loses nothing, else who comes last."""
        waiting = [pages for pages, sequence in self._held.items() if sequence is None and pages.plain_groups]
        giving = [sequence.pages for sequence in self._joined() if sequence.pages.plain_groups]
        return (waiting or giving)[-1]

    def _pause(self, pages: Reservation) -> None:
        sequence = self._held[pages]
        if sequence is not None:
            assert not sequence.awaited, "a sequence was paused in the middle of a step"
            self._steps.leave(sequence, lambda: None)
            sequence.computed = pages.need.packed_groups * GROUP_TOKENS
            self.pauses += 1
        self._pool.strip(pages)

    def _joined(self) -> list[Sequence]:
        """By priority, the oldest first among equals."""
        joined = (sequence for sequence in self._held.values() if sequence is not None)
        return sorted(joined, key=lambda sequence: -sequence.priority)

    def _paused(self) -> list[Sequence]:
        return [sequence for sequence in self._joined() if sequence not in self._scheduler]

    def _reserved(self, need: Need, keys: Items[bytes], groups: int) -> Reservation:
        if not self._pool.can_reserve(need, keys, groups):
            raise _full()
        return self._pool.reserve(need, keys, groups)


def _missing(sequence: Sequence, ahead: int = 0) -> int:
    """Groups that it lacks to compute all tokens that it has, and some that it does not have yet."""
    return sequence.pages.missing_groups(len(sequence.tokens) + sequence.awaited + ahead)


def _full() -> ResourceExhausted:
    return ResourceExhausted("not enough KV memory is free on this decode worker", retry_after=_RETRY_AFTER)
