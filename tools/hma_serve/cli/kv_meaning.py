"""Whether a payload means the values it was made from, judged by the codec's own steps.

A format that fixes decoding leaves rounding to the producer: to nearest, away, or cut off. What every honest rounding
has in common is that a value becomes one of the two code values beside it. So each decoded value must lie within one
step of its input, where a step is the distance of neighbouring code values under the scale that the value's own group
calls for; a producer that chose a coarser scale gets the steps of that scale, up to twice as large. One measure over
everything would not do: what is lost in a small group would drown in the steps of a large one.

Over the whole payload the errors' root mean square, in steps, must also be that of some rounding: 0.29 to nearest, 0.58
cut off.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from hma_serve.kvblock import Codec, Payload

COARSER: Final = 2.0
"""Steps may be this many times those of the reference encoder's scales."""
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
    reference = np.ascontiguousarray(packer.encode(values))
    steps = packer.steps(reference, *values.shape).astype(np.float64)
    best = np.abs(packer.decode(reference, *values.shape).astype(np.float64) - values)
    errors = np.abs(packer.decode(payload, *values.shape).astype(np.float64) - values)
    allowed = np.maximum(best, np.clip(packer.steps(payload, *values.shape), steps, COARSER * steps))
    if packer.rounds:
        allowed += _SLACK * np.abs(values) + _FLUSHED
    return _too_far(errors, allowed, steps, values) or _too_coarse(errors, best, steps)


def _too_far(
    errors: NDArray[np.float64], allowed: NDArray[np.float64], steps: NDArray[np.float64], values: NDArray[np.float32]
) -> str:
    wrong = errors > allowed
    if not wrong.any():
        return ""
    ratio = np.where(wrong, errors / np.maximum(allowed, np.finfo(np.float64).tiny), 0)
    worst = tuple(int(index) for index in np.unravel_index(ratio.argmax(), ratio.shape))
    return (
        f"meaning: {int(wrong.sum())} of {wrong.size} values are more than a step from their input, first at "
        f"(head, token, channel) {tuple(int(index) for index in np.argwhere(wrong)[0])}; worst, at {worst}: "
        f"{errors[worst]:g} from {values[worst]:g}, where a step is {steps[worst]:g}"
    )


def _too_coarse(errors: NDArray[np.float64], best: NDArray[np.float64], steps: NDArray[np.float64]) -> str:
    """What saturates costs the reference as much, so only what is beyond its error counts there."""
    inside = (steps > _FLUSHED) & (best <= steps)
    if not inside.any():
        return ""
    rms = float(np.sqrt(np.square(errors[inside] / steps[inside]).mean()))
    if rms <= MOST_RMS:
        return ""
    return f"meaning: the errors' root mean square is {rms:.3g} steps; no rounding makes more than {MOST_RMS:g}"
