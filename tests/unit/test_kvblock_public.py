"""The package's surface and its dependencies are decisions, not accidents."""

from __future__ import annotations

import ast
from pathlib import Path

from hma_serve import kvblock

PACKAGE = Path(kvblock.__file__).parent
MAY_IMPORT = ("numpy", "google_crc32c", "google.protobuf", "hma_serve.v1", "hma_serve.kvblock")
STANDARD = {"__future__", "abc", "collections.abc", "dataclasses", "hashlib", "struct", "types", "typing"}


def test_exports() -> None:
    assert set(kvblock.__all__) == {
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
    }
    assert all(hasattr(kvblock, name) for name in kvblock.__all__)


def test_imports() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name in STANDARD or name.startswith(MAY_IMPORT), f"{path.name} imports {name}"
