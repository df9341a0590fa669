"""A decode engine with a real model in this process: prompts and options in, tokens out, by its messages alone."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hma_serve.checkpoint import read_eos_token_ids, read_model_config
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.request import SamplingParams, StopConditions
from hma_serve.decode.attention import TorchPagedAttention
from hma_serve.decode.commitment import FullCommitment
from hma_serve.decode.engine import Engine, EngineLimits
from hma_serve.decode.grammar import GrammarCompiler, GrammarQueue
from hma_serve.decode.intake import FusedIntake
from hma_serve.decode.pages import KvGeometry, PagePool
from hma_serve.decode.runner import TorchStepRunner
from hma_serve.decode.sampling_batch import SamplingBatches
from hma_serve.decode.scheduler import Scheduler
from hma_serve.decode.step_loop import StepLoop
from hma_serve.decode.tickets import TicketTable
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.ipc import Arena
from hma_serve.model import Transformer, open_weights
from hma_serve.v1 import common_pb2, decode_pb2, kv_block_pb2
from support.reference import reference_packed_kv

_ROLES = (kv_block_pb2.KV_ROLE_K, kv_block_pb2.KV_ROLE_V)
_PAIRING = kv_block_pb2.KV_ROPE_PAIRING_HALF_SPLIT
_SLOT_BYTES = 1 << 18
_SLOTS = 1024

_packed_kv = functools.cache(reference_packed_kv)


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: Token ids.
        sampling: How to draw.
        stop: When to end; with `max_tokens`.
        packed: Whole groups of the prompt come as f32 blocks, as from a prefill worker; else decode computes them.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop: StopConditions
    packed: bool = False

    @property
    def packed_tokens(self) -> int:
        """Tokens that come as blocks."""
        return (len(self.prompt) - 1) // GROUP_TOKENS * GROUP_TOKENS if self.packed else 0


@dataclass
class Told:
    """What came of a request.

    Attributes:
        tokens: Of its completion.
        logprobs: With every token, if asked for.
        finished: How it ended.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    finished: decode_pb2.DecodeFinished | None = None


class LocalEngine:
    """Runs requests to their end, all at once.

    Args:
        checkpoint: Directory.
        dtype: Of weights, activations and plain pages.
        arena: A slot for each block of a batch.
        streams: Requests at once.
        overlap: Steps begin before the last one's tokens are known.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype, arena: Arena, streams: int, *, overlap: bool) -> None:
        config = read_model_config(checkpoint)
        with open_weights(checkpoint, config, dtype=dtype) as weights:
            model = Transformer(config, weights)
        self._checkpoint = checkpoint
        self._kv_heads = config.num_kv_heads
        self._arena = arena
        self._pool = PagePool(
            KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim),
            packed_formats=["f32"],
            plain_dtype=dtype,
            capacity_tokens=streams * 400,
        )
        eos, scheduler = read_eos_token_ids(checkpoint), Scheduler(512)
        runner = TorchStepRunner(model, self._pool, TorchPagedAttention(self._pool, config.num_heads))
        self._events: list[pb.DecodeEngineEvent] = []
        self._numbers = itertools.count(1)
        self._slots = itertools.cycle(range(arena.slots))
        self._engine = Engine(
            pool=self._pool,
            intake=FusedIntake(self._pool),
            commitment=FullCommitment(self._pool, scheduler),
            tickets=TicketTable(lease=600.0, clock=time.monotonic),
            scheduler=scheduler,
            steps=StepLoop(scheduler, runner, SamplingBatches(config.vocab_size, streams), overlap=overlap),
            grammars=GrammarQueue(GrammarCompiler(checkpoint, config.vocab_size, eos), streams),
            limits=EngineLimits(streams, frozenset(eos), config.vocab_size),
            arena=arena,
            emit=lambda *events: self._events.extend(events),
        )

    def run(self, asks: Sequence[Ask]) -> list[Told]:
        """What each of them gets when all run together; afterwards no page is in use."""
        told = {next(self._numbers): Told() for _ in asks}
        nonces = self._turn(told, *map(_admit, told, asks))
        pushes = [self._push(number, ask, nonces[number]) for number, ask in zip(told, asks, strict=True)]
        self._turn(told, *itertools.chain.from_iterable(pushes))
        while any(each.finished is None for each in told.values()):
            self._turn(told)
        assert self._pool.used_tokens == 0
        return list(told.values())

    def _push(self, number: int, ask: Ask, nonce: bytes) -> list[pb.DecodeEngineCommand]:
        """A prompt's blocks, in slots of their own."""
        if not ask.packed_tokens:
            return []
        attach = pb.DecodeAttach(
            push=number,
            nonce=nonce,
            epoch=1,
            k_codec="f32",
            v_codec="f32",
            token_count=ask.packed_tokens,
            rope_pairing=_PAIRING,
        )
        commands = [pb.DecodeEngineCommand(attach=attach)]
        for layer, roles in enumerate(_packed_kv(self._checkpoint, "f32", ask.prompt[: ask.packed_tokens])):
            for role, units in zip(_ROLES, roles, strict=True):
                data, slot = units.numpy().tobytes(), next(self._slots)
                self._arena.slot(slot, len(data))[:] = data
                block = pb.DecodeBlock(
                    push=number,
                    slot=slot,
                    length=len(data),
                    layer=layer,
                    role=role,
                    head_count=self._kv_heads,
                    group_count=ask.packed_tokens // GROUP_TOKENS,
                )
                commands.append(pb.DecodeEngineCommand(block=block))
        return [*commands, pb.DecodeEngineCommand(end_push=pb.DecodeEndPush(push=number))]

    def _turn(self, told: dict[int, Told], *commands: pb.DecodeEngineCommand) -> dict[int, bytes]:
        """One turn; the tickets that it issued."""
        self._events.clear()
        self._engine.turn(commands)
        for event in self._events:
            assert event.WhichOneof("event") not in ("failed", "push_failed"), event
            for output in event.step.outputs:
                told[output.stream].tokens += output.tokens.token_ids
                told[output.stream].logprobs += output.tokens.logprobs
                if output.HasField("finished"):
                    told[output.stream].finished = output.finished
        return {e.admitted.stream: e.admitted.nonce for e in self._events if e.HasField("admitted")}


@contextlib.contextmanager
def local_engine(
    checkpoint: Path, dtype: torch.dtype, streams: int = 32, *, overlap: bool = False
) -> Iterator[LocalEngine]:
    """An engine that is gone afterwards."""
    with Arena.create(_SLOTS, _SLOT_BYTES) as arena:
        yield LocalEngine(checkpoint, dtype, arena, streams, overlap=overlap)


def _admit(number: int, ask: Ask) -> pb.DecodeEngineCommand:
    codec = "f32" if ask.packed_tokens else ""
    return pb.DecodeEngineCommand(
        admit=pb.DecodeAdmit(
            stream=number,
            epoch=1,
            prompt_token_ids=ask.prompt,
            packed_tokens=ask.packed_tokens,
            k_codec=codec,
            v_codec=codec,
            rope_pairing=_PAIRING,
            sampling=ask.sampling.to_proto(),
            stop=ask.stop.to_proto(),
        )
    )
