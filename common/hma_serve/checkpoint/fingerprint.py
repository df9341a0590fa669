"""Whether two workers hold the same model, decided in well under a second and without reading 64 GB.

A prefill and a decode worker may only be paired if their KV means the same, so the fingerprint covers what decides KV
and tokens: the parsed configuration, and of every tensor its name, type, shape and content. Small tensors are hashed
whole; of large ones, blocks at fixed strides, first and last included, which tells any two trainings apart though not a
single flipped byte. How the weights are sharded, how config.json is written, and software versions do not matter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hma_serve.checkpoint.random_checkpoint import read_random_seed
from hma_serve.checkpoint.read_config import read_model_config
from hma_serve.checkpoint.stored_tensors import StoredTensor, read_stored_tensors
from hma_serve.core.errors import DataLoss

_SCHEME = "hma-serve checkpoint fingerprint 1"
_WHOLE_BYTES = 64 << 10
_BLOCK_BYTES = 4 << 10
_BLOCKS = 8


def fingerprint(directory: Path) -> str:
    """Identifies a checkpoint's configuration and weights.

    Args:
        directory: The checkpoint.

    Returns:
        64 hexadecimal digits (SHA-256).

    Raises:
        HmaError: Whatever reading the configuration and the headers raises.
    """
    config = dataclasses.asdict(read_model_config(directory))
    digest = hashlib.sha256(_record(_SCHEME, config))
    seed = read_random_seed(directory)
    if seed is not None:
        digest.update(_record("random weights", seed))
        return digest.hexdigest()
    files: dict[Path, BinaryIO] = {}
    try:
        for name, tensor in read_stored_tensors(directory).items():
            digest.update(_record(name, tensor.dtype, tensor.shape))
            if tensor.path not in files:
                files[tensor.path] = tensor.path.open("rb", buffering=0)
            for block in _sampled(files[tensor.path], tensor):
                digest.update(block)
    finally:
        for file in files.values():
            file.close()
    return digest.hexdigest()


def _record(*values: object) -> bytes:
    """An unambiguous line: JSON with sorted keys, so that no two different records share their bytes."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _sampled(file: BinaryIO, tensor: StoredTensor) -> Iterator[bytes]:
    if tensor.nbytes <= _WHOLE_BYTES:
        starts, length = [0], tensor.nbytes
    else:
        last = tensor.nbytes - _BLOCK_BYTES
        starts, length = [last * step // (_BLOCKS - 1) for step in range(_BLOCKS)], _BLOCK_BYTES
    for start in starts:
        file.seek(tensor.offset + start)
        block = file.read(length)
        if len(block) != length:
            raise DataLoss(f"{tensor.path} was truncated while it was read")
        yield block
