"""Loading as the log shows it: whoever starts a 60 GB model wants to see that it moves, and how fast it went.

Driven by the loader's progress alone, so a load that hangs says nothing more, which is the truth.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hma_serve.core.memory_plan import readable_bytes

INTERVAL = 2.0
"""Seconds between two lines, and after which the first comes."""


class LoadLog:
    """A `Progress` for `open_weights` that logs at most every two seconds, and once at the end.

    Args:
        log: Where lines go, at level INFO.
        clock: Monotonic seconds.
    """

    def __init__(self, log: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._began = self._said = clock()

    def __call__(self, done: int, total: int) -> None:
        """Takes the bytes read so far and the bytes there are to read."""
        now = self._clock()
        if done == total:
            self._log.info("loaded %s of weights in %.1f s", readable_bytes(total), now - self._began)
        elif now - self._said >= INTERVAL:
            self._said = now
            self._log.info("loading weights %d %% of %s", 100 * done // total, readable_bytes(total))
