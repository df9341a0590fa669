"""The engine without a model: admission, tickets, blocks, steps and clean-up, by its messages alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pytest
import torch

from hma_serve.checkpoint import resolve_checkpoint
from hma_serve.core.errors import Internal
from hma_serve.core.worker import WorkerLimits
from hma_serve.decode.commitment import FullCommitment, OverCommitment
from hma_serve.decode.engine import Engine, EngineLimits
from hma_serve.decode.grammar import GrammarCompiler, GrammarQueue
from hma_serve.decode.intake import FusedIntake
from hma_serve.decode.page_order import Role
from hma_serve.decode.pages import KvGeometry, Need, PagePool, Reservation
from hma_serve.decode.runner import DrawnTokens, Step
from hma_serve.decode.sampler import Inputs, Occurrences, Rows, sample
from hma_serve.decode.sampling_batch import SamplingBatches
from hma_serve.decode.scheduler import Scheduler, Share
from hma_serve.decode.step_loop import StepLoop
from hma_serve.decode.tickets import TicketTable
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.ipc import Arena
from hma_serve.quant import codec
from hma_serve.router.placement import Demand
from hma_serve.v1 import common_pb2, kv_block_pb2

LAYERS, KV_HEADS, HEAD_DIM, VOCAB, EOS = 2, 2, 32, 300, 2
LEASE = 30.0
ROLES = (kv_block_pb2.KV_ROLE_K, kv_block_pb2.KV_ROLE_V)
UNIT = codec("tt_bfp8_b").group_bytes(HEAD_DIM)


class NextNumber:
    """A device whose next token is the last one plus one. It knows a carried token, which the host does not yet."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, int]]] = []
        self.fails = False
        self._last: NextNumberStep | None = None

    def begin(self, shares: Sequence[Share]) -> Step:
        if self.fails:
            raise RuntimeError("the device said no")
        self.steps.append([(share.sequence.stream, share.count) for share in shares])
        inputs = [self._last_input(share) for share in shares if share.samples]
        self._last = NextNumberStep([token + 1 for token in inputs])
        return self._last

    def _last_input(self, share: Share) -> int:
        if share.carried is None:
            return share.tokens[-1]
        assert self._last is not None
        assert self._last.tokens is not None
        return int(self._last.tokens[share.carried])


class NextNumberStep:
    def __init__(self, wanted: list[int]) -> None:
        self._wanted = wanted
        self.tokens: torch.Tensor | None = None

    def draw(self, rows: Rows, inputs: Inputs, occurrences: Occurrences) -> None:
        logits = torch.zeros(len(self._wanted), VOCAB)
        logits[range(len(self._wanted)), self._wanted] = 10.0
        self.tokens = sample(logits, rows, inputs, occurrences).tokens if self._wanted else torch.empty(0)

    def drawn(self) -> DrawnTokens:
        assert self.tokens is not None
        return DrawnTokens(self.tokens.tolist(), [], [], [])


