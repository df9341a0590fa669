"""Bad weather between real prefill and decode workers: each failure says what it is, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hma_serve.core.errors import NotFound, Unavailable
from hma_serve.v1 import decode_pb2
from support import decode_worker, prefill_worker
from support.decode_worker import NEW_TOKENS, emitted, first, rest
from support.prefill_worker import Client
from support.reference import reference_generate
from support.tcp_proxy import TcpProxy
from support.tiny_qwen3 import make_tiny_checkpoint

PACKED = 512
WIRE_BYTES = decode_worker.LAYERS * 2 * decode_worker.KV_HEADS * (PACKED // 32) * 1088


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("weather") / "tiny",
        layers=decode_worker.LAYERS,
        heads=8,
        kv_heads=decode_worker.KV_HEADS,
        head_dim=decode_worker.HEAD_DIM,
        vocab=decode_worker.VOCAB,
        max_position_embeddings=decode_worker.WINDOW,
    )


@pytest.fixture(scope="module")
def prefill(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[prefill_worker.Worker]:
    events = tmp_path_factory.mktemp("events") / "layers.jsonl"
    with prefill_worker.running_worker(checkpoint, events, "--resume-timeout", "20") as made:
        yield made


@pytest.fixture(scope="module")
def decode(checkpoint: Path) -> Iterator[decode_worker.Worker]:
    with decode_worker.running_worker(checkpoint) as made:
        yield made


@pytest.fixture
async def prefills(prefill: prefill_worker.Worker) -> AsyncIterator[Client]:
    async with prefill_worker.connected(prefill) as made:
        yield made
        await made.idle()


@pytest.fixture
async def decodes(decode: decode_worker.Worker, checkpoint: Path) -> AsyncIterator[decode_worker.Client]:
    async with decode_worker.connected(decode, checkpoint) as made:
        yield made
        await made.idle()


@contextlib.contextmanager
def between(worker: decode_worker.Worker) -> Iterator[TcpProxy]:
    """A link to a decode worker that can be cut."""
    host, _, port = worker.address.rpartition(":")
    with TcpProxy((host, int(port))) as proxy:
        yield proxy


def ask(decodes: decode_worker.Client, tokens: list[int]) -> decode_pb2.DecodeGenerateRequest:
    return decodes.request(tokens, PACKED, "tt_bfp8")


@pytest.mark.parametrize("at", [0.1, 0.6, 0.95])
async def test_a_cut_connection_costs_no_token_and_no_block_twice(
    prefills: Client, decodes: decode_worker.Client, decode: decode_worker.Worker, checkpoint: Path, at: float
) -> None:
    tokens = decode_worker.prompt(PACKED + 5, seed=int(at * 100))
    before = await decode.metric("kv_received_bytes_total")
    with between(decode) as proxy:
        generating = decodes.decode.Generate(ask(decodes, tokens), timeout=60)
        ticket = (await first(generating)).ticket
        proxy.cut_after(int(at * WIRE_BYTES))
        address = f"127.0.0.1:{proxy.port}"
        call = prefills.prefill(address, tokens[:PACKED], ticket=ticket.nonce)
        sending = asyncio.create_task(call.completed())
        assert await asyncio.to_thread(proxy.tripped.wait, 30)
        proxy.heal()
        completed = await sending
        assert completed.payload_bytes == WIRE_BYTES
        assert await decode.metric("kv_received_bytes_total") - before == WIRE_BYTES
        assert emitted(await rest(generating)) == reference_generate(checkpoint, "tt_bfp8", tokens, NEW_TOKENS)


async def test_a_ticket_that_decode_does_not_know_is_refused(
    prefills: Client, decodes: decode_worker.Client, decode: decode_worker.Worker
) -> None:
    with pytest.raises(NotFound, match=r"decode at .*: no such ticket"):
        await prefills.prefill(decode.address, decode_worker.prompt(64), ticket=b"x" * 16).completed()


async def test_a_request_that_decode_gives_up_ends_its_transfer(
    prefills: Client, decodes: decode_worker.Client, decode: decode_worker.Worker
) -> None:
    tokens = decode_worker.prompt(PACKED + 1)
    with between(decode) as proxy:
        generating = decodes.decode.Generate(ask(decodes, tokens), timeout=60)
        ticket = (await first(generating)).ticket
        proxy.cut_after(WIRE_BYTES // 2)
        call = prefills.prefill(f"127.0.0.1:{proxy.port}", tokens[:PACKED], ticket=ticket.nonce)
        sending = asyncio.create_task(call.completed())
        assert await asyncio.to_thread(proxy.tripped.wait, 30)
        generating.cancel()
        await decodes.idle()
        proxy.heal()
        with pytest.raises(NotFound, match=r"decode at .*: no such ticket"):
            await sending


async def test_a_decode_that_dies_ends_its_transfers_alone(
    checkpoint: Path, tmp_path: Path, decodes: decode_worker.Client, decode: decode_worker.Worker
) -> None:
    tokens = decode_worker.prompt(PACKED + 1)
    arguments = ("--resume-timeout", "0.5", "--prefix-cache-bytes", str(1 << 24))
    with (
        prefill_worker.running_worker(checkpoint, tmp_path / "events", *arguments) as sender,
        decode_worker.running_worker(checkpoint) as dying,
        between(dying) as proxy,
    ):
        async with (
            prefill_worker.connected(sender) as client,
            decode_worker.connected(dying, checkpoint) as doomed,
        ):
            ticket = (await first(doomed.decode.Generate(ask(doomed, tokens), timeout=60))).ticket
            proxy.cut_after(WIRE_BYTES // 2)
            sending = asyncio.create_task(
                client.prefill(f"127.0.0.1:{proxy.port}", tokens[:PACKED], ticket=ticket.nonce).completed()
            )
            assert await asyncio.to_thread(proxy.tripped.wait, 30)
            dying.process.send_signal(signal.SIGKILL)
            proxy.heal()
            with pytest.raises(Unavailable, match=r"decode at") as caught:
                await sending
            # Which of the two workers is to be avoided.
            assert caught.value.field == "decode_address"
            # The prompt goes to another decode; what was computed by then is only sent.
            generating = decodes.decode.Generate(ask(decodes, tokens), timeout=60)
            ticket = (await first(generating)).ticket
            again = await client.prefill(decode.address, tokens[:PACKED], ticket=ticket.nonce).completed()
            assert again.cached_tokens > 0
            assert again.cached_tokens + again.computed_tokens == PACKED
            assert emitted(await rest(generating)) == reference_generate(checkpoint, "tt_bfp8", tokens, NEW_TOKENS)
            await client.idle()
        assert sender.process.poll() is None


async def test_a_decode_that_stalls_or_talks_nonsense_ends_its_transfer_alone(
    checkpoint: Path, tmp_path: Path, decodes: decode_worker.Client, decode: decode_worker.Worker
) -> None:
    tokens = decode_worker.prompt(PACKED + 1)
    with prefill_worker.running_worker(checkpoint, tmp_path / "events", "--stall-timeout", "2") as sender:
        async with prefill_worker.connected(sender) as client:
            with between(decode) as proxy:
                proxy.freeze()
                with pytest.raises(Unavailable, match=r"decode at") as stalled:
                    await client.prefill(f"127.0.0.1:{proxy.port}", tokens[:PACKED]).completed()
                assert stalled.value.field == "decode_address"
            async with await asyncio.start_server(_babble, "127.0.0.1", 0) as babbler:
                port = babbler.sockets[0].getsockname()[1]
                with pytest.raises(Unavailable, match=r"decode at") as babbled:
                    await client.prefill(f"127.0.0.1:{port}", tokens[:PACKED]).completed()
                assert babbled.value.field == "decode_address"
            await client.idle()
            # The worker is as well as before.
            generating = decodes.decode.Generate(ask(decodes, tokens), timeout=60)
            ticket = (await first(generating)).ticket
            await client.prefill(decode.address, tokens[:PACKED], ticket=ticket.nonce).completed()
            assert emitted(await rest(generating)) == reference_generate(checkpoint, "tt_bfp8", tokens, NEW_TOKENS)


async def _babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers whatever comes with bytes that are no HTTP/2."""
    await reader.read(1)
    writer.write(b"\x00\xffnonsense" * 1000)
    writer.close()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_truncated_checkpoint_is_named_and_leaves_no_process(tmp_path: Path, role: str) -> None:
    damaged = make_tiny_checkpoint(tmp_path / "damaged", head_dim=32)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    command = [sys.executable, "-m", "hma_serve.cli.main", role, "--model", str(damaged), "--etcd", "none"]
    done = subprocess.run(
        [*command, "--listen", "127.0.0.1:0"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
