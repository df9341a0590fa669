"""Prefill of Qwen3's shapes on one GPU with random weights: FP8 against BF16, the products' own rate, and packing.

Not part of `make bench`: run it on a GPU machine as `python -m bench.prefill_gpu [MODEL ...]`. It compares with the CPU
reference on a small model first, then times, writes `prefill_gpu.json` into $OUT or the current directory, and prints
its table last. Every candidate is timed in turn in one run, so drift of the clocks hits all alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.decode.timing import microseconds
from bench.figures import SEED, Figure, figure, provenance, ratios, show
from hma_serve import quant
from hma_serve.core.model_config import ModelConfig
from hma_serve.model import tensor_shapes
from hma_serve.prefill.accelerators import Accelerator, AcceleratorSpec, Segment
from hma_serve.prefill.accelerators.causal import attend
from hma_serve.prefill.accelerators.cpu import CpuAccelerator
from hma_serve.prefill.accelerators.cuda import CudaAccelerator
from hma_serve.prefill.kernels.quantize_rows import normed_rows, plain_rows, swiglu_rows
from hma_serve.prefill.kernels.store_kv import store_kv
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.profiles import find_profile

TOKENS, REPEATS = 4096, 9
SHAPES = {
    "4B": (2560, 36, 32, 9728),
    "8B": (4096, 36, 32, 12288),
    "14B": (5120, 40, 40, 17408),
    "32B": (5120, 64, 64, 25600),
}
"""Hidden size, layers, heads, intermediate size of Qwen3; 8 key/value heads of 128."""


def shape(
    hidden: int, layers: int, heads: int, intermediate: int, *, kv_heads: int = 8, vocab: int = 151936
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


class RandomWeights(Mapping[str, torch.Tensor]):
    """Drawn when asked for, the same for the same name; on the GPU unless told otherwise."""

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype = torch.bfloat16, to: str = "cuda") -> None:
        self._shapes = tensor_shapes(model, with_head=False)
        self._seeds = {name: SEED + index for index, name in enumerate(self._shapes)}
        self._dtype, self._to = dtype, to

    def __getitem__(self, name: str) -> torch.Tensor:
        size = self._shapes[name]
        generator = torch.Generator("cuda").manual_seed(self._seeds[name])
        noise = torch.randn(size, generator=generator, device="cuda")
        drawn = 1 + 0.2 * noise if "norm" in name else noise / size[-1] ** 0.5
        return drawn.bfloat16().to(self._to, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def spec(model: ModelConfig, profile: str) -> AcceleratorSpec:
    return AcceleratorSpec(Path(), model, find_profile(profile))


def prompt(tokens: int, vocab: int) -> list[int]:
    ids: list[int] = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(SEED)).tolist()
    return ids


def prefill(
    accelerator: Accelerator, model: ModelConfig, ids: Sequence[int], chunk: int, profile: str
) -> list[np.ndarray]:
    """Every layer's decoded keys and values, float32 [heads, tokens, D], in order."""
    layout = KvLayout.of(model, find_profile(profile))
    names = (find_profile(profile).k_codec, find_profile(profile).v_codec)
    store, groups = accelerator.new_store(len(ids)), len(ids) // 32
    for start in range(0, len(ids), chunk):
        hidden = accelerator.embed(ids[start : start + chunk])
        for layer in range(model.num_layers):
            hidden = accelerator.run_layer(layer, hidden, [Segment(start, len(hidden), store)])
    found = []
    for layer in range(model.num_layers):
        for role, size, name in zip(ROLES, layout.group_bytes, names, strict=True):
            out = np.zeros((model.num_kv_heads, groups, size), np.uint8)
            if (copy := store.copy_out(layer, role, slice(0, model.num_kv_heads), slice(0, groups), out)) is not None:
                copy.wait()
            found.append(quant.codec(name).decode(torch.from_numpy(out)).numpy())
    return found


