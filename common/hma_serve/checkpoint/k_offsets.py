"""The table of K offsets that a worker is started with: read once, held against its model, or refused by name.

Prefill subtracts the vectors from keys before it packs them, decode adds q.c to the scores of packed keys. Both are
given the same file; its hash is part of the fingerprint under which they pair.
"""

from __future__ import annotations

from pathlib import Path

from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.core.model_config import ModelConfig
from hma_serve.kvblock import MAX_TABLE_BYTES, KvFormatError, OffsetTable

FLAG = "--k-offsets"


def read_k_offsets(
    path: Path | None, model: ModelConfig, *, model_fingerprint: str | None, profile: str | None
) -> OffsetTable:
    """Reads a table made by `hma-serve kv calibrate`; BLOCKING.

    Args:
        path: The file; None: no key has an offset.
        model: What the vectors must fit.
        model_fingerprint: Of the model without offsets; None: it was compared before.
        profile: That computes the keys; None: any, for a worker that only reads them.

    Raises:
        InvalidArgument: There is no such file.
        FailedPrecondition: It is not a table, or one of another model or profile.
    """
    if path is None:
        return OffsetTable({})
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TABLE_BYTES + 1)
    except OSError as exc:
        raise InvalidArgument(f"cannot read the K offsets in {path}: {exc.strerror}", field=FLAG) from exc
    try:
        table = OffsetTable.from_bytes(data, model_fingerprint=model_fingerprint, profile=profile)
        table.check_shape(model.num_layers, model.num_kv_heads, model.head_dim)
    except KvFormatError as exc:
        raise FailedPrecondition(f"the K offsets in {path} cannot be used: {exc.message}", field=FLAG) from exc
    if not table:
        raise FailedPrecondition(f"the table in {path} is empty", field=FLAG)
    return table
