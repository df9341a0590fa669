"""Cutting rectangles: every unit in exactly one part, no part too large, tokens before heads."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hma_serve import kvblock
from hma_serve.kvblock import split_blocks


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 5000), st.integers(1, 100_000))
def test_parts_cover_each_unit_once_and_fit(heads: int, groups: int, group_bytes: int, max_payload: int) -> None:
    seen = np.zeros((heads, groups), dtype=int)
    for part in split_blocks(heads, groups, group_bytes, max_payload):
        seen[part.head_start : part.head_start + part.head_count][
            :, part.group_start : part.group_start + part.group_count
        ] += 1
        assert part.head_count * part.group_count * group_bytes <= max(max_payload, group_bytes)
    assert (seen == 1).all()


def test_heads_stay_together_and_parts_are_even() -> None:
    parts = list(split_blocks(8, 100, 4352))
    assert {part.head_count for part in parts} == {8}
    assert len(parts) == 4  # 30 groups of 8 x 4352 bytes fit into 1 MiB
    assert {part.group_count for part in parts} == {25}


def test_heads_are_cut_when_one_group_is_too_large() -> None:
    parts = list(split_blocks(8, 2, 4096, 3 * 4096))
    assert [(part.head_start, part.head_count) for part in parts[::2]] == [(0, 2), (2, 3), (5, 3)]
    assert {part.group_count for part in parts} == {1}


def test_nothing_is_cut_from_an_empty_rectangle() -> None:
    assert list(split_blocks(8, 0, 4096)) == []


def test_the_largest_unit_of_the_default_limits_fits_a_message() -> None:
    assert kvblock.Limits().max_unit_bytes + kvblock.HEADER_ROOM_BYTES == kvblock.MAX_MESSAGE_BYTES
    assert kvblock.codec("bf16").group_bytes(512) <= kvblock.BEST_PAYLOAD_BYTES
