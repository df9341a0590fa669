"""The whole stack on this machine, `hma-serve up` with the demo model: one stream and many.

References run in the same call: transformers' own `generate` for one stream, one of our streams for many.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from bench.figures import Figure, figure, ratios
from hma_serve.checkpoint import resolve_checkpoint
from hma_serve.cli.up import free_port

PROMPT = "The whale rose from the sea and the captain cried out to his men. " * 8
NEW_TOKENS = 128
STREAMS = 16
REPEATS = 5


@contextmanager
def cluster(*arguments: str) -> Iterator[str]:
    """A running cluster's URL."""
    port = free_port("127.0.0.1")
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hma_serve.cli.main", "up", "--http-port", str(port), "--grpc-port", "0"),
                *("--data-dir", directory, *arguments),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("serving"):
                    break
            else:
                raise RuntimeError("the cluster did not start")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate()


async def stream(client: httpx.AsyncClient, prompt: str | list[int], tokens: int) -> list[float]:
    """One streamed completion; the moments at which its pieces came."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    moments = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                moments.append(time.perf_counter())
    return moments


async def rate(client: httpx.AsyncClient, streams: int) -> float:
    """Tokens per second of so many streams at once, prompt included in the time."""
    start = time.perf_counter()
    await asyncio.gather(*(stream(client, f"{index} {PROMPT}", NEW_TOKENS) for index in range(streams)))
    return streams * NEW_TOKENS / (time.perf_counter() - start)


def reference() -> Iterator[float]:
    """Tokens per second of transformers' greedy `generate`, with as many threads as the decode engine takes."""
    import torch
    import transformers

    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    directory = resolve_checkpoint("demo")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    tokens = transformers.AutoTokenizer.from_pretrained(directory)(f"0 {PROMPT}", return_tensors="pt")
    while True:
        start = time.perf_counter()
        model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        yield NEW_TOKENS / (time.perf_counter() - start)


async def measure(url: str) -> list[Figure]:
    """All figures, interleaved."""
    compare = reference()
    alone: list[float] = []
    many: list[float] = []
    theirs: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for repeat in range(REPEATS + 1):
            row = (await rate(client, 1), await rate(client, STREAMS), next(compare))
            if repeat:
                for kept, value in zip((alone, many, theirs), row, strict=True):
                    kept.append(value)
    return [
        figure("transformers generate, one stream", theirs, "tok/s"),
        figure("one stream, HTTP to HTTP", alone, "tok/s"),
        figure(f"{STREAMS} streams", many, "tok/s"),
        figure("one stream / transformers", ratios(alone, theirs), "x", "at least 0.7"),
        figure(f"{STREAMS} streams / one", ratios(many, alone), "x", "at least 4"),
    ]


def run() -> list[Figure]:
    """Starts a cluster and measures it."""
    with cluster() as url:
        return asyncio.run(measure(url))
