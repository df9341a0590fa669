"""A completion goes on when its decode worker is lost after some tokens: real gRPC, fake workers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from hma_serve.core.errors import (
    DataLoss,
    FailedPrecondition,
    HmaError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from hma_serve.core.request import SamplingParams, StopConditions
from hma_serve.core.worker import WorkerRole
from hma_serve.router import dispatch
from hma_serve.router.completion import CompletionRequest, Delta, Event, Finished
from hma_serve.router.pipeline import Pipeline
from support.fake_fleet import LONG, TOKENS, request, running_fleet, token_ids, tokens
from support.fake_workers import FakeDecode, FakePrefill, FakeRegistry, fake_worker, running, running_pipeline, until


async def whole(
    pipeline: Pipeline, wanted: CompletionRequest, emitted: asyncio.Event | None = None
) -> tuple[list[Delta], Finished]:
    """The answer; `emitted` is set when two tokens of it have come."""
    prepared = await pipeline.completions.prepare(wanted)
    events: list[Event] = []
    async for event in pipeline.completions.run(prepared):
        events.append(event)
        if emitted is not None and sum(len(token_ids(event)) for event in events) == 2:
            emitted.set()
    assert isinstance(events[-1], Finished)
    return [event for event in events if isinstance(event, Delta)], events[-1]


def ids(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


async def test_nothing_is_lost_or_doubled_and_the_budget_counts_what_was_emitted() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].fail_after, fleet.decodes[0].failure = 2, DataLoss("a page was lost")
        deltas, end = await whole(pipeline, request())
        assert ids(deltas) == list(LONG[:TOKENS])
        assert (end.completion_tokens, end.migrations) == (TOKENS, 1)
        first, second = fleet.decodes[0].calls[0], fleet.decodes[1].calls[0]
        assert (first.context.epoch, second.context.epoch) == (1, 2)
        assert list(second.emitted_token_ids) == list(LONG[:2])
        assert second.stop.max_tokens == TOKENS
        assert second.prompt_token_ids == first.prompt_token_ids


async def test_the_prompt_comes_again_from_the_prefill_that_has_it() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].fail_after, fleet.decodes[0].failure = 1, DataLoss("a page was lost")
        assert await tokens(pipeline, request()) == list(LONG[:TOKENS])
        assert fleet.calls() == [2, 0, 1, 1]
        first, again = fleet.prefills[0].calls
        assert again.token_ids == first.token_ids
        assert again.ticket != first.ticket
        assert again.decode_address == fleet.decodes[1].info.address


async def test_a_prompt_that_decode_computed_is_computed_by_decode_again() -> None:
    decodes = [FakeDecode(), FakeDecode()]
    prefill = FakePrefill()
    async with running_pipeline(*decodes) as (pipeline, registry):
        for decode in decodes:
            decode.stall_after = 2
        emitted = asyncio.Event()
        task = asyncio.create_task(whole(pipeline, request(), emitted))
        await asyncio.wait([asyncio.ensure_future(d.until_active()) for d in decodes], return_when="FIRST_COMPLETED")
        [serving] = [decode for decode in decodes if decode.active]
        [other] = [decode for decode in decodes if decode is not serving]
        other.stall_after = None
        await prefill.start()
        registry.put(*(decode.info for decode in decodes), prefill.info)
        await until(pipeline, lambda fleet: any(view.open for view in fleet.prefills))
        await emitted.wait()
        await serving.stop()
        deltas, end = await task
        assert ids(deltas) == list(LONG[:TOKENS])
        assert end.migrations == 1
        assert other.calls[0].packed_tokens == 0
        assert not prefill.calls
        await prefill.stop()


async def test_a_broken_connection_quarantines_the_worker_and_the_stream_goes_on() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].break_after = 3
        deltas, end = await whole(pipeline, request())
        assert (ids(deltas), end.migrations) == (list(LONG[:TOKENS]), 1)
        # The probe found it well again.
        await until(pipeline, lambda view: all(decode.open for decode in view.decodes))
        assert [decode.described for decode in fleet.decodes] == [2, 1]


async def test_a_worker_without_room_for_what_was_emitted_is_not_asked() -> None:
    info = fake_worker(WorkerRole.DECODE, address="127.0.0.1:0", kv_capacity_tokens=192, overcommit=True)
    first, nearly_full = FakeDecode(replace(info, instance="first")), FakeDecode(replace(info, instance="nearly full"))
    # Room for the prompt and a token more, not for 30.
    nearly_full.load.running, nearly_full.load.kv_free_tokens = 1, 128
    async with running_pipeline(first, nearly_full) as (pipeline, _):
        first.break_after = 30
        deltas, end = await whole(pipeline, request(max_tokens=40))
        assert (len(ids(deltas)), end.migrations) == (40, 1)
        assert (len(first.calls), len(nearly_full.calls)) == (2, 0)


async def stranded(
    pipeline: Pipeline, registry: FakeRegistry, only: FakeDecode
) -> asyncio.Task[tuple[list[Delta], Finished]]:
    """A completion that has two tokens and no worker any more."""
    only.gate.clear()
    task = asyncio.create_task(whole(pipeline, request()))
    await only.until_active()
    only.fail_after, only.failure = 2, DataLoss("a page was lost")
    registry.put()
    only.gate.set()
    while not pipeline.metrics.retries.labels("decode")._value.get():  # noqa: ASYNC110
        await asyncio.sleep(0)
    # It has asked for another pair by now.
    await asyncio.sleep(0)
    return task


async def test_without_any_worker_left_a_stream_waits_for_one_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_LOOK_AGAIN", 0.01)
    only, late = FakeDecode(), FakeDecode()
    async with running(late), running_pipeline(only) as (pipeline, registry):
        task = await stranded(pipeline, registry, only)
        # Who has nothing yet is told at once.
        with pytest.raises(Unavailable, match="no decode worker"):
            await tokens(pipeline, request())
        registry.put(late.info)
        deltas, end = await task
        assert ids(deltas) == list(LONG[:TOKENS])
        assert end.migrations == 1


async def test_a_stream_waits_for_a_worker_to_come_only_as_long_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_LOOK_AGAIN", 0.01)
    only = FakeDecode()
    async with running_pipeline(only, max_wait=2) as (pipeline, registry):
        task = await stranded(pipeline, registry, only)
        with pytest.raises(Unavailable, match="no decode worker"):
            await task
        assert pipeline.admission.waiting == 0


async def test_an_answer_that_was_whole_needs_no_other_worker() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].lose_the_end = True
        deltas, end = await whole(pipeline, request())
        assert (ids(deltas), end.migrations) == (list(LONG[:TOKENS]), 0)
        assert fleet.calls()[2:] == [1, 0]


async def test_pairs_that_fail_are_counted_over_the_whole_answer() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].fail_after, fleet.decodes[1].fail_after = 1, 2
        for decode in fleet.decodes:
            decode.failure = DataLoss("a page was lost")
        seen: list[int] = []
        prepared = await pipeline.completions.prepare(request())
        with pytest.raises(Unavailable, match="a page was lost"):
            async for event in pipeline.completions.run(prepared):
                seen += event.token_ids if isinstance(event, Delta) else ()
        assert seen == list(LONG[:2])
        assert sum(fleet.calls()[2:]) == 3


async def test_logprobs_come_once_for_each_token() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].fail_after, fleet.decodes[0].failure = 2, DataLoss("a page was lost")
        wanted = replace(request(), sampling=SamplingParams(logprobs=0))
        deltas, _ = await whole(pipeline, wanted)
        chosen = [logprobs.chosen.token_id for delta in deltas for logprobs in delta.logprobs]
        assert chosen == ids(deltas) == list(LONG[:TOKENS])


@pytest.mark.parametrize("seed", [None, 7])
async def test_the_seed_goes_along(seed: int | None) -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].fail_after, fleet.decodes[0].failure = 2, DataLoss("a page was lost")
        await whole(pipeline, replace(request(), sampling=SamplingParams(seed=seed)))
        first, second = fleet.decodes[0].calls[0].sampling, fleet.decodes[1].calls[0].sampling
        assert first.HasField("seed")
        assert first.seed == second.seed
        assert seed in (None, first.seed)


async def test_a_stop_string_across_the_gap_is_found() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].fail_after, fleet.decodes[0].failure = 2, DataLoss("a page was lost")
        text = pipeline.completions.model.tokenizer.decode(LONG[1:3])
        stop = StopConditions(max_tokens=TOKENS, stop_strings=(text,))
        deltas, end = await whole(pipeline, CompletionRequest((LONG,), stop=stop))
        assert end.stop_match == text
        assert (end.completion_tokens, end.migrations) == (3, 1)
        assert "".join(delta.text for delta in deltas) == pipeline.completions.model.tokenizer.decode(LONG[:1])


@pytest.mark.parametrize("kind", [Unavailable, Internal, FailedPrecondition])
async def test_a_prefill_that_gets_on_with_itself_but_not_with_decode_accuses_decode(kind: type[HmaError]) -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.prefills[0].failures = [kind("decode is gone, or talks nonsense", field="decode_address")]
        assert await tokens(pipeline, request()) == list(LONG[:TOKENS])
        assert fleet.calls() == [1, 1, 1, 1]
        await until(pipeline, lambda view: all(decode.open for decode in view.decodes))
        assert [decode.described for decode in fleet.decodes] == [2, 1]


@pytest.mark.parametrize("error", [InvalidArgument("bad"), ResourceExhausted("full")])
async def test_what_a_worker_answers_never_quarantines_it(error: HmaError) -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].refusals = [error]
        await asyncio.gather(tokens(pipeline, request()), return_exceptions=True)
        assert all(view.open for view in pipeline.keeper.fleet.decodes)
        assert [decode.described for decode in fleet.decodes] == [1, 1]
