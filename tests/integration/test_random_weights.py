"""A whole cluster on random weights: prefill and decode make the same model of a shape, each for itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pytest
import torch

from hma_serve.checkpoint import resolve_checkpoint
from support.cluster import command, environment, running_cluster
from support.reference import reference_generate
from support.tiny_qwen3 import make_tiny_checkpoint


def test_prefill_and_decode_hold_the_same_random_model(tmp_path: Path) -> None:
    shape = make_tiny_checkpoint(tmp_path / "shape", hidden=64, dtype=torch.bfloat16) / "config.json"
    flags = ["--random-weights", f"{shape}@5", "--prefill-profile", "f32", "--dtype", "float32"]
    prompt = [(7 * place + 3) % 320 for place in range(100)]
    with running_cluster(tmp_path / "cluster", *flags) as cluster:
        body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        response = httpx.post(cluster.url + "/v1/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        answer = response.json()
        logs = cluster.logs()
    assert answer["model"] == "shape"
    expected = reference_generate(resolve_checkpoint(f"random:{shape}@5"), "f32", prompt, 16)
    assert answer["choices"][0]["token_ids"] == expected
    assert logs.count("memory: weights") == 2  # before anything is loaded, on both sides


@pytest.mark.parametrize(
    "arguments",
    [
        ("prefill", "--random-weights", "qwen3-32b", "--max-model-len", "64"),
        ("decode", "--random-weights", "qwen3-32b", "--max-model-len", "64"),
        ("prefill", "--kv-capacity-tokens", str(10**12)),
        ("decode", "--kv-capacity-tokens", str(10**12)),
        ("prefill", "--prefix-cache-bytes", str(10**22)),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(arguments: tuple[str, ...]) -> None:
    result = subprocess.run(
        command(*arguments, "--etcd", "none"),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert result.returncode != 0
    assert "the model does not fit: weights " in result.stderr, result.stderr
    assert " = " in result.stderr
    assert "loading weights" not in result.stderr
    assert "Traceback" not in result.stderr
