"""The two channel orders of RoPE: half-split (j with j + D/2) and interleaved (2j with 2j + 1).

K travels in its producer's order. A receiver that computes in the other permutes its queries, not the cache: the inner
product does not mind, and queries are few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.v1.kv_block_pb2 import KvRopePairing


def channel_order(head_dim: int, have: KvRopePairing.ValueType, want: KvRopePairing.ValueType) -> NDArray[np.int64]:
    """Where the channels of one order stand in the other: index the last axis of x with it to have x in `want`.

    Args:
        head_dim: D, even.
        have: The order that x is in.
        want: The order that is wanted.

    Returns:
        int64 [head_dim], a permutation.

    Raises:
        ValueError: An odd head_dim, or a pairing without an order.
    """
    known = (KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED)
    if head_dim % 2 or have not in known or want not in known:
        raise ValueError(f"no order of {head_dim} channels for pairings {have} and {want}")
    channels = np.arange(head_dim)
    if have == want:
        return channels
    if want == KV_ROPE_PAIRING_INTERLEAVED:
        return channels.reshape(2, -1).T.reshape(-1)  # 2j takes j, 2j + 1 takes j + D/2
    return channels.reshape(-1, 2).T.reshape(-1)
