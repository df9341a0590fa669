"""A KV producer written from docs/kv-block-format.md and its two schema files alone, in plain Python.

It imports nothing of this project, nor protobuf, numpy or a checksum library: what it leaves out a vendor can leave
out. `python tests/support/plain_producer.py OUT` writes captures and vectors that `hma-serve kv verify OUT` accepts.
"""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Rows = Sequence[Sequence[float]]
"""32 tokens of one head, float32 values."""

K, V = 1, 2


# Protobuf: a field is its number and wire type, then a varint, or a length and bytes. Zeros are left out.


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""


def double(field: int, value: float) -> bytes:
    return varint(field << 3 | 1) + struct.pack("<d", value)


def fixed32(field: int, value: int) -> bytes:
    return varint(field << 3 | 5) + struct.pack("<I", value)


def blob(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def numbers(field: int, values: Iterable[int]) -> bytes:
    return blob(field, b"".join(map(varint, values)))


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC = [_crc_of(byte) for byte in range(256)]


# Section 7.2 and 7.6: one unit, that is 32 tokens of one head.


def single(value: float) -> float:
    """Rounded to float32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def exponent(value: float) -> int:
    """Biased, of a float32."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits >> 23 & 255


def tt_bfp8_b(rows: Rows) -> bytes:
    unit = b""
    for tile in range(len(rows[0]) // 32):
        exponents, elements = bytearray(64), bytearray(1024)
        for token, row in enumerate(rows):
            for right in (0, 1):
                face = token // 16 * 2 + right
                values = row[tile * 32 + right * 16 :][:16]
                shared = max(map(exponent, values))
                exponents[face * 16 + token % 16] = shared
                for column, value in enumerate(values):
                    magnitude = min(127, round(abs(value) * 2.0 ** (133 - shared))) if exponent(value) else 0
                    sign = 128 if value < 0 and magnitude else 0
                    elements[face * 256 + token % 16 * 16 + column] = sign | magnitude
        unit += bytes(exponents) + bytes(elements)
    return unit


def int8(rows: Rows) -> bytes:
    elements = scales = b""
    for row in rows:
        scale = max(single(max(map(abs, row)) / 127), 2.0**-126)
        elements += struct.pack(f"{len(row)}b", *(max(-127, min(127, round(value / scale))) for value in row))
        scales += struct.pack("<f", scale)
    return elements + scales


CODECS: dict[str, tuple[Callable[[Rows], bytes], int, int]] = {"tt_bfp8_b": (tt_bfp8_b, 3, 0), "int8": (int8, 13, 3)}
"""By name: encoder, id and granularity."""


def payload(encode: Callable[[Rows], bytes], heads: Sequence[Rows]) -> bytes:
    """Section 6: head-major, each unit whole."""
    return b"".join(encode(head[start : start + 32]) for head in heads for start in range(0, len(head), 32))


# Sections 3 to 5.


def manifest(codec_id: int, granularity: int, layers: int, heads: int, head_dim: int, start: int, tokens: int) -> bytes:
    roles = [blob(2, number(1, role) + number(2, heads) + number(3, head_dim)) for role in (K, V)]
    return b"".join(
        (
            number(1, 1) + number(2, 1),  # format 1.1
            blob(3, b"ab" * 32),
            blob(4, number(1, codec_id) + number(2, 1) + number(3, granularity) + number(4, 1)),
            blob(5, numbers(1, range(layers)) + b"".join(roles)),
            blob(6, number(1, 1) + double(2, 1e6)),  # half-split
            number(7, 1),
            blob(9, blob(2, b"a vendor")),
            number(10, start) + number(11, tokens),
        )
    )


def capture(name: str, draw: random.Random, layers: int = 2, heads: int = 2, head_dim: int = 64) -> bytes:
    """A stream of 64 tokens from position 32 on, one block per layer and role."""
    encode, codec_id, granularity = CODECS[name]
    start, tokens, ticket = 32, 64, draw.randbytes(16)
    said = manifest(codec_id, granularity, layers, heads, head_dim, start, tokens)
    frames = [blob(1, blob(1, blob(1, ticket) + number(2, 1) + numbers(3, [1]) + blob(4, said)))]
    for sequence, (layer, role) in enumerate((layer, role) for layer in range(layers) for role in (K, V)):
        data = payload(encode, drawn(draw, heads, tokens, head_dim))
        block = b"".join(
            (
                blob(1, ticket) + number(2, 1),
                number(3, sequence) + number(4, sequence == 2 * layers - 1),
                number(5, layer) + number(6, role),
                number(7, start) + number(8, tokens) + number(9, tokens) + number(10, 1),
                number(12, heads),
                blob(15, number(1, 1) + number(3, len(data)) + fixed32(4, crc32c(data))),
            )
        )
        frames.append(blob(1, blob(2, block)) + blob(2, data))
    frames.append(blob(1, blob(3, number(1, 2 * layers))))
    return b"".join(varint(len(frame)) + frame for frame in frames)


def drawn(draw: random.Random, heads: int, tokens: int, head_dim: int) -> list[list[list[float]]]:
    """Float32 values, tokens of unlike scales."""
    return [
        [[single(draw.gauss(0, 2.0 ** (token % 9 - 4))) for _ in range(head_dim)] for token in range(tokens)]
        for _ in range(heads)
    ]


def main(out: Path) -> None:
    """Writes the captures, the vectors and their index."""
    out.mkdir(parents=True, exist_ok=True)
    draw, entries = random.Random(1), []
    values = drawn(draw, 2, 64, 64)
    flat = [value for head in values for row in head for value in row]
    (out / "values.f32.bin").write_bytes(struct.pack(f"<{len(flat)}f", *flat))
    for name, (encode, _, _) in CODECS.items():
        (out / f"{name}.kv").write_bytes(capture(name, draw))
        (out / f"{name}.bin").write_bytes(payload(encode, values))
        entries.append({"codec": name, "heads": 2, "tokens": 64, "head_dim": 64, "payload": f"{name}.bin"})
    (out / "vectors.json").write_text(json.dumps({"values": "values.f32.bin", "vectors": entries}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
