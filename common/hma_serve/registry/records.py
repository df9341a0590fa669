"""How an instance record is stored: one key per instance, protobuf JSON as the value.

JSON, so that an operator can read the fleet with `etcdctl get --prefix`. Fields and enum names of newer versions are
skipped, so that versions may differ during a rolling upgrade. Sizes are capped before anything is parsed.
"""

from __future__ import annotations

from google.protobuf import json_format

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.worker import WorkerInfo, WorkerRole
from hma_serve.v1 import worker_pb2

PREFIX = "/hma-serve/v1/workers/"
"""Every key of ours starts with it; the version is that of the layout below it."""

MAX_RECORD_BYTES = 64 * 1024


def record_key(info: WorkerInfo) -> str:
    """The key of an instance: `/hma-serve/v1/workers/<role>/<instance>`.

    Raises:
        InvalidArgument: The instance's name is empty or would leave its place in the layout, or the role is not set.
    """
    if not info.instance or "/" in info.instance or not info.instance.isprintable():
        raise InvalidArgument(f"an instance cannot be named {info.instance!r}", field="instance")
    return f"{role_prefix(info.role)}{info.instance}"


def role_prefix(role: WorkerRole | None) -> str:
    """What the keys of one role, or with None of all roles, start with."""
    if role is WorkerRole.UNSPECIFIED:
        raise InvalidArgument("an instance in the registry is prefill, decode or a router", field="role")
    return PREFIX if role is None else f"{PREFIX}{role}/"


def encode_record(info: WorkerInfo) -> bytes:
    """The value of an instance's key."""
    return json_format.MessageToJson(info.to_proto(), indent=None).encode()


def decode_record(value: bytes) -> WorkerInfo:
    """The record in a key's value.

    Raises:
        InvalidArgument: It is too large, no protobuf JSON of a WorkerInfo, or names no instance, role or address.
    """
    if len(value) > MAX_RECORD_BYTES:
        raise InvalidArgument(f"an instance record has {len(value)} bytes, more than {MAX_RECORD_BYTES}")
    try:
        message = json_format.Parse(value.decode(), worker_pb2.WorkerInfo(), ignore_unknown_fields=True)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"not an instance record: {error}") from error
    info = WorkerInfo.from_proto(message)
    if not (info.instance and info.address) or info.role is WorkerRole.UNSPECIFIED:
        raise InvalidArgument("an instance record lacks its instance, role or address")
    return info
