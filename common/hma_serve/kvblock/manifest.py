"""What a stream says once, and the plan that a reader derives from it.

A `StreamPlan` exists only for a manifest that broke no rule, so whoever holds one may trust its sizes. Order
of the checks: version and critical extensions first (nothing else may be interpreted before), then counts
against the caps, then meaning, then derived sizes. Nothing is allocated in proportion to a number from the
peer before that number was capped.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np

from hma_serve.kvblock.codecs import Codec, codec_for
from hma_serve.kvblock.errors import (
    BadGeometry,
    BadOffset,
    DuplicateLayer,
    EmptyManifest,
    LimitExceeded,
    PartialGroup,
    UnknownCriticalExtension,
    UnknownRole,
    UnsupportedVersion,
    WrongCodec,
)
from hma_serve.kvblock.limits import FORMAT_MAJOR, FORMAT_MINOR, GROUP_TOKENS, Limits
from hma_serve.v1.kv_block_pb2 import (
    KV_ROLE_K,
    KV_ROLE_V,
    KV_ROUNDING_NEAREST_EVEN,
    KvLayerGroup,
    KvManifest,
    KvRoleSpec,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hma_serve.v1.kv_block_pb2 import KvOffset, KvProducer, KvRole, KvRope, KvRounding

KNOWN_ROLES: Final = frozenset({int(KV_ROLE_K), int(KV_ROLE_V)})
KNOWN_EXTENSIONS: Final[frozenset[int]] = frozenset()
"""Critical extensions that this reader understands."""


@dataclass(frozen=True, slots=True)
class RolePlan:
    """One role of one layer.

    Attributes:
        layer: Layer index in the model.
        role: KV_ROLE_K or KV_ROLE_V.
        kv_heads: All KV heads of the layer.
        head_dim: Channels of a head.
        codec: How its blocks are packed.
        codec_index: The codec's index in the manifest, which blocks repeat.
        group_bytes: Bytes of one head and one group of 32 tokens: a page unit.
    """

    layer: int
    role: KvRole.ValueType
    kv_heads: int
    head_dim: int
    codec: Codec
    codec_index: int
    group_bytes: int


@dataclass(frozen=True, slots=True)
class LayerKv:
    """The KV of one layer, for models whose layers differ.

    Attributes:
        kv_heads: KV heads.
        k_dim: Channels of a key.
        v_dim: Channels of a value.
        k_codec: How keys are packed.
        v_codec: How values are packed.
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    k_codec: Codec
    v_codec: Codec


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """Everything that follows from a valid manifest.

    Attributes:
        manifest: What it was derived from.
        token_start: Position of the first token, a multiple of 32.
        token_count: Tokens, a positive multiple of 32.
        roles: By (layer, role).
        layers: Ascending.
        payload_bytes: Payload of the whole stream.
        units: (layer, role, head, group) combinations that must arrive.
    """

    manifest: KvManifest
    token_start: int
    token_count: int
    roles: Mapping[tuple[int, int], RolePlan]
    layers: tuple[int, ...]
    payload_bytes: int
    units: int

    @property
    def group_count(self) -> int:
        """Groups of 32 tokens."""
        return self.token_count // GROUP_TOKENS


def build_manifest(
    *,
    model_fingerprint: str,
    layers: int,
    kv_heads: int,
    head_dim: int,
    k_codec: Codec,
    v_codec: Codec | None = None,
    token_start: int,
    token_count: int,
    rope: KvRope | None,
    qk_norm: bool,
    rotation_id: int = 0,
    rounding: KvRounding.ValueType = KV_ROUNDING_NEAREST_EVEN,
    producer: KvProducer | None = None,
) -> KvManifest:
    """Describe a stream of a model whose layers are all alike.

    Args:
        model_fingerprint: SHA-256 hex of weights revision, config and K offset.
        layers: Number of layers, ids 0 to layers - 1.
        kv_heads: KV heads of every layer.
        head_dim: Channels of a head, K and V alike.
        k_codec: How K is packed.
        v_codec: How V is packed; None: as K.
        token_start: Position of the first token, a multiple of 32.
        token_count: Tokens, a multiple of 32.
        rope: How RoPE was applied to K; None: not at all.
        qk_norm: Keys were RMS-normalised per head before RoPE.
        rotation_id: Rotation applied before packing; 0: none.
        rounding: What the encoders did.
        producer: Who sends.
    """
    layer = LayerKv(kv_heads, head_dim, head_dim, k_codec, v_codec or k_codec)
    return build_mixed_manifest(
        model_fingerprint=model_fingerprint,
        layers=[layer] * layers,
        token_start=token_start,
        token_count=token_count,
        rope=rope,
        qk_norm=qk_norm,
        rotation_id=rotation_id,
        rounding=rounding,
        producer=producer,
    )


