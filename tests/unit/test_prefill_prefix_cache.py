"""The prefix cache: a hit changes no byte, tenants see nothing of each other, pages are never lost, leaves go first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hma_serve.checkpoint import read_model_config
from hma_serve.core.prefix import prefix_names, prefix_root
from hma_serve.ipc import Arena
from hma_serve.prefill.accelerators import Accelerator, AcceleratorSpec, open_accelerator
from hma_serve.prefill.accelerators import cpu as cpu_module
from hma_serve.prefill.kv_layout import KvLayout
from hma_serve.prefill.prefix_cache import Lease, PrefixCache
from hma_serve.prefill.profiles import find_profile
from support.engine_bench import EngineBench, Layers, joined, make_engine_bench
from support.tiny_qwen3 import make_tiny_checkpoint

LAYERS, VOCAB, CHUNK = 2, 320, 64
LAYOUT = KvLayout(layers=2, heads=2, group_bytes=(3, 5))


@pytest.fixture(scope="module")
def accelerator(tmp_path_factory: pytest.TempPathFactory) -> tuple[Accelerator, KvLayout]:
    checkpoint = make_tiny_checkpoint(
        tmp_path_factory.mktemp("prefix") / "tiny",
        layers=LAYERS,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=32,
        intermediate=64,
        vocab=VOCAB,
    )
    model, profile = read_model_config(checkpoint), find_profile("tt_bfp8")
    return open_accelerator("cpu", AcceleratorSpec(checkpoint, model, profile)), KvLayout.of(model, profile)


MakeBench = Callable[..., EngineBench]


@pytest.fixture
def make_bench(accelerator: tuple[Accelerator, KvLayout]) -> Iterator[MakeBench]:
    arenas: list[Arena] = []

    def make(**options: Any) -> EngineBench:
        bench = make_engine_bench(*accelerator, chunk=CHUNK, **options)
        arenas.append(bench.arena)
        return bench

    yield make
    for arena in arenas:
        arena.close()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Start and tokens of each segment whose first layer was computed."""
    segments: list[tuple[int, int]] = []
    whole = cpu_module.CpuAccelerator.run_layer

    def run_layer(self: Any, layer: int, hidden: torch.Tensor, parts: Any) -> torch.Tensor:
        if layer == 0:
            segments.extend((part.start, part.tokens) for part in parts)
        return whole(self, layer, hidden, parts)

    monkeypatch.setattr(cpu_module.CpuAccelerator, "run_layer", run_layer)
    return segments


def prompt(tokens: int, seed: int = 1) -> list[int]:
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def same(one: Layers, other: Layers) -> None:
    joint, others = joined(one), joined(other)
    assert joint.keys() == others.keys()
    for key, packed in joint.items():
        np.testing.assert_array_equal(packed, others[key])


@pytest.mark.parametrize("overlap", [True, False])
def test_a_hit_skips_the_computation_and_changes_no_byte(
    make_bench: MakeBench, computed: list[tuple[int, int]], overlap: bool
) -> None:
    first, second = prompt(160), [*prompt(96), *prompt(128, 2)]
    plain = make_bench(overlap=overlap)
    plain.submit(1, second)
    expected = plain.run(1)
    bench = make_bench(cached_tokens=1024, overlap=overlap)
    bench.submit(1, first)
    bench.run(1)
    bench.close(1)
    computed.clear()
    bench.submit(2, second)
    same(bench.run(2), expected)
    # 96 tokens were shared; the chunks after them are computed as ever.
    assert computed == [(96, 64), (160, 64)]
    cached = [done.cached for done in bench.layers(2) if done.layer == LAYERS - 1]
    assert cached == [True, True, False, False]
    bench.close(2)
    computed.clear()
    bench.submit(3, second)
    same(bench.run(3), expected)
    assert not computed
    assert all(done.cached and done.compute_ns == 0 for done in bench.layers(3))
    bench.close(3)


def test_what_decode_holds_and_the_cache_has_costs_nothing(
    make_bench: MakeBench, computed: list[tuple[int, int]]
) -> None:
    bench = make_bench(cached_tokens=1024)
    bench.submit(1, prompt(192))
    whole = joined(bench.run(1))
    computed.clear()
    bench.submit(2, prompt(192), token_start=96)
    received = joined(bench.run(2))
    assert not computed
    for key, packed in received.items():
        np.testing.assert_array_equal(packed, whole[key][:, 3:])
    bench.close(1)
    bench.close(2)
    # Not cached here, but held by decode: computed for attention, kept for the next one, not sent.
    bench.submit(3, prompt(128, 7), token_start=96)
    bench.run(3)
    bench.submit(4, prompt(128, 7))
    computed.clear()
    bench.close(3)
    assert len(joined(bench.run(4))[0, 1][0]) == 4
    assert not computed


def test_tenants_share_nothing(make_bench: MakeBench, computed: list[tuple[int, int]]) -> None:
    bench = make_bench(cached_tokens=1024)
    for job, tenant, tokens in ((1, "a", 128), (2, "b", 128), (3, "a", 0), (4, "b", 0)):
        computed.clear()
        bench.submit(job, prompt(128), tenant=tenant)
        bench.run(job)
        bench.close(job)
        assert sum(count for _, count in computed) == tokens


