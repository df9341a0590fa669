"""An iteration on another thread: order, failures, the lead it may take, and its end."""

import itertools
import threading
from collections.abc import Generator

import pytest

from hma_serve.client._pump import AHEAD, Pump

PATIENCE = 10.0


class Counting:
    """Counts without end, and notes how far it came and where it ran."""

    def __init__(self) -> None:
        self.made = 0
        self.thread: int | None = None
        self.closed = threading.Event()

    def items(self) -> Generator[int, None, None]:
        self.thread = threading.get_ident()
        try:
            for self.made in itertools.count(1):
                yield self.made
        finally:
            self.closed.set()


def test_items_keep_their_order_and_come_from_another_thread() -> None:
    counting = Counting()
    assert list(itertools.islice(Pump(counting.items()).run(), 1000)) == list(range(1, 1001))
    assert counting.thread != threading.get_ident()


def test_an_end_is_an_end() -> None:
    assert list(Pump(letter for letter in "ab").run()) == ["a", "b"]
    assert list(Pump(letter for letter in "").run()) == []


def test_a_failure_is_raised_where_the_items_are_read() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise LookupError("here")

    items = Pump(failing()).run()
    assert next(items) == 1
    with pytest.raises(LookupError, match="here"):
        next(items)


def test_a_reader_that_leaves_ends_the_iteration_on_its_own_thread() -> None:
    counting = Counting()
    items = Pump(counting.items()).run()
    assert next(items) == 1
    del items
    assert counting.closed.wait(PATIENCE)
    assert counting.made <= AHEAD + 1


def test_nothing_starts_before_it_is_read() -> None:
    counting = Counting()
    Pump(counting.items()).run()
    assert counting.thread is None
