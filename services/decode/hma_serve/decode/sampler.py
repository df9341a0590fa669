"""Drawing tokens: the only place where a distribution becomes a token, as one function on device tensors.

Randomness is a function of (seed, position in the output) and nothing else, so the same seed gives the same tokens
whatever else is in the batch, after a migration, and on any device. Rows are independent: which way a row is computed
depends on its own parameters alone.

Order, as in transformers and vLLM: penalties and bias, banned tokens and grammar, temperature, top-k, top-p, min-p,
draw. Logprobs are those of the model itself, before all of that.

Nothing here waits for the device: sizes come from the host, values stay where they are. `Rows` is what stays the same
while the same sequences are drawn for, `Inputs` what each step brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Random:
    """Rows that are drawn, not greedy.

    Attributes:
        rows: int64 [n].
        temperature: float64 [n, 1], above 0.
    """

    rows: torch.Tensor
    temperature: torch.Tensor


@dataclass(frozen=True, slots=True)
class Filtered:
    """Random rows that keep only their likeliest tokens.

    Attributes:
        rows: int64 [n], among the random ones.
        top_k: int64 [n, 1]; the vocabulary's size is off.
        top_p: float64 [n, 1]; 1 is off.
        min_p: float64 [n, 1]; 0 is off.
    """

    rows: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


@dataclass(frozen=True, slots=True)
class Penalised:
    """Rows that count what was said.

    Attributes:
        rows: int64 [n].
        slots: int64 [n], their rows in `Occurrences`.
        repetition: float32 [n, 1]; 1 is off.
        presence: float32 [n, 1].
        frequency: float32 [n, 1].
    """

    rows: torch.Tensor
    slots: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


@dataclass(frozen=True, slots=True)
class Biased:
    """Single logits that are moved.

    Attributes:
        rows: int64 [n].
        tokens: int64 [n].
        values: float32 [n].
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """How each row of a batch is drawn; what no row asks for is None and costs nothing.

    Attributes:
        random: The others are greedy.
        filtered: Top-k, top-p, min-p.
        penalised: Repetition, presence and frequency.
        biased: Logit bias.
        reported: int64 [n], the rows that report logprobs.
        alternatives: Alternatives to report, the most that any row asks for.
    """

    random: Random | None = None
    filtered: Filtered | None = None
    penalised: Penalised | None = None
    biased: Biased | None = None
    reported: torch.Tensor | None = None
    alternatives: int = 0


@dataclass(frozen=True, slots=True)
class Masked:
    """What grammars allow.

    Attributes:
        rows: int64 [n].
        allowed: int32 [n, ceil(vocab / 32)], one bit a token, the lowest first.
    """

    rows: torch.Tensor
    allowed: torch.Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one step brings.

    Attributes:
        uniforms: float64 [random rows, 1], in [0, 1).
        banned: int64 [2, n], rows and tokens that may not be drawn yet.
        masked: What grammars allow.
    """

    uniforms: torch.Tensor | None = None
    banned: torch.Tensor | None = None
    masked: Masked | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's result, still on the device.

    Attributes:
        tokens: int64 [rows].
        chosen: float32 [reported], the drawn tokens' logprobs.
        top_tokens: int64 [reported, alternatives], likeliest first.
        top_logprobs: float32 [reported, alternatives].
    """

    tokens: torch.Tensor
    chosen: torch.Tensor | None = None
    top_tokens: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


