"""A producer whose keys stand in interleaved RoPE channels, before a real decode worker of a half-split model."""

import asyncio
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from hma_serve.kvblock import channel_order, decode_frame, encode_frame
from hma_serve.v1 import worker_pb2
from hma_serve.v1.kv_block_pb2 import (
    KV_ROLE_K,
    KV_ROPE_PAIRING_HALF_SPLIT,
    KV_ROPE_PAIRING_INTERLEAVED,
    KvRope,
)
from support.decode_worker import (
    HEAD_DIM,
    ROPE,
    by_transformers,
    connected,
    emitted,
    first,
    make_checkpoint,
    prompt,
    rest,
    running_worker,
)


def _turned(frames: list[bytes]) -> list[bytes]:
    """The same `f32` stream as a producer sends it that keeps its keys interleaved."""
    order = channel_order(HEAD_DIM, KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED)
    turned = []
    for frame in frames:
        header, payload = decode_frame(frame)
        content = bytes(payload)
        if header.HasField("block") and header.block.role == KV_ROLE_K:
            content = np.frombuffer(payload, "<f4").reshape(-1, HEAD_DIM)[:, order].tobytes()
            header.block.sections[0].crc32c = google_crc32c.value(content)
        turned.append(encode_frame(header, content))
    return turned


@pytest.mark.parametrize("mode", ["fused", "materialise"])
async def test_interleaved_and_half_split_keys_give_the_same_tokens(tmp_path: Path, mode: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny")
    tokens = prompt(140)
    interleaved = KvRope(pairing=KV_ROPE_PAIRING_INTERLEAVED, theta=ROPE.theta)
    with running_worker(checkpoint, "--kv-mode", mode) as worker:
        async with connected(worker, checkpoint) as client:
            described = (await client.worker.Describe(worker_pb2.DescribeRequest())).worker
            assert list(described.rope_pairings) == [KV_ROPE_PAIRING_INTERLEAVED]  # which routers go by

            async def other_order(*, negotiated: bool) -> list[int]:
                request = client.request(tokens, 128)
                request.offer.rope.CopyFrom(interleaved)
                if negotiated:
                    support = request.offer.support
                    support.CopyFrom(described.kv)
                    for name, said in (("k_codecs", [request.offer.k_codec]), ("v_codecs", [request.offer.v_codec])):
                        support.ClearField(name)  # type: ignore[arg-type]
                        getattr(support, name).extend(said)
                    support.rope_pairings[:] = [KV_ROPE_PAIRING_INTERLEAVED]
                call = client.decode.Generate(request, timeout=60)
                ticket = await first(call)
                assert ticket.ticket.agreement.rope_pairing == KV_ROPE_PAIRING_INTERLEAVED
                await client.push(tokens[:128], ticket.ticket, change=_turned, rope=interleaved)
                return emitted([ticket, *await rest(call)])

            # In one batch.
            told, negotiated, half_split = await asyncio.gather(
                other_order(negotiated=False),
                other_order(negotiated=True),
                client.generate(client.request(tokens, 128)),
            )
    right = by_transformers(checkpoint, [tokens])[0]
    assert told == negotiated == emitted(half_split) == right
