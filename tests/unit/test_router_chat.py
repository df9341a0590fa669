"""Chat over HTTP and gRPC, with fake workers that repeat the rendered prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf import json_format

from hma_serve.core.errors import InvalidArgument
from hma_serve.router.completion import CompletionRequest
from hma_serve.router.conversation import MAX_MESSAGES, MAX_TOOLS, checked_conversation
from hma_serve.router.grpc_api import InferenceServicer
from hma_serve.v1 import inference_pb2
from support.fake_workers import EOS, MODEL_NAME, WINDOW, fake_model
from support.router_stack import Stack, assert_error, running_stack

HI = [{"role": "user", "content": "hi"}]
HI_TEXT = "<user>hi<assistant>"


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with running_stack() as found:
        yield found


async def rendered(stack: Stack, messages: list[dict[str, Any]], **body: Any) -> str:
    """The prompt that reaches decode."""
    stack.decode.calls.clear()
    await stack.chat(messages=messages, max_tokens=1, **body)
    [call] = stack.decode.calls
    return stack.text(list(call.prompt_token_ids))


async def test_a_whole_answer(stack: Stack) -> None:
    answer = await stack.chat(messages=HI, max_completion_tokens=len(HI_TEXT), model=MODEL_NAME)
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": HI_TEXT, "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["completion_tokens"] == len(HI_TEXT)


async def test_a_streamed_answer(stack: Stack) -> None:
    options = {"include_usage": True}
    *chunks, usage = await stack.chat_stream(messages=HI, max_tokens=len(HI_TEXT), stream_options=options)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == HI_TEXT
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(HI_TEXT)


async def test_without_a_limit_the_answer_may_fill_the_window(stack: Stack) -> None:
    answer = await stack.chat(messages=HI)
    assert answer["usage"]["total_tokens"] == WINDOW
    stack.decode.eos_after = 3
    [choice] = (await stack.chat(messages=HI))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("<us", "stop", EOS)


async def test_several_choices_with_stop_strings_and_seeds(stack: Stack) -> None:
    body = {"messages": HI, "n": 2, "seed": 3, "stop": "hi", "return_token_ids": True}
    answer = await stack.chat(**body)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["<user>"] * 2
    assert sorted(call.sampling.seed for call in stack.decode.calls) == [3, 4]
    assert all(stack.text(choice["prompt_token_ids"]) == HI_TEXT for choice in answer["choices"])
    chunks = await stack.chat_stream(**body)
    for index in (0, 1):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "<user>"
        assert (own[-1]["finish_reason"], own[-1]["stop_reason"]) == ("stop", "hi")


async def test_logprobs_have_tokens_and_bytes(stack: Stack) -> None:
    entry = {"token": "<", "logprob": -0.5, "bytes": [60]}
    expected = {"content": [entry | {"top_logprobs": [entry]}], "refusal": None}
    body = {"messages": HI, "max_tokens": 1, "logprobs": True, "top_logprobs": 1}
    assert (await stack.chat(**body))["choices"][0]["logprobs"] == expected
    chunks = await stack.chat_stream(**body)
    assert [chunk["choices"][0]["logprobs"] for chunk in chunks] == [None, expected, None]
    await stack.chat(messages=HI, max_tokens=1, logprobs=True)
    assert [call.sampling.logprobs for call in stack.decode.calls] == [1, 1, 0]
    await stack.chat(messages=HI, max_tokens=1, logprobs=False, top_logprobs=None)
    assert not stack.decode.calls[-1].sampling.HasField("logprobs")


async def test_contents_reach_the_template_as_text(stack: Stack) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]
    assert await rendered(stack, [{"role": "user", "content": parts}]) == "<user>a\nb\nc<assistant>"
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    called = {"role": "assistant", "tool_calls": calls}
    assert await rendered(stack, [*HI, called]) == "<user>hi<assistant><assistant>"
    assert await rendered(stack, [*HI, called | {"content": None}]) == "<user>hi<assistant><assistant>"
    assert await rendered(stack, [{"role": "user", "content": []}]) == "<user><assistant>"


async def test_tools_and_variables_reach_the_template(stack: Stack) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    text = await rendered(stack, HI, tools=[tool], chat_template_kwargs={"mood": "calm"}, add_generation_prompt=False)
    assert text == '<user>hi<tools>[{"type": "function", "function": {"name": "f"}}]calm'
    assert await rendered(stack, HI, tools=[tool], tool_choice="none") == HI_TEXT
    assert await rendered(stack, HI, tools=[], tool_choice="auto", response_format={"type": "text"}) == HI_TEXT


async def test_newer_names_of_roles_become_the_templates(stack: Stack) -> None:
    messages = [{"role": "developer", "content": "a"}, {"role": "function", "content": "b"}]
    assert await rendered(stack, messages) == "<system>a<tool>b<assistant>"


async def test_a_template_that_knows_a_role_sees_it() -> None:
    template = "{% for m in messages %}{{ m.role == 'developer' or m.role == 'ipython' }}{% endfor %}"
    async with running_stack(model=fake_model(template=template)) as stack:
        messages = [{"role": "developer", "content": ""}, {"role": "ipython", "content": ""}]
        assert await rendered(stack, messages) == "TrueTrue"


async def test_an_echoed_answer_begins_with_what_was_said(stack: Stack) -> None:
    messages = [*HI, {"role": "assistant", "content": "Well, "}]
    body = {"messages": messages, "add_generation_prompt": False, "max_tokens": 3, "echo": True}
    assert (await stack.chat(**body))["choices"][0]["message"]["content"] == "Well, <us"
    chunks = await stack.chat_stream(**body)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Well, <us"
    assert (await stack.chat(**(body | {"messages": HI})))["choices"][0]["message"]["content"] == "<us"


async def test_a_long_conversation_is_rendered_beside_the_loop(stack: Stack) -> None:
    messages = HI * 200
    response = await stack.client.post("/v1/chat/completions", json={"messages": messages})
    await assert_error(response, 400, "context_length_exceeded", "messages")


def named(name: object, **more: Any) -> dict[str, Any]:
    """A tool."""
    return {"type": "function", "function": {"name": name, **more}}


TOOL = named("f")
CALL_F = {"type": "function", "function": {"name": "f"}}
PART = [{"type": "image_url", "image_url": {"url": "x"}}]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no messages", {}, "messages"),
    ("null messages", {"messages": None}, "messages"),
    ("no message", {"messages": []}, "messages"),
    ("text messages", {"messages": "hi"}, "messages"),
    ("prompt instead", {"prompt": "hi"}, "messages"),
    ("too many messages", {"messages": HI * (MAX_MESSAGES + 1)}, "messages"),
    ("text message", {"messages": ["hi"]}, "messages[0]"),
    ("no content", {"messages": [*HI, {"role": "user"}]}, "messages[1].content"),
    ("null content", {"messages": [{"role": "tool", "content": None}]}, "messages[0].content"),
    ("no role", {"messages": [{"content": "a"}]}, "messages[0].role"),
    ("number role", {"messages": [*HI, {"role": 1, "content": "a"}]}, "messages[1].role"),
    ("unknown role", {"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
    ("empty role", {"messages": [{"role": "", "content": "a"}]}, "messages[0].role"),
    ("number content", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("object content", {"messages": [{"role": "user", "content": {"text": "a"}}]}, "messages[0].content"),
    ("image", {"messages": [{"role": "user", "content": PART}]}, "messages[0].content"),
    ("text part without text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ("odd calls", {"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "messages[0].tool_calls"),
    ("surrogate", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ("object of tools", {"messages": HI, "tools": {"f": TOOL}}, "tools"),
    ("odd tool", {"messages": HI, "tools": ["f"]}, "tools[0]"),
    ("too many tools", {"messages": HI, "tools": [named(f"f{i}") for i in range(MAX_TOOLS + 1)]}, "tools"),
    ("a call without tools", {"messages": HI, "tool_choice": "required"}, "tool_choice"),
    ("a named call without tools", {"messages": HI, "tool_choice": CALL_F}, "tool_choice"),
    ("a call without a name", {"messages": HI, "tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
    (
        "a call of another",
        {"messages": HI, "tools": [named("g")], "tool_choice": CALL_F},
        "tool_choice",
    ),
    ("an odd choice", {"messages": HI, "tools": [TOOL], "tool_choice": ["f"]}, "tool_choice"),
    ("a call and a form", {"messages": HI, "tools": [TOOL], "tool_choice": CALL_F, "guided_regex": "a"}, "tool_choice"),
    ("text parallel calls", {"messages": HI, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ("functions", {"messages": HI, "functions": [{"name": "f"}]}, "functions"),
    ("forced function", {"messages": HI, "function_call": {"name": "f"}}, "function_call"),
    ("template", {"messages": HI, "chat_template": "{{ 7 * 7 }}"}, "chat_template"),
    ("documents", {"messages": HI, "documents": [{"text": "a"}]}, "documents"),
    ("continued message", {"messages": HI, "continue_final_message": True}, "continue_final_message"),
    ("web search", {"messages": HI, "web_search_options": {}}, "web_search_options"),
    ("odd format", {"messages": HI, "response_format": {"type": "yaml"}}, "response_format"),
    ("audio", {"messages": HI, "modalities": ["audio"]}, "modalities"),
    ("number logprobs", {"messages": HI, "logprobs": 1}, "logprobs"),
    ("lone top_logprobs", {"messages": HI, "top_logprobs": 1}, "top_logprobs"),
    ("huge top_logprobs", {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("list of kwargs", {"messages": HI, "chat_template_kwargs": []}, "chat_template_kwargs"),
    ("nested kwargs", {"messages": HI, "chat_template_kwargs": {"a": {}}}, "chat_template_kwargs"),
    ("long kwargs", {"messages": HI, "chat_template_kwargs": {"a": "x" * 1025}}, "chat_template_kwargs"),
    ("odd name", {"messages": HI, "chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
    ("many kwargs", {"messages": HI, "chat_template_kwargs": {f"a{i}": 1 for i in range(33)}}, "chat_template_kwargs"),
    ("messages again", {"messages": HI, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
    ("zero tokens", {"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens"),
    ("zero n", {"messages": HI, "n": 0}, "n"),
]


@pytest.mark.parametrize(("body", "param"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
async def test_a_bad_field_is_refused_by_name(stack: Stack, body: dict[str, Any], param: str) -> None:
    for streamed in (False, True):
        response = await stack.client.post("/v1/chat/completions", json={"stream": streamed} | body)
        await assert_error(response, 400, "invalid_argument", param)
    assert stack.decode.calls == []
    assert await stack.chat(messages=HI, max_tokens=1)


async def refusal(stack: Stack, body: dict[str, Any], param: str) -> str:
    """What is wrong with a body."""
    response = await stack.client.post("/v1/chat/completions", json={"messages": HI, **body})
    await assert_error(response, 400, "invalid_argument", param)
    assert stack.decode.calls == []
    return str((await response.json())["error"]["message"])


LONG = "n" * 65


@pytest.mark.parametrize("choice", [None, "none", "auto", "required"])
@pytest.mark.parametrize(
    ("tool", "param", "found"),
    [
        (None, "", "null"),
        ({}, ".type", "'function', not null"),
        ({"type": "retrieval"}, ".type", "'function', not 'retrieval'"),
        ({"type": "function"}, ".function", "an object, not null"),
        ({"type": "function", "function": "f"}, ".function", "an object, not 'f'"),
        (named(None), ".function.name", "not null"),
        (named(7), ".function.name", "not an integer"),
        (named(""), ".function.name", "not ''"),
        (named("get weather"), ".function.name", "digits, _ or -, not 'get weather'"),
        (named("météo"), ".function.name", "not 'météo'"),
        (named("f\n"), ".function.name", r"not 'f\n'"),
        (named("\ud800"), ".function.name", r"not '\ud800'"),
        (named(LONG), ".function.name", f"not '{LONG[:64]}'..."),
        (named("f"), ".function.name", "'f' is that of tools[0]"),
        (named("g", parameters="none"), ".function.parameters", "an object, not 'none'"),
        (named("g", parameters=[]), ".function.parameters", "an object, not an array"),
        (named("g", parameters={"type": "string"}), ".function.parameters.type", "'object', not 'string'"),
        (named("g", parameters={"type": ["object"]}), ".function.parameters.type", "'object', not an array"),
        (named("g", parameters={"type": None}), ".function.parameters.type", "'object', not null"),
    ],
)
async def test_a_tool_that_is_none_is_refused_by_name(
    stack: Stack, tool: Any, param: str, found: str, choice: str | None
) -> None:
    message = await refusal(stack, {"tools": [TOOL, tool], "tool_choice": choice}, f"tools[1]{param}")
    assert message.startswith(f"tools[1]{param} must be ")
    assert found in message


async def test_what_clients_send_of_tools_is_accepted(stack: Stack) -> None:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "properties": {}}
    tools = [
        named("get-weather_2", description="Weather", strict=True, parameters=schema),
        named("n" * 64, description=None, strict=None, parameters=None),
        named("A", parameters={}),
        named("B", parameters={"properties": {"a": {"type": "string"}}, "required": ["a"]}) | {"cache_control": {}},
    ]
    for tool in tools:
        for choice in (None, "none", "auto", "required", named(tool["function"]["name"])):
            assert await stack.chat(messages=HI, tools=[tool], tool_choice=choice, max_tokens=1)


def calling(arguments: object) -> dict[str, Any]:
    """A conversation with a call of the assistant's and its result."""
    made = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "0"}, made]}
    return {"messages": [*HI, called, {"role": "tool", "tool_call_id": "unknown", "content": "a"}]}


