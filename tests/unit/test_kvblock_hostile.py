"""Damaged and invented input: refused with an error of the format, or harmless; never another exception."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hma_serve import kvblock
from hma_serve.kvblock import errors
from hma_serve.v1.kv_block_pb2 import KV_ROLE_V, KvCodecSpec, KvLayerGroup, KvManifest, KvOffset, KvRoleSpec
from support.kv_streams import EPOCH, GOLDEN, TICKET, small_plan

BLOCK = (GOLDEN / "kvblock" / "frame_block_tt_bfp8_b.bin").read_bytes()
OPEN = (GOLDEN / "kvblock" / "frame_open.bin").read_bytes()
PAYLOAD = (GOLDEN / "kvblock" / "tt_bfp8_b.nearest_even.bin").read_bytes()
PLAN = small_plan()

u32 = st.one_of(st.integers(0, 3), st.sampled_from([32, 64, 96, 2**32 - 32]), st.integers(0, 2**32 - 1))
manifests = st.builds(
    KvManifest,
    format_major=st.sampled_from([0, 1, 1, 1, 2]),
    codecs=st.lists(st.builds(KvCodecSpec, id=st.integers(-1, 16), version=st.just(1)), max_size=3),
    layer_groups=st.lists(
        st.builds(
            KvLayerGroup,
            layers=st.lists(u32, max_size=3),
            roles=st.lists(
                st.builds(KvRoleSpec, role=st.integers(-1, 4), kv_heads=u32, head_dim=u32, codec=u32), max_size=3
            ),
        ),
        max_size=3,
    ),
    token_start=u32,
    token_count=u32,
    k_offsets=st.lists(st.builds(KvOffset, layer=u32, head=u32, values=st.binary(max_size=140)), max_size=2),
)


@st.composite
def damaged(draw: st.DrawFn, frame: bytes) -> bytes:
    """A frame with a few bytes changed, cut out or put in, mostly near its beginning."""
    out = bytearray(frame)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.integers(0, min(80, len(out) - 1)), st.integers(0, len(out) - 1)))
        kind = draw(st.sampled_from(["change", "cut", "put"]))
        if kind == "change":
            out[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del out[at : at + draw(st.integers(1, 40))]
        else:
            out[at:at] = draw(st.binary(min_size=1, max_size=8))
        if not out:
            break
    return bytes(out)


@settings(max_examples=300, deadline=None)
@given(damaged(BLOCK))
def test_a_damaged_block_is_refused_or_is_what_was_sent(frame: bytes) -> None:
    reader = kvblock.StreamReader(PLAN, TICKET, EPOCH)
    with contextlib.suppress(errors.KvFormatError):
        header, payload = kvblock.decode_frame(frame)
        block = reader.validate(header.block, payload)
        assert block.payload.tobytes() == PAYLOAD
        assert (block.token_count, block.head_count, block.role_plan.codec.name) == (64, 2, "tt_bfp8_b")


@settings(max_examples=200, deadline=None)
@given(damaged(OPEN))
def test_a_damaged_manifest_is_refused_or_gives_a_consistent_plan(frame: bytes) -> None:
    with contextlib.suppress(errors.KvFormatError):
        header, _ = kvblock.decode_frame(frame)
        _check(kvblock.validate_manifest(header.open.manifest))


@settings(max_examples=200, deadline=None)
@given(manifests)
def test_an_invented_manifest_is_refused_or_gives_a_consistent_plan(manifest: KvManifest) -> None:
    with contextlib.suppress(errors.KvFormatError):
        _check(kvblock.validate_manifest(manifest))


def test_every_single_flipped_bit_of_the_payload_is_refused() -> None:
    start = len(BLOCK) - len(PAYLOAD)
    for at in range(start, len(BLOCK), 37):
        frame = bytearray(BLOCK)
        frame[at] ^= 1 << at % 8
        header, payload = kvblock.decode_frame(bytes(frame))
        with pytest.raises(errors.ChecksumMismatch):
            kvblock.StreamReader(PLAN, TICKET, EPOCH).validate(header.block, payload)


def _check(plan: kvblock.StreamPlan) -> None:
    limits = kvblock.Limits()
    sizes = [role.kv_heads * plan.group_count * role.group_bytes for role in plan.roles.values()]
    assert sum(sizes) == plan.payload_bytes <= limits.max_stream_bytes
    assert plan.token_start + plan.token_count <= limits.max_tokens
    assert all(role.role <= KV_ROLE_V for role in plan.roles.values())
    assert {layer for layer, _ in plan.roles} == set(plan.layers)
