"""The transformer, written once; what differs between prefill and decode (linear layers, attention) is injected."""

from hma_serve.model.attention import Attention, CausalAttention
from hma_serve.model.linear import Linear, LinearFactory, LinearSite, dense_linear
from hma_serve.model.load_log import LoadLog
from hma_serve.model.tensors import tensor_shapes
from hma_serve.model.transformer import Transformer
from hma_serve.model.weights import LazyWeights, Progress, open_weights

__all__ = [
    "Attention",
    "CausalAttention",
    "LazyWeights",
    "Linear",
    "LinearFactory",
    "LinearSite",
    "LoadLog",
    "Progress",
    "Transformer",
    "dense_linear",
    "open_weights",
    "tensor_shapes",
]
