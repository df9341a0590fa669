"""The fleet view follows the registry, the load streams and the requests."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from hma_serve.core.worker import WorkerRole, WorkerState
from hma_serve.registry import MemoryStore, Session, Watcher
from hma_serve.router.fleet import Fleet, Load, WorkerView
from hma_serve.router.fleet_keeper import FleetKeeper
from hma_serve.router.placement import Demand, Placement, place
from hma_serve.router.readiness import SETTLE_SECONDS, Readiness
from hma_serve.rpc import ChannelCache
from hma_serve.v1 import worker_pb2
from support.fake_workers import (
    MODEL_NAME,
    FakeDecode,
    FakePrefill,
    FakeRegistry,
    fake_model,
    fake_worker,
    running,
    running_pipeline,
    until,
)

WAIT = 10.0


def one(fleet: Fleet) -> WorkerView:
    [view] = fleet.decodes
    return view


async def test_load_reports_arrive_and_replace_what_was_assumed() -> None:
    decode = FakeDecode()
    async with running_pipeline(decode) as (pipeline, _):
        keeper = pipeline.keeper
        held = keeper.hold(Placement(decode.info, None, 0), Demand(40, 24))
        assert (one(keeper.fleet).requests, one(keeper.fleet).kv_tokens, one(keeper.fleet).placed) == (1, 64, 1)
        decode.load.running, decode.load.kv_used_tokens = 3, 64
        decode.report()
        await until(pipeline, lambda fleet: one(fleet).load == Load(running=3, kv_used_tokens=64))
        assert one(keeper.fleet).unseen.requests == 0
        assert (one(keeper.fleet).requests, one(keeper.fleet).kv_tokens) == (3, 64)
        held.release()
        held.release()
        assert one(keeper.fleet).ours.requests == 0


async def test_what_came_and_went_between_two_reports_counts_no_more() -> None:
    decode = FakeDecode()
    async with running_pipeline(decode) as (pipeline, _):
        keeper = pipeline.keeper
        over, stays = (keeper.hold(Placement(decode.info, None, 0), Demand(40, tokens)) for tokens in (100, 40))
        over.release()
        assert (one(keeper.fleet).requests, one(keeper.fleet).kv_tokens) == (1, 96)
        decode.load.running, decode.load.kv_used_tokens = 1, 64
        decode.report()
        await until(pipeline, lambda fleet: one(fleet).load == Load(running=1, kv_used_tokens=64))
        # Whether the one that the report knows of has gone, only the next report can say.
        stays.release()
        assert (one(keeper.fleet).requests, one(keeper.fleet).unseen.requests) == (1, 0)


async def test_prefill_is_given_back_before_decode() -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    async with running_pipeline(prefill, decode) as (pipeline, _):
        demand = Demand(100, 1)
        outcome = place(demand, pipeline.keeper.fleet, asyncio.get_running_loop().time())
        assert isinstance(outcome, Placement)
        held = pipeline.keeper.hold(outcome, demand)
        assert pipeline.keeper.fleet.prefills[0].ours.tokens == 96
        held.release_prefill()
        assert pipeline.keeper.fleet.prefills[0].ours.tokens == 0
        assert pipeline.keeper.fleet.decodes[0].ours.tokens == 100
        held.release()


async def test_a_worker_that_dies_is_put_away_at_once_and_its_successor_is_found() -> None:
    decode = FakeDecode()
    async with running_pipeline(decode) as (pipeline, registry):
        await decode.stop()
        await until(pipeline, lambda fleet: not one(fleet).open)
        assert pipeline.not_ready() is not None
        successor = FakeDecode()
        async with running(successor):
            registry.put(successor.info)
            await until(pipeline, lambda fleet: one(fleet).open)
            assert one(pipeline.keeper.fleet).info.instance == successor.info.instance


async def test_a_worker_that_comes_back_is_used_again() -> None:
    decode = FakeDecode()
    async with running_pipeline(decode) as (pipeline, _):
        await decode.stop()
        await until(pipeline, lambda fleet: not one(fleet).open)
        again = FakeDecode(decode.info)
        async with running(again):
            await until(pipeline, lambda fleet: one(fleet).open)


async def test_another_instance_at_a_known_address_is_not_trusted() -> None:
    impostor = FakeDecode()
    async with running(impostor):
        registered = replace(impostor.info, instance="decode-that-died")
        registry = FakeRegistry(registered)
        channels = ChannelCache()
        async with FleetKeeper(registry, channels, fake_model().served_by) as keeper:
            await impostor.until_described(3)
            assert not one(keeper.fleet).open
            registry.put(impostor.info)
            changed = asyncio.Event()
            keeper.subscribe(changed.set)
            while not one(keeper.fleet).open:
                await changed.wait()
                changed.clear()
        await channels.close()


async def test_a_request_that_cannot_reach_a_worker_makes_it_be_checked() -> None:
    decode = FakeDecode()
    async with running_pipeline(decode) as (pipeline, _):
        pipeline.keeper.report_failure(decode.info.instance)
        assert not one(pipeline.keeper.fleet).open
        await until(pipeline, lambda fleet: one(fleet).open)
        assert decode.described == 2


async def test_a_refusal_holds_until_the_next_report() -> None:
    decode = FakeDecode()
    async with running_pipeline(decode) as (pipeline, _):
        pipeline.keeper.report_refusal(decode.info.instance)
        assert one(pipeline.keeper.fleet).refused
        decode.report()
        await until(pipeline, lambda fleet: not one(fleet).refused)


async def test_reports_about_unknown_workers_are_ignored() -> None:
    async with running_pipeline() as (pipeline, _):
        pipeline.keeper.report_failure("gone")
        pipeline.keeper.report_refusal("gone")
        held = pipeline.keeper.hold(Placement(fake_worker(WorkerRole.DECODE), None, 0), Demand(1, 1))
        held.release()
        assert pipeline.keeper.fleet == Fleet()


async def test_draining_is_seen_in_the_registry_and_in_the_load() -> None:
    decode = FakeDecode()
    async with running_pipeline(decode) as (pipeline, registry):
        registry.put(replace(decode.info, state=WorkerState.DRAINING))
        assert not one(pipeline.keeper.fleet).open
        registry.put(decode.info)
        assert one(pipeline.keeper.fleet).open
        decode.load.state = worker_pb2.WORKER_STATE_DRAINING
        decode.report()
        await until(pipeline, lambda fleet: not one(fleet).open)


async def test_workers_of_another_model_are_left_alone() -> None:
    decode = FakeDecode()
    other = replace(decode.info, instance="other", model=replace(decode.info.model, id="another"))
    async with running_pipeline(decode) as (pipeline, registry):
        registry.put(decode.info, other)
        assert [view.info.instance for view in pipeline.keeper.fleet.decodes] == [decode.info.instance]


def test_a_known_fingerprint_decides_and_a_name_only_without_one() -> None:
    worker = fake_worker(WorkerRole.DECODE, fingerprint="a" * 64)
    renamed = replace(worker, model=replace(worker.model, id="another name"))
    assert fake_model("a" * 64).served_by(renamed)
    assert not fake_model("b" * 64).served_by(worker)
    assert fake_model().served_by(worker)
    assert not fake_model().served_by(renamed)
    assert worker.model.id == MODEL_NAME


async def test_requests_in_flight_survive_that_their_worker_leaves_the_registry() -> None:
    decode = FakeDecode()
    async with running_pipeline(decode) as (pipeline, registry):
        held = pipeline.keeper.hold(Placement(decode.info, None, 0), Demand(1, 1))
        registry.put()
        assert pipeline.keeper.fleet == Fleet()
        held.release()
        registry.put(decode.info)
        assert one(pipeline.keeper.fleet).ours.requests == 0


async def test_the_real_watcher_feeds_it() -> None:
    decode = FakeDecode()
    store = MemoryStore()
    channels = ChannelCache()
    async with running(decode), Session(store, decode.info) as session:
        assert await session.published(WAIT)
        async with Watcher(store) as watcher, FleetKeeper(watcher, channels, fake_model().served_by) as keeper:
            changed = asyncio.Event()
            keeper.subscribe(changed.set)
            while not (keeper.fleet.decodes and one(keeper.fleet).open):
                await changed.wait()
                changed.clear()
        await channels.close()
    store.close()


def test_readiness_waits_for_a_pair_at_first_and_settles_for_decode() -> None:
    decode = WorkerView(fake_worker(WorkerRole.DECODE), Load())
    prefill = WorkerView(fake_worker(WorkerRole.PREFILL), Load())
    ready = Readiness(local_prefill=True)
    assert ready.why_not(Fleet(), 0.0) is not None
    assert ready.why_not(Fleet(decodes=(decode,)), 100.0) is not None
    assert ready.why_not(Fleet((prefill,), (decode,)), 101.0) is None
    assert ready.why_not(Fleet(decodes=(decode,)), 100.0 + SETTLE_SECONDS) is None
    assert ready.why_not(Fleet((prefill,), (replace(decode, away_since=1.0),)), 200.0) is not None
    assert ready.why_not(Fleet(decodes=(decode,)), 201.0) is not None
    strict = Readiness(local_prefill=False)
    strict.why_not(Fleet(decodes=(decode,)), 0.0)
    assert strict.why_not(Fleet(decodes=(decode,)), 1e9) is not None
