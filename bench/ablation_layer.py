"""What one layer of one prompt costs beside its computation: packing it, and putting it where decode reads it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from bench.ablation_page import LayerTimes
from bench.figures import SEED
from hma_serve import quant
from hma_serve.core.model_config import ModelConfig
from hma_serve.decode.intake import FusedIntake, MaterialisedIntake, Packed
from hma_serve.decode.page_order import Role
from hma_serve.decode.pages import KvGeometry, PagePool
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT

_REPEATS = 7


def layer_times(model: ModelConfig, codecs: tuple[str, str], tokens: int, devices: tuple[str, str]) -> LayerTimes:
    """Medians for keys and values of `tokens` tokens in these codecs, on prefill's device and decode's.

    One thread on a CPU.
    """
    torch.set_num_threads(1)
    prefill, decode = devices
    geometry = KvGeometry(1, model.num_kv_heads, model.head_dim)
    pool = PagePool(
        geometry,
        packed_formats=sorted({*codecs, "bf16"}),
        plain_dtype=torch.bfloat16,
        capacity_tokens=2 * tokens + 4096,
        device=decode,
    )
    generator = torch.Generator().manual_seed(SEED)
    values = torch.randn((model.num_kv_heads, tokens, model.head_dim), generator=generator).to(prefill)
    packed = Packed(*codecs, KV_ROPE_PAIRING_HALF_SPLIT, tokens)
    units = [quant.codec(name).encode(values).to(decode) for name in codecs]

    def pack() -> None:
        for name in codecs:
            quant.codec(name).encode(values)

    def unpack(intake: FusedIntake | MaterialisedIntake) -> Callable[[], None]:
        pages = pool.reserve(intake.need(packed, tokens))
        places = (pages.packed_k.to(decode), pages.packed_v.to(decode))

        def store() -> None:
            for role, addresses, part in zip((Role.K, Role.V), places, units, strict=True):
                intake.store(packed, role, 0, addresses, slice(None), part)

        return store

    return LayerTimes(
        pack=_median(pack, prefill),
        fused=_median(unpack(FusedIntake(pool)), decode),
        materialise=_median(unpack(MaterialisedIntake(pool)), decode),
    )


def _median(work: Callable[[], None], device: str) -> float:
    samples = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples[1:])