class Harness:
    """An engine with its ends in hand."""

    def __init__(
        self, capacity: int = 2000, max_running: int = 3, *, overlap: bool = False, overcommit: bool = False
    ) -> None:
        self.now = 500.0
        self.events: list[pb.DecodeEngineEvent] = []
        self.runner = NextNumber()
        self.arena = Arena.create(4, 1 << 16)
        self.pool = PagePool(
            KvGeometry(LAYERS, KV_HEADS, HEAD_DIM),
            packed_formats=["f32", "bf16", "tt_bfp8_b"],
            plain_dtype=torch.float32,
            capacity_tokens=capacity,
        )
        self.intake = FusedIntake(self.pool)
        scheduler = Scheduler(64)
        steps = StepLoop(scheduler, self.runner, SamplingBatches(VOCAB, max_running), overlap=overlap)
        self.engine = Engine(
            pool=self.pool,
            intake=self.intake,
            commitment=OverCommitment(self.pool, scheduler, steps)
            if overcommit
            else FullCommitment(self.pool, scheduler),
            tickets=TicketTable(lease=LEASE, clock=lambda: self.now),
            scheduler=scheduler,
            steps=steps,
            grammars=GrammarQueue(GrammarCompiler(resolve_checkpoint("demo"), VOCAB, [EOS]), 2),
            limits=EngineLimits(max_running, frozenset({EOS}), VOCAB),
            arena=self.arena,
            emit=lambda *events: self.events.extend(events),
            clock=lambda: self.now,
            mint_seed=lambda: 1,
        )

    def turn(self, *commands: pb.DecodeEngineCommand) -> list[pb.DecodeEngineEvent]:
        """One turn; its events without the load's."""
        self.events.clear()
        self.patience = self.engine.turn(commands)
        return [event for event in self.events if not event.HasField("load")]

    def admit(self, stream: int, prompt: int = 70, packed: int = 64, *, epoch: int = 1, **extra: Any) -> bytes:
        (event,) = [e for e in self.turn(admit(stream, prompt, packed, epoch=epoch, **extra)) if not e.HasField("step")]
        assert event.HasField("admitted"), event
        return event.admitted.nonce

    def failure(
        self, events: list[pb.DecodeEngineEvent], kind: Literal["failed", "push_failed"] = "failed"
    ) -> common_pb2.ErrorDetail:
        (event,) = [event for event in events if event.HasField(kind)]
        detail: common_pb2.ErrorDetail = getattr(event, kind).error
        return detail

    def fill(self, push: int, *, groups: int = 2, skip_last: bool = False) -> list[pb.DecodeEngineEvent]:
        """Sends all blocks of a prompt, one per layer, role and head; the bytes say which."""
        commands = []
        events = []
        for layer in range(LAYERS):
            for role in ROLES:
                for head in range(KV_HEADS):
                    if skip_last and (layer, role, head) == (LAYERS - 1, ROLES[1], KV_HEADS - 1):
                        continue
                    self.arena.slot(0, groups * UNIT)[:] = bytes([marker(layer, role, head)]) * (groups * UNIT)
                    commands = [block(push, 0, layer, role, head, groups)]
                    events += self.turn(*commands)
        return events


def marker(layer: int, role: int, head: int) -> int:
    return 100 * layer + 10 * role + head


def admit(
    stream: int,
    prompt: int,
    packed: int,
    *,
    epoch: int = 1,
    max_tokens: int = 4,
    deadline: float = 0,
    emitted: int = 0,
    stop_token: int | None = None,
    keys: Sequence[bytes] = (),
    priority: int = 0,
) -> pb.DecodeEngineCommand:
    sampling = common_pb2.SamplingParams(temperature=0.0)
    return pb.DecodeEngineCommand(
        admit=pb.DecodeAdmit(
            stream=stream,
            epoch=epoch,
            prompt_token_ids=range(10, 10 + prompt),
            emitted_token_ids=range(10 + prompt, 10 + prompt + emitted),
            packed_tokens=packed,
            k_codec="tt_bfp8_b" if packed else "",
            v_codec="tt_bfp8_b" if packed else "",
            sampling=sampling,
            stop=common_pb2.StopConditions(
                max_tokens=max_tokens, stop_token_ids=[] if stop_token is None else [stop_token]
            ),
            deadline_ns=int(deadline * 1e9),
            prefix_keys=keys,
            priority=priority,
        )
    )


def attach(
    push: int, nonce: bytes, *, epoch: int = 1, tokens: int = 64, start: int = 0, v_codec: str = "tt_bfp8_b"
) -> pb.DecodeEngineCommand:
    return pb.DecodeEngineCommand(
        attach=pb.DecodeAttach(
            push=push,
            nonce=nonce,
            epoch=epoch,
            k_codec="tt_bfp8_b",
            v_codec=v_codec,
            token_start=start,
            token_count=tokens,
        )
    )


