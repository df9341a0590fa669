import dataclasses
from typing import Any

import pytest

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.groups import GROUP_TOKENS, packed_tokens
from hma_serve.core.request import SamplingParams, Slo, StopConditions, Structure, StructureKind


@pytest.mark.parametrize(
    ("tokens", "packed"), [(1, 0), (2, 0), (32, 0), (33, 32), (64, 32), (65, 64), (600, 576), (4096, 4064)]
)
def test_decode_keeps_between_one_and_32_prompt_tokens(tokens: int, packed: int) -> None:
    assert packed_tokens(tokens) == packed
    assert 1 <= tokens - packed <= GROUP_TOKENS


def test_absent_fields_mean_the_defaults_both_ways() -> None:
    kinds: list[Any] = [SamplingParams, StopConditions, Slo]
    for kind in kinds:
        value = kind()
        assert kind.from_proto(type(value.to_proto())()) == value
        assert kind.from_proto(value.to_proto()) == value


def test_every_field_survives_the_wire() -> None:
    values: list[Any] = [
        SamplingParams(
            0.5, 0.25, 7, 0.125, 1.5, 0.5, -0.5, {5: -1.5}, 2**64 - 1, 3, Structure(StructureKind.REGEX, ("[a-z]+",))
        ),
        StopConditions(9, 2, True, (1, 2), ("a", "b"), True),
        Slo(0.5, 0.125),
    ]
    for value in values:
        defaults = type(value)()
        for field in dataclasses.fields(value):
            assert getattr(value, field.name) != getattr(defaults, field.name)
        assert type(value).from_proto(value.to_proto()) == value


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        (SamplingParams, {"temperature": -0.1}, "temperature"),
        (SamplingParams, {"temperature": float("nan")}, "temperature"),
        (SamplingParams, {"temperature": float("inf")}, "temperature"),
        (SamplingParams, {"top_p": 0.0}, "top_p"),
        (SamplingParams, {"top_p": 1.1}, "top_p"),
        (SamplingParams, {"top_k": -1}, "top_k"),
        (SamplingParams, {"min_p": 2.0}, "min_p"),
        (SamplingParams, {"repetition_penalty": 0.0}, "repetition_penalty"),
        (SamplingParams, {"logit_bias": {1: 200.0}}, "logit_bias"),
        (SamplingParams, {"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias"),
        (SamplingParams, {"seed": -1}, "seed"),
        (SamplingParams, {"logprobs": 21}, "logprobs"),
        (StopConditions, {"max_tokens": 0}, "max_tokens"),
        (StopConditions, {"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        (StopConditions, {"stop_strings": ("",)}, "stop"),
        (StopConditions, {"stop_strings": ("x",) * 17}, "stop"),
        (StopConditions, {"stop_token_ids": (0,) * 257}, "stop_token_ids"),
        (Slo, {"ttft": 0.0}, "slo.ttft"),
        (Slo, {"ttft": 1e-310}, "slo.ttft"),
        (Slo, {"tpot": float("nan")}, "slo.tpot"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(kind: Any, values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        kind(**values)
    assert caught.value.field == field


def test_limits_are_said_to_the_last_digit() -> None:
    with pytest.raises(InvalidArgument, match="seed must be between 0 and 18446744073709551615, not -1"):
        SamplingParams(seed=-1)
    with pytest.raises(InvalidArgument, match=r"top_p must be between 0 and 1, not 1\.5"):
        SamplingParams(top_p=1.5)
