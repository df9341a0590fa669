"""SIGTERM under load: streams end whole, nothing new is taken, the process exits with 0; no request is lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hma_serve.client import AsyncClient
from support.process_fleet import Process, ProcessFleet
from support.sample_prompts import sample_prompt

CLIENTS = 3
NEW_TOKENS = 60
DRAIN_SECONDS = 90.0


@asynccontextmanager
async def load(fleet: ProcessFleet) -> AsyncIterator[list[int]]:
    """Clients that ask all the time; yields the lengths of what they got. Any error of theirs is the test's."""
    lengths: list[int] = []
    over = asyncio.Event()
    seeds = itertools.count(10_000)

    async def ask(client: AsyncClient) -> None:
        while not over.is_set():
            prompt = sample_prompt(100, next(seeds))
            stream = client.generate(prompt, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
            lengths.append(len((await stream.result()).token_ids))

    async with AsyncClient(fleet.routers) as client, asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(ask(client))
        try:
            yield lengths
        finally:
            over.set()


async def test_rolling_restarts_lose_no_request(fleet: ProcessFleet, restarts: int) -> None:
    await fleet.settled(prefill=2, decode=2)
    async with load(fleet) as lengths:
        for number in range(restarts):
            role = ("decode", "prefill", "router")[number % 3]
            served = len(lengths)
            old = fleet.of(role)[0]
            assert await drained(old) == 0, "".join(old.lines)[-3000:]
            if role == "router":
                fleet.restart_router(old)
            else:
                fleet.start(role)
            await fleet.settled(prefill=2, decode=2)
            async with asyncio.timeout(DRAIN_SECONDS):
                while len(lengths) == served:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
    assert len(lengths) > restarts
    assert set(lengths) == {NEW_TOKENS}
    await fleet.idle()


async def drained(worker: Process) -> int:
    """Tells a process to leave; its exit status."""
    worker.terminate()
    return await asyncio.to_thread(worker.process.wait, DRAIN_SECONDS)
