"""The copy-free writer and reader against the generated code: the same bytes out, the same meaning in."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hma_serve import kvblock
from hma_serve.kvblock import errors
from hma_serve.v1.kv_block_pb2 import KvBlockHeader, KvSection
from hma_serve.v1.kv_transfer_pb2 import PushEnd, PushHeader, PushOpen, PushRequest
from support.kv_streams import small_manifest

u32 = st.integers(0, 2**32 - 1)
sections = st.builds(KvSection, kind=st.integers(0, 3), offset=u32, length=u32, crc32c=u32)
blocks = st.builds(
    KvBlockHeader,
    ticket=st.binary(max_size=20),
    epoch=u32,
    sequence=st.integers(0, 2**64 - 1),
    last=st.booleans(),
    layer=u32,
    role=st.integers(0, 4),
    token_start=u32,
    token_count=u32,
    padded_count=u32,
    head_start=u32,
    head_count=u32,
    codec=u32,
    prefix_hash=st.binary(max_size=200),
    sections=st.lists(sections, max_size=3),
)
headers = st.one_of(
    st.builds(PushHeader),
    st.builds(PushHeader, block=blocks),
    st.builds(PushHeader, end=st.builds(PushEnd, blocks=u32)),
    st.just(PushHeader(open=PushOpen(manifest=small_manifest()))),
)
payloads = st.one_of(st.binary(max_size=300), st.integers(0, 40_000).map(bytes))


@settings(deadline=None)
@given(headers, payloads)
def test_frames_are_the_generated_codes_bytes_and_back(header: PushHeader, payload: bytes) -> None:
    frame = kvblock.encode_frame(header, payload)
    assert frame == PushRequest(header=header, payload=payload).SerializeToString()
    for buffer in (frame, memoryview(frame)):
        read, view = kvblock.decode_frame(buffer)
        assert read == header
        assert bytes(view) == payload


@settings(deadline=None)
@given(headers, payloads.filter(bool))
def test_a_padded_header_moves_the_payload_to_an_aligned_place(header: PushHeader, payload: bytes) -> None:
    padded = PushHeader()
    padded.CopyFrom(header)
    kvblock.align_payload(padded, len(payload))
    frame = kvblock.encode_frame(padded, payload)
    assert (len(frame) - len(payload)) % 16 == 0
    assert frame == PushRequest(header=padded, payload=payload).SerializeToString()
    read, view = kvblock.decode_frame(frame)
    assert bytes(view) == payload
    read.ClearField("padding")
    assert read == header
    assert len(padded.padding) <= 16


@settings(deadline=None)
@given(headers, st.binary(max_size=100))
def test_payloads_are_not_copied_on_the_way_in(header: PushHeader, payload: bytes) -> None:
    frame = kvblock.encode_frame(header, payload)
    view = kvblock.decode_frame(frame)[1]
    assert view.obj is frame
    assert view.nbytes == len(payload)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.data())
def test_strided_arrays_are_written_as_their_copy(heads: int, groups: int, size: int, data: st.DataObject) -> None:
    whole = np.arange(heads * groups * size, dtype=np.uint8).reshape(heads, groups, size)
    start = data.draw(st.integers(0, groups - 1))
    part = whole[:, start:]
    frame = kvblock.encode_frame(PushHeader(), part)
    assert frame == kvblock.encode_frame(PushHeader(), part.tobytes())


# Fragments that are well-formed alone: in the wrong order, repeated, unknown, cut or with long varints when joined.
fragments = st.one_of(
    st.builds(lambda header: PushRequest(header=header).SerializeToString(), headers),
    st.builds(lambda payload: PushRequest(payload=payload).SerializeToString(), st.binary(max_size=9)),
    st.sampled_from(
        [b"\x0a\x00", b"\x12\x00", b"\x0a\x80\x00", b"\x12\x81\x80\x00x", b"\x1a\x01x", b"\x18\x05", b"\x08\x01"]
    ),
    st.binary(max_size=4),
)


@settings(deadline=None)
@given(st.lists(fragments, max_size=4).map(b"".join))
@example(b"")
@example(b"\x0a")
@example(b"\x0a\xff\xff\xff\xff\x0f")
@example(b"\x0a\x00\x12\xff\xff\xff\x7f")
@example(b"\x0a\x02\x12\x7f\x12\x00")
@example(b"\x12\x01x\x0a\x02\x1a\x00")
def test_anything_else_is_read_as_the_generated_code_reads_it(buffer: bytes) -> None:
    try:
        right = PushRequest.FromString(buffer)
    except DecodeError:
        with pytest.raises(errors.MalformedFrame):
            kvblock.decode_frame(buffer)
    else:
        header, payload = kvblock.decode_frame(buffer)
        assert header == right.header
        assert bytes(payload) == right.payload


def test_unknown_header_fields_of_a_newer_minor_version_are_read() -> None:
    header = PushHeader(block=KvBlockHeader(layer=3))
    newer = header.block.SerializeToString() + b"\xf2\x07\x03new"  # field 126
    inner = b"\x12" + bytes([len(newer)]) + newer
    frame = b"\x0a" + bytes([len(inner)]) + inner + b"\x12\x02pp"
    read, payload = kvblock.decode_frame(frame)
    assert read.block.layer == 3
    assert bytes(payload) == b"pp"
    assert kvblock.encode_frame(read, payload) == frame


def test_large_messages_are_refused_before_parsing() -> None:
    frame = kvblock.encode_frame(PushHeader(), bytes(100))
    assert kvblock.decode_frame(frame, len(frame))[1].nbytes == 100
    with pytest.raises(errors.MessageTooLarge):
        kvblock.decode_frame(frame, len(frame) - 1)
    with pytest.raises(errors.MessageTooLarge):
        kvblock.decode_frame(bytes(kvblock.MAX_MESSAGE_BYTES + 1))
