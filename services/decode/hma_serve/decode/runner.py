"""One step on the device: from shares to drawn tokens.

The runner knows the model, the pages, the attention and the sampler, and nothing of requests. An accelerator brings its
own with the same calls.

A step has three calls so that host and device need not wait for one another: `begin` computes the forward pass, `draw`
samples, `drawn` waits for the tokens. On a device that works by itself the first two only enqueue work, so the host
does the bookkeeping of the step before, and asks grammars what they allow, while the forward pass runs. A token that
the host has not seen yet is taken from where the step before drew it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.attention import PagedAttention, Span
from hma_serve.decode.pages import PagePool
from hma_serve.decode.sampler import Drawn, Inputs, Occurrences, Rows, sample
from hma_serve.decode.scheduler import Share
from hma_serve.model import Transformer


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """A step's result on the host.

    Attributes:
        tokens: One for each sampling share, in order.
        chosen: Logprobs of the rows that report them, in order.
        top_tokens: Their alternatives, likeliest first.
        top_logprobs: Those tokens' logprobs.
    """

    tokens: list[int]
    chosen: list[float]
    top_tokens: list[list[int]]
    top_logprobs: list[list[float]]


class Step(Protocol):
    """A step under way; at most two are, and they are drawn in the order in which they began."""

    def draw(self, rows: Rows, inputs: Inputs, occurrences: Occurrences) -> None:
        """Samples; to be called once, also when nothing samples."""
        ...

    def drawn(self) -> DrawnTokens:
        """Waits until the step is done."""
        ...


class StepRunner(Protocol):
    """What the engine needs of a device."""

    def begin(self, shares: Sequence[Share]) -> Step:
        """Computes the shares' tokens and writes their KV.

        The step before has been drawn, though perhaps not waited for: carried tokens are taken from its result.
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
        self._last: _TorchStep | None = None

    @torch.inference_mode()
    def begin(self, shares: Sequence[Share]) -> Step:
        """See `StepRunner`."""
        spans = [Span(share.sequence.pages, share.start, share.count) for share in shares]
        fresh = [pages for span in spans for pages in _entered(span)]
        if fresh:
            self._pool.clear(torch.cat(fresh))
        positions = torch.cat([torch.arange(span.start, span.start + span.count) for span in spans])
        hidden = self._model.forward(self._tokens(shares), positions, self._attention.plan(spans))
        self._last = _TorchStep(self._logits(hidden, shares))
        return self._last

    def _tokens(self, shares: Sequence[Share]) -> torch.Tensor:
        known = torch.tensor([token for share in shares for token in share.tokens or (0,)])
        carried, place = [], 0
        for share in shares:
            if share.carried is not None:
                carried.append((place, share.carried))
            place += share.count
        if not carried:
            return known
        assert self._last is not None
        places, rows = torch.tensor(carried).T
        known[places] = self._last.tokens[rows]
        return known

    def _logits(self, hidden: torch.Tensor, shares: Sequence[Share]) -> torch.Tensor:
        rows, end = [], 0
        for share in shares:
            end += share.count
            if share.samples:
                rows.append(end - 1)
        if not rows:
            return torch.empty((0, self._model.config.vocab_size))
        return self._model.logits(hidden[rows]).float()


class _TorchStep:
    """See `Step`. Everything is computed in the calls themselves."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits: torch.Tensor | None = logits
        self._drawn = Drawn(torch.empty(0, dtype=torch.int64))

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [sampling shares], once drawn."""
        return self._drawn.tokens

    def draw(self, rows: Rows, inputs: Inputs, occurrences: Occurrences) -> None:
        logits, self._logits = self._logits, None
        assert logits is not None
        if len(logits):
            self._drawn = sample(logits, rows, inputs, occurrences)

    def drawn(self) -> DrawnTokens:
        return to_host(self._drawn)


def to_host(drawn: Drawn) -> DrawnTokens:
    """Waits for the device if need be."""
    if drawn.chosen is None or drawn.top_tokens is None or drawn.top_logprobs is None:
        return DrawnTokens(drawn.tokens.tolist(), [], [], [])
    return DrawnTokens(
        drawn.tokens.tolist(), drawn.chosen.tolist(), drawn.top_tokens.tolist(), drawn.top_logprobs.tolist()
    )


def _entered(span: Span) -> list[torch.Tensor]:
    """Plain pages that the step is the first to write to."""
    first = -(-span.plain_start // GROUP_TOKENS)
    if first == span.plain_groups:
        return []
    return [span.pages.plain_k[first : span.plain_groups], span.pages.plain_v[first : span.plain_groups]]
