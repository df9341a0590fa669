"""A TCP proxy in a thread, to cut or freeze a link between two real processes."""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

CHUNK = 64 * 1024


class TcpProxy:
    """Forwards a port of its own to `target` (host, port).

    `cut` closes every connection and refuses new ones; `freeze` keeps them open and forwards nothing (a black hole);
    `heal` ends either. `cut_after` cuts by itself when so many more bytes have reached the target, and sets `tripped`.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakee = socket.socketpair()
        self._lock = threading.Lock()
        self._cut = self._frozen = self._closing = False
        self._left: int | None = None
        self.tripped = threading.Event()
        self._inner: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._run, name="tcp-proxy")

    def cut(self) -> None:
        """Closes every connection, and each new one at once."""
        self._set(cut=True)

    def cut_after(self, size: int) -> None:
        """Forwards exactly so many more bytes to the target, then cuts."""
        with self._lock:
            self._left = size
        self.tripped.clear()

    def freeze(self) -> None:
        """Forwards nothing until `heal`."""
        self._set(frozen=True)

    def redirect(self, target: tuple[str, int]) -> None:
        """Connections from now on go to another place."""
        self._target = target

    def heal(self) -> None:
        """Forwards again."""
        self._set()

    def __enter__(self) -> Self:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakee, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closing = True
        self._waker.send(b"x")
        self._thread.join()
        for end in (*self._pairs, self._listener, self._waker, self._wakee):
            end.close()
        self._selector.close()

    def _set(self, *, cut: bool = False, frozen: bool = False) -> None:
        with self._lock:
            self._cut, self._frozen = cut, frozen
        self._waker.send(b"x")

    def _run(self) -> None:
        while not self._closing:
            ready = [key.fileobj for key, _ in self._selector.select()]
            if self._wakee in ready:
                self._wakee.recv(CHUNK)
                self._obey()
            for readable in ready:
                if readable is self._listener:
                    self._accept()
                elif isinstance(readable, socket.socket) and readable in self._pairs and not self._frozen:
                    self._forward(readable)

    def _obey(self) -> None:
        if self._cut:
            for end in list(self._pairs):
                self._drop(end)
        for end in self._pairs:
            # A frozen socket is not watched, or its unread bytes would keep the loop spinning.
            watched = end in self._selector.get_map()
            if self._frozen and watched:
                self._selector.unregister(end)
            elif not self._frozen and not watched:
                self._selector.register(end, selectors.EVENT_READ)

    def _accept(self) -> None:
        inner, _ = self._listener.accept()
        if self._cut:
            inner.close()
            return
        try:
            outer = socket.create_connection(self._target, timeout=1)
        except OSError:
            inner.close()
            return
        self._pairs[inner], self._pairs[outer] = outer, inner
        self._inner.add(inner)
        for end in (inner, outer):
            if not self._frozen:
                self._selector.register(end, selectors.EVENT_READ)

    def _forward(self, source: socket.socket) -> None:
        try:
            counted = source in self._inner and self._left is not None
            data = source.recv(min(CHUNK, self._left or CHUNK) if counted else CHUNK)
            if data:
                self._pairs[source].sendall(data)
                if counted:
                    self._count(len(data))
                return
        except OSError:
            pass
        self._drop(source)

    def _count(self, size: int) -> None:
        with self._lock:
            self._left = None if self._left is None else self._left - size
            if self._left != 0:
                return
            self._left, self._cut = None, True
        self._obey()
        self.tripped.set()

    def _drop(self, end: socket.socket) -> None:
        self._inner.discard(end)
        other = self._pairs.pop(end, None)
        if other is None:
            return
        self._pairs.pop(other, None)
        self._inner.discard(other)
        for one in (end, other):
            with suppress(KeyError):
                self._selector.unregister(one)
            one.close()
