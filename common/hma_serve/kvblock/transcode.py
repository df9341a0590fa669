"""Units of one codec packed again in another, through the values that they mean: the fallback to BF16.

Decoded by the normative function and packed by the reference encoder, so anyone gets the same bytes. Into `bf16`
nothing is lost of values with at most 8 significant bits (block float, MX); others are rounded to nearest even.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hma_serve.kvblock.block import to_sections
from hma_serve.kvblock.limits import GROUP_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.kvblock.codecs import Codec


def transcode(units: NDArray[np.uint8], source: Codec, target: Codec, head_dim: int) -> NDArray[np.uint8]:
    """Pack again what units mean.

    Args:
        units: uint8 [heads, groups, group_bytes] of `source`.
        source: What they are packed in.
        target: What they are to be packed in.
        head_dim: Channels of a head.

    Returns:
        uint8 [heads, groups, group_bytes] of `target`.

    Raises:
        ValueError: `target` cannot hold a value.
    """
    heads, groups, _ = units.shape
    payload = np.ascontiguousarray(to_sections(source, head_dim, units))
    return target.encode(source.decode(payload, heads, groups * GROUP_TOKENS, head_dim))
