"""Every parser of bytes from others, each as one function: bytes in, nothing out, and no exception but a refusal."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError

from hma_serve import kvblock
from hma_serve.cli.kv_capture import MAX_PROBLEMS, read_capture
from hma_serve.cli.kv_vectors import verify_vectors
from hma_serve.kvblock.errors import MalformedFrame
from hma_serve.v1.decode_pb2 import KvOffer
from hma_serve.v1.kv_block_pb2 import KvManifest, KvSupport
from hma_serve.v1.kv_transfer_pb2 import PushHeader
from support.kv_streams import (
    EPOCH,
    FINGERPRINT,
    GOLDEN,
    HEAD_DIM,
    HEADS,
    LAYERS,
    ROPE,
    TICKET,
    small_manifest,
    small_plan,
)

if TYPE_CHECKING:
    from hma_serve.kvblock import Codec

FILES = Path(__file__).parent / "files"
Target = Callable[[bytes], None]
_M = TypeVar("_M", KvManifest, KvOffer, KvSupport)
LIMITS = kvblock.Limits()
PLANS = [small_plan(name) for name in ("tt_bfp8_b", "fp8_e4m3fn.tensor", "bf16")]
ACCEPTS = kvblock.Acceptance(
    FINGERPRINT, LAYERS, HEADS, HEAD_DIM, (kvblock.codec("tt_bfp8_b"), kvblock.codec("bf16")), ROPE, qk_norm=True
)
SUPPORT = kvblock.describe_support(
    ACCEPTS.semantics, k_codecs=ACCEPTS.codecs, v_codecs=ACCEPTS.codecs, rope_pairings=[ROPE.pairing]
)


def frame(data: bytes) -> None:
    """`decode_frame`, and whatever it read is written again to something that reads the same."""
    header, payload = kvblock.decode_frame(data)
    again, same = kvblock.decode_frame(kvblock.encode_frame(header, payload), 2 * len(data) + 64)
    assert again == header
    assert same == payload


def manifest(data: bytes) -> None:
    """`validate_manifest` and `check_plan`: a plan's sizes are within the caps and add up."""
    parsed = _parsed(KvManifest, data)
    plan = kvblock.validate_manifest(parsed)
    assert (
        plan.payload_bytes == sum(role.kv_heads * role.group_bytes for role in plan.roles.values()) * plan.group_count
    )
    assert plan.payload_bytes <= LIMITS.max_stream_bytes
    assert plan.units <= LIMITS.max_units
    kvblock.check_plan(plan, ACCEPTS)


def block(data: bytes) -> None:
    """`StreamReader.validate` on a frame, under plans of several codecs: an accepted block has the bytes it says."""
    header, payload = kvblock.decode_frame(data)
    _any_of(lambda plan: _check_block(plan, header, payload), PLANS)


def _check_block(plan: kvblock.StreamPlan, header: PushHeader, payload: memoryview) -> None:
    found = kvblock.StreamReader(plan, TICKET, EPOCH).validate(header.block, payload)
    assert found.groups().nbytes == payload.nbytes
    assert 0 < found.head_start + found.head_count <= HEADS


