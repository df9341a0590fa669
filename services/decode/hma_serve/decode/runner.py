"""One step on the device: from shares to the logits of those that get a token.

The runner knows the model, the pages and the attention, and nothing of requests. An accelerator brings its own with the
same two calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.attention import PagedAttention, Span
from hma_serve.decode.pages import PagePool
from hma_serve.decode.scheduler import Share
from hma_serve.model import Transformer


class StepRunner(Protocol):
    """What the engine needs of a device."""

    def run(self, shares: Sequence[Share]) -> torch.Tensor:
        """Computes the shares' tokens and writes their KV.

        Returns:
            float32 [sampling shares, vocab]: for each share that samples, in order, the logits of its next token.
        """
        ...


class TorchStepRunner:
    """`StepRunner` for every device on which torch runs the model eagerly.

    Args:
        model: With its head.
        pool: The pages.
        attention: Over these pages.
    """

    def __init__(self, model: Transformer, pool: PagePool, attention: PagedAttention) -> None:
        self._model = model
        self._pool = pool
        self._attention = attention

    @torch.inference_mode()
    def run(self, shares: Sequence[Share]) -> torch.Tensor:
        """See `StepRunner`."""
        spans = [Span(share.sequence.pages, share.sequence.computed, share.count) for share in shares]
        fresh = [pages for span in spans for pages in _entered(span)]
        if fresh:
            self._pool.clear(torch.cat(fresh))
        tokens = torch.tensor([token for share in shares for token in share.sequence.next_tokens(share.count)])
        positions = torch.cat([torch.arange(span.start, span.start + span.count) for span in spans])
        hidden = self._model.forward(tokens, positions, self._attention.plan(spans))
        rows, end = [], 0
        for share in shares:
            end += share.count
            if share.samples:
                rows.append(end - 1)
        if not rows:
            return torch.empty((0, self._model.config.vocab_size))
        return self._model.logits(hidden[rows]).float()


def _entered(span: Span) -> list[torch.Tensor]:
    """Plain pages that the step is the first to write to."""
    first = -(-span.plain_start // GROUP_TOKENS)
    if first == span.plain_groups:
        return []
    return [span.pages.plain_k[first : span.plain_groups], span.pages.plain_v[first : span.plain_groups]]
