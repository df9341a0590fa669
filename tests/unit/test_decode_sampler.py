"""The sampler: the right distribution, the same tokens for the same seed, rows that do not see each other."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hma_serve.core.request import SamplingParams
from hma_serve.decode.sampler import Draw, sample, uniform

VOCAB = 50


def draw(position: int = 0, seed: int = 1, **params: Any) -> Draw:
    return Draw(SamplingParams(**params), seed, position)


def tokens(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    return [drawn.token for drawn in sample(logits.clone(), draws)]


def frequencies(row: torch.Tensor, count: int, **params: Any) -> dict[int, float]:
    drawn = tokens(row.repeat(count, 1), [draw(position, **params) for position in range(count)])
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
        drawn = tokens(row.repeat(200, 1), [Draw(params, 1, position, banned=(7, 9)) for position in range(200)])
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
    logits = torch.randn(2, VOCAB)
    wanted = logits.log_softmax(-1)
    banned = int(logits[0].argmax())
    with_top = Draw(SamplingParams(temperature=0.0, logprobs=3), 0, 0, banned=(banned,))
    first, second = sample(logits.clone(), [with_top, draw(temperature=0.0)])
    assert second.logprobs is None
    assert first.logprobs is not None
    assert first.token != banned
    assert first.logprobs.chosen == pytest.approx(float(wanted[0, first.token]), abs=1e-5)
    assert [token for token, _ in first.logprobs.top] == wanted[0].topk(3).indices.tolist()
    assert first.logprobs.top[0][0] == banned