def noisy_reference(model: ModelConfig, ids: Sequence[int], profile: str) -> list[np.ndarray]:
    """The CPU reference with its products off by 2^-11, as much as another order of summation and bfloat16 allow."""
    generator, exact = torch.Generator().manual_seed(SEED), quant.multiply

    def noisy(x: quant.Operand, weight: quant.Operand, dtype: torch.dtype) -> torch.Tensor:
        product = exact(x, weight, torch.float32)
        return product.mul_(1 + 2**-11 * torch.randn(product.shape, generator=generator)).to(dtype)

    with unittest.mock.patch.object(quant, "multiply", noisy):
        return prefill(
            CpuAccelerator(spec(model, profile), RandomWeights(model, to="cpu")), model, ids, len(ids), profile
        )


def check(profile: str) -> list[Figure]:
    """The GPU against the CPU reference on a small model, whole and in chunks.

    A difference in a last place becomes a whole step of the format where a value lies near a boundary, and layers add
    to it; so the limit is what small noise does to the reference itself.
    """
    model, ids = shape(512, 3, 8, 1024, kv_heads=2, vocab=1000), prompt(256, 1000)
    reference = CpuAccelerator(spec(model, profile), RandomWeights(model, to="cpu"))
    gpu = CudaAccelerator(spec(model, profile), RandomWeights(model))
    expected = prefill(reference, model, ids, 256, profile)

    def errors(found: Sequence[np.ndarray]) -> list[float]:
        return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected, strict=True)]

    limits = [max(0.02, 2 * error) for error in errors(noisy_reference(model, ids, profile))]
    figures = [figure(f"{profile}: limit, 0.02 or twice what noise does to the CPU's", limits, "")]
    for chunk in (256, 96):
        found = errors(prefill(gpu, model, ids, chunk, profile))
        name = f"{profile}, chunks of {chunk}: error of decoded KV against the CPU"
        figures.append(figure(name, found, "", "below the limit, layer by layer"))
        if not all(error <= limit for error, limit in zip(found, limits, strict=True)):
            raise SystemExit(f"{name}: {found}, allowed {limits}")
    return figures


def milliseconds(work: Callable[[], object]) -> float:
    """On the GPU: it is kept busy while the host queues the work, so launches do not count."""
    torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def timed(*works: Callable[[], object], repeats: int = REPEATS) -> list[list[float]]:
    """Milliseconds of each, in turn, after two rounds of warming up."""
    samples: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats + 2):
        for kept, work in zip(samples, works, strict=True):
            value = milliseconds(work)
            if repeat > 1:
                kept.append(value)
    return samples


