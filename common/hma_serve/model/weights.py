"""Weights read from safetensors one at a time, straight to their device and dtype, when the model asks for them.

A 64 GB checkpoint never lies in host memory: building a `Transformer` pulls one tensor after the other through the
injected linear factory. What is missing, unexpected or misshapen is found from the headers before the first byte of
data is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open

from hma_serve.checkpoint import StoredTensor, read_random_seed, read_stored_tensors
from hma_serve.core.errors import DataLoss, FailedPrecondition
from hma_serve.core.model_config import ModelConfig
from hma_serve.model.random_weights import RandomSource
from hma_serve.model.tensors import HEAD, tensor_shapes

Progress = Callable[[int, int], None]
"""Called after each tensor with the bytes read so far and the bytes there are to read."""

_FLOATING = ("BF16", "F16", "F32", "F64")
_NAMED_IN_ERRORS = 5


class TensorSource(Protocol):
    """Where weights come from, one at a time."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on its device and in its dtype; raises DataLoss when its file is damaged."""
        ...

    def close(self) -> None:
        """Lets go of files. Tensors already read stay valid."""
        ...


class LazyWeights(Mapping[str, torch.Tensor]):
    """A model's tensors by name; each look-up reads the tensor again.

    Use as a context manager, or `close()` it, to let go of the files.

    Args:
        sizes: Bytes to read for each tensor.
        source: Reads them.
        progress: Told what has been read.
    """

    def __init__(self, sizes: Mapping[str, int], source: TensorSource, *, progress: Progress | None = None) -> None:
        self._sizes = dict(sizes)
        self._source = source
        self._progress = progress
        self._read: set[str] = set()
        self._bytes_read = 0
        self._bytes_total = sum(self._sizes.values())

    def __getitem__(self, name: str) -> torch.Tensor:
        """Reads one tensor.

        Raises:
            KeyError: The checkpoint has no such tensor, as for any mapping.
            DataLoss: Its file is damaged.
        """
        size = self._sizes[name]
        tensor = self._source.read(name)
        self._report(name, size)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files. Tensors already read stay valid."""
        self._source.close()

    def _report(self, name: str, nbytes: int) -> None:
        if name not in self._read:
            self._read.add(name)
            self._bytes_read += nbytes
            if self._progress is not None:
                self._progress(self._bytes_read, self._bytes_total)


class _StoredSource:
    """Tensors in safetensors files, which are opened when they are first needed."""

    def __init__(self, tensors: Mapping[str, StoredTensor], device: torch.device, dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._device = device
        self._dtype = dtype
        self._files: dict[Path, Any] = {}

    def read(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        try:
            if stored.path not in self._files:
                self._files[stored.path] = safe_open(stored.path, framework="pt", device=str(self._device))
            tensor: torch.Tensor = self._files[stored.path].get_tensor(name).to(self._dtype)
        except (SafetensorError, OSError) as error:
            raise DataLoss(f"{stored.path}: cannot read {name}: {error}") from error
        return tensor

    def close(self) -> None:
        self._files.clear()


def open_weights(
    directory: Path,
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
    with_head: bool = True,
) -> LazyWeights:
    """Checks a checkpoint's tensors against the configuration and opens them for reading.

    Args:
        directory: The checkpoint, or a shape with random weights.
        config: Its configuration.
        device: Where tensors go; they are read straight to it.
        dtype: What tensors are converted to.
        progress: Told after each tensor how many bytes are done, out of how many.
        with_head: False leaves out the final norm and the output head, as prefill does.

    Returns:
        The tensors that `Transformer` asks for.

    Raises:
        NotFound: There are no weights, or a shard is missing.
        DataLoss: A file is truncated or damaged.
        FailedPrecondition: Tensors are missing, unexpected, misshapen or not floating point.
    """
    wanted = tensor_shapes(config, with_head=with_head)
    device, seed = torch.device(device), read_random_seed(directory)
    if seed is not None:
        sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in wanted.items()}
        return LazyWeights(sizes, RandomSource(wanted, config, seed, device, dtype), progress=progress)
    stored = read_stored_tensors(directory)
    _check(directory, stored, config)
    sizes = {name: stored[name].nbytes for name in wanted}
    return LazyWeights(sizes, _StoredSource(stored, device, dtype), progress=progress)


def _check(directory: Path, stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    expected = tensor_shapes(config)
    if missing := [name for name in expected if name not in stored]:
        raise FailedPrecondition(f"{directory} does not fit its config.json: missing {_listed(missing)}")
    # Some tied checkpoints store their head all the same; it is the embedding again.
    if unexpected := [name for name in stored if name not in expected and name != HEAD]:
        raise FailedPrecondition(f"{directory} does not fit its config.json: unexpected {_listed(unexpected)}")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            found = list(stored[name].shape)
            raise FailedPrecondition(f"{directory} does not fit its config.json: {name} is {found}, not {list(shape)}")
        if stored[name].dtype not in _FLOATING:
            raise FailedPrecondition(f"{directory}: {name} holds {stored[name].dtype}, not floating-point weights")


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED_IN_ERRORS
    return ", ".join(names[:_NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")
