"""Writer to reader: however a stream is cut and split over producers, the same units arrive, each exactly once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hma_serve import kvblock
from hma_serve.kvblock import errors
from hma_serve.v1.kv_block_pb2 import KV_ROLE_K, KV_ROLE_LATENT, KV_ROLE_V, KvManifest
from hma_serve.v1.kv_transfer_pb2 import PushEnd
from support.kv_streams import EPOCH, HEAD_DIM, TICKET, random_units, small_manifest, small_plan


@pytest.mark.parametrize("codec", kvblock.codec_names())
@pytest.mark.parametrize("max_payload", [1, 3 * 4096, 1 << 20])
def test_a_whole_stream_arrives(codec: str, max_payload: int) -> None:
    plan = small_plan(codec, token_count=160)
    writer = kvblock.StreamWriter(plan, TICKET, EPOCH)
    reader = kvblock.StreamReader(plan, TICKET, EPOCH)
    sent = {key: random_units(plan, seed) for seed, key in enumerate(plan.roles)}
    frames = [
        frame
        for (layer, role), units in sent.items()
        for frame in writer.frames(
            layer,
            plan.roles[layer, role].role,
            units,
            token_start=32,
            last=(layer, role) == (1, KV_ROLE_V),
            max_payload=max_payload,
        )
    ]
    pages = {key: np.zeros_like(units) for key, units in sent.items()}
    for frame in frames:
        header, payload = kvblock.decode_frame(frame)
        assert not reader.complete
        _store(pages, reader.validate(header.block, payload))
    assert reader.complete
    reader.finish(PushEnd(blocks=writer.sent))
    assert reader.received == writer.sent == len(frames)
    assert reader.payload_bytes == writer.payload_bytes == plan.payload_bytes
    for key, units in sent.items():
        assert np.array_equal(pages[key], units)
    lasts = [kvblock.decode_frame(frame)[0].block.last for frame in frames]
    assert lasts == [False] * (len(frames) - 1) + [True]


@settings(deadline=None)
@given(st.permutations([(head, third) for head in range(2) for third in range(3)]))
def test_heads_of_two_producers_and_tokens_of_three_arrive_in_any_order(order: list[tuple[int, int]]) -> None:
    manifest = small_manifest(token_count=192)
    manifest.layer_groups[0].layers[:] = [0]
    plan = kvblock.validate_manifest(manifest)
    coverage = kvblock.Coverage(plan, streams=2)
    writers = [kvblock.StreamWriter(plan, TICKET, EPOCH) for _ in range(2)]
    readers = [kvblock.StreamReader(plan, TICKET, EPOCH, coverage) for _ in range(2)]
    sent = {key: random_units(plan, seed) for seed, key in enumerate(plan.roles)}
    pages = {key: np.zeros_like(units) for key, units in sent.items()}
    for head, third in order:
        for role in (KV_ROLE_V, KV_ROLE_K):
            units = sent[0, role][head : head + 1, third * 2 : third * 2 + 2]
            for header, payload in writers[head].blocks(
                0, role, units, token_start=32 + third * 64, head_start=head, max_payload=1088
            ):
                _store(pages, readers[head].validate(header.block, payload.reshape(-1)))
    assert coverage.complete
    for key, units in sent.items():
        assert np.array_equal(pages[key], units)
    for writer, reader in zip(writers, readers, strict=True):
        reader.finish(PushEnd(blocks=writer.sent))


def test_a_shared_coverage_refuses_what_the_other_producer_sent() -> None:
    plan = small_plan()
    coverage = kvblock.Coverage(plan)
    for expected in (None, errors.OverlappingRange):
        header, payload = next(
            kvblock.StreamWriter(plan, TICKET, EPOCH).blocks(0, KV_ROLE_K, random_units(plan), token_start=32)
        )
        reader = kvblock.StreamReader(plan, TICKET, EPOCH, coverage)
        if expected is None:
            reader.validate(header.block, payload.reshape(-1))
        else:
            with pytest.raises(expected):
                reader.validate(header.block, payload.reshape(-1))


def test_holes_are_no_fault_until_the_last_stream_of_a_ticket_ends() -> None:
    plan = small_plan()
    coverage = kvblock.Coverage(plan, streams=2)
    for head in range(2):
        writer = kvblock.StreamWriter(plan, TICKET, EPOCH)
        reader = kvblock.StreamReader(plan, TICKET, EPOCH, coverage)
        for (layer, _), role_plan in list(plan.roles.items())[head:]:  # the second producer forgets its first role
            units = random_units(plan)[head : head + 1]
            for header, payload in writer.blocks(layer, role_plan.role, units, token_start=32, head_start=head):
                reader.validate(header.block, payload.reshape(-1))
        if head:
            with pytest.raises(errors.IncompleteCoverage):
                reader.finish(PushEnd(blocks=writer.sent))
        else:
            reader.finish(PushEnd(blocks=writer.sent))
            assert not coverage.complete
    with pytest.raises(ValueError, match="ended before"):
        coverage.end_stream()


def _set_codec(manifest: KvManifest) -> None:
    manifest.codecs[0].CopyFrom(kvblock.codec("mxint8").spec())


def _add_offset(manifest: KvManifest) -> None:
    manifest.k_offsets.add(values=bytes(4 * HEAD_DIM))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("model_fingerprint", lambda manifest: setattr(manifest, "model_fingerprint", "00")),
        ("token_count", lambda manifest: setattr(manifest, "token_count", 32)),
        ("rope.theta", lambda manifest: setattr(manifest.rope, "theta", 1e4)),
        ("layer_groups", _set_codec),
        ("k_offsets", _add_offset),
    ],
)
def test_a_stream_of_another_cache_joins_no_ticket(field: str, change: Callable[[KvManifest], None]) -> None:
    manifest = small_manifest()
    change(manifest)
    coverage = kvblock.Coverage(small_plan())
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.StreamReader(kvblock.validate_manifest(manifest), TICKET, EPOCH, coverage)
    assert refused.value.field == field


def test_streams_of_one_ticket_may_differ_in_what_means_nothing() -> None:
    manifest = small_manifest()
    manifest.producer.vendor = "another"
    manifest.codecs.insert(0, kvblock.codec("bf16").spec())  # its own table of codecs
    for role in manifest.layer_groups[0].roles:
        role.codec = 1
    kvblock.Coverage(small_plan()).admit(kvblock.validate_manifest(manifest))


def test_the_writer_refuses_what_the_manifest_does_not_describe() -> None:
    plan = small_plan()
    writer = kvblock.StreamWriter(plan, TICKET, EPOCH)
    units = random_units(plan)
    with pytest.raises(errors.UnknownLayer):
        next(writer.blocks(9, KV_ROLE_K, units, token_start=32))
    with pytest.raises(errors.UnknownLayer):
        next(writer.blocks(0, KV_ROLE_LATENT, units, token_start=32))
    wrongs: list[Any] = [units[..., 1:], units.reshape(-1), units.astype(np.int16)]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="packed must be"):
            next(writer.blocks(0, KV_ROLE_K, wrong, token_start=32))
    assert writer.sent == 0


def test_payloads_are_views_of_the_packed_layer() -> None:
    plan = small_plan()
    units = random_units(plan)
    for _, payload in kvblock.StreamWriter(plan, TICKET, EPOCH).blocks(
        0, KV_ROLE_K, units, token_start=32, max_payload=2 * 1088
    ):
        assert np.shares_memory(payload, units)


def _store(pages: dict[tuple[int, int], np.ndarray], block: kvblock.Block) -> None:
    heads = slice(block.head_start, block.head_start + block.head_count)
    groups = slice(block.group_start, block.group_start + block.group_count)
    pages[block.layer, int(block.role)][heads, groups] = block.groups()


@pytest.mark.parametrize(("codec", "spoilt"), [("fp8_e4m3fn.tensor", True), ("fp8_e4m3fn.head", False)])
def test_scales_of_more_than_a_unit_must_agree(codec: str, spoilt: bool) -> None:
    plan = small_plan(codec)
    units = random_units(plan)
    units[1, :, -4:] = np.array([0.5], "<f4").view(np.uint8)  # the second head's scale
    reader = kvblock.StreamReader(plan, TICKET, EPOCH)
    [frame] = kvblock.StreamWriter(plan, TICKET, EPOCH).frames(1, KV_ROLE_K, units, token_start=32)
    header, payload = kvblock.decode_frame(frame)
    if spoilt:
        with pytest.raises(errors.UnevenScales):
            reader.validate(header.block, payload)
        assert reader.received == 0
    else:
        assert reader.validate(header.block, payload).head_count == 2


@pytest.mark.parametrize("codec", ["fp8_e4m3fn.tensor", "fp8_e4m3_ieee.head"])
def test_scales_must_agree_between_streams_of_one_ticket(codec: str) -> None:
    plan = small_plan(codec)
    coverage = kvblock.Coverage(plan)
    units = random_units(plan)
    for group, scale in ((0, 1.0), (1, 2.0)):
        part = units[:, group : group + 1].copy()
        part[..., -4:] = np.array([scale], "<f4").view(np.uint8)
        reader = kvblock.StreamReader(plan, TICKET, EPOCH, coverage)
        [frame] = kvblock.StreamWriter(plan, TICKET, EPOCH).frames(1, KV_ROLE_K, part, token_start=32 + 32 * group)
        header, payload = kvblock.decode_frame(frame)
        if group:
            with pytest.raises(errors.UnevenScales):
                reader.validate(header.block, payload)
        else:
            reader.validate(header.block, payload)