def build_mixed_manifest(
    *,
    model_fingerprint: str,
    layers: Sequence[LayerKv],
    token_start: int,
    token_count: int,
    rope: KvRope | None,
    qk_norm: bool,
    rotation_id: int = 0,
    rounding: KvRounding.ValueType = KV_ROUNDING_NEAREST_EVEN,
    producer: KvProducer | None = None,
) -> KvManifest:
    """Describe a stream of a model whose layers may differ: those alike form one layer group.

    Args:
        model_fingerprint: As `build_manifest`, like all that are not named here.
        layers: Of each layer in order.
        token_start: Position of the first token, a multiple of 32.
        token_count: Tokens, a multiple of 32.
        rope: How RoPE was applied to K; None: not at all.
        qk_norm: Keys were RMS-normalised per head before RoPE.
        rotation_id: Rotation applied before packing; 0: none.
        rounding: What the encoders did.
        producer: Who sends.
    """
    codecs = list(dict.fromkeys(packed for layer in layers for packed in (layer.k_codec, layer.v_codec)))
    groups: dict[LayerKv, list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(layer, []).append(index)
    return KvManifest(
        format_major=FORMAT_MAJOR,
        format_minor=FORMAT_MINOR,
        model_fingerprint=model_fingerprint,
        codecs=[packed.spec(rounding) for packed in codecs],
        layer_groups=[
            KvLayerGroup(
                layers=indices,
                roles=[
                    KvRoleSpec(role=role, kv_heads=kind.kv_heads, head_dim=head_dim, codec=codecs.index(packed))
                    for role, head_dim, packed in (
                        (KV_ROLE_K, kind.k_dim, kind.k_codec),
                        (KV_ROLE_V, kind.v_dim, kind.v_codec),
                    )
                ],
            )
            for kind, indices in groups.items()
        ],
        rope=rope,
        qk_norm=qk_norm,
        rotation_id=rotation_id,
        producer=producer,
        token_start=token_start,
        token_count=token_count,
    )


def validate_manifest(manifest: KvManifest, limits: Limits | None = None) -> StreamPlan:
    """Check every rule that a manifest can break by itself, and derive the plan.

    Whether this receiver wants such a stream is another question: `check_plan`.

    Args:
        manifest: From the stream's open frame.
        limits: The receiver's caps; None: the defaults.

    Raises:
        KvFormatError: The subclass of the first broken rule.
    """
    limits = limits or Limits()
    _check_version(manifest)
    check_extensions(manifest.critical_extensions, "critical_extensions")
    _check_counts(manifest, limits)
    _check_tokens(manifest, limits)
    codecs = [codec_for(spec, field=f"codecs[{index}]") for index, spec in enumerate(manifest.codecs)]
    roles: dict[tuple[int, int], RolePlan] = {}
    seen: set[int] = set()
    for index, group in enumerate(manifest.layer_groups):
        _add_group(roles, seen, group, codecs, limits, f"layer_groups[{index}]")
    _check_offsets(manifest.k_offsets, roles)
    return _derive(manifest, roles, limits)


def check_extensions(extensions: Iterable[int], field: str) -> None:
    """Refuse critical extensions that this reader does not understand.

    Raises:
        UnknownCriticalExtension: Naming the first.
    """
    for extension in extensions:
        if extension not in KNOWN_EXTENSIONS:
            raise UnknownCriticalExtension(f"extension {extension} is not understood here", field=field)


def _check_version(manifest: KvManifest) -> None:
    if manifest.format_major != FORMAT_MAJOR:
        raise UnsupportedVersion(
            f"major version {manifest.format_major}, this reader knows {FORMAT_MAJOR}", field="format_major"
        )


def _check_counts(manifest: KvManifest, limits: Limits) -> None:
    layers = sum(len(group.layers) for group in manifest.layer_groups)
    if not layers or not all(group.layers and group.roles for group in manifest.layer_groups):
        raise EmptyManifest("every layer group needs layers and roles", field="layer_groups")
    _cap(layers, limits.max_layers, "layers", "layer_groups")
    for index, group in enumerate(manifest.layer_groups):
        _cap(len(group.roles), limits.max_roles, "roles", f"layer_groups[{index}].roles")
    _cap(len(manifest.codecs), limits.max_codecs, "codecs", "codecs")


def _check_tokens(manifest: KvManifest, limits: Limits) -> None:
    start, count = manifest.token_start, manifest.token_count
    if start % GROUP_TOKENS:
        raise PartialGroup(f"{start} is not a multiple of {GROUP_TOKENS}", field="token_start")
    if not count or count % GROUP_TOKENS:
        raise PartialGroup(f"{count} is not a positive multiple of {GROUP_TOKENS}", field="token_count")
    _cap(start + count, limits.max_tokens, "tokens", "token_count")


def _add_group(
    roles: dict[tuple[int, int], RolePlan],
    seen: set[int],
    group: KvLayerGroup,
    codecs: list[Codec],
    limits: Limits,
    field: str,
) -> None:
    specs = [_role_plan(spec, codecs, limits, f"{field}.roles[{index}]") for index, spec in enumerate(group.roles)]
    if len({plan.role for plan in specs}) != len(specs):
        raise DuplicateLayer("a role is named twice", field=f"{field}.roles")
    for layer in group.layers:
        if layer in seen:
            raise DuplicateLayer(f"layer {layer} is named twice", field=f"{field}.layers")
        seen.add(layer)
        for plan in specs:
            roles[layer, plan.role] = RolePlan(
                layer, plan.role, plan.kv_heads, plan.head_dim, plan.codec, plan.codec_index, plan.group_bytes
            )


def _role_plan(spec: KvRoleSpec, codecs: list[Codec], limits: Limits, field: str) -> RolePlan:
    if int(spec.role) not in KNOWN_ROLES:
        raise UnknownRole(f"role {spec.role} is not defined in this version", field=f"{field}.role")
    if spec.codec >= len(codecs):
        raise WrongCodec(f"index {spec.codec} of a table of {len(codecs)}", field=f"{field}.codec")
    if not spec.kv_heads:
        raise BadGeometry("no heads", field=f"{field}.kv_heads")
    _cap(spec.kv_heads, limits.max_heads, "heads", f"{field}.kv_heads")
    _cap(spec.head_dim, limits.max_head_dim, "channels", f"{field}.head_dim")
    codec = codecs[spec.codec]
    codec.check_geometry(spec.head_dim)
    group_bytes = codec.group_bytes(spec.head_dim)
    _cap(group_bytes, limits.max_unit_bytes, "bytes in one head and group", f"{field}.head_dim")
    return RolePlan(-1, spec.role, spec.kv_heads, spec.head_dim, codec, spec.codec, group_bytes)


def _check_offsets(offsets: Iterable[KvOffset], roles: Mapping[tuple[int, int], RolePlan]) -> None:
    seen: set[tuple[int, int]] = set()
    for index, offset in enumerate(offsets):
        field = f"k_offsets[{index}]"
        plan = roles.get((offset.layer, int(KV_ROLE_K)))
        if plan is None or offset.head >= plan.kv_heads:
            raise BadOffset(f"there is no K head {offset.head} in layer {offset.layer}", field=field)
        if (offset.layer, offset.head) in seen:
            raise BadOffset(f"layer {offset.layer}, head {offset.head} is given twice", field=field)
        seen.add((offset.layer, offset.head))
        if len(offset.values) != 4 * plan.head_dim:
            raise BadOffset(f"{len(offset.values)} bytes for {plan.head_dim} float32", field=f"{field}.values")
        if not np.isfinite(np.frombuffer(offset.values, "<f4")).all():
            raise BadOffset("Inf or NaN", field=f"{field}.values")


def _derive(manifest: KvManifest, roles: dict[tuple[int, int], RolePlan], limits: Limits) -> StreamPlan:
    groups = manifest.token_count // GROUP_TOKENS
    units = groups * sum(plan.kv_heads for plan in roles.values())
    payload = groups * sum(plan.kv_heads * plan.group_bytes for plan in roles.values())
    _cap(units, limits.max_units, "units", "token_count")
    _cap(payload, limits.max_stream_bytes, "payload bytes", "token_count")
    return StreamPlan(
        manifest=manifest,
        token_start=manifest.token_start,
        token_count=manifest.token_count,
        roles=MappingProxyType(roles),
        layers=tuple(sorted({layer for layer, _ in roles})),
        payload_bytes=payload,
        units=units,
    )


def _cap(found: int, limit: int, what: str, field: str) -> None:
    if found > limit:
        raise LimitExceeded(f"{found} {what}, the limit is {limit}", field=field)
