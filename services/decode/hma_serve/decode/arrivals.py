"""In which order the engine takes commands: what concerns arriving KV waits its turn.

Storing a block takes a while, and blocks come in bursts as large as the arena. So messages of KV streams keep their own
queue, in their order, and while a batch runs only a share of a step's time goes to them between two steps. All other
commands, cancellation above all, are taken at once: a block whose request is gone is dropped when its turn comes.

Bounded by the arena: each block in the queue holds one of its slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from hma_serve.internal.v1 import decode_engine_pb2 as pb

_OF_STREAMS = frozenset({"attach", "block", "end_push", "detach"})


class Arrivals:
    """The queue.

    Args:
        share: Of a step's mean time that storing may take between two steps; at least one message is taken.
        clock: Monotonic seconds.
    """

    def __init__(self, share: float, clock: Callable[[], float]) -> None:
        self._share = share
        self._clock = clock
        self._waiting: deque[pb.DecodeEngineCommand] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def sort(self, commands: Iterable[pb.DecodeEngineCommand]) -> Iterator[pb.DecodeEngineCommand]:
        """Yields what is to be taken at once, and keeps the rest for `take`."""
        for command in commands:
            if command.WhichOneof("command") in _OF_STREAMS:
                self._waiting.append(command)
            else:
                yield command

    def take(self, step_seconds: float | None) -> Iterator[pb.DecodeEngineCommand]:
        """Yields messages of KV streams in their order.

        Args:
            step_seconds: Mean duration of a step; None: no batch waits, so all are yielded.
        """
        end = None if step_seconds is None else self._clock() + self._share * step_seconds
        while self._waiting:
            yield self._waiting.popleft()
            if end is not None and self._clock() > end:
                return
