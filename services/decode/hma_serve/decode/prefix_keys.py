"""Names of prompt pages by what decided their bytes: a chain of SHA-256, one link per group of 32 tokens.

The root holds everything but the tokens: the model's fingerprint (K offsets included), both codecs, the pairing of
channels, the profile that computed the keys and values, and the tenant, so that nobody can find out by timing what
another tenant has asked. Each link then hashes the link before and 32 token ids. Two prompts have equal keys as far as
they are the same prompt, and no further.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.v1 import decode_pb2

_SCHEME = b"hma-serve prefix key 1"


def prefix_keys(offer: decode_pb2.KvOffer, tenant: str, tokens: Sequence[int]) -> list[bytes]:
    """The keys of a prompt's groups.

    Args:
        offer: What the producer sends.
        tenant: From the authenticated identity; empty: none.
        tokens: Whole groups of 32.

    Returns:
        32 bytes for each group.
    """
    key = _root(offer, tenant)
    ids, keys = array("I", tokens), []
    for start in range(0, len(ids), GROUP_TOKENS):
        key = hashlib.sha256(key + ids[start : start + GROUP_TOKENS].tobytes()).digest()
        keys.append(key)
    return keys


def _root(offer: decode_pb2.KvOffer, tenant: str) -> bytes:
    parts = [_SCHEME, offer.model_fingerprint.encode(), offer.profile.encode(), tenant.encode()]
    parts += [struct.pack("<III", spec.id, spec.version, spec.granularity) for spec in (offer.k_codec, offer.v_codec)]
    parts.append(struct.pack("<I", offer.rope.pairing))
    digest = hashlib.sha256()
    for part in parts:
        # With its length, or a byte could move from one part to the next unnoticed.
        digest.update(struct.pack("<Q", len(part)) + part)
    return digest.digest()
