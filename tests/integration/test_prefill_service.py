"""A real prefill worker, front and engine, pushing to a KvTransfer server of the test."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from hma_serve import quant
from hma_serve.checkpoint import fingerprint
from hma_serve.core.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    HmaError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from hma_serve.prefill.kv_layout import ROLES
from hma_serve.v1 import worker_pb2
from support.cluster import alive
from support.prefill_worker import (
    CHUNK,
    LAYER_BYTES,
    LAYERS,
    MAX_RUNNING,
    MAX_WAITING,
    VOCAB,
    WINDOW,
    Client,
    Worker,
    connected,
    prompt,
    running_worker,
)
from support.push_receiver import Behaviour, PushReceiver
from support.reference import reference_packed_kv
from support.tiny_qwen3 import make_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "tiny",
        layers=LAYERS,
        hidden=64,
        heads=8,
        kv_heads=2,
        head_dim=32,
        intermediate=96,
        vocab=VOCAB,
        max_position_embeddings=WINDOW,
    )


@pytest.fixture(scope="module")
def worker(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    events = tmp_path_factory.mktemp("events") / "layers.jsonl"
    with running_worker(checkpoint, events, "--stall-timeout", "20") as made:
        yield made


@pytest.fixture
async def receiver() -> AsyncIterator[PushReceiver]:
    async with PushReceiver() as made:
        yield made


@pytest.fixture
async def client(worker: Worker) -> AsyncIterator[Client]:
    async with connected(worker) as made:
        yield made
        await made.idle()


async def test_every_byte_arrives_and_decodes_to_what_the_reference_computes(
    client: Client, receiver: PushReceiver, checkpoint: Path
) -> None:
    ids = prompt(416)
    call = client.prefill(receiver, ids, epoch=3)
    assert (await call.accepted()).instance.startswith("prefill-")
    completed = await call.completed()
    (stream,) = receiver.streams
    assert stream.committed
    assert stream.epoch == 3
    assert stream.plan.manifest.model_fingerprint == fingerprint(checkpoint)
    assert stream.plan.manifest.producer.instance == call.responses[0].accepted.instance
    codec = quant.codec("tt_bfp8_b")
    for layer, roles in enumerate(reference_packed_kv(checkpoint, "tt_bfp8", ids)):
        for role, packed in zip(ROLES, roles, strict=True):
            expected = codec.decode(packed).numpy()
            np.testing.assert_array_equal(stream.decoded(layer, role), expected)
    assert completed.computed_tokens == 416
    assert completed.payload_bytes == stream.plan.payload_bytes
    assert completed.compute_seconds > 0
    assert completed.exposed_transfer_seconds > 0
    progress = [response.progress.computed_tokens for response in call.responses if response.HasField("progress")]
    assert progress == [64, 128, 192, 256, 320, 384, 416]


async def test_a_layer_has_left_before_the_one_after_the_next_is_computed(
    client: Client, receiver: PushReceiver, worker: Worker
) -> None:
    call = client.prefill(receiver, prompt(256))
    await call.completed()
    events = worker.recorded(call.request.context.request_id)
    assert [(event["chunk_start"], event["layer"]) for event in events] == [
        (start, layer) for start in range(0, 256, CHUNK) for layer in range(LAYERS)
    ]
    for event, after_next in itertools.pairwise(events[::2]):
        assert event["left_ns"] < after_next["compute_started_ns"]
    for event, after_next in itertools.pairwise(events[1::2]):
        assert event["left_ns"] < after_next["compute_started_ns"]
    for event in events:
        assert event["compute_started_ns"] < event["compute_finished_ns"] < event["left_ns"]


async def test_tokens_that_decode_holds_do_not_travel(client: Client, receiver: PushReceiver) -> None:
    whole = client.prefill(receiver, prompt(160))
    await whole.completed()
    rest = client.prefill(receiver, prompt(160), token_start=96)
    completed = await rest.completed()
    first, second = receiver.streams
    assert (second.plan.token_start, second.plan.token_count) == (96, 64)
    assert completed.computed_tokens == 160
    for key, packed in second.packed.items():
        np.testing.assert_array_equal(packed, first.packed[key][:, 3:])


def test_what_was_computed_once_is_only_sent_again(checkpoint: Path, tmp_path: Path) -> None:
    async def scenario(worker: Worker) -> None:
        async with PushReceiver() as receiver, PushReceiver() as another, connected(worker) as client:
            first = await client.prefill(receiver, prompt(256), tenant="a").completed()
            assert (first.computed_tokens, first.cached_tokens) == (256, 0)
            # Another decode, another ticket: as when the first one died.
            again = await client.prefill(another, prompt(256), tenant="a", epoch=2).completed()
            assert (again.computed_tokens, again.cached_tokens, again.compute_seconds) == (0, 256, 0)
            assert again.payload_bytes == first.payload_bytes
            longer = await client.prefill(another, [*prompt(256), *prompt(64, 6)], tenant="a").completed()
            assert (longer.computed_tokens, longer.cached_tokens) == (64, 256)
            strangers = await client.prefill(receiver, prompt(256), tenant="b").completed()
            assert (strangers.computed_tokens, strangers.cached_tokens) == (256, 0)
            whole = receiver.streams[0].packed
            assert another.streams[0].packed.keys() == whole.keys()
            for key, packed in whole.items():
                np.testing.assert_array_equal(another.streams[0].packed[key], packed)
                np.testing.assert_array_equal(another.streams[1].packed[key][:, : packed.shape[1]], packed)
            metrics = (await asyncio.to_thread(httpx.get, f"http://{worker.http}/metrics")).text
            assert "hma_prefill_cached_tokens_total 512.0" in metrics

    with running_worker(checkpoint, tmp_path / "events", "--prefix-cache-bytes", str(64 << 20)) as worker:
        asyncio.run(scenario(worker))


def test_without_overlap_nothing_leaves_before_the_last_layer_is_computed(checkpoint: Path, tmp_path: Path) -> None:
    async def scenario(worker: Worker) -> None:
        async with PushReceiver() as receiver, connected(worker) as client:
            call = client.prefill(receiver, prompt(256))
            completed = await call.completed()
            assert completed.exposed_transfer_seconds > 0
            events = worker.recorded(call.request.context.request_id)
            assert len(events) == LAYERS * 256 // CHUNK
            assert min(event["left_ns"] for event in events) > events[0]["computed_ns"]
            codec = quant.codec("tt_bfp8_b")
            for layer, roles in enumerate(reference_packed_kv(checkpoint, "tt_bfp8", prompt(256))):
                for role, packed in zip(ROLES, roles, strict=True):
                    np.testing.assert_array_equal(
                        receiver.streams[0].decoded(layer, role), codec.decode(packed).numpy()
                    )

    with running_worker(checkpoint, tmp_path / "events", "--overlap", "off") as worker:
        asyncio.run(scenario(worker))


async def test_a_slow_decode_stalls_its_own_request_alone(
    client: Client, receiver: PushReceiver, worker: Worker
) -> None:
    slow = Behaviour(window=LAYER_BYTES, stall_at=1)
    receiver.by_ticket[b"slow............"] = slow
    stalled = client.prefill(receiver, prompt(512), ticket=b"slow............")
    await stalled.accepted()
    await receiver.stream(b"slow............", blocks=1)
    other = client.prefill(receiver, prompt(512, seed=6))
    await other.completed()
    # Parked: the layer being sent, and those that may be computed ahead of it.
    assert len(worker.recorded(stalled.request.context.request_id)) <= 1
    assert (await client.wait_load(running=1)).queued_tokens == 512
    slow.resume.set()
    assert (await stalled.completed()).computed_tokens == 512


async def test_cancelling_stops_the_computation_within_a_layer(
    client: Client, receiver: PushReceiver, worker: Worker
) -> None:
    call = client.prefill(receiver, prompt(WINDOW))
    await call.accepted()
    response = await call.read()
    assert response is not None
    call.call.cancel()
    await client.idle()
    async with asyncio.timeout(10):
        await receiver.streams[0].ended.wait()
    left = len(worker.recorded(call.request.context.request_id))
    assert left < WINDOW // CHUNK * LAYERS
    # The engine has gone on to others: they complete, and nothing of the cancelled one is recorded any more.
    await client.prefill(receiver, prompt(64)).completed()
    assert len(worker.recorded(call.request.context.request_id)) == left
    assert not receiver.streams[0].committed


async def test_decode_failures_reach_the_caller_as_what_they_are(client: Client, receiver: PushReceiver) -> None:
    receiver.behaviour = Behaviour(refusal=NotFound("no such ticket", field="ticket"))
    with pytest.raises(NotFound, match=r"decode at .*: no such ticket"):
        await client.prefill(receiver, prompt(128)).completed()
    receiver.behaviour = Behaviour(hang_up_at=3)
    with pytest.raises(Unavailable, match="decode at"):
        await client.prefill(receiver, prompt(128)).completed()
    await receiver.kill()
    with pytest.raises(Unavailable, match="decode at"):
        await client.prefill(receiver, prompt(128)).completed()
    async with PushReceiver() as healthy:
        assert (await client.prefill(healthy, prompt(128)).completed()).computed_tokens == 128


async def test_no_request_outlives_its_deadline(client: Client, receiver: PushReceiver) -> None:
    receiver.behaviour = Behaviour(stall_at=1, window=LAYER_BYTES)
    with pytest.raises(DeadlineExceeded, match="passed while waiting for decode at"):
        await client.prefill(receiver, prompt(256), deadline=0.5).completed()
    with pytest.raises(DeadlineExceeded, match="before the request arrived"):
        await client.prefill(receiver, prompt(256), deadline=-1).completed()


async def test_a_full_worker_refuses_at_once_and_says_when_to_come_back(client: Client, receiver: PushReceiver) -> None:
    receiver.behaviour = Behaviour(stall_at=1, window=LAYER_BYTES)
    calls = [client.prefill(receiver, prompt(128)) for _ in range(MAX_RUNNING + MAX_WAITING)]
    for call in calls:
        await call.accepted()
    await client.wait_load(running=MAX_RUNNING, waiting=MAX_WAITING)
    with pytest.raises(ResourceExhausted) as caught:
        await client.prefill(receiver, prompt(128)).accepted()
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 0
    receiver.behaviour.resume.set()
    await asyncio.gather(*(call.completed() for call in calls))


async def test_prompts_for_whose_kv_there_is_no_room_wait(
    checkpoint: Path, tmp_path: Path, receiver: PushReceiver
) -> None:
    """Though more may run at once: memory is known before a prompt is begun."""
    room = ("--max-model-len", "128", "--kv-capacity-tokens", "192")
    with running_worker(checkpoint, tmp_path / "events", *room) as worker:
        async with connected(worker) as client:
            receiver.behaviour = Behaviour(stall_at=1, window=LAYER_BYTES)
            runs = client.prefill(receiver, prompt(128))
            await receiver.stream(runs.request.ticket, blocks=1)
            waits = client.prefill(receiver, prompt(96))
            await waits.accepted()
            # Due earlier, and small enough: when it runs, the other one would if it could.
            overtakes = client.prefill(receiver, prompt(32), deadline=30)
            await receiver.stream(overtakes.request.ticket, blocks=1)
            assert await client.wait_load(running=2, waiting=1)
            assert len(receiver.streams) == 2
            receiver.behaviour.resume.set()
            calls = (runs, waits, overtakes)
            assert [(await call.completed()).computed_tokens for call in calls] == [128, 96, 32]


@pytest.mark.parametrize(
    ("changes", "kind", "name"),
    [
        ({"token_ids": []}, InvalidArgument, "token_ids"),
        ({"token_ids": [1] * 33}, InvalidArgument, "token_ids"),
        ({"token_ids": [VOCAB] * 32}, InvalidArgument, "token_ids"),
        ({"token_ids": [2**32 - 1] * 32}, InvalidArgument, "token_ids"),
        ({"token_ids": [1] * (WINDOW + 32)}, ContextLengthExceeded, "token_ids"),
        ({"token_start": 16}, InvalidArgument, "token_start"),
        ({"token_start": 64}, InvalidArgument, "token_start"),
        ({"ticket": b"short"}, InvalidArgument, "ticket"),
        ({"epoch": 0}, InvalidArgument, "context.epoch"),
        ({"address": "nowhere"}, InvalidArgument, "decode_address"),
        ({"address": "host:99999"}, InvalidArgument, "decode_address"),
    ],
)
async def test_a_wrong_request_is_refused_with_its_field(
    client: Client, receiver: PushReceiver, changes: dict[str, object], kind: type[HmaError], name: str
) -> None:
    arguments: dict[str, object] = {"token_ids": [1] * 64} | changes
    with pytest.raises(kind) as caught:
        await client.prefill(receiver, **arguments).accepted()  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert caught.value.field == name
    assert not receiver.streams


async def test_it_says_who_it_is_and_that_it_is_ready(client: Client, worker: Worker, checkpoint: Path) -> None:
    info = await client.describe()
    assert info.role == worker_pb2.WORKER_ROLE_PREFILL
    assert info.state == worker_pb2.WORKER_STATE_READY
    assert (info.profile, info.address, info.http_address) == ("tt_bfp8", worker.address, worker.http)
    assert info.model.fingerprint == fingerprint(checkpoint)
    assert [codec.id for codec in info.codecs] == [3, 3]
    assert (info.limits.max_model_len, info.limits.max_running, info.limits.max_waiting) == (
        WINDOW,
        MAX_RUNNING,
        MAX_WAITING,
    )
    async with httpx.AsyncClient(base_url=f"http://{worker.http}") as http:
        assert (await http.get("/ready")).status_code == 200
        assert "hma_prefill_tokens_total" in (await http.get("/metrics")).text


async def test_sigterm_finishes_what_runs_and_refuses_what_comes(
    checkpoint: Path, tmp_path: Path, receiver: PushReceiver
) -> None:
    with running_worker(checkpoint, tmp_path / "events", "--profile", "f32") as worker:
        engine = worker.engine_pid
        async with connected(worker) as client:
            receiver.behaviour = Behaviour(stall_at=1, window=LAYER_BYTES)
            call = client.prefill(receiver, prompt(128))
            await call.accepted()
            ticket = call.request.ticket
            await receiver.stream(ticket, blocks=1)
            worker.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10), contextlib.aclosing(client.loads()) as loads:
                async for load in loads:
                    if load.state == worker_pb2.WORKER_STATE_DRAINING:
                        break
            with pytest.raises(Unavailable, match="draining"):
                await client.prefill(receiver, prompt(128)).accepted()
            assert (await client.describe()).state == worker_pb2.WORKER_STATE_DRAINING
            assert await client.health() == health_pb2.HealthCheckResponse.NOT_SERVING
            async with httpx.AsyncClient(base_url=f"http://{worker.http}") as http:
                assert (await http.get("/live")).status_code == 200
                assert (await http.get("/ready")).status_code == 503
            receiver.behaviour.resume.set()
            assert (await call.completed()).computed_tokens == 128
        assert await asyncio.to_thread(worker.process.wait, 20) == 0
        assert not alive(engine)


async def test_the_order_to_drain_cancels_what_outlasts_its_grace(
    checkpoint: Path, tmp_path: Path, receiver: PushReceiver
) -> None:
    with running_worker(checkpoint, tmp_path / "events") as worker:
        async with connected(worker) as client:
            receiver.behaviour = Behaviour(stall_at=1, window=LAYER_BYTES)
            call = client.prefill(receiver, prompt(128))
            await call.accepted()
            await receiver.stream(call.request.ticket, blocks=1)
            result = await client.drain(0.1)
            assert (result.finished, result.cancelled) == (0, 1)
            with pytest.raises(Unavailable, match="told to leave"):
                await call.completed()
            loads = [load async for load in client.loads()]
            assert not loads
        worker.process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(worker.process.wait, 20) == 0


@pytest.mark.parametrize("accident", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_dead_engine_and_one_that_stands_still_end_every_request_and_the_process(
    checkpoint: Path, tmp_path: Path, receiver: PushReceiver, accident: signal.Signals
) -> None:
    with running_worker(checkpoint, tmp_path / "events", "--engine-timeout", "2") as worker:
        async with connected(worker) as client:
            receiver.behaviour = Behaviour(stall_at=1, window=LAYER_BYTES)
            call = client.prefill(receiver, prompt(512))
            await call.accepted()
            await receiver.stream(call.request.ticket, blocks=1)
            os.kill(worker.engine_pid, accident)
            with pytest.raises(Unavailable, match="engine is gone"):
                await call.completed()
        assert await asyncio.to_thread(worker.process.wait, 20) == 1
        assert any("engine is gone" in line for line in worker.lines)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "/no/such/model"], "no checkpoint directory"),
        (["--chunk-tokens", "33"], "--chunk-tokens must be a positive multiple of 32"),
        (["--etcd", "file:/tmp/fleet.json"], "static file"),
        (["--device", "abacus"], "unknown accelerator 'abacus'"),
    ],
)
def test_a_worker_that_cannot_start_says_why(checkpoint: Path, arguments: list[str], sentence: str) -> None:
    command = [sys.executable, "-m", "hma_serve.cli.main", "prefill", "--model", str(checkpoint), "--etcd", "none"]
    command += ["--listen", "127.0.0.1:0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def cut_short(path: Path) -> None:
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tp", "1"], "model.safetensors"),
        (["--tp", "2"], "model.safetensors"),
        (["--profile", "mxint8"], "profile mxint8 does not fit this model: K codec mxint8"),
    ],
    ids=["truncated", "truncated, two ranks", "head_dim"],
)
def test_a_checkpoint_that_cannot_be_served_leaves_nothing_behind(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    fits = "--tp" in arguments
    path = make_tiny_checkpoint(tmp_path / "tiny", hidden=64, head_dim=32 if fits else 48, intermediate=96)
    if fits:
        cut_short(path)
    command = [sys.executable, "-m", "hma_serve.cli.main", "prefill", "--model", str(path), "--etcd", "none"]
    process = subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0", *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert sentence in errors
    assert "Traceback" not in errors
    assert not [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if session_of(pid) == process.pid]


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def test_the_front_does_not_load_torch() -> None:
    code = "import sys, hma_serve.prefill.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