@pytest.mark.parametrize("arguments", ["{", "[]", "null", '"{}"', "f(1)", "{}{}", " ", "[" * 20_000, 7, False, [{}]])
async def test_a_call_of_the_past_had_an_object_of_arguments(stack: Stack, arguments: object) -> None:
    param = "messages[1].tool_calls[1].function.arguments"
    message = await refusal(stack, calling(arguments), param)
    assert message.startswith(f"{param} must be the text of a JSON object, not ")
    assert len(message) < 200


@pytest.mark.parametrize("arguments", ["{}", '{"a": [1]}', ' {"a": "\\ud800"}\n', "", None, {}, {"a": 1}])
async def test_arguments_come_as_clients_send_them(stack: Stack, arguments: object) -> None:
    assert await stack.chat(**calling(arguments), max_tokens=1)


async def test_a_call_of_another_function_names_those_that_there_are(stack: Stack) -> None:
    for count, listed in ((0, "none"), (1, "'g0'"), (9, "'g5', 'g6', 'g7' and 1 more")):
        tools = [named(f"g{number}") for number in range(count)]
        message = await refusal(stack, {"tools": tools, "tool_choice": CALL_F}, "tool_choice")
        assert message.startswith("tool_choice names the function 'f', and tools has ")
        assert message.endswith(listed)
    long = {"tools": [TOOL], "tool_choice": named("x" * 10_000)}
    assert len(await refusal(stack, long, "tool_choice")) < 200


