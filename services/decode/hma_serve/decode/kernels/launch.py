"""What a launch says beside its arguments, where the target knows it: Triton refuses options of another vendor's."""

from __future__ import annotations

from typing import Any


def nvidia(ptx: bool, *, early: bool = True, registers: int | None = None) -> dict[str, Any]:
    """Options of a launch.

    Args:
        ptx: The kernel runs as PTX; otherwise, on another vendor's GPU or in the interpreter, there are none.
        early: Launch while the kernel before still runs (programmatic dependent launch); it must wait for that itself.
        registers: Of a thread, at most.
    """
    if not ptx:
        return {}
    return {"launch_pdl": early} | ({} if registers is None else {"maxnreg": registers})
