"""How one layer's rectangle of heads and groups is cut into blocks.

All heads stay together and tokens are cut, in nearly equal parts, because a receiver's pages are runs of
tokens; heads are cut only where a single group of all heads is already too large for one message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hma_serve.kvblock.limits import BEST_PAYLOAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray


class Rectangle(NamedTuple):
    """A part of [heads, groups], both counted from the corner of the whole."""

    head_start: int
    head_count: int
    group_start: int
    group_count: int

    def of(self, packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The view of `packed` [heads, groups, group_bytes] that this part covers."""
        heads = slice(self.head_start, self.head_start + self.head_count)
        return packed[heads, self.group_start : self.group_start + self.group_count]


def split_blocks(
    heads: int, groups: int, group_bytes: int, max_payload: int = BEST_PAYLOAD_BYTES
) -> Iterator[Rectangle]:
    """Cut a rectangle into parts whose payloads are at most `max_payload`, each unit in exactly one part.

    Args:
        heads: KV heads.
        groups: Groups of 32 tokens.
        group_bytes: Bytes of one head and group. One unit always travels whole, even if it exceeds `max_payload`.
        max_payload: Payload bytes of a block.
    """
    units = max(1, max_payload // group_bytes)
    for head_start, head_count in _even_parts(heads, min(heads, units)):
        for group_start, group_count in _even_parts(groups, units // head_count):
            yield Rectangle(head_start, head_count, group_start, group_count)


def _even_parts(total: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, count) of the fewest parts of at most `most`, sizes differing by at most one."""
    parts = -(-total // most)
    for index in range(parts):
        start = index * total // parts
        yield start, (index + 1) * total // parts - start