async def test_a_clients_template_is_no_template(stack: Stack) -> None:
    response = await stack.client.post(
        "/v1/chat/completions", json={"messages": HI, "chat_template_kwargs": {"chat_template": "x", "mood": "{{ 7 }}"}}
    )
    assert response.status == 200
    assert stack.text(list(stack.decode.calls[-1].prompt_token_ids)) == "<user>hi{{ 7 }}<assistant>"


async def test_a_model_without_a_template_says_so() -> None:
    async with running_stack(model=fake_model(template=None)) as stack:
        response = await stack.client.post("/v1/chat/completions", json={"messages": HI})
        assert "no chat template" in await response.text()
        await assert_error(response, 400, "invalid_argument", "messages")
        with pytest.raises(InvalidArgument, match="no chat template"):
            await generate(stack, inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user")]))


# gRPC.


class Context:
    """The part of a call's context that the servicer uses."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> float | None:
        return None


async def generate(stack: Stack, chat: inference_pb2.ChatPrompt) -> str:
    request = inference_pb2.GenerateRequest(chat=chat)
    request.stop.max_tokens = 400
    request.stop.stop_strings.append("<assistant>")
    request.stop.include_stop = True
    context: Any = Context()
    responses = InferenceServicer(stack.pipeline.completions).Generate(request, context)
    return "".join([response.delta.text async for response in responses])


def prompt(**kwargs: Any) -> inference_pb2.ChatPrompt:
    chat = inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    json_format.ParseDict(kwargs, chat.template_kwargs)
    return chat


async def test_grpc_renders_the_same(stack: Stack) -> None:
    assert await generate(stack, prompt()) == HI_TEXT
    assert await generate(stack, prompt(mood="calm")) == "<user>hicalm<assistant>"
    assert await generate(stack, prompt(mood=3)) == "<user>hi3<assistant>"
    assert await generate(stack, prompt(mood=0.5)) == "<user>hi0.5<assistant>"
    assert await generate(stack, prompt(mood=True)) == "<user>hiTrue<assistant>"
    assert await generate(stack, prompt(mood=None)) == "<user>hiNone<assistant>"
    bare = prompt()
    bare.add_generation_prompt = False
    bare.messages.add(role="assistant", content="<assistant>", name="bot")
    assert await generate(stack, bare) == "<user>hi<assistant>"


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        (inference_pb2.ChatPrompt(), "messages"),
        (inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(content="a")]), "messages[0].role"),
        (inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="x")]), "messages[0].role"),
        (prompt(a=[1]), "chat_template_kwargs"),
        (prompt(a={"b": 1}), "chat_template_kwargs"),
        (prompt(tools="x"), "chat_template_kwargs"),
    ],
    ids=["nothing", "no role", "unknown role", "list", "object", "reserved"],
)
async def test_grpc_refuses_what_http_refuses(stack: Stack, chat: inference_pb2.ChatPrompt, field: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await generate(stack, chat)
    assert raised.value.field == field


async def test_a_conversation_has_the_length_of_its_rendering(stack: Stack) -> None:
    request = CompletionRequest((checked_conversation(HI, variables={}),))
    prepared = await stack.pipeline.completions.prepare(request)
    assert prepared.prompt_tokens == len(HI_TEXT)
