"""SIGTERM under load: streams end whole, nothing new is taken, the process exits with 0; no request is lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hma_serve.client import AsyncClient, Completion
from support.process_fleet import Process, ProcessFleet, eventually
from support.sample_prompts import sample_prompt

CLIENTS = 3
NEW_TOKENS = 60
DRAIN_SECONDS = 90.0


@asynccontextmanager
async def load(fleet: ProcessFleet) -> AsyncIterator[list[Completion]]:
    """Clients that ask all the time; yields what they got. Any error of theirs is the test's."""
    answers: list[Completion] = []
    over = asyncio.Event()
    seeds = itertools.count(10_000)

    async def ask(client: AsyncClient) -> None:
        while not over.is_set():
            prompt = sample_prompt(100, next(seeds))
            stream = client.generate(prompt, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
            answers.append(await stream.result())

    async with AsyncClient(fleet.routers) as client, asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(ask(client))
        try:
            yield answers
        finally:
            over.set()


async def test_rolling_restarts_lose_no_request(fleet: ProcessFleet, restarts: int) -> None:
    await fleet.settled(prefill=2, decode=2)
    async with load(fleet) as answers:
        for number in range(restarts):
            role = ("decode", "prefill", "router")[number % 3]
            old = await drain_one_at_work(fleet, role)
            served = len(answers)
            if role == "router":
                fleet.restart_router(old)
            else:
                fleet.start(role)
            await fleet.settled(prefill=2, decode=2)
            async with asyncio.timeout(DRAIN_SECONDS):
                while len(answers) == served:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
    assert len(answers) > restarts
    assert {len(answer.token_ids) for answer in answers} == {NEW_TOKENS}
    # Who leaves ends his streams himself.
    assert sum(answer.usage.migrations for answer in answers) == 0
    await fleet.idle()


async def drain_one_at_work(fleet: ProcessFleet, role: str) -> Process:
    """Tells a process to leave in the midst of its work; it must go well, and be in the registry no more."""

    def at_work() -> list[Process]:
        return [process for process in fleet.of(role) if process.metric("running_requests") > 0]

    leaving = (await eventually(at_work, f"no {role} has anything to do"))[0]
    assert leaving.grpc in fleet.registered()
    leaving.terminate()
    status = await asyncio.to_thread(leaving.process.wait, DRAIN_SECONDS)
    assert status == 0, "".join(leaving.lines)[-3000:]
    assert leaving.grpc not in fleet.registered()
    return leaving
