"""Pages whose bytes stand as tensor cores want them in registers, so that attention loads operands and nothing else.

A page is one role of 32 tokens of one head, cut into halves of 16 tokens. Keys are the left operand with tokens as rows
and channels as columns; values are it with channels as rows and tokens as columns (see `hma_serve.decode.kernels.warp`
for what a lane holds of such an operand). A *group* is 16 channels.

    8-bit elements   [half][pair of groups][lane][group of the pair][8 bytes]   one load of 16 bytes a lane and pair
    16-bit elements  [half][group][lane][8 elements]                            one load of 16 bytes a lane and group
    exponents of K   [half][g][token g or g + 8][group]                         behind the elements
    exponents of V   [half][t][group][token 2t, 2t+1, 2t+8, 2t+9]
    E4M3 scales      as exponents of K, K and V alike; a float32 of the page behind them, four times
    token scales     float32 [32], K and V alike

The orders are permutations, so nothing is lost. A page takes as many bytes as on the wire unless its format has
fewer bits an element or fewer scales there (`byte_pages`).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from hma_serve.core.groups import GROUP_TOKENS

GROUP = 16
"""Channels of a group."""


def fragment_elements(keys: bool, head_dim: int, *, wide: bool) -> torch.Tensor:
    """Which element (token * head_dim + channel) stands at each place: int64 [32 * head_dim].

    Args:
        keys: Keys, otherwise values.
        head_dim: A multiple of 32.
        wide: 16-bit elements, otherwise 8-bit.
    """
    groups = head_dim // GROUP
    if wide:
        shape = (2, groups, 32, 1, 8)
        half, outer, lane, inner, place = _grid(shape)
        group = outer
    else:
        shape = (2, groups // 2, 32, 2, 8)
        half, outer, lane, inner, place = _grid(shape)
        group = outer * 2 + inner
    row = lane // 4 + 8 * (place // 2 % 2)
    column = 2 * (lane % 4) + place % 2 + 8 * (place // 4)
    token, channel = (row, column) if keys else (column, row)
    return ((half * 16 + token) * head_dim + group * GROUP + channel).reshape(-1)


def fragment_exponents(keys: bool, head_dim: int) -> torch.Tensor:
    """Which exponent (token * groups + group) stands at each place: int64 [2 * head_dim]."""
    groups = head_dim // GROUP
    if keys:
        half, row, below, group = _grid((2, 8, 2, groups))
        token = row + 8 * below
    else:
        half, column, group, place = _grid((2, 4, groups, 4))
        token = 2 * column + place % 2 + 8 * (place // 2)
    return ((half * 16 + token) * groups + group).reshape(-1)


def _grid(shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")


def arrange_plain(values: torch.Tensor, keys: bool) -> torch.Tensor:
    """16-bit elements [..., 32, head_dim] to pages [..., 32 * head_dim]."""
    head_dim = values.shape[-1]
    return values.flatten(-2).index_select(-1, _wide_elements(keys, head_dim, values.device))


def restore_plain(pages: torch.Tensor, keys: bool, head_dim: int) -> torch.Tensor:
    """The inverse of `arrange_plain`."""
    values = torch.empty_like(pages)
    values[..., _wide_elements(keys, head_dim, pages.device)] = pages
    return values.view(*values.shape[:-1], GROUP_TOKENS, head_dim)


@lru_cache(maxsize=16)
def _wide_elements(keys: bool, head_dim: int, device: torch.device) -> torch.Tensor:
    return fragment_elements(keys, head_dim, wide=True).to(device)
