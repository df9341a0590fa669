"""The documented plug-in, installed as a vendor's package is, computes for a whole cluster under its own profile."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from support.cluster import command, environment, running_cluster
from support.tiny_qwen3 import make_tiny_checkpoint

PLUGIN = Path(__file__).parents[2] / "docs" / "examples" / "accelerator-plugin"
PROFILES = PLUGIN / "profiles"
COMPARE = """
import sys
from pathlib import Path
import numpy as np
from hma_serve.checkpoint import read_model_config
from hma_serve.prefill.accelerators import AcceleratorSpec, Segment, open_accelerator
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.profiles import find_profile

checkpoint, profiles = map(Path, sys.argv[1:])
model, profile = read_model_config(checkpoint), find_profile("abacus", profiles)
layout = KvLayout.of(model, profile)

def packed(kind, chunk):
    device = open_accelerator(kind, AcceleratorSpec(checkpoint, model, profile))
    store, found = device.new_store(96), []
    for start in range(0, 96, chunk):
        ids = list(range(start + 3, min(start + chunk, 96) + 3))
        hidden = device.embed(ids)
        for layer in range(layout.layers):
            hidden = device.run_layer(layer, hidden, [Segment(start, len(ids), store)])
    for layer in range(layout.layers):
        for role, size in zip(ROLES, layout.group_bytes):
            out = np.zeros((layout.heads, 3, size), np.uint8)
            store.copy_out(layer, role, slice(0, layout.heads), slice(0, 3), out)
            found.append(out)
    return device.device, found

name, found = packed("abacus", 64)
_, expected = packed("cpu", 96)
print(name, all(map(np.array_equal, found, expected)), any(part.any() for part in found))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds the installed package alone."""
    source = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("plugin") / "source")
    target = source.parent / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "tiny"
    return make_tiny_checkpoint(path, hidden=64, heads=4, kv_heads=2, head_dim=32, intermediate=96)


def test_its_bytes_are_those_of_the_reference(site: Path, checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, str(checkpoint), str(PROFILES)],
        env=environment() | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "Abacus Mk. II True True\n", done.stderr


def test_it_computes_for_a_cluster(
    site: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site))
    arguments = ["--model", str(checkpoint), "--prefill-profile", "abacus", "--prefill-arg=--device=abacus"]
    with running_cluster(tmp_path, *arguments, f"--prefill-arg=--profiles={PROFILES}") as cluster:
        body = {"prompt": list(range(3, 100)), "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert cluster.metric("prefill", "tokens_total") >= 96


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--profile", "bf16"], "an Abacus counts in int8; profile bf16 does not"),
        (["--profile", "abacus", "--profiles", str(PROFILES), "--tp", "2"], "there is one Abacus to a host"),
    ],
)
def test_what_it_cannot_do_is_said_at_the_start(
    site: Path, checkpoint: Path, arguments: list[str], sentence: str
) -> None:
    start = ["--model", str(checkpoint), "--etcd", "none", "--listen", "127.0.0.1:0", "--device", "abacus"]
    done = subprocess.run(
        command("prefill", *start, *arguments),
        env=environment() | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
