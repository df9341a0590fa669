"""From the sequences of a step to the sampler's tensors.

Built on the host while the device computes. What depends on the requests alone is kept until the batch changes; each
step adds its random numbers, what may not be drawn yet, and what grammars allow.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch

from hma_serve.core.request import SamplingParams
from hma_serve.decode.sampler import (
    Biased,
    Filtered,
    Inputs,
    Masked,
    Occurrences,
    Penalised,
    Random,
    Rows,
    uniform,
)
from hma_serve.decode.sequence import Sequence


class SamplingBatches:
    """Builds `Rows` and `Inputs`, and knows which sequence counts its tokens where.

    Args:
        vocab: Tokens there are.
        slots: Sequences that run at once.
        device: Of the tensors.
    """

    def __init__(self, vocab: int, slots: int, device: torch.device | str = "cpu") -> None:
        self._vocab = vocab
        self._device = torch.device(device)
        self.occurrences = Occurrences(slots, vocab, self._device)
        self._free = list(range(slots - 1, -1, -1))
        self._slots: dict[int, int] = {}
        self._known: tuple[tuple[int, ...], Rows] = ((), Rows())

    def leave(self, sequence: Sequence) -> None:
        """Forgets a sequence; idempotent. What is under way on the device for it may still be counted in its slot."""
        slot = self._slots.pop(sequence.stream, None)
        if slot is not None:
            self._free.append(slot)
            self._known = ((), Rows())

    def rows(self, sequences: Items[Sequence]) -> Rows:
        """How to draw for these sequences, one row each; the same object while they stay the same."""
        streams = tuple([sequence.stream for sequence in sequences])
        if streams != self._known[0]:
            self._known = (streams, self._build(sequences))
        return self._known[1]

    def inputs(self, sequences: Items[Sequence]) -> Inputs:
        """What the next draw of these sequences brings."""
        drawn = [each for each in sequences if not each.sampling.greedy]
        uniforms = [[uniform(each.seed, each.draw_position)] for each in drawn]
        # What a grammar allows already takes bans into account.
        free = ((row, each) for row, each in enumerate(sequences) if each.guide is None)
        banned = [(row, token) for row, each in free for token in each.banned()]
        return Inputs(
            uniforms=self._tensor(uniforms, torch.float64) if drawn else None,
            banned=self._tensor(banned, torch.int64).T if banned else None,
            masked=self._masked(sequences),
        )

    def _masked(self, sequences: Items[Sequence]) -> Masked | None:
        guided = [(row, each, each.guide) for row, each in enumerate(sequences) if each.guide is not None]
        if not guided:
            return None
        allowed = torch.stack([_without(guide.allowed(), each.banned()) for _, each, guide in guided])
        return Masked(self._tensor([row for row, _, _ in guided], torch.int64), self._moved(allowed))

    def _build(self, sequences: Items[Sequence]) -> Rows:
        params = [sequence.sampling for sequence in sequences]
        reported = [row for row, each in enumerate(params) if each.logprobs is not None]
        return Rows(
            random=self._random(params),
            filtered=self._filtered([each for each in params if not each.greedy]),
            penalised=self._penalised(sequences),
            biased=self._biased(params),
            reported=self._tensor(reported, torch.int64) if reported else None,
            alternatives=max((params[row].logprobs or 0 for row in reported), default=0),
        )

    def _random(self, params: Items[SamplingParams]) -> Random | None:
        rows = [row for row, each in enumerate(params) if not each.greedy]
        if not rows:
            return None
        return Random(
            self._tensor(rows, torch.int64), self._column([params[row].temperature for row in rows], torch.float64)
        )

    def _filtered(self, random: Items[SamplingParams]) -> Filtered | None:
        rows = [row for row, each in enumerate(random) if each.filters]
        if not rows:
            return None
        chosen = [random[row] for row in rows]
        return Filtered(
            self._tensor(rows, torch.int64),
            # No row can have more than the vocabulary, and a client may ask for more than an int64 holds.
            self._column([min(each.top_k or self._vocab, self._vocab) for each in chosen], torch.int64),
            self._column([each.top_p for each in chosen], torch.float64),
            self._column([each.min_p for each in chosen], torch.float64),
        )

    def _penalised(self, sequences: Items[Sequence]) -> Penalised | None:
        rows = [row for row, each in enumerate(sequences) if each.sampling.penalises]
        if not rows:
            return None
        chosen = [sequences[row].sampling for row in rows]
        return Penalised(
            self._tensor(rows, torch.int64),
            self._tensor([self._slot(sequences[row]) for row in rows], torch.int64),
            self._column([each.repetition_penalty for each in chosen], torch.float32),
            self._column([each.presence_penalty for each in chosen], torch.float32),
            self._column([each.frequency_penalty for each in chosen], torch.float32),
        )

    def _slot(self, sequence: Sequence) -> int:
        """A sequence enters with what it holds when it is first drawn for."""
        slot = self._slots.get(sequence.stream)
        if slot is None:
            slot = self._slots[sequence.stream] = self._free.pop()
            prompt, output = sequence.tokens[: sequence.prompt_tokens], sequence.tokens[sequence.prompt_tokens :]
            self.occurrences.enter(slot, prompt, output)
        return slot

    def _biased(self, params: Items[SamplingParams]) -> Biased | None:
        biases = [(row, token, bias) for row, each in enumerate(params) for token, bias in each.logit_bias.items()]
        if not biases:
            return None
        rows, tokens, values = zip(*biases, strict=True)
        return Biased(
            self._tensor(rows, torch.int64), self._tensor(tokens, torch.int64), self._tensor(values, torch.float32)
        )

    def _column(self, values: Items[float], dtype: torch.dtype) -> torch.Tensor:
        return self._tensor(values, dtype).unsqueeze(1)

    def _tensor(self, values: Items[Any], dtype: torch.dtype) -> torch.Tensor:
        return self._moved(torch.tensor(values, dtype=dtype))

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device, without waiting for what it has in hand."""
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _without(allowed: torch.Tensor, banned: Items[int]) -> torch.Tensor:
    """A mask less what may not be drawn yet, unless nothing would be left: where a grammar can only end, it ends."""
    if not banned:
        return allowed
    less = allowed.numpy().view(np.uint32).copy()
    for token in banned:
        less[token // 32] &= ~np.uint32(1 << token % 32)
    return torch.from_numpy(less.view(np.int32)) if less.any() else allowed
