"""How far attention over packed KV is from attention over the same KV unpacked, on synthetic keys of four kinds.

Synthetic and from one seed: compare ranks. 8 KV heads, 4 query heads each, D = 128, 4096 tokens; K and V both packed;
mean over queries of the relative L2 error of the output, in percent.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from bench.figures import SEED
from hma_serve.kvblock import OffsetCalibration
from hma_serve.quant import codec, reference_attention, subtract_offset

KV_HEADS, GROUP, D, TOKENS, QUERIES = 8, 4, 128, 4096, 8
KINDS = ("gauss", "outlier", "extreme", "qk-norm")
"""gauss: N(0, 1). outlier: four channels a head eight times as wide. extreme: two channels a head at a constant of 150
to 300. qk-norm: RMS-normed, with a log-normal weight per channel, queries alike."""

Array = NDArray[np.float32]


class Keys:
    """One kind of keys with its queries, values and calibrated offsets.

    Args:
        kind: One of `KINDS`.
    """

    def __init__(self, kind: str) -> None:
        rng = np.random.default_rng([SEED, KINDS.index(kind)])
        scale, bias = np.ones((KV_HEADS, 1, D)), np.zeros((KV_HEADS, 1, D))
        for head in range(KV_HEADS):
            chosen = rng.choice(D, 4, replace=False)
            if kind == "outlier":
                scale[head, 0, chosen] = 8
            if kind == "extreme":
                bias[head, 0, chosen[:2]] = rng.uniform(150, 300, 2) * rng.choice([-1, 1], 2)
        weight = np.exp(rng.normal(0, 0.6, (KV_HEADS, 1, D)))

        def keys(tokens: int) -> Array:
            drawn = rng.standard_normal((KV_HEADS, tokens, D))
            if kind == "qk-norm":
                drawn = weight * drawn / np.sqrt((drawn**2).mean(-1, keepdims=True))
            return (drawn * scale + bias).astype(np.float32)

        calibration = OffsetCalibration()
        calibration.add(0, keys(2048))
        self.offset = torch.from_numpy(calibration.table().layer(0, KV_HEADS, D))
        self.keys = torch.from_numpy(keys(TOKENS))
        self.values = torch.from_numpy(rng.standard_normal((KV_HEADS, TOKENS, D)).astype(np.float32))
        queries = rng.standard_normal((KV_HEADS * GROUP, QUERIES, D)) / np.repeat(scale, GROUP, axis=0)
        if kind == "qk-norm":
            queries *= np.repeat(weight, GROUP, axis=0)
        self.queries = torch.from_numpy(queries)
        self.right = reference_attention(self.queries, self.keys, self.values)

    def error(self, name: str, *, offset: bool) -> float:
        """Percent, of keys and values packed with a codec, with the keys' offset taken away or not."""
        packer = codec(name)
        keys = subtract_offset(self.keys, self.offset) if offset else self.keys
        found = reference_attention(
            self.queries,
            packer.decode(packer.encode(keys)),
            packer.decode(packer.encode(self.values)),
            offset=self.offset if offset else None,
            offset_tokens=TOKENS if offset else 0,
        )
        return 100 * float(((found - self.right).norm(dim=-1) / self.right.norm(dim=-1)).mean())
