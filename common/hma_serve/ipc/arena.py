"""Shared memory in equal slots, for payloads that must not be copied through a socket.

The memory is an anonymous file (memfd): it has no name to collide or to leak, and vanishes with its last user. One
side owns the slots and hands out their indices; the other returns them by message, so no lock is shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
from collections import deque
from dataclasses import dataclass
from typing import Self

from hma_serve.core.errors import FailedPrecondition


class Arena:
    """`slots` buffers of `slot_bytes` each, visible to both processes.

    Untouched slots cost no physical memory. Views from `slot` stay valid until `close`; close them (or drop them)
    first.
    """

    def __init__(self, fd: int, slots: int, slot_bytes: int) -> None:
        self.fd = fd
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._map = mmap.mmap(fd, slots * slot_bytes)
        self._view = memoryview(self._map)

    @classmethod
    def create(cls, slots: int, slot_bytes: int) -> Arena:
        """Makes new shared memory of `slots * slot_bytes` bytes.

        Raises:
            FailedPrecondition: The machine cannot address so much.
        """
        fd = os.memfd_create("hma-serve-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, slots * slot_bytes)
            return cls(fd, slots, slot_bytes)
        except (OSError, OverflowError) as exc:
            os.close(fd)
            raise FailedPrecondition(f"cannot share {slots} buffers of {slot_bytes} bytes with the engine") from exc

    @classmethod
    def attach(cls, fd: int, slots: int, slot_bytes: int) -> Arena:
        """Maps memory that another process made and passed on."""
        return cls(fd, slots, slot_bytes)

    @property
    def memory(self) -> memoryview:
        """All slots, for registering the memory with a device."""
        return self._view

    def slot(self, index: int, length: int | None = None) -> memoryview:
        """A writable view of the first `length` bytes (default: all) of slot `index`.

        Raises:
            IndexError: `index` or `length` lies outside; indices from the other process are checked here.
        """
        size = self.slot_bytes if length is None else length
        if not (0 <= index < self.slots and 0 <= size <= self.slot_bytes):
            raise IndexError(f"slot {index} with {size} bytes lies outside {self.slots} slots of {self.slot_bytes}")
        start = index * self.slot_bytes
        return self._view[start : start + size]

    def close(self) -> None:
        """Unmaps the memory; idempotent."""
        if self.fd < 0:
            return
        with contextlib.suppress(BufferError):
            self._view.release()
        # If a view is still alive somewhere (an array over a slot), the mapping goes when it does.
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class SlotStatistics:
    """How full a pool is.

    Attributes:
        slots: All of them.
        free: Not handed out.
        waiting: Tasks that wait for one.
    """

    slots: int
    free: int
    waiting: int


class SlotPool:
    """Hands out slot indices, first come first served; used by the one process that owns these slots of an arena.

    Confined to one event loop.

    Args:
        slots: How many.
        first: Index of the first; those before belong to others.
    """

    def __init__(self, slots: int, first: int = 0) -> None:
        self._slots = range(first, first + slots)
        self._free = deque(self._slots)
        self._waiters: deque[asyncio.Future[int]] = deque()

    async def acquire(self) -> int:
        """Waits for a free slot and takes it; cancellation loses none."""
        if self._free:
            return self._free.popleft()
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release(waiter.result())
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            raise

    def try_acquire(self) -> int | None:
        """Takes a slot if one is free."""
        return self._free.popleft() if self._free else None

    def release(self, slot: int) -> None:
        """Gives a slot back.

        Raises:
            ValueError: The slot does not exist or is free already.
        """
        if slot not in self._slots or slot in self._free:
            raise ValueError(f"slot {slot} is not taken")
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(slot)
                return
        self._free.append(slot)

    def statistics(self) -> SlotStatistics:
        """The pool's state now."""
        return SlotStatistics(len(self._slots), len(self._free), len(self._waiters))
