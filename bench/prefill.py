"""Prefill through the service against the same emulation called in process, and what packing adds to a layer.

The service's part is all of it: the request over gRPC, the engine's process, slots, the stream to a real decode worker
and its commit. The reference calls the accelerator's layers on the same tokens, in chunks of the same size, and keeps
the KV. Both have one thread.
"""

from __future__ import annotations

import asyncio
import time

import torch

from bench.figures import SEED, Figure, figure, ratios
from bench.split_pair import Pair, connected, worker
from hma_serve import quant
from hma_serve.checkpoint import read_model_config, resolve_checkpoint
from hma_serve.prefill.accelerators import AcceleratorSpec, Segment
from hma_serve.prefill.accelerators.cpu import CpuAccelerator
from hma_serve.prefill.profiles import find_profile

MODEL, PROFILE = "demo", "tt_bfp8"
TOKENS, CHUNK = 2048, 512
REPEATS = 7


class InProcess:
    """The reference: the accelerator alone."""

    def __init__(self) -> None:
        directory = resolve_checkpoint(MODEL)
        self.model = read_model_config(directory)
        self.profile = find_profile(PROFILE)
        self.accelerator = CpuAccelerator(AcceleratorSpec(directory, self.model, self.profile))

    def prefill(self) -> float:
        """Tokens per second of one prompt."""
        generator = torch.Generator().manual_seed(SEED)
        tokens = torch.randint(3, self.model.vocab_size, (TOKENS,), generator=generator).tolist()
        began = time.perf_counter()
        store = self.accelerator.new_store(TOKENS)
        for start in range(0, TOKENS, CHUNK):
            hidden = self.accelerator.embed(tokens[start : start + CHUNK])
            for layer in range(self.model.num_layers):
                hidden = self.accelerator.run_layer(layer, hidden, [Segment(start, CHUNK, store)])
        return TOKENS / (time.perf_counter() - began)

    def packing(self) -> float:
        """Seconds that packing one layer's K and V of a whole prompt takes."""
        shape = (self.model.num_kv_heads, TOKENS, self.model.head_dim)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        began = time.perf_counter()
        for name in (self.profile.k_codec, self.profile.v_codec):
            for start in range(0, TOKENS, CHUNK):
                quant.codec(name).encode(values[:, start : start + CHUNK].contiguous())
        return time.perf_counter() - began


async def _service(pair: Pair) -> float:
    """Tokens per second from the call of prefill to decode's commit."""
    passed = await pair.run(TOKENS)
    return TOKENS / (passed.compute + passed.exposed)


async def _measure(pair: Pair, reference: InProcess) -> list[Figure]:
    served: list[float] = []
    called: list[float] = []
    packed: list[float] = []
    for repeat in range(REPEATS + 1):
        row = (await _service(pair), reference.prefill(), reference.packing())
        if repeat:
            for kept, value in zip((served, called, packed), row, strict=True):
                kept.append(value)
    layer = [TOKENS / rate / reference.model.num_layers for rate in called]
    shares = ratios(packed, [whole - pack for whole, pack in zip(layer, packed, strict=True)])
    return [
        figure(f"{PROFILE}, {TOKENS} tokens, in process", called, "tok/s"),
        figure(f"{PROFILE}, {TOKENS} tokens, through the service", served, "tok/s"),
        figure("service / in process", ratios(served, called), "x", "at least 0.85"),
        figure("packing / the rest of a layer", shares, "x", "at most 0.10"),
    ]


def run() -> list[Figure]:
    """Starts workers and measures them beside the reference."""
    torch.set_num_threads(1)
    reference = InProcess()
    same = ("--model", MODEL, "--threads", "1")
    prefill_only = ("--profile", PROFILE, "--chunk-tokens", str(CHUNK), "--prefix-cache-bytes", "0")

    async def measure() -> list[Figure]:
        async with connected(prefill, decode) as pair:
            return await _measure(pair, reference)

    with worker("prefill", *same, *prefill_only) as prefill, worker("decode", *same) as decode:
        return asyncio.run(measure())
