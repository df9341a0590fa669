"""A KV stream as a file: its frames, each after its length as a varint (protobuf's delimited form).

Any language's protobuf library writes it; tools inspect and verify it. One bare frame is read as a capture of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hma_serve.kvblock.errors import MalformedFrame, MessageTooLarge
from hma_serve.kvblock.frame import decode_frame, varint
from hma_serve.kvblock.limits import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LENGTH_BYTES = 4


def join_frames(frames: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces of a capture of these frames, to be written one after the other."""
    for frame in frames:
        yield varint(len(frame)) + frame


def split_frames(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """The frames of a capture with the byte at which each begins.

    Args:
        data: The whole file.

    Raises:
        MalformedFrame: A length or a frame is cut short.
        MessageTooLarge: A length is above the limit of a message.
    """
    view = memoryview(data).cast("B")
    if _is_bare(view):
        yield 0, view
        return
    at = 0
    while at < len(view):
        start, end = _bounds(view, at)
        yield start, view[start:end]
        at = end


def _bounds(view: memoryview, at: int) -> tuple[int, int]:
    length = 0
    for index in range(_LENGTH_BYTES):
        if at + index >= len(view):
            raise MalformedFrame(f"the length at byte {at} is cut short", field="frame")
        byte = view[at + index]
        length |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            start = at + index + 1
            if length > MAX_MESSAGE_BYTES:
                raise MessageTooLarge(f"{length} bytes at byte {at}, the limit is {MAX_MESSAGE_BYTES}", field="frame")
            if start + length > len(view):
                raise MalformedFrame(f"the frame at byte {start} is cut short", field="frame")
            return start, start + length
    raise MessageTooLarge(f"the length at byte {at} has more than {_LENGTH_BYTES} bytes", field="frame")


def _is_bare(view: memoryview) -> bool:
    """Whether the whole is one frame: it has a header's tag where a capture has a length, and does not walk as one."""
    if not view or view[0] != 0x0A or len(view) > MAX_MESSAGE_BYTES:
        return False
    try:
        at = 0
        while at < len(view):
            at = _bounds(view, at)[1]
        return False
    except (MalformedFrame, MessageTooLarge):
        pass
    try:
        return decode_frame(view)[0].WhichOneof("frame") is not None
    except MalformedFrame:
        return False
