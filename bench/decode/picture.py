"""The result as a picture: steps beside vLLM's and their floor. Plain SVG, so that it needs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_ROW, _LEFT, _SCALE_WIDTH = 30, 190, 560
_COLOURS = {"ms": "#1f6feb", "vllm_ms": "#9aa4af", "floor_ms": "#2da44e"}
_NAMES = {"ms": "this step", "vllm_ms": "vLLM 0.26, one H200, its better KV", "floor_ms": "floor at the copy bandwidth"}


def picture(found: dict[str, Any]) -> str:
    """SVG of every step with packed KV."""
    rows = [row for row in found["steps"] if row["page_format"] != "bf16"]
    longest = max((max(row["ms"], row["vllm_ms"] or 0) for row in rows), default=1.0)
    height = _ROW * len(rows) + 60
    body = "".join(line for at, row in enumerate(rows) for line in _bars(row, 50 + at * _ROW, longest))
    legend = "".join(
        f'<rect x="{_LEFT + at * 200}" y="26" width="10" height="10" fill="{_COLOURS[key]}"/>'
        f'<text x="{_LEFT + 14 + at * 200}" y="35">{name}</text>'
        for at, (key, name) in enumerate(_NAMES.items())
    )
    title = f"Decode step, ms: {found['gpu']}, packed KV (tt_bfp8_b)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="10" y="18" font-size="14">{title}</text>'
        f"{legend}{body}</svg>\n"
    )


def _bars(row: dict[str, Any], top: int, longest: float) -> Iterator[str]:
    yield f'<text x="10" y="{top + 14}">Qwen3-{row["model"]}, {row["batch"]} x {row["context"]:,}</text>'
    for at, key in enumerate(("ms", "vllm_ms", "floor_ms")):
        if row[key]:
            width = row[key] / longest * _SCALE_WIDTH
            yield f'<rect x="{_LEFT}" y="{top + 8 * at}" width="{width:.1f}" height="7" fill="{_COLOURS[key]}"/>'
            if at < 2:
                yield f'<text x="{_LEFT + width + 4:.1f}" y="{top + 8 * at + 7}" font-size="8">{row[key]:.2f}</text>'
