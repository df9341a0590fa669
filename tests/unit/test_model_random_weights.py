"""Models without a checkpoint: the same weights wherever they are made, and what any model needs of the memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from hma_serve.checkpoint import (
    fingerprint,
    model_name,
    read_eos_token_ids,
    read_model_config,
    read_random_seed,
    resolve_checkpoint,
)
from hma_serve.checkpoint.random_checkpoint import random_checkpoint
from hma_serve.core.errors import FailedPrecondition, InvalidArgument, NotFound
from hma_serve.core.memory_plan import MemoryPlan, weight_bytes, workspace_bytes
from hma_serve.model import CausalAttention, Transformer, open_weights, tensor_shapes
from hma_serve.text import Tokenizer
from support.tiny_qwen3 import make_tiny_checkpoint

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A directory that holds a configuration alone."""
    made = make_tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    for path in made.iterdir():
        if path.name != "config.json":
            path.unlink()
    return made


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [
        ("qwen3-4b", 4.02, 147_456),
        ("qwen3-8b", 8.19, 147_456),
        ("qwen3-14b", 14.77, 163_840),
        ("qwen3-32b", 32.76, 262_144),
    ],
)
def test_the_shapes_are_those_of_the_published_models(name: str, billions: float, kv_bytes: int) -> None:
    config = read_model_config(resolve_checkpoint(f"random:{name}"))
    assert config.parameter_count / 1e9 == pytest.approx(billions, abs=0.006)
    assert config.kv_bytes_per_token == kv_bytes
    assert model_name(f"random:{name}") == name
    elements = sum(math.prod(found) for found in tensor_shapes(config).values())
    assert elements == config.parameter_count


def test_a_shape_is_a_checkpoint_for_everyone(shape: Path) -> None:
    directory = resolve_checkpoint(f"random:{shape}")
    assert read_random_seed(directory) == 0
    assert read_random_seed(shape) is None
    assert model_name(f"random:{shape}") == model_name(f"random:{shape / 'config.json'}") == "tiny"
    assert read_eos_token_ids(directory) == (2,)
    assert Tokenizer.from_directory(directory).size > 0


def test_only_shape_and_seed_tell_models_apart(shape: Path) -> None:
    first = fingerprint(resolve_checkpoint(f"random:{shape}"))
    random_checkpoint.cache_clear()
    assert fingerprint(resolve_checkpoint(f"random:{shape}")) == first
    assert fingerprint(resolve_checkpoint(f"random:{shape / 'config.json'}@0")) == first
    assert fingerprint(resolve_checkpoint(f"random:{shape}@1")) != first
    changed = json.loads((shape / "config.json").read_text()) | {"num_hidden_layers": 3}
    (shape / "config.json").write_text(json.dumps(changed))
    random_checkpoint.cache_clear()
    assert fingerprint(resolve_checkpoint(f"random:{shape}")) != first


def test_weights_are_a_function_of_seed_name_and_place(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = resolve_checkpoint(f"random:{shape}")
    config = read_model_config(directory)
    with open_weights(directory, config, dtype=torch.float32) as weights:
        found = dict(weights)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == tensor_shapes(config)
    # However they are cut, and whoever reads them: prefill has no head, and converts what is stored as bfloat16.
    monkeypatch.setattr("hma_serve.model.random_weights._CHUNK", 1000)
    with open_weights(directory, config, dtype=torch.bfloat16, with_head=False) as weights:
        assert all(torch.equal(tensor.float(), found[name]) for name, tensor in weights.items())
    other = resolve_checkpoint(f"random:{shape}@1")
    with open_weights(other, config, dtype=torch.float32) as weights:
        assert not torch.equal(weights[GATE], found[GATE])


def test_weights_look_random_and_give_finite_logits(shape: Path) -> None:
    directory = resolve_checkpoint(f"random:{shape}")
    config = read_model_config(directory)
    seen: list[tuple[int, int]] = []
    with open_weights(directory, config, dtype=torch.float32, progress=lambda *at: seen.append(at)) as weights:
        gate = weights[GATE] / (1.5 / math.sqrt(config.hidden_size))
        model = Transformer(config, weights)
    assert seen[-1][0] == seen[-1][1] == config.parameter_count * 4
    assert float(gate.mean()) == pytest.approx(0, abs=0.05)
    assert float(gate.std()) == pytest.approx(1, abs=0.05)
    correlation = torch.corrcoef(gate).fill_diagonal_(0).abs().max()
    assert float(correlation) < 0.7
    hidden = model.forward(torch.arange(20), torch.arange(20), CausalAttention(config.num_layers))
    logits = model.logits(hidden)
    assert torch.isfinite(logits).all()
    assert len(set(logits.argmax(-1).tolist())) > 5


@pytest.mark.parametrize(("name", "error"), [("qwen3-99b", NotFound), ("/nowhere", NotFound)])
def test_a_shape_that_is_none_is_named(name: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="qwen3-8b"):
        resolve_checkpoint(f"random:{name}")
    with pytest.raises(InvalidArgument, match="2\\^32"):
        resolve_checkpoint("random:qwen3-8b@4294967296")


def test_weights_need_what_their_tensors_take(shape: Path) -> None:
    config = read_model_config(shape)
    rotations = config.max_position_embeddings * config.head_dim * 4
    for with_head in (True, False):
        elements = sum(math.prod(found) for found in tensor_shapes(config, with_head=with_head).values())
        assert weight_bytes(config, 2, with_head=with_head) == 2 * elements + rotations


def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    config = read_model_config(resolve_checkpoint("random:qwen3-32b"))
    workspace = workspace_bytes(config, 2, tokens=256, sampled=64)
    plan = MemoryPlan(weight_bytes(config, 2), 10_000_000_000, workspace, 80_000_000_000, "cuda:0")
    plan.check("never shown")
    with pytest.raises(FailedPrecondition) as caught:
        MemoryPlan(plan.weights, plan.kv, plan.workspace, 64_000_000_000, "cuda:0").check("lower --max-running")
    assert caught.value.message == (
        "the model does not fit: weights 65.5 GB + KV 10.0 GB + workspace 647.3 MB = 76.2 GB of 64.0 GB available on "
        "cuda:0; lower --max-running"
    )
