"""Whether the router can serve: the answer behind `/ready`."""

from __future__ import annotations

from hma_serve.router.fleet import Fleet
from hma_serve.router.pairing import a_difference, compatible

SETTLE_SECONDS = 5.0
"""A decode worker alone makes the router ready only after so long: at start, prefill workers may still be loading."""


class Readiness:
    """Judges the fleet; stateful only in when it first saw a decode worker.

    Args:
        local_prefill: Whether decode workers alone may serve.
    """

    def __init__(self, *, local_prefill: bool) -> None:
        self._local_prefill = local_prefill
        self._decode_since: float | None = None

    def why_not(self, fleet: Fleet, now: float) -> str | None:
        """The reason why requests cannot be served; None when they can."""
        decodes = [view.info for view in fleet.decodes if view.open]
        if not decodes:
            self._decode_since = None
            return "no decode worker is reachable"
        if self._decode_since is None:
            self._decode_since = now
        prefills = [view.info for view in fleet.prefills if view.open]
        if any(compatible(prefill, decode) for prefill in prefills for decode in decodes):
            return None
        if not self._local_prefill:
            found = a_difference(prefills, decodes)
            return f"no prefill worker is reachable that a decode worker is compatible with{found}"
        if now - self._decode_since < SETTLE_SECONDS:
            return "waiting for a prefill worker before decode workers serve alone"
        return None
