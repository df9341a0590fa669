"""Real prefill and decode workers, perhaps with a limited link between them, and one request through both."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import grpc.aio
import numpy as np

from bench.figures import SEED
from bench.kv_producer import CALL_SECONDS, request
from bench.limited_link import LimitedLink
from hma_serve.rpc import open_channel
from hma_serve.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

_SERVING = re.compile(r"gRPC (\S+), HTTP")
_START_SECONDS = 300.0
_LOG_LINES = 60
_numbers = itertools.count()


@dataclass(frozen=True)
class Worker:
    """A running worker.

    Attributes:
        address: Of its gRPC services.
        said: The line with which it began to serve.
    """

    address: str
    said: str


@contextlib.contextmanager
def worker(role: str, *arguments: str) -> Iterator[Worker]:
    """Runs `hma-serve ROLE` without a registry."""
    command = [sys.executable, "-m", "hma_serve.cli.main", role, "--etcd", "none", "--listen", "127.0.0.1:0"]
    # Two workers on one machine must not fight for its cores with spinning threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=environment)
    watchdog = threading.Timer(_START_SECONDS, process.kill)
    watchdog.start()
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := _SERVING.search(line):
                watchdog.cancel()
                threading.Thread(target=said.extend, args=(process.stderr,), daemon=True).start()
                yield Worker(found[1], line)
                break
        else:
            raise RuntimeError(f"the {role} worker did not start")
    except BaseException:
        print(f"the {role} worker's log ends with\n{''.join(said[-_LOG_LINES:])}", file=sys.stderr, flush=True)
        raise
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


@contextlib.contextmanager
def started_together(makers: Sequence[contextlib.AbstractContextManager[Worker]]) -> Iterator[list[Worker]]:
    """Enters the contexts of several workers at once, since each spends its start on loading a model."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(makers)) as pool:
        starts = [pool.submit(maker.__enter__) for maker in makers]
        wait(starts)
        for maker, start in zip(makers, starts, strict=True):
            if start.exception() is None:
                stack.push(maker)
        yield [start.result() for start in starts]


@dataclass(frozen=True)
class Passage:
    """What one request cost.

    Attributes:
        ttft: Seconds from the request to its first token.
        compute: Seconds of computation in prefill, measured there while the link was in use.
        exposed: Seconds of prefill's part that were neither queue nor computation.
        payload_bytes: KV that travelled.
        tpot: Seconds between output tokens; 0: one was asked for.
    """

    ttft: float
    compute: float
    exposed: float
    payload_bytes: int
    tpot: float = 0.0


class Pair:
    """A prefill worker, a decode worker, a link.

    Args:
        prefill: Channel to prefill.
        decode: Channel to decode, not limited.
        link: From prefill to decode; None: prefill sends to where tickets say.
        info: What prefill says of itself.
    """

    def __init__(
        self,
        prefill: grpc.aio.Channel,
        decode: grpc.aio.Channel,
        link: LimitedLink | None,
        info: worker_pb2.WorkerInfo,
    ) -> None:
        self._prefill = prefill_pb2_grpc.PrefillStub(prefill)
        self._decode: Any = decode_pb2_grpc.DecodeStub(decode)
        self._load: Any = worker_pb2_grpc.WorkerStub(decode)
        self._info = info
        self._link = link

    @property
    def link(self) -> LimitedLink:
        """From prefill to decode."""
        assert self._link is not None
        return self._link

    async def run(self, tokens: int, new_tokens: int = 1) -> Passage:
        """One request of so many packed tokens, none of it seen before."""
        wanted = self._request(tokens, new_tokens)
        began = time.perf_counter()
        generating = self._decode.Generate(wanted, timeout=CALL_SECONDS)
        ticket = (await generating.read()).ticket
        asked = prefill_pb2.PrefillRequest(
            context=wanted.context,
            token_ids=wanted.prompt_token_ids[:tokens],
            ticket=ticket.nonce,
            decode_address=self._link.address if self._link else ticket.push_address,
        )
        asked_at = time.perf_counter()
        responses: list[Any] = [response async for response in self._prefill.Prefill(asked, timeout=CALL_SECONDS)]
        spent, completed = time.perf_counter() - asked_at, responses[-1].completed
        while not (await generating.read()).HasField("tokens"):
            pass
        first_at, read = time.perf_counter(), 1
        while read < new_tokens:
            read += len((await generating.read()).tokens.token_ids)
        ttft, tpot = first_at - began, (time.perf_counter() - first_at) / max(1, read - 1)
        generating.cancel()
        await self._used(lambda used: used == 0)
        exposed = spent - completed.queue_seconds - completed.compute_seconds
        return Passage(
            ttft, completed.compute_seconds, exposed, completed.payload_bytes, tpot if new_tokens > 1 else 0.0
        )

    async def held_tokens(self, tokens: int) -> int:
        """What decode reserves for such a request, in tokens of its own plain format."""
        generating = self._decode.Generate(self._request(tokens), timeout=CALL_SECONDS)
        await generating.read()
        used = await self._used(lambda used: used > 0)
        generating.cancel()
        await self._used(lambda used: used == 0)
        return used

    def _request(self, packed: int, new_tokens: int = 1) -> decode_pb2.DecodeGenerateRequest:
        number, model, codecs = next(_numbers), self._info.model, self._info.codecs
        drawn = np.random.default_rng((SEED, number)).integers(3, model.vocab, packed + 1)
        offer = decode_pb2.KvOffer(
            model_fingerprint=model.fingerprint,
            k_codec=codecs[0],
            v_codec=codecs[-1],
            rope=model.rope,
            producer_instance=self._info.instance,
            profile=self._info.profile,
        )
        prompt = [int(token) for token in drawn]
        return request(prompt, new_tokens, packed, offer, f"tenant {number}")

    async def _used(self, settled: Callable[[int], bool]) -> int:
        call = self._load.WatchLoad(worker_pb2.WatchLoadRequest())
        try:
            while True:
                used = int((await call.read()).load.kv_used_tokens)
                if settled(used):
                    return used
        finally:
            call.cancel()


@contextlib.asynccontextmanager
async def connected(prefill: Worker, decode: Worker, *, link: bool = True) -> AsyncIterator[Pair]:
    """Two running workers, with a link, not limited yet, between them, or with none."""
    async with contextlib.AsyncExitStack() as stack:
        between = await stack.enter_async_context(LimitedLink(decode.address)) if link else None
        channels = open_channel(prefill.address), open_channel(decode.address)
        try:
            about: Any = worker_pb2_grpc.WorkerStub(channels[0])
            info = (await about.Describe(worker_pb2.DescribeRequest())).worker
            yield Pair(*channels, between, info)
        finally:
            for channel in channels:
                await channel.close()
