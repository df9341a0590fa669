"""What a GPU must hold of a model, from shapes alone, and the refusal of what it cannot."""

import pytest
import torch

from hma_serve.checkpoint import read_model_config, resolve_checkpoint
from hma_serve.core.errors import FailedPrecondition
from hma_serve.prefill.accelerators.gpu_memory import gpu_memory_plan, kv_tokens, require_room
from hma_serve.prefill.accelerators.sharding import Shard
from hma_serve.prefill.engine_main import kv_capacity
from hma_serve.prefill.kv_layout import KvLayout
from hma_serve.prefill.profiles import PROFILES

GB = 10**9


def test_weights_take_the_bytes_of_their_format_and_of_their_share() -> None:
    model = read_model_config(resolve_checkpoint("random:qwen3-8b"))
    bf16 = gpu_memory_plan(model, "bf16", 0, "gpu").weights
    int8 = gpu_memory_plan(model, "int8", 0, "gpu").weights
    half = gpu_memory_plan(Shard(0, 2).local(model), "int8", 0, "gpu").weights
    # 8.19 billion parameters, the head not among them: 0.62 of the embedding, 6.95 of matrices.
    assert bf16 == pytest.approx(15.2 * GB, rel=0.01)
    assert bf16 - int8 == pytest.approx(6.95 * GB, rel=0.01)
    assert int8 - half == pytest.approx(6.95 / 2 * GB, rel=0.01)


def test_a_model_that_a_gpu_cannot_hold_is_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = read_model_config(resolve_checkpoint("random:qwen3-32b"))
    free = [24 * GB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 24 * GB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card of 24 GB")
    with (
        caplog.at_level("INFO"),
        pytest.raises(FailedPrecondition, match=r"weights 64\.0 .* on a card of 24 GB; "),
    ):
        require_room(model, "bf16", torch.device("cuda", 0))
    assert "memory: weights 64.0 GB" in caplog.text
    free[0] = 80 * GB
    assert 0 < require_room(model, "bf16", torch.device("cuda", 0)) < 18 * GB


def test_prompts_take_what_a_gpu_has_left_and_no_more() -> None:
    model = read_model_config(resolve_checkpoint("random:qwen3-8b"))
    layout = KvLayout.of(model, PROFILES["fp8_e4m3"])
    tokens = kv_tokens(layout, 10 * GB)
    taken = layout.layers * layout.layer_bytes(tokens // 32 * 32)
    assert 0.94 * 10 * GB < taken <= 0.95 * 10 * GB
    assert kv_tokens(KvLayout.of(Shard(0, 2).local(model), PROFILES["fp8_e4m3"]), 10 * GB) == pytest.approx(
        2 * tokens, rel=0.01
    )


def test_what_may_run_at_once_is_bounded_by_the_device() -> None:
    assert kv_capacity(8192, None, longest=1024) == 8192
    assert kv_capacity(8192, 100_000, longest=1024) == 8192
    assert kv_capacity(8192, 3000, longest=1024) == 3000
    with pytest.raises(FailedPrecondition, match=r"room for the KV of 1000 tokens .* may have 1024; lower"):
        kv_capacity(8192, 1000, longest=1024)
