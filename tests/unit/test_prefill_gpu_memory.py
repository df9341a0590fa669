"""What a GPU must hold of a model, from shapes alone, and the refusal of what it cannot."""

import pytest
import torch

from hma_serve.checkpoint import read_model_config, resolve_checkpoint
from hma_serve.core.errors import FailedPrecondition
from hma_serve.prefill.accelerators.gpu_memory import gpu_memory_plan, require_room
from hma_serve.prefill.accelerators.sharding import Shard

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
