"""Runs every fused prefill kernel on random data and compares with the reference; a program, for two reasons.

Triton's interpreter must be chosen before the kernels are imported, and the same checks run on a GPU. The interpreter
does not round when it converts to FP8, so FP8 codes are compared on a GPU alone. A GPU may fuse a multiplication and an
addition where the reference does not, so there a few values of a thousand may differ by one step.
"""

from __future__ import annotations

import torch

from hma_serve import quant
from hma_serve.model.norm import rms_norm
from hma_serve.model.rotary import rotary_table, rotate
from hma_serve.prefill.kernels.quantize_rows import normed_rows, plain_rows, swiglu_rows
from hma_serve.prefill.kernels.scale_product import scale_product
from hma_serve.prefill.kernels.store_kv import store_kv

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FORMATS = {"int8": torch.int8, "bf16": torch.bfloat16} | ({"fp8_e4m3fn": torch.float8_e4m3fn} if ON_GPU else {})
GENERATOR = torch.Generator().manual_seed(0)
MAY_DIFFER = 0.01 if ON_GPU else 0.0

done = 0


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR).bfloat16().to(DEVICE)


def gain(size: int) -> torch.Tensor:
    return (1 + 0.1 * torch.randn(size, generator=GENERATOR)).bfloat16().to(DEVICE)


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same values, but for the few that a fused multiplication may move by a step."""
    global done
    done += 1
    different = (found.float() != expected.float()).float().mean().item()
    assert different <= MAY_DIFFER, f"{name}: {different:.2%} of the values differ"
    assert torch.allclose(found.float(), expected.float(), rtol=0.15, atol=1.5), f"{name}: a value is far off"


def check_rows(name: str, dtype: torch.dtype) -> None:
    known = quant.operand_format(name)

    def rows(what: str, found: tuple[torch.Tensor, torch.Tensor], reference: torch.Tensor) -> None:
        expected = known.quantize(reference)
        check(f"{what} to {name}", found[0], expected.values)
        if expected.scale is not None:
            assert torch.allclose(found[1], expected.scale, rtol=0.01), f"{what} to {name}: scales"

    hidden, delta, weight = normal(5, 80), normal(5, 80), gain(80)
    added = hidden + delta
    stream = hidden.clone()
    rows("norm", normed_rows(stream, weight, 1e-6, dtype, delta=delta), rms_norm(added, weight, 1e-6))
    assert torch.equal(stream, added), "the residual stream"
    both = normal(5, 160)
    gate, up = both.chunk(2, -1)
    rows("swiglu", swiglu_rows(both, dtype), torch.nn.functional.silu(gate) * up)
    rows("plain", plain_rows(hidden, dtype, share=torch.clone), hidden)


def check_store(k_codec: str, v_codec: str, *, offset: bool, heads: int = 4, kv_heads: int = 2) -> None:
    GENERATOR.manual_seed(1)  # No value near a boundary, where another order of summation would move it.
    dim, tokens, start = 64, 64, 32
    codecs = [quant.codec(k_codec), quant.codec(v_codec)]
    qkv, gains = normal(tokens, (heads + 2 * kv_heads) * dim), (gain(dim), gain(dim))
    table = rotary_table(dim, 1e4, 256, DEVICE)
    shift = torch.randn(kv_heads, dim, generator=GENERATOR).to(DEVICE) if offset else None
    q = torch.zeros(tokens, heads, dim, dtype=torch.bfloat16, device=DEVICE)
    packed = [torch.zeros(kv_heads, 4, codec.group_bytes(dim), dtype=torch.uint8, device=DEVICE) for codec in codecs]
    decoded = [torch.zeros(128, kv_heads, dim, dtype=torch.bfloat16, device=DEVICE) for _ in codecs]
    store_kv(
        qkv,
        table,
        gains,
        1e-6,
        q=q,
        packed=(packed[0], packed[1]),
        decoded=(decoded[0], decoded[1]),
        codecs=(k_codec, v_codec),
        k_offset=shift,
        row=0,
        tokens=tokens,
        start=start,
    )
    split = torch.split(qkv, [heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    queries, keys, values = (part.reshape(tokens, -1, dim) for part in split)
    queries, keys = (
        rotate(rms_norm(x, g, 1e-6), table[start : start + tokens]) for x, g in zip((queries, keys), gains, strict=True)
    )
    check(f"queries beside {k_codec}", q, queries)
    for codec, bytes_, kept, x in zip(
        codecs, packed, decoded, (keys if shift is None else keys - shift, values), strict=True
    ):
        right = codec.encode(x.transpose(0, 1).contiguous())
        own = codec.decode(bytes_[:, 1:3].contiguous(), torch.bfloat16).transpose(0, 1)
        assert torch.equal(own, kept[start : start + tokens]), f"{codec.name}: what is kept is not what was packed"
        assert not bytes_[:, 0].any(), f"{codec.name}: wrote elsewhere"
        assert not bytes_[:, 3].any(), f"{codec.name}: wrote elsewhere"
        check(f"{codec.name}, decoded", codec.decode(bytes_[:, 1:3].contiguous()), codec.decode(right))


def check_unpacked() -> None:
    """Only what attention reads, of the segment alone, turned by its positions in the prompt."""
    heads, kv_heads, dim, tokens, start = 6, 2, 64, 64, 96
    qkv, gains = normal(tokens + 32, (heads + 2 * kv_heads) * dim), (gain(dim), gain(dim))
    table = rotary_table(dim, 1e4, 256, DEVICE)
    q = torch.zeros(tokens + 32, heads, dim, dtype=torch.bfloat16, device=DEVICE)
    kept = (torch.zeros(tokens, kv_heads, dim, dtype=torch.bfloat16, device=DEVICE) for _ in "kv")
    k, v = kept
    store_kv(
        qkv, table, gains, 1e-6, q=q, packed=None, decoded=(k, v), codecs=("", ""), row=32, tokens=tokens, start=start
    )
    split = torch.split(qkv[32:], [heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    queries, keys, values = (part.reshape(tokens, -1, dim) for part in split)
    turned = (
        rotate(rms_norm(x, g, 1e-6), table[start : start + tokens]) for x, g in zip((queries, keys), gains, strict=True)
    )
    for name, found, expected in zip("qkv", (q[32:], k, v), (*turned, values), strict=True):
        check(f"{name}, unpacked", found, expected)
    assert not q[:32].any(), "wrote rows of another segment"


def main() -> None:
    for name, dtype in FORMATS.items():
        check_rows(name, dtype)
    check_store("tt_bfp8_b", "int8", offset=False)
    check_store("bf16", "tt_bfp8_b", offset=True)
    check_store("int8", "bf16", offset=True, heads=4, kv_heads=4)
    check_store("bf16", "int8", offset=False, heads=5, kv_heads=1)
    check_unpacked()
    if ON_GPU:
        check_store("fp8_e4m3fn", "fp8_e4m3fn", offset=True)
    sums = torch.randint(-9999, 9999, (5, 70), dtype=torch.int32, generator=GENERATOR).to(DEVICE)
    rows, columns = torch.rand(5, 1, generator=GENERATOR).to(DEVICE), torch.rand(1, 70, generator=GENERATOR).to(DEVICE)
    assert torch.equal(scale_product(sums, rows, columns), (sums.float() * rows * columns).bfloat16())
    print(f"{done} checks")


if __name__ == "__main__":
    main()
