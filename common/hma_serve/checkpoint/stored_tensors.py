"""Which tensor lies where in a checkpoint's safetensors files, learned from their headers alone.

Headers come from strangers, so sizes are capped before anything is allocated and every offset is checked against the
file's real length: a download that broke off is found here, before gigabytes are read, and is named as such.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hma_serve.checkpoint.read_config import read_json
from hma_serve.core.errors import DataLoss, InvalidArgument, NotFound

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PREFIX = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_ELEMENT_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk.

    Attributes:
        path: The file that holds it.
        dtype: The safetensors name of its element type, such as BF16.
        shape: Its dimensions.
        offset: First byte of its data in the file.
        nbytes: Length of its data in bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Lists every tensor of a checkpoint: one model.safetensors, or the shards its index names.

    Args:
        directory: The checkpoint.

    Returns:
        Tensors by name, sorted by name.

    Raises:
        NotFound: There are no weights, or a shard is missing.
        DataLoss: A file is truncated or its header is damaged.
        InvalidArgument: The index or a header contradicts itself.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(directory):
        for name, tensor in _read_header(path).items():
            if name in tensors:
                raise InvalidArgument(f"tensor {name} is in both {tensors[name].path.name} and {path.name}")
            tensors[name] = tensor
    return dict(sorted(tensors.items()))


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.is_file():
        if not (directory / _SINGLE).is_file():
            raise NotFound(f"{directory} has no weights: neither {_SINGLE} nor {_INDEX}")
        return [directory / _SINGLE]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidArgument(f"{index}: weight_map must be a non-empty object")
    names = set(weight_map.values())
    for name in names:
        # A shard's name must not lead out of the directory.
        if not isinstance(name, str) or Path(name).name != name:
            raise InvalidArgument(f"{index}: {name!r} is not a plain file name")
    return [directory / name for name in sorted(names)]


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_PREFIX.size)
            length = _PREFIX.unpack(prefix)[0] if len(prefix) == _PREFIX.size else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - _PREFIX.size):
                raise DataLoss(f"{path} is truncated or not a safetensors file: its header does not fit")
            header = file.read(length)
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}") from error
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise DataLoss(f"{path}: the safetensors header is damaged") from error
    if not isinstance(entries, dict):
        raise DataLoss(f"{path}: the safetensors header is not an object")
    entries.pop("__metadata__", None)
    data = _PREFIX.size + length
    return {name: _stored_tensor(path, name, entry, data, size) for name, entry in entries.items()}


def _stored_tensor(path: Path, name: str, entry: Any, data: int, size: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        nbytes = math.prod(shape) * _ELEMENT_BITS[dtype] // 8
        consistent = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) and end - begin == nbytes
    except (KeyError, TypeError, ValueError) as error:
        raise DataLoss(f"{path}: the header's entry for {name} is damaged") from error
    if not consistent:
        raise DataLoss(f"{path}: the header's entry for {name} contradicts itself")
    if data + end > size:
        raise DataLoss(f"{path} is truncated: {name} ends at byte {data + end} of {size}")
    return StoredTensor(path, dtype, shape, data + begin, nbytes)
