"""Length-prefixed protobuf messages over Unix stream sockets, one end on an event loop, the other in a plain loop.

Frames are a 4-byte little-endian length and the serialised message. Messages are small (token ids, slot indices);
payloads go through the arena. The sending side of `AsyncLink` waits when the socket is full, so a slow engine slows
its front instead of growing a buffer. `SyncLink.send` blocks for the same reason, for at most `SEND_TIMEOUT`.

A length that no message has is a *pulse*: the plain loop sends it back when it looks at its messages, which shows that
the loop goes round and not only that the process exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message

MAX_MESSAGE = 16 << 20
"""Bytes; the longest prompt is far below it."""

SEND_TIMEOUT = 30.0
"""Seconds; a front that reads nothing for so long is taken for dead."""

_LENGTH = struct.Struct("<I")
_PULSE = _LENGTH.pack(0xFFFFFFFF)
_PULSES = 4
_PULSE_SECONDS = 1.0
_READ_CHUNK = 1 << 18

Received = TypeVar("Received", bound=Message)


class LinkClosed(Exception):
    """The other side is gone or sent what cannot be a message."""


def _frame(message: Message) -> bytes:
    body = message.SerializeToString()
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(body)} bytes exceeds the link's limit of {MAX_MESSAGE}")
    return _LENGTH.pack(len(body)) + body


def _parse(kind: type[Received], body: bytes) -> Received:
    message = kind()
    try:
        message.ParseFromString(body)
    except DecodeError as exc:
        raise LinkClosed("the other side sent bytes that are not a message") from exc
    return message


def _checked_length(head: bytes) -> int:
    (length,) = _LENGTH.unpack(head)
    if length > MAX_MESSAGE:
        raise LinkClosed(f"the other side announced a message of {length} bytes")
    return int(length)


class AsyncLink(Generic[Received]):
    """The event loop's end. Sending is safe from many tasks; receiving is for one.

    Attributes:
        silent_seconds: For how long pulses have gone unanswered, while `stuck` sends them.
    """

    def __init__(self, sock: socket.socket, receives: type[Received]) -> None:
        self._sock = sock
        self._kind = receives
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._sending = asyncio.Lock()
        self._heard = 0
        self.silent_seconds = 0.0

    async def open(self) -> None:
        """Takes the socket into the running loop; call once before anything else."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._sock)

    async def send(self, message: Message) -> None:
        """Sends one message and waits while the socket is full.

        Raises:
            LinkClosed: The other side is gone.
        """
        async with self._sending:
            if (writer := self._writer) is None:
                raise LinkClosed("the link is not open")
            try:
                writer.write(_frame(message))
                await writer.drain()
            except (ConnectionError, OSError) as exc:
                raise LinkClosed("the other side is gone") from exc

    async def receive(self) -> Received:
        """Waits for the next message.

        Raises:
            LinkClosed: The other side is gone; nothing more will come.
        """
        # Ours: `close` takes the link's away, and may come while this waits.
        if (reader := self._reader) is None:
            raise LinkClosed("the link is not open")
        try:
            while (head := await reader.readexactly(_LENGTH.size)) == _PULSE:
                self._heard += 1
            length = _checked_length(head)
            self._heard += 1
            return _parse(self._kind, await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError, OSError) as exc:
            raise LinkClosed("the other side is gone") from exc

    async def __aiter__(self) -> AsyncIterator[Received]:
        """Yields messages until the other side is gone."""
        while True:
            try:
                message = await self.receive()
            except LinkClosed:
                return
            yield message

    async def stuck(self, seconds: float) -> None:
        """Returns when the other side has not gone round for so long; somebody must be receiving meanwhile.

        Pulses without an answer are counted, not seconds: what passes while this process is stopped is nobody's fault.
        """
        interval = min(_PULSE_SECONDS, seconds / _PULSES)
        unanswered, enough = 0, round(seconds / interval)
        while unanswered < enough:
            heard = self._heard
            if self._writer is not None:
                # Not awaited: a full socket is what a stuck side looks like, and a pulse is four bytes.
                self._writer.write(_PULSE)
            await asyncio.sleep(interval)
            unanswered = 0 if self._heard != heard else unanswered + 1
            self.silent_seconds = unanswered * interval

    async def close(self) -> None:
        """Closes the socket; idempotent."""
        if self._writer is None:
            self._sock.close()
            return
        writer, self._writer, self._reader = self._writer, None, None
        writer.close()
        try:
            await writer.wait_closed()
        except (ConnectionError, OSError):
            return


