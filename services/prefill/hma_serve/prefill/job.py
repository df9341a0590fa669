"""One request inside the engine: what is left of it, and the chunk of it that is under way.

A prompt is worked off in chunks, each through all layers before the next begins. Where a chunk's KV comes from differs:
most are computed, some are found in the prefix cache, and without overlap all of it is handed out in a second pass.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeGuard

import torch

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.prefill.accelerators import KvStore
from hma_serve.prefill.prefix_cache import Lease


class Source(Enum):
    """Where a chunk's KV comes from."""

    COMPUTED = auto()
    """From the accelerator, layer by layer."""
    CACHED = auto()
    """From the prefix cache."""
    STORED = auto()
    """From the request's own store, where an earlier pass left it."""


@dataclass(slots=True, eq=False)
class Chunk:
    """Consecutive tokens that pass through the layers together.

    Attributes:
        start: First token.
        tokens: How many.
        source: Where their KV comes from.
        pages: Of the prefix cache, for its first groups: to read if cached, otherwise reserved, to fill.
        hidden: The residual stream [tokens, hidden] before `layer`; None unless computed.
        layer: The layer that comes next.
    """

    start: int
    tokens: int
    source: Source
    pages: list[int] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    layer: int = 0

    @property
    def end(self) -> int:
        """Token after the last."""
        return self.start + self.tokens

    @property
    def groups(self) -> slice:
        """Its groups of 32 tokens within the prompt."""
        return slice(self.start // GROUP_TOKENS, self.end // GROUP_TOKENS)

    def in_step(self, other: Chunk | None) -> TypeGuard[Chunk]:
        """Whether one call can compute the next layer of both."""
        if other is None or other.layer != self.layer:
            return False
        return self.source is other.source is Source.COMPUTED


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        job_id: The front's name for it.
        token_ids: The whole part of the prompt; whole groups.
        token_start: KV of tokens before it is not handed out.
        due_ns: When its first token is due, CLOCK_MONOTONIC.
        priority: Higher runs earlier.
        layers_ahead: Layers that may be handed out and not yet sent.
        names: Of its prefixes, one a group; empty: not cached.
        lease: What it uses of the prefix cache.
        overlap: Each layer is handed out as soon as it is there; otherwise all of them when the last one is.
        slots: Of layers handed out and not yet sent, oldest first.
        store: The packed KV on the accelerator, once something is computed.
        chunk: Under way; None between chunks.
        position: Tokens whose chunks are done in this pass.
        kept: Tokens that are in the prefix cache or on their way there, without a gap.
        handing_out: This pass hands layers out.
        failed: Computation ended with an error; only the close is still to come.
        compute_ns: Its share of the accelerator's time since it last reported.
        computed_ns: When its last computed layer was done.
    """

    job_id: int
    token_ids: list[int]
    token_start: int
    due_ns: int
    priority: int
    layers_ahead: int
    names: list[bytes]
    lease: Lease
    overlap: bool
    slots: deque[int] = field(default_factory=deque)
    store: KvStore | None = None
    chunk: Chunk | None = None
    position: int = 0
    kept: int = 0
    handing_out: bool = field(init=False)
    failed: bool = False
    compute_ns: int = 0
    computed_ns: int = 0

    def __post_init__(self) -> None:
        self.handing_out = self.overlap

    @property
    def tokens(self) -> int:
        """Tokens whose KV it needs."""
        return len(self.token_ids)

    @property
    def computing(self) -> bool:
        """Whether this pass computes what is not cached; the one after it, without overlap, only hands out."""
        return self.handing_out is self.overlap

    @property
    def remaining(self) -> int:
        """Tokens that are not through all layers yet; 0 once only handing out is left."""
        return self.tokens - self.position if self.computing else 0

    @property
    def runnable(self) -> bool:
        """Whether work is left and, if it ends in a slot, one of its share is free."""
        if self.failed or self.position >= self.tokens:
            return False
        return not self.handing_out or len(self.slots) < self.layers_ahead

    def end_chunk(self) -> None:
        """The chunk is through all layers; begins the second pass if there is one."""
        assert self.chunk is not None
        self.position = self.chunk.end
        self.chunk = None
        if self.position == self.tokens and not self.handing_out:
            self.position, self.handing_out = 0, True

    def drop(self) -> None:
        """Lets go of what computation needs; slots stay out until they are sent."""
        self.store = self.chunk = None
