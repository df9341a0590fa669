"""The engine and the CPU accelerator: same bytes for every chunking, attention over what is stored, fair parking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hma_serve import quant
from hma_serve.checkpoint import read_model_config
from hma_serve.core.errors import FailedPrecondition, Internal, InvalidArgument
from hma_serve.internal.v1 import prefill_engine_pb2 as pb
from hma_serve.ipc import Arena, LinkClosed
from hma_serve.prefill import accelerators as accelerators_module
from hma_serve.prefill import engine_main
from hma_serve.prefill.accelerators import Accelerator, AcceleratorSpec, KvStore, Segment, open_accelerator
from hma_serve.prefill.accelerators import cpu as cpu_module
from hma_serve.prefill.accelerators.packed_kv import TensorKv
from hma_serve.prefill.decoded_budget import DecodedBudget
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.profiles import PROFILES, find_profile
from support.engine_bench import EngineBench, Packed, joined, make_engine_bench
from support.reference import reference_packed_kv
from support.tiny_qwen3 import make_tiny_checkpoint

LAYERS, KV_HEADS, VOCAB = 3, 2, 320


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("prefill") / "tiny",
        layers=LAYERS,
        hidden=64,
        heads=8,
        kv_heads=KV_HEADS,
        head_dim=32,
        intermediate=96,
        vocab=VOCAB,
        tied=False,
    )


@pytest.fixture(scope="module")
def accelerators(checkpoint: Path) -> dict[str, Accelerator]:
    model = read_model_config(checkpoint)
    return {name: open_accelerator("cpu", AcceleratorSpec(checkpoint, model, PROFILES[name])) for name in PROFILES}


def prompt(tokens: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (tokens,), generator=generator).tolist()


MakeBench = Callable[..., EngineBench]


@pytest.fixture
def make_bench(checkpoint: Path, accelerators: dict[str, Accelerator]) -> Iterator[MakeBench]:
    arenas: list[Arena] = []

    def make(profile: str = "f32", **options: Any) -> EngineBench:
        layout = KvLayout.of(read_model_config(checkpoint), PROFILES[profile])
        bench = make_engine_bench(accelerators[profile], layout, **options)
        arenas.append(bench.arena)
        return bench

    yield make
    for arena in arenas:
        arena.close()


@pytest.mark.parametrize("profile", list(PROFILES))
def test_the_bytes_do_not_depend_on_the_chunk_size(make_bench: MakeBench, profile: str) -> None:
    results = []
    tokens = 608 if profile in ("f32", "bf16", "tt_bfp8") else 192
    for chunk in (32, 64, 512):
        bench = make_bench(profile, chunk=chunk)
        bench.submit(1, prompt(tokens))
        results.append(joined(bench.run(1)))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, packed in results[0].items():
            np.testing.assert_array_equal(other[key], packed)


@pytest.mark.parametrize("profile", list(PROFILES))
def test_the_bytes_equal_those_of_the_reference(make_bench: MakeBench, checkpoint: Path, profile: str) -> None:
    bench = make_bench(profile, chunk=96)
    bench.submit(1, prompt(160))
    received = joined(bench.run(1))
    expected = reference_packed_kv(checkpoint, profile, prompt(160))
    assert len(received) == 2 * LAYERS
    for (layer, role), packed in received.items():
        np.testing.assert_array_equal(packed, expected[layer][ROLES.index(role)].numpy())


@pytest.mark.parametrize("profile", list(PROFILES))
def test_a_batch_computes_each_of_its_requests_as_if_alone(
    accelerators: dict[str, Accelerator], checkpoint: Path, profile: str
) -> None:
    accelerator = accelerators[profile]
    layout = KvLayout.of(read_model_config(checkpoint), PROFILES[profile])

    def packed(*prompts: list[int]) -> list[list[Packed]]:
        stores = [accelerator.new_store(len(ids)) for ids in prompts]
        segments = [Segment(0, len(ids), store) for ids, store in zip(prompts, stores, strict=True)]
        hidden = accelerator.embed([token for ids in prompts for token in ids])
        for layer in range(LAYERS):
            hidden = accelerator.run_layer(layer, hidden, segments)
        result = []
        for ids, store in zip(prompts, stores, strict=True):
            views = layout.views(memoryview(bytearray(layout.layer_bytes(len(ids)))), len(ids), KV_HEADS)
            for role, view in zip(ROLES, views, strict=True):
                store.copy_out(LAYERS - 1, role, slice(0, KV_HEADS), slice(0, len(ids) // 32), view)
            result.append(list(views))
        return result

    together = packed(prompt(64, 1), prompt(96, 2))
    for alone, batched in zip(packed(prompt(64, 1)) + packed(prompt(96, 2)), together, strict=True):
        for one, other in zip(alone, batched, strict=True):
            np.testing.assert_array_equal(one, other)


def test_heads_can_be_read_in_ranges(accelerators: dict[str, Accelerator], checkpoint: Path) -> None:
    accelerator = accelerators["tt_bfp8"]
    layout = KvLayout.of(read_model_config(checkpoint), PROFILES["tt_bfp8"])
    store = accelerator.new_store(64)
    accelerator.run_layer(0, accelerator.embed(prompt(64)), [Segment(0, 64, store)])
    whole = np.zeros((KV_HEADS, 2, layout.group_bytes[0]), np.uint8)
    part = np.zeros((1, 1, layout.group_bytes[0]), np.uint8)
    store.copy_out(0, ROLES[0], slice(0, KV_HEADS), slice(0, 2), whole)
    store.copy_out(0, ROLES[0], slice(1, 2), slice(1, 2), part)
    np.testing.assert_array_equal(part, whole[1:, 1:])
    assert whole.any()


@pytest.mark.parametrize("profile", list(PROFILES))
def test_computation_goes_on_from_packed_bytes_that_were_put_back(
    accelerators: dict[str, Accelerator], checkpoint: Path, profile: str
) -> None:
    accelerator, ids = accelerators[profile], prompt(96)
    layout = KvLayout.of(read_model_config(checkpoint), PROFILES[profile])
    whole, resumed = accelerator.new_store(96), accelerator.new_store(96)

    def part(groups: slice, role: int) -> Packed:
        return np.empty((KV_HEADS, groups.stop - groups.start, layout.group_bytes[ROLES.index(role)]), np.uint8)

    def rows(store: KvStore, start: int, tokens: int, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return accelerator.run_layer(layer, hidden, [Segment(start, tokens, store)])

    hidden, tail = accelerator.embed(ids), accelerator.embed(ids[64:])
    for layer in range(LAYERS):
        hidden = rows(whole, 0, 96, layer, hidden)
        for role in ROLES:
            prefix = part(slice(0, 2), role)
            whole.copy_out(layer, role, slice(0, KV_HEADS), slice(0, 2), prefix)
            resumed.copy_in(layer, role, slice(0, KV_HEADS), slice(0, 2), prefix)
            prefix.fill(0)
        tail = rows(resumed, 64, 32, layer, tail)
        for role in ROLES:
            pair = part(slice(0, 3), role), part(slice(0, 3), role)
            for store, out in zip((whole, resumed), pair, strict=True):
                store.copy_out(layer, role, slice(0, KV_HEADS), slice(0, 3), out)
            np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize("budget", [None, DecodedBudget(1 << 20), DecodedBudget(100)])
def test_attention_reads_keys_and_values_as_the_codec_stores_them(
    accelerators: dict[str, Accelerator], checkpoint: Path, budget: DecodedBudget | None
) -> None:
    layout = KvLayout.of(read_model_config(checkpoint), PROFILES["tt_bfp8"])
    codec = quant.codec("tt_bfp8_b")
    values = torch.randn((64, KV_HEADS, 32), generator=torch.Generator().manual_seed(3))
    store = TensorKv(layout, (codec, codec), 64, head_dim=32, dtype=torch.float32, budget=budget)
    store.append(1, ROLES[1], 0, values[:32])
    store.read(1, ROLES[1], 32)
    store.append(1, ROLES[1], 32, values[32:])
    stored = store.read(1, ROLES[1], 64)
    expected = quant.fake_quantize_bfp8(values.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(stored, expected, rtol=0, atol=0)
    assert not torch.equal(stored, values)


def test_tokens_that_decode_holds_are_computed_but_not_handed_out(make_bench: MakeBench) -> None:
    bench = make_bench(chunk=64)
    bench.submit(1, prompt(192))
    whole = joined(bench.run(1))
    bench = make_bench(chunk=64)
    bench.submit(2, prompt(192), token_start=96)
    received = bench.run(2)
    # Of a chunk that does not travel only the last layer is reported, and no slot is taken for it.
    assert [(done.layer, done.token_start, done.token_count) for done in bench.layers(2)] == [
        (LAYERS - 1, 64, 0),
        *((layer, 96, 32) for layer in range(LAYERS)),
        *((layer, 128, 64) for layer in range(LAYERS)),
    ]
    rest = joined({key: packed for key, packed in received.items() if packed.size})
    for key, packed in rest.items():
        np.testing.assert_array_equal(packed, whole[key][:, 3:])


def test_a_request_whose_layers_do_not_leave_is_parked_and_others_run(make_bench: MakeBench) -> None:
    bench = make_bench(running=2, ahead=2, chunk=128)
    bench.submit(1, prompt(64), due_ns=1)
    bench.submit(2, prompt(64, 2), due_ns=2)
    sent = 0
    while bench.engine.step():
        while sent < len(bench.layers(2)):
            bench.sent(2)
            sent += 1
    # They were computed together until the first one's layers stayed.
    assert len(bench.layers(1)) == 2
    assert len(bench.layers(2)) == LAYERS
    assert [done.started_ns for done in bench.layers(1)] == [done.started_ns for done in bench.layers(2)[:2]]
    bench.sent(1)
    assert bench.engine.step()
    assert not bench.engine.step()
    assert len(bench.layers(1)) == 3


def test_a_layer_starts_only_after_the_one_before_the_last_has_left(make_bench: MakeBench) -> None:
    bench = make_bench(ahead=2)
    bench.submit(1, prompt(128))
    for left in range(2 * LAYERS):
        while bench.engine.step():
            pass
        assert len(bench.layers(1)) <= left + 2
        bench.sent(1)
    assert len(bench.layers(1)) == 2 * LAYERS
    assert bench.engine.free_slots == 4


def test_an_urgent_request_overtakes_within_a_layer(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit(1, prompt(128), due_ns=100)
    assert bench.engine.step()
    bench.submit(2, prompt(32), due_ns=50)
    assert bench.engine.step()
    assert bench.events[-1].layer.job == 2


def test_closing_ends_the_computation_and_frees_every_slot(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit(1, prompt(512))
    assert bench.engine.step()
    bench.close(1)
    assert not bench.engine.step()
    assert len(bench.layers(1)) == 1
    assert bench.engine.idle
    assert bench.engine.free_slots == 4


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[tuple[int, int]]]]:
    """Of each layer that the accelerator computed: its number, and start and tokens of every segment."""
    layers: list[tuple[int, list[tuple[int, int]]]] = []
    whole = cpu_module.CpuAccelerator.run_layer

    def run_layer(self: Any, layer: int, hidden: torch.Tensor, segments: Any) -> torch.Tensor:
        layers.append((layer, [(part.start, part.tokens) for part in segments]))
        return whole(self, layer, hidden, segments)

    monkeypatch.setattr(cpu_module.CpuAccelerator, "run_layer", run_layer)
    return layers


class _LinkOf:
    """An engine's end of the link, whose front returns slots at once and closes job 1 when some layers are done."""

    def __init__(self, bench: EngineBench, close_after: int) -> None:
        self._bench = bench
        self._close_after = close_after
        self._returned = 0

    def receive(self, timeout: float | None) -> list[pb.PrefillEngineCommand]:
        if self._bench.engine.idle:
            raise LinkClosed
        done = self._bench.layers(1)
        assert timeout == 0 or not done, "the engine waits although it has work"
        if len(done) >= self._close_after:
            return [pb.PrefillEngineCommand(close=pb.PrefillClose(job=1))]
        returned, self._returned = self._returned, len(done)
        return [pb.PrefillEngineCommand(sent=pb.PrefillLayerSent(job=1))] * (len(done) - returned)


