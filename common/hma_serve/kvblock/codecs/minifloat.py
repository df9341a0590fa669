"""Floats of 8 and 4 bits: what every code means, and rounding to the nearest code, ties to even, saturating."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


class MiniFloat:
    """A sign, exponent and mantissa format without infinities of its own.

    Args:
        exponent_bits: Width of the exponent.
        mantissa_bits: Width of the mantissa.
        bias: Of the exponent.
        nan: Codes that are not a number, or infinite: never written, and banned on the wire.
        negative_zero: Whether the sign alone is a zero; otherwise negative values that round to 0 get code 0.

    Attributes:
        values: float32 [codes], by code.
        banned: bool [codes], by code.
        largest: The largest value.
        gaps: float32 [codes], by code: to the farther neighbour among the values.
    """

    def __init__(
        self, exponent_bits: int, mantissa_bits: int, bias: int, *, nan: Iterable[int] = (), negative_zero: bool = True
    ) -> None:
        self._sign = 1 << (exponent_bits + mantissa_bits)
        codes = np.arange(2 * self._sign)
        exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
        mantissa = codes & ((1 << mantissa_bits) - 1)
        significand = np.where(exponent > 0, (1 << mantissa_bits) + mantissa, mantissa)
        magnitude = significand * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa_bits)
        self.values: Final = np.where(codes < self._sign, magnitude, -magnitude).astype(np.float32)
        self.banned: Final = np.isin(codes, list(nan))
        self.values[self.banned] = np.nan
        # Of one sign the last ones, if any; or what would be a negative zero, alone.
        self._first_banned = self._sign - int(self.banned[: self._sign].sum())
        self.largest: Final = float(np.nanmax(self.values))
        self._negative_zero = negative_zero
        positive = self.values[: self._sign][~self.banned[: self._sign]]
        between = np.diff(positive)
        farther = np.maximum(np.append(between, 0), np.insert(between, 0, 0))
        self.gaps: Final = np.zeros(len(codes), dtype=np.float32)
        self.gaps[: len(positive)] = self.gaps[self._sign : self._sign + len(positive)] = farther
        middles = (positive[:-1] + positive[1:]) / 2
        # Half-way above an odd code rounds up: searchsorted counts limits below a value, so these move down a little.
        middles[1::2] = np.nextafter(middles[1::2], np.float32(0))
        self.limits: Final = middles

    def has_banned(self, codes: NDArray[np.uint8]) -> bool:
        """Whether any of these is banned; eight-bit codes, at least one.

        By the largest and the smallest, since looking up each of them would take longer than all else that a receiver
        does with a block.
        """
        signed = codes.view(np.int8)
        if self._first_banned == self._sign:
            return bool(self.banned[self._sign]) and int(signed.min()) == -self._sign
        return int(signed.max()) >= self._first_banned or int(codes.max()) >= self._sign + self._first_banned

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Codes of finite values."""
        codes = np.searchsorted(self.limits, np.abs(values)).astype(np.uint8)
        signed = np.signbit(values) if self._negative_zero else (values < 0) & (codes > 0)
        return codes | np.where(signed, self._sign, 0).astype(np.uint8)


E4M3FN: Final = MiniFloat(4, 3, 7, nan=(0x7F, 0xFF))
E4M3FNUZ: Final = MiniFloat(4, 3, 8, nan=(0x80,), negative_zero=False)
E4M3_IEEE: Final = MiniFloat(4, 3, 7, nan=(*range(0x78, 0x80), *range(0xF8, 0x100)))
E2M1: Final = MiniFloat(2, 1, 1)