class SyncLink(Generic[Received]):
    """The engine's end, for a single-threaded loop."""

    def __init__(self, sock: socket.socket, receives: type[Received]) -> None:
        sock.settimeout(SEND_TIMEOUT)
        self._sock = sock
        self._kind = receives
        self._buffer = bytearray()
        self._asked = False
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, *messages: Message) -> None:
        """Sends messages in one write.

        Raises:
            LinkClosed: The other side is gone or has read nothing for `SEND_TIMEOUT`.
        """
        try:
            self._sock.sendall(b"".join(map(_frame, messages)))
        except OSError as exc:
            raise LinkClosed("the other side is gone or stuck") from exc

    def receive(self, timeout: float | None) -> list[Received]:
        """All messages that are there; none after a pulse, which is answered.

        Args:
            timeout: Seconds to wait for a first message; 0 only looks, None waits for as long as it takes.

        Raises:
            LinkClosed: The other side is gone and every message of its was returned.
        """
        messages = self._complete()
        if messages:
            timeout = 0
        while self._poll.poll(None if timeout is None else timeout * 1000):
            try:
                data = self._sock.recv(_READ_CHUNK)
            except OSError as exc:
                raise LinkClosed("the other side is gone") from exc
            if not data:
                if messages:
                    return messages
                raise LinkClosed("the other side is gone")
            self._buffer += data
            messages += self._complete()
            if messages or self._asked:
                timeout = 0
        if self._asked:
            self._asked = False
            # Who is gone by now is noticed by the next look.
            with contextlib.suppress(OSError):
                self._sock.sendall(_PULSE)
        return messages

    def fileno(self) -> int:
        """Of the socket, to be polled."""
        return self._sock.fileno()

    def _complete(self) -> list[Received]:
        messages: list[Received] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            head = bytes(self._buffer[start : start + _LENGTH.size])
            if head == _PULSE:
                self._asked = True
                start += _LENGTH.size
                continue
            length = _checked_length(head)
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(_parse(self._kind, bytes(self._buffer[start + _LENGTH.size : end])))
            start = end
        del self._buffer[:start]
        return messages

    def close(self) -> None:
        """Closes the socket."""
        self._sock.close()


class SyncLinks(Generic[Received]):
    """The engine's ends of several links, polled together.

    The engine lives as long as the first. Another one that closes is let go, and what is sent to it is dropped.

    Args:
        links: The first is its front's.
    """

    def __init__(self, links: Sequence[SyncLink[Received]]) -> None:
        self._links = dict(enumerate(links))
        self._indices = {link.fileno(): index for index, link in self._links.items()}
        self._poll = select.poll()
        for number in self._indices:
            self._poll.register(number, select.POLLIN)
        self.count = len(links)

    def send(self, index: int, *messages: Message) -> None:
        """Sends messages in one write.

        Raises:
            LinkClosed: The first link is closed or stuck.
        """
        if (link := self._links.get(index)) is None:
            return
        try:
            link.send(*messages)
        except LinkClosed:
            if index == 0:
                raise
            self._let_go(index)

    def receive(self, timeout: float | None) -> list[Received]:
        """All messages that are there, in order for each link.

        Args:
            timeout: Seconds to wait for a first message; 0 only looks, None waits for as long as it takes.

        Raises:
            LinkClosed: The first link is closed.
        """
        messages: list[Received] = []
        for number, _ in self._poll.poll(None if timeout is None else timeout * 1000):
            index = self._indices[number]
            try:
                messages += self._links[index].receive(0)
            except LinkClosed:
                if index == 0:
                    raise
                self._let_go(index)
        return messages

    def _let_go(self, index: int) -> None:
        link = self._links.pop(index)
        self._poll.unregister(link.fileno())
        del self._indices[link.fileno()]
        link.close()
