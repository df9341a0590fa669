"""How fast a line moves, learnt from the moments at which its first got room.

A line that stands for the first time has no pace: nobody is refused for a guess. One that forms again begins with the
pace of the last, for a few minutes and as long as the same workers are there, until it has one of its own.

Rooms come up in bursts, because requests of one batch often end together. The mean from the line's beginning on is what
is to be expected at the end of a burst, but too slow in the middle of one. The mean from the first room on is exact
when a burst begins and too fast otherwise: the next line begins with that, and those who wait already are judged by it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

# Rooms after which a line's pace is believed, and from how many of the last it is taken: it takes several bursts to see
# how fast they come.
_KNOWN_AFTER = 8
_TAKEN_FROM = 1024
_KEPT_SECONDS = 180.0
# Those who wait are given up only if it cannot be chance: the time of n rooms that come at random strays by 1/√n of
# itself, and so many times that is out of the question. Nor before the pace was seen for a good part of what is left,
# nor while the later half of the rooms came faster than the earlier one by so much: what ran before the line formed may
# take longer than what waits in it.
_DEVIATIONS = 3.0
_FORESIGHT = 3.0
_STEADY = 1.5


@dataclass(frozen=True, slots=True)
class Forecast:
    """What can be said of a line whatever chance does.

    Attributes:
        seconds: To a room, at least.
        horizon: Seconds for which it may be said.
    """

    seconds: float
    horizon: float

    def in_vain(self, ahead: int, left: float) -> bool:
        """Whether so many cannot have got room in the seconds that are left."""
        return left <= self.horizon and (ahead - _DEVIATIONS * math.sqrt(ahead)) * self.seconds > left


class LinePace:
    """One line's; times are seconds of any one clock."""

    def __init__(self) -> None:
        self._since = 0.0
        self._rooms: deque[float] = deque()
        self._last = 0.0
        self._learnt = 0.0
        self._workers: frozenset[str] = frozenset()

    def begin(self, now: float, workers: frozenset[str]) -> None:
        """The line formed; `workers` are those that give room."""
        self._since = now
        self._rooms.clear()
        self.under(workers, now)

    def end(self, now: float) -> None:
        """Nobody waits any more."""
        if least := self._least():
            self._last, self._learnt = least, now

    def under(self, workers: frozenset[str], now: float) -> None:
        """Forgets the last line's pace in time, and everything when the workers are others than before."""
        if workers != self._workers:
            self._workers, self._since, self._last = workers, now, 0.0
            self._rooms.clear()
        elif now - self._learnt > _KEPT_SECONDS:
            self._last = 0.0

    def moved(self, now: float) -> None:
        """The first got room."""
        self._rooms.append(now)
        if len(self._rooms) > _TAKEN_FROM:
            self._since = self._rooms.popleft()

    def wait(self, ahead: int) -> float:
        """Seconds until so many got room; 0 while the pace is not known."""
        if self._known:
            return ahead * (self._rooms[-1] - self._since) / len(self._rooms)
        return ahead * self._last

    def guess(self, ahead: int, now: float) -> float:
        """As `wait`, but while the pace is not known, as if the next room came up this moment."""
        return self.wait(ahead) or ahead * (now - self._since) / (len(self._rooms) + 1)

    def forecast(self) -> Forecast | None:
        """What the pace says of those who wait; None while it is not known, or the line moves ever faster."""
        if not self._known:
            return None
        earlier, later = self._halves()
        if earlier > _STEADY * later:
            return None
        return Forecast(self._least() / (1 + _DEVIATIONS / math.sqrt(len(self._rooms))), _FORESIGHT * (earlier + later))

    @property
    def _known(self) -> bool:
        return len(self._rooms) >= _KNOWN_AFTER

    def _least(self) -> float:
        """Seconds to a room from the first on, or of the later half where that is faster; 0 while it is not known."""
        if not self._known:
            return 0.0
        earlier, later = self._halves()
        rooms = len(self._rooms)
        return min((earlier + later) / rooms, later / (rooms - rooms // 2))

    def _halves(self) -> tuple[float, float]:
        """Seconds from the first room to the middle one, and from there to the last."""
        middle = self._rooms[len(self._rooms) // 2]
        return middle - self._rooms[0], self._rooms[-1] - middle
