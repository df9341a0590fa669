"""How much of a KV transfer a prompt waits for, with and without overlap, beside what arithmetic says.

One request of one chunk through real workers over a link whose rate makes the transfer take half, once and twice the
computation. With T_c the computation, measured in the same run, T_x the bytes over the rate and L layers, overlap
should expose T_x / L when T_x <= T_c (the last layer's part) and T_x - T_c (L - 1) / L beyond (the link is busy from
the first layer on); without overlap all of T_x. Everything is given in units of T_c.
"""

from __future__ import annotations

import asyncio

from bench.figures import Figure, figure
from bench.split_pair import Pair, connected, worker
from hma_serve.checkpoint import read_model_config, resolve_checkpoint

TOKENS = 2048
FACTORS = (0.5, 1.0, 2.0)
REPEATS = 5
MODEL = ("--model", "demo", "--threads", "1")


def expected(transfer: float, layers: int, *, overlap: bool) -> float:
    """What is exposed of a transfer, both in units of the computation."""
    if not overlap:
        return transfer
    if transfer <= 1:
        return transfer / layers
    return transfer - (layers - 1) / layers


async def _exposed(pair: Pair, factor: float, layers: int, *, overlap: bool) -> list[Figure]:
    """Figures of one rate."""
    measured, formula = [], []
    passed = await pair.run(TOKENS)
    for _ in range(REPEATS + 1):
        # The machine's speed drifts, so the rate follows the run before; what the run itself took decides the formula.
        rate = passed.payload_bytes / (factor * passed.compute)
        pair.link.limit(rate)
        passed = await pair.run(TOKENS)
        transfer = passed.payload_bytes / rate / passed.compute
        measured.append(passed.exposed / passed.compute)
        formula.append(expected(transfer, layers, overlap=overlap))
    measured, formula = measured[1:], formula[1:]
    name = f"T_x = {factor:g} T_c, overlap {'on' if overlap else 'off'}"
    gaps = [abs(a - b) for a, b in zip(measured, formula, strict=True)]
    return [
        figure(f"{name}: exposed / T_c", measured, "x"),
        figure(f"{name}: formula / T_c", formula, "x"),
        figure(f"{name}: difference / T_c", gaps, "x", "at most 0.15"),
    ]


async def _measure(prefill_arguments: tuple[str, ...], *, overlap: bool) -> list[Figure]:
    layers = read_model_config(resolve_checkpoint("demo")).num_layers
    how = ("--overlap", "on" if overlap else "off")
    rows: list[Figure] = []
    with worker("prefill", *prefill_arguments, *how) as prefill, worker("decode", *MODEL) as decode:
        async with connected(prefill, decode) as pair:
            await pair.run(TOKENS)
            for factor in FACTORS:
                rows += await _exposed(pair, factor, layers, overlap=overlap)
    return rows


def run() -> list[Figure]:
    """Measures with overlap, then without."""
    arguments = (*MODEL, "--chunk-tokens", str(TOKENS), "--prefix-cache-bytes", "0")
    return [row for overlap in (True, False) for row in asyncio.run(_measure(arguments, overlap=overlap))]
