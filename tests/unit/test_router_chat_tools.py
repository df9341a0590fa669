"""Tools over HTTP: fake workers repeat a prompt that is the last message alone, so that it scripts the answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.request import SamplingParams, Structure
from support.fake_workers import EOS, fake_model
from support.qwen3 import GOLDEN, WEATHER
from support.router_stack import Stack, assert_error, running_stack

OSLO = '<tool_call>\n{"name": "weather", "arguments": {"city":"Oslo"}}\n</tool_call>'
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
WEATHER_CALLS = {name: WEATHER["function"][name] for name in ("name", "parameters")}
UNCLOSED = OSLO.removesuffix("</tool_call>")


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with running_stack(model=fake_model(template="{{ messages[-1].content }}")) as found:
        yield found


def script(stack: Stack, answer: str, *, cut: int = 0, **body: Any) -> dict[str, Any]:
    """A request whose answer is this, or lacks its last `cut` characters."""
    stack.decode.eos_after = len(answer.encode())
    limit = {"max_tokens": len(answer.encode()) - cut} if cut else {}
    return {"messages": [{"role": "user", "content": answer}], "tools": [WEATHER], **limit, **body}


def calls_in(holder: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and arguments of calls, whose ids must be unique."""
    calls = holder.get("tool_calls", [])
    assert {call["type"] for call in calls} <= {"function"}
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def assembled(chunks: list[Any], index: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """A streamed choice as one message, and its last chunk's choice."""
    own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    assert own[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for choice in own[:-1]] == [None] * (len(own) - 1)
    calls = [call for choice in own for call in choice["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    return {"content": "".join(choice["delta"].get("content", "") for choice in own), "tool_calls": calls}, own[-1]


@pytest.mark.parametrize("per_message", [1, 7, 1000])
@pytest.mark.parametrize(
    ("answer", "content", "cities"),
    [
        (OSLO, None, ["Oslo"]),
        (f"Let me see.\n{OSLO}\n{ROME}", "Let me see.", ["Oslo", "Rome"]),
        (f"é {UNCLOSED}\n{ROME}!", f"é {UNCLOSED}!", ["Rome"]),
    ],
    ids=["one", "text and two", "an unclosed one before"],
)
async def test_calls_are_no_content(
    stack: Stack, answer: str, content: str | None, cities: list[str], per_message: int
) -> None:
    stack.decode.per_message = per_message
    calls = [("weather", json.dumps({"city": city})) for city in cities]
    [choice] = (await stack.chat(**script(stack, answer)))["choices"]
    assert (choice["message"]["content"], calls_in(choice["message"])) == (content, calls)
    assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", EOS)
    message, last = assembled(await stack.chat_stream(**script(stack, answer)))
    assert (message["content"], calls_in(message)) == (content or "", calls)
    assert (last["finish_reason"], last["stop_reason"], last["delta"]) == ("tool_calls", EOS, {})


@pytest.mark.parametrize(
    "answer", ["Hello", UNCLOSED, "a <tool_call>\n{}\n</tool_call>\n", "<tool_call>", "x\n"], ids=str.__len__
)
async def test_what_is_no_call_is_content(stack: Stack, answer: str) -> None:
    [choice] = (await stack.chat(**script(stack, answer)))["choices"]
    assert choice["message"] == {"role": "assistant", "content": answer, "refusal": None}
    assert choice["finish_reason"] == "stop"
    message, last = assembled(await stack.chat_stream(**script(stack, answer)))
    assert message == {"content": answer, "tool_calls": []}
    assert last["finish_reason"] == "stop"


async def test_a_limit_ends_an_answer_as_it_stands(stack: Stack) -> None:
    answer = f"{OSLO}\n{ROME}"
    rest = f"\n{ROME}"[:-1]
    [choice] = (await stack.chat(**script(stack, answer, cut=1)))["choices"]
    assert (choice["message"]["content"], len(calls_in(choice["message"]))) == (rest, 1)
    assert choice["finish_reason"] == "length"
    message, last = assembled(await stack.chat_stream(**script(stack, answer, cut=1)))
    assert (message["content"], len(calls_in(message))) == (rest, 1)
    assert (last["finish_reason"], last["delta"]) == ("length", {"content": rest})


async def test_text_streams_until_a_call_and_the_call_comes_whole(stack: Stack) -> None:
    _, *chunks, last = await stack.chat_stream(**script(stack, f"A < B\n{OSLO}"))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    # While nothing can be said nothing is.
    assert deltas[:-1] == [{"content": text} for text in ("A", " ", "< ", "B")]
    [call] = deltas[-1].pop("tool_calls")
    assert deltas[-1] == {}
    assert call.pop("id").startswith("call_")
    assert call == {"index": 0, "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert last["choices"][0]["delta"] == {}


async def test_an_answer_that_is_held_back_has_begun_and_counts(stack: Stack) -> None:
    opening, call, last, usage = await stack.chat_stream(**script(stack, OSLO, stream_options={"include_usage": True}))
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert list(call["choices"][0]["delta"]) == ["tool_calls"]
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert usage["usage"]["completion_tokens"] == len(OSLO)
    # What never becomes a call is there in the end.
    _, last = await stack.chat_stream(**script(stack, UNCLOSED))
    assert last["choices"][0]["delta"] == {"content": UNCLOSED}


async def test_each_choice_has_its_own_calls(stack: Stack) -> None:
    answer = await stack.chat(**script(stack, f"Both:\n{OSLO}", n=2))
    calls = [choice["message"]["tool_calls"] for choice in answer["choices"]]
    assert [[call["function"]["name"] for call in own] for own in calls] == [["weather"]] * 2
    assert calls[0][0]["id"] != calls[1][0]["id"]
    chunks = await stack.chat_stream(**script(stack, f"Both:\n{OSLO}", n=2))
    for index in (0, 1):
        message, last = assembled(chunks, index)
        assert (message["content"], len(calls_in(message)), last["finish_reason"]) == ("Both:", 1, "tool_calls")


async def test_every_token_keeps_its_logprob_and_its_id(stack: Stack) -> None:
    body: dict[str, Any] = {"logprobs": True, "return_token_ids": True}
    usage = {"include_usage": True, "continuous_usage_stats": True}
    answer = await stack.chat(**script(stack, OSLO, **body))
    [choice] = answer["choices"]
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == OSLO
    assert stack.text(choice["token_ids"]) == OSLO
    *chunks, last = await stack.chat_stream(**script(stack, OSLO, **body, stream_options=usage))
    choices = [chunk["choices"][0] for chunk in chunks]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert "".join(entry["token"] for entry in entries) == OSLO
    assert stack.text([token for choice in choices for token in choice.get("token_ids", [])]) == OSLO
    assert last["usage"] == answer["usage"]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks[1:-1]] == list(range(1, len(OSLO) + 1))


@pytest.mark.parametrize(
    ("stop", "content", "calls", "reason"),
    [
        ("Oslo", '<tool_call>\n{"name": "weather", "arguments": {"city":"', 0, "stop"),
        ("</tool_call>", UNCLOSED, 0, "stop"),
        ("done", None, 1, "tool_calls"),
    ],
)
async def test_stop_strings_end_the_text_before_calls_are_looked_for(
    stack: Stack, stop: str, content: str | None, calls: int, reason: str
) -> None:
    body = script(stack, f"{OSLO}done.", stop=stop)
    [choice] = (await stack.chat(**body))["choices"]
    assert (choice["message"]["content"], len(calls_in(choice["message"]))) == (content, calls)
    assert (choice["finish_reason"], choice["stop_reason"]) == (reason, stop)
    message, last = assembled(await stack.chat_stream(**body))
    assert (message["content"], len(message["tool_calls"])) == (content or "", calls)
    assert (last["finish_reason"], last["stop_reason"]) == (reason, stop)


@pytest.mark.parametrize("body", [{"tools": None}, {"tools": []}, {"tool_choice": "none"}])
async def test_without_tools_nothing_is_a_call(stack: Stack, body: dict[str, Any]) -> None:
    [choice] = (await stack.chat(**script(stack, OSLO, **body)))["choices"]
    assert choice["message"] == {"role": "assistant", "content": OSLO, "refusal": None}
    assert choice["finish_reason"] == "stop"
    message, last = assembled(await stack.chat_stream(**script(stack, OSLO, **body)))
    assert message == {"content": OSLO, "tool_calls": []}
    assert last["finish_reason"] == "stop"


async def test_an_answers_calls_go_back_into_qwen3s_template(stack: Stack) -> None:
    """The history that a client makes of an answer is, to the model, what it wrote itself."""
    [choice] = (await stack.chat(**script(stack, f"I look.\n{ROME}\n{ROME}")))["choices"]
    [first, second] = choice["message"]["tool_calls"]
    history = [
        {"role": "user", "content": "?"},
        choice["message"],
        {"role": "tool", "tool_call_id": first["id"], "content": "sun"},
        {"role": "tool", "tool_call_id": second["id"], "content": [{"type": "text", "text": "rain"}]},
    ]
    expected = (
        "<|im_start|>user\n?<|im_end|>\n"
        f"<|im_start|>assistant\nI look.\n{ROME}\n{ROME}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    async with running_stack(model=fake_model(template=(GOLDEN / "chat_template.jinja").read_text())) as qwen3:
        await qwen3.chat(messages=history, max_tokens=1)
        assert qwen3.text(list(qwen3.decode.calls[-1].prompt_token_ids)) == expected
        # Calls alone: their message has no text.
        await qwen3.chat(messages=[history[0], {**choice["message"], "content": None}, history[2]], max_tokens=1)
        assert f"assistant\n{ROME}\n{ROME}<|im_end|>" in qwen3.text(list(qwen3.decode.calls[-1].prompt_token_ids))


CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock", "description": "The time"}}
CALL_CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize(
    ("body", "structure"),
    [
        ({}, None),
        ({"tool_choice": "auto"}, None),
        ({"tool_choice": "none"}, None),
        ({"tool_choice": "required"}, Structure.tool_calls([WEATHER_CALLS, {"name": "clock"}])),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            Structure.tool_calls([WEATHER_CALLS, {"name": "clock"}], one=True),
        ),
        ({"tool_choice": CALL_CLOCK}, Structure.tool_calls([{"name": "clock"}], one=True)),
    ],
)
async def test_a_call_that_is_asked_for_is_a_form_of_the_output(
    stack: Stack, body: dict[str, Any], structure: Structure | None
) -> None:
    await stack.chat(**script(stack, OSLO, tools=[WEATHER, CLOCK], **body))
    sampling = SamplingParams.from_proto(stack.decode.calls[-1].sampling)
    assert sampling.structure == structure


async def test_a_tool_that_cannot_be_followed_is_named(stack: Stack) -> None:
    stack.decode.fail_after, stack.decode.failure = 0, InvalidArgument("it cannot be followed", field="structure")
    body = script(stack, OSLO, tool_choice="required")
    await assert_error(await stack.client.post("/v1/chat/completions", json=body), 400, "invalid_argument", "tools")
