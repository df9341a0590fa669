"""The format's constants and a receiver's caps. Every size is derived and compared with these before any allocation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FORMAT_MAJOR: Final = 1
"""Readers refuse any other major version."""
FORMAT_MINOR: Final = 1
"""Readers accept any minor version: it only adds fields that may be ignored."""
GROUP_TOKENS: Final = 32
"""Tokens travel in whole groups of this many: a tile of the coarsest codec, and a unit of pages and prefix hashes."""
MAX_MESSAGE_BYTES: Final = 2 << 20
"""A whole frame, header and payload."""
HEADER_ROOM_BYTES: Final = 4 << 10
"""What a writer keeps free of `MAX_MESSAGE_BYTES` for the header; real headers take about 100 bytes."""
BEST_PAYLOAD_BYTES: Final = 1 << 20
"""Payloads of about this size move fastest through gRPC; smaller ones are fine, a layer never waits to fill one."""
MAX_PREFIX_HASH_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """What one receiver is willing to hold for one stream.

    Attributes:
        max_layers: Layers in all groups together.
        max_roles: Roles of one layer group.
        max_codecs: Entries of the codec table.
        max_heads: KV heads of one layer and role.
        max_head_dim: Channels of one head.
        max_tokens: End of the token range, so also its length.
        max_units: (layer, role, head, group) combinations: what the coverage bitmap takes in bytes.
        max_stream_bytes: Payload of the whole stream.
        max_unit_bytes: Payload of one head and group; it must fit into one message.
    """

    max_layers: int = 1024
    max_roles: int = 16
    max_codecs: int = 64
    max_heads: int = 1024
    max_head_dim: int = 4096
    max_tokens: int = 1 << 20
    max_units: int = 1 << 26
    max_stream_bytes: int = 1 << 37
    max_unit_bytes: int = MAX_MESSAGE_BYTES - HEADER_ROOM_BYTES
