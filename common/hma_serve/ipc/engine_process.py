"""The engine as a child process: started by a front, gone with it.

The child gets one socket and, if wanted, one arena as inherited file descriptors, named on its command line by
`--link-fd`, `--arena-fd`, `--arena-slots` and `--arena-slot-bytes`, and whatever other sockets it is to have. The
kernel kills it when the front's main thread dies (PR_SET_PDEATHSIG), and the link's end tells it of every other exit.
Never a fork: gRPC may be running. A front's other helpers are started in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from hma_serve.core.errors import HmaError
from hma_serve.ipc.arena import Arena
from hma_serve.ipc.link import AsyncLink, SyncLink

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1

Received = TypeVar("Received", bound=Message)


@dataclass
class EngineProcess(Generic[Received]):
    """A running engine, as its front sees it.

    Attributes:
        process: The child.
        link: Open; messages from the engine arrive here.
    """

    process: asyncio.subprocess.Process
    link: AsyncLink[Received]

    async def wait(self) -> int:
        """Waits for the engine's end; its exit status, negative for a signal."""
        return await self.process.wait()

    async def watch(self, loaded: Callable[[], Awaitable[object]], timeout: float) -> None:
        """Kills the engine if its loop stands still for `timeout` seconds, so that it ends like one that crashed.

        Args:
            loaded: Waits until the engine has loaded, before which it may stand still for as long as it takes; an
                `HmaError` says that it ends by itself.
            timeout: Seconds.
        """
        try:
            await loaded()
        except HmaError:
            return
        await self.link.stuck(timeout)
        if self.process.returncode is not None:
            return
        _log.error("the engine has not gone round for %g s: killed; --engine-timeout is the limit", timeout)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        # A process in the middle of a system call may outlive its death by long.
        await self.link.close()

    async def stop(self, grace: float = 5.0) -> int:
        """Closes the link, which asks the engine to leave, and kills it if it has not after `grace` seconds."""
        await self.link.close()
        try:
            return await asyncio.wait_for(self.process.wait(), grace)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            return await self.process.wait()


async def spawn_engine(
    module: str,
    argv: Sequence[str],
    *,
    receives: type[Received],
    arena: Arena | None = None,
    sockets: Mapping[str, Sequence[socket.socket]] | None = None,
) -> EngineProcess[Received]:
    """Starts `python -m module ARGV...` as the engine of this process and opens its link.

    Args:
        module: A module that calls `attach_engine`.
        argv: The engine's own arguments; those of link and arena are added.
        receives: Type of the messages that the engine sends.
        arena: Shared memory to hand over.
        sockets: More to hand over, by the flag that says their descriptors, joined by commas; they stay open here.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-m", module, *argv, "--link-fd", str(theirs.fileno())]
    inherited = [theirs.fileno()]
    if arena is not None:
        command += ["--arena-fd", str(arena.fd), "--arena-slots", str(arena.slots)]
        command += ["--arena-slot-bytes", str(arena.slot_bytes)]
        inherited.append(arena.fd)
    for flag, more in (sockets or {}).items():
        numbers = [each.fileno() for each in more]
        command += [flag, ",".join(map(str, numbers))]
        inherited += numbers
    try:
        # The front handles the terminal's Ctrl-C and tells the engine when to leave.
        process = await asyncio.create_subprocess_exec(*command, pass_fds=inherited, process_group=0)
    finally:
        theirs.close()
    link: AsyncLink[Received] = AsyncLink(ours, receives)
    await link.open()
    return EngineProcess(process, link)


@dataclass
class EngineEndpoint(Generic[Received]):
    """What the child holds of its front.

    Attributes:
        link: Messages from and to the front.
        arena: The shared memory, if there is any.
    """

    link: SyncLink[Received]
    arena: Arena | None


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `spawn_engine` passes."""
    group = parser.add_argument_group("set by the parent process")
    group.add_argument("--link-fd", type=int, required=True)
    group.add_argument("--arena-fd", type=int)
    group.add_argument("--arena-slots", type=int, default=0)
    group.add_argument("--arena-slot-bytes", type=int, default=0)


def attach_engine(args: argparse.Namespace, *, receives: type[Received]) -> EngineEndpoint[Received]:
    """Called first in the child: binds its life to the parent's and opens link and arena."""
    sock, arena = inherit(args)
    return EngineEndpoint(SyncLink(sock, receives), arena)


def inherit(args: argparse.Namespace) -> tuple[socket.socket, Arena | None]:
    """As `attach_engine`, for a child with an event loop: the link's socket and the arena."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:
        sys.exit("the parent process is gone")
    # The front decides when the engine leaves; a terminal's signals go to it alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=args.link_fd)
    arena = None
    if args.arena_fd is not None:
        arena = Arena.attach(args.arena_fd, args.arena_slots, args.arena_slot_bytes)
    return sock, arena
