"""A decode step on the CPU: 16 streams of the demo model, packed prompt KV against decoded and against transformers.

All three begin with a cache of the same length, so that no prompt is computed. Keys and values are random: what they
say does not matter to the time. Ours is the whole engine (messages, schedule, sampling), all sides in BF16 on as many
threads as a decode worker takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch

from bench.figures import SEED, Figure, figure, interleave, ratios
from hma_serve.checkpoint import read_model_config, resolve_checkpoint
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.attention import TorchPagedAttention
from hma_serve.decode.commitment import FullCommitment
from hma_serve.decode.engine import Engine, EngineLimits
from hma_serve.decode.grammar import GrammarCompiler, GrammarQueue
from hma_serve.decode.intake import FusedIntake, MaterialisedIntake
from hma_serve.decode.pages import KvGeometry, PagePool
from hma_serve.decode.runner import TorchStepRunner
from hma_serve.decode.sampling_batch import SamplingBatches
from hma_serve.decode.scheduler import Scheduler
from hma_serve.decode.step_loop import StepLoop
from hma_serve.decode.tickets import TicketTable
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.ipc import Arena
from hma_serve.model import Attention, Transformer, open_weights
from hma_serve.quant import codec
from hma_serve.v1 import common_pb2, kv_block_pb2
from hma_serve.worker import default_threads

STREAMS, CONTEXTS, CODEC = 16, (256, 1500), "tt_bfp8_b"
STEPS, REPEATS = 12, 5
_PAIRING = kv_block_pb2.KV_ROPE_PAIRING_HALF_SPLIT


class TimedTransformer(Transformer):
    """Knows how long it took."""

    seconds = 0.0

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        began = time.perf_counter()
        hidden = super().forward(token_ids, positions, attention)
        self.seconds += time.perf_counter() - began
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        logits = super().logits(hidden)
        self.seconds += time.perf_counter() - began
        return logits


class Batch:
    """An engine with its streams, past their prompts."""

    def __init__(self, context: int, kv_mode: str, arena: Arena) -> None:
        checkpoint = resolve_checkpoint("demo")
        self._config = read_model_config(checkpoint)
        self._arena = arena
        with open_weights(checkpoint, self._config, dtype=torch.bfloat16) as weights:
            self._model = TimedTransformer(self._config, weights)
        geometry = KvGeometry(self._config.num_layers, self._config.num_kv_heads, self._config.head_dim)
        room = context + STEPS * (REPEATS + 2) + 64
        pool = PagePool(
            geometry, packed_formats=[CODEC], plain_dtype=torch.bfloat16, capacity_tokens=STREAMS * (room + 64)
        )
        scheduler = Scheduler(STREAMS * GROUP_TOKENS)
        runner = TorchStepRunner(self._model, pool, TorchPagedAttention(pool, self._config.num_heads))
        self._events: list[pb.DecodeEngineEvent] = []
        self._engine = Engine(
            pool=pool,
            intake=FusedIntake(pool) if kv_mode == "fused" else MaterialisedIntake(pool),
            commitment=FullCommitment(pool, scheduler),
            tickets=TicketTable(lease=3600.0, clock=time.monotonic),
            scheduler=scheduler,
            steps=StepLoop(scheduler, runner, SamplingBatches(self._config.vocab_size, STREAMS)),
            grammars=GrammarQueue(GrammarCompiler(checkpoint, self._config.vocab_size, []), 1),
            limits=EngineLimits(STREAMS, frozenset(), self._config.vocab_size),
            arena=arena,
            emit=lambda *events: self._events.extend(events),
        )
        for stream in range(1, STREAMS + 1):
            self._fill(stream, context, room - context)
        # Nobody begins before all can.
        self._events.clear()
        self._engine.turn(pb.DecodeEngineCommand(end_push=pb.DecodeEndPush(push=n)) for n in range(1, STREAMS + 1))
        self._turn()

    def rate(self) -> float:
        """Tokens per second of the next steps."""
        began = time.perf_counter()
        tokens = sum(self._turn() for _ in range(STEPS))
        assert tokens == STEPS * STREAMS
        return tokens / (time.perf_counter() - began)

    def overhead(self) -> float:
        """Part of the next steps that is not the model."""
        self._model.seconds = 0.0
        began = time.perf_counter()
        for _ in range(STEPS):
            self._turn()
        return 1 - self._model.seconds / (time.perf_counter() - began)

    def _fill(self, stream: int, context: int, new: int) -> None:
        """Admits a stream and brings its packed KV."""
        packed = context // GROUP_TOKENS * GROUP_TOKENS
        prompt = torch.randint(self._config.vocab_size, (context + 1,)).tolist()
        admit = pb.DecodeAdmit(
            stream=stream,
            epoch=1,
            prompt_token_ids=prompt,
            packed_tokens=packed,
            k_codec=CODEC,
            v_codec=CODEC,
            rope_pairing=_PAIRING,
            sampling=common_pb2.SamplingParams(temperature=0.0),
            stop=common_pb2.StopConditions(max_tokens=new, ignore_eos=True),
        )
        self._turn(admit=admit)
        nonce = next(event.admitted.nonce for event in self._events if event.HasField("admitted"))
        self._turn(
            attach=pb.DecodeAttach(
                push=stream,
                nonce=nonce,
                epoch=1,
                k_codec=CODEC,
                v_codec=CODEC,
                token_count=packed,
                rope_pairing=_PAIRING,
            )
        )
        heads, head_dim = self._config.num_kv_heads, self._config.head_dim
        for layer in range(self._config.num_layers):
            for role in (kv_block_pb2.KV_ROLE_K, kv_block_pb2.KV_ROLE_V):
                data = codec(CODEC).encode(torch.randn(heads, packed, head_dim)).numpy().tobytes()
                self._arena.slot(0, len(data))[:] = data
                block = pb.DecodeBlock(
                    push=stream,
                    slot=0,
                    length=len(data),
                    layer=layer,
                    role=role,
                    head_count=heads,
                    group_count=packed // GROUP_TOKENS,
                )
                self._turn(block=block)

    def _turn(self, **command: Any) -> int:
        """One turn; the tokens that came of it."""
        self._events.clear()
        self._engine.turn([pb.DecodeEngineCommand(**command)] if command else [])
        for event in self._events:
            assert event.WhichOneof("event") not in ("failed", "push_failed"), event
        return sum(len(output.tokens.token_ids) for event in self._events for output in event.step.outputs)


def reference(context: int) -> Iterator[float]:
    """Tokens per second of transformers' batched greedy `generate` behind a cache of this length."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(resolve_checkpoint("demo"), dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    config = model.config
    ids = torch.randint(config.vocab_size, (STREAMS, context + 1))
    shape = (STREAMS, config.num_key_value_heads, context, config.head_dim)
    kv = [[torch.randn(shape).bfloat16() for _ in range(2)] for _ in range(config.num_hidden_layers)]
    while True:
        cache = transformers.DynamicCache()
        for layer, (k, v) in enumerate(kv):
            cache.update(k, v, layer)
        began = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
        )
        assert out.shape[1] == context + 1 + STEPS
        yield STREAMS * STEPS / (time.perf_counter() - began)


