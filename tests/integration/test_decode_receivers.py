"""A decode worker whose KV comes in through processes of its own: `hma-serve decode --receivers N`."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import grpc.aio
import httpx
import pytest

from hma_serve.cli.certs import main as certs
from hma_serve.core.errors import InvalidArgument, Unavailable
from hma_serve.decode.config import build_parser, config_of
from hma_serve.v1 import decode_pb2, worker_pb2
from support.cluster import alive, descendants, running_cluster
from support.decode_worker import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    Client,
    Worker,
    by_transformers,
    connected,
    emitted,
    first,
    packed_kv,
    prompt,
    refusal,
    refused_push,
    rest,
    running_worker,
)

RECEIVERS = 2
# Two slots each, fewer than the blocks of a prompt: slots must come back to whom they belong.
WORKER_ARGUMENTS = ("--receivers", str(RECEIVERS), "--arena-slots", "2")


async def through_receiver(client: Client, request: decode_pb2.DecodeGenerateRequest) -> tuple[str, list[int]]:
    """Both legs of a request, KV to where the ticket says; that address and the tokens."""
    tokens = request.prompt_token_ids[: request.packed_tokens]
    packed_kv(client.checkpoint, "f32", tuple(tokens))
    call = client.decode.Generate(request, timeout=60)
    ticket = (await first(call)).ticket
    async with grpc.aio.insecure_channel(ticket.push_address) as channel:
        await Client(channel, client.checkpoint).push(tokens, ticket)
    return ticket.push_address, emitted(await rest(call))


def receivers(worker: Worker) -> list[int]:
    """Process ids."""
    return [
        pid
        for pid in descendants(worker.process.pid)
        if b"hma_serve.decode.receiver_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


async def grown_to(worker: Worker, name: str, value: float) -> None:
    for _ in range(400):
        if await worker.metric(name) >= value:
            break
        await asyncio.sleep(0.05)
    assert await worker.metric(name) == value


async def test_streams_are_dealt_out_over_all_receivers_and_their_kv_is_read(
    client: Client, worker: Worker, checkpoint: Path
) -> None:
    before = await worker.metric("kv_received_bytes_total")
    prompts = [prompt(257, seed) for seed in range(6)]
    requests = [client.request(tokens, 256) for tokens in prompts]
    found = await asyncio.gather(*(through_receiver(client, request) for request in requests))
    addresses = {address for address, _ in found}
    assert len(addresses) == RECEIVERS
    assert worker.address not in addresses
    assert [tokens for _, tokens in found] == by_transformers(checkpoint, prompts)
    payload = len(prompts) * 2 * LAYERS * KV_HEADS * 256 * HEAD_DIM * 4
    await grown_to(worker, "kv_received_bytes_total", before + payload)


async def test_receivers_leave_short_cores_to_what_makes_tokens(worker: Worker) -> None:
    own = os.getpriority(os.PRIO_PROCESS, worker.process.pid)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in receivers(worker)] == [min(19, own + 5)] * RECEIVERS


async def test_a_refusal_is_counted_by_the_front(client: Client, worker: Worker) -> None:
    before = await worker.metric("pushes_refused_total")
    call = client.decode.Generate(client.request(prompt(65), 64), timeout=60)
    ticket = (await first(call)).ticket
    async with grpc.aio.insecure_channel(ticket.push_address) as channel:
        await refused_push(Client(channel, client.checkpoint).push(prompt(64), ticket, epoch=7))
    call.cancel()
    await grown_to(worker, "pushes_refused_total", before + 1)


async def test_a_worker_that_loses_a_receiver_finishes_what_runs_and_leaves(checkpoint: Path) -> None:
    with running_worker(checkpoint, "--receivers", "2") as broken:
        processes = descendants(broken.process.pid)
        async with connected(broken, checkpoint) as client:
            call = client.decode.Generate(client.request(prompt(5), max_tokens=400), timeout=60)
            assert (await first(call)).HasField("ticket")
            os.kill(receivers(broken)[1], signal.SIGKILL)
            await client.load(lambda load: load.state == worker_pb2.WORKER_STATE_DRAINING)
            error = await refusal(client.decode.Generate(client.request(prompt(5)), timeout=20).read())
            assert isinstance(error, Unavailable)
            assert len(emitted(await rest(call))) == 400
        assert broken.process.wait(20) not in (0, None)
        broken.drainer.join(5)
        assert "a receiver of KV is gone" in "".join(broken.lines)
        assert not any(map(alive, processes))


async def test_a_sigterm_ends_every_process_with_status_0(checkpoint: Path) -> None:
    with running_worker(checkpoint, "--receivers", "2") as leaving:
        processes = descendants(leaving.process.pid)
        assert len(processes) == 1 + 2
        leaving.process.send_signal(signal.SIGTERM)
        assert leaving.process.wait(20) == 0
        assert not any(map(alive, processes))


def test_a_fleet_sends_kv_to_receivers_over_encrypted_links(tmp_path: Path) -> None:
    keys, prompt_ids = tmp_path / "tls", list(range(3, 260))
    assert certs([str(keys)]) == 0
    arguments = ["--tls-dir", str(keys), "--decode-arg=--receivers=2"]
    with running_cluster(tmp_path / "cluster", *arguments) as cluster:
        body = {"prompt": prompt_ids, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answers = [httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        for _ in range(100):
            if received := cluster.metric("decode", "kv_received_bytes_total"):
                break
            threading.Event().wait(0.05)
        assert received > 0


def test_receivers_need_an_advertised_host_without_a_port() -> None:
    arguments = ["--receivers", "2", "--advertise", "decode.example:50071"]
    with pytest.raises(InvalidArgument, match="host without a port"):
        config_of(build_parser().parse_args(arguments))
    assert config_of(build_parser().parse_args([*arguments[:3], "decode.example"])).receivers == 2
    with pytest.raises(InvalidArgument, match="at most 16"):
        config_of(build_parser().parse_args(["--receivers", "17"]))
    with pytest.raises(InvalidArgument, match="--threads must be at most 1024"):
        config_of(build_parser().parse_args(["--threads", "100000"]))


def test_receivers_need_ports_after_the_workers_own() -> None:
    arguments = ["--receivers", "2", "--listen"]
    with pytest.raises(InvalidArgument, match="--receivers 2 needs as many ports after 65534"):
        config_of(build_parser().parse_args([*arguments, "127.0.0.1:65534"]))
    for listen in ("127.0.0.1:65533", "127.0.0.1:0"):
        assert config_of(build_parser().parse_args([*arguments, listen])).listen == listen
