"""The whole path's figures as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.ingest import ALLOWED, Ingest, Load

_WIDTH, _LEFT, _BAR, _RIGHT = 820, 230, 24, 110
_COLOURS = {"compute": "#4c78a8", "exposed": "#e45756", "rest": "#bab0ac", "full": "#9aa4af", "best": "#2da44e"}
_NAMES = {
    "compute": "computation",
    "exposed": "exposed transfer",
    "rest": "handshakes and decode's first step",
    "full": "GB/s at full rate",
    "best": "GB/s within the allowed rise",
}

_ABOUT = """\
One request at a time for the first two tables, medians. *Exposed* is prefill's time that was neither queue nor
computation, decode's commit included. Per layer: *compute* in the service, packing in it; *pack* and *unpack* alone, on
a GPU in the kernels that do it there; *transfer*, from the moment a layer was computed and the one before had left
until it was handed to the transport whole."""


@dataclass(frozen=True)
class LayerParts:
    """Seconds of one layer of one prompt; None: not measured yet."""

    compute: float
    transfer: float
    pack: float | None = None
    unpack: float | None = None


@dataclass(frozen=True)
class PathRow:
    """One prefill worker and length of prompts; seconds, medians.

    Attributes:
        prefill: Which worker.
        tokens: Of the prompt.
        ttft: To the first token.
        compute: Of prefill's computation.
        exposed: Of transfer that the prompt waited for.
        tpot: Between output tokens.
        payload_bytes: On the wire.
        layer: What one layer took.
    """

    prefill: str
    tokens: int
    ttft: float
    compute: float
    exposed: float
    tpot: float
    payload_bytes: int
    layer: LayerParts


@dataclass
class Result:
    """Everything that one run has found so far."""

    provenance: str
    workload: str
    load: Load
    paths: list[PathRow] = field(default_factory=list)
    ingest: list[Ingest] = field(default_factory=list)


def tables(result: Result) -> str:
    """Markdown."""
    load = result.load
    lines = [f"# The whole path: {result.workload}", "", f"{result.provenance}.", "", _ABOUT, ""]
    lines += ["![TTFT and ingest](whole_path.svg)", ""]
    lines += [
        "| prefill | tokens | TTFT, ms | computation | exposed | KV, MB | TPOT, ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result.paths:
        parts = [1e3 * row.ttft, 1e3 * row.compute, 1e3 * row.exposed, row.payload_bytes / 1e6, 1e3 * row.tpot]
        lines.append(f"| {row.prefill} | {row.tokens} | " + " | ".join(f"{part:.3g}" for part in parts) + " |")
    lines += ["", "| a layer, ms | tokens | compute | pack | pack / compute | transfer | unpack |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for row in result.paths:
        layer = row.layer
        share = "–" if layer.pack is None else f"{layer.pack / layer.compute:.1%}"
        cells = [_ms(layer.compute), _ms(layer.pack), share, _ms(layer.transfer), _ms(layer.unpack)]
        lines.append(f"| {row.prefill} | {row.tokens} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Ingest of {load.codec} into one decode worker that decodes {load.batch} requests of {load.context} tokens",
        f"and more. *Allowed*: the fastest rate tried at which the p99 of a token is at most {ALLOWED:g} times",
        "that without.",
        "",
        "| receivers | full rate, GB/s | p99 TPOT alone, ms | at full rate, ms | rise | allowed, GB/s | rise there |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for taken in result.ingest:
        full, best = taken.points[0], taken.best
        allowed = ["none", "–"] if best is None else [f"{best.rate / 1e9:.3g}", f"{best.rise:.3f}"]
        cells = [str(taken.receivers), f"{full.rate / 1e9:.3g}", _ms(full.alone), _ms(full.beside), f"{full.rise:.3f}"]
        lines.append("| " + " | ".join([*cells, *allowed]) + " |")
    return "\n".join(lines) + "\n"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.3g}"


def picture(result: Result) -> str:
    """SVG: where the time to the first token goes, and ingest by receivers."""
    height = 130 + _BAR * (len(result.paths) + 2 * len(result.ingest))
    return "\n".join(_svg(result, height)) + "\n"


def _svg(result: Result, height: int) -> Iterator[str]:
    box = f'viewBox="0 0 {_WIDTH} {height}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="12">'
    yield f'<rect width="{_WIDTH}" height="{height}" fill="white"/>'
    yield f'<text x="16" y="22" font-weight="bold">TTFT, one request: {result.workload}</text>'
    longest = max((row.ttft for row in result.paths), default=1.0)
    y = 36
    for row in result.paths:
        rest = max(0.0, row.ttft - row.compute - row.exposed)
        parts = {"compute": row.compute, "exposed": max(0.0, row.exposed), "rest": rest}
        yield from _bar(y, f"{row.prefill}, {row.tokens} tokens", parts, longest, f"{1e3 * row.ttft:.0f} ms")
        y += _BAR
    yield from _legend(y + 6, ("compute", "exposed", "rest"))
    y += 50
    yield f'<text x="16" y="{y}" font-weight="bold">KV into one decode worker ({result.load.codec})</text>'
    y += 14
    fastest = max((taken.points[0].rate for taken in result.ingest), default=1.0)
    for taken in result.ingest:
        points = {"full": taken.points[0], "best": taken.best}
        for name, point in points.items():
            rate, rise = (0.0, "") if point is None else (point.rate, f", p99 x {point.rise:.2f}")
            label = f"{taken.receivers} receivers" if name == "full" else ""
            yield from _bar(y, label, {name: rate}, fastest, f"{rate / 1e9:.2f}{rise}")
            y += _BAR
    yield from _legend(y + 6, ("full", "best"))
    yield "</svg>"


def _bar(y: int, name: str, parts: dict[str, float], longest: float, says: str) -> Iterator[str]:
    yield f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{name}</text>'
    at, scale = float(_LEFT), (_WIDTH - _LEFT - _RIGHT) / longest
    for kind, part in parts.items():
        yield f'<rect x="{at:.1f}" y="{y}" width="{part * scale:.1f}" height="{_BAR - 7}" fill="{_COLOURS[kind]}"/>'
        at += part * scale
    yield f'<text x="{at + 6:.1f}" y="{y + 13}">{says}</text>'


def _legend(y: int, kinds: tuple[str, ...]) -> Iterator[str]:
    for at, kind in enumerate(kinds):
        x = _LEFT + at * 180
        yield f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_COLOURS[kind]}"/>'
        yield f'<text x="{x + 17}" y="{y + 10}">{_NAMES[kind]}</text>'