def product_rates() -> tuple[Callable[[], object], Callable[[], object], float]:
    """8192 cubed in FP8 with row-wise scales and in BF16, random data, and the operations of one."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    (a8, a_scale), (b8, b_scale) = (plain_rows(x, torch.float8_e4m3fn) for x in (a, b))

    def fp8() -> object:
        return torch._scaled_mm(
            a8, b8.T, scale_a=a_scale, scale_b=b_scale.T, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return fp8, lambda: a @ b.T, 2.0 * size**3


def operations(model: ModelConfig, tokens: int) -> float:
    """Multiplications and additions of all layers: the products, and causal attention."""
    inner = model.q_size + 2 * model.kv_size + model.q_size
    products = 2.0 * tokens * model.hidden_size * (inner + 3 * model.intermediate_size)
    attention = 2.0 * tokens * tokens * model.q_size
    return model.num_layers * (products + attention)


def whole_prompts(name: str) -> list[Figure]:
    """FP8 against BF16 over all layers, with the products' rates measured between them."""
    hidden, layers, heads, intermediate = SHAPES[name]
    model = shape(hidden, layers, heads, intermediate)
    ids, weights = prompt(TOKENS, model.vocab_size), RandomWeights(model)
    devices = {profile: CudaAccelerator(spec(model, profile), weights) for profile in ("fp8_e4m3", "bf16", "int8")}

    def run(profile: str, *, copy: bool = False, packed: bool = True) -> Callable[[], object]:
        device, layout = devices[profile], KvLayout.of(model, find_profile(profile))
        memory = bytearray(layout.layer_bytes(TOKENS) * 2)
        device.pin(memoryview(memory))

        def layers() -> None:
            store, residual = device.new_store(TOKENS), device.embed(ids)
            for layer in range(model.num_layers):
                residual = device.run_layer(layer, residual, [Segment(0, TOKENS, store)])
                if copy:
                    half = memoryview(memory)[layer % 2 * (len(memory) // 2) :]
                    for role, out in zip(ROLES, layout.views(half, TOKENS, layout.heads), strict=True):
                        store.copy_out(layer, role, slice(0, layout.heads), slice(0, TOKENS // 32), out)

        def work() -> None:
            with packing(on=packed):
                layers()

        return work

    fp8_product, bf16_product, flops = product_rates()
    fp8, unpacked, bf16, int8, rate8, rate16, copied = timed(
        run("fp8_e4m3"),
        run("fp8_e4m3", packed=False),
        run("bf16"),
        run("int8"),
        fp8_product,
        bf16_product,
        run("fp8_e4m3", copy=True),
    )
    work = operations(model, TOKENS)
    achieved = [work / ms / 1e9 for ms in fp8]
    peak = [flops / ms / 1e9 for ms in rate8]
    figures = [
        figure(f"{name}, {TOKENS} tokens: FP8", fp8, "ms"),
        figure(f"{name}, {TOKENS} tokens: BF16", bf16, "ms"),
        figure(f"{name}, {TOKENS} tokens: INT8", int8, "ms"),
        figure(f"{name}: BF16 / FP8", ratios(bf16, fp8), "x", "at least 1.4"),
        figure(f"{name}: BF16 / INT8", ratios(bf16, int8), "x"),
        figure(f"{name}: FP8 rate", achieved, "TFLOP/s"),
        figure("8192^3, FP8 row-wise", peak, "TFLOP/s"),
        figure("8192^3, BF16", [flops / ms / 1e9 for ms in rate16], "TFLOP/s"),
        figure(f"{name}: FP8 prefill / FP8 product rate", ratios(achieved, peak), "x", "at least 0.55"),
        figure(
            f"{name}: packing, (FP8 layers with it - without) / with",
            [(a - b) / a for a, b in zip(fp8, unpacked, strict=True)],
            "x",
            "at most 0.03",
        ),
        figure(f"{name}: FP8 with every layer copied to the host / without", ratios(copied, fp8), "x"),
        figure(f"{name}: FP8 tokens per second", [TOKENS / ms * 1e3 for ms in fp8], ""),
    ]
    layer = statistics.median(fp8) / model.num_layers
    return figures + packing_pass(name, devices["fp8_e4m3"], model, layer) + passes(name, model, layer)


@contextlib.contextmanager
def packing(*, on: bool) -> Iterator[None]:
    """The fused pass of every layer with the packing of K and V in it, or without: all else in it is the same."""

    def unpacked(*args: Any, **how: Any) -> None:
        store_kv(*args, **(how | {"packed": None}))

    with unittest.mock.patch("hma_serve.prefill.accelerators.cuda.store_kv", store_kv if on else unpacked):
        yield


def packing_pass(name: str, device: CudaAccelerator, model: ModelConfig, layer: float) -> list[Figure]:
    """The pass that packs, alone: with packing and without, in graphs over more memory than the caches hold."""
    rows, sets = model.num_heads + 2 * model.num_kv_heads, range(4)
    qkv = [torch.randn(TOKENS, rows * model.head_dim, device="cuda", dtype=torch.bfloat16) for _ in sets]
    q = torch.empty(TOKENS, model.num_heads, model.head_dim, device="cuda", dtype=torch.bfloat16)
    part = Segment(0, TOKENS, device.new_store(TOKENS))

    def one(each: int) -> Callable[[], object]:
        return lambda: device._store(each, device._layers[each], qkv[each], q, 0, part)

    samples: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(REPEATS):
        for on, kept in samples.items():
            with packing(on=on):
                kept.append(microseconds([one(each % model.num_layers) for each in sets]))
    added = [(a - b) / 1e3 / layer for a, b in zip(samples[True], samples[False], strict=True)]
    codec = device._layout.group_bytes[0] / 32 / model.head_dim
    values = TOKENS * model.head_dim * (model.num_heads * 4 + 2 * model.num_kv_heads * (4 + codec))
    return [
        figure(f"{name} layer: QK norm, rotation and packing, one pass", samples[True], "us"),
        figure(f"{name} layer: the same without packing", samples[False], "us"),
        figure(f"{name} layer: the pass with packing", [values / us / 1e6 for us in samples[True]], "TB/s"),
        figure(f"{name} layer: what packing adds to the pass / layer", added, "x", "at most 0.03"),
    ]


def passes(name: str, model: ModelConfig, layer: float) -> list[Figure]:
    """What else lies between the products of one layer, and its share of the layer; each in a graph."""
    fp8 = torch.float8_e4m3fn
    hidden, delta = (torch.randn(TOKENS, model.hidden_size, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    gate_up = torch.randn(TOKENS, 2 * model.intermediate_size, device="cuda", dtype=torch.bfloat16)
    attended = torch.randn(TOKENS, model.q_size, device="cuda", dtype=torch.bfloat16)
    gain = torch.ones(model.hidden_size, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(TOKENS, model.num_heads, model.head_dim, device="cuda", dtype=torch.bfloat16)
    shape = (TOKENS, model.num_kv_heads, model.head_dim)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    works: dict[str, Callable[[], object]] = {
        "attention": lambda: attend(q, keys, values),
        "residual, norm, quantise, fused": lambda: normed_rows(hidden, gain, 1e-6, fp8, delta=delta),
        "SwiGLU, quantise, fused": lambda: swiglu_rows(gate_up, fp8),
        "quantise what attention gave": lambda: plain_rows(attended, fp8),
    }
    return [
        figure(f"{name} layer: {work} / layer", [microseconds([run] * 4) / 1e3 / layer for _ in range(REPEATS)], "x")
        for work, run in works.items()
    ]


def backends(name: str) -> list[Figure]:
    """torch's attention kernels on the shape, causal."""
    _, _, heads, _ = SHAPES[name]
    q = torch.randn(TOKENS, heads, 128, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(TOKENS, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    figures = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                (whole,) = timed(lambda: attend(q, keys, values))
                (half,) = timed(lambda: attend(q[TOKENS // 2 :], keys, values))
        except RuntimeError as error:
            print(f"{backend.name}: {str(error)[:200]}")
            continue
        figures.append(figure(f"{name} attention, {backend.name}, whole prompt", whole, "ms"))
        figures.append(figure(f"{name} attention, {backend.name}, second half", half, "ms"))
    return figures


def main(models: list[str]) -> int:
    """Runs everything for the named models."""
    torch.manual_seed(SEED)
    tables = {"against the CPU reference": [row for profile in ("bf16", "fp8_e4m3", "int8") for row in check(profile)]}
    for name in models or ["8B"]:
        tables[f"attention of {name}"] = backends(name)
        tables[f"Qwen3-{name}, random weights"] = whole_prompts(name)
        torch.cuda.empty_cache()
    head = {
        "provenance": provenance(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "seed": SEED,
        "tokens": TOKENS,
    }
    rows = {title: [vars(row) for row in table] for title, table in tables.items()}
    target = Path(os.environ.get("OUT", ".")) / "prefill_gpu.json"
    target.write_text(json.dumps(head | {"tables": rows}, indent=1))
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    for title, table in tables.items():
        show(title, table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
