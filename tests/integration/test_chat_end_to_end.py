"""Chat through a whole cluster: HTTP, the SDK and the terminal say what the model says to the rendered conversation."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import transformers

from hma_serve.checkpoint import resolve_checkpoint
from hma_serve.client import AsyncClient, Client
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
