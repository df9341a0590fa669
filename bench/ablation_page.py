"""The ablation as tables for a terminal and a document, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_WIDTH, _LEFT, _TOP, _BAR, _RIGHT = 820, 230, 54, 26, 90
_COLOURS = (("compute", "#4c78a8"), ("exposed", "#e45756"), ("rest", "#bab0ac"))

_ABOUT = """\
Prefill computes in one arithmetic for all rows and one decode worker of each kind stands behind a link of one rate, in
a user-space proxy. *BF16 wire*: the same profile sends BF16 in place of its native codec. *Overlap off*: nothing leaves
before the last layer is computed. *Fused*: decode keeps what arrived and decodes it when it attends; *materialise*: it
decodes on arrival. TTFT runs from the request at decode to the first token; exposed transfer is prefill's time that was
neither queue nor computation, decode's commit included; memory is what decode reserves for the request. Medians.
All rows compute the same: where their computation differs, the machine had other work beside."""
_LAYER = """\
Per layer of the whole prompt: computation in the service (packing is in it), packing K and V alone, their bytes over
the rate, and putting them into decode's pages, by mode."""


@dataclass(frozen=True)
class LayerTimes:
    """Seconds for K and V of one layer.

    Attributes:
        pack: Encoding.
        fused: Into pages as they are.
        materialise: Decoding, and into pages.
    """

    pack: float
    fused: float
    materialise: float


@dataclass(frozen=True)
class Row:
    """One combination; times in seconds, medians.

    Attributes:
        wire: What travels: `bf16` or the native codec's name.
        overlap: Whether layers leave while later ones are computed.
        mode: Of decode: `fused` or `materialise`.
        ttft: To the first token.
        compute: Of prefill's computation.
        exposed: Of transfer that the prompt waited for.
        payload_bytes: On the wire.
        held_bytes: Decode's memory for the request.
    """

    wire: str
    overlap: bool
    mode: str
    ttft: float
    compute: float
    exposed: float
    payload_bytes: int
    held_bytes: float


@dataclass(frozen=True)
class Ablation:
    """One model's result.

    Attributes:
        model: Its name.
        profile: Of the arithmetic.
        device: Of prefill.
        tokens: Of the prompt.
        layers: Of the model.
        rate: Of the link, bytes per second.
        rows: Every combination.
        times: Of one layer, by what is on the wire.
    """

    model: str
    profile: str
    device: str
    tokens: int
    layers: int
    rate: float
    rows: Sequence[Row]
    times: dict[str, LayerTimes]

    @property
    def title(self) -> str:
        """What was measured, in a line."""
        return (
            f"{self.model}, {self.profile} on {self.device}, {self.tokens} tokens in one chunk, "
            f"{self.rate * 8 / 1e6:.0f} Mbit/s"
        )


def tables(result: Ablation) -> str:
    """Both tables."""
    lines = [
        "| wire | overlap | decode | TTFT, ms | on the wire, MB | exposed transfer, ms | decode memory, MiB |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in result.rows:
        lines.append(
            f"| {row.wire} | {_switch(row)} | {row.mode} | {row.ttft * 1e3:.0f} | {row.payload_bytes / 1e6:.2f} "
            f"| {row.exposed * 1e3:.0f} | {row.held_bytes / 2**20:.2f} |"
        )
    lines += ["", _LAYER, "", "| wire | compute, ms | pack | transfer | unpack, fused | unpack, materialise |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for wire, times in result.times.items():
        own = [row for row in result.rows if row.wire == wire]
        compute = sorted(row.compute for row in own)[len(own) // 2] / result.layers
        transfer = own[0].payload_bytes / result.rate / result.layers
        parts = (compute, times.pack, transfer, times.fused, times.materialise)
        lines.append(f"| {wire} | " + " | ".join(f"{part * 1e3:.3g}" for part in parts) + " |")
    return "\n".join(lines)


def write(results: Sequence[Ablation], made: str, directory: Path) -> None:
    """Writes ablation.md and ablation.svg; `made` says by what."""
    parts = ["# What the native wire, overlap and fused decoding are worth", "", f"Made by {made}.", "", _ABOUT, ""]
    parts += ["![Time to the first token by combination](ablation.svg)", ""]
    for result in results:
        parts += [f"## {result.title}", "", tables(result), ""]
    (directory / "ablation.md").write_text("\n".join(parts), encoding="utf-8")
    (directory / "ablation.svg").write_text("\n".join(_svg(results)) + "\n", encoding="utf-8")


def _switch(row: Row) -> str:
    return "on" if row.overlap else "off"


def _svg(results: Sequence[Ablation]) -> Iterator[str]:
    step = max(len(result.rows) for result in results) * _BAR + _TOP + 20
    height = step * len(results) + 30
    box = f'viewBox="0 0 {_WIDTH} {height}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="12">'
    yield f'<rect width="{_WIDTH}" height="{height}" fill="white"/>'
    for index, result in enumerate(results):
        yield from _panel(result, index * step)
    at = _LEFT
    for name, colour in _COLOURS:
        text = {"compute": "computation", "exposed": "exposed transfer", "rest": "handshakes and decode's first step"}[
            name
        ]
        yield f'<rect x="{at}" y="{height - 22}" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{at + 17}" y="{height - 12}">{text}</text>'
        at += 150
    yield "</svg>"


def _panel(result: Ablation, top: int) -> Iterator[str]:
    longest = max(row.ttft for row in result.rows)
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    yield f'<text x="16" y="{top + 26}" font-weight="bold">TTFT: {result.title}</text>'
    for index, row in enumerate(result.rows):
        y = top + _TOP - 10 + index * _BAR
        name = f"{row.wire}, overlap {_switch(row)}, {row.mode}"
        yield f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{name}</text>'
        at = float(_LEFT)
        rest = max(0.0, row.ttft - row.compute - row.exposed)
        for (_, colour), part in zip(_COLOURS, (row.compute, row.exposed, rest), strict=True):
            yield f'<rect x="{at:.1f}" y="{y}" width="{part * scale:.1f}" height="{_BAR - 8}" fill="{colour}"/>'
            at += part * scale
        yield f'<text x="{at + 6:.1f}" y="{y + 14}">{row.ttft * 1e3:.0f} ms</text>'
