"""Spans of a request's pipeline: what was computed when, and when it left.

One pair of spans per group of layers, not per layer: a prompt of 64 layers and eight chunks would be a thousand spans.
"""

from __future__ import annotations

from dataclasses import dataclass

from hma_serve.internal.v1 import prefill_engine_pb2 as engine_pb
from hma_serve.telemetry import spans
from hma_serve.telemetry.tracing import Trace

GROUPS = 4
"""Groups that the layers of one chunk are told in."""


@dataclass(slots=True)
class _Open:
    first_layer: int
    compute_start_ns: int
    send_start_ns: int
    bytes: int = 0


class LayerSpans:
    """Records spans as layers leave.

    Args:
        trace: Of the request.
        layers: Of the model.
    """

    def __init__(self, trace: Trace, layers: int) -> None:
        self._trace = trace
        self._layers = layers
        self._group = -(-layers // GROUPS)
        self._open: _Open | None = None

    def left(self, layer: engine_pb.PrefillLayerDone, send_start_ns: int, send_end_ns: int, sent_bytes: int) -> None:
        """A layer has left; layers of a chunk come in order. Times are CLOCK_MONOTONIC."""
        if self._open is None:
            self._open = _Open(layer.layer, layer.started_ns, send_start_ns)
        group = self._open
        group.bytes += sent_bytes
        if (layer.layer + 1) % self._group and layer.layer + 1 != self._layers:
            return
        self._open = None
        place = {
            "layer_first": group.first_layer,
            "layer_last": layer.layer,
            "chunk_start": layer.chunk_start,
            "chunk_tokens": layer.chunk_tokens,
        }
        self._trace.record(spans.PREFILL_COMPUTE, group.compute_start_ns, layer.finished_ns, **place)
        self._trace.record(spans.KV_SEND, group.send_start_ns, send_end_ns, bytes=group.bytes, **place)
