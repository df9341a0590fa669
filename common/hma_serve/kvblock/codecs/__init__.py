"""The codecs that this build reads and writes, by name and by wire identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hma_serve.kvblock.codecs.base import Codec, Payload, Section
from hma_serve.kvblock.codecs.bf16 import Bf16
from hma_serve.kvblock.codecs.f32 import F32
from hma_serve.kvblock.codecs.fp8 import all_fp8
from hma_serve.kvblock.codecs.integer import Int8, all_int4
from hma_serve.kvblock.codecs.mx import MxFp4, MxFp8, MxInt8
from hma_serve.kvblock.codecs.nvfp4 import NvFp4
from hma_serve.kvblock.codecs.tt_block_float import TtBlockFloat
from hma_serve.kvblock.errors import UnknownCodec
from hma_serve.v1.kv_block_pb2 import KvCodecId

if TYPE_CHECKING:
    from hma_serve.v1.kv_block_pb2 import KvCodecSpec

__all__ = ["Codec", "Payload", "Section", "codec", "codec_for", "codec_names"]

_ALL: Final[tuple[Codec, ...]] = (
    F32(),
    Bf16(),
    TtBlockFloat(8),
    TtBlockFloat(4),
    TtBlockFloat(2),
    *all_fp8(),
    MxFp8(),
    MxInt8(),
    MxFp4(),
    NvFp4(),
    Int8(),
    *all_int4(),
)
_BY_NAME: Final = {known.name: known for known in _ALL}
_ALIASES: Final = {f"{name}.token_head": name for name in _BY_NAME if f"{name}.tensor" in _BY_NAME}
_BY_IDENTITY: Final = {(int(known.id), known.version, int(known.granularity)): known for known in _ALL}


def codec_names() -> tuple[str, ...]:
    """Names of all codecs of this build."""
    return tuple(_BY_NAME)


def codec(name: str) -> Codec:
    """The codec of that name, for example from configuration.

    A name is the id's in lower case; where the codec leaves the granularity of its scales open, the bare name means
    one per token and head, and `.head`, `.tensor` (`int4.channel`) the others.

    Raises:
        UnknownCodec: No such codec; the message lists those there are.
    """
    found = _BY_NAME.get(_ALIASES.get(name, name))
    if found is None:
        raise UnknownCodec(f"{name!r} is none of {', '.join(_BY_NAME)}", field="codec")
    return found


def codec_for(spec: KvCodecSpec, *, field: str = "codec") -> Codec:
    """The codec that reads what `spec` describes; the attested rounding does not matter.

    Args:
        spec: From a manifest or an offer.
        field: Where the spec stands, for the error.

    Raises:
        UnknownCodec: This build has no reader for the id, version and granularity.
    """
    found = _BY_IDENTITY.get((int(spec.id), spec.version, int(spec.granularity)))
    if found is None:
        raise UnknownCodec(
            f"no reader for codec {_id_name(spec.id)}, version {spec.version}, granularity {spec.granularity}",
            field=field,
        )
    return found


def _id_name(codec_id: KvCodecId.ValueType) -> str:
    return KvCodecId.Name(codec_id) if codec_id in KvCodecId.values() else str(codec_id)
