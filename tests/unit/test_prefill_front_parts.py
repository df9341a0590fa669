"""The small parts of the front: limits of a wait, the load, the event record, the command line."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from hma_serve.core.errors import Cancelled, DeadlineExceeded, InvalidArgument, Unavailable
from hma_serve.internal.v1.prefill_engine_pb2 import PrefillLayerDone
from hma_serve.prefill.admission import Admission
from hma_serve.prefill.config import PrefillConfig, build_parser, config_of
from hma_serve.prefill.events import LayerEvents
from hma_serve.prefill.front import FrontParts, PrefillServicer
from hma_serve.prefill.guard import Guard
from hma_serve.prefill.load import Load
from hma_serve.telemetry.metrics import prefill_metrics
from hma_serve.v1 import common_pb2, kv_block_pb2, prefill_pb2, worker_pb2
from support.deadlines import deadline_in


async def never() -> None:
    await asyncio.Event().wait()


async def value() -> int:
    return 7


async def test_a_guard_passes_results_and_failures_through() -> None:
    guard = Guard(60)
    assert await guard.wait(value(), "a value") == 7
    guard.check()

    async def fails() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        await guard.wait(fails(), "a failure")
    assert guard.failure is None


async def test_a_guard_ends_a_wait_at_its_limit_or_at_the_deadline() -> None:
    with pytest.raises(Unavailable, match=r"more than 0\.01 s for credit"):
        await Guard(60).wait(never(), "credit", limit=0.01)
    with pytest.raises(DeadlineExceeded, match="waiting for credit"):
        await Guard(0.01).wait(never(), "credit", limit=60)
    guard = Guard(-1)
    assert guard.remaining() == 0
    with pytest.raises(DeadlineExceeded):
        await guard.wait(never(), "credit")


async def test_the_first_failure_ends_every_wait_and_cancels_what_was_awaited() -> None:
    guard = Guard(60)
    awaited = asyncio.ensure_future(never())
    waiting = asyncio.ensure_future(guard.wait(awaited, "nothing"))
    await asyncio.sleep(0)
    guard.fail(Cancelled("first"))
    guard.fail(Unavailable("second"))
    with pytest.raises(Cancelled, match="first"):
        await waiting
    assert awaited.cancelled()
    with pytest.raises(Cancelled):
        guard.check()
    with pytest.raises(Cancelled):
        await guard.wait(value(), "a value")


async def test_cancelling_a_wait_cancels_what_was_awaited() -> None:
    awaited = asyncio.ensure_future(never())
    waiting = asyncio.ensure_future(Guard(60).wait(awaited, "nothing"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert awaited.cancelled()


async def test_a_request_is_counted_from_entry_to_exit_whatever_happens() -> None:
    load = Load()
    with load.request(96) as request:
        assert load.snapshot() == worker_pb2.WorkerLoad(
            state=worker_pb2.WORKER_STATE_READY, waiting=1, queued_tokens=96
        )
        request.started()
        request.computed(64, 0.5)
        assert (load.running, load.waiting, load.queued_tokens) == (1, 0, 32)
        assert load.queue_seconds == pytest.approx(32 * 0.5 / 64)
    with pytest.raises(KeyError), load.request(64):
        raise KeyError
    assert (load.requests, load.queued_tokens) == (0, 0)


async def test_the_time_per_token_follows_slowly() -> None:
    load = Load()
    with load.request(128) as request:
        request.started()
        request.computed(64, 0.64)
        assert load.token_seconds == pytest.approx(0.01)
        request.computed(64, 1.28)
        assert load.token_seconds == pytest.approx(0.012)


async def test_changes_of_the_load_wake_those_who_wait() -> None:
    load = Load()
    waiting = asyncio.ensure_future(load.changed())
    idle = asyncio.ensure_future(load.wait_idle(60))
    await asyncio.sleep(0)
    with load.request(32):
        await waiting
        assert not await load.wait_idle(0.001)
    assert await idle
    assert await load.wait_idle(60)


class _Submitted(Exception):
    """What the engine was asked for."""

    def __init__(self, *args: Any, **job: Any) -> None:
        self.job = job


class _AskedEngine:
    discarded_layers = 0

    def job(self, *args: Any, **job: Any) -> Any:
        raise _Submitted(**job)


async def submitted(**context: Any) -> dict[str, Any]:
    """What a request with such a context becomes in the engine."""
    parts = FrontParts(
        instance="i",
        admission=Admission(max_tokens=64, vocab=9, max_requests=1, support=kv_block_pb2.KvSupport()),
        load=Load(),
        engine=cast(Any, _AskedEngine()),
        transfers=cast(Any, None),
        events=LayerEvents(None),
        metrics=prefill_metrics(CollectorRegistry()),
    )
    request = prefill_pb2.PrefillRequest(
        context=common_pb2.RequestContext(request_id="r", epoch=1, deadline=deadline_in(600), **context),
        token_ids=[1] * 32,
        ticket=bytes(16),
        decode_address="d:1",
    )
    with pytest.raises(_Submitted) as caught:
        async for _ in PrefillServicer(parts).Prefill(request, cast(Any, SimpleNamespace(time_remaining=lambda: None))):
            pass
    return caught.value.job


async def test_the_engine_orders_requests_by_what_their_callers_want() -> None:
    now = time.monotonic()
    plain = await submitted()
    assert (plain["priority"], plain["tenant"]) == (0, "")
    # Without an objective the deadline is what counts.
    assert now + 500 < plain["due"] <= now + 700
    wanted = await submitted(priority=3, tenant="t", slo=common_pb2.Slo(ttft_seconds=200))
    assert (wanted["priority"], wanted["tenant"]) == (3, "t")
    assert now + 200 <= wanted["due"] < now + 400
    # An objective that has passed is due at once, not without hurry.
    assert (await submitted(slo=common_pb2.Slo(ttft_seconds=0)))["due"] < now + 100


def test_events_are_recorded_up_to_their_bound(tmp_path: Path) -> None:
    path = tmp_path / "events"
    with LayerEvents(path, limit=2) as events:
        for layer in range(4):
            events.layer_left("r", PrefillLayerDone(layer=layer, chunk_tokens=32, started_ns=1, finished_ns=2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["layer"] for line in lines] == [0, 1]
    assert lines[0]["left_ns"] > 2
    with LayerEvents(None) as off:
        off.layer_left("r", PrefillLayerDone())


def config(*arguments: str) -> PrefillConfig:
    return config_of(build_parser().parse_args(arguments))


def test_the_command_line_becomes_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ETCD_ENDPOINTS", raising=False)
    default = config()
    assert (default.model, default.profile, default.chunk_tokens, default.etcd) == ("demo", "tt_bfp8", 512, None)
    assert default.layers_ahead == 2
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://a:2379")
    assert config().etcd == "http://a:2379"
    assert config("--etcd", "none").etcd is None


@pytest.mark.parametrize(
    "arguments",
    [
        ("--chunk-tokens", "0"),
        ("--chunk-tokens", "48"),
        ("--layers-ahead", "0"),
        ("--max-running", "0"),
        ("--max-waiting", "-1"),
        ("--max-model-len", "31"),
        ("--kv-capacity-tokens", "1"),
        ("--threads", "0"),
        ("--threads", "100000"),
        ("--stall-timeout", "nan"),
        ("--registry-ttl", "1"),
        ("--price-per-hour", "-1"),
        ("--drain-grace", "-1"),
    ],
)
def test_a_wrong_value_is_refused_with_its_flag(arguments: tuple[str, str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        config(*arguments)
    assert caught.value.field == arguments[0]
    assert arguments[0] in caught.value.message


@pytest.mark.parametrize(
    ("advertise", "bound", "expected"),
    [
        (None, "127.0.0.1:7", "127.0.0.1:7"),
        ("pod", "0.0.0.0:7", "pod:7"),
        ("pod:9", "0.0.0.0:7", "pod:9"),
        ("[fd00::1]", "[::]:7", "[fd00::1]:7"),
        ("[fd00::1]:9", "[::]:7", "[fd00::1]:9"),
        ("fd00::1", "[::]:7", "[fd00::1]:7"),
        ("fd00::1:9", "[::]:7", "[fd00::1:9]:7"),
    ],
)
def test_the_advertised_address(advertise: str | None, bound: str, expected: str) -> None:
    flags = () if advertise is None else ("--advertise", advertise)
    assert config("--etcd", "http://a:2379", *flags).advertised(bound) == expected


def test_an_address_that_nobody_can_use_is_not_registered() -> None:
    with pytest.raises(InvalidArgument, match="--advertise"):
        config("--etcd", "http://a:2379").advertised("0.0.0.0:7")
    assert config("--etcd", "none").advertised("0.0.0.0:7") == "0.0.0.0:7"


async def test_chunks_and_transfers_calibrate_what_the_queue_is_said_to_take() -> None:
    load = Load()
    load.expect(chunk_tokens=64, bytes_per_token=100, layers=4)
    with load.request(192) as request:
        request.started()
        request.skipped(64)
        assert (request.before, load.queued_tokens) == (64, 128)
        for _ in range(2):
            request.computed(64, 0.5)
        request.transferred(12_800, sending=0.1, computing=1.0, exposed=0.2)
    with load.request(64):
        said = load.snapshot()
    assert said.cost.measurements == 1
    assert 0 < said.queue_seconds == load.steps.cost.prompt(64)
    assert said.transfer.bytes_per_second == pytest.approx(128_000)
    assert 0 < said.transfer.handoff_seconds < 0.2
    assert load.queue_seconds == 0.0
