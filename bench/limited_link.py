"""A TCP link of limited rate between two real processes, in user space.

One direction is paced, from whoever connects to the target: a byte arrives when a wire of that rate would have brought
it, whatever connection it belongs to. The way back is free, as it carries acknowledgements alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import TracebackType
from typing import Self

_PIECE = 16 * 1024
# How far behind the wire may be before its time is lost: sleeps are that exact.
_SLACK_SECONDS = 0.004


class LimitedLink:
    """`async with LimitedLink("host:port") as link`: connect to `link.address`.

    Args:
        target: Where everything goes.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._rate = float("inf")
        self._free_at = 0.0
        self._turn = asyncio.Lock()
        self._server: asyncio.Server
        self._streams: set[asyncio.Task[None]] = set()
        self.forwarded_bytes = 0

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def limit(self, bytes_per_second: float) -> None:
        """Sets the rate from now on."""
        self._rate = bytes_per_second
        self._free_at = 0.0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        inner, outer = await asyncio.open_connection(*self._target)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await _first_end(self._paced(reader, outer), _copy(inner, writer))
        for end in (writer, outer):
            end.close()
        self._streams.discard(task)

    async def _paced(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_PIECE):
            async with self._turn:
                now = time.monotonic()
                self._free_at = max(self._free_at, now - _SLACK_SECONDS) + len(data) / self._rate
                if self._free_at > now:
                    await asyncio.sleep(self._free_at - now)
            self.forwarded_bytes += len(data)
            writer.write(data)
            await writer.drain()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_PIECE):
        writer.write(data)
        await writer.drain()


async def _first_end(*ways: object) -> None:
    tasks = [asyncio.ensure_future(way) for way in ways]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
