"""From arguments to a message: what is sent, what is refused before it is sent."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from hma_serve.client import Client, InvalidArgument, Options, PayloadTooLarge, Slo, Structure, Tls, _options
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


@pytest.mark.parametrize("prompt", ["", [], [-1], [2**32], ["a"], [1.5], None, 5, b"hi", {1: 2}, np.array(5)])
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": "5"}, "max_tokens must be an integer, not '5'"),
        ({"max_tokens": 5.0}, "max_tokens must be an integer, not 5.0"),
        ({"n": True}, "n must be an integer, not True"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, not 1"),
        ({"stop": 5}, "stop must be a text or a sequence of texts, not 5"),
        ({"stop": ["a", 5]}, "stop must be a text or a sequence of texts, not ['a', 5]"),
        ({"stop_token_ids": "ab"}, "stop_token_ids must be a sequence of token ids, not 'ab'"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias must be a mapping from token ids to numbers, not {'3': 1.0}"),
        ({"structure": "x"}, "structure must be a Structure, not 'x'"),
        ({"slo": 0.5}, "slo must be an Slo, not 0.5"),
        ({"model": 7}, "model must be a text, not 7"),
        ({"priority": 2**31}, "priority must be between -2147483647 and 2147483647"),
        ({"temperature": 10**400}, f"temperature must be between 0 and 100, not {10**400}"),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_is_taken(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        text_or_tokens("hello", options)
    assert (caught.value.field, caught.value.message) == (next(iter(options)), message)


def test_every_documented_option_has_a_kind() -> None:
    assert _options._TAKES.keys() | {"timeout"} == Options.__annotations__.keys()


@pytest.mark.parametrize("arguments", [{"address": 5}, {"timeout": "5"}, {"metadata": {"a": 5}}, {"metadata": "a"}])
def test_what_a_client_is_made_of_is_checked_too(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Client(**arguments)
    assert caught.value.field == next(iter(arguments))


@pytest.mark.parametrize(
    ("make", "wrong"), [(Structure.regex, 5), (Structure.choice, "ab"), (Structure.choice, 5), (Slo, "1")]
)
def test_objectives_and_structures_are_checked_when_they_are_made(make: Callable[[Any], object], wrong: Any) -> None:
    with pytest.raises(InvalidArgument):
        make(wrong)


def test_a_misspelt_option_is_a_type_error() -> None:
    with Client() as client, pytest.raises(TypeError, match=r"'max_token'$"):
        client.generate("hello", max_token=3)  # type: ignore[call-arg]


def test_who_asks_for_tools_is_told_where_they_are() -> None:
    with Client() as client, pytest.raises(TypeError, match="'tools': tools are for HTTP alone"):
        client.generate("hello", tools=[])  # type: ignore[call-arg]
    with pytest.raises(InvalidArgument, match="'tool_calls': tools are for HTTP alone"):
        conversation([{"role": "assistant", "tool_calls": []}], None, {})  # type: ignore[typeddict-item]


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
    ("messages", "field", "message"),
    [
        ("hi", "messages", "messages must be a sequence of messages, not 'hi'"),
        ({"role": "user"}, "messages", "messages must be a sequence of messages, not {'role': 'user'}"),
        (None, "messages", "messages must be a sequence of messages, not None"),
        (["hi"], "messages[0]", "messages[0] must be a mapping with role and content, not 'hi'"),
        ([{"role": "user"}], "messages[0].content", "messages[0] has no content"),
        ([{"content": "hi"}], "messages[0].role", "messages[0] has no role"),
        ([{"role": "user", "content": [1]}], "messages[0].content", "messages[0].content must be a text, not [1]"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_named(messages: Any, field: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        conversation(messages, None, {})
    assert (caught.value.field, caught.value.message) == (field, message)


def test_an_assistant_may_have_said_nothing() -> None:
    messages: Any = [{"role": "assistant"}, {"role": "assistant", "content": None}]
    assert [message.content for message in conversation(messages, None, {}).chat.messages] == ["", ""]


@pytest.mark.parametrize("given", ["x", {5: 5}, {"a": {5: 5}}])
def test_variables_of_a_template_have_names(given: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        conversation([{"role": "user", "content": "hi"}], given, {})
    assert caught.value.field == "template_kwargs"


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
