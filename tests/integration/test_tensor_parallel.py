"""Several ranks against one: the same numbers, through the accelerator and through the real services; shared death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from hma_serve.checkpoint import read_model_config
from hma_serve.model import CausalAttention, Transformer, open_weights
from support.cluster import command, descendants, environment, running_cluster, survivors
from support.tiny_qwen3 import make_tiny_checkpoint

CHECK = Path(__file__).parents[1] / "support" / "tensor_parallel_check.py"
KV_HEADS, NEW_TOKENS = 4, 12
TOLERANCE = 1e-3
"""Two logits closer than this may change places when ranks sum in another order."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("ranks") / "tiny",
        layers=3,
        hidden=64,
        heads=8,
        kv_heads=KV_HEADS,
        head_dim=32,
        intermediate=128,
        tied=False,
    )


@pytest.mark.parametrize(("profile", "ranks"), [("f32", 4), ("nvfp4", 2)])
def test_ranks_compute_what_one_device_does(checkpoint: Path, profile: str, ranks: int) -> None:
    done = subprocess.run(
        [sys.executable, str(CHECK), str(checkpoint), profile, str(ranks)],
        env=environment() | {"PYTHONPATH": str(CHECK.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    device, error = done.stdout.splitlines()
    assert device == f"{ranks} x cpu"
    # Another order of summation, and where a code flips because of it, one step of the format.
    assert float(error) < (1e-5 if profile == "f32" else 0.01)


def logits_of(model: Transformer, layers: int, ids: list[int]) -> torch.Tensor:
    """Of every position, float32 [tokens, vocabulary]."""
    attention = CausalAttention(layers)
    return model.logits(model.forward(torch.tensor(ids), torch.arange(len(ids)), attention))


@torch.inference_mode()
def test_greedy_tokens_of_two_ranks_equal_those_of_one(checkpoint: Path, tmp_path: Path) -> None:
    config = read_model_config(checkpoint)
    with open_weights(checkpoint, config, dtype=torch.float32) as weights:
        model = Transformer(config, weights)
    generator = torch.Generator().manual_seed(2)
    arguments = ["--model", str(checkpoint), "--prefill-profile", "f32", "--dtype", "float32"]
    arguments += ["--prefill-arg=--tp=2", "--prefill-arg=--chunk-tokens=64", "--prefill-arg=--layers-ahead=1"]
    with running_cluster(tmp_path, *arguments) as cluster:
        before = cluster.metric("prefill", "tokens_total")
        for length in (33, 64, 97, 200, 400):
            prompt = torch.randint(3, config.vocab_size, (length,), generator=generator).tolist()
            body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(f"{cluster.url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60)
            assert answer.status_code == 200, answer.text
            found = answer.json()["choices"][0]["token_ids"]
            assert len(found) == NEW_TOKENS
            best = logits_of(model, config.num_layers, prompt + found)[length - 1 : -1].topk(2)
            for token, values, tokens in zip(found, best.values, best.indices, strict=True):
                if token != int(tokens[0]):
                    assert float(values[0] - values[1]) < TOLERANCE
                    break
        assert cluster.metric("prefill", "tokens_total") - before == 32 + 32 + 96 + 192 + 384


def test_one_rank_s_death_ends_the_instance(checkpoint: Path) -> None:
    arguments = ["--model", str(checkpoint), "--etcd", "none", "--listen", "127.0.0.1:0", "--tp", "2"]
    process = subprocess.Popen(command("prefill", *arguments), stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    with process, process.stderr:
        for line in process.stderr:
            if "gRPC" in line:
                break
        below = descendants(process.pid)
        (rank,) = (pid for pid in below if "rank_main" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(rank, signal.SIGKILL)
        rest = process.stderr.read()
        assert process.wait(30) != 0
    assert "rank 1 ended with status -9; the ranks end together" in rest
    assert survivors(below) == []


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ("8", "--tp 8 asks for more ranks than the 4 key/value heads of this model; a rank needs at least one"),
        ("3", "num_key_value_heads is 4, which 3 ranks cannot share in equal parts"),
        ("0", "--tp"),
    ],
)
def test_ranks_that_cannot_share_the_model_are_refused(checkpoint: Path, ranks: str, sentence: str) -> None:
    arguments = ["--model", str(checkpoint), "--etcd", "none", "--listen", "127.0.0.1:0", "--tp", ranks]
    done = subprocess.run(
        command("prefill", *arguments), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode != 0
    assert sentence in done.stderr
