"""What a GPU engine refuses before it loads anything."""

from dataclasses import replace

import pytest
import torch

from hma_serve.checkpoint import read_model_config, resolve_checkpoint
from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.decode.cuda import open_cuda
from hma_serve.decode.engine_parts import EngineSpec

CHECKPOINT = resolve_checkpoint("demo")
CONFIG = read_model_config(CHECKPOINT)
SPEC = EngineSpec(CHECKPOINT, CONFIG, torch.bfloat16, ["tt_bfp8_b"], None, "fused", 0, 2048, 16, 256)


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FailedPrecondition, match="needs an NVIDIA GPU") as refused:
        open_cuda(SPEC, memoryview(bytearray(4096)))
    assert refused.value.field == "--device"


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (replace(SPEC, dtype=torch.float32), "--dtype"),
        (replace(SPEC, config=replace(CONFIG, head_dim=48)), "--model"),
        (replace(SPEC, config=replace(CONFIG, num_heads=36)), "--model"),
    ],
)
def test_what_has_no_kernels_is_refused(monkeypatch: pytest.MonkeyPatch, spec: EngineSpec, field: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InvalidArgument) as refused:
        open_cuda(spec, memoryview(bytearray(4096)))
    assert refused.value.field == field
