"""Who is computed together: short prompts in one batch, the long one's chunk against the due times of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hma_serve.checkpoint import read_model_config
from hma_serve.ipc import Arena
from hma_serve.prefill.accelerators import Accelerator, AcceleratorSpec, open_accelerator
from hma_serve.prefill.accelerators import cpu as cpu_module
from hma_serve.prefill.batching import lead_tokens, spare_tokens, urgent_behind
from hma_serve.prefill.kv_layout import KvLayout
from hma_serve.prefill.profiles import find_profile
from support.engine_bench import EngineBench, make_engine_bench
from support.tiny_qwen3 import make_tiny_checkpoint

LAYERS, VOCAB = 2, 320
FAR = 1 << 62


@dataclass
class Claim:
    remaining: int
    due_ns: int = FAR


def test_who_would_be_late_behind_a_long_prompt_is_urgent() -> None:
    lead = Claim(1000, 20_000)
    assert not urgent_behind(lead, Claim(100, 11_001), now_ns=0, token_ns=10)
    assert urgent_behind(lead, Claim(100, 10_999), now_ns=0, token_ns=10)


def test_the_lead_makes_room_for_the_urgent_up_to_half_of_the_batch() -> None:
    lead = Claim(4096)
    assert lead_tokens(lead, [], most=512) == 512
    assert lead_tokens(lead, [Claim(64), Claim(32)], most=512) == 416
    assert lead_tokens(lead, [Claim(4096)], most=512) == 256
    assert lead_tokens(Claim(96), [Claim(64)], most=512) == 96
    assert lead_tokens(lead, [Claim(4096)], most=32) == 32


def test_others_come_along_as_far_as_the_lead_stays_in_time() -> None:
    assert spare_tokens(Claim(64, 1_000), most=512, now_ns=0, token_ns=0) == 512
    assert spare_tokens(Claim(64, 1_000), most=512, now_ns=0, token_ns=10) == 36
    assert spare_tokens(Claim(64, FAR), most=512, now_ns=0, token_ns=10) == 512
    assert spare_tokens(Claim(64, 100), most=512, now_ns=0, token_ns=10) == 0
    # Two batches share what is to spare.
    assert spare_tokens(Claim(1024, 11_240), most=512, now_ns=0, token_ns=10) == 50


@pytest.fixture(scope="module")
def accelerator(tmp_path_factory: pytest.TempPathFactory) -> tuple[Accelerator, KvLayout]:
    checkpoint = make_tiny_checkpoint(tmp_path_factory.mktemp("batching") / "tiny", layers=LAYERS, vocab=VOCAB)
    model, profile = read_model_config(checkpoint), find_profile("f32")
    return open_accelerator("cpu", AcceleratorSpec(checkpoint, model, profile)), KvLayout.of(model, profile)


MakeBench = Callable[..., EngineBench]


@pytest.fixture
def make_bench(accelerator: tuple[Accelerator, KvLayout]) -> Iterator[MakeBench]:
    arenas: list[Arena] = []

    def make(**options: Any) -> EngineBench:
        bench = make_engine_bench(*accelerator, **options)
        arenas.append(bench.arena)
        return bench

    yield make
    for arena in arenas:
        arena.close()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Of each computed layer: start and tokens of its segments."""
    seen: list[list[tuple[int, int]]] = []
    whole = cpu_module.CpuAccelerator.run_layer

    def run_layer(self: Any, layer: int, hidden: torch.Tensor, parts: Any) -> torch.Tensor:
        seen.append([(part.start, part.tokens) for part in parts])
        return whole(self, layer, hidden, parts)

    monkeypatch.setattr(cpu_module.CpuAccelerator, "run_layer", run_layer)
    return seen


def prompt(tokens: int, seed: int = 1) -> list[int]:
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_short_prompts_are_computed_together(make_bench: MakeBench, batches: list[list[tuple[int, int]]]) -> None:
    bench = make_bench(chunk=256, running=4)
    for job, tokens in ((1, 64), (2, 32), (3, 96)):
        bench.submit(job, prompt(tokens), due_ns=FAR + job)
    received = bench.run_all(1, 2, 3)
    assert batches == [[(0, 64), (0, 32), (0, 96)]] * LAYERS
    assert [len(layers) for layers in received.values()] == [2 * LAYERS] * 3
    # The time of a layer is shared by tokens.
    shares = [sum(done.compute_ns for done in bench.layers(job)) for job in (1, 2, 3)]
    assert shares[2] == pytest.approx(3 * shares[1], rel=0.01)


def test_a_long_prompt_fills_up_with_short_ones(make_bench: MakeBench, batches: list[list[tuple[int, int]]]) -> None:
    bench = make_bench(chunk=128, running=4)
    bench.submit(1, prompt(32), due_ns=FAR)
    bench.submit(2, prompt(320), due_ns=FAR + 1)
    bench.run_all(1, 2)
    assert batches[::LAYERS] == [[(0, 32), (0, 96)], [(96, 128)], [(224, 96)]]


def test_a_long_prompt_takes_shorter_chunks_while_somebody_urgent_waits(
    make_bench: MakeBench, batches: list[list[tuple[int, int]]]
) -> None:
    bench = make_bench(chunk=128, running=4)
    # Both are late already, the long one by more: it leads, and does not keep the others from going along.
    bench.submit(1, prompt(256), due_ns=1)
    bench.submit(2, prompt(32), due_ns=2)
    bench.submit(3, prompt(32), due_ns=3)
    bench.run_all(1, 2, 3)
    assert batches[::LAYERS] == [[(0, 64), (0, 32), (0, 32)], [(64, 128)], [(192, 64)]]


def test_nobody_without_hurry_makes_the_most_urgent_one_late(
    make_bench: MakeBench, batches: list[list[tuple[int, int]]]
) -> None:
    bench = make_bench(chunk=128, running=4)
    bench.submit(9, prompt(64), due_ns=FAR)
    bench.run(9)
    batches.clear()
    # What a token costs is known now: the lead is late, the other has all the time in the world.
    bench.submit(1, prompt(64), due_ns=1)
    bench.submit(2, prompt(64), due_ns=FAR)
    bench.run_all(1, 2)
    assert batches == [[(0, 64)]] * 2 * LAYERS
