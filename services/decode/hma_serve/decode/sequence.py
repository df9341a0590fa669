"""One request inside the engine: which tokens it has, which of them are computed, and when it ends.

The tokens are prompt, then output. Output that an earlier attempt emitted is output like any other: it counts against
the budget, positions of the random numbers go on behind it, and only its KV is computed again.

A device may run ahead of the host: a token that was drawn there and is not known here yet is *awaited*. It is the next
step's input all the same, straight from where it was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

import torch

from hma_serve.core.errors import HmaError
from hma_serve.core.request import SamplingParams, StopConditions
from hma_serve.decode.pages import Reservation


class Ending(Enum):
    """Why a sequence ended by itself."""

    STOP = auto()
    LENGTH = auto()


class Guide(Protocol):
    """What a grammar says about the next token of one sequence."""

    @property
    def failure(self) -> HmaError | None:
        """Why it cannot say what is allowed any more: nothing that was drawn since is of use."""
        ...

    def allowed(self) -> torch.Tensor:
        """The tokens that may come next: int32 [ceil(vocab / 32)], one bit a token, the lowest first.

        Never raises, for it is called for all sequences of a step: after a `failure` everything is allowed.
        """
        ...

    def take(self, token: int) -> bool:
        """Takes a drawn token; whether the text is complete and nothing may follow.

        Raises:
            HmaError: It cannot go on.
        """
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence.

    Attributes:
        stream: The front's number of it.
        pages: Its memory, enough for everything up to `max_tokens`.
        prompt_tokens: Length of the prompt.
        tokens: Prompt and output, as far as is known here.
        computed: Tokens whose KV is in the pages or being computed; the packed ones from the start.
        sampling: How to draw.
        seed: The request's, or one drawn for it.
        stop: When to end; `max_tokens` counts all output, that of earlier attempts included.
        eos: Tokens that end a text.
        max_tokens: Length of the output at most.
        vocab: Tokens there are.
        deadline: Seconds of the engine's clock.
        priority: Higher computes earlier where a step has no room for all.
        guide: The grammar that the output must follow.
        awaited: Tokens drawn on the device that are not known here yet.
        row: The sequence's row in the draw that gave the last awaited token.
    """

    stream: int
    pages: Reservation
    prompt_tokens: int
    tokens: list[int]
    computed: int
    sampling: SamplingParams
    seed: int
    stop: StopConditions
    eos: frozenset[int]
    max_tokens: int
    vocab: int
    deadline: float | None = None
    priority: int = 0
    guide: Guide | None = None
    awaited: int = 0
    row: int = 0
    stop_token: int | None = None
    _endings: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        # What a grammar calls complete ends by an end-of-sequence token, whatever else was asked.
        eos = frozenset() if self.stop.ignore_eos and self.guide is None else self.eos
        self._endings = eos | frozenset(self.stop.stop_token_ids)

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; the last of them gives the next token. 0: no more may be drawn."""
        if self.output_tokens + self.awaited >= self.max_tokens:
            return 0
        return len(self.tokens) + self.awaited - self.computed

    @property
    def output_tokens(self) -> int:
        """Length of the output, as far as is known here."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def draw_position(self) -> int:
        """Number in the output of the token that is drawn next, or being drawn."""
        return self.output_tokens + max(0, self.awaited - 1)

    def accept(self, token: int) -> Ending | None:
        """Takes a drawn token; a token that ends the sequence is not part of the output.

        Raises:
            HmaError: Its grammar cannot go on.
        """
        if self.guide is not None and self.guide.failure is not None:
            raise self.guide.failure
        if token in self._endings:
            self.stop_token = token
            return Ending.STOP
        self.tokens.append(token)
        if self.guide is not None and self.guide.take(token):
            return Ending.STOP
        return Ending.LENGTH if self.output_tokens >= self.max_tokens else None

    def banned(self) -> Items[int]:
        """Tokens that may not be drawn yet."""
        if self.draw_position >= self.stop.min_tokens:
            return ()
        return [token for token in self._endings if token < self.vocab]
