"""kill -9 of a decode worker in mid-stream and of a prefill worker in mid-transfer: the client's answer goes on.

Greedy text in fp32 on one profile must equal that of a run without faults, token for token; what survives must hold no
page of it afterwards. Which worker, which prompt and when are drawn from seeds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from hma_serve.client import AsyncClient, Completion
from support.process_fleet import Process, ProcessFleet, eventually
from support.sample_prompts import sample_prompt

NEW_TOKENS = 240
BYSTANDERS = 2


async def test_a_decode_killed_in_mid_stream(fleet: ProcessFleet, trials: int) -> None:
    for seed in range(trials):
        draw = random.Random(seed)
        prompt = sample_prompt(draw.randrange(40, 400), seed)
        await fleet.settled(prefill=2, decode=2)
        async with AsyncClient(fleet.routers) as client:
            others = [asyncio.create_task(ask(client, sample_prompt(60, 1000 + seed))) for _ in range(BYSTANDERS)]
            stream = client.generate(prompt, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
            before, seen = sum_of(fleet, "migrations_total"), 0
            kill_at: int | None = draw.randrange(1, 60)
            async for delta in stream:
                seen += len(delta.token_ids)
                if kill_at is not None and seen >= kill_at:
                    await asyncio.to_thread(kill_one, fleet, "decode", running)
                    fleet.start("decode")
                    kill_at = None
            answer = await stream.result()
            company = await asyncio.gather(*others)
            await fleet.settled(prefill=2, decode=2)
            await fleet.idle()
            assert answer.token_ids == (await ask(client, prompt)).token_ids
            assert company[0].token_ids == (await ask(client, sample_prompt(60, 1000 + seed))).token_ids
            assert all(other.token_ids == company[0].token_ids for other in company)
        assert answer.usage.completion_tokens == len(answer.token_ids) == NEW_TOKENS
        moved = answer.usage.migrations + sum(other.usage.migrations for other in company)
        # Somebody was on the worker that died, and each of them says so.
        assert moved >= 1
        assert sum_of(fleet, "migrations_total") - before == moved


async def test_a_prefill_killed_in_mid_transfer(fleet: ProcessFleet, trials: int) -> None:
    for seed in range(trials):
        draw = random.Random(100 + seed)
        prompt = sample_prompt(draw.randrange(1200, 1800), 100 + seed)
        await fleet.settled(prefill=2, decode=2)
        sent = {worker.http: worker.metric("kv_sent_bytes_total") for worker in fleet.of("prefill")}
        retries = sum_of(fleet, 'retries_total{leg="prefill"}') + sum_of(fleet, 'retries_total{leg="decode"}')
        async with AsyncClient(fleet.routers) as client:
            asking = asyncio.create_task(ask(client, prompt, new_tokens=40))

            def sending(worker: Process, sent: dict[str, float] = sent) -> bool:
                return worker.metric("kv_sent_bytes_total") > sent[worker.http] and bool(running(worker))

            await eventually(lambda: any(map(sending, fleet.of("prefill"))), "no prefill worker sends")
            await asyncio.to_thread(kill_one, fleet, "prefill", sending)
            fleet.start("prefill")
            answer = await asking
            again = sum_of(fleet, 'retries_total{leg="prefill"}') + sum_of(fleet, 'retries_total{leg="decode"}')
            assert again > retries
            await fleet.settled(prefill=2, decode=2)
            await fleet.idle()
            assert answer.token_ids == (await ask(client, prompt, new_tokens=40)).token_ids
        # Before the first token it is a new attempt, not a migration.
        assert answer.usage.migrations == 0


async def ask(client: AsyncClient, prompt: list[int], *, new_tokens: int = NEW_TOKENS) -> Completion:
    return await client.generate(prompt, max_tokens=new_tokens, temperature=0, ignore_eos=True).result()


def running(worker: Process) -> bool:
    return worker.metric("running_requests") > 0


def kill_one(fleet: ProcessFleet, role: str, victim: Callable[[Process], bool]) -> None:
    """Kills the first worker that is in the midst of it."""
    next(worker for worker in fleet.of(role) if victim(worker)).kill()


def sum_of(fleet: ProcessFleet, counter: str) -> float:
    """Of a counter over all routers."""
    return sum(router.metric(counter) for router in fleet.of("router"))
