"""Cost models find the coefficients behind noisy measurements, and stay sane where these say little."""

from __future__ import annotations

import random

import pytest

from hma_serve.core.calibration import LinearFit, StepCalibration, TransferCalibration
from hma_serve.core.cost_model import StepCost, TransferCost, attended_pairs

PREFILL = StepCost(fixed=0.004, token=1e-4, pair=2e-8, step_tokens=512)
DECODE = StepCost(fixed=0.006, token=2e-4, context=3e-8, pair=1e-8, step_tokens=256)


def noise(draw: random.Random) -> float:
    return draw.uniform(0.97, 1.03)


def prefill(calibration: StepCalibration, truth: StepCost, draw: random.Random, chunks: int = 300) -> None:
    for _ in range(chunks):
        tokens, before = draw.choice([32, 64, 128, 256, 512]), draw.randrange(0, 16384, 512)
        seconds = truth.backlog(1, tokens, attended_pairs(tokens, before))
        calibration.note_chunk(tokens, before, seconds * noise(draw))


def test_prefill_chunks_give_the_time_of_any_prompt() -> None:
    calibration = StepCalibration(512)
    prefill(calibration, PREFILL, random.Random(1))
    for tokens in (32, 500, 4096, 16384):
        assert calibration.cost.prompt(tokens) == pytest.approx(PREFILL.prompt(tokens), rel=0.05)


def test_decode_steps_give_the_step_of_any_batch() -> None:
    draw = random.Random(2)
    calibration = StepCalibration(256)
    for _ in range(500):
        batch = draw.randrange(1, 64)
        context = batch * draw.randrange(100, 8000)
        calibration.note_batch(batch, context, 0.0, DECODE.batch(batch, context) * noise(draw))
    for batch, context in ((1, 200), (8, 30_000), (64, 400_000)):
        assert calibration.cost.batch(batch, context) == pytest.approx(DECODE.batch(batch, context), rel=0.05)


def test_a_worker_that_slows_down_is_believed_soon() -> None:
    draw = random.Random(3)
    calibration = StepCalibration(512, memory=50)
    prefill(calibration, PREFILL, draw)
    slow = StepCost(fixed=0.012, token=3e-4, pair=6e-8, step_tokens=512)
    prefill(calibration, slow, draw, chunks=150)
    assert calibration.cost.prompt(2048) == pytest.approx(slow.prompt(2048), rel=0.15)


def test_an_interrupted_step_does_not_bend_the_model() -> None:
    draw = random.Random(4)
    calibration = StepCalibration(512)
    prefill(calibration, PREFILL, draw)
    calibration.note_chunk(64, 0, 30.0)
    assert calibration.cost.prompt(2048) == pytest.approx(PREFILL.prompt(2048), rel=0.15)


def test_the_first_step_warms_up_and_counts_for_nothing() -> None:
    calibration = StepCalibration(512)
    assert calibration.cost.measurements == 0
    calibration.note_chunk(64, 0, 99.0)
    assert calibration.cost.measurements == 0
    calibration.note_chunk(64, 0, 0.01)
    assert calibration.cost.measurements == 1
    assert calibration.cost.prompt(64) == pytest.approx(0.01, rel=1e-3)


def test_one_shape_of_work_is_predicted_even_though_it_cannot_be_split() -> None:
    calibration = StepCalibration(512)
    for _ in range(50):
        calibration.note_chunk(128, 0, 0.02)
    assert calibration.cost.prompt(128) == pytest.approx(0.02, rel=1e-3)
    assert calibration.cost.prompt(512) > 0.02


def test_no_coefficient_is_negative_whatever_was_measured() -> None:
    draw = random.Random(5)
    for _ in range(50):
        fit = LinearFit(4, memory=20)
        for _ in range(30):
            fit.add([1.0, draw.random(), draw.choice([0.0, draw.random()]), draw.random()], draw.random(), 1.0)
        assert min(fit.coefficients) >= 0.0


def test_a_feature_that_falls_with_work_is_left_out() -> None:
    fit = LinearFit(2, memory=100)
    for n in range(1, 20):
        fit.add([1.0, n], 1.0 - 0.01 * n, 1.0)
    fixed, slope = fit.coefficients
    assert slope == 0.0
    assert fixed == pytest.approx(0.9, rel=0.05)


def test_steps_of_a_prompt() -> None:
    assert [PREFILL.steps(tokens) for tokens in (1, 512, 513, 1024)] == [1, 1, 2, 2]
    assert DECODE.steps(512, beside=128) == 4
    assert StepCost().steps(10_000) == 1
    assert PREFILL.prompt(0) == 0.0


def test_a_transfer_is_hidden_behind_computation_but_for_its_last_layer() -> None:
    transfer = TransferCost(bytes_per_token=1000, bytes_per_second=1e6, handoff=0.005, layers=10)
    assert transfer.exposed(1000, compute_seconds=5.0) == pytest.approx(0.005 + 0.1)
    assert transfer.exposed(1000, compute_seconds=0.2) == pytest.approx(0.005 + 0.8)
    assert TransferCost(handoff=0.01).exposed(10_000, 0.0) == 0.01


def test_transfers_give_their_rate_and_handoff() -> None:
    calibration = TransferCalibration(bytes_per_token=1000, layers=10)
    assert calibration.cost.bytes_per_second == 0.0
    truth = TransferCost(1000, 2e6, 0.003, 10)
    for tokens in (64, 512, 2048) * 20:
        calibration.note(tokens, tokens * 1000, tokens * 1000 / 2e6, 10.0, truth.exposed(tokens, 10.0))
    assert calibration.cost.bytes_per_second == pytest.approx(2e6, rel=0.01)
    assert calibration.cost.handoff == pytest.approx(0.003, rel=0.05)


def test_models_travel() -> None:
    cost = StepCost(1.0, 2.0, 3.0, 4.0, 5, 6)
    assert StepCost.from_proto(cost.to_proto()) == cost
    transfer = TransferCost(1, 2.0, 3.0, 4)
    assert TransferCost.from_proto(transfer.to_proto()) == transfer
