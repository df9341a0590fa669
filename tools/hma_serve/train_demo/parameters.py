"""The trainable weights: one stack per kind of tensor over all layers, so that optimisers work on few large tensors.

The transformer sees the same numbers under their Hugging Face names, as views into the stacks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hma_serve.core.model_config import ModelConfig
from hma_serve.model.tensors import EMBEDDING, layer_tensor, tensor_shapes

_LAYER_PREFIX = "model.layers.0."


class Parameters:
    """The weights that are trained, random at first or taken from a checkpoint, and their names.

    Attributes:
        matrices: Stacks `[layers, out, in]` of the layers' matrices.
        others: Everything else: the embedding, and the gains of the norms.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device,
        seed: int,
        initial: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._config = config
        generator = torch.Generator().manual_seed(seed)
        self._stacks: dict[str, torch.Tensor] = {}
        self._single: dict[str, torch.Tensor] = {}
        for name, shape in tensor_shapes(config).items():
            if name.startswith(_LAYER_PREFIX):
                kind = name.removeprefix(_LAYER_PREFIX).removesuffix(".weight")
                self._stacks[kind] = _initial(kind, (config.num_layers, *shape), generator).to(device).requires_grad_()
            elif not name.startswith("model.layers."):
                self._single[name] = _initial(name, shape, generator).to(device).requires_grad_()
        if initial is not None:
            with torch.no_grad():
                for name, tensor in self.named().items():
                    tensor.copy_(initial[name])
        self.matrices = [stack for stack in self._stacks.values() if stack.dim() == 3]
        self.others = [*self._single.values(), *(stack for stack in self._stacks.values() if stack.dim() == 2)]

    def named(self) -> dict[str, torch.Tensor]:
        """Every tensor by its Hugging Face name; gradients flow back into the stacks."""
        weights = dict(self._single)
        for kind, stack in self._stacks.items():
            for layer, tensor in enumerate(stack.unbind()):
                weights[layer_tensor(layer, kind)] = tensor
        return weights


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape)
    if name == EMBEDDING:
        return 0.02 * torch.randn(shape, generator=generator)
    if name in ("self_attn.o_proj", "mlp.down_proj"):
        return torch.zeros(shape)  # every layer starts as the identity
    scale: float = 0.5 / shape[-1] ** 0.5
    return scale * torch.randn(shape, generator=generator)
