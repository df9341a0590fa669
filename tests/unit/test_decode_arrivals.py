"""KV that arrives waits its turn between steps, in its order; everything else is taken at once."""

from __future__ import annotations

from hma_serve.decode.arrivals import Arrivals
from hma_serve.internal.v1 import decode_engine_pb2 as pb


class Clock:
    """Seconds that pass when a message is taken."""

    def __init__(self, cost: float) -> None:
        self.now = 100.0
        self.cost = cost

    def __call__(self) -> float:
        return self.now

    def spend(self) -> None:
        self.now += self.cost


def blocks(count: int, push: int = 1) -> list[pb.DecodeEngineCommand]:
    return [pb.DecodeEngineCommand(block=pb.DecodeBlock(push=push, slot=slot)) for slot in range(count)]


def taken(arrivals: Arrivals, clock: Clock, step_seconds: float | None) -> list[pb.DecodeEngineCommand]:
    found = []
    for command in arrivals.take(step_seconds):
        clock.spend()
        found.append(command)
    return found


def test_a_burst_is_spread_over_steps_in_its_order() -> None:
    clock = Clock(cost=0.0004)
    arrivals = Arrivals(0.15, clock)
    attach = pb.DecodeEngineCommand(attach=pb.DecodeAttach(push=1))
    end = pb.DecodeEngineCommand(end_push=pb.DecodeEndPush(push=1))
    burst = [attach, *blocks(16), end]
    assert list(arrivals.sort(burst)) == []
    turns = []
    while len(arrivals):
        turns.append(taken(arrivals, clock, 0.008))
        assert len(turns[-1]) <= 4  # 0.4 ms each, 1.2 ms a step
    assert [command for turn in turns for command in turn] == burst
    assert len(turns) > 3


def test_one_message_is_taken_however_slow_it_is() -> None:
    clock = Clock(cost=1.0)
    arrivals = Arrivals(0.15, clock)
    list(arrivals.sort(blocks(2)))
    assert len(taken(arrivals, clock, 0.001)) == 1
    assert len(arrivals) == 1


def test_without_a_batch_nothing_waits() -> None:
    clock = Clock(cost=1.0)
    arrivals = Arrivals(0.15, clock)
    list(arrivals.sort(blocks(16)))
    assert len(taken(arrivals, clock, None)) == 16
    assert not len(arrivals)


def test_a_cancellation_overtakes_blocks() -> None:
    arrivals = Arrivals(0.15, Clock(cost=1.0))
    close = pb.DecodeEngineCommand(close=pb.DecodeClose(stream=7))
    assert list(arrivals.sort([*blocks(3), close])) == [close]
    assert len(arrivals) == 3
