"""Thirty calls with the official `openai` package, as its users make them; run by its own interpreter.

Prints one JSON line a call: `{"call": name, "error": null or what was wrong}`. This file imports nothing of ours: what
it knows of the server is what OpenAI's documentation says.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

PROMPT = "It was a dark and stormy night, and the rain fell in torrents. The old man"
MESSAGES: Any = [
    {"role": "system", "content": "You are a storyteller."},
    {"role": "user", "content": "What happened on the dark and stormy night?"},
]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
WRITTEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CALLS: dict[str, Callable[[], Awaitable[None]]] = {}
URL = sys.argv[1]
SETTINGS: dict[str, Any] = {"base_url": f"{URL}/v1", "api_key": "none", "max_retries": 0, "timeout": 60.0}
SYNC = OpenAI(**SETTINGS)


def call(function: Callable[[AsyncOpenAI], Awaitable[None]]) -> None:
    """Registers a call with a client of its own."""

    async def run() -> None:
        async with AsyncOpenAI(**SETTINGS) as client:
            await function(client)

    CALLS[function.__name__] = run


def blocking(function: Callable[[OpenAI], None]) -> None:
    """Registers a call with the blocking client."""

    async def run() -> None:
        await asyncio.to_thread(function, SYNC)

    CALLS[function.__name__] = run


def model() -> str:
    return str(SYNC.models.list().data[0].id)


def refused(error: type[openai.APIStatusError], make: Callable[[], Any], param: str | None) -> openai.APIStatusError:
    raised: openai.APIStatusError | None = None
    try:
        make()
    except error as exc:
        raised = exc
    assert raised is not None, f"no {error.__name__}"
    assert raised.param == param, raised.param
    assert raised.message
    return raised


# Models.


@blocking
def models_list(client: OpenAI) -> None:
    [only] = client.models.list().data
    assert only.object == "model"
    assert only.owned_by


@blocking
def models_retrieve(client: OpenAI) -> None:
    assert client.models.retrieve(model()).id == model()


@blocking
def models_retrieve_unknown(client: OpenAI) -> None:
    refused(openai.NotFoundError, lambda: client.models.retrieve("gpt-9"), "model")


# Completions.


@blocking
def completion(client: OpenAI) -> None:
    answer = client.completions.create(model=model(), prompt=PROMPT, max_tokens=8)
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None


@blocking
def completion_is_greedy_at_zero(client: OpenAI) -> None:
    texts = {
        client.completions.create(model=model(), prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text
        for _ in range(2)
    }
    assert len(texts) == 1


@blocking
def completion_with_a_seed(client: OpenAI) -> None:
    def text(seed: int) -> str:
        answer = client.completions.create(model=model(), prompt=PROMPT, max_tokens=12, temperature=1.5, seed=seed)
        return str(answer.choices[0].text)

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


@blocking
def completion_streamed(client: OpenAI) -> None:
    arguments: dict[str, Any] = {"model": model(), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**arguments).choices[0]
    chunks = list(client.completions.create(stream=True, **arguments))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


@blocking
def completion_usage_in_the_stream(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=model(), prompt=PROMPT, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert 1 <= chunks[-1].usage.completion_tokens <= 5


@blocking
def completion_several(client: OpenAI) -> None:
    answer = client.completions.create(model=model(), prompt=[PROMPT, "Once"], n=2, max_tokens=4, temperature=1.2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


@blocking
def completion_of_tokens(client: OpenAI) -> None:
    answer = client.completions.create(model=model(), prompt=[[5, 6, 7], [8, 9]], max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5


@blocking
def completion_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(model=model(), prompt=PROMPT, max_tokens=3, logprobs=2, temperature=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    assert all(value <= 0 for value in logprobs.token_logprobs if value is not None)


@blocking
def completion_stop(client: OpenAI) -> None:
    arguments: dict[str, Any] = {"model": model(), "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(stop=None, **arguments).choices[0].text
    mark = text[len(text) // 2 :][:3]
    stopped = client.completions.create(stop=[mark], **arguments).choices[0]
    assert stopped.text == text[: text.index(mark)]
    assert stopped.finish_reason == "stop"


@blocking
def completion_echo(client: OpenAI) -> None:
    answer = client.completions.create(model=model(), prompt=PROMPT, max_tokens=2, echo=True)
    assert answer.choices[0].text.startswith(PROMPT)


@blocking
def completion_with_extra_fields(client: OpenAI) -> None:
    answer = client.completions.create(
        model=model(),
        prompt=PROMPT,
        max_tokens=6,
        user="someone",
        logit_bias={"7": -100},
        extra_body={"ignore_eos": True, "min_tokens": 6, "top_k": 5, "unknown": {"a": 1}},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


# Chat.


@blocking
def chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=model(), messages=MESSAGES, max_completion_tokens=8)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content is not None


@blocking
def chat_streamed(client: OpenAI) -> None:
    arguments: dict[str, Any] = {"model": model(), "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**arguments).choices[0]
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **arguments))
    assert chunks[0].choices[0].delta.role == "assistant"
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == whole.message.content
    assert chunks[-1].usage is not None


@blocking
def chat_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model=model(), messages=MESSAGES, max_tokens=8, temperature=0) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        assert stream.get_final_completion().choices[0].message.content == "".join(pieces)


@blocking
def chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=model(), messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob <= 0
        assert entry.bytes is not None


@blocking
def chat_several_choices(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=model(), messages=MESSAGES, n=3, max_tokens=6, temperature=1.5)
    assert len(answer.choices) == 3
    assert len({choice.message.content for choice in answer.choices}) > 1


@blocking
def chat_with_text_parts(client: OpenAI) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    plain: Any = [{"role": "user", "content": "Hello"}]
    answers = [
        client.chat.completions.create(model=model(), messages=messages, max_tokens=6, temperature=0)
        for messages in (parts, plain)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def asking_for_calls(*written: str) -> dict[str, Any]:
    """A request with tools that is held to an answer, because the model of the test would not call them by itself."""
    return {
        "model": model(),
        "messages": MESSAGES,
        "tools": TOOLS,
        "max_tokens": 200,
        "extra_body": {"guided_choice": ["\n".join(written)]},
    }


def assert_calls_oslo(calls: Any) -> None:
    assert calls
    for each in calls:
        assert each.type == "function"
        assert (each.function.name, json.loads(each.function.arguments)) == ("weather", {"city": "Oslo"})


@blocking
def chat_tool_calls_and_their_results(client: OpenAI) -> None:
    [choice] = client.chat.completions.create(**asking_for_calls("Well.", WRITTEN_CALL)).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Well."
    assert_calls_oslo(choice.message.tool_calls)
    assert choice.message.tool_calls is not None
    [called] = choice.message.tool_calls
    result: Any = {"role": "tool", "tool_call_id": called.id, "content": "rain"}
    answer = client.chat.completions.create(
        model=model(), messages=[*MESSAGES, choice.message, result], tools=TOOLS, tool_choice="auto", max_tokens=4
    )
    assert answer.choices[0].finish_reason in ("length", "stop")


@blocking
def chat_tool_calls_streamed(client: OpenAI) -> None:
    with client.chat.completions.stream(**asking_for_calls(WRITTEN_CALL, WRITTEN_CALL)) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        [choice] = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    assert_calls_oslo(choice.message.tool_calls)
    assert choice.message.tool_calls is not None
    assert len({each.id for each in choice.message.tool_calls}) == 2
    assert [(event.index, event.name) for event in done] == [(0, "weather"), (1, "weather")]


@blocking
def chat_tool_calls_asked_for(client: OpenAI) -> None:
    arguments: Any = {"model": model(), "messages": MESSAGES, "tools": TOOLS, "max_tokens": 300}
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for asked in ("required", named):
        answer = client.chat.completions.create(tool_choice=asked, parallel_tool_calls=False, **arguments)
        [choice] = answer.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert choice.message.tool_calls is not None
        assert len(choice.message.tool_calls) == 1
        assert_calls_oslo(choice.message.tool_calls)


@blocking
def chat_tool_calls_parsed(client: OpenAI) -> None:
    """The package's own way to read arguments."""
    strict: Any = [{"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}]
    answer = client.chat.completions.parse(
        model=model(),
        messages=MESSAGES,
        tools=strict,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].function.parsed_arguments == {"city": "Oslo"}


@blocking
def request_ids_are_echoed(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=model(), messages=MESSAGES, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert answer._request_id == "mine-1"


# Errors.


@blocking
def error_unknown_model(client: OpenAI) -> None:
    error = refused(openai.NotFoundError, lambda: client.completions.create(model="gpt-9", prompt="a"), "model")
    assert error.code == "model_not_found"


@blocking
def error_bad_value(client: OpenAI) -> None:
    refused(
        openai.BadRequestError,
        lambda: client.chat.completions.create(model=model(), messages=MESSAGES, temperature=-1),
        "temperature",
    )


@blocking
def error_context_length(client: OpenAI) -> None:
    error = refused(
        openai.BadRequestError,
        lambda: client.completions.create(model=model(), prompt="night and day " * 20_000),
        "prompt",
    )
    assert error.code == "context_length_exceeded"


@blocking
def error_unsupported_content(client: OpenAI) -> None:
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]
    refused(
        openai.BadRequestError,
        lambda: client.chat.completions.create(model=model(), messages=image),
        "messages[0].content",
    )


@blocking
def error_unknown_path(client: OpenAI) -> None:
    refused(openai.NotFoundError, lambda: client.embeddings.create(model=model(), input="a"), None)


# Asynchronous use.


@call
async def async_chat(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=model(), messages=MESSAGES, max_tokens=4)
    assert answer.choices[0].message.content is not None


@call
async def async_stream(client: AsyncOpenAI) -> None:
    stream = await client.completions.create(model=model(), prompt=PROMPT, max_tokens=8, stream=True)
    assert len([chunk async for chunk in stream]) >= 2


@call
async def async_sixteen_at_once(client: AsyncOpenAI) -> None:
    arguments: dict[str, Any] = {"model": model(), "max_tokens": 8, "temperature": 0}
    prompts = [f"{PROMPT} number {position}" for position in range(8)] * 2
    answers = await asyncio.gather(*(client.completions.create(prompt=prompt, **arguments) for prompt in prompts))
    texts = [answer.choices[0].text for answer in answers]
    assert texts[:8] == texts[8:]


@call
async def timeout_is_typed(client: AsyncOpenAI) -> None:
    try:
        await client.with_options(timeout=openai.Timeout(0.001)).completions.create(
            model=model(), prompt=PROMPT, max_tokens=500, extra_body={"ignore_eos": True}
        )
    except openai.APITimeoutError:
        return
    raise AssertionError("no APITimeoutError")


@call
async def cancelled_request(client: AsyncOpenAI) -> None:
    create = client.completions.create(model=model(), prompt=PROMPT, max_tokens=900, extra_body={"ignore_eos": True})
    task = asyncio.create_task(create)
    await until_running(1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until_running(0)


@call
async def abandoned_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=model(), messages=MESSAGES, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(stream)
    await until_running(1)
    await stream.close()
    await until_running(0)


async def until_running(count: int) -> None:
    """Waits until the router serves so many requests."""
    async with asyncio.timeout(30):
        while True:
            metrics = await asyncio.to_thread(scrape)
            if f"\nhma_router_running_requests {count:.1f}\n" in metrics:
                return
            await asyncio.sleep(0.02)


def scrape() -> str:
    with urllib.request.urlopen(f"{URL}/metrics", timeout=30) as response:
        text: str = response.read().decode()
        return text


async def main() -> None:
    for name, run in CALLS.items():
        error = None
        try:
            await run()
        except Exception:
            error = traceback.format_exc()[-2000:]
        print(json.dumps({"call": name, "error": error}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
