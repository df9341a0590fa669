"""Writes docs/codecs.md and docs/codecs.svg: what each codec costs in bits, error and time.

Run as `python -m bench.codecs_page`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import codecs
from bench.codec_errors import KINDS, Keys
from bench.figures import Figure, provenance
from hma_serve.kvblock import codec, codec_names

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEAD_DIM = 128
_SHOWN = (
    "f32",
    "bf16",
    "tt_bfp8_b",
    "fp8_e4m3fn",
    "mxint8",
    "mxfp8_e4m3",
    "int8",
    "int4",
    "tt_bfp4_b",
    "nvfp4",
    "mxfp4",
)
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 820, 470, 64, 52, 24, 52


_ERROR = """\
**Error.** Mean relative L2 error of attention output in percent, K and V both packed; 8 KV heads, 4 query heads each,
D = 128, 4096 tokens, synthetic keys from one seed: compare ranks, not digits. *gauss*: normal keys. *outlier*: four
channels a head eight times as wide. *extreme*: two channels a head at a constant of 150 to 300, as in Qwen2.5.
*qk-norm*: RMS-normed keys with log-normal weights, as in Qwen3. The second number of each pair is with
[K offsets](kv-block-format.md#42-k-offsets), calibrated on other keys of the same kind."""
_THROUGHPUT = """\
**Throughput.** Plain torch on one CPU thread, 8 x 1024 x 128 elements: decoding to BF16, and encoding from float32, as
a ratio to a torch copy of the same output in the same run; median of nine, interleaved. Above 1: a view, not a copy."""


@dataclass(frozen=True)
class Row:
    """One codec.

    Attributes:
        name: Its name.
        bits: Per element, scales included.
        plain: Error by kind of keys, percent.
        offset: The same with K offsets.
        decode: Throughput as a ratio to a copy.
        encode: The same.
    """

    name: str
    bits: float
    plain: Mapping[str, float]
    offset: Mapping[str, float]
    decode: Figure
    encode: Figure


def measure() -> list[Row]:
    """Errors and throughput of every codec."""
    figures = {row.name: row for row in codecs.run()}
    torch.set_num_threads(2)
    keys = {kind: Keys(kind) for kind in KINDS}
    rows = []
    for name in codec_names():
        print(name, file=sys.stderr, flush=True)
        rows.append(
            Row(
                name,
                codec(name).group_bytes(HEAD_DIM) * 8 / (32 * HEAD_DIM),
                {kind: keys[kind].error(name, offset=False) for kind in KINDS},
                {kind: keys[kind].error(name, offset=True) for kind in KINDS},
                figures[f"{name}: decode to BF16 / copy"],
                figures[f"{name}: encode from fp32 / copy"],
            )
        )
    return rows


def page(rows: list[Row], made: str) -> str:
    """The document."""
    lines = [
        "# What each codec costs",
        "",
        f"Made by `python -m bench.codecs_page`: {made}.",
        "",
        _ERROR,
        "",
        _THROUGHPUT,
        "",
        "![Attention error by bits per element](codecs.svg)",
        "",
        "| codec | bits | " + " | ".join(KINDS) + " | decode / copy | encode / copy |",
        "|---|---|" + "---|" * (len(KINDS) + 2),
    ]
    for row in rows:
        errors = " | ".join(f"{_percent(row.plain[kind])}, {_percent(row.offset[kind])}" for kind in KINDS)
        lines.append(f"| `{row.name}` | {row.bits:.4g} | {errors} | {row.decode.value:.2g} | {row.encode.value:.2g} |")
    return "\n".join([*lines, ""])


def plot(rows: list[Row]) -> str:
    """Error over bits, on keys without and with channel bias; hollow marks are without offsets."""
    shown = [row for row in rows if row.name in _SHOWN and row.name != "f32"]
    return "\n".join(_svg(shown)) + "\n"


def _svg(rows: list[Row]) -> Iterator[str]:
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="12">'
    yield f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
    half = (_WIDTH - _LEFT - _RIGHT) // 2
    for index, kind in enumerate(("gauss", "extreme")):
        yield from _panel(rows, kind, _LEFT + index * (half + 16), half - 16)
    middle = (_TOP + _HEIGHT - _BOTTOM) // 2
    turned = f'transform="rotate(-90 16 {middle})" text-anchor="middle"'
    yield f'<text x="16" y="{middle}" {turned}>error of attention, %</text>'
    yield f'<text x="{_WIDTH // 2}" y="{_HEIGHT - 10}" text-anchor="middle">bits per element, scales included</text>'
    yield "</svg>"


def _panel(rows: list[Row], kind: str, left: int, width: int) -> Iterator[str]:
    bottom = _HEIGHT - _BOTTOM

    def x(bits: float) -> float:
        return left + width * (math.log2(bits) - 2) / (math.log2(18) - 2)

    def y(error: float) -> float:
        return bottom - (bottom - _TOP) * (math.log10(max(error, 0.1)) + 1) / 3

    note = "hollow: as they are; filled: with K offsets"
    yield f'<text x="{left}" y="{_TOP - 26}" font-weight="bold">keys: {kind}</text>'
    yield f'<text x="{left}" y="{_TOP - 10}" fill="#555">{note}</text>'
    for error in (0.1, 1, 10, 100):
        yield f'<path d="M{left} {y(error):.1f}h{width}" stroke="#ddd"/>'
        yield f'<text x="{left - 6}" y="{y(error) + 4:.1f}" text-anchor="end">{error:g}</text>'
    for bits in (4, 5, 8, 16):
        yield f'<text x="{x(bits):.1f}" y="{bottom + 16}" text-anchor="middle">{bits}</text>'
    used: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: row.offset[kind]):
        place, before, after = x(row.bits), y(row.plain[kind]), y(row.offset[kind])
        yield f'<path d="M{place:.1f} {before:.1f}V{after:.1f}" stroke="#2a6" stroke-opacity=".5"/>'
        yield f'<circle cx="{place:.1f}" cy="{before:.1f}" r="4" fill="none" stroke="#b33"/>'
        yield f'<circle cx="{place:.1f}" cy="{after:.1f}" r="4" fill="#2a6"/>'
        label = after + 4
        while any(abs(place - other) < 90 and abs(label - height) < 12 for other, height in used):
            label -= 12
        used.append((place, label))
        anchor, shift = ("end", -8) if row.bits > 12 else ("start", 8)
        yield f'<text x="{place + shift:.1f}" y="{label:.1f}" text-anchor="{anchor}" font-size="11">{row.name}</text>'


def _percent(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.05 else "0.0"


def main() -> int:
    """Measures and writes."""
    rows = measure()
    (DOCS / "codecs.md").write_text(page(rows, provenance()))
    (DOCS / "codecs.svg").write_text(plot(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
