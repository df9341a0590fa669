"""The receiver processes of a decode worker, as its front sees them: where they listen, what they count, their end.

Each listens beside the front, on the ports after the front's (any free ones after port 0), and tickets name them in
turn. One that dies takes no request along but those whose KV was still to come, which end with their leases; the
worker drains and leaves, since it no longer takes in what it said it would.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from hma_serve.core.error_detail import from_error_detail
from hma_serve.core.errors import HmaError, Unavailable
from hma_serve.decode.config import DecodeConfig
from hma_serve.decode.served_model import ServedModel
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.ipc import Arena, EngineProcess, spawn_engine
from hma_serve.telemetry.metrics import DecodeMetrics

RECEIVER_MODULE = "hma_serve.decode.receiver_main"


class MetricsTally:
    """Counts in the metrics of this process; see `hma_serve.decode.receiver.Tally`."""

    def __init__(self, metrics: DecodeMetrics) -> None:
        self._metrics = metrics

    def received(self, payload_bytes: int) -> None:
        """See `Tally`."""
        self._metrics.kv_received_bytes.inc(payload_bytes)

    def refused(self, reason: str, streams: int = 1) -> None:
        """See `Tally`."""
        self._metrics.pushes_refused.labels(reason).inc(streams)


class EngineSockets:
    """One socket pair for each receiver, made before the engine and the receivers, which get an end each."""

    def __init__(self, count: int) -> None:
        self._pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(count)]

    @property
    def of_engine(self) -> list[socket.socket]:
        """The engine's ends, in the order of the receivers."""
        return [pair[0] for pair in self._pairs]

    @property
    def of_receivers(self) -> list[socket.socket]:
        """The receivers' ends."""
        return [pair[1] for pair in self._pairs]

    def close(self) -> None:
        """Closes this process's copies, so that each side learns when the other is gone; idempotent."""
        for pair in self._pairs:
            for end in pair:
                end.close()


@dataclass(frozen=True, slots=True)
class Receivers:
    """Running receivers.

    Attributes:
        addresses: Where others find them.
        end: Done when one of them is gone.
    """

    addresses: Sequence[str]
    end: asyncio.Task[HmaError]


@contextlib.asynccontextmanager
async def running_receivers(
    config: DecodeConfig, model: ServedModel, arena: Arena, sockets: EngineSockets, tally: MetricsTally
) -> AsyncIterator[Receivers]:
    """Starts `config.receivers` processes and waits until all listen; they are gone when the context is.

    Args:
        config: Of the worker.
        model: What it serves.
        arena: Shared with the engine; each receiver takes an equal part of its slots.
        sockets: To the engine, for each receiver one.
        tally: Told what they count.

    Raises:
        HmaError: One of them cannot listen.
    """
    processes: list[EngineProcess[pb.DecodeReceiverEvent]] = []
    tasks: list[asyncio.Task[Any]] = []
    try:
        for place, theirs in enumerate(sockets.of_receivers, 1):
            argv = _arguments(config, model, place)
            process = await spawn_engine(
                RECEIVER_MODULE, argv, receives=pb.DecodeReceiverEvent, arena=arena, sockets={"--engine-fd": [theirs]}
            )
            processes.append(process)
        sockets.close()
        bound = [await _listening(process) for process in processes]
        watching = [asyncio.create_task(_watch(process, tally)) for process in processes]
        end = asyncio.create_task(_first(watching))
        tasks += [*watching, end]
        yield Receivers([config.advertised(each) for each in bound], end)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # All at once: each may take its time to let go of its streams.
        await asyncio.gather(*(process.stop() for process in processes))


def _arguments(config: DecodeConfig, model: ServedModel, place: int) -> list[str]:
    flags = {
        "--checkpoint": model.checkpoint,
        "--max-model-len": model.max_model_len,
        "--codecs": ",".join(known.name for known in model.codecs),
        "--listen": _listen(config.listen, place),
        "--stall-timeout": config.stall_timeout,
        "--kv-lease": config.kv_lease,
        "--place": place,
        "--places": 1 + config.receivers,
        "--log-format": config.log_format,
    }
    if config.k_offsets is not None:
        flags["--k-offsets"] = config.k_offsets
    if config.tls_dir is not None:
        flags["--tls-dir"] = config.tls_dir
    return [str(part) for pair in flags.items() for part in pair]


def _listen(listen: str, place: int) -> str:
    host, _, port = listen.rpartition(":")
    return f"{host}:{int(port) + place if int(port) else 0}"


async def _listening(process: EngineProcess[pb.DecodeReceiverEvent]) -> str:
    async for event in process.link:
        if event.HasField("died"):
            raise from_error_detail(event.died.error)
        return event.listening
    raise Unavailable("a receiver of KV ended before it could listen")


async def _watch(process: EngineProcess[pb.DecodeReceiverEvent], tally: MetricsTally) -> None:
    """Counts what a receiver counts, until it is gone."""
    async for event in process.link:
        tally.received(event.received.bytes)
        for reason, streams in event.received.refused.items():
            tally.refused(reason, streams)


async def _first(watching: Sequence[asyncio.Task[None]]) -> HmaError:
    await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
    return Unavailable("a receiver of KV is gone; this decode worker leaves")
