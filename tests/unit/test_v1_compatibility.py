"""The v1 schemas only grow: whatever a stored descriptor set promised still holds."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

import hma_serve.v1
from support.descriptors import baseline, promises
from support.kv_streams import GOLDEN

VERSIONS = sorted(path.stem for path in (GOLDEN / "descriptors").glob("v*.binpb"))
Files = descriptor_pb2.FileDescriptorSet


def current() -> Files:
    files = Files()
    for path in sorted(Path(hma_serve.v1.__path__[0]).glob("*_pb2.py")):
        module = importlib.import_module(f"hma_serve.v1.{path.stem}")
        files.file.add().ParseFromString(module.DESCRIPTOR.serialized_pb)
    return files


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_that_was_promised_is_gone_or_changed(version: str) -> None:
    before = promises(baseline(version))
    assert len(before) > 200
    assert sorted(before - promises(current())) == []


def _message(files: Files, name: str) -> descriptor_pb2.DescriptorProto:
    return next(message for file in files.file for message in file.message_type if message.name == name)


def _remove_field(files: Files) -> None:
    del _message(files, "KvBlockHeader").field[3]


def _renumber_field(files: Files) -> None:
    _message(files, "KvManifest").field[0].number = 99


def _retype_field(files: Files) -> None:
    _message(files, "KvSection").field[3].type = descriptor_pb2.FieldDescriptorProto.TYPE_UINT32


def _rename_field(files: Files) -> None:
    _message(files, "KvOffset").field[0].name = "layer_index"


def _repeat_field(files: Files) -> None:
    _message(files, "KvOffset").field[0].label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED


def _leave_oneof(files: Files) -> None:
    _message(files, "PushHeader").field[0].ClearField("oneof_index")


def _change_enum(files: Files) -> None:
    next(enum for file in files.file for enum in file.enum_type if enum.name == "KvCodecId").value[3].number = 77


def _unstream_method(files: Files) -> None:
    next(service for file in files.file for service in file.service if service.name == "KvTransfer").method[
        0
    ].client_streaming = False


@pytest.mark.parametrize(
    "change",
    [
        _remove_field,
        _renumber_field,
        _retype_field,
        _rename_field,
        _repeat_field,
        _leave_oneof,
        _change_enum,
        _unstream_method,
    ],
)
def test_incompatible_changes_are_noticed(change: Callable[[Files], None]) -> None:
    files = current()
    change(files)
    assert promises(baseline(VERSIONS[0])) - promises(files)


def test_additions_are_not() -> None:
    files = current()
    field = _message(files, "KvManifest").field.add(name="more", number=99)
    field.type = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
    field.label = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
    files.file[0].message_type.add(name="Another")
    assert not promises(baseline(VERSIONS[0])) - promises(files)
