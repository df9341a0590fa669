"""The OpenAI API over fake workers: real HTTP, real gRPC, no model."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hma_serve.core.errors import ERRORS, InvalidArgument
from hma_serve.router.config import RouterConfig
from hma_serve.router.http.openai_errors import HTTP_STATUSES
from support.fake_workers import EOS, MODEL_NAME, VOCAB, WINDOW
from support.metrics import counted
from support.router_stack import JSON, MAX_BODY, Stack, assert_error, running_stack

LONG = "It was a dark and stormy night, and the rain fell in torrents. "


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with running_stack() as found:
        yield found


async def test_a_long_prompt_goes_through_both_workers(stack: Stack) -> None:
    answer = await stack.complete(prompt=LONG, max_tokens=20, model=MODEL_NAME)
    [choice] = answer["choices"]
    assert choice["text"] == LONG[:20]
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == len(LONG)
    assert answer["usage"]["completion_tokens"] == 20
    [prefill], [decode] = stack.prefill.calls, stack.decode.calls
    assert len(prefill.token_ids) == decode.packed_tokens == 32
    assert decode.offer.producer_instance == stack.prefill.info.instance
    assert decode.context.epoch == prefill.context.epoch == 1
    assert decode.context.request_id == prefill.context.request_id
    for worker in (stack.prefill, stack.decode):
        # As seconds that are left: the worker's clock may be another.
        assert not worker.calls[0].context.HasField("deadline")
        [left] = worker.seconds_left
        assert left is not None
        # gRPC may round a timeout of this length up to the next second.
        assert 0 < left <= RouterConfig(registry="-").request_timeout + 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_a_cache_held_of_a_prompt_counts_once(stack: Stack, streamed: bool) -> None:
    stack.decode.present_tokens = 32
    body = {"prompt": [LONG, LONG[::-1]], "n": 3, "max_tokens": 2}
    if streamed:
        usage = (await stack.stream(**body, stream_options={"include_usage": True}))[-1]["usage"]
    else:
        usage = (await stack.complete(**body))["usage"]
    assert usage["prompt_tokens"] == 2 * len(LONG)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2 * 32}


async def test_a_short_prompt_needs_decode_alone(stack: Stack) -> None:
    await stack.complete(prompt="short")
    assert stack.prefill.calls == []
    assert stack.decode.calls[0].packed_tokens == 0
    assert not stack.decode.calls[0].HasField("offer")


async def test_max_tokens_1_and_a_one_token_prompt(stack: Stack) -> None:
    answer = await stack.complete(prompt=[65], max_tokens=1)
    assert answer["choices"][0]["text"] == stack.text([65])


async def test_the_default_length_is_openais_and_fits_the_window(stack: Stack) -> None:
    assert (await stack.complete(prompt="a"))["usage"]["completion_tokens"] == 16
    assert (await stack.complete(prompt="a" * (WINDOW - 3)))["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("streamed", [False, True])
async def test_prompts_in_every_form_give_the_same(stack: Stack, streamed: bool) -> None:
    text = "héllo wörld"
    ids = stack.pipeline.completions.model.tokenizer.encode(text)
    for prompt in (text, ids, [text], [ids]):
        body = {"prompt": prompt, "max_tokens": len(ids), "return_token_ids": True}
        if not streamed:
            [choice] = (await stack.complete(**body))["choices"]
            assert (choice["text"], choice["token_ids"], choice["prompt_token_ids"]) == (text, ids, ids)
            continue
        choices = [choice for chunk in await stack.stream(**body) for choice in chunk["choices"]]
        assert "".join(choice["text"] for choice in choices) == text
        assert [token for choice in choices for token in choice.get("token_ids", [])] == ids
        assert [choice["prompt_token_ids"] for choice in choices if "prompt_token_ids" in choice] == [ids]


async def test_several_prompts_and_copies_are_numbered_in_order(stack: Stack) -> None:
    answer = await stack.complete(prompt=["ab", "cd"], n=2, max_tokens=2, seed=7)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "ab"),
        (1, "ab"),
        (2, "cd"),
        (3, "cd"),
    ]
    assert sorted(call.sampling.seed for call in stack.decode.calls) == [7, 7, 8, 8]
    assert len({call.context.request_id for call in stack.decode.calls}) == 4
    chunks = await stack.stream(prompt=["ab", "cd"], n=2, max_tokens=2)
    for index, text in enumerate(["ab", "ab", "cd", "cd"]):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == text
        assert [choice["finish_reason"] for choice in own][-1] == "length"


async def test_a_stream_has_usage_when_asked_for(stack: Stack) -> None:
    plain = await stack.stream(prompt="abc", max_tokens=3)
    assert all("usage" not in chunk for chunk in plain)
    *chunks, last = await stack.stream(prompt="abc", max_tokens=3, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 6
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stack.stream(prompt="abc", max_tokens=3, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("per_message", [1, 3, 100])
async def test_a_stop_string_ends_the_text_and_frees_the_workers(stack: Stack, per_message: int) -> None:
    stack.decode.per_message = per_message
    body = {"prompt": "one STOP two ", "max_tokens": 400, "return_token_ids": True, "stop": ["nothing", "STOP"]}
    answer = await stack.complete(**body)
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", "STOP")
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"] == len("one STOP")
    await stack.decode.until_idle()
    chunks = await stack.stream(**body)
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "one "
    kept = await stack.complete(**body, include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == "one STOP"
    later = await stack.complete(**body, min_tokens=9)
    assert later["choices"][0]["text"] == "one STOP two one "


async def test_stop_conditions_of_decode_reach_it(stack: Stack) -> None:
    stack.decode.eos_after = 2
    answer = await stack.complete(prompt="abc", max_tokens=3, stop_token_ids=[5], min_tokens=1, stop=None)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == EOS
    assert answer["usage"]["completion_tokens"] == 2
    assert (await stack.complete(prompt="abc", max_tokens=3, ignore_eos=True))["usage"]["completion_tokens"] == 3
    first, second = stack.decode.calls
    assert list(first.stop.stop_token_ids) == [5]
    assert first.stop.min_tokens == 1
    assert second.stop.ignore_eos
    await stack.complete(prompt="abc", max_tokens=3, stop="x")
    assert list(stack.decode.calls[-1].stop.stop_strings) == []


async def test_sampling_parameters_reach_decode(stack: Stack) -> None:
    await stack.complete(
        prompt="a", temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, seed=2**64 - 1, logit_bias={"3": -100}
    )
    sampling = stack.decode.calls[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 7, 0.125)
    assert sampling.seed == 2**64 - 1
    assert dict(sampling.logit_bias) == {3: -100.0}
    await stack.complete(prompt="a", temperature=None, top_k=-1, seed=None, stop=None, n=None, stream=None, model=None)
    sampling = stack.decode.calls[1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    # One is drawn, so that the answer can go on on another worker.
    await stack.complete(prompt="a", temperature=None)
    assert stack.decode.calls[2].sampling.seed != sampling.seed > 0


async def test_logprobs_come_in_openais_shape(stack: Stack) -> None:
    answer = await stack.complete(prompt="ab", max_tokens=2, logprobs=1)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5}, {"b": -0.5}],
        "text_offset": [0, 1],
    }
    alone = await stack.complete(prompt="ab", max_tokens=2, logprobs=0)
    assert alone["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5}, {"b": -0.5}]
    chunks = await stack.stream(prompt="ab", max_tokens=2, logprobs=1)
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:2]] == [[0], [1]]


async def test_echo_begins_with_the_prompt(stack: Stack) -> None:
    assert (await stack.complete(prompt="abc", max_tokens=2, echo=True))["choices"][0]["text"] == "abcab"
    chunks = await stack.stream(prompt="abc", max_tokens=2, echo=True)
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "abcab"


async def test_a_character_is_never_split_over_chunks(stack: Stack) -> None:
    text = "🇩🇪漢字é"
    chunks = await stack.stream(prompt=text, max_tokens=len(text.encode()))
    assert [choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["text"]] == list(text)


async def test_unknown_fields_are_tolerated(stack: Stack) -> None:
    assert await stack.complete(prompt="a", user="someone", foo={"bar": [1]})


async def test_objectives_travel_with_the_request(stack: Stack) -> None:
    headers = {"x-hma-slo-ttft-ms": "250000", "x-llm-d-slo-tpot-ms": "20.5", "X-Request-Id": "job-7"}
    response = await stack.client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert response.headers["X-Request-Id"] == "job-7"
    context = stack.decode.calls[0].context
    # What is left of the time to the first token.
    assert 0 < context.slo.ttft_seconds < 250
    assert context.slo.tpot_seconds == 0.0205
    assert context.client_request_id == "job-7"
    assert "job-7" not in context.request_id


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é"])
async def test_an_unfit_request_id_is_replaced(stack: Stack, given: str) -> None:
    response = await stack.client.get("/health", headers={"X-Request-Id": given})
    assert response.headers["X-Request-Id"] not in ("", given)


# What is refused. The message is for people, so only the rest is pinned.
REFUSED: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("no prompt", {}, 400, "invalid_argument", "prompt"),
    ("null prompt", {"prompt": None}, 400, "invalid_argument", "prompt"),
    ("empty text", {"prompt": ""}, 400, "invalid_argument", "prompt"),
    ("empty list", {"prompt": []}, 400, "invalid_argument", "prompt"),
    ("empty ids", {"prompt": [[]]}, 400, "invalid_argument", "prompt"),
    ("one of many empty", {"prompt": ["a", ""]}, 400, "invalid_argument", "prompt"),
    ("number prompt", {"prompt": 5}, 400, "invalid_argument", "prompt"),
    ("object prompt", {"prompt": {"a": 1}}, 400, "invalid_argument", "prompt"),
    ("mixed prompt", {"prompt": [1, "a"]}, 400, "invalid_argument", "prompt"),
    ("text and ids", {"prompt": ["a", 1]}, 400, "invalid_argument", "prompt"),
    ("boolean id", {"prompt": [1, True]}, 400, "invalid_argument", "prompt"),
    ("fractional id", {"prompt": [1, 2.5]}, 400, "invalid_argument", "prompt"),
    ("negative id", {"prompt": [1, -1]}, 400, "invalid_argument", "prompt"),
    ("unknown id", {"prompt": [VOCAB]}, 400, "invalid_argument", "prompt"),
    ("huge id", {"prompt": [2**70]}, 400, "invalid_argument", "prompt"),
    ("deep ids", {"prompt": [[[1]]]}, 400, "invalid_argument", "prompt"),
    ("lone surrogate", {"prompt": "a\ud800"}, 400, "invalid_argument", "prompt"),
    ("too many prompts", {"prompt": ["a"] * 33}, 400, "invalid_argument", "prompt"),
    ("too many copies", {"prompt": ["a"] * 17, "n": 2}, 400, "invalid_argument", "n"),
    ("too long", {"prompt": "a" * WINDOW}, 400, "context_length_exceeded", "prompt"),
    ("no room", {"prompt": "a" * 500, "max_tokens": 13}, 400, "context_length_exceeded", "max_tokens"),
    ("unknown model", {"prompt": "a", "model": "gpt-9"}, 404, "model_not_found", "model"),
    ("odd model", {"prompt": "a", "model": 7}, 400, "invalid_argument", "model"),
    ("surrogate model", {"prompt": "a", "model": "\udc00"}, 400, "invalid_argument", "model"),
    ("zero max_tokens", {"prompt": "a", "max_tokens": 0}, 400, "invalid_argument", "max_tokens"),
    ("negative max_tokens", {"prompt": "a", "max_tokens": -1}, 400, "invalid_argument", "max_tokens"),
    ("huge max_tokens", {"prompt": "a", "max_tokens": 10**30}, 400, "invalid_argument", "max_tokens"),
    ("fractional max_tokens", {"prompt": "a", "max_tokens": 1.5}, 400, "invalid_argument", "max_tokens"),
    ("text max_tokens", {"prompt": "a", "max_tokens": "5"}, 400, "invalid_argument", "max_tokens"),
    ("boolean max_tokens", {"prompt": "a", "max_tokens": True}, 400, "invalid_argument", "max_tokens"),
    ("min above max", {"prompt": "a", "max_tokens": 1, "min_tokens": 2}, 400, "invalid_argument", "min_tokens"),
    ("min above default", {"prompt": "a", "min_tokens": 17}, 400, "invalid_argument", "min_tokens"),
    ("negative temperature", {"prompt": "a", "temperature": -0.1}, 400, "invalid_argument", "temperature"),
    ("huge temperature", {"prompt": "a", "temperature": 10**400}, 400, "invalid_argument", "temperature"),
    ("text temperature", {"prompt": "a", "temperature": "hot"}, 400, "invalid_argument", "temperature"),
    ("zero top_p", {"prompt": "a", "top_p": 0}, 400, "invalid_argument", "top_p"),
    ("top_p above 1", {"prompt": "a", "top_p": 1.1}, 400, "invalid_argument", "top_p"),
    ("top_k below -1", {"prompt": "a", "top_k": -2}, 400, "invalid_argument", "top_k"),
    ("min_p above 1", {"prompt": "a", "min_p": 2}, 400, "invalid_argument", "min_p"),
    ("negative seed", {"prompt": "a", "seed": -1}, 400, "invalid_argument", "seed"),
    ("huge seed", {"prompt": "a", "seed": 2**64}, 400, "invalid_argument", "seed"),
    ("zero n", {"prompt": "a", "n": 0}, 400, "invalid_argument", "n"),
    ("huge n", {"prompt": "a", "n": 10**9}, 400, "invalid_argument", "n"),
    ("huge logprobs", {"prompt": "a", "logprobs": 21}, 400, "invalid_argument", "logprobs"),
    ("boolean logprobs", {"prompt": "a", "logprobs": True}, 400, "invalid_argument", "logprobs"),
    ("echoed logprobs", {"prompt": "a", "logprobs": 1, "echo": True}, 400, "invalid_argument", "echo"),
    ("number stop", {"prompt": "a", "stop": 5}, 400, "invalid_argument", "stop"),
    ("mixed stop", {"prompt": "a", "stop": ["a", 5]}, 400, "invalid_argument", "stop"),
    ("empty stop", {"prompt": "a", "stop": [""]}, 400, "invalid_argument", "stop"),
    ("many stops", {"prompt": "a", "stop": ["a"] * 17}, 400, "invalid_argument", "stop"),
    ("long stop", {"prompt": "a", "stop": "a" * 1025}, 400, "invalid_argument", "stop"),
    ("odd stop ids", {"prompt": "a", "stop_token_ids": "abc"}, 400, "invalid_argument", "stop_token_ids"),
    ("unknown stop id", {"prompt": "a", "stop_token_ids": [VOCAB]}, 400, "invalid_argument", "stop_token_ids"),
    ("odd bias", {"prompt": "a", "logit_bias": [1]}, 400, "invalid_argument", "logit_bias"),
    ("odd bias key", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "invalid_argument", "logit_bias"),
    ("odd bias value", {"prompt": "a", "logit_bias": {"3": "x"}}, 400, "invalid_argument", "logit_bias"),
    ("unknown bias key", {"prompt": "a", "logit_bias": {str(VOCAB): 1}}, 400, "invalid_argument", "logit_bias"),
    ("huge bias", {"prompt": "a", "logit_bias": {"1": 101}}, 400, "invalid_argument", "logit_bias"),
    ("text stream", {"prompt": "a", "stream": "yes"}, 400, "invalid_argument", "stream"),
    ("odd options", {"prompt": "a", "stream": True, "stream_options": 1}, 400, "invalid_argument", "stream_options"),
    (
        "lone options",
        {"prompt": "a", "stream": False, "stream_options": {"a": 1}},
        400,
        "invalid_argument",
        "stream_options",
    ),
]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
async def test_a_bad_field_is_refused_by_name(
    stack: Stack, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    for streamed in (False, True):
        response = await stack.client.post("/v1/completions", json={"stream": streamed} | body)
        await assert_error(response, status, code, param)
    assert stack.decode.calls == []
    assert await stack.complete(prompt="the next one works")


BROKEN: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("not json", b"prompt=hello"),
    ("cut off", b'{"prompt": "a'),
    ("trailing", b'{"prompt": "a"} {}'),
    ("array", b"[1]"),
    ("string", b'"a"'),
    ("null", b"null"),
    ("nan", b'{"prompt": "a", "temperature": NaN}'),
    ("infinity", b'{"prompt": "a", "temperature": -Infinity}'),
    ("not utf-8", b'{"prompt": "\xff"}'),
    ("utf-16", '{"prompt": "a"}'.encode("utf-16")),
    ("deep arrays", b"[" * 30_000),
    ("deep objects", b'{"prompt":' * 5_000),
    ("endless digits", b'{"prompt": "a", "seed": ' + b"9" * 6_000 + b"}"),
]


@pytest.mark.parametrize("body", [case[1] for case in BROKEN], ids=[case[0] for case in BROKEN])
async def test_a_broken_body_is_refused(stack: Stack, body: bytes) -> None:
    response = await stack.client.post("/v1/completions", data=body, headers=JSON)
    await assert_error(response, 400, "invalid_argument", None)
    assert await stack.complete(prompt="the next one works")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty; it must be a JSON object"),
        (b" \r\n", "the body is empty; it must be a JSON object"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens must be between 1 and the model's window, not 0"),
        (
            b'{"prompt": ' + json.dumps(["a"] * 5_000).encode() + b"}",
            "a request may ask for 1 to 32 completions, prompts times n, not 5000",
        ),
    ],
    ids=["empty", "blank", "no tokens", "prompts"],
)
async def test_what_a_first_mistake_is_told(stack: Stack, body: bytes, message: str) -> None:
    response = await stack.client.post("/v1/completions", data=body, headers=JSON)
    assert (await response.json())["error"]["message"] == message


async def test_overflowing_floats_are_out_of_range(stack: Stack) -> None:
    body = b'{"prompt": "a", "temperature": 1e999}'
    await assert_error(
        await stack.client.post("/v1/completions", data=body, headers=JSON), 400, "invalid_argument", "temperature"
    )


async def test_wrong_paths_methods_and_types_are_error_objects(stack: Stack) -> None:
    await assert_error(await stack.client.get("/v1/nothing"), 404, "unknown_url", None)
    await assert_error(await stack.client.get("/"), 404, "unknown_url", None)
    response = await stack.client.get("/v1/completions")
    await assert_error(response, 405, "method_not_allowed", None)
    assert response.headers["Allow"] == "POST"
    await assert_error(await stack.client.delete("/v1/models"), 405, "method_not_allowed", None)
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        response = await stack.client.post("/v1/completions", data=b'{"prompt": "a"}', headers=headers)
        await assert_error(response, 415, "unsupported_media_type", None)
    response = await stack.client.post("/v1/completions", data=b"{}", headers=JSON | {"Content-Encoding": "gzip"})
    await assert_error(response, 415, "unsupported_media_type", None)


def test_the_documented_codes_of_http_are_those_that_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE)
    assert rows == [(code, str(status)) for code, status in HTTP_STATUSES.items()]
    assert not HTTP_STATUSES.keys() & ERRORS.keys()


async def test_an_expectation_that_cannot_be_met_is_refused(stack: Stack) -> None:
    headers = JSON | {"Expect": "magic"}
    response = await stack.client.post("/v1/completions", data=b'{"prompt": "a"}', headers=headers)
    assert response.status == 417
    assert response.headers["X-Request-Id"]


async def test_an_oversized_body_is_refused_whether_announced_or_not(stack: Stack) -> None:
    body = json.dumps({"prompt": "a" * MAX_BODY}).encode()
    await assert_error(
        await stack.client.post("/v1/completions", data=body, headers=JSON), 413, "payload_too_large", None
    )

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 4096):
            yield body[start : start + 4096]

    response = await stack.client.post("/v1/completions", data=chunks(), headers=JSON)
    await assert_error(response, 413, "payload_too_large", None)


async def test_a_body_that_never_ends_is_given_up(stack: Stack) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        await asyncio.sleep(30)

    response = await stack.client.post("/v1/completions", data=trickle(), headers=JSON)
    await assert_error(response, 408, "deadline_exceeded", None)


@pytest.mark.parametrize("name", ["x-hma-slo-ttft-ms", "x-llm-d-slo-tpot-ms"])
@pytest.mark.parametrize("value", ["soon", "-5", "0", "nan", "inf"])
async def test_an_odd_objective_is_refused_by_its_header_and_in_its_unit(stack: Stack, name: str, value: str) -> None:
    response = await stack.client.post("/v1/completions", json={"prompt": "a"}, headers={name: value})
    await assert_error(response, 400, "invalid_argument", name)
    assert "milliseconds, 0.001 or more" in (await response.json())["error"]["message"]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_regex": None}, "response_format"),
        ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "(a"}}, "structured_outputs"),
    ],
)
async def test_a_structure_that_decode_refuses_is_named_as_it_was_sent(
    stack: Stack, body: dict[str, Any], name: str
) -> None:
    stack.decode.fail_after, stack.decode.failure = 0, InvalidArgument("it cannot be followed", field="structure")
    for stream in (False, True):
        response = await stack.client.post("/v1/completions", json={"prompt": "a", "stream": stream} | body)
        await assert_error(response, 400, "invalid_argument", name)


async def test_so_is_one_that_decode_cannot_go_on_with(stack: Stack) -> None:
    stack.decode.fail_after, stack.decode.failure = 2, InvalidArgument("it cannot be followed", field="structure")
    body = {"prompt": "a", "stream": True, "max_tokens": 8, "guided_regex": "a+"}
    response = await stack.client.post("/v1/completions", json=body)
    assert response.status == 200
    *_, last, done = (await response.text()).strip().split("\n\n")
    assert (json.loads(last.removeprefix("data: "))["error"]["param"], done) == ("guided_regex", "data: [DONE]")


UNREAD: list[tuple[str, bytes, dict[str, str]]] = [
    ("unsupported_media_type", b"{}", {"Content-Type": "text/plain"}),
    ("payload_too_large", b"a" * (MAX_BODY + 1), JSON),
    ("invalid_argument", b"{", JSON),
    ("invalid_argument", b"{}", JSON),
    ("invalid_argument", b'{"prompt": "a", "top_p": 7}', JSON),
    ("invalid_argument", b'{"prompt": "a"}', JSON | {"x-hma-slo-ttft-ms": "soon"}),
    ("invalid_argument", b'{"prompt": ""}', JSON),
    ("not_found", b'{"prompt": "a", "model": "another"}', JSON),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("outcome", "body", "headers"), UNREAD)
async def test_what_is_refused_is_counted_once_wherever_it_is(
    stack: Stack, path: str, outcome: str, body: bytes, headers: dict[str, str]
) -> None:
    sent = body.replace(b'"prompt": "a"', b'"messages": [{"role": "user", "content": "a"}]') if "chat" in path else body
    assert (await stack.client.post(path, data=sent, headers=headers)).status >= 400
    assert counted(stack.pipeline.metrics.requests) == {(outcome,): 1}


async def test_a_body_that_grows_too_large_or_comes_too_slowly_is_counted(stack: Stack) -> None:
    async def chunks(size: int) -> AsyncIterator[bytes]:
        yield b"a" * size
        await asyncio.sleep(30)

    for size in (MAX_BODY + 1, 1):
        await stack.client.post("/v1/completions", data=chunks(size), headers=JSON)
    assert counted(stack.pipeline.metrics.requests) == {("payload_too_large",): 1, ("deadline_exceeded",): 1}


async def test_newer_names_of_fields_are_refused_by_those_names(stack: Stack) -> None:
    for field, value in (("max_completion_tokens", 0), ("top_logprobs", 21)):
        body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, field: value}
        response = await stack.client.post("/v1/chat/completions", json=body)
        await assert_error(response, 400, "invalid_argument", field)


async def test_models_lists_the_served_model(stack: Stack) -> None:
    answer = await (await stack.client.get("/v1/models")).json()
    assert answer["object"] == "list"
    [model] = answer["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL_NAME, "model", WINDOW)
    assert await (await stack.client.get(f"/v1/models/{MODEL_NAME}")).json() == model
    await assert_error(await stack.client.get("/v1/models/some/other"), 404, "model_not_found", "model")


async def test_probes_and_metrics(stack: Stack) -> None:
    for path in ("/health", "/live", "/ready"):
        assert (await stack.client.get(path)).status == 200
    response = await stack.client.get("/metrics")
    assert response.content_type == "text/plain"


async def test_draining_refuses_new_requests_and_is_not_ready(stack: Stack) -> None:
    await stack.pipeline.completions.drain(1)
    await assert_error(
        await stack.client.post("/v1/completions", json={"prompt": "a"}), 503, "unavailable", None, retry=True
    )
    assert (await stack.client.get("/ready")).status == 503
    assert (await stack.client.get("/live")).status == 200


async def test_overload_is_429_and_nobody_is_503() -> None:
    async with running_stack(max_waiting=1) as stack:
        stack.decode.stall_after = 0
        limit = stack.decode.info.limits
        busy = [
            asyncio.create_task(stack.client.post("/v1/completions", json={"prompt": "a"}))
            for _ in range(limit.max_running + limit.max_waiting)
        ]
        await stack.decode.until_active(len(busy))
        two = [asyncio.create_task(stack.client.post("/v1/completions", json={"prompt": "a"})) for _ in range(2)]
        [shed], [waiting] = await asyncio.wait(two, return_when=asyncio.FIRST_COMPLETED)
        await assert_error(await shed, 429, "resource_exhausted", None, retry=True)
        assert stack.pipeline.admission.waiting == 1
        busy.append(waiting)
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        await stack.decode.until_idle()
        stack.registry.put()
        response = await stack.client.post("/v1/completions", json={"prompt": "a"})
        await assert_error(response, 503, "unavailable", None, retry=True)
        assert (await stack.client.get("/ready")).status == 503


async def test_an_unforeseen_failure_is_an_error_object_without_its_text(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(stack.pipeline.completions, "prepare", broken)
        response = await stack.client.post("/v1/completions", json={"prompt": "a"})
        assert "secret" not in await response.text()
        await assert_error(response, 500, "internal", None)
    assert await stack.complete(prompt="a")
