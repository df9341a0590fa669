"""Tickets: who may fill which pages, judged on an injected clock."""

import pytest

from hma_serve.core.errors import FailedPrecondition, NotFound
from hma_serve.decode.tickets import NONCE_BYTES, TicketState, TicketTable


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> TicketTable:
    return TicketTable(lease=30.0, clock=clock)


def test_nonces_are_128_bits_and_differ(table: TicketTable) -> None:
    nonces = {table.issue(stream, 1, committed=False).nonce for stream in range(200)}
    assert len(nonces) == 200
    assert {len(nonce) for nonce in nonces} == {NONCE_BYTES}


def test_a_ticket_is_found_by_nonce_and_epoch(table: TicketTable) -> None:
    ticket = table.issue(7, 3, committed=False)
    assert table.find(ticket.nonce, 3) is ticket
    with pytest.raises(NotFound):
        table.find(bytes(NONCE_BYTES), 3)
    for stale in (2, 4):
        with pytest.raises(FailedPrecondition) as refused:
            table.find(ticket.nonce, stale)
        assert refused.value.field == "epoch"


def test_a_lease_runs_out_unless_it_is_renewed(table: TicketTable, clock: Clock) -> None:
    first, second = table.issue(1, 1, committed=False), table.issue(2, 1, committed=False)
    clock.now += 29.9
    assert table.expired() == []
    table.renew(second)
    clock.now += 0.2
    assert table.expired() == [first]
    table.drop(first)
    assert table.next_expiry() == second.expires
    clock.now += 30
    assert table.expired() == [second]


def test_a_committed_ticket_needs_no_lease(table: TicketTable, clock: Clock) -> None:
    table.issue(1, 1, committed=True)
    clock.now += 10_000
    assert table.expired() == []
    assert table.next_expiry() is None


def test_one_stream_fills_a_ticket_at_a_time(table: TicketTable) -> None:
    ticket = table.issue(1, 1, committed=False)
    table.attach(ticket, 10)
    assert table.attached(10) is ticket
    with pytest.raises(FailedPrecondition):
        table.attach(ticket, 11)
    assert table.detach(10) is ticket
    assert table.attached(10) is None
    table.attach(ticket, 11)
    assert table.attached(11) is ticket


def test_attaching_renews_the_lease(table: TicketTable, clock: Clock) -> None:
    ticket = table.issue(1, 1, committed=False)
    clock.now += 29
    table.attach(ticket, 10)
    clock.now += 29
    assert table.expired() == []


def test_a_commit_ends_the_streams_right(table: TicketTable) -> None:
    ticket = table.issue(1, 1, committed=False)
    table.attach(ticket, 10)
    table.commit(ticket)
    assert ticket.state is TicketState.COMMITTED
    assert table.attached(10) is None
    with pytest.raises(FailedPrecondition):
        table.attach(ticket, 11)


def test_dropping_names_the_stream_that_was_filling(table: TicketTable) -> None:
    ticket = table.issue(1, 1, committed=False)
    table.attach(ticket, 10)
    assert table.drop(ticket) == 10
    assert table.drop(ticket) is None
    assert table.attached(10) is None
    assert len(table) == 0
    with pytest.raises(NotFound):
        table.find(ticket.nonce, 1)
