"""The transformer against transformers' Qwen3ForCausalLM, and against itself in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from hma_serve.checkpoint import read_model_config
from hma_serve.core.errors import FailedPrecondition
from hma_serve.model import CausalAttention, Linear, LinearSite, Transformer, dense_linear, open_weights
from support.tiny_qwen3 import make_tiny_checkpoint

CASES: dict[str, dict[str, Any]] = {
    "one query head per kv head": {"heads": 3, "kv_heads": 3, "head_dim": 16, "hidden": 48},
    "four query heads per kv head, hidden differs": {"heads": 8, "kv_heads": 2, "head_dim": 16, "hidden": 40},
    "five query heads per kv head": {"heads": 10, "kv_heads": 2, "head_dim": 8, "hidden": 80, "tied": False},
    "eight query heads per kv head": {"heads": 8, "kv_heads": 1, "head_dim": 32, "hidden": 64, "tied": False},
    "sharded, untied, old config": {"shards": 3, "tied": False, "old_style_config": True},
    "sharded, tied, new config": {"shards": 2, "layers": 5},
}


def load(path: Path, **options: Any) -> Transformer:
    config = read_model_config(path)
    return Transformer(config, open_weights(path, config, dtype=torch.float32), **options)


def prompt(model: Transformer, length: int = 70) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(7))


def all_logits(model: Transformer, token_ids: torch.Tensor) -> torch.Tensor:
    attention = CausalAttention(model.config.num_layers)
    return model.logits(model.forward(token_ids, torch.arange(len(token_ids)), attention))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_equal_transformers(tmp_path: Path, case: dict[str, Any]) -> None:
    path = make_tiny_checkpoint(tmp_path, **case)
    model = load(path)
    token_ids = prompt(model)
    theirs = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(token_ids[None]).logits[0]
        ours = all_logits(model, token_ids)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5  # the comparison would mean little on flat logits
    assert model.config.parameter_count == sum(p.numel() for p in theirs.parameters())


def test_chunks_and_single_steps_equal_the_whole_prompt(tmp_path: Path) -> None:
    model = load(make_tiny_checkpoint(tmp_path))
    token_ids = prompt(model)
    attention = CausalAttention(model.config.num_layers)
    chunks, done = [], 0
    for length in (32, 32, 1, 1, 4):
        positions = torch.arange(done, done + length)
        chunks.append(model.logits(model.forward(token_ids[positions], positions, attention)))
        done += length
    torch.testing.assert_close(torch.cat(chunks), all_logits(model, token_ids), atol=1e-4, rtol=0)


def test_sequences_mix_freely_in_one_flat_batch(tmp_path: Path) -> None:
    model = load(make_tiny_checkpoint(tmp_path, heads=8, kv_heads=2))
    first, second = prompt(model, 9), prompt(model, 20).flip(0)
    caches = [CausalAttention(model.config.num_layers) for _ in range(2)]

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = zip(caches, *(torch.split(x, [9, 20]) for x in (q, k, v)), strict=True)
        return torch.cat([cache(layer, *qkv) for cache, *qkv in parts])

    positions = torch.cat((torch.arange(9), torch.arange(20)))
    both = model.logits(model.forward(torch.cat((first, second)), positions, attention))
    expected = torch.cat((all_logits(model, first), all_logits(model, second)))
    torch.testing.assert_close(both, expected, atol=1e-4, rtol=0)


def test_the_factory_sees_every_weight_once_with_its_site(tmp_path: Path) -> None:
    seen: list[tuple[LinearSite, torch.Size]] = []

    def factory(weight: torch.Tensor, site: LinearSite) -> Linear:
        seen.append((site, weight.shape))
        return dense_linear(weight, site)

    load(make_tiny_checkpoint(tmp_path, layers=1), linear=factory)
    assert seen == [
        (LinearSite("qkv_proj", 0, (64, 32, 32)), (128, 48)),
        (LinearSite("o_proj", 0, (48,)), (48, 64)),
        (LinearSite("gate_up_proj", 0, (80, 80)), (160, 48)),
        (LinearSite("down_proj", 0, (48,)), (48, 80)),
        (LinearSite("lm_head", None, (320,)), (320, 48)),
    ]


def test_attention_gets_layers_in_order_and_its_output_is_used(tmp_path: Path) -> None:
    model = load(make_tiny_checkpoint(tmp_path, layers=3))
    calls: list[tuple[int, torch.Size, torch.Size, torch.Size]] = []

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append((layer, q.shape, k.shape, v.shape))
        return torch.zeros_like(q)

    token_ids = prompt(model, 5)
    blind = model.logits(model.forward(token_ids, torch.arange(5), attention))
    assert calls == [(layer, (5, 4, 16), (5, 2, 16), (5, 2, 16)) for layer in range(3)]
    assert not torch.allclose(blind, all_logits(model, token_ids), atol=1e-2)


def test_rows_do_not_depend_on_the_chunk_they_are_computed_in(tmp_path: Path) -> None:
    """Bit for bit, as long as chunks are multiples of 32 rows: what prefill's independence of chunk size rests on."""
    model = load(make_tiny_checkpoint(tmp_path, hidden=40, head_dim=8, intermediate=72))
    token_ids, positions = prompt(model, 256), torch.arange(256)

    def local(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q * v.repeat_interleave(2, dim=1) + k.repeat_interleave(2, dim=1)

    whole = model.forward(token_ids, positions, local)
    for size in (32, 64, 96, 160):
        parts = [
            model.forward(t, p, local)
            for t, p in zip(torch.split(token_ids, size), torch.split(positions, size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole), size


def test_a_model_without_its_head_refuses_logits(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path, tied=False)
    config = read_model_config(path)
    weights = open_weights(path, config, dtype=torch.float32, with_head=False)
    assert not {"model.norm.weight", "lm_head.weight"} & set(weights)
    model = Transformer(config, weights)
    hidden = model.forward(prompt(model, 4), torch.arange(4), CausalAttention(config.num_layers))
    assert torch.equal(
        hidden, load(path).forward(prompt(model, 4), torch.arange(4), CausalAttention(config.num_layers))
    )
    with pytest.raises(FailedPrecondition, match="without its output head"):
        model.logits(hidden)


def test_gradients_reach_every_parameter(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path)
    config = read_model_config(path)
    parameters = {
        name: tensor.clone().requires_grad_()
        for name, tensor in open_weights(path, config, dtype=torch.float32).items()
    }
    model = Transformer(config, parameters)
    torch.autograd.backward(all_logits(model, prompt(model, 12)).square().mean())
    assert [name for name, tensor in parameters.items() if tensor.grad is None or not tensor.grad.any()] == []


def test_the_config_written_by_transformers_is_read_alike(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path / "ours", old_style_config=True)
    Qwen3ForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert read_model_config(tmp_path / "theirs") == read_model_config(path)
