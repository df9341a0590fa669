"""What a GPU engine refuses before it loads anything."""

from dataclasses import replace

import pytest
import torch

from hma_serve.checkpoint import read_model_config, resolve_checkpoint
from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.decode.config import build_parser
from hma_serve.decode.cuda import expected_kinds, kv_capacity, open_cuda, stays_packed
from hma_serve.decode.engine_parts import EngineSpec
from hma_serve.decode.intake import Packed
from hma_serve.decode.kernels.page_kinds import BLOCK_FLOAT, FP8, INTEGER
from hma_serve.quant import codec_names
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED, KvRopePairing

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
        (replace(SPEC, config=replace(CONFIG, head_dim=96)), "--model"),
        (replace(SPEC, config=replace(CONFIG, num_heads=36)), "--model"),
    ],
)
def test_what_has_no_kernels_is_refused(monkeypatch: pytest.MonkeyPatch, spec: EngineSpec, field: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InvalidArgument) as refused:
        open_cuda(spec, memoryview(bytearray(4096)))
    assert refused.value.field == field


def test_readers_of_what_may_arrive_are_expected_and_no_others() -> None:
    assert expected_kinds(["fp8_e4m3fn", "bf16", "int8", "fp8_e4m3fnuz"]) == [FP8, INTEGER]
    assert expected_kinds(["f32"]) == expected_kinds([]) == [BLOCK_FLOAT]


def test_kv_takes_what_is_left_of_the_gpu() -> None:
    spec = replace(SPEC, max_running=10_000)
    per_token = 2 * CONFIG.kv_elements_per_token
    few, more = (kv_capacity(spec, gigabytes << 30, "a GPU", 1 << 25) for gigabytes in (12, 13))
    assert 0.9 < (more - few) * per_token / 2**30 < 1
    assert few * per_token < 12 << 30
    assert (few - kv_capacity(spec, 12 << 30, "a GPU", 1 << 30)) * per_token / 2**30 == pytest.approx(1.84, rel=0.02)
    assert kv_capacity(SPEC, 64 << 30, "a GPU", 1 << 25) == 2 * 16 * 2048
    assert kv_capacity(replace(SPEC, kv_capacity_tokens=4096), 12 << 30, "a GPU", 1 << 25) == 4096


@pytest.mark.parametrize("asked", [0, 1 << 20])
def test_what_does_not_fit_the_gpu_is_refused_with_the_arithmetic(asked: int) -> None:
    with pytest.raises(FailedPrecondition, match=r"weights .* \+ KV .* \+ workspace .* on a GPU"):
        kv_capacity(replace(SPEC, kv_capacity_tokens=asked), 1 << 30, "a GPU", 1 << 25)


@pytest.mark.parametrize("name", codec_names())
def test_what_a_gpu_decodes_on_arrival_is_what_the_help_says(name: str) -> None:
    def stays(k_codec: str, v_codec: str, pairing: KvRopePairing.ValueType = KV_ROPE_PAIRING_HALF_SPLIT) -> bool:
        return stays_packed(Packed(k_codec, v_codec, pairing, 64))

    said = " ".join(build_parser().format_help().split())
    assert "a GPU decodes int4, f32 and KV whose keys are in interleaved RoPE channels in any case" in said
    # BF16 pages are what decoding would give.
    decoded = name.partition(".")[0] in ("int4", "f32", "bf16")
    assert stays(name, "tt_bfp8_b") is stays("tt_bfp8_b", name) is not decoded
    assert not stays(name, name, KV_ROPE_PAIRING_INTERLEAVED)
