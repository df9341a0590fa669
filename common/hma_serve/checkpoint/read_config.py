"""The two small JSON files beside the weights: what the model is, and which tokens end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hma_serve.core.errors import InvalidArgument, NotFound
from hma_serve.core.model_config import ModelConfig

_MAX_JSON_BYTES = 16 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of at most 16 MiB.

    Raises:
        NotFound: The file is missing or unreadable.
        InvalidArgument: It is oversized, or not a JSON object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}") from error
    if len(content) > _MAX_JSON_BYTES:
        raise InvalidArgument(f"{path} is larger than {_MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path} must contain a JSON object")
    return value


def read_model_config(directory: Path) -> ModelConfig:
    """Reads and validates config.json.

    Raises:
        NotFound: There is no config.json.
        InvalidArgument: It is malformed.
        FailedPrecondition: The model needs something that is not implemented.
    """
    return ModelConfig.from_dict(read_json(directory / "config.json"))


def read_eos_token_ids(directory: Path) -> tuple[int, ...]:
    """The tokens that end a generation: generation_config.json's, else config.json's; in file order, maybe none.

    Raises:
        NotFound: There is no config.json.
        InvalidArgument: A file is malformed.
    """
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if name == "config.json" or path.is_file():
            value = read_json(path).get("eos_token_id")
            if value is not None:
                return _token_ids(value, path)
    return ()


def _token_ids(value: object, path: Path) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise InvalidArgument(f"{path}: eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(ids)
