"""What the router knows of its workers at one moment: plain immutable values, the input of placement.

A view joins the worker's registry record, the newest load that it streamed, and what this router itself has placed on
it. The last part matters because load reports lag: without it, every request that arrives between two reports would be
sent to the same worker.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field, replace

from hma_serve.core.cost_model import StepCost, TransferCost, attended_pairs
from hma_serve.core.worker import WorkerInfo, WorkerState
from hma_serve.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class Load:
    """One report of a worker; every number is a gauge.

    Attributes:
        draining: It takes no new work.
        running: Requests being computed.
        waiting: Requests that wait inside the worker.
        queued_tokens: Prefill: tokens waiting or being computed.
        kv_used_tokens: Decode: tokens of KV held.
        kv_capacity_tokens: Decode: tokens of KV that fit.
        kv_free_tokens: Decode: tokens of KV that are free for new requests.
        context_tokens: Decode: tokens that a step of the batch reads.
        queue_seconds: Prefill: until what it holds is computed, as its own model sees it.
        step_seconds: Running mean of a decode step.
        token_seconds: Running mean of a prompt token's computation.
        cost: What its steps take.
        transfer: Prefill: what KV takes on its way to decode.
        engine_silent_seconds: For how long its engine has not answered.
    """

    draining: bool = False
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    kv_used_tokens: int = 0
    kv_capacity_tokens: int = 0
    kv_free_tokens: int = 0
    context_tokens: int = 0
    queue_seconds: float = 0.0
    step_seconds: float = 0.0
    token_seconds: float = 0.0
    cost: StepCost = field(default_factory=StepCost)
    transfer: TransferCost = field(default_factory=TransferCost)
    engine_silent_seconds: float = 0.0

    @classmethod
    def from_proto(cls, message: worker_pb2.WorkerLoad) -> Load:
        """The dataclass of a message."""
        return cls(
            draining=message.state == worker_pb2.WORKER_STATE_DRAINING,
            running=message.running,
            waiting=message.waiting,
            queued_tokens=message.queued_tokens,
            kv_used_tokens=message.kv_used_tokens,
            kv_capacity_tokens=message.kv_capacity_tokens,
            kv_free_tokens=message.kv_free_tokens,
            context_tokens=message.context_tokens,
            queue_seconds=message.queue_seconds,
            step_seconds=message.step_seconds,
            token_seconds=message.token_seconds,
            cost=StepCost.from_proto(message.cost),
            transfer=TransferCost.from_proto(message.transfer),
            engine_silent_seconds=message.engine_silent_seconds,
        )


@dataclass(frozen=True, slots=True)
class Share:
    """Some requests and their prompt tokens.

    Attributes:
        requests: How many.
        tokens: Their tokens together: those to compute on prefill, the whole prompt on decode.
        pairs: Of these tokens and the ones that they attend to.
        kv_tokens: Decode: of KV to count for them (`Demand.kv_tokens`).
    """

    requests: int = 0
    tokens: int = 0
    pairs: float = 0.0
    kv_tokens: int = 0

    def plus(self, tokens: int, kv_tokens: int = 0) -> Share:
        """With one more request."""
        pairs = self.pairs + attended_pairs(tokens)
        return Share(self.requests + 1, self.tokens + tokens, pairs, self.kv_tokens + kv_tokens)

    def minus(self, tokens: int, kv_tokens: int = 0) -> Share:
        """With one request fewer."""
        pairs = self.pairs - attended_pairs(tokens)
        return Share(self.requests - 1, self.tokens - tokens, pairs, self.kv_tokens - kv_tokens)

    def part(self, requests: int) -> Share:
        """So many requests of the mean size."""
        share = requests / self.requests
        return Share(requests, round(self.tokens * share), self.pairs * share, round(self.kv_tokens * share))


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the router sees it.

    Attributes:
        info: The registry record.
        load: The newest report; None before the first.
        load_at: When it came, in seconds of the loop's clock.
        away_since: Since when the worker has not been reachable; None while it is.
        ours: What this router has on the worker now.
        unseen: What this router placed there since `load_at`: the report does not know of it.
        refused: The worker refused a request since `load_at`: it is full, whatever the report says.
        placed: Requests ever placed there by this router; breaks ties.
    """

    info: WorkerInfo
    load: Load | None = None
    load_at: float = 0.0
    away_since: float | None = None
    ours: Share = field(default_factory=Share)
    unseen: Share = field(default_factory=Share)
    refused: bool = False
    placed: int = 0

    @property
    def open(self) -> bool:
        """Whether new work may be placed here, room permitting."""
        return (
            self.away_since is None
            and self.load is not None
            and not self.load.draining
            and self.info.state is WorkerState.READY
        )

    @property
    def requests(self) -> int:
        """Requests on the worker, by the best knowledge there is."""
        return self._reported + self.unreported.requests

    @property
    def unreported(self) -> Share:
        """What is on the worker beyond its report: placed since, or placed before and not arrived when it was made."""
        missing = self.ours.requests - self._reported - self.unseen.requests
        if missing <= 0:
            return self.unseen
        on_its_way = self.ours.part(missing)
        return Share(
            self.unseen.requests + missing,
            self.unseen.tokens + on_its_way.tokens,
            self.unseen.pairs + on_its_way.pairs,
            self.unseen.kv_tokens + on_its_way.kv_tokens,
        )

    @property
    def _reported(self) -> int:
        return self.load.running + self.load.waiting if self.load else 0

    @property
    def prefill_tokens(self) -> int:
        """Prefill: prompt tokens waiting or being computed."""
        reported = self.load.queued_tokens if self.load else 0
        return max(reported + self.unseen.tokens, self.ours.tokens)

    @property
    def kv_tokens(self) -> int:
        """Decode: tokens of KV held or about to be.

        What is reported counts as what it takes, packed and shared as it is; only the rest as if it were neither.
        """
        reported = self.load.kv_used_tokens if self.load else 0
        return reported + self.unreported.kv_tokens

    @property
    def kv_free_tokens(self) -> int:
        """Decode: tokens of KV that are left for another request."""
        return (self.load.kv_free_tokens if self.load else 0) - self.unreported.kv_tokens

    @property
    def kv_capacity(self) -> int:
        """Decode: tokens of KV that fit; 0 when the worker does not say."""
        return (self.load.kv_capacity_tokens if self.load else 0) or self.info.limits.kv_capacity_tokens

    @property
    def window(self) -> int:
        """Tokens, prompt and completion, that one request may have on an otherwise empty worker."""
        limit = self.info.limits.max_model_len
        return min(limit, self.kv_capacity) if self.kv_capacity else limit


@dataclass(frozen=True, slots=True)
class Fleet:
    """All workers of the served model.

    Attributes:
        prefills: Ordered by instance.
        decodes: Ordered by instance.
    """

    prefills: tuple[WorkerView, ...] = ()
    decodes: tuple[WorkerView, ...] = ()

    def without_room_on(self, decodes: Container[str]) -> Fleet:
        """The same workers, of which these decode instances are full."""
        return replace(
            self,
            decodes=tuple(
                replace(view, refused=True) if view.info.instance in decodes else view for view in self.decodes
            ),
        )

    @property
    def open(self) -> frozenset[str]:
        """Instances that take new work."""
        return frozenset(view.info.instance for view in (*self.prefills, *self.decodes) if view.open)

    @property
    def max_model_len(self) -> int | None:
        """The largest window (prompt plus completion, tokens) that any decode offers; None without decodes."""
        return max((view.window for view in self.decodes), default=None)
