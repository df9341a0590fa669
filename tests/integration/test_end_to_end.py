"""The product in one sentence, proven: a prompt goes router, prefill, per-layer KV, decode, and exact tokens come back.

Real processes, real etcd, real gRPC. In fp32 the greedy tokens must be those of transformers (profile f32) and those of
an in-process reference that quantises in the same way (profile tt_bfp8), whatever the prefill chunk size.
"""

import asyncio
import random
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
import torch
import transformers

from hma_serve.checkpoint import resolve_checkpoint
from hma_serve.client import AsyncClient
from hma_serve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from support.cluster import Cluster, running_cluster
from support.reference import reference_generate

LENGTHS = [1, 2, 5, 17, 31, 32, 33, 34, 63, 64, 65, 96, 97, 130, 200, 257, 320, 411, 513, 600]
NEW_TOKENS = 12
IN_FLIGHT = 8
PREFILLED = "tokens_total"
RECEIVED = "kv_received_bytes_total"


def prompts() -> list[list[int]]:
    """Twenty prompts of 1 to 600 tokens: a text of the model's own tokenizer, cut at seeded places."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_checkpoint("demo"))
    text = (Path(__file__).parents[1] / "golden" / "text" / "sample.txt").read_text()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    draw = random.Random(7)
    starts = [draw.randrange(len(ids) - length) for length in LENGTHS]
    return [ids[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


async def complete_all(cluster: Cluster, requests: Sequence[list[int]]) -> list[list[int]]:
    """Greedy completions of all prompts as token ids, at most eight in flight at once, through the HTTP API."""
    gate = asyncio.Semaphore(IN_FLIGHT)

    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:

        async def complete(prompt: list[int]) -> list[int]:
            body = {
                "prompt": prompt,
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            async with gate:
                response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            answer = response.json()
            assert answer["usage"]["prompt_tokens"] == len(prompt)
            ids: list[int] = answer["choices"][0]["token_ids"]
            return ids

        return list(await asyncio.gather(*map(complete, requests)))


def packed(requests: Sequence[list[int]]) -> int:
    """Tokens that prefill must have computed for these prompts."""
    return sum((len(prompt) - 1) // 32 * 32 for prompt in requests)


@pytest.fixture(scope="module")
def exact_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("exact")
    with running_cluster(directory, "--prefill-profile", "f32", "--dtype", "float32") as cluster:
        yield cluster


async def test_greedy_tokens_equal_those_of_transformers(exact_cluster: Cluster) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(resolve_checkpoint("demo"), dtype=torch.float32)
    expected = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        expected.append(out[0, len(prompt) :].tolist())
    computed = exact_cluster.metric("prefill", PREFILLED)
    received = exact_cluster.metric("decode", RECEIVED)
    assert await complete_all(exact_cluster, prompts()) == expected
    # The prompts' KV really came from prefill, every byte of it.
    assert exact_cluster.metric("prefill", PREFILLED) - computed == packed(prompts())
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert exact_cluster.metric("decode", RECEIVED) - received == packed(prompts()) * per_token


@pytest.mark.parametrize("chunk", [64, 512])
async def test_quantised_prefill_equals_the_reference_at_any_chunk_size(chunk: int, tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint("demo")
    expected = [reference_generate(checkpoint, "tt_bfp8", prompt, NEW_TOKENS) for prompt in prompts()]
    arguments = ["--prefill-profile", "tt_bfp8", "--dtype", "float32", f"--prefill-arg=--chunk-tokens={chunk}"]
    # Otherwise this test could not tell whether anything was quantised.
    assert expected != [reference_generate(checkpoint, "f32", prompt, NEW_TOKENS) for prompt in prompts()]
    with running_cluster(tmp_path, *arguments) as cluster:
        assert await complete_all(cluster, prompts()) == expected


async def test_grpc_and_http_give_the_same_text(exact_cluster: Cluster) -> None:
    body = {"prompt": "The old house stood on the hill, and", "max_tokens": 16, "temperature": 0}
    async with httpx.AsyncClient(base_url=exact_cluster.url, timeout=60) as client:
        text = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
    request = inference_pb2.GenerateRequest(text=str(body["prompt"]))
    request.sampling.temperature = 0
    request.stop.max_tokens = 16
    async with grpc.aio.insecure_channel(exact_cluster.grpc_address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60)
        events = [event async for event in call]
    assert events[0].WhichOneof("event") == "started"
    assert events[-1].WhichOneof("event") == "finished"
    assert events[-1].finished.usage.completion_tokens == 16
    assert "".join(event.delta.text for event in events) == text


Answer = list[tuple[list[int], str, list[list[float]]]]
"""Per completion its tokens, why it ended, and each token's logprob, followed by those of the likeliest."""


