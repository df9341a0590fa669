"""The sampler: the right distribution, the same tokens for the same seed, rows that do not see each other."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as t

from hma_serve.core.request import SamplingParams, StopConditions
from hma_serve.decode.pages import Reservation
from hma_serve.decode.sampler import Drawn, adjust, probabilities, sample, uniform
from hma_serve.decode.sampling_batch import SamplingBatches
from hma_serve.decode.sequence import Sequence

VOCAB = 50


@dataclass(frozen=True)
class Draw:
    params: SamplingParams
    seed: int
    position: int
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    min_tokens: int = 0

    def sequence(self, stream: int) -> Sequence:
        output = self.output or (VOCAB - 1,) * self.position
        return Sequence(
            stream=stream,
            pages=cast(Reservation, None),
            prompt_tokens=len(self.prompt),
            tokens=[*self.prompt, *output],
            computed=0,
            sampling=self.params,
            seed=self.seed,
            stop=StopConditions(min_tokens=self.min_tokens),
            eos=frozenset({7, 9}),
            max_tokens=10**6,
            vocab=VOCAB,
        )


def draw(position: int = 0, seed: int = 1, **params: Any) -> Draw:
    return Draw(SamplingParams(**params), seed, position)


def sampled(logits: torch.Tensor, draws: list[Draw]) -> Drawn:
    sequences = [each.sequence(stream) for stream, each in enumerate(draws)]
    batches = SamplingBatches(logits.shape[1], len(draws))
    return sample(logits.clone(), batches.rows(sequences), batches.inputs(sequences), batches.occurrences)


def tokens(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    drawn: list[int] = sampled(logits, draws).tokens.tolist()
    return drawn


def frequencies(row: torch.Tensor, count: int, **params: Any) -> dict[int, float]:
    drawn = tokens(row.repeat(count, 1), [draw(0, seed, **params) for seed in range(count)])
    return {token: number / count for token, number in Counter(drawn).items()}


def test_zero_temperature_takes_the_likeliest() -> None:
    logits = torch.randn(8, VOCAB)
    assert tokens(logits, [draw(temperature=0.0)] * 8) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_distribution(temperature: float) -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    seen = frequencies(row, 20_000, temperature=temperature)
    for token, wanted in enumerate((row / temperature).softmax(-1).tolist()):
        assert seen.get(token, 0.0) == pytest.approx(wanted, abs=0.015)


def test_top_k_keeps_the_k_likeliest_in_proportion() -> None:
    row = torch.tensor([0.0, 3.0, 1.0, 2.5, -2.0])
    seen = frequencies(row, 10_000, top_k=2)
    share = row[[1, 3]].softmax(-1)
    assert set(seen) == {1, 3}
    assert seen[1] == pytest.approx(float(share[0]), abs=0.02)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    row = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(frequencies(row, 3000, top_p=0.79)) == {0, 1}
    assert set(frequencies(row, 3000, top_p=0.81)) == {0, 1, 2}
    assert set(frequencies(row, 3000, top_p=0.01)) == {0}


def test_min_p_drops_what_is_far_below_the_likeliest() -> None:
    row = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(frequencies(row, 3000, min_p=0.29)) == {0, 1, 2}
    assert set(frequencies(row, 3000, min_p=0.31)) == {0, 1}


def test_top_p_counts_what_top_k_left() -> None:
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two likeliest, the first has 4/7: it reaches 0.55 alone, which it would not among all four.
    assert set(frequencies(row, 3000, top_k=2, top_p=0.55)) == {0}
    assert set(frequencies(row, 3000, top_p=0.55)) == {0, 1}


mixtures = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 5.0]),
        "top_k": st.sampled_from([0, 1, 5]),
        "top_p": st.sampled_from([0.2, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(mixtures, st.integers(0, 2**64 - 1), st.integers(0, 1000)), min_size=1, max_size=8))
def test_a_row_draws_the_same_alone_and_in_any_batch(rows: list[tuple[dict[str, float], int, int]]) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(5))
    draws = [
        Draw(SamplingParams(**params), seed, position, prompt=(1, 2, 3))  # type: ignore[arg-type]
        for params, seed, position in rows
    ]
    together = tokens(logits, draws)
    alone = [tokens(logits[row : row + 1], draws[row : row + 1])[0] for row in range(len(rows))]
    assert together == alone


def test_seed_and_position_decide_the_number() -> None:
    assert uniform(3, 4) == uniform(3, 4)
    numbers = {uniform(seed, position) for seed in range(40) for position in range(40)}
    assert len(numbers) == 1600
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.02)


def test_extreme_temperatures_stay_finite() -> None:
    row = torch.tensor([[1.0, 5.0, -3.0, 4.9]])
    assert tokens(row, [draw(temperature=1e-300)]) == [1]
    assert tokens(row, [draw(temperature=1e-300, top_p=0.5)]) == [1]
    assert 0 <= tokens(row, [draw(temperature=100.0)])[0] < 4


def test_banned_tokens_are_never_drawn() -> None:
    row = torch.zeros(VOCAB)
    row[7] = 50.0
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature)
        drawn = tokens(row.repeat(200, 1), [Draw(params, seed, 0, min_tokens=1) for seed in range(200)])
        assert not {7, 9} & set(drawn)


def test_bias_and_penalties_move_the_choice() -> None:
    row = torch.tensor([[1.0, 0.9, -0.5, -0.6]])
    assert tokens(row, [draw(temperature=0.0, logit_bias={3: 5.0})]) == [3]
    repeated = Draw(SamplingParams(temperature=0.0, repetition_penalty=1.5), 0, 0, prompt=(0,))
    assert tokens(row, [repeated]) == [1]
    negative = torch.tensor([[-1.0, -1.2, -9.0]])
    assert tokens(negative, [repeated]) == [1]
    present = Draw(SamplingParams(temperature=0.0, presence_penalty=0.2), 0, 2, output=(0, 0))
    assert tokens(row, [present]) == [1]
    frequent = Draw(SamplingParams(temperature=0.0, frequency_penalty=0.04), 0, 3, output=(0, 0, 0, 2))
    assert tokens(row, [frequent]) == [1]
    assert tokens(row, [Draw(frequent.params, 0, 1, output=(0,))]) == [0]


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(3, VOCAB)
    logits[0, 7] = 9.0
    wanted = logits.log_softmax(-1)
    with_top = Draw(SamplingParams(temperature=0.0, logprobs=3), 0, 0, min_tokens=1)
    drawn = sampled(logits, [with_top, draw(temperature=0.0), draw(temperature=0.0, logprobs=0)])
    assert drawn.chosen is not None
    assert drawn.top_tokens is not None
    first, _, third = drawn.tokens.tolist()
    assert first != 7
    assert drawn.chosen.tolist() == pytest.approx([float(wanted[0, first]), float(wanted[2, third])], abs=1e-5)
    assert drawn.top_tokens[0].tolist() == wanted[0].topk(3).indices.tolist()
    assert int(drawn.top_tokens[0, 0]) == 7


def test_what_is_drawn_is_counted_in_the_step() -> None:
    """A device that runs ahead must not ask the host what it has just drawn."""
    sequence = Draw(SamplingParams(temperature=0.0, presence_penalty=1.0), 0, 0, prompt=(3,)).sequence(1)
    batches = SamplingBatches(4, 1)
    row = torch.tensor([[1.0, 0.5, 0.2, -5.0]])
    said: list[int] = []
    for _ in range(3):
        rows, inputs = batches.rows([sequence]), batches.inputs([sequence])
        said += sample(row.clone(), rows, inputs, batches.occurrences).tokens.tolist()
    assert said == [0, 1, 2]
    # Another sequence takes the slot and begins afresh.
    batches.leave(sequence)
    again = Draw(SamplingParams(temperature=0.0, presence_penalty=1.0), 0, 0).sequence(2)
    assert sample(row.clone(), batches.rows([again]), batches.inputs([again]), batches.occurrences).tokens.tolist() == [
        0
    ]


PROCESSORS: list[tuple[dict[str, float], Callable[[], list[Any]]]] = [
    ({"temperature": 0.7}, lambda: [t.TemperatureLogitsWarper(0.7)]),
    ({"top_k": 7}, lambda: [t.TopKLogitsWarper(7)]),
    ({"top_p": 0.8}, lambda: [t.TopPLogitsWarper(0.8)]),
    ({"min_p": 0.05}, lambda: [t.MinPLogitsWarper(0.05)]),
    (
        {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        lambda: [
            t.TemperatureLogitsWarper(1.4),
            t.TopKLogitsWarper(20),
            t.TopPLogitsWarper(0.9),
            t.MinPLogitsWarper(0.02),
        ],
    ),
    ({"repetition_penalty": 1.3}, lambda: [t.RepetitionPenaltyLogitsProcessor(1.3)]),
    (
        {"repetition_penalty": 0.8, "temperature": 0.6, "top_p": 0.7},
        lambda: [
            t.RepetitionPenaltyLogitsProcessor(0.8),
            t.TemperatureLogitsWarper(0.6),
            t.TopPLogitsWarper(0.7),
        ],
    ),
]


@pytest.mark.parametrize(("params", "processors"), PROCESSORS)
def test_probabilities_equal_those_of_transformers(
    params: dict[str, float], processors: Callable[[], list[Any]]
) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(16, VOCAB, generator=generator)
    prompts = torch.randint(0, VOCAB, (16, 12), generator=generator)
    theirs = logits.clone()
    for processor in processors():
        theirs = processor(prompts, theirs)
    draws = [
        Draw(SamplingParams(**params), 0, 0, prompt=tuple(row[:5]), output=tuple(row[5:]))  # type: ignore[arg-type]
        for row in prompts.tolist()
    ]
    sequences = [each.sequence(stream) for stream, each in enumerate(draws)]
    batches = SamplingBatches(VOCAB, 16)
    rows, mine = batches.rows(sequences), logits.clone()
    adjust(mine, rows, batches.inputs(sequences), batches.occurrences)
    weights = probabilities(mine, rows)
    expected = theirs.double().softmax(-1)
    assert torch.equal(weights > 0, expected > 0)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected, rtol=1e-5, atol=1e-9)
