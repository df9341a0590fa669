"""What a schema promised earlier, and whether it still holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from google.protobuf import (
    any_pb2,
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    message_factory,
    struct_pb2,
    timestamp_pb2,
)

from support.kv_streams import GOLDEN

if TYPE_CHECKING:
    from google.protobuf.message import Message

Promise = tuple[str, ...]
"""One thing that a peer may rely on, for example ("hma_serve.v1.KvOffset", "field 2", "head uint32 optional")."""

_FIELD = descriptor_pb2.FieldDescriptorProto


def baseline(version: str) -> descriptor_pb2.FileDescriptorSet:
    """The stored descriptor set of a version, `v1.0` or later."""
    return descriptor_pb2.FileDescriptorSet.FromString((GOLDEN / "descriptors" / f"{version}.binpb").read_bytes())


def message_classes(files: descriptor_pb2.FileDescriptorSet) -> Mapping[str, type[Message]]:
    """Classes of a stored schema, by full name: a peer of that version."""
    pool = descriptor_pool.DescriptorPool()
    for module in (any_pb2, duration_pb2, struct_pb2, timestamp_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    waiting = list(files.file)
    while waiting:  # in order of their imports
        ready = [file for file in waiting if not set(file.dependency) & {other.name for other in waiting}]
        for file in ready:
            pool.AddSerializedFile(file.SerializeToString())
            waiting.remove(file)
    names = [f"{file.package}.{message.name}" for file in files.file for message in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names}


def promises(files: descriptor_pb2.FileDescriptorSet) -> set[Promise]:
    """Everything in a schema that peers may rely on."""
    return {promise for file in files.file for promise in _of_file(file)}


def _of_file(file: descriptor_pb2.FileDescriptorProto) -> Iterator[Promise]:
    for message in file.message_type:
        yield from _of_message(file.package, message)
    for enum in file.enum_type:
        yield from _of_enum(file.package, enum)
    for service in file.service:
        for method in service.method:
            takes = f"{'stream ' * method.client_streaming}{method.input_type}"
            gives = f"{'stream ' * method.server_streaming}{method.output_type}"
            yield f"{file.package}.{service.name}", f"method {method.name}", f"{takes} -> {gives}"


def _of_message(scope: str, message: descriptor_pb2.DescriptorProto) -> Iterator[Promise]:
    name = f"{scope}.{message.name}"
    yield (name, "message")
    for field in message.field:
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
        kind = field.type_name or _FIELD.Type.Name(field.type)
        yield name, f"field {field.number}", f"{field.name} {_FIELD.Label.Name(field.label)} {kind} {oneof}"
    for nested in message.nested_type:
        yield from _of_message(name, nested)
    for enum in message.enum_type:
        yield from _of_enum(name, enum)


def _of_enum(scope: str, enum: descriptor_pb2.EnumDescriptorProto) -> Iterator[Promise]:
    for value in enum.value:
        yield f"{scope}.{enum.name}", f"value {value.number}", value.name
