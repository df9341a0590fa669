"""Whether a payload means the values it was made from, judged by the codec's own steps.

A format that fixes decoding leaves rounding to the producer: to nearest, away, or cut off. What every honest rounding
has in common is that a value becomes one of the two code values beside it. So each decoded value must lie within one
step of its input, where a step is the distance of neighbouring code values under the scale that the value's own group
calls for. A producer that chose a scale twice as coarse still passes if it rounds to nearest. One measure over
everything would not do: what is lost in a small group would drown in the steps of a large one.

Scales that cover a head or a tensor are calibrated before the values are known, so theirs may be coarser.

Over the whole payload the errors' root mean square, in steps, must also be that of some rounding: 0.29 to nearest, 0.58
cut off.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from hma_serve.kvblock import Codec, Payload

COARSER: Final = 16.0
"""Calibrated scales may be this many times what the values call for."""
MOST_RMS: Final = 0.75
"""Steps; cutting off makes 0.58 of evenly spread values."""
_SLACK: Final = 2.0**-20
"""Of a value: scales are rounded to float32 before or after they are used."""
_FLUSHED: Final = 2.0**-126


def compare(packer: Codec, payload: Payload, values: NDArray[np.float32]) -> str:
    """Says what is wrong with a payload whose size and codes are right, or returns an empty string.

    Args:
        packer: Its codec.
        payload: A producer's bytes.
        values: What was packed, finite, float32 [heads, tokens, head_dim].

    Raises:
        ValueError: The codec cannot carry the values.
    """
    reference, shape = np.ascontiguousarray(packer.encode(values)), values.shape
    steps = packer.steps(reference, *shape).astype(np.float64)
    best = np.abs(packer.decode(reference, *shape).astype(np.float64) - values)
    errors = np.abs(packer.decode(payload, *shape).astype(np.float64) - values)
    grid = steps
    if packer.shared_bytes:
        grid = np.clip(packer.steps(payload, *shape).astype(np.float64), steps, COARSER * steps)
    allowed = np.maximum.reduce([best, steps, grid / 2])
    if packer.rounds:
        allowed += _SLACK * np.abs(values) + _FLUSHED
    return _too_far(errors, allowed, steps, values) or _too_coarse(errors, best, grid)


def _too_far(
    errors: NDArray[np.float64], allowed: NDArray[np.float64], steps: NDArray[np.float64], values: NDArray[np.float32]
) -> str:
    wrong = errors > allowed
    if not wrong.any():
        return ""
    excess = np.where(wrong, errors / np.where(allowed > 0, allowed, 1), 0)
    worst = tuple(int(index) for index in np.unravel_index(excess.argmax(), excess.shape))
    return (
        f"meaning: {int(wrong.sum())} of {wrong.size} values are more than a step from their input, first at "
        f"(head, token, channel) {tuple(int(index) for index in np.argwhere(wrong)[0])}; worst, at {worst}: "
        f"{errors[worst]:g} from {values[worst]:g}, where a step is {steps[worst]:g}"
    )


def _too_coarse(errors: NDArray[np.float64], best: NDArray[np.float64], grid: NDArray[np.float64]) -> str:
    """Where even the reference saturates, nothing follows."""
    inside = (grid > _FLUSHED) & (best <= grid)
    if not inside.any():
        return ""
    rms = float(np.sqrt(np.square(errors[inside] / grid[inside]).mean()))
    if rms <= MOST_RMS:
        return ""
    return f"meaning: the errors' root mean square is {rms:.3g} steps; no rounding makes more than {MOST_RMS:g}"