def measure(context: int, arena: Arena) -> list[Figure]:
    """All figures of one context."""
    packed, decoded = Batch(context, "fused", arena), Batch(context, "materialise", arena)
    theirs = reference(context)
    runs: tuple[Callable[[], float], ...] = (packed.rate, decoded.rate, lambda: next(theirs))
    ours_packed, ours_decoded, references = interleave(REPEATS, *runs)
    name = f"context {context:,}"
    return [
        figure(f"{name}: transformers generate", references, "tok/s"),
        figure(f"{name}: materialised", ours_decoded, "tok/s"),
        figure(f"{name}: packed ({CODEC})", ours_packed, "tok/s"),
        figure(f"{name}: materialised / transformers", ratios(ours_decoded, references), "x", "at least 1.0"),
        figure(f"{name}: packed / transformers", ratios(ours_packed, references), "x"),
        figure(f"{name}: packed / materialised", ratios(ours_packed, ours_decoded), "x"),
        figure(f"{name}: step outside the model", [100 * decoded.overhead()], "%", "at most 15"),
    ]


def run() -> list[Figure]:
    """Measures every context."""
    torch.manual_seed(SEED)
    torch.set_num_threads(default_threads())
    with ExitStack() as stack:
        arena = stack.enter_context(Arena.create(1, 1 << 20))
        return [each for context in CONTEXTS for each in measure(context, arena)]
