"""kill -9 of a decode worker in mid-stream and of a prefill worker in mid-transfer: the client's answer goes on.

So it does when a decode worker hangs instead, and nobody says that it is gone. When only its engine hangs, new requests
go elsewhere.

Greedy text in fp32 on one profile must equal that of a run without faults, token for token; what survives must hold no
page of it afterwards. Which worker, which prompt and when are drawn from seeds.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest

from hma_serve.client import AsyncClient, Completion
from hma_serve.core.groups import packed_tokens
from hma_serve.router.prediction import STALE_SECONDS
from hma_serve.telemetry import spans
from support.cluster import descendants
from support.otlp_collector import Collector, Told
from support.process_fleet import Process, ProcessFleet, eventually
from support.sample_prompts import sample_prompt

NEW_TOKENS = 240
BYSTANDERS = 2
HANG_SECONDS = 30.0
"""Far more than a hung worker may hold up a stream, and half of what gRPC would wait by itself."""
NOTICED_SECONDS = STALE_SECONDS + 4
"""Silence that counts, by whole pulses of a second, and the report of it."""

TICKET_SECONDS = 15.0
"""Half of what a router would wait for the ticket of a request that it had sent to an engine that hangs."""
LOCAL_TOKENS = 30
"""A prompt so short that no prefill worker sees it."""


async def test_a_decode_killed_in_mid_stream(fleet: ProcessFleet, trials: int) -> None:
    for seed in range(trials):
        draw = random.Random(seed)
        prompt, short = sample_prompt(draw.randrange(40, 400), seed), sample_prompt(LOCAL_TOKENS, 1000 + seed)
        await fleet.settled(prefill=2, decode=2)
        before = Counts(fleet)
        async with AsyncClient(fleet.routers) as client:
            others = [asyncio.create_task(ask(client, short)) for _ in range(BYSTANDERS)]
            answer = await streamed_through_a_kill(fleet, client, prompt, draw.randrange(1, 60), before)
            company = await asyncio.gather(*others)
            await fleet.settled(prefill=2, decode=2)
            await fleet.idle()
            # Computed once, and pushed again out of the cache of the worker that had computed it.
            assert before.grown("prefill", "tokens_total") == packed_tokens(len(prompt))
            assert before.grown("prefill", "cached_tokens_total") == packed_tokens(len(prompt))
            faultless, short_faultless = await asyncio.gather(ask(client, prompt), ask(client, short))
        assert answer.token_ids == faultless.token_ids
        assert {other.token_ids for other in company} == {short_faultless.token_ids}
        assert answer.usage.completion_tokens == len(answer.token_ids) == NEW_TOKENS
        assert answer.usage.migrations == 1
        moved = 1 + sum(other.usage.migrations for other in company)
        assert before.grown("router", "migrations_total") == moved


async def streamed_through_a_kill(
    fleet: ProcessFleet, client: AsyncClient, prompt: list[int], tokens: int, before: Counts
) -> Completion:
    """Asks, and kills the decode worker that answers once so many tokens have come; a new one takes its place."""
    stream = client.generate(prompt, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    seen, victim = 0, None
    async for delta in stream:
        seen += len(delta.token_ids)
        if victim is None and seen >= tokens:
            (victim,) = [worker for worker in fleet.of("decode") if before.grown_at(worker, "kv_received_bytes_total")]
            await asyncio.to_thread(victim.kill)
            fleet.start("decode")
    return await stream.result()


async def test_a_prefill_killed_in_mid_transfer(fleet: ProcessFleet, trials: int) -> None:
    for seed in range(trials):
        draw = random.Random(100 + seed)
        prompt = sample_prompt(draw.randrange(1200, 1800), 100 + seed)
        await fleet.settled(prefill=2, decode=2)
        before = Counts(fleet)

        def sending(before: Counts = before) -> list[Process]:
            workers = fleet.of("prefill")
            return [w for w in workers if before.grown_at(w, "kv_sent_bytes_total") and w.metric("running_requests")]

        async with AsyncClient(fleet.routers) as client:
            asking = asyncio.create_task(ask(client, prompt, new_tokens=40))
            (victim,) = await eventually(sending, "no prefill worker sends")
            await asyncio.to_thread(victim.kill)
            fleet.start("prefill")
            answer = await asking
            await fleet.settled(prefill=2, decode=2)
            await fleet.idle()
            faultless = await ask(client, prompt, new_tokens=40)
        assert answer.token_ids == faultless.token_ids
        # Before the first token it is a new attempt, not a migration.
        assert before.grown("router", 'retries_total{leg="prefill"}', 'retries_total{leg="decode"}') >= 1
        assert answer.usage.migrations == 0


async def test_a_decode_that_hangs_in_mid_stream(fleet: ProcessFleet, collector: Collector) -> None:
    """Its process is stopped: connections stay open and nothing comes any more. One trace tells of both attempts."""
    prompt = sample_prompt(200, 300)
    await fleet.settled(prefill=2, decode=2)
    async with AsyncClient(fleet.routers) as client:
        hung: Process | None = None
        try:
            async with asyncio.timeout(HANG_SECONDS):
                stream = client.generate(prompt, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
                async for _ in stream:
                    if hung is None:
                        (hung,) = [worker for worker in fleet.of("decode") if worker.metric("running_requests")]
                        os.kill(hung.process.pid, signal.SIGSTOP)
                answer = await stream.result()
        finally:
            if hung is not None:
                os.kill(hung.process.pid, signal.SIGCONT)
        await fleet.settled(prefill=2, decode=2)
        await fleet.idle()
        faultless = await ask(client, prompt)
    assert answer.token_ids == faultless.token_ids
    assert answer.usage.migrations == 1

    def in_its_trace(told: list[Told]) -> list[Told]:
        traces = {span.trace_id for span in told if span.attributes.get("hma.request_id") == answer.request_id}
        return [span for span in told if span.trace_id in traces]

    def attempts(told: list[Told]) -> list[Told]:
        return [span for span in in_its_trace(told) if span.name == spans.ATTEMPT]

    def whole(told: list[Told]) -> bool:
        return len(attempts(told)) == 2 and spans.REQUEST in {span.name for span in in_its_trace(told)}

    told = await asyncio.to_thread(collector.wait_for, whole)
    first, second = sorted(attempts(told), key=lambda span: span.start_ns)
    (request,) = [span for span in in_its_trace(told) if span.name == spans.REQUEST]
    assert {first.parent_id, second.parent_id} == {request.span_id}
    assert (first.failed, second.failed) == (True, False)
    assert first.attributes["hma.decode"] != second.attributes["hma.decode"]
    assert (first.attributes["hma.emitted_tokens"], second.attributes["hma.epoch"]) == (0, 2)
    assert 0 < second.attributes["hma.emitted_tokens"] < NEW_TOKENS


async def test_an_engine_that_hangs_gets_no_new_requests(fleet: ProcessFleet) -> None:
    """Its front goes on reporting, and room is left: of several requests it would get some."""
    prompt = sample_prompt(LOCAL_TOKENS, 400)
    await fleet.settled(prefill=2, decode=2)
    async with AsyncClient(fleet.routers) as client:
        held = asyncio.create_task(ask(client, prompt))

        def running() -> list[Process]:
            return [worker for worker in fleet.of("decode") if worker.metric("running_requests")]

        (worker,) = await eventually(running, "no decode worker runs it")
        (engine,) = descendants(worker.process.pid)
        os.kill(engine, signal.SIGSTOP)
        try:
            await asyncio.sleep(NOTICED_SECONDS)
            async with asyncio.timeout(TICKET_SECONDS):
                await asyncio.gather(*(ask(client, prompt, new_tokens=20) for _ in range(6)))
        finally:
            os.kill(engine, signal.SIGCONT)
        assert (await held).usage.migrations == 0
    await fleet.idle()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_an_engine_that_hangs_with_nothing_to_do_gets_nothing(fleet: ProcessFleet, role: str) -> None:
    prompt = sample_prompt(200, 500)
    await fleet.settled(prefill=2, decode=2)
    (engine,) = descendants(fleet.of(role)[0].process.pid)
    os.kill(engine, signal.SIGSTOP)
    try:
        await asyncio.sleep(NOTICED_SECONDS)
        async with AsyncClient(fleet.routers) as client, asyncio.timeout(TICKET_SECONDS):
            for _ in range(4):  # One after the other: the other worker has room.
                await ask(client, prompt, new_tokens=20)
    finally:
        os.kill(engine, signal.SIGCONT)
    await fleet.idle()


class Counts:
    """What the counters of a fleet said at a moment; a worker that came later began at 0."""

    def __init__(self, fleet: ProcessFleet) -> None:
        self._fleet = fleet
        self._before = {process.process.pid: process.metrics() for process in fleet.processes if process.alive}

    def grown_at(self, process: Process, counter: str) -> float:
        """By how much one process's counter has grown."""
        return process.metric(counter) - self._before.get(process.process.pid, {}).get(counter, 0.0)

    def grown(self, role: str, *counters: str) -> float:
        """By how much counters have grown, over all that live of a role."""
        return sum(self.grown_at(process, counter) for process in self._fleet.of(role) for counter in counters)


async def ask(client: AsyncClient, prompt: list[int], *, new_tokens: int = NEW_TOKENS) -> Completion:
    return await client.generate(prompt, max_tokens=new_tokens, temperature=0, ignore_eos=True).result()
