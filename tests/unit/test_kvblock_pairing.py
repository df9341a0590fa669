"""A pair that would misread each other is refused with the name of what differs; software never matters."""

from __future__ import annotations

import dataclasses

import pytest

from hma_serve import kvblock
from hma_serve.kvblock import errors
from hma_serve.v1.decode_pb2 import KvOffer
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_INTERLEAVED, KvManifest, KvOffset, KvProducer, KvRope
from support.kv_streams import FINGERPRINT, HEAD_DIM, HEADS, LAYERS, ROPE, small_manifest, small_plan

ACCEPTS = kvblock.Acceptance(
    model_fingerprint=FINGERPRINT,
    layers=LAYERS,
    kv_heads=HEADS,
    head_dim=HEAD_DIM,
    codecs=(kvblock.codec("bf16"), kvblock.codec("tt_bfp8_b")),
    rope=ROPE,
    qk_norm=True,
)


def offer(**fields: object) -> KvOffer:
    spec = kvblock.codec("tt_bfp8_b").spec()
    made = KvOffer(model_fingerprint=FINGERPRINT, k_codec=spec, v_codec=spec, rope=ROPE)
    for name, value in fields.items():
        if hasattr(value, "DESCRIPTOR"):
            getattr(made, name).CopyFrom(value)
        else:
            setattr(made, name, value)
    return made


def test_a_matching_pair_is_accepted() -> None:
    kvblock.check_offer(offer(producer_instance="anything"), ACCEPTS)
    kvblock.check_plan(small_plan(), ACCEPTS)
    kvblock.check_plan(small_plan("bf16"), ACCEPTS)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model_fingerprint": "other"}, "model_fingerprint"),
        ({"k_codec": kvblock.codec("f32").spec()}, "k_codec"),
        ({"v_codec": kvblock.codec("f32").spec()}, "v_codec"),
        ({"rope": KvRope(pairing=KV_ROPE_PAIRING_INTERLEAVED, theta=1e6)}, "rope.pairing"),
        ({"rope": KvRope(pairing=ROPE.pairing, theta=1e4)}, "rope.theta"),
        ({"rope": KvRope(pairing=ROPE.pairing, theta=float("nan"))}, "rope.theta"),
        ({"rope": KvRope(pairing=ROPE.pairing, theta=1e6, scaling_hash="s")}, "rope.scaling_hash"),
        ({"rope": KvRope()}, "rope.pairing"),
        ({"rope": KvRope(pairing=7)}, "rope.pairing"),  # type: ignore[arg-type]
    ],
)
def test_offers_that_differ_are_refused_by_name(fields: dict[str, object], field: str) -> None:
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.check_offer(offer(**fields), ACCEPTS)
    assert refused.value.field == field


def test_errors_repeat_only_the_beginning_of_what_a_peer_sent() -> None:
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.check_offer(offer(model_fingerprint="f" * 100_000), ACCEPTS)
    assert len(refused.value.message) < 300


def test_unset_and_unknown_codecs_in_an_offer_are_refused_by_name() -> None:
    with pytest.raises(errors.UnknownCodec) as refused:
        kvblock.check_offer(KvOffer(model_fingerprint=FINGERPRINT), ACCEPTS)
    assert refused.value.field == "k_codec"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_fingerprint": "other"}, "model_fingerprint"),
        ({"layers": 3}, "layers"),
        ({"kv_heads": 4}, "kv_heads"),
        ({"head_dim": 64}, "head_dim"),
        ({"codecs": (kvblock.codec("bf16"),)}, "codecs[0]"),
        ({"rope": None}, "rope.pairing"),
        ({"qk_norm": False}, "qk_norm"),
        ({"rotation_id": 1}, "rotation_id"),
    ],
)
def test_streams_that_differ_are_refused_by_name(change: dict[str, object], field: str) -> None:
    accepts = dataclasses.replace(ACCEPTS, **change)  # type: ignore[arg-type]
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.check_plan(small_plan(), accepts)
    assert refused.value.field == field


def test_a_layer_without_v_is_refused() -> None:
    manifest = small_manifest()
    del manifest.layer_groups[0].roles[1]
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.check_plan(kvblock.validate_manifest(manifest), ACCEPTS)
    assert refused.value.field == "roles"


def test_k_offsets_need_a_receiver_that_adds_them() -> None:
    manifest = small_manifest()
    manifest.k_offsets.append(KvOffset(values=bytes(4 * HEAD_DIM)))
    plan = kvblock.validate_manifest(manifest)
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.check_plan(plan, ACCEPTS)
    assert refused.value.field == "k_offsets"
    kvblock.check_plan(plan, dataclasses.replace(ACCEPTS, k_offsets=True))


def test_software_and_rounding_are_never_compared() -> None:
    manifest = KvManifest.FromString(small_manifest().SerializeToString())
    manifest.producer.CopyFrom(KvProducer(vendor="another", device="x", software="0.0.1"))
    manifest.codecs[0].rounding = 3  # type: ignore[assignment]
    manifest.format_minor = 4
    kvblock.check_plan(kvblock.validate_manifest(manifest), ACCEPTS)
