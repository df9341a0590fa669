"""The Tenstorrent tile, shared by its block-float codecs: where exponents and elements lie, and how exponents are read.

A tile is 32 tokens x 32 channels, stored as four 16 x 16 faces (top-left, top-right, bottom-left,
bottom-right). Its 64 exponents come first, one per row of a face, then the faces' elements row by row. A unit
is the head_dim / 32 tiles of one group, left to right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from hma_serve.kvblock.limits import GROUP_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE: Final = 32
FACE: Final = 16
EXPONENT_BYTES: Final = 64
BANNED_EXPONENT: Final = 255


def to_faces(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Reorder [heads, tokens, head_dim] to [heads, groups, tiles, 2, 2, 16, 16]: face row, face column, row, column."""
    heads, tokens, head_dim = values.shape
    split = values.reshape(heads, tokens // GROUP_TOKENS, 2, FACE, head_dim // TILE, 2, FACE)
    return split.transpose(0, 1, 4, 2, 5, 3, 6)


def from_faces(faces: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of `to_faces`; copies."""
    heads, groups, tiles = faces.shape[:3]
    return faces.transpose(0, 1, 3, 5, 2, 4, 6).reshape(heads, groups * GROUP_TOKENS, tiles * TILE)


def shared_exponents(faces: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The largest raw (bias 127) exponent of each row of 16, [..., 16, 1]. Subnormals and zeros have exponent 0."""
    bits = np.ascontiguousarray(faces).view(np.uint32)
    exponents = (bits >> np.uint32(23)) & np.uint32(0xFF)
    largest: NDArray[np.uint32] = exponents.max(axis=-1, keepdims=True)
    return largest


def normalised(faces: NDArray[np.float32], exponents: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Each value divided by 2^(E-128): magnitudes below 4, exact, subnormal inputs as 0."""
    subnormal = np.abs(faces) < np.finfo(np.float32).smallest_normal
    scale = ((255 - np.maximum(exponents, 1)) << 23).astype(np.uint32).view(np.float32)
    return np.where(subnormal, np.float32(0), faces) * scale


def steps(exponents: NDArray[np.uint8], magnitude_bits: int) -> NDArray[np.float32]:
    """What one unit of magnitude is worth, 2^(E - 126 - magnitude_bits).

    It is 0 where that is subnormal (E < magnitude_bits), because accelerators flush subnormals.
    """
    raised = np.where(exponents < magnitude_bits, 0, exponents.astype(np.uint32)).astype(np.uint32) << 23
    return np.asarray(raised.view(np.float32) * np.float32(2.0 ** (1 - magnitude_bits)))