def test_requests_that_run_at_once_share_what_either_has_computed(
    make_bench: MakeBench, computed: list[tuple[int, int]]
) -> None:
    bench = make_bench(cached_tokens=1024)
    bench.submit(1, prompt(256), due_ns=1)
    for _ in range(LAYERS + 1):
        assert bench.engine.step()
        for _ in bench.layers(1)[-1:]:
            bench.sent(1)
    bench.submit(2, prompt(256), due_ns=2)
    same(bench.run_all(1, 2)[2], bench_of(make_bench, prompt(256)))
    assert sum(tokens for _, tokens in computed) == 256 + 256
    bench.close(1)
    bench.close(2)
    assert bench.cache.pages == 8


def bench_of(make_bench: MakeBench, token_ids: list[int]) -> Layers:
    bench = make_bench()
    bench.submit(1, token_ids)
    return bench.run(1)


def test_a_cancelled_request_leaves_what_was_whole_and_loses_no_page(make_bench: MakeBench) -> None:
    bench = make_bench(cached_tokens=256)
    bench.submit(1, prompt(256))
    for _ in range(LAYERS + 1):
        assert bench.engine.step()
        bench.sent(1)
    # One chunk is through all layers, of the next one a layer. Closing the last job checks the cache's books.
    bench.close(1)
    assert bench.engine.idle
    assert bench.cache.pages == CHUNK // 32


def test_a_budget_too_small_for_a_prompt_keeps_its_beginning(
    make_bench: MakeBench, computed: list[tuple[int, int]]
) -> None:
    bench = make_bench(cached_tokens=96)
    expected = bench_of(make_bench, prompt(256))
    computed.clear()
    for job in (1, 2):
        bench.submit(job, prompt(256))
        same(bench.run(job), expected)
        bench.close(job)
    assert bench.cache.used_bytes == 3 * bench.cache.page_bytes
    assert [start for start, _ in computed] == [0, 64, 128, 192, 96, 160, 224]


def names(tokens: int, seed: int = 1) -> list[bytes]:
    return prefix_names(prefix_root("m"), prompt(tokens, seed))


def put(cache: PrefixCache, of: list[bytes]) -> Lease:
    lease = cache.lease()
    cache.extend(lease, of)
    cache.add(lease, of, cache.reserve(len(of) - len(lease)))
    return lease


def cached(cache: PrefixCache, of: list[bytes]) -> int:
    lease = cache.lease()
    found = cache.extend(lease, of)
    cache.release(lease)
    return found


def test_names_stand_for_everything_before_them() -> None:
    one, other = names(96), prefix_names(prefix_root("m"), [*prompt(64), *prompt(32, 5)])
    assert one[:2] == other[:2]
    assert one[2] != other[2]
    assert not set(one) & set(prefix_names(prefix_root("n"), prompt(96)))
    assert prefix_root("ab", "c") != prefix_root("a", "bc")
    swapped = prefix_names(prefix_root("m"), [*prompt(64)[32:], *prompt(64)[:32]])
    assert not set(one) & set(swapped)


def test_the_least_recently_used_leaf_goes_first() -> None:
    cache = PrefixCache(LAYOUT, 4 * LAYOUT.layers * LAYOUT.layer_bytes(32))
    assert cache.capacity == 4
    cache.release(put(cache, names(64, 1)))
    cache.release(put(cache, names(64, 2)))
    assert cached(cache, names(64, 1)) == 2
    cache.release(put(cache, names(32, 3)))
    assert [cached(cache, names(64, seed)) for seed in (1, 2, 3)] == [2, 1, 1]
    cache.check_integrity()


def test_pages_in_use_stay() -> None:
    cache = PrefixCache(LAYOUT, 2 * LAYOUT.layers * LAYOUT.layer_bytes(32))
    held = put(cache, names(64))
    assert cache.reserve(1) == []
    cache.release(held)
    pages = cache.reserve(3)
    assert len(pages) == 2
    cache.give_back(pages)
    cache.check_integrity()


def test_pages_that_several_requests_use_stay_until_the_last_one_ends() -> None:
    cache = PrefixCache(LAYOUT, 2 * LAYOUT.layers * LAYOUT.layer_bytes(32))
    first, second = put(cache, names(64)), cache.lease()
    assert cache.extend(second, names(64)) == 2
    cache.release(first)
    assert cache.reserve(1) == []
    cache.release(second)
    assert len(cache.reserve(2)) == 2


def test_bytes_come_back_as_they_were_put() -> None:
    cache = PrefixCache(LAYOUT, 8 * LAYOUT.layers * LAYOUT.layer_bytes(32))
    pages, random = cache.reserve(3), np.random.default_rng(0)
    values = [random.integers(0, 256, (2, 3, size), dtype=np.uint8) for size in LAYOUT.group_bytes]
    cache.store(pages, 1, values)
    cache.store(pages, 0, [np.zeros_like(value) for value in values])
    loaded = [np.empty_like(value) for value in values]
    cache.load(pages, 1, loaded)
    for one, other in zip(values, loaded, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 5), st.sampled_from(["hold", "release", "give back"])), max_size=40
    )
)
def test_no_sequence_of_uses_loses_a_page(uses: list[tuple[int, int, str]]) -> None:
    cache = PrefixCache(LAYOUT, 6 * LAYOUT.layers * LAYOUT.layer_bytes(32))
    held: list[Lease] = []
    for seed, groups, then in uses:
        # Prompts of one seed share their beginning.
        of = names(groups * 32, seed)
        lease = cache.lease()
        cache.extend(lease, of)
        pages = cache.reserve(groups - len(lease))
        if then == "give back":
            cache.give_back(pages)
        else:
            cache.add(lease, of, pages)
        if then == "hold":
            held.append(lease)
        else:
            cache.release(lease)
        cache.check_integrity()
    for lease in held:
        cache.release(lease)
    assert len(cache.reserve(6)) == 6
