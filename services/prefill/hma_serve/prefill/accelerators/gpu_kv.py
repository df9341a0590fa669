"""Packed KV in GPU memory, copied to the host beside the computation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hma_serve import quant
from hma_serve.prefill.accelerators import Completion
from hma_serve.prefill.accelerators.packed_kv import TensorKv
from hma_serve.prefill.decoded_budget import DecodedBudget
from hma_serve.prefill.kv_layout import KvLayout


class Recorded:
    """See `hma_serve.prefill.accelerators.Completion`: what a stream was given so far."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def done(self) -> bool:
        """See `Completion`."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """See `Completion`."""
        self._event.synchronize()


class GpuKv(TensorKv):
    """Packed KV in GPU memory; copies to the host run on a stream of their own.

    Args:
        layout: As of `TensorKv`, like the others.
        codecs: See there.
        tokens: See there.
        head_dim: See there.
        dtype: See there.
        device: See there.
        budget: See there.
        copies: The stream.
    """

    def __init__(
        self,
        layout: KvLayout,
        codecs: Sequence[quant.TorchCodec],
        tokens: int,
        *,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        budget: DecodedBudget,
        copies: torch.cuda.Stream,
    ) -> None:
        super().__init__(layout, codecs, tokens, head_dim=head_dim, dtype=dtype, device=device, budget=budget)
        self._copies = copies

    def copy_out(self, layer: int, role: int, heads: slice, groups: slice, out: NDArray[np.uint8]) -> Completion | None:
        """See `KvStore`."""
        packed = self.packed(layer, role)[heads, groups]
        self._copies.wait_stream(torch.cuda.current_stream(packed.device))
        with torch.cuda.stream(self._copies):
            torch.from_numpy(out).copy_(packed, non_blocking=True)
        packed.record_stream(self._copies)
        return Recorded(self._copies)
