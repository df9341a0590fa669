"""Names of prompt prefixes by their content: equal prefixes of equal settings have equal names, others never do.

A chain: the name of a group of 32 tokens is the SHA-256 of the name before it and of the group's tokens, so it stands
for everything up to the group's end. The root stands for whatever else the KV depends on (model, codec, tenant): a
tenant's prefixes can be neither found nor guessed by another.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

from hma_serve.core.groups import GROUP_TOKENS

_GROUP = struct.Struct(f"<{GROUP_TOKENS}I")


def prefix_root(*settings: str) -> bytes:
    """The name of the empty prefix under these settings, whose order and number count."""
    encoded = [setting.encode() for setting in settings]
    return sha256(b"".join(struct.pack("<I", len(part)) + part for part in encoded)).digest()


def prefix_names(root: bytes, token_ids: Sequence[int]) -> list[bytes]:
    """The names of the prefixes that end with each whole group of the tokens, shortest first; 32 bytes each."""
    names, name = [], root
    for start in range(0, len(token_ids) // GROUP_TOKENS * GROUP_TOKENS, GROUP_TOKENS):
        name = sha256(name + _GROUP.pack(*token_ids[start : start + GROUP_TOKENS])).digest()
        names.append(name)
    return names
