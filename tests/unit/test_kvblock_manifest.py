"""One test per rule that a manifest can break, and what the plan derives from one that breaks none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hma_serve import kvblock
from hma_serve.kvblock import errors
from hma_serve.v1.kv_block_pb2 import (
    KV_ROLE_K,
    KV_ROLE_LATENT,
    KV_ROLE_V,
    KvCodecSpec,
    KvLayerGroup,
    KvManifest,
    KvOffset,
    KvRoleSpec,
)
from support.kv_streams import HEAD_DIM, HEADS, LAYERS, ROPE, small_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

ZEROS = np.zeros(HEAD_DIM, dtype="<f4").tobytes()
INFINITE = np.full(HEAD_DIM, np.inf, dtype="<f4").tobytes()


def test_plan_of_a_uniform_model() -> None:
    plan = kvblock.validate_manifest(small_manifest())
    assert plan.layers == (0, 1)
    assert (plan.token_start, plan.token_count, plan.group_count) == (32, 64, 2)
    assert plan.units == LAYERS * 2 * HEADS * 2
    assert plan.payload_bytes == plan.units * 1088
    role_plan = plan.roles[1, KV_ROLE_V]
    assert (role_plan.layer, role_plan.role, role_plan.kv_heads, role_plan.head_dim) == (1, KV_ROLE_V, HEADS, HEAD_DIM)
    assert role_plan.codec is kvblock.codec("tt_bfp8_b")
    assert role_plan.group_bytes == 1088


def test_k_and_v_may_have_different_codecs() -> None:
    k_codec, v_codec = kvblock.codec("bf16"), kvblock.codec("tt_bfp8_b")
    manifest = kvblock.build_manifest(
        model_fingerprint="x",
        layers=1,
        kv_heads=4,
        head_dim=64,
        k_codec=k_codec,
        v_codec=v_codec,
        token_start=0,
        token_count=32,
        rope=ROPE,
        qk_norm=False,
    )
    plan = kvblock.validate_manifest(manifest)
    assert plan.roles[0, KV_ROLE_K].codec is k_codec
    assert plan.roles[0, KV_ROLE_V].codec is v_codec
    assert plan.payload_bytes == 4 * (k_codec.group_bytes(64) + v_codec.group_bytes(64))


def test_layer_groups_may_differ() -> None:
    manifest = small_manifest()
    manifest.codecs.append(kvblock.codec("bf16").spec())
    manifest.layer_groups.append(
        KvLayerGroup(layers=[7, 5], roles=[KvRoleSpec(role=KV_ROLE_K, kv_heads=1, head_dim=48, codec=1)])
    )
    plan = kvblock.validate_manifest(manifest)
    assert plan.layers == (0, 1, 5, 7)
    assert plan.roles[5, KV_ROLE_K].head_dim == 48
    assert (5, KV_ROLE_V) not in plan.roles
    assert plan.units == 2 * (LAYERS * 2 * HEADS + 2)


def test_newer_minor_versions_and_unknown_fields_are_read() -> None:
    manifest = small_manifest()
    manifest.format_minor = 9
    newer = KvManifest.FromString(manifest.SerializeToString() + b"\xf2\x07\x03new")  # field 126
    assert kvblock.validate_manifest(newer).units == 16


def test_k_offsets_are_checked_and_kept() -> None:
    manifest = small_manifest()
    manifest.k_offsets.extend(
        KvOffset(layer=layer, head=head, values=ZEROS) for layer in range(LAYERS) for head in range(HEADS)
    )
    assert len(kvblock.validate_manifest(manifest).manifest.k_offsets) == 4


def _set(**fields: object) -> Callable[[KvManifest], None]:
    def change(manifest: KvManifest) -> None:
        for name, value in fields.items():
            setattr(manifest, name, value)

    return change


def _role(**fields: object) -> Callable[[KvManifest], None]:
    def change(manifest: KvManifest) -> None:
        for name, value in fields.items():
            setattr(manifest.layer_groups[0].roles[1], name, value)

    return change


def _codec(**fields: object) -> Callable[[KvManifest], None]:
    def change(manifest: KvManifest) -> None:
        for name, value in fields.items():
            setattr(manifest.codecs[0], name, value)

    return change


def _offset(*offsets: KvOffset) -> Callable[[KvManifest], None]:
    return lambda manifest: manifest.k_offsets.extend(offsets)


BROKEN: list[tuple[str, Callable[[KvManifest], None], type[errors.KvFormatError], str]] = [
    ("major", _set(format_major=2), errors.UnsupportedVersion, "format_major"),
    ("no version", _set(format_major=0), errors.UnsupportedVersion, "format_major"),
    (
        "extension",
        lambda manifest: manifest.critical_extensions.append(7),
        errors.UnknownCriticalExtension,
        "critical_extensions",
    ),
    ("no layers", lambda manifest: manifest.ClearField("layer_groups"), errors.EmptyManifest, "layer_groups"),
    (
        "group without roles",
        lambda manifest: manifest.layer_groups[0].ClearField("roles"),
        errors.EmptyManifest,
        "layer_groups",
    ),
    ("unaligned start", _set(token_start=31), errors.PartialGroup, "token_start"),
    ("no tokens", _set(token_count=0), errors.PartialGroup, "token_count"),
    ("partial group", _set(token_count=65), errors.PartialGroup, "token_count"),
    ("codec id", _codec(id=15), errors.UnknownCodec, "codecs[0]"),
    ("codec version", _codec(version=2), errors.UnknownCodec, "codecs[0]"),
    ("granularity", _codec(granularity=1), errors.UnknownCodec, "codecs[0]"),
    ("codec index", _role(codec=1), errors.WrongCodec, "layer_groups[0].roles[1].codec"),
    ("role", _role(role=KV_ROLE_LATENT), errors.UnknownRole, "layer_groups[0].roles[1].role"),
    ("role twice", _role(role=KV_ROLE_K), errors.DuplicateLayer, "layer_groups[0].roles"),
    (
        "layer twice",
        lambda manifest: manifest.layer_groups.append(manifest.layer_groups[0]),
        errors.DuplicateLayer,
        "layer_groups[1].layers",
    ),
    ("no heads", _role(kv_heads=0), errors.BadGeometry, "layer_groups[0].roles[1].kv_heads"),
    ("head_dim", _role(head_dim=40), errors.BadGeometry, "head_dim"),
    ("offset head", _offset(KvOffset(layer=0, head=HEADS, values=ZEROS)), errors.BadOffset, "k_offsets[0]"),
    ("offset layer", _offset(KvOffset(layer=LAYERS, values=ZEROS)), errors.BadOffset, "k_offsets[0]"),
    ("offset size", _offset(KvOffset(values=ZEROS[1:])), errors.BadOffset, "k_offsets[0].values"),
    ("offset value", _offset(KvOffset(values=INFINITE)), errors.BadOffset, "k_offsets[0].values"),
    ("offset twice", _offset(KvOffset(values=ZEROS), KvOffset(values=ZEROS)), errors.BadOffset, "k_offsets[1]"),
]


@pytest.mark.parametrize(("change", "rule", "field"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_each_rule_has_its_error(
    change: Callable[[KvManifest], None], rule: type[errors.KvFormatError], field: str
) -> None:
    manifest = small_manifest()
    change(manifest)
    with pytest.raises(errors.KvFormatError) as refused:
        kvblock.validate_manifest(manifest)
    assert type(refused.value) is rule
    assert refused.value.field == field
    assert refused.value.rule in refused.value.message


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (kvblock.Limits(max_layers=1), "layer_groups"),
        (kvblock.Limits(max_codecs=0), "codecs"),
        (kvblock.Limits(max_roles=1), "layer_groups[0].roles"),
        (kvblock.Limits(max_heads=1), "layer_groups[0].roles[0].kv_heads"),
        (kvblock.Limits(max_head_dim=31), "layer_groups[0].roles[0].head_dim"),
        (kvblock.Limits(max_unit_bytes=1087), "layer_groups[0].roles[0].head_dim"),
        (kvblock.Limits(max_tokens=95), "token_count"),
        (kvblock.Limits(max_units=15), "token_count"),
        (kvblock.Limits(max_stream_bytes=16 * 1088 - 1), "token_count"),
    ],
)
def test_each_cap_holds(limits: kvblock.Limits, field: str) -> None:
    with pytest.raises(errors.LimitExceeded) as refused:
        kvblock.validate_manifest(small_manifest(), limits)
    assert refused.value.field == field


def test_caps_are_inclusive() -> None:
    exact = kvblock.Limits(
        max_layers=2,
        max_codecs=1,
        max_roles=2,
        max_heads=2,
        max_head_dim=32,
        max_tokens=96,
        max_units=16,
        max_stream_bytes=16 * 1088,
        max_unit_bytes=1088,
    )
    assert kvblock.validate_manifest(small_manifest(), exact).units == 16


def test_the_largest_numbers_a_peer_can_send_are_refused_without_allocating() -> None:
    manifest = small_manifest()
    manifest.token_count = 2**32 - 32
    role = manifest.layer_groups[0].roles[0]
    role.kv_heads, role.head_dim = 2**32 - 1, 2**32 - 32
    with pytest.raises(errors.LimitExceeded):
        kvblock.validate_manifest(manifest)


def test_rounding_is_attested_but_not_compared() -> None:
    manifest = small_manifest()
    spec = KvCodecSpec()
    spec.CopyFrom(manifest.codecs[0])
    spec.rounding = 77  # type: ignore[assignment]
    manifest.codecs[0].CopyFrom(spec)
    assert kvblock.validate_manifest(manifest).units == 16
