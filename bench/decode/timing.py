"""How a GPU is timed: replays of one captured graph, over buffers that its caches cannot hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch

Work = Callable[[], object]

CHAIN = 36
"""Layers of one after the other in a graph: as many as a model has, so that what a graph's begin and end cost is shared
as it is in a step."""

_COPY_BYTES = 1 << 30

_WARM_US = 100e3
"""Of replays before those that count, so that clocks have settled."""


def microseconds(works: Sequence[Work], *, repeats: int = 15) -> float:
    """Of one work: median over replays of a graph of all of them, which should touch different memory."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works[:2]:
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    for _ in range(math.ceil(_WARM_US / _replay(graph))):
        graph.replay()
    return statistics.median(_replay(graph) for _ in range(repeats)) / len(works)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")  # type: ignore[no-untyped-call]
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def copy_bandwidth() -> float:
    """Bytes read and written per second by the fastest of torch's copies."""
    source = torch.randn(_COPY_BYTES // 2, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copies: list[Work] = [lambda: target.copy_(source), lambda: torch.mul(source, 1.0, out=target)]
    return 2 * _COPY_BYTES / min(microseconds([copy] * 4) for copy in copies) * 1e6
