"""Tickets: who may fill which pages, and for how long they wait.

A ticket is a random 128-bit nonce and the attempt's number. It is a lease while its request waits for KV: whoever lets
it run out loses the pages, on a clock that nobody can set, swept whether or not other work arrives. From the commit on
the request's own stream is what keeps it alive.

Exactly one KV stream at a time may be attached. After one that went away another may begin anew or go on where it
ended, and whatever of the first is still under way is told apart by the stream's number.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from hma_serve.core.errors import FailedPrecondition, NotFound

NONCE_BYTES = 16


class TicketState(Enum):
    """Where a ticket stands."""

    WAITING = auto()
    """Its KV is to come or coming."""
    COMMITTED = auto()
    """All of its KV is in its pages."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One ticket.

    Attributes:
        nonce: 16 unguessable bytes.
        epoch: The attempt's number.
        stream: The request's stream.
        expires: Seconds of the table's clock; moot once committed.
        state: Where it stands.
        push: The attached KV stream, if one is.
    """

    nonce: bytes
    epoch: int
    stream: int
    expires: float
    state: TicketState = field(default=TicketState.WAITING)
    push: int | None = None


class TicketTable:
    """All tickets of one engine.

    Args:
        lease: Seconds that a ticket lives without a sign of life.
        clock: Monotonic seconds.
        mint: Makes nonces.
    """

    def __init__(
        self, *, lease: float, clock: Callable[[], float], mint: Callable[[int], bytes] = secrets.token_bytes
    ) -> None:
        self.lease = lease
        self._clock = clock
        self._mint = mint
        self._tickets: dict[bytes, Ticket] = {}
        self._pushes: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def issue(self, stream: int, epoch: int, *, committed: bool) -> Ticket:
        """A new ticket; `committed` when there is no KV to wait for."""
        state = TicketState.COMMITTED if committed else TicketState.WAITING
        ticket = Ticket(self._mint(NONCE_BYTES), epoch, stream, self._clock() + self.lease, state)
        self._tickets[ticket.nonce] = ticket
        return ticket

    def find(self, nonce: bytes, epoch: int) -> Ticket:
        """The ticket that a caller names.

        Raises:
            NotFound: There is none, or none any more.
            FailedPrecondition: It belongs to another attempt.
        """
        ticket = self._tickets.get(nonce)
        if ticket is None:
            raise NotFound(
                "no such ticket: it was never issued here, or released, or its lease ran out", field="ticket"
            )
        if ticket.epoch != epoch:
            raise FailedPrecondition(f"the ticket belongs to attempt {ticket.epoch}, not {epoch}", field="epoch")
        return ticket

    def renew(self, ticket: Ticket) -> None:
        """Starts its lease again."""
        ticket.expires = self._clock() + self.lease

    def attach(self, ticket: Ticket, push: int) -> None:
        """Lets a KV stream fill it.

        Raises:
            FailedPrecondition: Another stream does, or did.
        """
        if ticket.state is TicketState.COMMITTED:
            raise FailedPrecondition("the ticket's KV is complete, or none was asked for", field="ticket")
        if ticket.push is not None:
            raise FailedPrecondition("another stream is filling this ticket", field="ticket")
        ticket.push = push
        self._pushes[push] = ticket
        self.renew(ticket)

    def attached(self, push: int) -> Ticket | None:
        """The ticket that a KV stream fills; None when it may fill none (any more)."""
        return self._pushes.get(push)

    def detach(self, push: int) -> Ticket | None:
        """Ends a KV stream's right to its ticket, which is returned if it had one."""
        ticket = self._pushes.pop(push, None)
        if ticket is not None:
            ticket.push = None
        return ticket

    def commit(self, ticket: Ticket) -> None:
        """Its KV is complete; the KV stream has no more rights to it."""
        ticket.state = TicketState.COMMITTED
        if ticket.push is not None:
            self.detach(ticket.push)

    def drop(self, ticket: Ticket) -> int | None:
        """Forgets it; returns the KV stream that was filling it, if one was. Idempotent."""
        self._tickets.pop(ticket.nonce, None)
        push = ticket.push
        if push is not None:
            self.detach(push)
        return push

    def expired(self) -> list[Ticket]:
        """Tickets whose lease has run out."""
        now = self._clock()
        return [t for t in self._tickets.values() if t.state is TicketState.WAITING and t.expires <= now]

    def next_expiry(self) -> float | None:
        """When the next lease runs out, on the table's clock."""
        return min((t.expires for t in self._tickets.values() if t.state is TicketState.WAITING), default=None)
