"""K offsets: attention does not notice them, block float gains by them, and tables are constants with a hash."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hma_serve import kvblock, quant
from hma_serve.kvblock import errors
from hma_serve.v1.kv_block_pb2 import KvOffset, KvOffsetTable
from support.kv_streams import FINGERPRINT, HEAD_DIM, HEADS, LAYERS, ROPE, small_manifest

KV_HEADS, GROUP, TOKENS, D = 2, 4, 512, 128


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys with two channels of 150 to 300 per head, values, and the offsets that calibration gives."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((KV_HEADS, TOKENS, D)).astype(np.float32)
    bias = np.zeros((KV_HEADS, D), np.float32)
    for head in range(KV_HEADS):
        bias[head, rng.choice(D, 2, replace=False)] = rng.uniform(150, 300, 2) * rng.choice([-1, 1], 2)
    calibration = kvblock.OffsetCalibration()
    other = rng.standard_normal((KV_HEADS, 2048, D)).astype(np.float32) + bias[:, None]
    calibration.add(0, other[:, :1024])
    calibration.add(0, other[:, 1024:])
    offset = calibration.table().layer(0, KV_HEADS, D)
    q = rng.standard_normal((KV_HEADS * GROUP, 8, D)).astype(np.float32)
    values = rng.standard_normal((KV_HEADS, TOKENS, D)).astype(np.float32)
    tensors = (torch.from_numpy(array) for array in (q, keys + bias[:, None], values, offset))
    q, keys, values, offset = tensors  # type: ignore[assignment]
    return q, keys, values, offset  # type: ignore[return-value]


@pytest.mark.parametrize("offset_tokens", [TOKENS, 320, 0])
def test_attention_is_invariant_at_high_precision(offset_tokens: int) -> None:
    q, keys, values, offset = (tensor.double() for tensor in drawn())
    moved = keys.clone()
    moved[:, :offset_tokens] -= offset.unsqueeze(1)
    right = quant.reference_attention(q, keys, values)
    found = quant.reference_attention(q, moved, values, offset=offset, offset_tokens=offset_tokens)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-10)


def test_without_adding_the_scores_back_a_mixed_cache_is_wrong() -> None:
    q, keys, values, offset = (tensor.double() for tensor in drawn())
    moved = keys.clone()
    moved[:, :320] -= offset.unsqueeze(1)
    right = quant.reference_attention(q, keys, values)
    assert (quant.reference_attention(q, moved, values) - right).norm() > 0.1 * right.norm()


@pytest.mark.parametrize(("name", "gain"), [("tt_bfp8_b", 5.0), ("mxint8", 5.0), ("nvfp4", 2.0)])
def test_offsets_cut_the_error_on_keys_with_channel_bias(name: str, gain: float) -> None:
    q, keys, values, offset = drawn()
    codec = quant.codec(name)
    right = quant.reference_attention(q.double(), keys, values)
    plain = quant.reference_attention(q, codec.decode(codec.encode(keys)), values)
    packed = codec.encode(quant.subtract_offset(keys, offset))
    shifted = quant.reference_attention(q, codec.decode(packed), values, offset=offset, offset_tokens=TOKENS)
    assert (plain - right).norm() > gain * (shifted - right).norm()


def test_calibration_is_the_mean_rounded_to_bfloat16() -> None:
    rng = np.random.default_rng(3)
    keys = (rng.standard_normal((2, 300, 8)) + 7).astype(np.float32)
    calibration = kvblock.OffsetCalibration()
    for start in range(0, 300, 100):
        calibration.add(5, keys[:, start : start + 100])
    right = torch.from_numpy(keys.mean(axis=1, dtype=np.float64).astype(np.float32)).bfloat16().float().numpy()
    table = calibration.table()
    assert np.array_equal(table.layer(5, 2, 8), right)
    assert not table.layer(4, 2, 8).any()


def test_the_hash_is_the_tables_and_part_of_the_fingerprint() -> None:
    ones = np.ones(4, np.float32)
    table = kvblock.OffsetTable({(1, 0): ones, (0, 1): ones * 2})
    same = kvblock.OffsetTable.from_proto(reversed(table.to_proto()))
    assert table.digest() == same.digest()
    others = [
        kvblock.OffsetTable({(1, 0): ones}),
        kvblock.OffsetTable({(1, 1): ones, (0, 1): ones * 2}),
        kvblock.OffsetTable({(1, 0): ones, (0, 1): ones * 3}),
    ]
    assert len({table.digest(), *(other.digest() for other in others)}) == 4
    assert kvblock.OffsetTable({}).fingerprint(FINGERPRINT) == FINGERPRINT
    prints = {table.fingerprint(FINGERPRINT), others[0].fingerprint(FINGERPRINT), table.fingerprint("00" * 32)}
    assert len(prints) == 3
    assert all(len(print_) == 64 for print_ in prints)
    # Pinned: a change of the scheme is a change of every fingerprint with offsets.
    assert table.digest() == PINNED


PINNED = "0e69eb60396a2474322deacb4026c11f14f769d1bed0f0243199d0baa461996f"


def test_table_files() -> None:
    table = kvblock.OffsetTable({(0, 1): np.arange(4, dtype=np.float32)})
    data = table.to_bytes(model_fingerprint="m", profile="p")
    assert kvblock.OffsetTable.from_bytes(data, model_fingerprint="m", profile="p").digest() == table.digest()
    for fingerprint, profile, field in (("other", "p", "model_fingerprint"), ("m", "other", "profile")):
        with pytest.raises(errors.BadOffset) as refused:
            kvblock.OffsetTable.from_bytes(data, model_fingerprint=fingerprint, profile=profile)
        assert refused.value.field == field
    with pytest.raises(errors.BadOffset, match="not a KvOffsetTable"):
        kvblock.OffsetTable.from_bytes(b"\x0a", model_fingerprint="m", profile="p")


@pytest.mark.parametrize(
    "offsets",
    [
        [KvOffset(values=bytes(3))],
        [KvOffset(values=b"")],
        [KvOffset(values=bytes(4)), KvOffset(values=bytes(4))],
        [KvOffset(values=np.array([np.nan], "<f4").tobytes())],
    ],
)
def test_bad_tables_are_refused(offsets: list[KvOffset]) -> None:
    data = KvOffsetTable(offsets=offsets).SerializeToString()
    with pytest.raises(errors.BadOffset):
        kvblock.OffsetTable.from_bytes(data, model_fingerprint="", profile="")


def test_a_stream_brings_its_table_and_the_receiver_holds_it_to_its_own() -> None:
    vectors = {(layer, head): np.full(HEAD_DIM, layer + head, np.float32) for layer in range(2) for head in range(2)}
    table = kvblock.OffsetTable(vectors)
    manifest = small_manifest()
    manifest.k_offsets.extend(table.to_proto())
    manifest.model_fingerprint = table.fingerprint(FINGERPRINT)
    plan = kvblock.validate_manifest(manifest)
    accepts = kvblock.Acceptance(
        model_fingerprint=table.fingerprint(FINGERPRINT),
        layers=LAYERS,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        codecs=(kvblock.codec("tt_bfp8_b"),),
        rope=ROPE,
        qk_norm=True,
        k_offsets=True,
        k_offset_digest=table.digest(),
    )
    kvblock.check_plan(plan, accepts)
    assert kvblock.OffsetTable.from_proto(plan.manifest.k_offsets).digest() == table.digest()
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.check_plan(plan, dataclasses.replace(accepts, model_fingerprint=FINGERPRINT))
    assert refused.value.field == "model_fingerprint"
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.check_plan(plan, dataclasses.replace(accepts, k_offset_digest="00"))
    assert refused.value.field == "k_offsets"
