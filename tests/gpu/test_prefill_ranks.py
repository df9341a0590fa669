"""Two GPUs share a model over NCCL: what they compute, and that the leading rank's process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.tiny_qwen3 import make_tiny_checkpoint

CHECK = Path(__file__).parents[1] / "support" / "tensor_parallel_check.py"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.mark.parametrize(("profile", "limit"), [("bf16", 0.03), ("fp8_e4m3", 0.2), ("int8", 0.1)])
def test_two_gpus_compute_what_one_does(tmp_path: Path, profile: str, limit: float) -> None:
    """Limits are twice what noise in last places does to the reference."""
    sizes = {"layers": 3, "hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 128, "intermediate": 1024}
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", **sizes, tied=False, dtype=torch.bfloat16)  # type: ignore[arg-type]
    path = os.pathsep.join([str(CHECK.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(CHECK), str(checkpoint), profile, "2", "cuda"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    device, error = done.stdout.splitlines()
    assert device.startswith("2 x ")
    assert float(error) < limit
