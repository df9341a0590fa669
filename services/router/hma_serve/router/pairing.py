"""Which prefill and decode workers understand each other, by what both registered.

The rules are those of the KV block format's negotiation, so that decode's own, on the offer, has nothing to add. Here
they say two things: what keeps a pair apart, and which roles (K, V) travel as BF16 because decode does not read the
producer's own codec. A record without `kv` is an older worker's, whose `codecs` are all that it ever sends or reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import TypeVar

from hma_serve.core.worker import CodecSpec, KvCodecId, KvRopePairing, KvSupport, ModelInfo, WorkerInfo
from hma_serve.v1.kv_block_pb2 import KvSemantics

_T = TypeVar("_T")
_BF16 = CodecSpec(KvCodecId.BF16)
_GROUP = 32


def compatible(prefill: WorkerInfo, decode: WorkerInfo) -> bool:
    """Whether decode can read what prefill can send."""
    return difference(prefill, decode) is None


def difference(prefill: WorkerInfo, decode: WorkerInfo) -> str | None:
    """The first thing that keeps decode from reading what prefill can send; None: nothing does."""
    made, read = prefill.model, decode.model
    for name, ours, theirs in (
        ("model fingerprint", made.fingerprint, read.fingerprint),
        ("K offsets", made.stream_fingerprint, read.stream_fingerprint),
        ("RoPE theta", made.rope.theta, read.rope.theta),
        ("RoPE scaling", made.rope.scaling_hash, read.rope.scaling_hash),
    ):
        if ours != theirs:
            return name
    if prefill.kv is not None and decode.kv is not None:
        if prefill.kv.semantic_hash != decode.kv.semantic_hash:
            return _meaning(prefill.kv, decode.kv)
        if not set(prefill.kv.page_tokens or [_GROUP]) & set(decode.kv.page_tokens or [_GROUP]):
            return "page sizes"
    if not set(_pairings(prefill)) & set(_pairings(decode)):
        return "RoPE pairing"
    for role, sent, accepted in _codecs(prefill, decode):
        if _first_common(sent, accepted) is None:
            return f"{role} codec {sent[0].id.name.lower()}" if sent else f"{role} codec"
    return None


def fallbacks(prefill: WorkerInfo, decode: WorkerInfo) -> int:
    """Roles of a compatible pair, 0 to 2, that are not sent in the producer's own codec."""
    return sum(_first_common(sent, accepted) != sent[0] for _, sent, accepted in _codecs(prefill, decode))


def bf16_bytes_per_token(model: ModelInfo) -> int:
    """Bytes of one role of a token in all layers as BF16."""
    return 2 * model.layers * model.kv_heads * model.head_dim


def a_difference(prefills: Iterable[WorkerInfo], decodes: Iterable[WorkerInfo]) -> str:
    """For people, where no pair is compatible: what the first one differs in. Empty without a pair."""
    for prefill, decode in product(prefills, decodes):
        if found := difference(prefill, decode):
            return f": they differ in their {found}"
    return ""


def kind(info: WorkerInfo) -> object:
    """Equal for workers that make the same pairs."""
    stated = (info.codecs, info.rope_pairings) if info.kv is None else info.kv.message
    return info.model.stream_fingerprint, info.model.rope, stated


def once_per_kind(judge: Callable[[WorkerInfo, WorkerInfo], _T]) -> Callable[[WorkerInfo, WorkerInfo], _T]:
    """`judge`, asked once for all pairs of the same kinds."""
    known: dict[tuple[object, object], _T] = {}

    def ask(prefill: WorkerInfo, decode: WorkerInfo) -> _T:
        key = kind(prefill), kind(decode)
        if key not in known:
            known[key] = judge(prefill, decode)
        return known[key]

    return ask


def _codecs(
    prefill: WorkerInfo, decode: WorkerInfo
) -> tuple[tuple[str, Sequence[CodecSpec], Sequence[CodecSpec]], ...]:
    """By role: what prefill can send, its own codec first, and what decode reads."""
    if prefill.kv is None or decode.kv is None:
        return ("K", prefill.codecs[:1], decode.codecs), ("V", prefill.codecs[-1:], decode.codecs)
    # Every receiver reads BF16, listed or not.
    return (
        ("K", prefill.kv.k_codecs, (*decode.kv.k_codecs, _BF16)),
        ("V", prefill.kv.v_codecs, (*decode.kv.v_codecs, _BF16)),
    )


def _meaning(ours: KvSupport, theirs: KvSupport) -> str:
    """The field of the semantics that differs."""
    made, read = ours.to_proto().semantics, theirs.to_proto().semantics
    for name in KvSemantics.DESCRIPTOR.fields_by_name:
        if getattr(made, name) != getattr(read, name):
            return f"semantics.{name}"
    return "semantic hash"


def _pairings(info: WorkerInfo) -> tuple[KvRopePairing, ...]:
    if info.kv is not None and info.kv.rope_pairings:
        return info.kv.rope_pairings
    return info.model.rope.pairing, *info.rope_pairings


def _first_common(sent: Sequence[CodecSpec], accepted: Sequence[CodecSpec]) -> CodecSpec | None:
    return next((spec for spec in sent if any(spec.decodes_like(known) for known in accepted)), None)