def _parsed(kind: type[_M], data: bytes) -> _M:
    """A message that arrives inside others, which protobuf itself has parsed."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise MalformedFrame("not such a message", field="frame") from error


def _any_of(check: Callable[[Any], None], choices: Iterable[Any]) -> None:
    """Raises the last refusal if all refuse."""
    refusal = None
    for choice in choices:
        try:
            check(choice)
            return
        except kvblock.KvFormatError as error:
            refusal = error
    if refusal is not None:
        raise refusal


def offer(data: bytes) -> None:
    """`check_offer`."""
    parsed = _parsed(KvOffer, data)
    kvblock.check_offer(parsed, ACCEPTS)


def support(data: bytes) -> None:
    """`negotiate`, the stranger on either side."""
    parsed = _parsed(KvSupport, data)
    _any_of(lambda pair: kvblock.negotiate(*pair) and None, ((parsed, SUPPORT), (SUPPORT, parsed)))


def offset_table(data: bytes) -> None:
    """`OffsetTable.from_bytes`."""
    kvblock.OffsetTable.from_bytes(data, model_fingerprint="m", profile="p")


def capture(data: bytes) -> None:
    """The conformance kit's reader, which raises nothing at all."""
    assert len(read_capture(data).problems) <= MAX_PROBLEMS + 1


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """What the indices may name: values and a payload of 32 tokens; gone with the process."""
    made = tempfile.TemporaryDirectory(prefix="hma-serve-fuzz-")
    values = np.arange(32, dtype="<f4")
    (Path(made.name) / "v").write_bytes(values.tobytes())
    (Path(made.name) / "p").write_bytes(kvblock.codec("bf16").encode(values.reshape(1, 32, 1)).tobytes())
    return made


def index(data: bytes) -> None:
    """The conformance kit's reader of `vectors.json`, which raises nothing at all and says only what can be printed."""
    path = Path(_folder().name) / "vectors.json"
    path.write_bytes(data)
    problems, checked = verify_vectors(path)
    assert problems or checked
    assert "".join(problems).isprintable()


def _payload(codec: Codec) -> Target:
    def read(data: bytes) -> None:
        codec.check_payload(data, 1, 32, 32)
        assert np.isfinite(codec.decode(data, 1, 32, 32).astype(ml_dtypes.bfloat16).astype(np.float32)).all()

    return read


TARGETS: dict[str, Target] = {
    "frame": frame,
    "manifest": manifest,
    "block": block,
    "offer": offer,
    "support": support,
    "offset_table": offset_table,
    "capture": capture,
    "index": index,
    **{f"payload {name}": _payload(kvblock.codec(name)) for name in kvblock.codec_names()},
}


def seeds(name: str) -> list[bytes]:
    """Inputs to begin with: right ones, and those that break one rule."""
    captures = [path.read_bytes() for path in sorted(FILES.glob("*.kv"))]
    if name.startswith("payload "):
        codec = kvblock.codec(name.removeprefix("payload "))
        values = np.random.default_rng(0).standard_normal((1, 32, 32)).astype(np.float32)
        return [codec.encode(values).tobytes(), bytes(codec.group_bytes(32))]
    if name == "capture":
        return captures
    if name == "index":
        entry = {"codec": "bf16", "heads": 1, "tokens": 32, "head_dim": 1, "payload": "p"}
        return [
            json.dumps({"values": "v", "vectors": [entry | {"codec": codec}]}).encode() for codec in ("bf16", "f32")
        ]
    if name in ("frame", "block"):
        return [path.read_bytes() for path in sorted((GOLDEN / "kvblock").glob("frame_*.bin"))] + _frames(captures)
    if name == "manifest":
        return [small_manifest(codec).SerializeToString() for codec in ("tt_bfp8_b", "nvfp4", "fp8_e4m3fn.head")]
    if name == "offer":
        spec = kvblock.codec("tt_bfp8_b").spec()
        made = KvOffer(
            model_fingerprint=FINGERPRINT, k_codec=spec, v_codec=spec, rope=ROPE, semantics=ACCEPTS.semantics
        )
        return [made.SerializeToString()]
    if name == "support":
        return [SUPPORT.SerializeToString()]
    table = kvblock.OffsetTable({(0, head): np.arange(8, dtype=np.float32) for head in range(3)})
    return [table.to_bytes(model_fingerprint="m", profile="p")]


def _frames(captures: list[bytes]) -> list[bytes]:
    frames = []
    for data in captures:
        with contextlib.suppress(kvblock.KvFormatError):
            frames += [bytes(frame) for _, frame in kvblock.split_frames(data)][1:3]
    return frames
