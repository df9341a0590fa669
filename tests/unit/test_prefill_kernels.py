"""The fused passes against the reference model and codecs, in Triton's interpreter, which must be on before import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).parents[1] / "support" / "prefill_kernel_checks.py"


@pytest.mark.timeout(300)
def test_the_kernels_give_the_references_bits_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(CHECKS)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "21 checks" in done.stdout


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernels_give_the_references_bits_on_a_gpu() -> None:
    done = subprocess.run([sys.executable, str(CHECKS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