async def by_http(cluster: Cluster, prompt: list[int], options: dict[str, Any]) -> Answer:
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        response = await client.post("/v1/completions", json=options | {"prompt": prompt, "return_token_ids": True})
    assert response.status_code == 200, response.text
    answer = []
    for choice in response.json()["choices"]:
        given = choice["logprobs"] or {"token_logprobs": [], "top_logprobs": []}
        # HTTP gives the token itself, too, where it is not among the likeliest.
        tops = [sorted(top.values(), reverse=True)[: options["logprobs"]] for top in given["top_logprobs"]]
        logprobs = [[chosen, *top] for chosen, top in zip(given["token_logprobs"], tops, strict=True)]
        answer.append((choice["token_ids"], choice["finish_reason"], logprobs))
    return answer


async def by_grpc(cluster: Cluster, prompt: list[int], options: dict[str, Any]) -> Answer:
    stop = {name: options[name] for name in options if name in common_pb2.StopConditions.DESCRIPTOR.fields_by_name}
    sampling = {name: options[name] for name in options if name in common_pb2.SamplingParams.DESCRIPTOR.fields_by_name}
    request = inference_pb2.GenerateRequest(
        token_ids=common_pb2.TokenIds(ids=prompt),
        n=options.get("n", 1),
        stop=common_pb2.StopConditions(**stop),
        sampling=common_pb2.SamplingParams(**sampling),
    )
    answer: Answer = [([], "", []) for _ in range(max(1, request.n))]
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        async for event in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60):
            delta, end = event.delta, event.finished
            answer[delta.index][0].extend(delta.token_ids)
            for each in delta.logprobs:
                answer[delta.index][2].append([each.chosen.logprob, *(top.logprob for top in each.top)])
            if event.HasField("finished"):
                reason = common_pb2.FinishReason.Name(end.reason).removeprefix("FINISH_REASON_").lower()
                answer[end.index] = (answer[end.index][0], reason, answer[end.index][2])
    return answer


async def by_sdk(cluster: Cluster, prompt: list[int], options: dict[str, Any]) -> Answer:
    async with AsyncClient(cluster.grpc_address) as client:
        completion = await client.generate(prompt, **options).result()
    return [
        (
            list(choice.token_ids),
            choice.finish_reason,
            [[each.chosen.logprob, *(top.logprob for top in each.top)] for each in choice.logprobs],
        )
        for choice in completion.choices
    ]


async def test_every_option_means_the_same_at_every_door(exact_cluster: Cluster) -> None:
    async def ask(**options: Any) -> Answer:
        answer, *others = [await door(exact_cluster, prompt, options) for door in (by_http, by_grpc, by_sdk)]
        for other in others:
            assert [each[:2] for each in other] == [each[:2] for each in answer]
            for (*_, theirs), (*_, ours) in zip(other, answer, strict=True):
                assert list(chain(*theirs)) == pytest.approx(list(chain(*ours)), abs=1e-4)
        return answer

    prompt = prompts()[13]
    ((free, _, _),) = await ask(max_tokens=12, temperature=0.0, ignore_eos=True)
    # A token that the text has said before the fifth is where it may end, and must not end before the sixth.
    end = free[3]
    ((stopped, reason, _),) = await ask(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=[end])
    assert (stopped, reason) == (free[: free.index(end)], "stop")
    ((later, _, _),) = await ask(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=[end], min_tokens=6)
    assert len(later) >= 6
    assert end not in later
    # Whatever the model would say, the end of the text is likelier: unless it is ignored, nothing is said.
    ends = {"max_tokens": 5, "temperature": 0.0, "logit_bias": {0: 100.0}}
    assert await ask(**ends) == [([], "stop", [])]
    assert await ask(**ends, ignore_eos=True) == [([0] * 5, "length", [])]
    several = await ask(max_tokens=6, temperature=0.9, seed=5, n=3, logprobs=4, ignore_eos=True)
    assert len({tuple(tokens) for tokens, *_ in several}) == 3
    for tokens, reason, logprobs in several:
        assert (len(tokens), reason) == (6, "length")
        for chosen, *top in logprobs:
            assert len(top) == 4
            assert top == sorted(top, reverse=True)
            assert chosen <= top[0]


async def test_a_streamed_answer_equals_the_whole_one(exact_cluster: Cluster) -> None:
    body = {"prompt": "Whan that Aprille", "max_tokens": 24, "temperature": 0.8, "seed": 11}
    async with httpx.AsyncClient(base_url=exact_cluster.url, timeout=60) as client:
        whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [httpx.Response(200, text=line.removeprefix("data: ")).json() for line in lines[:-1]]
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == whole
    assert len(events) > 2


async def test_the_smallest_requests_and_a_bad_one_in_between(exact_cluster: Cluster) -> None:
    async with httpx.AsyncClient(base_url=exact_cluster.url, timeout=60) as client:
        for body, status in (
            ({"prompt": [5], "max_tokens": 1}, 200),
            ({"prompt": [5] * 33, "max_tokens": 1}, 200),
            ({"prompt": [10**6], "max_tokens": 1}, 400),
            ({"prompt": [5] * 5000}, 400),
            ({"prompt": "again", "max_tokens": 1}, 200),
        ):
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == status, response.text
            if status == 200:
                assert response.json()["usage"]["completion_tokens"] == 1
