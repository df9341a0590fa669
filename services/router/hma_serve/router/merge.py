"""Several streams as one, in the order in which their items come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

_AHEAD = 8


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yields the items of all streams; a slow reader slows the streams, which run at most a few items ahead each.

    The first failure ends all of them and is raised. Close the iterator (`contextlib.aclosing`) when leaving early:
    that cancels the streams and waits until they have cleaned up.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    items: asyncio.Queue[T | _End] = asyncio.Queue(_AHEAD * len(streams))
    tasks = [asyncio.create_task(_feed(stream, items)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            got = await items.get()
            if not isinstance(got, _End):
                yield got
                continue
            running -= 1
            if got.error is not None:
                raise got.error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _End:
    def __init__(self, error: Exception | None) -> None:
        self.error = error


async def _feed(stream: AsyncGenerator[T, None], items: asyncio.Queue[T | _End]) -> None:
    error = None
    try:
        async with aclosing(stream) as source:
            async for item in source:
                await items.put(item)
    except Exception as exc:  # handed on, not swallowed
        error = exc
    await items.put(_End(error))
