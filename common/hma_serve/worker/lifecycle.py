"""The life of a worker's front process: start, serve until a signal or the engine's end, drain, close.

A signal during the start ends it at once, because nothing was promised to anybody yet; a later one drains first. An
engine that dies drains as well, and its error then ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from typing import Protocol, TypeVar

from hma_serve.core.errors import HmaError

_T = TypeVar("_T")


class Worker(Protocol):
    """One run of a worker; what it opens is closed by the stack that it was made with."""

    async def start(self) -> asyncio.Task[HmaError]:
        """Returns when requests can come; the task ends when the engine does."""

    async def leave(self) -> None:
        """Drains; called only after `start`."""


async def run_worker(make: Callable[[contextlib.AsyncExitStack], Worker]) -> None:
    """Runs a worker until SIGTERM, SIGINT or the end of its engine.

    Args:
        make: The worker, given the stack that closes what it opens, last first.

    Raises:
        HmaError: It cannot start, or its engine died.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        worker = make(stack)
        starting = asyncio.create_task(worker.start())
        await _first_of(starting, asyncio.create_task(stop.wait()))
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return
        engine_end = starting.result()
        await _first_of(engine_end, asyncio.create_task(stop.wait()))
        await worker.leave()
        if engine_end.done():
            raise engine_end.result()


async def _first_of(kept: asyncio.Task[_T], dropped: asyncio.Task[bool]) -> None:
    """Waits for either; the second one is over afterwards."""
    try:
        await asyncio.wait((kept, dropped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        dropped.cancel()
