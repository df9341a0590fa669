"""What crosses between a Tenstorrent card and its host: matrices into the card's tiles, and tiles out as they are.

A block-float tile of ttnn's is one tile of the wire's `tt_bfp8_b`, so the bytes of keys and values need no conversion,
only another order of heads and groups. Imports nothing of this package, because ttnn wants a Python of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ttnn
from numpy.typing import NDArray

TILE = 32


def to_tiles(values: NDArray[np.float32], dtype: object, device: object = None) -> Any:
    """Packs float32 [..., rows, columns] into tiles of a ttnn dtype, on the host or right onto a device."""
    return ttnn.Tensor(np.ascontiguousarray(values), dtype, device, ttnn.TILE_LAYOUT)


def tile_bytes(tensor: Any) -> NDArray[np.uint8]:
    """The bytes of a tensor's tiles, row-major over tiles; waits for a device that computes it."""
    shard = tensor.cpu().host_buffer().get_shard(ttnn.MeshCoordinate([0, 0]))
    return np.from_dlpack(shard).view(np.uint8).reshape(-1)


def group_bytes(tensor: Any, shape: Sequence[int]) -> NDArray[np.uint8]:
    """Keys or values [groups, heads, 32, D] in block float as the wire wants them: uint8 [heads, groups, bytes].

    Args:
        tensor: On a device or the host.
        shape: Its sizes.
    """
    groups, heads = shape[:2]
    return tile_bytes(tensor).reshape(groups, heads, -1).transpose(1, 0, 2)
