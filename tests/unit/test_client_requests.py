"""From arguments to a message: what is sent, what is refused before it is sent."""

from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from hma_serve.client import Client, InvalidArgument, PayloadTooLarge, Slo, Tls
from hma_serve.client._channels import parse_addresses
from hma_serve.client._options import Message, conversation, text_or_tokens


def test_what_was_not_asked_for_is_absent() -> None:
    message = text_or_tokens("hello", {"model": None, "temperature": None})
    assert json_format.MessageToDict(message) == {"text": "hello", "sampling": {}, "stop": {}, "slo": {}, "n": 1}


def test_every_option_reaches_its_field() -> None:
    options = {
        "model": "m",
        "max_tokens": 5,
        "min_tokens": 2,
        "stop": ["a", "b"],
        "stop_token_ids": np.array([1, 2]),
        "include_stop": True,
        "ignore_eos": True,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {3: 1.0},
        "seed": 9,
        "logprobs": 0,
        "n": 2,
        "slo": Slo(ttft=0.5, tpot=0.25),
        "priority": -1,
        "request_id": "mine",
    }
    assert json_format.MessageToDict(text_or_tokens("hello", options), preserving_proto_field_name=True) == {
        "model": "m",
        "text": "hello",
        "sampling": {
            "temperature": 0.0,
            "top_p": 0.5,
            "top_k": 7,
            "min_p": 0.25,
            "repetition_penalty": 1.5,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "logit_bias": {"3": 1.0},
            "seed": "9",
            "logprobs": 0,
        },
        "stop": {
            "max_tokens": 5,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [1, 2],
            "stop_strings": ["a", "b"],
            "include_stop": True,
        },
        "slo": {"ttft_seconds": 0.5, "tpot_seconds": 0.25},
        "priority": -1,
        "client_request_id": "mine",
        "n": 2,
    }


def test_a_single_stop_string_is_one_not_its_letters() -> None:
    assert list(text_or_tokens("x", {"stop": "END"}).stop.stop_strings) == ["END"]


@pytest.mark.parametrize("prompt", [[1, 2, 3], (1, 2, 3), range(1, 4), np.array([1, 2, 3], dtype=np.int32)])
def test_token_ids_come_in_any_sequence(prompt: Any) -> None:
    assert list(text_or_tokens(prompt, {}).token_ids.ids) == [1, 2, 3]


@pytest.mark.parametrize("prompt", ["", [], [-1], [2**32], ["a"], [1.5]])
def test_a_prompt_that_cannot_be_one_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        text_or_tokens(prompt, {})
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"stop": ""}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"slo": None, "seed": -1}, "seed"),
    ],
)
def test_numbers_out_of_range_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        text_or_tokens("hello", options)
    assert caught.value.field == field


def test_a_misspelt_option_is_a_type_error() -> None:
    with Client() as client, pytest.raises(TypeError, match="'max_token'"):
        client.generate("hello", max_token=3)  # type: ignore[call-arg]


def test_a_prompt_too_long_to_send_is_refused_here() -> None:
    with pytest.raises(PayloadTooLarge, match="3,145,728"):
        text_or_tokens("x" * (3 << 20), {})


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="position 5"):
        text_or_tokens("hello\ud800", {})
    with pytest.raises(InvalidArgument, match="surrogate"):
        conversation([{"role": "user", "content": "\udfff"}], None, {})


def test_a_conversation_keeps_its_order_and_its_names() -> None:
    messages: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello", "name": "Ann"},
    ]
    request = conversation(messages, {"enable_thinking": False, "style": "plain"}, {"max_tokens": 4})
    assert json_format.MessageToDict(request.chat) == {
        "messages": messages,
        "templateKwargs": {"enable_thinking": False, "style": "plain"},
    }
    assert request.stop.max_tokens == 4


def test_a_conversation_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least one"):
        conversation([], None, {})
    with pytest.raises(InvalidArgument, match="'text'"):
        conversation([{"role": "user", "text": "hi"}], None, {})  # type: ignore[typeddict-item,typeddict-unknown-key]
    with pytest.raises(InvalidArgument, match="template_kwargs"):
        conversation([{"role": "user", "content": "hi"}], {"now": object()}, {})


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("localhost:50051", ("localhost:50051",)),
        ("a:1, b:2,a:1", ("a:1", "b:2")),
        (["[::1]:50051", "unix:/run/router.sock"], ("[::1]:50051", "unix:/run/router.sock")),
        ("dns:///router.example:50051", ("dns:///router.example:50051",)),
    ],
)
def test_addresses(given: Any, parsed: tuple[str, ...]) -> None:
    assert parse_addresses(given) == parsed


@pytest.mark.parametrize("wrong", ["", " , ", "localhost", "http://localhost:8000", "a b:1", ":50051", "host:port"])
def test_what_is_no_address_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidArgument, match="localhost:50051") as caught:
        Client(wrong)
    assert caught.value.field == "address"


def test_tls_files_are_checked_at_once() -> None:
    with pytest.raises(InvalidArgument, match="both or neither"):
        Tls(certificate="client.pem")
    with pytest.raises(InvalidArgument, match=r"nowhere\.pem"):
        Client("localhost:1", tls=Tls(ca="/nowhere.pem"))
