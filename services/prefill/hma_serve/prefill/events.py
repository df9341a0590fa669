"""A record of when each layer was computed and when it left, to prove the pipeline's order and to draw it.

Off by default and then free. One JSON object a line; times are nanoseconds of CLOCK_MONOTONIC, which engine and front
share, so one file orders both.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from hma_serve.internal.v1 import prefill_engine_pb2 as pb

MAX_EVENTS = 1_000_000
"""Lines after which recording stops, so that a forgotten flag does not fill a disk."""

_log = logging.getLogger(__name__)


class LayerEvents:
    """Appends to `path`; None records nothing."""

    def __init__(self, path: Path | None, *, limit: int = MAX_EVENTS) -> None:
        self._file: TextIO | None = None if path is None else path.open("a", encoding="utf-8", buffering=1)
        self._left = limit

    def layer_left(self, request_id: str, layer: pb.PrefillLayerDone) -> None:
        """Records a layer of a chunk whose last block was handed to the transport just now."""
        if self._file is None:
            return
        if self._left == 0:
            _log.warning("the event file is full; recording ends")
            self.close()
            return
        self._left -= 1
        event = {
            "request": request_id,
            "layer": layer.layer,
            "chunk_start": layer.chunk_start,
            "chunk_tokens": layer.chunk_tokens,
            "compute_started_ns": layer.started_ns,
            "compute_finished_ns": layer.finished_ns,
            "computed_ns": layer.computed_ns,
            "left_ns": time.monotonic_ns(),
        }
        self._file.write(json.dumps(event) + "\n")

    def close(self) -> None:
        """Ends recording; idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
