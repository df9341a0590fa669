"""A receiver process: takes KV streams on a port of its own, checks them and hands them to the engine.

Python's interpreter lock decides that one process takes in no more than a few GB/s. A receiver has its own slots of the
arena and its own link to the engine, so nothing of a stream passes through the front, which only hears what to count.
Started by the front alone (`python -m hma_serve.decode.receiver_main`), it leaves when the link to it closes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from hma_serve.core.error_detail import error_detail
from hma_serve.core.errors import HmaError, Internal
from hma_serve.decode.engine_client import EngineClient
from hma_serve.decode.receiver import SERVICE, Receiver, ReceiverParts
from hma_serve.decode.served_model import read_served_model
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.ipc import Arena, AsyncLink, LinkClosed, SlotPool, add_engine_arguments, inherit
from hma_serve.rpc import GrpcServer, TlsConfig, tune_allocator
from hma_serve.telemetry.logs import setup_logging
from hma_serve.telemetry.tracing import exporting_traces

_REPORT_SECONDS = 0.25
_STOP_SECONDS = 2.0
_NICENESS = 5
"""So that where cores are short, KV that arrives waits for tokens rather than they for it."""

_log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The receiver's arguments; the front writes them, so none has a default but what may be absent."""
    parser = argparse.ArgumentParser(prog="hma-serve-decode-receiver", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--codecs", required=True)
    parser.add_argument("--k-offsets", type=Path)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--tls-dir", type=Path)
    parser.add_argument("--stall-timeout", type=float, required=True)
    parser.add_argument("--kv-lease", type=float, required=True)
    parser.add_argument("--place", type=int, required=True, help="of its link among the engine's; the front's is 0")
    parser.add_argument("--places", type=int, required=True)
    parser.add_argument("--log-format", required=True)
    parser.add_argument("--engine-fd", type=int, required=True)
    add_engine_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    os.nice(_NICENESS)
    sock, arena = inherit(args)
    setup_logging("decode", args.log_format)
    tune_allocator()
    with exporting_traces("decode"):
        return asyncio.run(_run(args, sock, arena))


async def _run(args: argparse.Namespace, sock: socket.socket, arena: Arena | None) -> int:
    front: AsyncLink[pb.DecodeReceiverEvent] = AsyncLink(sock, pb.DecodeReceiverEvent)
    await front.open()
    try:
        if arena is None:
            raise Internal("the receiver was started without an arena")
        await _serve(args, front, arena)
    except LinkClosed:
        return 0
    except HmaError as exc:
        _log.error("%s", exc.message)
        with contextlib.suppress(LinkClosed):
            await front.send(pb.DecodeReceiverEvent(died=pb.DecodeDied(error=error_detail(exc))))
        return 1
    return 0


async def _serve(args: argparse.Namespace, front: AsyncLink[pb.DecodeReceiverEvent], arena: Arena) -> None:
    """Until the front closes its link, or the engine is gone, of which the front learns by itself."""
    codecs, tally = args.codecs.split(","), ReportedTally()
    model = await asyncio.to_thread(read_served_model, str(args.checkpoint), args.max_model_len, args.k_offsets, codecs)
    own = arena.slots // (args.places - 1)
    slots = SlotPool(own, first=own * (args.place - 1))
    link: AsyncLink[pb.DecodeEngineEvent] = AsyncLink(socket.socket(fileno=args.engine_fd), pb.DecodeEngineEvent)
    await link.open()
    engine = EngineClient(link, slots, place=args.place, places=args.places)
    tls = None if args.tls_dir is None else TlsConfig.in_directory(args.tls_dir)
    server = GrpcServer("decode", args.listen, (SERVICE,), tls=tls)
    parts = ReceiverParts(
        engine, arena, slots, model.acceptance, tally, stall_timeout=args.stall_timeout, lease=args.kv_lease
    )
    Receiver(parts).add_to(server.server)
    await front.send(pb.DecodeReceiverEvent(listening=await server.start()))
    tasks = [asyncio.create_task(each) for each in (engine.run(), _until_closed(front), _report(front, tally))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await server.stop(_STOP_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await link.close()


class ReportedTally:
    """Counts until the front is told."""

    def __init__(self) -> None:
        self._fresh = pb.DecodeReceived()

    def received(self, payload_bytes: int) -> None:
        """See `Tally`."""
        self._fresh.bytes += payload_bytes

    def refused(self, reason: str) -> None:
        """See `Tally`."""
        self._fresh.refused[reason] += 1

    def take(self) -> pb.DecodeReceived | None:
        """What has come since the last time; None: nothing."""
        if not self._fresh.ListFields():
            return None
        taken, self._fresh = self._fresh, pb.DecodeReceived()
        return taken


async def _until_closed(front: AsyncLink[pb.DecodeReceiverEvent]) -> None:
    async for _ in front:
        pass


async def _report(front: AsyncLink[pb.DecodeReceiverEvent], tally: ReportedTally) -> None:
    while True:
        await asyncio.sleep(_REPORT_SECONDS)
        if (fresh := tally.take()) is not None:
            await front.send(pb.DecodeReceiverEvent(received=fresh))


if __name__ == "__main__":
    sys.exit(main())
