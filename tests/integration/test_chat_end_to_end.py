"""Chat through a whole cluster: HTTP, the SDK and the terminal say what the model says to the rendered conversation."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
import transformers

from hma_serve.checkpoint import resolve_checkpoint
from hma_serve.client import AsyncClient, Client, InvalidArgument, Structure
from support.cluster import Cluster, command, environment, running_cluster

MESSAGES: list[Any] = [
    {"role": "system", "content": "You are a storyteller."},
    {"role": "user", "content": "It was a dark and stormy night; what happened then?"},
    {"role": "assistant", "content": "The rain fell in torrents."},
    {"role": "user", "content": "Go on."},
]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("chat")) as found:
        yield found


def post(cluster: Cluster, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(cluster.url + path, json={"max_tokens": NEW_TOKENS, "temperature": 0, **body}, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_chat_continues_what_transformers_renders(cluster: Cluster) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_checkpoint("demo"))
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    expected = post(cluster, "/v1/completions", prompt=ids)["choices"][0]["text"]
    answer = post(cluster, "/v1/chat/completions", messages=MESSAGES, return_token_ids=True)
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["choices"][0]["prompt_token_ids"] == ids
    assert answer["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_says_what_did_not_need_to_be_computed(cluster: Cluster, path: str) -> None:
    story = f"Tell {path} again of the whale that rose from the sea, and of the captain. " * 4
    asked = {"prompt": story} if path == "/v1/completions" else {"messages": [{"role": "user", "content": story}]}
    first, second = (post(cluster, path, **asked) for _ in range(2))
    tokens = first["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 32
    # All whole groups of 32 tokens but for the last token, which decode computes.
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == (tokens - 1) // 32 * 32
    assert second["choices"] == first["choices"]


SCHEMA = {
    "type": "object",
    "properties": {"who": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["who", "n"],
    "additionalProperties": False,
}


def test_an_answer_follows_the_schema_it_was_asked_for(cluster: Cluster) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA}}
    body = {"messages": MESSAGES, "response_format": wanted, "temperature": 1.0, "max_tokens": 200, "n": 3, "seed": 7}
    answer = post(cluster, "/v1/chat/completions", **body, logprobs=True)
    for choice in answer["choices"]:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert choice["finish_reason"] == "stop"
        assert choice["logprobs"]["content"]
    again = post(cluster, "/v1/chat/completions", **body)
    assert [choice["message"] for choice in again["choices"]] == [choice["message"] for choice in answer["choices"]]
    # A stop string ends a text as ever, and leaves its beginning.
    cut = post(cluster, "/v1/chat/completions", **body, stop=[","])
    assert cut["choices"][0]["message"]["content"] == answer["choices"][0]["message"]["content"].partition(",")[0]


def test_a_schema_that_cannot_be_followed_is_the_clients_fault(cluster: Cluster) -> None:
    body = {"prompt": "x" * 200, "guided_json": {"type": "array", "uniqueItems": True}}
    response = httpx.post(cluster.url + "/v1/completions", json=body, timeout=60)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert "uniqueItems" in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "guided_json")


def test_every_way_to_ask_for_a_form(cluster: Cluster) -> None:
    assert post(cluster, "/v1/completions", prompt="It", guided_choice=["yes", "no"])["choices"][0]["text"] in (
        "yes",
        "no",
    )
    text = post(cluster, "/v1/completions", prompt="It", structured_outputs={"regex": "[a-c]{4}"})["choices"][0]["text"]
    assert re.fullmatch("[a-c]{4}", text)
    with Client(cluster.grpc_address) as client:
        completion = client.generate("A", max_tokens=99, structure=Structure.choice(["left", "right"])).result()
        assert completion.text in ("left", "right")
        with pytest.raises(InvalidArgument, match="unclosed group"):
            client.generate("A", max_tokens=9, structure=Structure.regex("(a")).result()


async def test_the_sdk_gets_the_same_answer(cluster: Cluster) -> None:
    expected = post(cluster, "/v1/chat/completions", messages=MESSAGES)["choices"][0]["message"]["content"]
    async with AsyncClient(cluster.grpc_address) as client:
        completion = await client.chat(MESSAGES, max_tokens=NEW_TOKENS, temperature=0).result()
    assert completion.text == expected


def test_the_blocking_sdk_streams_it(cluster: Cluster) -> None:
    with Client(cluster.grpc_address) as client, client.chat(MESSAGES, max_tokens=NEW_TOKENS, temperature=0) as stream:
        pieces = [delta.text for delta in stream]
        assert "".join(pieces) == stream.text
        assert stream.usage is not None
        assert stream.usage.completion_tokens <= NEW_TOKENS
    assert len(pieces) > 1


def test_the_terminal_talks(cluster: Cluster) -> None:
    expected = post(cluster, "/v1/chat/completions", messages=MESSAGES[1:2])["choices"][0]["message"]["content"]
    flags = ["--address", cluster.grpc_address, "--max-tokens", str(NEW_TOKENS), "--temperature", "0"]
    result = subprocess.run(
        command("chat", *flags),
        input=MESSAGES[1]["content"] + "\n",
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == expected.strip()
