"""The golden vectors: fixed values, their payload and meaning in every codec, and complete streams.

A reader's author compares decoded values, a producer's author payloads (exactly, or within a step of each value,
because the format fixes decoding and leaves encoding free). Values come from integer arithmetic alone, so that every
machine and every year writes the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hma_serve.cli.kv_meaning import compare
from hma_serve.cli.kv_pipes import file_error, printable, read_listed
from hma_serve.kvblock import (
    GROUP_TOKENS,
    KvFormatError,
    LayerKv,
    OffsetTable,
    StreamWriter,
    build_manifest,
    build_mixed_manifest,
    codec,
    codec_names,
    encode_frame,
    join_frames,
    validate_manifest,
)
from hma_serve.v1.kv_block_pb2 import (
    KV_ROPE_PAIRING_HALF_SPLIT,
    KV_ROUNDING_NEAREST_AWAY,
    KV_ROUNDING_NEAREST_EVEN,
    KV_ROUNDING_TRUNCATE,
    KvManifest,
    KvProducer,
    KvRope,
    KvRounding,
)
from hma_serve.v1.kv_transfer_pb2 import TRANSPORT_GRPC, PushEnd, PushHeader, PushOpen

INDEX: Final = "vectors.json"
HEADS, TOKENS, HEAD_DIM = 1, 64, 64
_TICKET: Final = bytes(range(16))
_EPOCH: Final = 1
_FINGERPRINT: Final = hashlib.sha256(b"golden model").hexdigest()
_ROPE: Final = KvRope(pairing=KV_ROPE_PAIRING_HALF_SPLIT, theta=1e6)
_MAX_INDEX_BYTES: Final = 1 << 20
_MAX_PAYLOAD_BYTES: Final = 64 << 20
_EXTRA_ROUNDINGS: Final[dict[str, dict[str, KvRounding.ValueType]]] = {
    "tt_bfp8_b": {"nearest_away": KV_ROUNDING_NEAREST_AWAY},
    "tt_bfp4_b": {"nearest_away": KV_ROUNDING_NEAREST_AWAY, "truncate": KV_ROUNDING_TRUNCATE},
    "tt_bfp2_b": {"nearest_away": KV_ROUNDING_NEAREST_AWAY},
}


def golden_values(
    heads: int = HEADS, tokens: int = TOKENS, head_dim: int = HEAD_DIM, seed: int = 0
) -> NDArray[np.float32]:
    """Float32 [heads, tokens, head_dim]: bell-shaped, tokens of unlike scales; some hold ties, zeros or extremes."""
    count = heads * tokens * head_dim
    uniform = _hashed(np.arange(4 * count, dtype=np.uint32) + np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)) >> np.uint32(
        16
    )
    centred = uniform.astype(np.int64).reshape(-1, 4).sum(axis=1) - 2 * 65535
    values = (centred / 2.0**15).reshape(heads, tokens, head_dim)
    values *= 2.0 ** (np.arange(tokens) % 9 - 4)[:, None]
    ramp = np.arange(head_dim)
    values[:, 3] = (ramp - 32) / 64  # ties
    values[:, 5] = np.where(ramp % 2, -0.0, 0.0)
    values[:, 7] = np.where(ramp % 3 == 0, values[:, 7], 0)
    values[:, 11] = np.nextafter(np.float32(2), np.float32(0)) * np.where(ramp % 2, 1, -1)  # saturates block float
    values[:, 13] *= 2.0**-118
    values[:, 17, 0] = 30_000.0
    singles: NDArray[np.float32] = values.astype(np.float32)
    return singles


def _hashed(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Murmur3's finaliser: every bit depends on every bit."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def write_vectors(out: Path) -> int:
    """Writes the golden set; returns how many files it has. BLOCKING."""
    files = dict(_files())
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return len(files)


def _files() -> Iterator[tuple[str, bytes]]:
    values = golden_values()
    yield "values.f32.bin", values.astype("<f4").tobytes()
    entries: list[dict[str, Any]] = []
    for name in codec_names():
        packer = codec(name)
        for rounding, attested in {"nearest_even": KV_ROUNDING_NEAREST_EVEN, **_EXTRA_ROUNDINGS.get(name, {})}.items():
            payload = packer.encode(values, attested).tobytes()
            decoded = packer.decode(payload, HEADS, TOKENS, HEAD_DIM).astype("<f4").tobytes()
            files = {f"payloads/{name}.{rounding}.bin": payload, f"decoded/{name}.{rounding}.f32.bin": decoded}
            yield from files.items()
            entries.append(_entry(name, rounding, *files))
    index = {"format": "1.1", "values": "values.f32.bin", "vectors": entries}
    yield INDEX, (json.dumps(index, indent=1) + "\n").encode()
    for stream, manifest in _manifests():
        yield f"streams/{stream}.kv", b"".join(join_frames(_stream(manifest)))


def _entry(name: str, rounding: str, payload: str, decoded: str) -> dict[str, Any]:
    return {
        "codec": name,
        "rounding": rounding,
        "heads": HEADS,
        "tokens": TOKENS,
        "head_dim": HEAD_DIM,
        "payload": payload,
        "decoded": decoded,
    }


def _manifests() -> Iterator[tuple[str, KvManifest]]:
    common: dict[str, Any] = {
        "model_fingerprint": _FINGERPRINT,
        "token_start": 32,
        "token_count": 64,
        "rope": _ROPE,
        "qk_norm": True,
        "producer": KvProducer(vendor="hma-serve", software="golden"),
    }
    bfp8, bfp4, bf16, nvfp4 = (codec(name) for name in ("tt_bfp8_b", "tt_bfp4_b", "bf16", "nvfp4"))
    yield "uniform", build_manifest(layers=2, kv_heads=2, head_dim=32, k_codec=bfp8, v_codec=bfp4, **common)
    shapes = [LayerKv(2, 64, 32, bfp8, nvfp4), LayerKv(1, 32, 32, bf16, bf16)]
    yield "mixed_layers", build_mixed_manifest(layers=[*shapes, shapes[0]], **common)
    offset = build_manifest(layers=1, kv_heads=2, head_dim=32, k_codec=bfp8, **common)
    table = OffsetTable({(0, head): np.arange(32, dtype=np.float32) + head for head in range(2)})
    offset.k_offsets.extend(table.to_proto())
    offset.model_fingerprint = table.fingerprint(_FINGERPRINT)
    yield "k_offsets", offset


def _stream(manifest: KvManifest) -> Iterator[bytes]:
    plan = validate_manifest(manifest)
    opened = PushOpen(ticket=_TICKET, epoch=_EPOCH, transports=[TRANSPORT_GRPC], manifest=manifest)
    yield encode_frame(PushHeader(open=opened))
    writer = StreamWriter(plan, _TICKET, _EPOCH)
    final = list(plan.roles)[-1]
    for seed, ((layer, role), role_plan) in enumerate(plan.roles.items(), start=1):
        values = golden_values(role_plan.kv_heads, plan.token_count, role_plan.head_dim, seed)
        yield from writer.frames(
            layer,
            role_plan.role,
            role_plan.codec.encode(values),
            token_start=plan.token_start,
            last=(layer, role) == final,
        )
    yield encode_frame(PushHeader(end=PushEnd(blocks=writer.sent)))


def verify_vectors(index: Path) -> tuple[list[str], int]:
    """Checks the payloads that an index lists: sizes, banned codes, and the values they mean. BLOCKING.

    Returns:
        What is wrong, and how many payloads were checked. An index that lists none proves nothing, and is wrong.
    """
    try:
        listing = json.loads(read_listed(index, _MAX_INDEX_BYTES))
        entries = listing["vectors"]
        if not isinstance(entries, list) or not entries:
            raise ValueError("it lists no vectors")
        values = np.frombuffer(read_listed(_within(index.parent, listing["values"]), _MAX_PAYLOAD_BYTES), dtype="<f4")
        if not np.isfinite(values).all():
            raise ValueError("the values hold Inf or NaN")
    except RecursionError:
        return [f"{index.name}: not an index of vectors: it is nested too deeply"], 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{index.name}: not an index of vectors: {_said(error)}"], 0
    problems = [problem for entry in entries if (problem := _verify_entry(index.parent, entry, values))]
    return problems, len(entries)


def _verify_entry(folder: Path, entry: Any, values: NDArray[np.float32]) -> str:
    if not isinstance(entry, dict):
        return f"{printable(str(entry)[:200])}: not an object"
    try:
        name = printable(str(entry["payload"]))
        packer, shape = codec(str(entry["codec"])), _shape(entry, values.size)
        payload = read_listed(_within(folder, entry["payload"]), _MAX_PAYLOAD_BYTES)
        packer.check_payload(payload, *shape)
        problem = compare(packer, payload, values.reshape(shape))
    except KvFormatError as error:
        return f"{name}: {error.message}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{printable(str(entry)[:200])}: {_said(error)}"
    return f"{name}: {problem}" if problem else ""


def _shape(entry: Any, size: int) -> tuple[int, int, int]:
    heads, tokens, head_dim = (entry[name] for name in ("heads", "tokens", "head_dim"))
    for name, number in (("heads", heads), ("tokens", tokens), ("head_dim", head_dim)):
        if type(number) is not int or number <= 0:
            raise ValueError(f"{name} is not a positive whole number")
    if tokens % GROUP_TOKENS:
        raise ValueError(f"{tokens} tokens are not whole groups of {GROUP_TOKENS}")
    if heads * tokens * head_dim != size:
        raise ValueError(f"there are {size} values, not {heads} x {tokens} x {head_dim}")
    return heads, tokens, head_dim


def _within(folder: Path, name: Any) -> Path:
    """The path of a file that the index names, which must lie in the index's folder."""
    if not isinstance(name, str):
        raise TypeError(f"{printable(str(name)[:200])} is not the name of a file")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{printable(name)} lies outside of the folder")
    return path


def _said(error: Exception) -> str:
    """An error in words; those of missing fields and of files need some."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, OSError):
        return printable(file_error(error))
    return printable(str(error))
