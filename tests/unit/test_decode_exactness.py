"""The engine with the demo model in this process: every option against transformers, and one stream against many.

In fp32 the tokens must be transformers' own. Where arithmetic may differ, in BF16 between a batch of one and one of 32,
they may part only where the two likeliest tokens were nearly equally likely; how often that happens is printed.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hma_serve.checkpoint import read_eos_token_ids, resolve_checkpoint
from hma_serve.core.request import SamplingParams, StopConditions
from hma_serve.v1.common_pb2 import FINISH_REASON_STOP
from support.local_engine import Ask, Told, local_engine

NEW_TOKENS = 12
EDGES = (1, 31, 32, 33, 64, 65)
LONGEST = 200
STREAMS = 32
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 40, "min_p": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"temperature": 1.0, "logit_bias": {300: 2.0}},
]
# Logits between 16 and 32 lie an eighth apart in BF16: two that are one step apart may change places.
GAP_TOLERANCE = 0.125


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More would only wait for one another: the model is small, and other tests run beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return resolve_checkpoint("demo")


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    sample = (Path(__file__).parents[1] / "golden" / "text" / "sample.txt").read_text()
    ids: list[int] = tokenizer(sample, add_special_tokens=False)["input_ids"]
    return ids


def cut(text: list[int], count: int) -> list[tuple[int, ...]]:
    """The first of an endless row of prompts."""
    draw, prompts = random.Random(3), []
    for number in range(count):
        length = EDGES[number] if number < len(EDGES) else draw.randrange(2, LONGEST)
        start = draw.randrange(len(text) - length)
        prompts.append(tuple(text[start : start + length]))
    return prompts


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, **options)


BANNED = range(200, 1200)
Options = tuple[SamplingParams, dict[str, Any], dict[str, Any]]
# Ours, how ours ends, and what transformers calls the same. It has no presence and frequency penalties.
OPTIONS: list[Options] = [
    (greedy(), {}, {}),
    (greedy(repetition_penalty=1.3), {}, {"repetition_penalty": 1.3}),
    (greedy(repetition_penalty=0.8), {}, {"repetition_penalty": 0.8}),
    (greedy(logit_bias={300: 4.0, 301: -2.5}), {}, {"sequence_bias": {(300,): 4.0, (301,): -2.5}}),
    (greedy(logit_bias=dict.fromkeys(BANNED, -100.0)), {}, {"suppress_tokens": list(BANNED)}),
    (greedy(), {"stops": True}, {}),
    (greedy(), {"stops": True, "min_tokens": 9}, {"min_new_tokens": 9}),
    (
        greedy(repetition_penalty=1.5, logit_bias=dict.fromkeys(BANNED, -100.0)),
        {"stops": True, "min_tokens": 4},
        {"repetition_penalty": 1.5, "suppress_tokens": list(BANNED), "min_new_tokens": 4},
    ),
    (SamplingParams(temperature=3.0, top_k=1, seed=5), {}, {"do_sample": True, "temperature": 3.0, "top_k": 1}),
    (SamplingParams(temperature=0.7, top_p=1e-6, seed=6), {}, {"do_sample": True, "temperature": 0.7, "top_p": 1e-6}),
]


def test_options_give_the_tokens_of_transformers(checkpoint: Path, text: list[int]) -> None:
    """Twenty prompts, each with two of the options, all in one batch over f32 pages."""
    frequent = [token for token, _ in Counter(text).most_common(40)]
    eos = list(read_eos_token_ids(checkpoint))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    asks: list[Ask] = []
    expected: list[list[int]] = []
    stopped: list[bool] = []
    for number, prompt in enumerate(cut(text, 20)):
        for sampling, ours, theirs in (OPTIONS[number % len(OPTIONS)], OPTIONS[(number + 3) % len(OPTIONS)]):
            stops = frequent if "stops" in ours else []
            stop = StopConditions(
                max_tokens=NEW_TOKENS,
                min_tokens=ours.get("min_tokens", 0),
                ignore_eos=not stops,
                stop_token_ids=tuple(stops),
            )
            asks.append(Ask(prompt, sampling, stop, packed=True))
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                eos_token_id=stops + eos if stops else None,
                **{"do_sample": False, **theirs},
            )[0, len(prompt) :].tolist()
            stopped.append(bool(stops) and out[-1] in stops + eos)
            expected.append(out[:-1] if stopped[-1] else out)
    with local_engine(checkpoint, torch.float32, len(asks)) as engine:
        told = engine.run(asks)
    assert [each.tokens for each in told] == expected
    reasons = [each.finished is not None and each.finished.reason == FINISH_REASON_STOP for each in told]
    assert reasons == stopped
    # Otherwise the options would not have been put to the test.
    assert any(stopped)
    assert len({tuple(tokens) for tokens in expected[: 2 * len(OPTIONS)]}) > len(OPTIONS)


def test_logprobs_are_those_of_transformers(checkpoint: Path, text: list[int]) -> None:
    """Of the model as it is, whatever the options make of it."""
    prompts = cut(text, 6)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    stop = StopConditions(max_tokens=4, ignore_eos=True)
    asks = [Ask(prompt, greedy(logprobs=5, repetition_penalty=1.3), stop, packed=True) for prompt in prompts]
    with local_engine(checkpoint, torch.float32) as engine:
        told = engine.run(asks)
    for prompt, each in zip(prompts, told, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *each.tokens]])).logits[0]
        known = logits[len(prompt) - 1 : -1].log_softmax(-1)
        assert [given.chosen.token_id for given in each.logprobs] == each.tokens
        chosen = [float(row[token]) for row, token in zip(known, each.tokens, strict=True)]
        assert [given.chosen.logprob for given in each.logprobs] == pytest.approx(chosen, abs=1e-3)
        best = known.topk(5)
        assert [[top.token_id for top in given.top] for given in each.logprobs] == best.indices.tolist()
        flat = [top.logprob for given in each.logprobs for top in given.top]
        assert flat == pytest.approx(best.values.flatten().tolist(), abs=1e-3)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_seed_gives_the_same_tokens_alone_and_among_32(checkpoint: Path, text: list[int], overlap: bool) -> None:
    prompts = cut(text, STREAMS)
    stop = StopConditions(max_tokens=NEW_TOKENS, ignore_eos=True)
    asks = [
        Ask(prompt, SamplingParams(seed=number % 7, **options), stop, packed=number % 2 == 0)
        for number, (prompt, options) in enumerate(zip(prompts, itertools.cycle(SAMPLED), strict=False))
    ]
    with local_engine(checkpoint, torch.float32, STREAMS, overlap=overlap) as engine:
        together = [each.tokens for each in engine.run(asks)]
        # One prompt of each kind alone, and the whole batch again in another order.
        for number in range(0, STREAMS, 5):
            assert engine.run([asks[number]])[0].tokens == together[number]
        assert [each.tokens for each in engine.run(asks[::-1])] == together[::-1]
    assert len({tuple(tokens) for tokens in together}) > STREAMS // 2


def test_bf16_tokens_of_one_and_of_32_part_only_at_near_ties(
    checkpoint: Path, text: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    stop = StopConditions(max_tokens=NEW_TOKENS, ignore_eos=True)
    asks = [Ask(prompt, greedy(logprobs=2), stop, packed=True) for prompt in cut(text, STREAMS)]
    with local_engine(checkpoint, torch.bfloat16, STREAMS) as engine:
        together = engine.run(asks)
        alone = [engine.run([ask])[0] for ask in asks]
    gaps = [gap for one, many in zip(alone, together, strict=True) if (gap := first_difference(one, many)) is not None]
    with capsys.disabled():
        print(
            f"\nBF16, batch of 1 against {STREAMS}: {len(gaps)} of {STREAMS} texts of {NEW_TOKENS} tokens part,"
            f" at gaps of {[round(gap, 3) for gap in gaps]} between the two likeliest tokens; tolerance {GAP_TOLERANCE}"
        )
    assert max(gaps, default=0.0) <= GAP_TOLERANCE
    assert len(gaps) < STREAMS // 4


def first_difference(reference: Told, other: Told) -> float | None:
    """How far apart the reference's likeliest two are, in logprobs, where the other first says something else."""
    for mine, theirs, given in zip(reference.tokens, other.tokens, reference.logprobs, strict=True):
        if mine != theirs:
            return float(given.top[0].logprob - given.top[1].logprob)
    return None
