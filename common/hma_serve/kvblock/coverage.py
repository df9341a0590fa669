"""Which parts of a stream have arrived: decode may start when every unit did, exactly once.

One bitmap per (layer, role), created when its first block arrives. Scales that cover more than a unit are repeated in
each, and compared here, because only here blocks meet.

Several streams may fill one ticket, for example when two producers hold different heads. They share a `Coverage`, which
is told how many there will be: holes are no fault until the last of them has ended. The owner serialises their calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hma_serve.kvblock.errors import Incompatible, IncompleteCoverage, OverlappingRange, UnevenScales
from hma_serve.kvblock.offset import OffsetTable
from hma_serve.v1.kv_block_pb2 import KV_SCALE_GRANULARITY_HEAD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hma_serve.kvblock.block import Block
    from hma_serve.kvblock.codecs import Codec
    from hma_serve.kvblock.manifest import StreamPlan


class Coverage:
    """Counts units in; a unit is one (layer, role, head, group of 32 tokens).

    Args:
        plan: What must arrive, by all streams together.
        streams: How many streams bring it.
    """

    def __init__(self, plan: StreamPlan, *, streams: int = 1) -> None:
        self._plan = plan
        self._streams = streams
        self._seen: dict[tuple[int, int], NDArray[np.bool_]] = {}
        self._scales: dict[tuple[int, int, int], bytes] = {}
        self._missing = plan.units

    @property
    def complete(self) -> bool:
        """Every unit of the manifest has arrived."""
        return self._missing == 0

    @property
    def missing(self) -> int:
        """Units that have not arrived."""
        return self._missing

    def check(self, block: Block) -> None:
        """Refuse a block of which any unit has arrived before, or whose scales are not those of its neighbours.

        Raises:
            OverlappingRange: Naming layer and role.
            UnevenScales: A scale that covers a head or a layer's role differs between units.
        """
        seen = self._seen.get((block.layer, block.role))
        if seen is not None and self._part(seen, block).any():
            raise OverlappingRange(
                f"part of tokens {block.token_start}..{block.token_start + block.token_count - 1}, heads "
                f"{block.head_start}..{block.head_start + block.head_count - 1} of layer {block.layer}, role "
                f"{block.role} has already arrived",
                field="token_start",
            )
        self._check_scales(block)

    def add(self, block: Block) -> None:
        """Count a block in.

        Raises:
            KvFormatError: As `check`; then nothing has changed.
        """
        self.check(block)
        self._scales |= dict(_shared_scales(block))
        key = (block.layer, int(block.role))
        seen = self._seen.get(key)
        if seen is None:
            plan = block.role_plan
            seen = self._seen[key] = np.zeros((plan.kv_heads, self._plan.group_count), dtype=np.bool_)
        self._part(seen, block)[...] = True
        self._missing -= block.head_count * block.group_count

    def admit(self, plan: StreamPlan) -> None:
        """Refuse a stream of another cache: one that means other tokens, another model or other bytes than the first.

        Raises:
            Incompatible: Naming the field of the manifest that differs.
        """
        if plan is self._plan:
            return
        first, other = self._plan.manifest, plan.manifest
        for field in ("model_fingerprint", "token_start", "token_count", "qk_norm", "rotation_id"):
            if getattr(first, field) != getattr(other, field):
                raise Incompatible("the ticket's streams differ in it", field=field)
        for field in ("pairing", "theta", "scaling_hash"):
            if getattr(first.rope, field) != getattr(other.rope, field):
                raise Incompatible("the ticket's streams differ in it", field=f"rope.{field}")
        if _meaning(plan) != _meaning(self._plan):
            raise Incompatible("the ticket's streams differ in layers, roles, heads, D or codecs", field="layer_groups")
        if OffsetTable.from_proto(first.k_offsets).digest() != OffsetTable.from_proto(other.k_offsets).digest():
            raise Incompatible("the ticket's streams differ in them", field="k_offsets")

    def end_stream(self) -> None:
        """Count a stream's end, and refuse to go on with holes after the last.

        Raises:
            IncompleteCoverage: As `require_complete`.
            ValueError: More streams ended than there are.
        """
        if self._streams == 0:
            raise ValueError("every stream has ended before")
        self._streams -= 1
        if not self._streams:
            self.require_complete()

    def require_complete(self) -> None:
        """Refuse to go on with holes.

        Raises:
            IncompleteCoverage: Naming the first layer and role with a hole.
        """
        if self.complete:
            return
        for (layer, role), plan in self._plan.roles.items():
            seen = self._seen.get((layer, role))
            missing = plan.kv_heads * self._plan.group_count - (0 if seen is None else int(seen.sum()))
            if missing:
                raise IncompleteCoverage(
                    f"{self._missing} of {self._plan.units} units are missing, {missing} of them in layer {layer}, "
                    f"role {role}",
                    field="blocks",
                )

    def _check_scales(self, block: Block) -> None:
        found: dict[tuple[int, int, int], bytes] = {}
        for key, scale in _shared_scales(block):
            if found.setdefault(key, self._scales.get(key, scale)) != scale:
                raise UnevenScales(f"layer {block.layer}, role {block.role} carries unlike scales", field="payload")

    @staticmethod
    def _part(seen: NDArray[np.bool_], block: Block) -> NDArray[np.bool_]:
        heads = slice(block.head_start, block.head_start + block.head_count)
        return seen[heads, block.group_start : block.group_start + block.group_count]


def _meaning(plan: StreamPlan) -> dict[tuple[int, int], tuple[int, int, Codec]]:
    """All that blocks rely on, without the places in the manifest's own table of codecs."""
    return {key: (role.kv_heads, role.head_dim, role.codec) for key, role in plan.roles.items()}


def _shared_scales(block: Block) -> Iterator[tuple[tuple[int, int, int], bytes]]:
    """The scales of a block's units that cover more than the unit, by what they cover: (layer, role, head or -1)."""
    codec = block.role_plan.codec
    if not codec.shared_bytes:
        return
    by_head = codec.granularity == KV_SCALE_GRANULARITY_HEAD
    scales = block.groups()[..., -codec.shared_bytes :]
    for index, groups in enumerate(scales):
        key = (block.layer, int(block.role), block.head_start + index if by_head else -1)
        for scale in groups:
            yield key, scale.tobytes()
