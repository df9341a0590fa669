"""Reads an iterator on a thread of its own and hands its items to the thread that wants them.

Why: Ctrl-C raises KeyboardInterrupt at any point of the main thread, also inside a lock's `__enter__`. In the midst of
a read from gRPC that leaves a lock behind on which gRPC's own thread, and with it every later call on the connection,
waits for ever. So gRPC is read where no signal arrives, and the reader waits on queues written in C, which an exception
leaves whole.

The thread runs at most `AHEAD` items ahead of the reader, so a reader that is slow slows the server.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")

AHEAD = 64

_MORE, _ENOUGH = True, False


class Pump(Generic[T]):
    """One iteration, moved to another thread.

    Args:
        items: Run to its end, or closed, on the other thread and nowhere else.
    """

    def __init__(self, items: Generator[T, None, None]) -> None:
        self._items = items
        self._ready: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
        self._go_on: SimpleQueue[bool] = SimpleQueue()
        for _ in range(AHEAD):
            self._go_on.put(_MORE)

    def run(self) -> Iterator[T]:
        """Starts the thread and yields the items; raises what the iteration raised, here."""
        threading.Thread(target=self._work, name="hma-serve-stream", daemon=True).start()
        try:
            while (arrived := self._ready.get()) is not None:
                if isinstance(arrived, BaseException):
                    raise arrived
                yield arrived[0]
                self._go_on.put(_MORE)
        finally:
            self._go_on.put(_ENOUGH)

    def _work(self) -> None:
        end: BaseException | None = None
        try:
            while self._go_on.get():
                self._ready.put((next(self._items),))
        except StopIteration:
            pass
        except BaseException as exc:  # every failure belongs to the reader
            end = exc
        finally:
            self._items.close()
            self._ready.put(end)
