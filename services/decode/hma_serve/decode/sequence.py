"""One request inside the engine: which tokens it has, which of them are computed, and when it ends.

The tokens are prompt, then output. Output that an earlier attempt emitted is output like any other: it counts against
the budget, positions of the random numbers go on behind it, and only its KV is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum, auto

from hma_serve.core.request import SamplingParams, StopConditions
from hma_serve.decode.pages import Reservation
from hma_serve.decode.sampler import Draw


class Ending(Enum):
    """Why a sequence ended by itself."""

    STOP = auto()
    LENGTH = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence.

    Attributes:
        stream: The front's number of it.
        pages: Its memory, enough for everything up to `max_tokens`.
        prompt_tokens: Length of the prompt.
        tokens: Prompt and output.
        computed: Tokens whose KV is in the pages; the packed ones from the start.
        sampling: How to draw.
        seed: The request's, or one drawn for it.
        stop: When to end; `max_tokens` counts all output, that of earlier attempts included.
        eos: Tokens that end a text.
        max_tokens: Length of the output at most.
        vocab: Tokens there are.
        deadline: Seconds of the engine's clock.
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
    stop_token: int | None = None
    _endings: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        eos = frozenset() if self.stop.ignore_eos else self.eos
        self._endings = eos | frozenset(self.stop.stop_token_ids)

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; the last of them gives the next token."""
        return len(self.tokens) - self.computed

    @property
    def output_tokens(self) -> int:
        """Length of the output."""
        return len(self.tokens) - self.prompt_tokens

    def next_tokens(self, count: int) -> Items[int]:
        """The first `count` pending tokens."""
        return self.tokens[self.computed : self.computed + count]

    def draw(self) -> Draw:
        """What the sampler must know to draw the next token."""
        penalised = self.sampling.repetition_penalty != 1.0
        counted = penalised or self.sampling.presence_penalty != 0.0 or self.sampling.frequency_penalty != 0.0
        return Draw(
            params=self.sampling,
            seed=self.seed,
            position=self.output_tokens,
            banned=self._banned(),
            prompt=self.tokens[: self.prompt_tokens] if penalised else (),
            output=self.tokens[self.prompt_tokens :] if counted else (),
        )

    def accept(self, token: int) -> Ending | None:
        """Takes a drawn token; a token that ends the sequence is not part of the output."""
        if token in self._endings:
            self.stop_token = token
            return Ending.STOP
        self.tokens.append(token)
        return Ending.LENGTH if self.output_tokens >= self.max_tokens else None

    def _banned(self) -> Items[int]:
        if self.output_tokens >= self.stop.min_tokens:
            return ()
        return [token for token in self._endings if token < self.vocab]
