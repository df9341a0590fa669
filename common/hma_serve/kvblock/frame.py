"""The wire: one frame is one `PushRequest`, `header = 1`, then `bytes payload = 2`, last.

Generated protobuf code copies a payload two to four times. These two functions copy it once on the way out
and never on the way in, and are exact stand-ins: `encode_frame` gives the bytes of
`PushRequest(...).SerializeToString()`, and `decode_frame` reads what the generated parser reads. Anything but
the plain form (unknown or repeated fields, another order) is handed to the generated parser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from google.protobuf.message import DecodeError

from hma_serve.kvblock.errors import MalformedFrame, MessageTooLarge
from hma_serve.kvblock.limits import MAX_MESSAGE_BYTES
from hma_serve.v1.kv_transfer_pb2 import PushHeader, PushRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_HEADER_TAG: Final = 0x0A  # field 1, length-delimited
_PAYLOAD_TAG: Final = 0x12  # field 2, length-delimited
_PADDING_FIELD_BYTES: Final = 2  # a tag and a length, beside the padding itself
_MAX_LENGTH_BYTES: Final = 4  # of a varint: lengths below 2^28, far above any message
_ALIGNMENT: Final = 16


def encode_frame(header: PushHeader, payload: bytes | memoryview | NDArray[np.uint8] = b"") -> bytes:
    """Serialise a `PushRequest`, copying the payload once.

    Args:
        header: Any frame's header.
        payload: Contiguous bytes, or an array whose trailing axes are contiguous (a slice of heads and groups out of a
            larger one); empty for open and end frames.

    Returns:
        The bytes that the generated code gives for the same message.
    """
    head = header.SerializeToString()
    pieces = list(contiguous_pieces(payload)) if isinstance(payload, np.ndarray) else [payload]
    length = sum(len(piece) for piece in pieces)
    prefix = b"%c%b%b" % (_HEADER_TAG, varint(len(head)), head)
    if not length:
        return prefix
    return b"".join((prefix, b"%c%b" % (_PAYLOAD_TAG, varint(length)), *pieces))


def align_payload(header: PushHeader, payload_bytes: int) -> None:
    """Pad a header so that its frame's payload begins at a multiple of 16 bytes.

    The receiver's arrays are views of the message, and copies out of unaligned memory are slower.

    Args:
        header: Gets its `padding` set.
        payload_bytes: The payload's length.
    """
    header.ClearField("padding")
    bare = header.ByteSize()
    for padding in range(_ALIGNMENT + 1):
        size = bare + (_PADDING_FIELD_BYTES + padding if padding else 0)
        if (2 + len(varint(size)) + size + len(varint(payload_bytes))) % _ALIGNMENT == 0:
            header.padding = bytes(padding)
            return


def decode_frame(buffer: bytes | memoryview, max_bytes: int = MAX_MESSAGE_BYTES) -> tuple[PushHeader, memoryview]:
    """Parse a serialised `PushRequest` without copying its payload.

    Args:
        buffer: One whole message.
        max_bytes: Refused above this before anything is parsed.

    Returns:
        The header (empty if the message has none) and a view of the payload inside `buffer`.

    Raises:
        MessageTooLarge: `buffer` is larger than `max_bytes`.
        MalformedFrame: Not a `PushRequest`.
    """
    view = memoryview(buffer).cast("B")
    if view.nbytes > max_bytes:
        raise MessageTooLarge(f"{view.nbytes} bytes, the limit is {max_bytes}", field="frame")
    try:
        bounds = _plain_bounds(view)
        if bounds is None:
            message = PushRequest.FromString(bytes(view))
            return message.header, memoryview(message.payload)
        header_start, header_end, payload_start = bounds
        return PushHeader.FromString(bytes(view[header_start:header_end])), view[payload_start:]
    except DecodeError as error:
        raise MalformedFrame("not a PushRequest", field="frame") from error


def is_plain_frame(buffer: bytes | memoryview) -> bool:
    """Whether a frame has the form that writers must give it: the header, then the payload, and nothing else."""
    return _plain_bounds(memoryview(buffer).cast("B")) is not None


def contiguous_pieces(payload: NDArray[np.uint8]) -> Iterator[memoryview]:
    """The array's bytes in C order as the fewest contiguous views that its leading axes allow."""
    if payload.flags.c_contiguous:
        yield payload.reshape(-1).view(np.uint8).data
        return
    for part in payload:
        yield from contiguous_pieces(part)


def _plain_bounds(view: memoryview) -> tuple[int, int, int] | None:
    """Start and end of the header and start of the payload, or None when the frame is not in the plain form."""
    if not view or view[0] != _HEADER_TAG:
        return None
    header = _delimited(view, 1)
    if header is None:
        return None
    start, end = header
    if end == len(view):
        return start, end, end
    if view[end] != _PAYLOAD_TAG:
        return None
    payload = _delimited(view, end + 1)
    if payload is None or payload[1] != len(view):
        return None
    return start, end, payload[0]


def _delimited(view: memoryview, at: int) -> tuple[int, int] | None:
    """Start and end of a length-delimited value whose length varint stands at `at`, if it lies within the view."""
    length = 0
    for index in range(_MAX_LENGTH_BYTES):
        if at + index >= len(view):
            return None
        byte = view[at + index]
        length |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            start = at + index + 1
            return (start, start + length) if start + length <= len(view) else None
    return None


def varint(value: int) -> bytes:
    """A length as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
