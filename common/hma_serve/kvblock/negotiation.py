"""What a pair uses: a pure function of what the two sides support. Meaning must be equal, means are chosen.

First the meaning, field by field; the hash, which only names it in a line, must be that of the fields beside it. Then
the lists, the producer's order of preference deciding; entries that mean nothing are passed over. Software, vendors and
minor versions are not compared; fields of newer minor versions are not seen. Codec versions are matched codec by codec,
not hashed, so that a side that learns a new one still pairs with its elders.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final, TypeVar

from hma_serve.kvblock.codecs import codec
from hma_serve.kvblock.errors import Incompatible, UnknownCriticalExtension, UnsupportedVersion
from hma_serve.kvblock.limits import FORMAT_MAJOR, FORMAT_MINOR, GROUP_TOKENS
from hma_serve.kvblock.manifest import KNOWN_EXTENSIONS
from hma_serve.v1.kv_block_pb2 import (
    KV_ROPE_PAIRING_UNSPECIFIED,
    KvAgreement,
    KvCodecSpec,
    KvRopePairing,
    KvSemantics,
    KvSupport,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hma_serve.kvblock.codecs import Codec

_T = TypeVar("_T")
_SCHEME: Final = b"hma-serve kv semantics 1\n"
_SCHEME_FIELDS: Final = (
    "model_fingerprint",
    "layers",
    "kv_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling_hash",
    "qk_norm",
    "rotation_id",
)
"""What scheme 1 hashes, in this order, for ever: a field of a later minor version is not in it, or versions would part.
What must not be ignored is an extension; what else must be hashed is another scheme in a field of its own."""
_SHOWN: Final = 80
_MAX_LISTED: Final = 64
"""Entries of a peer's list that are looked at."""


def semantic_hash(semantics: KvSemantics) -> str:
    """SHA-256 hex of the fields in order, each as `name=value` and a newline; theta as the hex of its float64 bits."""
    digest = hashlib.sha256(_SCHEME)
    for field in _SCHEME_FIELDS:
        value = getattr(semantics, field)
        text = struct.pack(">d", value).hex() if field == "rope_theta" else str(int(value) if value is True else value)
        digest.update(f"{field}={'0' if value is False else text}\n".encode())
    return digest.hexdigest()


def describe_support(
    semantics: KvSemantics,
    *,
    k_codecs: Sequence[Codec],
    v_codecs: Sequence[Codec],
    rope_pairings: Sequence[KvRopePairing.ValueType] = (),
    page_tokens: Sequence[int] = (GROUP_TOKENS,),
    k_offsets: bool = False,
    extensions: Iterable[int] = KNOWN_EXTENSIONS,
) -> KvSupport:
    """What this build says of one side; lists in order of preference.

    Args:
        semantics: Of the model.
        k_codecs: That it sends or reads.
        v_codecs: Likewise.
        rope_pairings: Orders of K that it sends or reads; empty: no RoPE.
        page_tokens: Multiples of 32.
        k_offsets: It subtracts offsets, or adds q.c.
        extensions: Critical ones that it uses, or understands.
    """
    return KvSupport(
        format_major=FORMAT_MAJOR,
        format_minor=FORMAT_MINOR,
        semantic_hash=semantic_hash(semantics),
        semantics=semantics,
        k_codecs=[known.spec() for known in k_codecs],
        v_codecs=[known.spec() for known in v_codecs],
        page_tokens=page_tokens,
        rope_pairings=rope_pairings,
        k_offsets=k_offsets,
        extensions=extensions,
    )


