"""The Tenstorrent accelerator where there is no card: what it refuses, and its host's packing against our codec."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hma_serve import quant
from hma_serve.checkpoint import read_model_config
from hma_serve.core.errors import FailedPrecondition
from hma_serve.prefill import accelerators
from hma_serve.prefill.accelerators import AcceleratorSpec, open_accelerator
from hma_serve.prefill.accelerators.sharding import Shard
from hma_serve.prefill.profiles import find_profile
from support.tiny_qwen3 import make_tiny_checkpoint

HOST = Path(accelerators.__file__).with_name("tenstorrent_host.py")
PACKING = Path(__file__).parents[1] / "support" / "ttnn_packing.py"
PYTHON = os.environ.get("HMA_TTNN_PYTHON", "")


@pytest.fixture
def spec(tmp_path: Path) -> AcceleratorSpec:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", hidden=64, head_dim=32, intermediate=96)
    return AcceleratorSpec(checkpoint, read_model_config(checkpoint), find_profile("tt_bfp8"))


@pytest.mark.skipif(importlib.util.find_spec("ttnn") is not None, reason="ttnn is here")
def test_without_ttnn_it_says_so(spec: AcceleratorSpec) -> None:
    with pytest.raises(FailedPrecondition, match=r"needs the package ttnn .* --device cpu emulates the same profile"):
        open_accelerator("tenstorrent", spec)


def test_what_a_card_cannot_do_is_refused_first(spec: AcceleratorSpec) -> None:
    with pytest.raises(FailedPrecondition, match="do not follow profile fp8_e4m3: choose tt_bfp8"):
        open_accelerator("tenstorrent", replace(spec, profile=find_profile("fp8_e4m3")))
    with pytest.raises(FailedPrecondition, match="a Tenstorrent worker has one card"):
        open_accelerator("tenstorrent", replace(spec, shard=Shard(0, 2)))
    with pytest.raises(FailedPrecondition, match="32 or a multiple of 64, not of 96"):
        open_accelerator("tenstorrent", replace(spec, model=replace(spec.model, head_dim=96)))


@pytest.mark.skipif(not PYTHON, reason="HMA_TTNN_PYTHON names no Python (3.10 or 3.12) that has ttnn")
def test_the_host_packs_as_our_codec_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    groups, heads, head_dim = 3, 2, 128
    kinds = {
        "normal": rng.standard_normal((groups, heads, 32, head_dim)),
        "wide": rng.standard_normal((groups, heads, 32, head_dim)) * 2.0 ** rng.integers(-30, 30, (1, heads, 32, 1)),
        "sparse": rng.standard_normal((groups, heads, 32, head_dim)) * (rng.random((groups, heads, 32, 1)) < 0.1),
        "ties": rng.integers(-255, 256, (groups, heads, 32, head_dim)) / 128.0,
    }
    tensors = {name: torch.from_numpy(x).bfloat16().float() for name, x in kinds.items()}
    source, target = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(source, **{name: x.numpy() for name, x in tensors.items()})  # type: ignore[arg-type]
    done = subprocess.run([PYTHON, PACKING, HOST, source, target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codec = quant.codec("tt_bfp8_b")
    with np.load(target) as found:
        for name, x in tensors.items():
            wire = x.transpose(0, 1).reshape(heads, groups * 32, head_dim).contiguous()
            packed = codec.encode(wire)
            assert np.array_equal(found[f"{name}_bytes"], packed.numpy()), name
            theirs = torch.from_numpy(found[f"{name}_values"]).transpose(0, 1).reshape(wire.shape).contiguous()
            assert torch.equal(codec.decode(packed).reshape(wire.shape), theirs), name
            assert torch.equal(codec.encode(theirs), packed), "packing again changes bytes"
