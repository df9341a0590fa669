"""The engine's steps on a GPU against the same on the CPU: the demo model, prompts of every kind in one batch."""

import mmap
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import pytest
import torch

from hma_serve.checkpoint import read_model_config, resolve_checkpoint
from hma_serve.core.request import SamplingParams, StopConditions
from hma_serve.decode.engine_parts import EngineParts, EngineSpec, open_cpu
from hma_serve.decode.intake import Packed
from hma_serve.decode.page_order import Role
from hma_serve.decode.sampling_batch import SamplingBatches
from hma_serve.decode.scheduler import Scheduler, Share
from hma_serve.decode.sequence import Sequence
from hma_serve.decode.step_loop import StepLoop, Token
from hma_serve.prefill.profiles import find_profile
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT
from support.reference import reference_packed_kv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(600),
]

CHECKPOINT = resolve_checkpoint("demo")
CONFIG = read_model_config(CHECKPOINT)
TIE = 0.25
"""Where logprobs are as close as this, BF16 on another device may choose another token."""


SLOTS = {mode: mmap.mmap(-1, 1 << 21) for mode in ("fused", "materialise")}
"""Pinned as long as the process lives, so a range of addresses of its own for each."""

GREEDY = SamplingParams(temperature=0, logprobs=2)


@dataclass(frozen=True)
class Prompt:
    """A request.

    Attributes:
        profile: Of its packed part.
        packed: Tokens of that.
        rest: Tokens behind it, at least 1.
        sampling: How to draw.
    """

    profile: str
    packed: int
    rest: int
    sampling: SamplingParams = GREEDY

    @property
    def tokens(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.packed * 31 + self.rest)
        return torch.randint(3, CONFIG.vocab_size, (self.packed + self.rest,), generator=generator).tolist()


PROMPTS = [
    Prompt("tt_bfp8", 0, 45),
    Prompt("tt_bfp8", 64, 1),
    Prompt("tt_bfp8", 96, 31),
    Prompt("tt_bfp8", 512, 7),
    Prompt("int8", 128, 9),
    Prompt("nvfp4", 64, 2),
    Prompt("tt_bfp8", 32, 3, SamplingParams(temperature=0.7, top_k=20, seed=3, logprobs=2)),
    Prompt("tt_bfp8", 0, 12, SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=2)),
]


def spec(kv_mode: str) -> EngineSpec:
    codecs = {find_profile(each.profile).k_codec for each in PROMPTS} | {"bf16"}
    return EngineSpec(CHECKPOINT, CONFIG, torch.bfloat16, sorted(codecs), None, kv_mode, 8192, 2048, 16, 256)


def generate(parts: EngineParts, new: int) -> list[list[Token]]:
    """All prompts at once, the last two joining late; what was drawn for each."""
    scheduler = Scheduler(256)
    steps = StepLoop(
        scheduler, parts.runner, SamplingBatches(CONFIG.vocab_size, 16, parts.sampling), overlap=parts.overlap
    )
    sequences = [_sequence(parts, number, prompt, new) for number, prompt in enumerate(PROMPTS)]
    drawn: list[list[Token]] = [[] for _ in sequences]

    def take(shares: Items[Share], tokens: Items[Token]) -> None:
        for token in tokens:
            drawn[token.sequence.stream].append(token)
            if token.sequence.accept(token.token) is not None:
                steps.leave(token.sequence, lambda held=token.sequence: parts.pool.free(held.pages))  # type: ignore[misc]

    for sequence in sequences[:-2]:
        scheduler.join(sequence)
    for _ in range(3):
        steps.turn(take)
    for sequence in sequences[-2:]:
        scheduler.join(sequence)
    while len(scheduler) or not steps.idle:
        steps.turn(take)
    parts.pool.check_integrity()
    return drawn


def _sequence(parts: EngineParts, number: int, prompt: Prompt, new: int) -> Sequence:
    profile, tokens = find_profile(prompt.profile), prompt.tokens
    packed = Packed(profile.k_codec, profile.v_codec, KV_ROPE_PAIRING_HALF_SPLIT, prompt.packed)
    pages = parts.pool.reserve(parts.intake.need(packed, len(tokens) + new))
    if prompt.packed:
        k_places, v_places = parts.intake.placed(pages.packed_k), parts.intake.placed(pages.packed_v)
        for layer, (k, v) in enumerate(reference_packed_kv(CHECKPOINT, prompt.profile, tokens[: prompt.packed])):
            parts.intake.store(packed, Role.K, layer, k_places, slice(None), k)
            parts.intake.store(packed, Role.V, layer, v_places, slice(None), v)
            parts.intake.settle()
    return Sequence(
        stream=number,
        pages=pages,
        prompt_tokens=len(tokens),
        tokens=tokens,
        computed=prompt.packed,
        sampling=prompt.sampling,
        seed=prompt.sampling.seed or 0,
        stop=StopConditions(max_tokens=new, ignore_eos=True),
        eos=frozenset(),
        max_tokens=new,
        vocab=CONFIG.vocab_size,
    )


def gap(prompt: Prompt, ours: Token, theirs: Token) -> float:
    """How far, in logprob, from what BF16 on another device may change the token is at which a text parts.

    Greedy: between the likeliest two. Sampled: the uniform number fell beside a bound between two tokens' shares, which
    the likeliest two do not show; but texts that are the same up to there must have about the same distribution.
    """
    (best, second), (our_best, our_second) = ([each.logprob for each in token.top] for token in (theirs, ours))
    if prompt.sampling.temperature == 0:
        return best - second
    return max(abs(our_best - best), abs(our_second - second))


@pytest.mark.parametrize("kv_mode", SLOTS)
def test_tokens_are_those_of_the_cpu(kv_mode: str, record_property: Callable[[str, object], None]) -> None:
    from hma_serve.decode.cuda import open_cuda

    there = generate(open_cuda(spec(kv_mode), memoryview(SLOTS[kv_mode])), 48)
    here = generate(open_cpu(replace(spec(kv_mode), kv_mode="fused")), 48)
    gaps = []
    for number, (prompt, ours, theirs) in enumerate(zip(PROMPTS, there, here, strict=True)):
        assert len(ours) == len(theirs) == 48
        at = next((i for i in range(48) if ours[i].token != theirs[i].token), None)
        if at is not None:
            gaps.append((number, at, gap(prompt, ours[at], theirs[at])))
    record_property("mode", kv_mode)
    record_property("parted", len(gaps))
    record_property("widest_gap", max((each for *_, each in gaps), default=0.0))
    assert all(each <= TIE for *_, each in gaps), gaps
