"""The training loop: a budget of minutes instead of steps, so that borrowed hardware is used to the end and no further.

Learning rates follow the elapsed share of the budget: a short warm-up, a plateau, then a linear decline. Rows are short
for the first part of the budget and have the full context length for the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from hma_serve.core.model_config import ModelConfig
from hma_serve.model import Linear, LinearSite, Transformer
from hma_serve.train_demo.batches import IGNORED, BatchSource
from hma_serve.train_demo.muon import Muon
from hma_serve.train_demo.parameters import Parameters

_LOG_EVERY = 100

Objective = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Loss of ids, labels and weights `[rows, length]`."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long, how large, how fast.

    Attributes:
        minutes: Budget, compilation included.
        tokens_per_step: Tokens in one batch.
        peak: Factor on both peak learning rates; below 1 when training goes on from a checkpoint.
        short_length: Row length at first.
        full_length: Row length later: the model's context.
        short_share: Share of the budget spent on short rows.
        plateau_share: Share of the budget after which the learning rate declines.
        warmup_share: Share of the budget over which it rises.
        matrix_rate: Peak learning rate of Muon.
        other_rate: Peak learning rate of AdamW.
    """

    minutes: float
    tokens_per_step: int = 1 << 17
    peak: float = 1.0
    short_length: int = 1024
    full_length: int = 4096
    short_share: float = 0.5
    plateau_share: float = 0.5
    warmup_share: float = 0.02
    matrix_rate: float = 0.02
    other_rate: float = 0.004

    def rate(self, share: float) -> float:
        """Factor on the learning rates when `share` of the budget has passed."""
        if share < self.plateau_share:
            return self.peak * min(1.0, 0.05 + share / self.warmup_share)
        return self.peak * max(0.02, (1.0 - share) / (1.0 - self.plateau_share))

    def length(self, share: float) -> int:
        """Row length when `share` of the budget has passed."""
        return self.short_length if share < self.short_share else self.full_length


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training run did.

    Attributes:
        weights: Tensors by name, float32.
        steps: Optimiser steps.
        tokens: Tokens seen.
        seconds: Wall-clock time.
    """

    weights: dict[str, torch.Tensor]
    steps: int
    tokens: int
    seconds: float


def train(
    config: ModelConfig,
    source: BatchSource,
    schedule: Schedule,
    *,
    device: torch.device,
    compiled: bool,
    seed: int,
    initial: Mapping[str, torch.Tensor] | None = None,
) -> Outcome:
    """Trains until the budget is spent, from random weights or from those of a checkpoint."""
    began = time.monotonic()
    parameters = Parameters(config, device=device, seed=seed, initial=initial)
    muon = Muon(parameters.matrices)
    adam = torch.optim.AdamW(parameters.others, lr=schedule.other_rate, betas=(0.9, 0.95), weight_decay=0.0)
    loss_of: Objective = _objective(config, parameters, device)
    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False)
    step = tokens = 0
    while (share := (time.monotonic() - began) / (60 * schedule.minutes)) < 1:
        length = schedule.length(share)
        batch = source.draw(max(4, schedule.tokens_per_step // length), length)
        loss = loss_of(batch.ids, batch.labels, batch.weights)
        torch.autograd.backward(loss)
        rate = schedule.rate(share)
        muon.step(rate * schedule.matrix_rate)
        for group in adam.param_groups:
            group["lr"] = rate * schedule.other_rate
        adam.step()
        for tensor in (*parameters.matrices, *parameters.others):
            tensor.grad = None
        step, tokens = step + 1, tokens + batch.ids.numel()
        if step % _LOG_EVERY == 0 or step < 4:  # reading the loss also keeps the queue of launched work short
            seconds = time.monotonic() - began
            print(
                f"step {step:6} {seconds:6.1f} s  {tokens / 1e6:8.1f} Mtok  length {length}  loss {loss.item():.4f}",
                flush=True,
            )
    weights = {name: tensor.detach().float().cpu() for name, tensor in parameters.named().items()}
    return Outcome(weights, step, tokens, time.monotonic() - began)


def _objective(config: ModelConfig, parameters: Parameters, device: torch.device) -> Objective:
    # BF16 products are what an accelerator is fast at and what most CPUs only emulate.
    working = torch.bfloat16 if device.type == "cuda" else torch.float32

    def linear(weight: torch.Tensor, site: LinearSite) -> Linear:
        return lambda x: functional.linear(x.to(working), weight.to(working))

    def loss(ids: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, length = ids.shape
        model = Transformer(config, parameters.named(), linear=linear)

        def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.to(working).view(rows, length, -1, config.head_dim).transpose(1, 2) for x in (q, k, v))
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(rows * length, -1, config.head_dim)

        positions = torch.arange(length, device=ids.device).repeat(rows)
        logits = model.logits(model.forward(ids.flatten(), positions, attention))
        each = functional.cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return (each * weights.flatten()).sum() / (weights * (labels != IGNORED)).sum()

    return loss
