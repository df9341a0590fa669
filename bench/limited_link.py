"""A TCP link of limited rate between two real processes, in user space.

One direction is paced, from whoever connects to the target: a byte arrives when a wire of that rate would have brought
it, whatever connection it belongs to. The way back is free, as it carries acknowledgements alone. Pieces grow with the
rate, since each costs the event loop the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from types import TracebackType
from typing import Self

_LEAST_PIECE, _MOST_PIECE = 16 * 1024, 1 << 20
_PIECE_SECONDS = 0.0005
# How far behind the wire may be before its time is lost: sleeps are that exact.
_SLACK_SECONDS = 0.004


class LimitedLink:
    """`async with LimitedLink("host:port") as link`: connect to `link.address`.

    Args:
        target: Where everything goes; the host is a number.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._rate = float("inf")
        self._free_at = 0.0
        self._turn = asyncio.Lock()
        self._listener: socket.socket
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    def limit(self, bytes_per_second: float) -> None:
        """Sets the rate from now on."""
        self._rate = bytes_per_second
        self._free_at = 0.0

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0)
        self._start(self._accept())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    def _start(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        while True:
            outer, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            self._start(self._connected(outer))

    async def _connected(self, outer: socket.socket) -> None:
        inner = socket.socket()
        with outer, inner, contextlib.suppress(OSError, asyncio.CancelledError):
            for end in (outer, inner):
                end.settimeout(0)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(inner, self._target)
            await _first_end(self._paced(outer, inner), _copy(inner, outer))

    async def _paced(self, source: socket.socket, target: socket.socket) -> None:
        loop, buffer = asyncio.get_running_loop(), memoryview(bytearray(_MOST_PIECE))
        while True:
            piece = int(min(max(self._rate * _PIECE_SECONDS, _LEAST_PIECE), _MOST_PIECE))
            if not (size := await loop.sock_recv_into(source, buffer[:piece])):
                return
            async with self._turn:
                now = time.monotonic()
                self._free_at = max(self._free_at, now - _SLACK_SECONDS) + size / self._rate
                if self._free_at > now:
                    await asyncio.sleep(self._free_at - now)
            await loop.sock_sendall(target, buffer[:size])


async def _copy(source: socket.socket, target: socket.socket) -> None:
    loop, buffer = asyncio.get_running_loop(), memoryview(bytearray(_LEAST_PIECE))
    while size := await loop.sock_recv_into(source, buffer):
        await loop.sock_sendall(target, buffer[:size])


async def _first_end(*ways: object) -> None:
    tasks = [asyncio.ensure_future(way) for way in ways]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
