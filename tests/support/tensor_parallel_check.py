"""Compares an accelerator of several ranks with one that holds everything; a program, since it becomes a leading rank.

Usage: tensor_parallel_check.py CHECKPOINT PROFILE RANKS [DEVICE]. Prints the largest relative error of decoded KV.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from hma_serve import quant
from hma_serve.ipc import Arena
from hma_serve.prefill.accelerators import Accelerator, KvStore, Segment, open_accelerator, rank_group
from hma_serve.prefill.accelerators.tensor_parallel import Ranks, TensorParallel
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.load_arguments import add_load_arguments, load_arguments, spec_of

TOKENS, CHUNK = 96, 64


def main(checkpoint: str, profile: str, ranks: str, kind: str = "cpu") -> int:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    add_load_arguments(parser)
    flags = ["--checkpoint", checkpoint, "--device", kind, "--profile", profile, "--threads", "1"]
    args = parser.parse_args([*flags, "--log-format", "human"])
    spec = spec_of(args)
    layout = KvLayout.of(spec.model, spec.profile)
    with Arena.create(2, layout.layer_bytes(TOKENS)) as arena:
        parallel = TensorParallel(
            Ranks(int(ranks), load_arguments(args), arena),
            layout.heads,
            lambda shard: open_accelerator(kind, replace(spec, shard=shard)),
        )
        codecs = (spec.profile.k_codec, spec.profile.v_codec)
        print(parallel.device)
        print(compare(parallel, open_accelerator(kind, spec), layout, arena, codecs))
    return 0


def compare(
    parallel: Accelerator, alone: Accelerator, layout: KvLayout, arena: Arena, codecs: tuple[str, str]
) -> float:
    ids = torch.randint(320, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = alone.new_store(TOKENS)
    run(alone, layout, ids, expected, 0, TOKENS, TOKENS)
    first, second = parallel.new_store(TOKENS), parallel.new_store(TOKENS)
    run(parallel, layout, ids, first, 0, TOKENS, CHUNK)
    # The first 64 tokens of the other prompt are put back, the rest is computed over them.
    for layer in range(layout.layers):
        for role in ROLES:
            second.copy_in(
                layer, role, slice(0, layout.heads), slice(0, 2), other_memory(layout, first, layer, role)[:, :2]
            )
    run(parallel, layout, ids, second, 64, TOKENS, CHUNK)
    worst = 0.0
    for layer in range(layout.layers):
        for role, codec in zip(ROLES, codecs, strict=True):
            found = slot(layout, arena, first, layer, role)
            assert np.array_equal(found, other_memory(layout, first, layer, role))
            assert np.array_equal(found, slot(layout, arena, second, layer, role)), "a prompt that was put back differs"
            right = other_memory(layout, expected, layer, role)
            a, b = (quant.codec(codec).decode(torch.from_numpy(x.copy())) for x in (found, right))
            worst = max(worst, float((a - b).norm() / b.norm()))
    return worst


def run(
    device: Accelerator, layout: KvLayout, ids: list[int], store: KvStore, start: int, stop: int, chunk: int
) -> None:
    for first in range(start, stop, chunk):
        hidden = device.embed(ids[first : min(first + chunk, stop)])
        for layer in range(layout.layers):
            hidden = device.run_layer(layer, hidden, [Segment(first, len(hidden), store)])


def other_memory(layout: KvLayout, store: KvStore, layer: int, role: int) -> NDArray[np.uint8]:
    """Copied to memory that only this process has."""
    out = np.zeros((layout.heads, TOKENS // 32, layout.group_bytes[ROLES.index(role)]), np.uint8)
    done = store.copy_out(layer, role, slice(0, layout.heads), slice(0, TOKENS // 32), out)
    if done is not None:
        done.wait()
    return out


def slot(layout: KvLayout, arena: Arena, store: KvStore, layer: int, role: int) -> NDArray[np.uint8]:
    """Copied to memory that every rank has, each its own heads."""
    view = layout.views(arena.slot(1), TOKENS, layout.heads)[ROLES.index(role)]
    view[:] = 0
    done = store.copy_out(layer, role, slice(0, layout.heads), slice(0, TOKENS // 32), view)
    if done is not None:
        done.wait()
        assert done.done()
    return view.copy()


if __name__ == "__main__":
    rank_group.run(lambda: main(*sys.argv[1:]))
