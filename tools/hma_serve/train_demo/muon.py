"""Muon: momentum whose every update is made orthogonal, for the matrices of the hidden layers.

After Keller Jordan's published description (kellerjordan.github.io/posts/muon, 2024): Nesterov momentum, five
Newton-Schulz iterations in bfloat16, and a step that grows with the matrix's aspect ratio. Parameters are stacks of
equal matrices, one per decoder layer, so each kind of matrix takes one batched iteration.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon:
    """Optimises stacks of matrices `[layers, out, in]` in place."""

    def __init__(self, stacks: Iterable[torch.Tensor], *, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self._stacks = list(stacks)
        self._buffers = [torch.zeros_like(stack) for stack in self._stacks]
        self._momentum = momentum
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Applies one update from the gradients, which it leaves in place."""
        for stack, buffer in zip(self._stacks, self._buffers, strict=True):
            if stack.grad is None:
                continue
            buffer.lerp_(stack.grad, 1 - self._momentum)
            update = orthogonalised(stack.grad.lerp(buffer, self._momentum))
            rows, columns = stack.shape[-2:]
            stack.mul_(1 - learning_rate * self._weight_decay)
            stack.add_(update, alpha=-learning_rate * max(1.0, rows / columns) ** 0.5)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Approximates the nearest semi-orthogonal matrix of each `[..., rows, columns]`; singular values end near 1."""
    a, b, c = _COEFFICIENTS
    x: torch.Tensor = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result = x if wide else x.mT
    return result.to(matrices.dtype)
