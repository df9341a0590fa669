"""The limits of one request's life: its deadline, and any failure that ends it early.

Every wait of a request goes through its guard, so none can outlive the deadline, and a failure that is noticed
elsewhere (the engine died, decode refused) ends the wait that is on at the time instead of the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from hma_serve.core.errors import DeadlineExceeded, HmaError, Unavailable

Result = TypeVar("Result")


class Guard:
    """Ends the waits of one request; confined to one event loop.

    Args:
        seconds: Until the deadline.
        clock: Monotonic seconds.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.deadline = clock() + seconds
        self._failure: asyncio.Future[HmaError] = asyncio.get_running_loop().create_future()

    @property
    def failure(self) -> HmaError | None:
        """What ended the request, if something did."""
        return self._failure.result() if self._failure.done() else None

    def remaining(self) -> float:
        """Seconds until the deadline; 0 once it passed."""
        return max(0.0, self.deadline - self._clock())

    def fail(self, error: HmaError) -> None:
        """Ends the request; the first error counts."""
        if not self._failure.done():
            self._failure.set_result(error)

    def check(self) -> None:
        """Raises what ended the request, if something did."""
        if self._failure.done():
            raise self._failure.result()

    async def wait(
        self, awaitable: Awaitable[Result], what: str, *, limit: float | None = None, field: str = ""
    ) -> Result:
        """Awaits under the deadline, `limit` seconds and the request's failure; what is awaited is cancelled then.

        Args:
            awaitable: Safe to cancel.
            what: Completes "waited too long for ...".
            limit: Seconds; None: until the deadline.
            field: Of the error that says that the limit passed.

        Raises:
            DeadlineExceeded: The deadline passed.
            Unavailable: The limit passed first.
            HmaError: The request failed.
        """
        task = asyncio.ensure_future(awaitable)
        timeout = self.remaining() if limit is None else min(limit, self.remaining())
        try:
            await asyncio.wait((task, self._failure), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            self.check()
            if task.done():
                return task.result()
        finally:
            await _cancelled(task)
        if self.remaining() == 0.0:
            raise DeadlineExceeded(f"the deadline passed while waiting for {what}")
        raise Unavailable(f"waited more than {timeout:g} s for {what}", field=field)


async def _cancelled(task: asyncio.Future[Result]) -> None:
    """Makes sure that the task is over; its own failure is of no interest any more."""
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
