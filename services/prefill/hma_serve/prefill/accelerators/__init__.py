"""The one protocol behind which devices differ, and how a device's module is found.

An accelerator owns its weights and the KV of running requests in its own packed form, and computes one layer for some
tokens at a time; everything else (order, cancellation, slots, the wire) is the engine's. A mesh of chips fits as well:
KV is read per range of heads, in any order. Vendors register a factory under the entry point group
`hma_serve.accelerators`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.model_config import ModelConfig
from hma_serve.kvblock import OffsetTable
from hma_serve.model import Progress
from hma_serve.prefill.accelerators.sharding import WHOLE, Shard
from hma_serve.prefill.profiles import Profile

ENTRY_POINTS = "hma_serve.accelerators"


class Completion(Protocol):
    """Work that a device was given and may not have done yet."""

    def done(self) -> bool:
        """Whether it is done; never waits."""
        ...

    def wait(self) -> None:
        """Returns when it is done."""
        ...


class KvStore(Protocol):
    """The packed KV of one request, on the accelerator or in its host's memory.

    Dropping the last reference frees it, once copies that were begun are done.
    """

    def copy_out(self, layer: int, role: int, heads: slice, groups: slice, out: NDArray[np.uint8]) -> Completion | None:
        """Copies native bytes into `out` [heads, groups, group bytes]; `run_layer` was called for these groups.

        A device with a queue of its own only begins here: behind the layer's computation and beside the next one's, on
        a stream of its own. The caller leaves `out` alone until the copy is done.

        Returns:
            The copy under way; None when the bytes are there already.
        """
        ...

    def copy_in(self, layer: int, role: int, heads: slice, groups: slice, packed: NDArray[np.uint8]) -> None:
        """Takes over native bytes [heads, groups, group bytes] that `copy_out` once gave for the same tokens.

        `packed` may change when this returns; what `run_layer` attends to from then on includes these groups.
        """
        ...


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one request within a batch.

    Attributes:
        start: Position of the first one in its prompt; a multiple of 32.
        tokens: How many; a multiple of 32.
        store: The request's KV, complete up to `start` for the layer at hand.
    """

    start: int
    tokens: int
    store: KvStore


class Accelerator(Protocol):
    """Computes layers. Single-threaded: the engine's loop is the only caller.

    A token's KV depends on the tokens before it alone: neither on how the prompt was cut into segments (whole groups of
    32 tokens) nor on what else was in the batch.
    """

    @property
    def device(self) -> str:
        """Name of the hardware, for people."""
        ...

    @property
    def kv_tokens(self) -> int | None:
        """Tokens of running prompts whose packed KV it has room for; None: `--kv-capacity-tokens` alone says."""
        ...

    def pin(self, memory: memoryview) -> None:
        """Makes host memory, which stays mapped as long as the accelerator lives, fast to copy to and from."""
        ...

    def fence(self) -> Completion | None:
        """All that `run_layer` was called for so far; None when it has computed everything before it returned."""
        ...

    def new_store(self, tokens: int) -> KvStore:
        """Memory for the packed KV of `tokens` tokens, all layers."""
        ...

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The residual stream [tokens, hidden] that enters layer 0."""
        ...

    def run_layer(self, layer: int, hidden: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """Runs one layer and leaves the segments' K and V of that layer in their stores.

        Args:
            layer: Which one; a segment passes through them in order.
            hidden: [tokens of all segments, hidden], as `embed` or the previous layer returned it.
            segments: What the rows are, in order.

        Returns:
            The residual stream after the layer.
        """
        ...


@dataclass(frozen=True, slots=True)
class AcceleratorSpec:
    """What a factory needs.

    Attributes:
        checkpoint: Directory of the weights.
        model: Its configuration.
        profile: The arithmetic to follow.
        progress: Told while the weights load how many bytes are done, out of how many.
        k_offsets: Subtracted from keys before they are packed, in float32. What attends to packed keys alone needs to
            know no more: softmax does not notice what all its keys have lost.
        shard: The share of the model to hold.
        decoded_bytes: Memory that decoded copies of running requests' KV may take beside the packed bytes; None: as
            suits the device.
    """

    checkpoint: Path
    model: ModelConfig
    profile: Profile
    progress: Progress | None = None
    k_offsets: OffsetTable | None = None
    shard: Shard = WHOLE
    decoded_bytes: int | None = None


AcceleratorFactory = Callable[[AcceleratorSpec], Accelerator]
"""Loads the weights. Raises FailedPrecondition when the device cannot follow the profile or is not there.

The same for K offsets that it cannot subtract.
"""


def _load_cpu(spec: AcceleratorSpec) -> Accelerator:
    from hma_serve.prefill.accelerators.cpu import CpuAccelerator

    return CpuAccelerator(spec)


def _load_cuda(spec: AcceleratorSpec) -> Accelerator:
    from hma_serve.prefill.accelerators.cuda import CudaAccelerator

    return CudaAccelerator(spec)


def _load_tenstorrent(spec: AcceleratorSpec) -> Accelerator:
    from hma_serve.prefill.accelerators.tenstorrent import TenstorrentAccelerator

    return TenstorrentAccelerator(spec)


_BUILT_IN: dict[str, AcceleratorFactory] = {
    "cpu": _load_cpu,
    "cuda": _load_cuda,
    "rocm": _load_cuda,  # ROCm's torch speaks of its GPUs as CUDA's does
    "tenstorrent": _load_tenstorrent,
}


def open_accelerator(kind: str, spec: AcceleratorSpec) -> Accelerator:
    """Loads the model onto the accelerator of that kind.

    Raises:
        InvalidArgument: No such kind is built in or installed.
    """
    factory = _BUILT_IN.get(kind)
    if factory is not None:
        return factory(spec)
    installed = entry_points(group=ENTRY_POINTS)
    if kind not in installed.names:
        known = sorted({*_BUILT_IN, *installed.names})
        raise InvalidArgument(f"unknown accelerator {kind!r}; installed: {', '.join(known)}", field="--device")
    plugin: AcceleratorFactory = installed[kind].load()
    return plugin(spec)
