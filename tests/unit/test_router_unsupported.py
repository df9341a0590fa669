"""Fields that other servers follow and this one cannot: refused by name unless they ask for nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from support.router_stack import Stack, assert_error, running_stack

PROMPT = {"prompt": "a", "max_tokens": 1}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with running_stack() as found:
        yield found


async def assert_refused(stack: Stack, path: str, body: dict[str, Any], name: str, instead: str) -> None:
    response = await stack.client.post(path, json=body)
    await assert_error(response, 400, "invalid_argument", name)
    message = (await response.json())["error"]["message"]
    assert message.startswith(name)
    assert instead in message
    assert stack.decode.calls == []


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("allowed_token_ids", [3], "logit_bias"),
        ("bad_words", ["x"], "logit_bias"),
        ("best_of", 3, "n completions"),
        ("prompt_logprobs", 0, "generated tokens"),
        ("skip_special_tokens", False, "return_token_ids"),
        ("suffix", "z", "continued"),
        ("truncate_prompt_tokens", -1, "fits"),
        ("use_beam_search", True, "n completions"),
    ],
)
async def test_both_endpoints_refuse(stack: Stack, name: str, value: object, instead: str) -> None:
    await assert_refused(stack, "/v1/completions", PROMPT | {name: value}, name, instead)
    await assert_refused(stack, "/v1/chat/completions", CHAT | {name: value}, name, instead)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("function_call", {"name": "f"}),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("tools", [TOOL]),
    ],
)
async def test_completions_have_no_tools(stack: Stack, name: str, value: object) -> None:
    await assert_refused(stack, "/v1/completions", PROMPT | {name: value}, name, "/v1/chat/completions")


async def test_a_model_that_decides_cannot_be_held_to_one_call(stack: Stack) -> None:
    body = CHAT | {"tools": [TOOL], "parallel_tool_calls": False}
    await assert_refused(stack, "/v1/chat/completions", body, "parallel_tool_calls", "held to one")


NEUTRAL: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, [], ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prompt_logprobs": (None,),
    "skip_special_tokens": (None, True),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}


@pytest.mark.parametrize("name", NEUTRAL)
async def test_what_asks_for_nothing_is_accepted(stack: Stack, name: str) -> None:
    for value in NEUTRAL[name]:
        assert await stack.complete(**PROMPT, **{name: value})
        assert await stack.chat(**CHAT, **{name: value})


async def test_n_may_come_as_best_of_too(stack: Stack) -> None:
    assert len((await stack.complete(**PROMPT, n=2, best_of=2))["choices"]) == 2