def block(push: int, slot: int, layer: int, role: int, head: int, groups: int) -> pb.DecodeEngineCommand:
    return pb.DecodeEngineCommand(
        block=pb.DecodeBlock(
            push=push,
            slot=slot,
            length=groups * UNIT,
            layer=layer,
            role=kv_block_pb2.KvRole.ValueType(role),
            head_start=head,
            head_count=1,
            group_start=0,
            group_count=groups,
        )
    )


def end_push(push: int) -> pb.DecodeEngineCommand:
    return pb.DecodeEngineCommand(end_push=pb.DecodeEndPush(push=push))


def detach(push: int) -> pb.DecodeEngineCommand:
    return pb.DecodeEngineCommand(detach=pb.DecodeDetach(push=push))


def close(stream: int) -> pb.DecodeEngineCommand:
    return pb.DecodeEngineCommand(close=pb.DecodeClose(stream=stream))


def outputs(events: list[pb.DecodeEngineEvent]) -> list[pb.DecodeStreamOutput]:
    return [output for event in events if event.HasField("step") for output in event.step.outputs]


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness()
    yield made
    made.pool.check_integrity()
    made.arena.close()


def test_a_prompt_without_packed_tokens_runs_at_once(harness: Harness) -> None:
    produced = outputs(harness.turn(admit(1, 5, 0)))
    while harness.patience == 0:
        produced += outputs(harness.turn())
    assert produced[0].HasField("started")
    assert [token for output in produced for token in output.tokens.token_ids] == [15, 16, 17, 18]
    finished = produced[-1].finished
    assert finished.reason == common_pb2.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 4)
    assert harness.pool.used_tokens == 0
    assert harness.patience is None


