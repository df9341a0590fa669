"""The vendor-neutral quantised KV block format: codecs, manifest, blocks, wire. docs/kv-block-format.md is normative.

Bytes from a peer are only ever refused with a `KvFormatError`. Nothing here does I/O, keeps threads or knows
the rest of the product; payloads are views, so whoever passes a buffer in keeps it alive and unchanged.
"""

from hma_serve.kvblock.block import Block, validate_block
from hma_serve.kvblock.capture import join_frames, split_frames
from hma_serve.kvblock.codecs import Codec, Payload, Section, codec, codec_for, codec_names
from hma_serve.kvblock.coverage import Coverage
from hma_serve.kvblock.errors import KvFormatError
from hma_serve.kvblock.frame import align_payload, decode_frame, encode_frame, is_plain_frame
from hma_serve.kvblock.limits import (
    BEST_PAYLOAD_BYTES,
    FORMAT_MAJOR,
    FORMAT_MINOR,
    GROUP_TOKENS,
    HEADER_ROOM_BYTES,
    MAX_MESSAGE_BYTES,
    Limits,
)
from hma_serve.kvblock.manifest import (
    LayerKv,
    RolePlan,
    StreamPlan,
    build_manifest,
    build_mixed_manifest,
    validate_manifest,
)
from hma_serve.kvblock.negotiation import check_semantics, describe_support, negotiate, semantic_hash
from hma_serve.kvblock.offset import MAX_TABLE_BYTES, OffsetCalibration, OffsetTable
from hma_serve.kvblock.pairing import Acceptance, check_offer, check_plan
from hma_serve.kvblock.rope import channel_order
from hma_serve.kvblock.split import Rectangle, split_blocks
from hma_serve.kvblock.stream import StreamReader, StreamWriter
from hma_serve.kvblock.transcode import transcode

__all__ = [
    "BEST_PAYLOAD_BYTES",
    "FORMAT_MAJOR",
    "FORMAT_MINOR",
    "GROUP_TOKENS",
    "HEADER_ROOM_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_TABLE_BYTES",
    "Acceptance",
    "Block",
    "Codec",
    "Coverage",
    "KvFormatError",
    "LayerKv",
    "Limits",
    "OffsetCalibration",
    "OffsetTable",
    "Payload",
    "Rectangle",
    "RolePlan",
    "Section",
    "StreamPlan",
    "StreamReader",
    "StreamWriter",
    "align_payload",
    "build_manifest",
    "build_mixed_manifest",
    "channel_order",
    "check_offer",
    "check_plan",
    "check_semantics",
    "codec",
    "codec_for",
    "codec_names",
    "decode_frame",
    "describe_support",
    "encode_frame",
    "is_plain_frame",
    "join_frames",
    "negotiate",
    "semantic_hash",
    "split_blocks",
    "split_frames",
    "transcode",
    "validate_block",
    "validate_manifest",
]
