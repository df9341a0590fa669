"""The instance record: nothing is lost on the way to the registry and back, and nothing hostile gets through."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import IntEnum

import pytest
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.worker import (
    CodecSpec,
    KvCodecId,
    KvRopePairing,
    KvRounding,
    KvScaleGranularity,
    WorkerInfo,
    WorkerRole,
    WorkerState,
    mint_instance,
)
from hma_serve.registry.records import (
    MAX_RECORD_BYTES,
    PREFIX,
    decode_record,
    encode_record,
    record_key,
    role_prefix,
)
from hma_serve.v1 import kv_block_pb2, worker_pb2
from support.worker_records import a_worker


def unset_fields(message: Message, path: str = "") -> list[str]:
    """Fields anywhere below a message that hold their default."""
    unset = []
    present = {field.name: value for field, value in message.ListFields()}
    for field in message.DESCRIPTOR.fields:
        where = f"{path}.{field.name}"
        if field.name not in present:
            unset.append(where)
        elif isinstance(present[field.name], Message):
            unset += unset_fields(present[field.name], where)
    return unset


def test_every_field_of_the_schema_survives_the_round_trip() -> None:
    info = a_worker()
    message = info.to_proto()
    assert unset_fields(message) == []  # a field added to the schema alone shows up here
    assert unset_fields(message.codecs[0]) == []
    assert WorkerInfo.from_proto(message) == info
    assert decode_record(encode_record(info)) == info


@pytest.mark.parametrize(
    ("ours", "prefix", "theirs"),
    [
        (KvCodecId, "KV_CODEC_ID_", kv_block_pb2.KvCodecId),
        (KvScaleGranularity, "KV_SCALE_GRANULARITY_", kv_block_pb2.KvScaleGranularity),
        (KvRounding, "KV_ROUNDING_", kv_block_pb2.KvRounding),
        (KvRopePairing, "KV_ROPE_PAIRING_", kv_block_pb2.KvRopePairing),
    ],
)
def test_enums_are_those_of_the_schema(ours: type[IntEnum], prefix: str, theirs: EnumTypeWrapper) -> None:
    assert {prefix + member.name: member.value for member in ours} == dict(theirs.items())


@pytest.mark.parametrize("role", [WorkerRole.PREFILL, WorkerRole.DECODE])
@pytest.mark.parametrize("state", [WorkerState.READY, WorkerState.DRAINING])
def test_roles_and_states_survive(role: WorkerRole, state: WorkerState) -> None:
    info = replace(a_worker(role), state=state)
    again = decode_record(encode_record(info))
    assert (again.role, again.state) == (role, state)


def test_operators_can_read_a_record() -> None:
    stored = json.loads(encode_record(a_worker(WorkerRole.PREFILL)))
    assert stored["role"] == "WORKER_ROLE_PREFILL"
    assert stored["codecs"][0]["id"] == "KV_CODEC_ID_TT_BFP8_B"
    assert b"\n" not in encode_record(a_worker())


def test_a_newer_versions_record_is_read_for_what_is_known() -> None:
    stored = json.loads(encode_record(a_worker()))
    stored["rack"] = {"row": 7}
    stored["state"] = "WORKER_STATE_HIBERNATING"
    stored["codecs"][0]["id"] = "KV_CODEC_ID_FP2"
    info = decode_record(json.dumps(stored).encode())
    assert info.state is WorkerState.UNSPECIFIED
    assert info.codecs[0].id is KvCodecId.UNSPECIFIED
    assert info.codecs[1].id is KvCodecId.BF16


def test_a_newer_versions_numbers_read_as_unspecified() -> None:
    message = a_worker().to_proto()
    message.role = worker_pb2.WorkerRole.ValueType(17)
    message.codecs[0].id = kv_block_pb2.KvCodecId.ValueType(99)
    info = WorkerInfo.from_proto(message)
    assert info.role is WorkerRole.UNSPECIFIED
    assert info.codecs[0].id is KvCodecId.UNSPECIFIED


def test_codecs_are_compared_by_what_decodes_them() -> None:
    codec = CodecSpec(KvCodecId.INT8, 1, KvScaleGranularity.TOKEN_HEAD, KvRounding.NEAREST_EVEN)
    assert codec.decodes_like(replace(codec, rounding=KvRounding.TRUNCATE))
    assert not codec.decodes_like(replace(codec, version=2))
    assert not codec.decodes_like(replace(codec, granularity=KvScaleGranularity.HEAD))
    assert not codec.decodes_like(replace(codec, id=KvCodecId.INT4))
    unknown = CodecSpec(KvCodecId.UNSPECIFIED)
    assert not unknown.decodes_like(unknown)


def test_instances_are_never_named_twice() -> None:
    names = {mint_instance(WorkerRole.DECODE) for _ in range(1000)}
    assert len(names) == 1000
    assert all(name.startswith("decode-") for name in names)


def test_keys_say_role_and_instance() -> None:
    assert record_key(a_worker(WorkerRole.PREFILL, "prefill-7")) == "/hma-serve/v1/workers/prefill/prefill-7"
    assert role_prefix(None) == PREFIX
    assert role_prefix(WorkerRole.DECODE) == "/hma-serve/v1/workers/decode/"


@pytest.mark.parametrize("instance", ["a/b", "..\n", "a\0b"])
def test_an_instance_cannot_leave_its_place_in_the_layout(instance: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be named"):
        record_key(a_worker(instance=instance))


def test_a_worker_without_a_role_has_no_key() -> None:
    with pytest.raises(InvalidArgument, match="prefill, decode or a router"):
        record_key(replace(a_worker(), role=WorkerRole.UNSPECIFIED))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"{}",
        b'{"instance": "x"}',
        b'{"instance": 5, "address": "a:1", "role": "WORKER_ROLE_DECODE"}',
        b'{"instance": "x", "address": "a:1", "role": "WORKER_ROLE_DECODE", "epoch": -1}',
        b'{"instance": "x", "address": "a:1", "role": "WORKER_ROLE_DECODE", "model": 3}',
        b'{"instance": "x", "address": "a:1", "role": "WORKER_ROLE_OVERSEER"}',
        b'{"instance": "\\ud800", "address": "a:1", "role": "WORKER_ROLE_DECODE"}',
        b'{"x":' * 5000 + b"1" + b"}" * 5000,
    ],
    ids=lambda value: repr(value[:24]),
)
def test_broken_records_are_refused(value: bytes) -> None:
    with pytest.raises(InvalidArgument):
        decode_record(value)


def test_a_record_is_measured_before_it_is_parsed() -> None:
    with pytest.raises(InvalidArgument, match="more than"):
        decode_record(encode_record(a_worker()) + b" " * MAX_RECORD_BYTES)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([field.json_name for field in worker_pb2.WorkerInfo.DESCRIPTOR.fields])


@settings(max_examples=100, deadline=None)
@given(FIELDS, JUNK)
def test_any_json_in_any_field_is_read_or_refused(field: str, junk: object) -> None:
    stored = json.loads(encode_record(a_worker()))
    stored[field] = junk
    try:
        decode_record(json.dumps(stored).encode())
    except InvalidArgument:
        return


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_refused(value: bytes) -> None:
    with pytest.raises(InvalidArgument):
        decode_record(value)
