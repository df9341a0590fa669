"""What packing and unpacking costs on the CPU, as a ratio to a torch copy of the same output in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench.figures import SEED, Figure, figure, interleave
from hma_serve.kvblock import codec_names
from hma_serve.quant import codec

HEADS, TOKENS, HEAD_DIM = 8, 1024, 128
REPEATS = 9


def seconds(work: Callable[[], object]) -> float:
    """One timed call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run() -> list[Figure]:
    """Times every codec with one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    values = torch.randn(HEADS, TOKENS, HEAD_DIM)
    target, source = torch.empty_like(values, dtype=torch.bfloat16), values.bfloat16()
    figures = []
    for name in codec_names():
        scheme = codec(name)
        packed = scheme.encode(values)
        packed_target = torch.empty_like(packed)

        def decode(scheme=scheme, packed=packed) -> object:  # type: ignore[no-untyped-def]
            return scheme.decode(packed, dtype=torch.bfloat16)

        def encode(scheme=scheme) -> object:  # type: ignore[no-untyped-def]
            return scheme.encode(values)

        def copy_packed(packed_target=packed_target, packed=packed) -> object:  # type: ignore[no-untyped-def]
            return packed_target.copy_(packed)

        samples = interleave(
            REPEATS,
            lambda decode=decode: seconds(decode),  # type: ignore[misc]
            lambda: seconds(lambda: target.copy_(source)),
            lambda encode=encode: seconds(encode),  # type: ignore[misc]
            lambda copy_packed=copy_packed: seconds(copy_packed),  # type: ignore[misc]
        )
        decoding = [copied / decoded for decoded, copied in zip(samples[0], samples[1], strict=True)]
        encoding = [copied / encoded for encoded, copied in zip(samples[2], samples[3], strict=True)]
        goal = "at least 0.02" if name == "tt_bfp8_b" else ""
        figures.append(figure(f"{name}: decode to BF16 / copy", decoding, "x", goal))
        figures.append(figure(f"{name}: encode from fp32 / copy", encoding, "x"))
    return figures
