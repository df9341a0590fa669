"""A decode engine whose device counts, with its messages in hand, and the messages that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from hma_serve.checkpoint import resolve_checkpoint
from hma_serve.decode.commitment import FullCommitment, OverCommitment
from hma_serve.decode.engine import Engine, EngineLimits
from hma_serve.decode.grammar import GrammarCompiler, GrammarQueue
from hma_serve.decode.intake import FusedIntake
from hma_serve.decode.pages import KvGeometry, PagePool
from hma_serve.decode.runner import DrawnTokens, Step
from hma_serve.decode.sampler import Inputs, Occurrences, Rows, sample
from hma_serve.decode.sampling_batch import SamplingBatches
from hma_serve.decode.scheduler import Scheduler, Share
from hma_serve.decode.step_loop import StepLoop
from hma_serve.decode.tickets import TicketTable
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.ipc import Arena
from hma_serve.quant import codec
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
