"""Rows in which earlier passages come again, now and then with a wrong token in them.

What makes a model copy well on its own, as opposed to one token at a time when the truth before it is given:

- It must commit after a few tokens of a passage, so passages come again often, from any distance.
- One token must not be enough to know the place, so some passages are random tokens of a small alphabet, in which only
  several tokens together are unique.
- The first tokens of a text are like no others to a model, so what opens a text is repeated more often than the rest.
- A mistake must not end the copy, so some repeated tokens are replaced by wrong ones while the labels stay right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SLOT = 64
_SHORTEST = 16
_CUE = 6
_REPEATED = 0.8
_NOISY_ROWS = 0.4
_NOISY_SLOTS = 0.35
_ALPHABET = 24
_WRONG_ROWS = 0.6
_WRONG = 0.15
_SETTLE = 4
_OPENING = 0.2


@dataclass(frozen=True, slots=True)
class Repeated:
    """Rows with repetitions, all `[rows, length]`.

    Attributes:
        read: Tokens as the model reads them, wrong ones included.
        true: Tokens as they should be.
        known: True where the token can be told from those before it.
        copied: True where it can be told because it repeats an earlier one.
    """

    read: torch.Tensor
    true: torch.Tensor
    known: torch.Tensor
    copied: torch.Tensor


class Repeats:
    """Repeats passages of rows within them.

    A row is cut into slots, at a random offset. Passages from the even slots come again in the odd ones after them, so
    that no source is ever overwritten and all copies are made at once.
    """

    def __init__(self, vocabulary: int, random: torch.Generator) -> None:
        self._vocabulary = vocabulary
        self._random = random

    def into(self, tokens: torch.Tensor) -> Repeated:
        """Repeats earlier passages of each row `[rows, length]` in most of its odd slots."""
        rows, length = tokens.shape
        offset = self._below(2 * _SLOT, rows) * (self._fraction(rows) > _OPENING)
        place = torch.arange(length, device=tokens.device) + offset[:, None]
        tokens, known = self._with_noise(tokens, place // _SLOT)
        source, into_copy, span = self._sources(place, -(-(length + 2 * _SLOT) // (2 * _SLOT)))
        inside = (into_copy >= 0) & (into_copy < span)
        true = tokens.gather(1, torch.where(inside, source, torch.arange(length, device=tokens.device)))
        border = (into_copy >= span) & (into_copy < span + _SETTLE) & (span > 0)
        copied = inside & (into_copy >= _CUE)
        read = torch.where(copied & self._wrong(rows, length), self._others(true), true)
        return Repeated(read, true, torch.where(inside, copied, known & ~border), copied)

    def _sources(self, place: torch.Tensor, pairs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For every token: the column it would repeat, its index in the passage, and the passage's length or 0."""
        rows, offset = len(place), place[:, :1]
        longest = _SLOT - _SETTLE
        span = (_SHORTEST + self._fraction(rows, pairs) * (longest - _SHORTEST)).long()
        begin = (self._fraction(rows, pairs) * (longest - span)).long()
        chosen = (self._fraction(rows, pairs) * (torch.arange(pairs, device=place.device) + 1)).long()
        source = 2 * _SLOT * chosen + (self._fraction(rows, pairs) * (_SLOT - span)).long() - offset
        source = torch.where((self._fraction(rows, pairs) < _OPENING) & (offset == 0), 0, source)
        span = torch.where((self._fraction(rows, pairs) < _REPEATED) & (source >= 0), span, 0)
        pair, within = place // (2 * _SLOT), place % (2 * _SLOT) - _SLOT
        index = within - begin.gather(1, pair)
        span = torch.where(within >= 0, span.gather(1, pair), 0)
        return source.gather(1, pair) + index, index, span

    def _with_noise(self, tokens: torch.Tensor, slot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fills slots of some rows with random tokens, half of them of a small alphabet."""
        rows, length = tokens.shape
        slots = length // _SLOT + 4
        noisy = (self._fraction(rows, slots) < _NOISY_SLOTS) & (self._fraction(rows, 1) < _NOISY_ROWS)
        alphabet = self._below(self._vocabulary - 3, rows, _ALPHABET) + 3
        few = alphabet.gather(1, self._below(_ALPHABET, rows, length))
        many = self._below(self._vocabulary - 3, rows, length) + 3
        noise = torch.where((self._fraction(rows, slots) < 0.5).gather(1, slot), few, many).to(tokens.dtype)
        here = noisy.gather(1, slot)
        unknown = here | here.roll(1, dims=1)  # nor can the first token after random ones be known
        return torch.where(here, noise, tokens), ~unknown

    def _wrong(self, rows: int, length: int) -> torch.Tensor:
        return (self._fraction(rows, length) < _WRONG) & (self._fraction(rows, 1) < _WRONG_ROWS)

    def _others(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens to put in the place of true ones: half of them from elsewhere in the row, half any."""
        rows, length = tokens.shape
        elsewhere = tokens.gather(1, self._below(length, rows, length))
        anything = (self._below(self._vocabulary - 3, rows, length) + 3).to(tokens.dtype)
        return torch.where(self._fraction(rows, length) < 0.5, elsewhere, anything)

    def _below(self, limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(limit, shape, device=self._random.device, generator=self._random)

    def _fraction(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, device=self._random.device, generator=self._random)