class Occurrences:
    """Which tokens each penalised sequence has seen, on the device, so that a step can count what it draws.

    Args:
        slots: Sequences at most.
        vocab: Tokens there are.
        device: Where.
    """

    def __init__(self, slots: int, vocab: int, device: torch.device | str = "cpu") -> None:
        self._prompt = torch.zeros((slots, vocab), dtype=torch.bool, device=device)
        self._output = torch.zeros((slots, vocab), dtype=torch.int32, device=device)

    def enter(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Begins a sequence with what it holds already."""
        self._prompt[slot].zero_()
        self._output[slot].zero_()
        self._prompt[slot, _ids(prompt, self._prompt.device)] = True
        counted = _ids(output, self._output.device)
        self._output[slot].index_put_((counted,), torch.ones_like(counted, dtype=torch.int32), accumulate=True)

    def penalise(self, logits: torch.Tensor, wanted: Penalised) -> None:
        """Lowers what was said, in place."""
        scores, output = logits[wanted.rows], self._output[wanted.slots]
        seen = self._prompt[wanted.slots] | (output > 0)
        repeated = torch.where(scores > 0, scores / wanted.repetition, scores * wanted.repetition)
        scores = torch.where(seen, repeated, scores)
        scores -= wanted.presence * (output > 0) + wanted.frequency * output
        logits[wanted.rows] = scores

    def add(self, wanted: Penalised, tokens: torch.Tensor) -> None:
        """Counts what was drawn; `tokens` int64 [rows]."""
        drawn = tokens[wanted.rows]
        self._output.index_put_((wanted.slots, drawn), torch.ones_like(drawn, dtype=torch.int32), accumulate=True)


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: Rows, inputs: Inputs, occurrences: Occurrences) -> Drawn:
    """Draws one token for each row.

    Args:
        logits: float32 [rows, vocab]; overwritten.
        rows: How.
        inputs: This step's.
        occurrences: What the penalised rows have seen; takes what they draw.
    """
    raw = None if rows.reported is None else logits[rows.reported].log_softmax(-1)
    adjust(logits, rows, inputs, occurrences)
    tokens = logits.argmax(-1)
    if rows.random is not None:
        assert inputs.uniforms is not None
        drawn = _invert(probabilities(logits, rows), inputs.uniforms)
        tokens = tokens.index_copy(0, rows.random.rows, drawn.squeeze(1))
    if rows.penalised is not None:
        occurrences.add(rows.penalised, tokens)
    if raw is None or rows.reported is None:
        return Drawn(tokens)
    chosen = raw.gather(1, tokens[rows.reported].unsqueeze(1)).squeeze(1)
    top = raw.topk(min(rows.alternatives, raw.shape[1]))
    return Drawn(tokens, chosen, top.indices, top.values)


def adjust(logits: torch.Tensor, rows: Rows, inputs: Inputs, occurrences: Occurrences) -> None:
    """Penalties, bias, bans and grammars, in place."""
    if rows.penalised is not None:
        occurrences.penalise(logits, rows.penalised)
    if rows.biased is not None:
        logits.index_put_((rows.biased.rows, rows.biased.tokens), rows.biased.values, accumulate=True)
    if inputs.banned is not None:
        logits[inputs.banned[0], inputs.banned[1]] = -torch.inf
    if inputs.masked is not None:
        allowed = _unpacked(inputs.masked.allowed, logits.shape[1])
        logits[inputs.masked.rows] = logits[inputs.masked.rows].masked_fill(~allowed, -torch.inf)


def probabilities(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """What the random rows are drawn from: float64 [random rows, vocab], filtered rows not normalised again."""
    assert rows.random is not None
    heated = logits[rows.random.rows].double()
    # The maximum goes first: tiny temperatures stay finite, for 0 / temperature is 0 for every temperature above 0.
    heated = ((heated - heated.amax(-1, keepdim=True)) / rows.random.temperature).softmax(-1)
    if rows.filtered is not None:
        heated[rows.filtered.rows] = _filter(heated[rows.filtered.rows], rows.filtered)
    return heated


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: two rounds of splitmix64 over both."""
    mixed = _splitmix64(_splitmix64(seed) ^ ((position * 0x9E3779B97F4A7C15) & _MASK))
    return (mixed >> 11) * 2.0**-53


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _ids(tokens: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=device)


def _unpacked(bits: torch.Tensor, vocab: int) -> torch.Tensor:
    """Bool [n, vocab] from int32 [n, words]."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(2) >> places) & 1).bool().flatten(1)[:, :vocab]


def _filter(weights: torch.Tensor, wanted: Filtered) -> torch.Tensor:
    """Zeroes what falls away; the rest keeps its place and value."""
    # Stable, so that equal weights keep the order of their ids on every device.
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(weights.shape[1], device=weights.device)
    likeliest = torch.where(ranks < wanted.top_k, ordered, 0.0)
    likeliest /= likeliest.sum(-1, keepdim=True)
    before = likeliest.cumsum(-1) - likeliest
    kept = (ranks < wanted.top_k) & (before < wanted.top_p) & (likeliest >= wanted.min_p * likeliest[:, :1])
    return torch.where(torch.zeros_like(kept).scatter(1, ids, kept), weights, 0.0)


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Where each row's number falls in its cumulated weights: int64 [rows, 1].

    Weights stand in the order of their ids whether they were filtered or not, so a filter that takes nothing away
    changes nothing.
    """
    cumulated = weights.cumsum(-1)
    places = torch.searchsorted(cumulated, uniforms * cumulated[:, -1:], right=True)
    # Rounding can leave the target at the very end, behind which only weightless tokens lie.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(places, last)