def test_nothing_is_sampled_before_the_commit(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    landed = harness.fill(9)
    assert [event.WhichOneof("event") for event in landed] == ["landed"] * (LAYERS * 2 * KV_HEADS)
    assert harness.runner.steps == []
    events = harness.turn(end_push(9))
    assert [event.WhichOneof("event") for event in events] == ["committed", "step"]
    # The packed tokens are not computed again: only the last six of the prompt are.
    assert harness.runner.steps == [[(1, 6)]]
    assert list(outputs(events)[0].tokens.token_ids) == [80]


def test_blocks_land_in_the_pages_byte_for_byte(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    harness.fill(9)
    pages = harness.engine._streams[1].sequence.pages
    for layer in range(LAYERS):
        for role, kind, places in zip(ROLES, Role, (pages.packed_k, pages.packed_v), strict=True):
            stored = harness.pool.packed("tt_bfp8_b", kind, layer)[places]
            for head in range(KV_HEADS):
                assert (stored[:, head] == marker(layer, role, head)).all()


def test_a_hole_is_never_committed(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    harness.fill(9, skip_last=True)
    assert harness.failure(harness.turn(end_push(9)), "push_failed").code == "data_loss"
    assert harness.runner.steps == []
    # The ticket is empty again: another stream of the same attempt may fill it from the start.
    harness.turn(detach(9), attach(10, nonce))
    harness.fill(10)
    assert harness.turn(end_push(10))[0].HasField("committed")


def test_late_blocks_of_a_dead_stream_are_dropped(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    harness.turn(detach(9), attach(10, nonce))
    harness.fill(10)
    harness.arena.slot(1, 2 * UNIT)[:] = b"\xee" * (2 * UNIT)
    (landed,) = harness.turn(block(9, 1, 0, ROLES[0], 0, 2))
    assert landed.landed.slot == 1
    (late,) = [event.load.late_blocks for event in harness.events if event.HasField("load")]
    assert late == 1
    pages = harness.engine._streams[1].sequence.pages
    assert (harness.pool.packed("tt_bfp8_b", Role.K, 0)[pages.packed_k][:, 0] == marker(0, ROLES[0], 0)).all()
    assert harness.turn(end_push(9)) == []
    assert harness.turn(end_push(10))[0].HasField("committed")


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        (lambda nonce: attach(9, bytes(16)), "not_found", "ticket"),
        (lambda nonce: attach(9, nonce, epoch=2), "failed_precondition", "epoch"),
        (lambda nonce: attach(9, nonce, tokens=32), "failed_precondition", "manifest.token_count"),
        (lambda nonce: attach(9, nonce, v_codec="f32"), "failed_precondition", "manifest.codecs"),
    ],
)
def test_foreign_streams_are_refused(
    harness: Harness, change: Callable[[bytes], pb.DecodeEngineCommand], code: str, field: str
) -> None:
    nonce = harness.admit(1)
    error = harness.failure(harness.turn(change(nonce)), "push_failed")
    assert (error.code, error.field) == (code, field)
    assert [event.WhichOneof("event") for event in harness.turn(attach(10, nonce))] == ["attached"]


def test_a_second_stream_for_a_ticket_is_refused(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    assert harness.failure(harness.turn(attach(10, nonce)), "push_failed").code == "failed_precondition"


def test_full_is_said_at_once(harness: Harness) -> None:
    for stream in (1, 2, 3):
        harness.admit(stream)
    error = harness.failure(harness.turn(admit(4, 70, 64)))
    assert error.code == "resource_exhausted"
    assert error.retry_after_seconds > 0
    harness.turn(close(2))
    harness.admit(5)


def test_a_prefix_that_is_here_need_not_come_again(harness: Harness) -> None:
    keys = [b"first", b"second", b"third"]
    nonce = harness.admit(1, keys=keys[:2])
    harness.turn(attach(9, nonce))
    harness.fill(9)
    harness.turn(end_push(9))
    pages = harness.engine._streams[1].sequence.pages
    # A longer prompt with the same beginning: only its last group is missing, and only that is taken.
    (event,) = [e for e in harness.turn(admit(2, 100, 96, keys=keys)) if e.HasField("admitted")]
    assert event.admitted.present_tokens == 64
    longer = harness.engine._streams[2].sequence.pages
    assert torch.equal(longer.packed_k[:2], pages.packed_k)
    refused = harness.turn(attach(10, event.admitted.nonce, tokens=96))
    assert harness.failure(refused, "push_failed").field == "manifest.token_count"
    harness.turn(attach(11, event.admitted.nonce, start=64, tokens=32))
    harness.fill(11, groups=1)
    assert harness.turn(end_push(11))[0].HasField("committed")
    # The whole prompt is here: it runs at once, also after the others have gone.
    harness.turn(close(1), close(2))
    assert harness.pool.used_tokens == 0
    events = harness.turn(admit(3, 100, 96, keys=keys))
    (event,) = [e for e in events if e.HasField("admitted")]
    assert event.admitted.present_tokens == 96
    assert [e.WhichOneof("event") for e in events] == ["admitted", "step"]
    # Other keys, for example another tenant's, find nothing.
    (event,) = [e for e in harness.turn(admit(4, 70, 64, keys=[b"x", b"y"])) if e.HasField("admitted")]
    assert event.admitted.present_tokens == 0


def test_a_prefix_that_did_not_become_complete_is_not_shared(harness: Harness) -> None:
    keys = [b"first", b"second"]
    nonce = harness.admit(1, keys=keys)
    harness.turn(attach(9, nonce))
    harness.fill(9, skip_last=True)
    harness.turn(end_push(9), close(1))
    (event,) = [e for e in harness.turn(admit(2, 70, 64, keys=keys)) if e.HasField("admitted")]
    assert event.admitted.present_tokens == 0


def test_memory_is_reserved_before_admission(harness: Harness) -> None:
    capacity = harness.pool.capacity_tokens
    harness.admit(1, max_tokens=capacity * 5 // 8)
    assert harness.failure(harness.turn(admit(2, 70, 64, max_tokens=capacity * 5 // 8))).code == "resource_exhausted"
    assert harness.failure(harness.turn(admit(3, 70, 64, max_tokens=2 * capacity))).code == "failed_precondition"


def test_a_lease_that_runs_out_fails_the_stream_also_when_idle(harness: Harness) -> None:
    harness.admit(1)
    assert harness.patience == LEASE
    harness.now += LEASE
    assert harness.failure(harness.turn()).code == "unavailable"
    assert harness.pool.used_tokens == 0


def test_arriving_blocks_and_extend_renew_the_lease(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    for _ in range(4):
        harness.now += LEASE - 1
        assert harness.turn(block(9, 0, 0, ROLES[0], 0, 2))[0].HasField("landed")
    harness.now += LEASE - 1
    call = pb.DecodeTicketCall(call=5, nonce=nonce, epoch=1)
    (answer,) = harness.turn(pb.DecodeEngineCommand(extend=call))
    assert answer.answer.lease_ns == int(LEASE * 1e9)
    harness.now += LEASE - 1
    assert harness.turn() == []


def test_release_ends_the_stream_and_its_push(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    call = pb.DecodeTicketCall(call=5, nonce=nonce, epoch=1)
    events = harness.turn(pb.DecodeEngineCommand(release=call))
    assert {event.WhichOneof("event") for event in events} == {"push_failed", "failed", "answer"}
    assert harness.pool.used_tokens == 0
    (again,) = harness.turn(pb.DecodeEngineCommand(release=call))
    assert again.answer.error.code == "not_found"


def test_a_deadline_ends_a_running_stream_between_steps(harness: Harness) -> None:
    harness.turn(admit(1, 5, 0, max_tokens=100, deadline=harness.now + 10))
    assert outputs(harness.turn())
    harness.now += 10
    steps = len(harness.runner.steps)
    assert harness.failure(harness.turn()).code == "deadline_exceeded"
    assert len(harness.runner.steps) == steps
    assert harness.pool.used_tokens == 0


def test_equal_prompts_share_a_step_and_a_higher_priority_takes_it(harness: Harness) -> None:
    harness.turn(admit(1, 100, 0), admit(2, 100, 0))
    assert harness.runner.steps == [[(1, 32), (2, 32)]]
    harness.turn(admit(3, 100, 0, priority=1))
    assert harness.runner.steps[1] == [(3, 64)]
    harness.turn()
    # What the urgent one leaves is shared again.
    assert harness.runner.steps[2] == [(3, 36), (1, 14), (2, 14)]


def test_the_nearest_deadline_is_served_first(harness: Harness) -> None:
    harness.turn(admit(1, 33, 0), admit(2, 63, 0, deadline=harness.now + 9), admit(3, 33, 0, deadline=harness.now + 3))
    # Equal parts of 21; the one left over goes to the most urgent.
    assert harness.runner.steps == [[(3, 22), (2, 21), (1, 21)]]


def test_an_engine_that_has_become_idle_checks_its_pages(harness: Harness) -> None:
    harness.turn(admit(1, 5, 0), admit(2, 70, 64))
    held = harness.pool.reserve(Need.of(packed_tokens=0, total_tokens=32, k_format="", v_format=""))
    # Nobody's any more, and not given back.
    harness.pool._reservations.remove(held)
    while harness.patience == 0:
        harness.turn()
    with pytest.raises(Internal):
        harness.turn(close(2))
    harness.pool._reservations.add(held)
    harness.pool.free(held)


def test_closing_frees_before_the_next_step(harness: Harness) -> None:
    harness.turn(admit(1, 5, 0, max_tokens=100), admit(2, 5, 0, max_tokens=100))
    harness.turn(close(1))
    assert harness.runner.steps[-1] == [(2, 1)]
    harness.turn(close(2))
    assert harness.pool.used_tokens == 0
    assert harness.turn(close(2)) == []


def test_emitted_tokens_are_computed_again_and_counted(harness: Harness) -> None:
    produced = outputs(harness.turn(admit(1, 5, 0, emitted=2)))
    while harness.patience == 0:
        produced += outputs(harness.turn())
    assert harness.runner.steps[0] == [(1, 7)]
    assert [token for output in produced for token in output.tokens.token_ids] == [17, 18]
    assert produced[-1].finished.usage.completion_tokens == 4


def test_a_long_prompt_is_announced_with_its_first_piece(harness: Harness) -> None:
    first = outputs(harness.turn(admit(1, 100, 0)))
    assert [output.HasField("started") for output in first] == [True]
    assert not first[0].HasField("tokens")
    second = outputs(harness.turn())
    assert not second[0].HasField("started")
    assert list(second[0].tokens.token_ids) == [110]


@pytest.mark.parametrize("overcommit", [False, True])
def test_a_request_takes_as_much_memory_as_a_router_counts(overcommit: bool) -> None:
    limits = WorkerLimits(2000, 3, 0, 2000, overcommit=overcommit)
    for prompt, max_tokens, emitted in ((1, 31, 0), (32, 2, 0), (70, 300, 0), (70, 300, 57), (70, 300, 58)):
        harness = Harness(overcommit=overcommit)
        harness.turn(admit(1, prompt, 0, max_tokens=max_tokens, emitted=emitted))
        demand = Demand(prompt, max_tokens, emitted_tokens=emitted)
        assert harness.pool.used_tokens == demand.kv_tokens(limits)


def test_load_is_reported_when_it_changes(harness: Harness) -> None:
    harness.turn(admit(1, 70, 64))
    (load,) = [event.load for event in harness.events if event.HasField("load")]
    assert (load.running, load.waiting) == (0, 1)
    assert load.kv_used_tokens == harness.pool.used_tokens > 0
    assert load.kv_free_tokens == harness.pool.capacity_tokens - load.kv_used_tokens
    harness.turn()
    assert harness.events == []
    harness.turn(close(1))
    (load,) = [event.load for event in harness.events if event.HasField("load")]
    assert (load.running, load.waiting, load.kv_used_tokens) == (0, 0, 0)


def test_a_step_that_fails_ends_its_own_streams_and_no_other() -> None:
    harness = Harness()
    harness.admit(1)  # waits for its KV, so it takes no part in the step
    harness.runner.fails = True
    events = harness.turn(admit(2, prompt=20, packed=0))
    detail = harness.failure(events)
    assert detail.code == "internal"
    assert "device" not in detail.message
    harness.runner.fails = False
    events = harness.turn(admit(3, prompt=20, packed=0, max_tokens=1))
    assert events[-1].step.outputs[0].finished.reason == common_pb2.FINISH_REASON_LENGTH
    assert harness.pool.used_tokens > 0  # stream 1 still holds its pages


def test_an_engine_that_only_fails_leaves() -> None:
    harness = Harness()
    harness.runner.fails = True
    with pytest.raises(RuntimeError, match="the device said no"):
        for stream in range(100):
            harness.turn(admit(stream, prompt=20, packed=0))


def test_a_step_ahead_gives_the_same_tokens_and_ends() -> None:
    said: list[list[tuple[int, int]]] = []
    for overlap in (False, True):
        harness = Harness(max_running=8, overlap=overlap)
        produced = outputs(
            harness.turn(*(admit(stream, 5 + 20 * stream, 0, max_tokens=3 + stream) for stream in range(6)))
        )
        while harness.patience == 0:
            produced += outputs(harness.turn())
        harness.pool.check_integrity()
        assert harness.pool.used_tokens == 0
        assert sum(output.HasField("finished") for output in produced) == 6
        said.append(sorted((output.stream, token) for output in produced for token in output.tokens.token_ids))
    assert said[0] == said[1]
    assert len(said[0]) == sum(3 + stream for stream in range(6))


def test_a_step_ahead_throws_away_what_follows_the_end() -> None:
    harness = Harness(overlap=True)
    # The third token is the stop token: by the time the host knows, the device has begun with a fourth.
    produced = outputs(harness.turn(admit(1, 5, 0, max_tokens=10, stop_token=17)))
    while harness.patience == 0:
        produced += outputs(harness.turn())
    assert [token for output in produced for token in output.tokens.token_ids] == [15, 16]
    assert produced[-1].finished.stop_token_id == 17
    assert harness.runner.steps == [[(1, 5)], [(1, 1)], [(1, 1)], [(1, 1)]]
    assert harness.pool.used_tokens == 0


def test_a_step_ahead_takes_from_token_to_token_whatever_the_host_did_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harness, drawn = Harness(overlap=True), NextNumberStep.drawn

    def after_a_wait(step: NextNumberStep) -> DrawnTokens:
        harness.now += 0.003  # what is left of the step
        return drawn(step)

    monkeypatch.setattr(NextNumberStep, "drawn", after_a_wait)

    def step_seconds(stream: int) -> list[float]:
        seconds = []
        harness.turn(admit(stream, 5, 0, max_tokens=400))
        for _ in range(100):
            harness.now += 0.002  # KV that arrives
            harness.turn()
            seconds += [event.load.step_seconds for event in harness.events if event.HasField("load")]
        harness.turn(close(stream))
        harness.turn()
        return seconds

    assert step_seconds(1)[-1] == pytest.approx(0.005, rel=0.01)
    harness.now += 60  # A pause is no step.
    assert step_seconds(2)[-1] == pytest.approx(0.005, rel=0.01)


def test_slots_are_given_back_when_what_was_in_them_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    harness, log = Harness(), []
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    monkeypatch.setattr(harness.intake, "settle", lambda: log.append("settled"))
    monkeypatch.setattr(
        harness.engine, "_emit", lambda *events: log.extend(str(event.WhichOneof("event")) for event in events)
    )
    harness.engine.turn([block(9, 0, 0, ROLES[0], 0, 2)])
    assert log.index("settled") < log.index("landed")


def test_pages_change_hands_only_when_no_step_uses_them() -> None:
    harness = Harness(overlap=True)
    harness.turn(admit(1, 5, 0, max_tokens=100))
    harness.turn()
    harness.turn(close(1))
    # The step that was ahead when the stream was closed is over now, and nothing else ran.
    assert harness.pool.used_tokens == 0
    assert harness.turn() == []
    assert harness.patience is None
    steps = len(harness.runner.steps)
    harness.turn(admit(2, 5, 0, max_tokens=100))
    harness.engine._receive(close(2))
    assert harness.pool.used_tokens > 0  # the device may still write there
    harness.turn()
    assert harness.pool.used_tokens == 0
    assert len(harness.runner.steps) == steps + 1


def test_pages_are_free_only_when_the_device_has_let_go_of_them_though_a_step_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harness = Harness(overlap=True)
    log: list[str] = []
    harness.turn(admit(1, 5, 0, max_tokens=100))
    drawn, free = NextNumberStep.drawn, harness.pool.free

    def waited(step: NextNumberStep) -> DrawnTokens:
        log.append("drawn")
        return drawn(step)

    def freed(pages: Reservation) -> None:
        log.append("free")
        free(pages)

    monkeypatch.setattr(NextNumberStep, "drawn", waited)
    monkeypatch.setattr(harness.pool, "free", freed)
    harness.runner.fails = True
    harness.turn()
    assert log == ["drawn", "free"]


def test_a_failure_ends_everyone_in_the_steps_under_way() -> None:
    harness = Harness(overlap=True)
    harness.turn(admit(1, 5, 0, max_tokens=100))
    harness.runner.fails = True
    events = harness.turn(admit(2, 5, 0, max_tokens=100))
    assert {event.failed.stream for event in events if event.HasField("failed")} == {1, 2}
    assert harness.pool.used_tokens == 0
    harness.pool.check_integrity()


@pytest.mark.parametrize("overlap", [False, True])
def test_the_youngest_begins_again_when_overcommitted_memory_runs_out(overlap: bool) -> None:
    harness = Harness(capacity=320, max_running=9, overlap=overlap, overcommit=True)
    lengths = {stream: 210 - stream for stream in range(1, 7)}
    produced: dict[int, list[int]] = {stream: [] for stream in lengths}
    emit = harness.engine._emit

    def note(*events: pb.DecodeEngineEvent) -> None:
        for output in outputs(list(events)):
            produced[output.stream] += output.tokens.token_ids
        emit(*events)

    harness.engine._emit = note
    for stream, length in lengths.items():
        nonce = harness.admit(stream, max_tokens=length)
        harness.turn(attach(10 + stream, nonce))
        harness.fill(10 + stream)
        harness.turn(end_push(10 + stream))
    packed = {number: each.sequence.pages.packed_k for number, each in harness.engine._streams.items()}
    preempted: set[int] = set()
    free = harness.pool.capacity_tokens
    steps_before = harness.runner.steps.copy()
    while harness.patience == 0:
        harness.turn()
        free = next((event.load.kv_free_tokens for event in reversed(harness.events) if event.HasField("load")), free)
        harness.pool.check_integrity()
        running = {sequence.stream for sequence in harness.engine._scheduler}
        for number in harness.engine._streams.keys() - running:
            if not preempted:
                assert free == 0
                assert harness.failure(harness.turn(admit(9, 70, 64))).code == "resource_exhausted"
            preempted.add(number)
            # Its packed prompt stays where it was.
            assert torch.equal(harness.engine._streams[number].sequence.pages.packed_k, packed[number])
    assert 6 in preempted
    assert 1 not in preempted
    # Nothing twice, nothing left out.
    assert produced == {stream: list(range(80, 80 + length)) for stream, length in lengths.items()}
    assert harness.pool.used_tokens == 0
    replayed = {stream for step in harness.runner.steps[len(steps_before) :] for stream, count in step if count > 1}
    assert replayed == preempted
    assert harness.engine._commitment.pauses >= len(preempted)


def test_low_priorities_make_room_first_and_come_back_last() -> None:
    harness = Harness(capacity=320, max_running=9, overcommit=True)
    priorities = {1: 0, 2: 1, 3: 0, 4: 1, 5: 1, 6: 2}
    for stream, priority in priorities.items():
        nonce = harness.admit(stream, max_tokens=200, priority=priority)
        harness.turn(attach(10 + stream, nonce))
        harness.fill(10 + stream)
        harness.turn(end_push(10 + stream))
    paused: list[int] = []
    resumed: list[int] = []
    while harness.patience == 0:
        harness.turn()
        out = harness.engine._streams.keys() - {sequence.stream for sequence in harness.engine._scheduler}
        paused += [stream for stream in out if stream not in paused]
        resumed += [stream for stream in paused if stream not in out and stream not in resumed]
    assert paused[0] == 3
    assert 6 not in paused
    levels = [priorities[stream] for stream in paused]
    assert levels == sorted(levels)
    assert [priorities[stream] for stream in resumed] == sorted((priorities[s] for s in resumed), reverse=True)
    assert harness.pool.used_tokens == 0


def test_overcommitted_memory_is_promised_only_as_far_as_each_could_finish() -> None:
    harness = Harness(capacity=320, overcommit=True)
    # Three extents: packed pages of the first take one, and its output may come to fill the other two.
    harness.admit(1, max_tokens=1000)
    assert harness.pool.can_reserve(harness.engine._streams[1].sequence.pages.need, (), 1)
    # There are pages for this one now, but then the first could never finish.
    error = harness.failure(harness.turn(admit(2, 70 + 62 * 32, 64 * 32)))
    assert error.code == "resource_exhausted"
    harness.admit(3)
    harness.turn(close(1), close(3))
    harness.admit(2, 70 + 62 * 32, 64 * 32)
