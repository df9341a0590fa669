"""What one layer of one prompt costs beside its computation: packing it, and putting it where decode reads it.

On a GPU both are what the services do there: packing is what the fused pass takes longer than without it, and unpacking
begins with the copy from pinned memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from bench.ablation_page import LayerTimes
from bench.figures import SEED
from hma_serve import quant
from hma_serve.core.model_config import ModelConfig
from hma_serve.decode.intake import FusedIntake, Intake, MaterialisedIntake, Packed
from hma_serve.decode.page_order import Role
from hma_serve.decode.pages import KvGeometry, PagePool
from hma_serve.model.rotary import rotary_table
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT

_REPEATS = 7


def layer_times(
    model: ModelConfig, codecs: tuple[str, str], tokens: int, devices: tuple[str, str], threads: int = 1
) -> LayerTimes:
    """Medians for keys and values of `tokens` tokens in these codecs, on prefill's device and decode's.

    On a CPU with so many threads.
    """
    torch.set_num_threads(threads)
    prefill, decode = devices
    generator = torch.Generator().manual_seed(SEED)
    values = torch.randn((model.num_kv_heads, tokens, model.head_dim), generator=generator)
    units = [quant.codec(name).encode(values) for name in codecs]
    packed = Packed(*codecs, KV_ROPE_PAIRING_HALF_SPLIT, tokens)

    def pack() -> None:
        for name in codecs:
            quant.codec(name).encode(values)

    pool, intakes = _intakes(model, codecs, tokens, decode)
    if decode == "cuda":
        units = [part.pin_memory() for part in units]

    def unpack(intake: Intake) -> Callable[[], None]:
        pages = pool.reserve(intake.need(packed, tokens))
        places = {Role.K: intake.placed(pages.packed_k), Role.V: intake.placed(pages.packed_v)}

        def store() -> None:
            for role, part in zip((Role.K, Role.V), units, strict=True):
                intake.store(packed, role, 0, places[role], slice(None), part)
            intake.settle()

        return store

    return LayerTimes(
        pack=_pack_on_gpu(model, codecs, tokens) if prefill == "cuda" else _median(pack, prefill),
        fused=_median(unpack(intakes[0]), decode),
        materialise=_median(unpack(intakes[1]), decode),
    )


def _intakes(
    model: ModelConfig, codecs: tuple[str, str], tokens: int, device: str
) -> tuple[PagePool, tuple[Intake, Intake]]:
    """Pages of one layer, and what fills them: fused and materialised."""
    geometry, capacity = KvGeometry(1, model.num_kv_heads, model.head_dim), 2 * tokens + 4096
    if device == "cpu":
        pool = PagePool(
            geometry,
            packed_formats=sorted({*codecs, "bf16"}),
            plain_dtype=torch.bfloat16,
            capacity_tokens=capacity,
        )
        return pool, (FusedIntake(pool), MaterialisedIntake(pool))
    from hma_serve.decode.cuda import CudaIntake
    from hma_serve.decode.kernels.page_orders import fragment_page, packed_kind

    pool = PagePool(
        geometry,
        packed_formats=sorted(name for name in {*codecs} if packed_kind(name) is not None),
        plain_dtype=torch.bfloat16,
        capacity_tokens=capacity,
        orders=fragment_page,
        device=device,
    )
    return pool, (CudaIntake(pool, None, fused=True), CudaIntake(pool, None, fused=False))


def _pack_on_gpu(model: ModelConfig, codecs: tuple[str, str], tokens: int) -> float:
    """Seconds that the pass between QKV and attention takes longer because it packs."""
    from bench.decode.timing import microseconds
    from hma_serve.prefill.kernels.store_kv import store_kv

    device, kv_heads, dim = torch.device("cuda"), model.num_kv_heads, model.head_dim
    sets = range(4)  # More than the caches hold.
    width = (model.num_heads + 2 * kv_heads) * dim
    qkv = [torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for _ in sets]
    q = torch.empty(tokens, model.num_heads, dim, device=device, dtype=torch.bfloat16)
    gain, table = torch.ones(dim, device=device, dtype=torch.bfloat16), rotary_table(dim, 1e6, tokens, device)
    sizes = [quant.codec(name).group_bytes(dim) for name in codecs]
    k, v = (torch.empty(kv_heads, tokens // 32, size, device=device, dtype=torch.uint8) for size in sizes)
    plain_k, plain_v = (torch.empty(tokens, kv_heads, dim, device=device, dtype=torch.bfloat16) for _ in "kv")

    def one(number: int, packed: tuple[torch.Tensor, torch.Tensor] | None) -> Callable[[], object]:
        return lambda: store_kv(
            qkv[number],
            table,
            (gain, gain),
            1e-6,
            q=q,
            packed=packed,
            decoded=(plain_k, plain_v),
            codecs=codecs,
            row=0,
            tokens=tokens,
            start=0,
        )

    with_it, without = (microseconds([one(number, packed) for number in sets]) for packed in ((k, v), None))
    return (with_it - without) / 1e6


def _median(work: Callable[[], None], device: str) -> float:
    samples = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples[1:])
