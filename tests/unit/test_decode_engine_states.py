"""The engine under any order of admissions, arrivals, steps, cancellations, expiries and shortages of memory.

The device keeps books: it writes every token that it computes into the sequence's own pages, and before it draws it
reads all of them back. A page that two sequences own, that was lost when one was paused, or that changed hands while a
step was under way is found there. The engine's own books are checked after every turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hma_serve.checkpoint import resolve_checkpoint
from hma_serve.decode.commitment import Commitment, FullCommitment, OverCommitment
from hma_serve.decode.engine import Engine, EngineLimits
from hma_serve.decode.grammar import GrammarCompiler, GrammarQueue
from hma_serve.decode.intake import FusedIntake
from hma_serve.decode.page_order import Role
from hma_serve.decode.pages import KvGeometry, PagePool
from hma_serve.decode.runner import DrawnTokens, Step
from hma_serve.decode.sampler import Inputs, Occurrences, Rows
from hma_serve.decode.sampling_batch import SamplingBatches
from hma_serve.decode.scheduler import Scheduler, Share
from hma_serve.decode.step_loop import StepLoop
from hma_serve.decode.tickets import TicketTable
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.ipc import Arena
from hma_serve.quant import codec
from hma_serve.v1 import common_pb2, kv_block_pb2

CODEC, HEAD_DIM, VOCAB, LEASE = "tt_bfp8_b", 32, 100_000, 30.0
UNIT = codec(CODEC).group_bytes(HEAD_DIM)
CAPACITY = 200
SHARED_BEGINNING = 3
"""Groups that all prompts of a family have in common."""


def mark(token: int) -> int:
    """The byte that stands for a group of prompt tokens."""
    return token // 32 % 251


class BookKeeper:
    """A device whose next token is the last one plus one."""

    def __init__(self, pool: PagePool) -> None:
        # Small pieces, many times: numpy's views of the memory are quicker than torch's threads.
        self._plain = pool.plain(0).numpy()
        self._packed = {role: pool.packed(CODEC, role, 0).numpy() for role in Role}
        self._last: list[int] = []

    def begin(self, shares: Sequence[Share]) -> Step:
        wanted = [self._computed(share) for share in shares]
        return BookKeeperStep(self, [token + 1 for token, share in zip(wanted, shares, strict=True) if share.samples])

    def _computed(self, share: Share) -> int:
        sequence, pages = share.sequence, share.sequence.pages
        known = [*sequence.tokens, *([self._last[share.carried]] if share.carried is not None else [])]
        packed = pages.need.packed_groups
        end = share.start + share.count
        computed, tokens = np.arange(share.start, end), np.array(known, dtype=np.float32)
        for plain in (pages.plain_k.numpy(), pages.plain_v.numpy()):
            self._plain[plain[computed // 32 - packed], 0, computed % 32] = tokens[share.start : end, None]
            held = self._plain[plain, 0, :, 0].flatten()[: end - 32 * packed]
            assert np.array_equal(held, tokens[32 * packed : end]), "a computed page is not its own"
        marks = np.array([mark(token) for token in known[: 32 * packed : 32]], dtype=np.uint8)
        for role, addresses in ((Role.K, pages.packed_k), (Role.V, pages.packed_v)):
            stored = self._packed[role][addresses.numpy()]
            assert (stored == marks[:, None, None]).all(), "a packed page is not its own"
        return known[end - 1]


class BookKeeperStep:
    def __init__(self, device: BookKeeper, tokens: list[int]) -> None:
        self._device = device
        self._tokens = tokens

    def draw(self, rows: Rows, inputs: Inputs, occurrences: Occurrences) -> None:
        self._device._last = self._tokens

    def drawn(self) -> DrawnTokens:
        return DrawnTokens(self._tokens, [], [], [])


@dataclass
class Request:
    """What the machine knows of one stream."""

    prompt: list[int]
    packed: int
    max_tokens: int
    nonce: bytes = b""
    present: int = 0
    push: int = 0
    sent: int = 0
    said: list[int] = field(default_factory=list)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Role and group of every block that is to come."""
        roles = (kv_block_pb2.KV_ROLE_K, kv_block_pb2.KV_ROLE_V)
        return [(role, group) for role in roles for group in range((self.packed - self.present) // 32)]


class EngineMachine(RuleBasedStateMachine):
    @initialize(overlap=st.booleans(), over=st.sampled_from([True, True, False]))
    def start(self, overlap: bool, over: bool) -> None:
        self.now = 1000.0
        self.events: list[pb.DecodeEngineEvent] = []
        self.arena = Arena.create(1, 1 << 12)
        self.requests: dict[int, Request] = {}
        self.numbers = 0
        self.pool = PagePool(
            KvGeometry(1, 1, HEAD_DIM), packed_formats=[CODEC], plain_dtype=torch.float32, capacity_tokens=CAPACITY
        )
        scheduler = Scheduler(96)
        steps = StepLoop(scheduler, BookKeeper(self.pool), SamplingBatches(VOCAB, 16), overlap=overlap)
        self.commitment: Commitment = (
            OverCommitment(self.pool, scheduler, steps) if over else FullCommitment(self.pool, scheduler)
        )
        self.engine = Engine(
            pool=self.pool,
            intake=FusedIntake(self.pool),
            commitment=self.commitment,
            tickets=TicketTable(lease=LEASE, clock=lambda: self.now),
            scheduler=scheduler,
            steps=steps,
            grammars=GrammarQueue(GrammarCompiler(resolve_checkpoint("demo"), VOCAB, []), 1),
            limits=EngineLimits(16, frozenset(), VOCAB),
            arena=self.arena,
            emit=lambda *events: self.events.extend(events),
            clock=lambda: self.now,
            mint_seed=lambda: 1,
        )

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        # Whatever still runs comes to its end: nobody waits for ever, and nothing is left.
        for number in self._waiting():
            self._close(number)
        for _ in range(3000):
            if not self.requests:
                break
            self._turn()
        assert not self.requests, "a stream never ended"
        self._turn()
        assert self.pool.used_tokens == 0
        self.pool.check_integrity()
        self.arena.close()

    @rule(
        family=st.integers(0, 3),
        groups=st.integers(0, 4),
        rest=st.integers(1, 32),
        extra=st.integers(0, 100),
        max_tokens=st.integers(1, 90),
        emitted=st.integers(0, 40),
        shares=st.booleans(),
    )
    def admit(
        self, family: int, groups: int, rest: int, extra: int, max_tokens: int, emitted: int, shares: bool
    ) -> None:
        self._admit(family, groups, rest + (extra if not groups else 0), max_tokens, emitted, shares)

    def _admit(self, family: int, groups: int, rest: int, max_tokens: int, emitted: int, shares: bool) -> int:
        self.numbers += 1
        # Local prefill when nothing is packed. Families share their beginnings, and nothing else.
        length = 32 * groups + rest
        base = 10_000 * family + (0 if groups <= SHARED_BEGINNING else 700 * (self.numbers % 3))
        beginning = [10_000 * family + token for token in range(min(length, 32 * SHARED_BEGINNING))]
        prompt = beginning + [base + 96 + token for token in range(length - len(beginning))]
        request = Request(prompt, 32 * groups, max_tokens + emitted)
        self.requests[self.numbers] = request
        keys = [bytes(str(prompt[: 32 * (group + 1)]), "ascii") for group in range(groups)] if shares else []
        request.said = [prompt[-1] + 1 + number for number in range(emitted)]
        self._turn(
            admit=pb.DecodeAdmit(
                stream=self.numbers,
                epoch=1,
                prompt_token_ids=prompt,
                emitted_token_ids=request.said,
                packed_tokens=request.packed,
                k_codec=CODEC,
                v_codec=CODEC,
                prefix_keys=keys,
                sampling=common_pb2.SamplingParams(temperature=0.0),
                stop=common_pb2.StopConditions(max_tokens=request.max_tokens, ignore_eos=True),
            )
        )
        return self.numbers

    @rule(
        groups=st.lists(st.sampled_from([0, 0, 1, 4]), min_size=5, max_size=7),
        max_tokens=st.integers(60, 150),
        turns=st.integers(10, 100),
    )
    def crowd(self, groups: list[int], max_tokens: int, turns: int) -> None:
        """Several long answers at once: what overcommitted memory cannot hold."""
        for each in groups:
            self._deliver(self._admit(self.numbers % 4, each, 7 if each else 130, max_tokens, 0, True), 100)
        self.step(turns)

    def _waiting(self) -> list[int]:
        return [n for n, request in self.requests.items() if request.nonce and request.sent < len(request.blocks)]

    @precondition(lambda self: self._waiting())
    @rule(data=st.data(), blocks=st.integers(1, 30))
    def arrive(self, data: st.DataObject, blocks: int) -> None:
        self._deliver(data.draw(st.sampled_from(self._waiting())), blocks)

    def _deliver(self, number: int, blocks: int) -> None:
        request = self.requests.get(number)
        if request is None or request.sent == len(request.blocks):
            return
        if not request.push:
            self.numbers += 1
            request.push = self.numbers
            self._turn(
                attach=pb.DecodeAttach(
                    push=request.push,
                    nonce=request.nonce,
                    epoch=1,
                    k_codec=CODEC,
                    v_codec=CODEC,
                    token_start=request.present,
                    token_count=request.packed - request.present,
                )
            )
        for role, group in request.blocks[request.sent : request.sent + blocks]:
            token = request.prompt[request.present + 32 * group]
            self.arena.slot(0, UNIT)[:] = bytes([mark(token)]) * UNIT
            block = pb.DecodeBlock(
                push=request.push,
                slot=0,
                length=UNIT,
                layer=0,
                role=kv_block_pb2.KvRole.ValueType(role),
                head_start=0,
                head_count=1,
                group_start=group,
                group_count=1,
            )
            request.sent += 1
            self._turn(block=block)
        if number in self.requests and request.sent == len(request.blocks):
            self._turn(end_push=pb.DecodeEndPush(push=request.push))

    @precondition(lambda self: any(self.requests[number].push for number in self._waiting()))
    @rule(data=st.data())
    def break_off(self, data: st.DataObject) -> None:
        """A producer dies; another begins from the start."""
        request = self.requests[data.draw(st.sampled_from([n for n in self._waiting() if self.requests[n].push]))]
        self._turn(detach=pb.DecodeDetach(push=request.push))
        request.push = request.sent = 0

    @rule(turns=st.integers(1, 30))
    def step(self, turns: int) -> None:
        for _ in range(turns):
            self._turn()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._close(data.draw(st.sampled_from(sorted(self.requests))))

    @rule()
    def expire(self) -> None:
        """Whoever still waits for its KV has waited too long."""
        late = self._waiting()
        self.now += LEASE
        self._turn()
        assert not set(late) & set(self.requests)

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "engine"):
            self.pool.check_integrity()
            assert set(self.engine._streams) == set(self.requests)

    def _close(self, number: int) -> None:
        del self.requests[number]
        self._turn(close=pb.DecodeClose(stream=number))

    def _turn(self, **command: Any) -> None:
        self.events.clear()
        self.engine.turn([pb.DecodeEngineCommand(**command)] if command else [])
        for event in self.events:
            self._note(event)

    def _note(self, event: pb.DecodeEngineEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "admitted":
            request = self.requests[event.admitted.stream]
            request.nonce, request.present = event.admitted.nonce, event.admitted.present_tokens
        elif kind == "failed":
            assert event.failed.error.code in ("resource_exhausted", "failed_precondition", "unavailable"), event
            self.requests.pop(event.failed.stream, None)
        elif kind == "step":
            for output in event.step.outputs:
                request = self.requests[output.stream]
                request.said += output.tokens.token_ids
                # Nothing twice and nothing left out, paused or not.
                first = request.prompt[-1] + 1
                assert request.said == list(range(first, first + len(request.said)))
                if output.HasField("finished"):
                    assert len(request.said) == request.max_tokens
                    del self.requests[output.stream]


EngineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestEngine = EngineMachine.TestCase
