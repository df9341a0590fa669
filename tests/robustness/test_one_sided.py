"""A cluster without prefill workers still answers, and uses one as soon as there is one again."""

from __future__ import annotations

from hma_serve.client import AsyncClient
from support.process_fleet import ProcessFleet
from support.sample_prompts import sample_prompt

PROMPT = 400
PACKED = (PROMPT - 1) // 32 * 32


def computed(fleet: ProcessFleet) -> float:
    return sum(worker.metric("tokens_total") for worker in fleet.of("prefill"))


def received(fleet: ProcessFleet) -> float:
    return sum(worker.metric("kv_received_bytes_total") for worker in fleet.of("decode"))


def local(fleet: ProcessFleet) -> float:
    return sum(router.metric("local_prefills_total") for router in fleet.of("router"))


async def test_decode_computes_prompts_while_no_prefill_worker_lives(fleet: ProcessFleet) -> None:
    await fleet.settled(prefill=2, decode=2)
    before_local, before_bytes = local(fleet), received(fleet)
    for worker in fleet.of("prefill"):
        worker.kill()
    async with AsyncClient(fleet.routers) as client:

        async def ask(seed: int) -> tuple[int, ...]:
            stream = client.generate(sample_prompt(PROMPT, seed), max_tokens=8, temperature=0, ignore_eos=True)
            return (await stream.result()).token_ids

        alone = await ask(500)
        assert local(fleet) == before_local + 1
        assert received(fleet) == before_bytes
        for _ in range(2):
            fleet.start("prefill")
        await fleet.settled(prefill=2, decode=2)
        # Computed by prefill now, to the same tokens; the new workers have nothing in their caches.
        assert await ask(500) == alone
        assert computed(fleet) == PACKED
        assert local(fleet) == before_local + 1
        assert received(fleet) > before_bytes
    await fleet.idle()
