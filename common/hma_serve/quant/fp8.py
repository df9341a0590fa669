"""`fp8_e4m3fn`, `fp8_e4m3fnuz`, `fp8_e4m3_ieee` on tensors, with scales per token and head, per head, or one.

The IEEE reading has the codes of E4M3FN up to 240, which are all that may travel, so it is E4M3FN clamped there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from hma_serve.quant.base import GROUP_TOKENS, Rounding
from hma_serve.quant.scaled import SMALLEST_SCALE, ScaledCodec, divide, from_bytes, to_bytes

if TYPE_CHECKING:
    from torch import Tensor


class _Reading(NamedTuple):
    dtype: torch.dtype
    largest: float


_READINGS: Final = {
    "fp8_e4m3fn": _Reading(torch.float8_e4m3fn, 448.0),
    "fp8_e4m3fnuz": _Reading(torch.float8_e4m3fnuz, 240.0),
    "fp8_e4m3_ieee": _Reading(torch.float8_e4m3fn, 240.0),
}
_SUFFIXES: Final = ("", ".head", ".tensor")


class Fp8(ScaledCodec):
    """32 x head_dim bytes, then one float32 scale per token, or one in all.

    Args:
        reading: What the eight bits mean.
        suffix: What a scale covers: nothing (a token of a head), `.head` or `.tensor`.
    """

    element_bits = 8
    channels = 1

    def __init__(self, reading: str, suffix: str) -> None:
        self.name = reading + suffix
        self._dtype, self._largest = _READINGS[reading]
        self._scales = GROUP_TOKENS if not suffix else 1
        self._covered = (-2, -1) if suffix == ".head" else (-3, -2, -1)

    def scale_bytes(self, head_dim: int) -> int:
        """One float32 per token, or one."""
        del head_dim
        return 4 * self._scales

    def head_dim_of(self, unit_bytes: int) -> int:
        """See `ScaledCodec`."""
        return (unit_bytes - 4 * self._scales) // GROUP_TOKENS

    def encode(self, x: Tensor, rounding: Rounding = "nearest_even", *, scale: Tensor | float | None = None) -> Tensor:
        """As `TorchCodec.encode`.

        Args:
            x: [..., heads, tokens, head_dim] for `.tensor`, otherwise as ever.
            rounding: Nearest even.
            scale: Calibrated multiplier for `.head` and `.tensor`, one, or [..., heads]. None: from the largest of `x`,
                which is right only if that is all the granularity covers.
        """
        if self._scales > 1:
            return super().encode(x, rounding)
        units = self._units(x)
        self._check(x.shape[-1], rounding)
        if scale is None:
            axes = self._covered[-x.dim() :]
            scale = self._scale(x.float().abs().amax(axes)) if x.numel() else 1.0
            if isinstance(scale, torch.Tensor) and len(axes) == 3:
                scale = scale.unsqueeze(-1)
        lead = x.shape[:-2]
        each = torch.as_tensor(scale, dtype=torch.float32, device=x.device).expand(lead)
        scales = each.reshape(-1, 1).repeat_interleave(x.shape[-2] // GROUP_TOKENS, dim=0)
        codes = self._codes(units.float(), scales.unsqueeze(2))
        return self._shaped(x, self._join(codes, to_bytes(scales)))

    def _pack(self, units: Tensor) -> tuple[Tensor, Tensor]:
        scales = self._scale(units.abs().amax(-1))
        return self._codes(units, scales.unsqueeze(2)), to_bytes(scales)

    def _scale(self, largest: Tensor) -> Tensor:
        return divide(largest, self._largest).clamp(min=SMALLEST_SCALE)

    def _codes(self, units: Tensor, scales: Tensor) -> Tensor:
        return (units / scales).clamp(-self._largest, self._largest).to(self._dtype).view(torch.uint8)

    def _values(self, elements: Tensor, scales: Tensor, head_dim: int) -> Tensor:
        values = elements.view(self._dtype).float().view(-1, self._scales, GROUP_TOKENS * head_dim // self._scales)
        return values.mul_(from_bytes(scales, torch.float32).unsqueeze(2)).view(-1, head_dim)


def all_fp8() -> tuple[Fp8, ...]:
    """Every reading with every granularity."""
    return tuple(Fp8(reading, suffix) for reading in _READINGS for suffix in _SUFFIXES)