@pytest.mark.parametrize("layers", range(1, 2 * LAYERS + 2))
def test_the_process_hears_of_a_cancellation_after_every_layer_of_every_chunk(
    make_bench: MakeBench, computed: list[tuple[int, list[tuple[int, int]]]], layers: int
) -> None:
    """Within a chunk no further layer of it is computed, and between two chunks the next one is not begun."""
    bench = make_bench(chunk=64)
    bench.submit(1, prompt(256))
    link = _LinkOf(bench, layers)
    with pytest.raises(LinkClosed):
        engine_main._serve(bench.engine, SimpleNamespace(link=link))  # type: ignore[arg-type]
    expected = [(number % LAYERS, [(number // LAYERS * 64, 64)]) for number in range(layers)]
    assert computed == expected
    assert bench.engine.free_slots == bench.arena.slots


@pytest.mark.parametrize("layers", range(1, LAYERS))
def test_a_cancelled_request_leaves_its_batch_within_a_chunk(
    make_bench: MakeBench, computed: list[tuple[int, list[tuple[int, int]]]], layers: int
) -> None:
    bench = make_bench(chunk=128)
    bench.submit(1, prompt(64), due_ns=1)
    bench.submit(2, prompt(64, 2), due_ns=2)
    for _ in range(layers):
        assert bench.engine.step()
        bench.sent(1)
        bench.sent(2)
    bench.close(1)
    bench.run(2)
    together, alone = [(0, 64), (0, 64)], [(0, 64)]
    assert computed == [(number, together if number < layers else alone) for number in range(LAYERS)]


def test_a_failing_computation_ends_its_own_request_alone(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(chunk=256, cached_tokens=512)
    bench.submit(1, prompt(96), due_ns=1)
    bench.submit(2, prompt(64), due_ns=2)
    whole = cpu_module.CpuAccelerator.run_layer
    batches = []

    def fails(*args: Any) -> torch.Tensor:
        batches.append([segment.tokens for segment in args[3]])
        if 96 in batches[-1]:
            raise RuntimeError("out of luck")
        return whole(*args)

    monkeypatch.setattr(cpu_module.CpuAccelerator, "run_layer", fails)
    received = bench.run_all(1, 2)
    assert batches[:3] == [[96, 64], [96], [64]]
    (failed,) = (event.failed for event in bench.events if event.HasField("failed"))
    assert (failed.job, failed.error.code) == (1, "internal")
    assert "luck" not in failed.error.message
    assert len(received[2]) == 2 * LAYERS
    bench.close(1)
    bench.close(2)
    assert bench.engine.idle
    assert bench.engine.free_slots == 4


def test_a_front_that_breaks_the_protocol_is_noticed(make_bench: MakeBench) -> None:
    bench = make_bench()
    with pytest.raises(Internal, match="has none out"):
        bench.sent(7)
    with pytest.raises(Internal, match="not open"):
        bench.close(7)


def test_the_output_head_is_not_loaded(checkpoint: Path, accelerators: dict[str, Accelerator]) -> None:
    accelerator = accelerators["f32"]
    assert isinstance(accelerator, cpu_module.CpuAccelerator)
    with pytest.raises(FailedPrecondition, match="without its output head"):
        accelerator._model.logits(accelerator.embed(prompt(32)))


def test_unknown_profiles_and_accelerators_are_named() -> None:
    with pytest.raises(InvalidArgument, match=r"fp7.*bf16, f32.*tt_bfp8"):
        find_profile("fp7")
    spec = AcceleratorSpec(Path("/"), None, PROFILES["f32"])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"abacus.*cpu"):
        open_accelerator("abacus", spec)


def test_a_vendor_ships_its_accelerator_as_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints([EntryPoint("abacus", "nowhere:abacus", accelerators_module.ENTRY_POINTS)])
    made: list[AcceleratorSpec] = []
    monkeypatch.setattr(accelerators_module, "entry_points", lambda group: points.select(group=group))
    monkeypatch.setattr(EntryPoint, "load", lambda self: made.append)
    spec = AcceleratorSpec(Path("/"), None, PROFILES["f32"])  # type: ignore[arg-type]
    open_accelerator("abacus", spec)
    assert made == [spec]
