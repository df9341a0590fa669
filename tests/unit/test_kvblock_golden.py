"""The golden files of version 1.0: written again byte for byte, and read back to the values they were written from."""

from __future__ import annotations

import numpy as np
import pytest

from hma_serve import kvblock
from hma_serve.v1.kv_block_pb2 import KV_ROLE_V, KV_ROUNDING_NEAREST_AWAY, KV_ROUNDING_NEAREST_EVEN, KvRounding
from hma_serve.v1.kv_transfer_pb2 import TRANSPORT_GRPC, PushEnd, PushHeader, PushOpen
from support.kv_streams import (
    EPOCH,
    GOLDEN,
    HEAD_DIM,
    HEADS,
    TICKET,
    TOKEN_START,
    TOKENS,
    golden_values,
    small_manifest,
    small_plan,
)

FILES = GOLDEN / "kvblock"


@pytest.mark.parametrize(
    ("name", "suffix", "rounding"),
    [
        ("f32", "nearest_even", KV_ROUNDING_NEAREST_EVEN),
        ("bf16", "nearest_even", KV_ROUNDING_NEAREST_EVEN),
        ("tt_bfp8_b", "nearest_even", KV_ROUNDING_NEAREST_EVEN),
        ("tt_bfp8_b", "nearest_away", KV_ROUNDING_NEAREST_AWAY),
    ],
)
def test_payloads(name: str, suffix: str, rounding: KvRounding.ValueType) -> None:
    payload = (FILES / f"{name}.{suffix}.bin").read_bytes()
    codec = kvblock.codec(name)
    assert codec.encode(golden_values(), rounding).tobytes() == payload
    codec.check_payload(payload, HEADS, TOKENS, HEAD_DIM)


def test_f32_payload_is_the_values() -> None:
    assert (FILES / "f32.nearest_even.bin").read_bytes() == (FILES / "values.f32.bin").read_bytes()


@pytest.mark.parametrize("name", ["f32", "bf16", "tt_bfp8_b"])
def test_block_frames(name: str) -> None:
    frame = (FILES / f"frame_block_{name}.bin").read_bytes()
    plan = small_plan(name)
    units = kvblock.codec(name).encode(golden_values())
    writer = kvblock.StreamWriter(plan, TICKET, EPOCH)
    assert list(writer.frames(1, KV_ROLE_V, units, token_start=TOKEN_START, last=True)) == [frame]

    header, payload = kvblock.decode_frame(frame)
    block = kvblock.StreamReader(plan, TICKET, EPOCH).validate(header.block, payload)
    assert (block.layer, block.role, block.last) == (1, KV_ROLE_V, True)
    assert np.array_equal(block.groups(), units)


def test_open_frame() -> None:
    frame = (FILES / "frame_open.bin").read_bytes()
    header, payload = kvblock.decode_frame(frame)
    manifest = small_manifest()
    manifest.format_minor = 0
    assert header.open == PushOpen(ticket=TICKET, epoch=EPOCH, transports=[TRANSPORT_GRPC], manifest=manifest)
    assert payload.nbytes == 0
    assert kvblock.encode_frame(header) == frame
    assert kvblock.validate_manifest(header.open.manifest).units == 16


def test_end_frame() -> None:
    frame = (FILES / "frame_end.bin").read_bytes()
    assert kvblock.decode_frame(frame)[0].end.blocks == 4
    assert kvblock.encode_frame(PushHeader(end=PushEnd(blocks=4))) == frame
