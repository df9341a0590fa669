"""Whether a receiver can read what a producer sends: meaning is compared, software never.

Run before anything is held: on the offer when a pair is made, and again on the manifest when the stream
opens. The first difference is reported by name, in the words of the field that differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hma_serve.kvblock.codecs import codec_for
from hma_serve.kvblock.errors import Incompatible
from hma_serve.kvblock.negotiation import check_semantics
from hma_serve.kvblock.offset import OffsetTable
from hma_serve.v1.kv_block_pb2 import KvRope, KvRopePairing, KvSemantics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hma_serve.kvblock.codecs import Codec
    from hma_serve.kvblock.manifest import StreamPlan
    from hma_serve.v1.decode_pb2 import KvOffer
    from hma_serve.v1.kv_block_pb2 import KvCodecSpec, KvOffset


_SHOWN: Final = 80
"""Characters of a peer's value that an error repeats."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What one receiver reads: its model's meaning, and the codecs it has readers for.

    Attributes:
        model_fingerprint: SHA-256 hex of weights revision, config and K offset.
        layers: Layers of the model; a manifest covers all of them.
        kv_heads: KV heads of every layer.
        head_dim: Channels of a head.
        codecs: Readable codecs.
        rope: How the model applies RoPE to keys; None: not at all.
        qk_norm: The model normalises keys per head before RoPE.
        rotation_id: Rotation that the receiver undoes; 0: none.
        k_offsets: The receiver adds q.c to the scores of offset blocks.
        k_offset_digest: Of the table that it adds (`OffsetTable.digest`); None: it takes what the manifest brings.
        shapes: (KV heads, head_dim) by (layer, role), for a model whose layers differ; None: all are alike.
        rope_pairings: Channel orders of K that are read besides that of `rope`.
    """

    model_fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    codecs: tuple[Codec, ...]
    rope: KvRope | None
    qk_norm: bool
    rotation_id: int = 0
    k_offsets: bool = False
    k_offset_digest: str | None = None
    shapes: Mapping[tuple[int, int], tuple[int, int]] | None = None
    rope_pairings: tuple[KvRopePairing.ValueType, ...] = ()

    @property
    def semantics(self) -> KvSemantics:
        """What a producer must agree in."""
        rope = self.rope or KvRope()
        return KvSemantics(
            model_fingerprint=self.model_fingerprint,
            layers=self.layers,
            kv_heads=0 if self.shapes else self.kv_heads,
            head_dim=0 if self.shapes else self.head_dim,
            rope_theta=rope.theta,
            rope_scaling_hash=rope.scaling_hash,
            qk_norm=self.qk_norm,
            rotation_id=self.rotation_id,
        )


def check_offer(offer: KvOffer, accepts: Acceptance) -> None:
    """Refuse to pair with a producer whose KV would be misread.

    Raises:
        Incompatible: Naming the field that differs.
        UnknownCodec: A codec of which this build knows nothing.
    """
    _check_offsets(bool(offer.k_offsets), accepts)
    _check_fingerprint(offer.model_fingerprint, accepts)
    _check_codec("k_codec", offer.k_codec, accepts)
    _check_codec("v_codec", offer.v_codec, accepts)
    _check_rope(offer.rope, accepts)
    if offer.HasField("semantics"):
        check_semantics(offer.semantics, accepts.semantics)


def check_plan(plan: StreamPlan, accepts: Acceptance) -> None:
    """Refuse a stream whose KV would be misread; its manifest is valid in itself.

    Raises:
        Incompatible: Naming the field that differs.
    """
    manifest = plan.manifest
    _check_table(manifest.k_offsets, accepts)
    _check_fingerprint(manifest.model_fingerprint, accepts)
    _check_geometry(plan, accepts)
    for index, spec in enumerate(manifest.codecs):
        _check_codec(f"codecs[{index}]", spec, accepts)
    _check_rope(manifest.rope, accepts)
    _same("qk_norm", manifest.qk_norm, accepts.qk_norm)
    _same("rotation_id", manifest.rotation_id, accepts.rotation_id)


def _check_offsets(offered: bool, accepts: Acceptance) -> None:
    """Before the fingerprint, which offsets are part of, so that the difference has its own name."""
    if offered and not accepts.k_offsets:
        raise Incompatible("the producer subtracts K offsets, the receiver does not add them", field="k_offsets")
    if not offered and accepts.k_offset_digest is not None:
        raise Incompatible("the receiver adds K offsets, the producer does not subtract them", field="k_offsets")


def _check_table(offsets: Sequence[KvOffset], accepts: Acceptance) -> None:
    _check_offsets(bool(offsets), accepts)
    if accepts.k_offset_digest is not None:
        _same("k_offsets", OffsetTable.from_proto(offsets).digest(), accepts.k_offset_digest, "(hash of the table)")


def _check_fingerprint(offered: str, accepts: Acceptance) -> None:
    covers = "" if accepts.k_offset_digest is None else "(of the model and its K offsets)"
    _same("model_fingerprint", offered, accepts.model_fingerprint, covers)


def _check_geometry(plan: StreamPlan, accepts: Acceptance) -> None:
    if plan.layers != tuple(range(accepts.layers)):
        raise Incompatible(
            f"the producer sends {len(plan.layers)} layers, {plan.layers[0]} to {plan.layers[-1]}; "
            f"the receiver has 0 to {accepts.layers - 1}",
            field="layers",
        )
    for (layer, role), role_plan in plan.roles.items():
        where = f"(layer {layer}, role {role})"
        shape = (accepts.kv_heads, accepts.head_dim) if accepts.shapes is None else accepts.shapes.get((layer, role))
        if shape is None:
            raise Incompatible(f"the receiver's layer {layer} has no role {role}", field="roles")
        _same("kv_heads", role_plan.kv_heads, shape[0], where)
        _same("head_dim", role_plan.head_dim, shape[1], where)
    if len(plan.roles) != (2 * accepts.layers if accepts.shapes is None else len(accepts.shapes)):
        raise Incompatible("a layer lacks K or V", field="roles")


def _check_codec(field: str, spec: KvCodecSpec, accepts: Acceptance) -> None:
    codec = codec_for(spec, field=field)
    if codec not in accepts.codecs:
        names = ", ".join(known.name for known in accepts.codecs)
        raise Incompatible(f"the producer sends {codec.name}, the receiver accepts {names}", field=field)


def _check_rope(offered: KvRope, accepts: Acceptance) -> None:
    wanted = accepts.rope or KvRope()
    if offered.pairing not in accepts.rope_pairings:
        _same("rope.pairing", _pairing_name(offered.pairing), _pairing_name(wanted.pairing))
    _same("rope.theta", offered.theta, wanted.theta)
    _same("rope.scaling_hash", offered.scaling_hash, wanted.scaling_hash)


def _pairing_name(pairing: KvRopePairing.ValueType) -> str:
    return KvRopePairing.Name(pairing) if pairing in KvRopePairing.values() else str(pairing)


def _same(field: str, offered: object, wanted: object, where: str = "") -> None:
    if offered != wanted:
        shown = repr(offered)[:_SHOWN]
        raise Incompatible(f"the producer has {shown}, the receiver {wanted!r} {where}".rstrip(), field=field)