def negotiate(producer: KvSupport, receiver: KvSupport) -> KvAgreement:
    """Choose what a pair uses, the best in the producer's order.

    A codec is common if id, version and granularity are. Every receiver reads BF16, listed or not, so a producer that
    lists it always finds one.

    Raises:
        UnsupportedVersion: Another major version.
        UnknownCriticalExtension: The producer needs one that the receiver does not understand.
        Incompatible: Naming the field that differs, or the list without a common entry.
    """
    if producer.format_major != receiver.format_major:
        raise UnsupportedVersion(
            f"the producer speaks major version {producer.format_major}, the receiver {receiver.format_major}",
            field="format_major",
        )
    for extension in producer.extensions:
        if extension not in receiver.extensions:
            raise UnknownCriticalExtension(f"the receiver does not understand {extension}", field="extensions")
    _check_meaning(producer, receiver)
    if producer.k_offsets and not receiver.k_offsets:
        raise Incompatible("the producer subtracts K offsets, the receiver does not add them", field="k_offsets")
    return KvAgreement(
        k_codec=_common_codec("k_codecs", producer.k_codecs, receiver.k_codecs),
        v_codec=_common_codec("v_codecs", producer.v_codecs, receiver.v_codecs),
        page_tokens=_common("page_tokens", producer.page_tokens, receiver.page_tokens, GROUP_TOKENS, _is_page),
        rope_pairing=_common_pairing(producer, receiver),
        k_offsets=producer.k_offsets,
    )


def check_semantics(offered: KvSemantics, wanted: KvSemantics) -> None:
    """Refuse another meaning.

    Raises:
        Incompatible: Naming the first field that differs, as `semantics.NAME`.
    """
    for field in _SCHEME_FIELDS:
        found, right = getattr(offered, field), getattr(wanted, field)
        if found != right:
            shown = repr(found)[:_SHOWN]
            raise Incompatible(f"the producer has {shown}, the receiver {right!r}", field=f"semantics.{field}")


def _check_meaning(producer: KvSupport, receiver: KvSupport) -> None:
    for name, side in (("producer", producer), ("receiver", receiver)):
        right = semantic_hash(side.semantics)
        if side.semantic_hash != right:
            raise Incompatible(
                f"the {name} states {side.semantic_hash[:_SHOWN]!r}, its semantics have {right!r}",
                field="semantic_hash",
            )
    check_semantics(producer.semantics, receiver.semantics)


def _common_codec(field: str, offered: Sequence[KvCodecSpec], accepted: Sequence[KvCodecSpec]) -> KvCodecSpec:
    readable = {_identity(spec) for spec in accepted[:_MAX_LISTED]} | {_identity(codec("bf16").spec())}
    for spec in offered[:_MAX_LISTED]:
        if spec.id and spec.version and _identity(spec) in readable:
            return spec
    raise Incompatible(
        f"the receiver reads none of the {len(offered)} codecs that the producer sends, and bf16 is not among them",
        field=field,
    )


def _identity(spec: KvCodecSpec) -> tuple[int, int, int]:
    return int(spec.id), spec.version, int(spec.granularity)


def _common_pairing(producer: KvSupport, receiver: KvSupport) -> KvRopePairing.ValueType:
    """Of a model without RoPE none; a model with it has an order, which both sides must state."""
    field, sides = "rope_pairings", (producer.rope_pairings, receiver.rope_pairings)
    if producer.semantics.rope_theta:
        return _common(field, *sides, None, lambda pairing: pairing != KV_ROPE_PAIRING_UNSPECIFIED)
    return _common(field, *sides, KV_ROPE_PAIRING_UNSPECIFIED, lambda pairing: True)


def _is_page(tokens: int) -> bool:
    return tokens > 0 and tokens % GROUP_TOKENS == 0


def _common(
    field: str, offered: Sequence[_T], accepted: Sequence[_T], default: _T | None, valid: Callable[[_T], bool]
) -> _T:
    """The first valid entry that both lists have; an empty list means the default, if there is one."""
    lists = [list(side[:_MAX_LISTED]) or ([] if default is None else [default]) for side in (offered, accepted)]
    for choice in lists[0]:
        if choice in lists[1] and valid(choice):
            return choice
    raise Incompatible(f"the producer has {lists[0]}, the receiver {lists[1]}", field=field)
