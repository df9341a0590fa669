"""Drawing tokens: the only place where a distribution becomes a token.

Randomness is a function of (seed, position in the output) and nothing else, so the same seed gives the same tokens
whatever else is in the batch, after a migration, and on any device. Rows are independent: which way a row is computed
depends on its own parameters alone.

Order, as in transformers and vLLM: penalties and bias, banned tokens, temperature, top-k, top-p, min-p, draw.
Logprobs are those of the model itself, before all of that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from hma_serve.core.request import SamplingParams

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row needs beside its logits.

    Attributes:
        params: The request's.
        seed: The request's, or one drawn for it.
        position: Number of the token in the output, from 0.
        banned: Tokens that may not be drawn yet.
        prompt: Tokens before the output; used by the repetition penalty only.
        output: Tokens so far; used by penalties only.
    """

    params: SamplingParams
    seed: int
    position: int
    banned: Sequence[int] = ()
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one token.

    Attributes:
        chosen: Its own.
        top: The likeliest tokens with theirs, best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One row's result.

    Attributes:
        token: The token.
        logprobs: If they were asked for.
    """

    token: int
    logprobs: Logprobs | None = None


@torch.inference_mode()
def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """Draws one token for each row.

    Args:
        logits: float32 [rows, vocab]; overwritten.
        draws: One for each row.
    """
    raw = {row: logits[row].log_softmax(-1) for row, draw in enumerate(draws) if draw.params.logprobs is not None}
    for row, draw in enumerate(draws):
        _adjust(logits[row], draw)
    tokens: list[int] = logits.argmax(-1).tolist()
    random = [row for row, draw in enumerate(draws) if not draw.params.greedy]
    for rows, sorted_first in (
        ([row for row in random if _filters(draws[row].params)], True),
        ([row for row in random if not _filters(draws[row].params)], False),
    ):
        if rows:
            chosen = [draws[row] for row in rows]
            drawn = _draw_filtered(logits[rows], chosen) if sorted_first else _draw_plain(logits[rows], chosen)
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
    return [Drawn(token, _logprobs(raw, row, token, draws[row])) for row, token in enumerate(tokens)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: two rounds of splitmix64 over both."""
    mixed = _splitmix64(_splitmix64(seed) ^ ((position * 0x9E3779B97F4A7C15) & _MASK))
    return (mixed >> 11) * 2.0**-53


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _adjust(row: torch.Tensor, draw: Draw) -> None:
    """Penalties, bias and bans, in place; almost always none."""
    params = draw.params
    if params.repetition_penalty != 1.0:
        seen = _ids({*draw.prompt, *draw.output}, row)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if draw.output and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(draw.output)
        amounts = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[_ids(counts, row)] -= params.presence_penalty + params.frequency_penalty * amounts
    if params.logit_bias:
        row[_ids(params.logit_bias, row)] += torch.tensor(
            list(params.logit_bias.values()), dtype=row.dtype, device=row.device
        )
    if draw.banned:
        row[_ids(draw.banned, row)] = -torch.inf


def _ids(tokens: Iterable[int], row: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=row.device)


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _heated(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Probabilities at each row's temperature, float64. The maximum goes first: tiny temperatures stay finite."""
    temperatures = _column([draw.params.temperature for draw in draws], logits)
    shifted = logits.double() - logits.amax(-1, keepdim=True)
    # 0 / temperature is 0 for every temperature above 0, and -inf where a token is impossible.
    return (shifted / temperatures).softmax(-1)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(1)


def _draw_plain(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    tokens: list[int] = _invert(_heated(logits, draws), draws).squeeze(1).tolist()
    return tokens


def _draw_filtered(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    # Stable, so that equal logits keep the order of their ids on every device.
    probabilities, ids = _heated(logits, draws).sort(dim=-1, descending=True, stable=True)
    vocab = logits.shape[-1]
    ranks = torch.arange(vocab, device=logits.device)
    top_k = _column([draw.params.top_k or vocab for draw in draws], logits)
    probabilities = torch.where(ranks < top_k, probabilities, 0.0)
    probabilities /= probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    top_p = _column([draw.params.top_p for draw in draws], logits)
    min_p = _column([draw.params.min_p for draw in draws], logits)
    kept = (before < top_p) & (probabilities >= min_p * probabilities[:, :1])
    places = _invert(torch.where(kept, probabilities, 0.0), draws)
    tokens: list[int] = ids.gather(1, places).squeeze(1).tolist()
    return tokens


def _invert(weights: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Where each row's uniform number falls in its cumulated weights: int64 [rows, 1]."""
    cumulated = weights.cumsum(-1)
    targets = _column([uniform(draw.seed, draw.position) for draw in draws], weights) * cumulated[:, -1:]
    places = torch.searchsorted(cumulated, targets, right=True)
    # Rounding can leave the target at the very end, behind which only weightless tokens lie.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(places, last)


def _logprobs(raw: dict[int, torch.Tensor], row: int, token: int, draw: Draw) -> Logprobs | None:
    if row not in raw:
        return None
    wanted = min(draw.params.logprobs or 0, raw[row].numel())
    values, ids = raw[row].topk(wanted)
    return Logprobs(float(raw[row][token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
