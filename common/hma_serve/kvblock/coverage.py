"""Which parts of a stream have arrived: decode may start when every unit did, exactly once.

One bitmap per (layer, role), created when its first block arrives. Several streams of one ticket may share a
`Coverage`, for example when two producers hold different heads; the owner serialises their calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hma_serve.kvblock.errors import IncompleteCoverage, OverlappingRange

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.kvblock.block import Block
    from hma_serve.kvblock.manifest import StreamPlan


class Coverage:
    """Counts units in; a unit is one (layer, role, head, group of 32 tokens)."""

    def __init__(self, plan: StreamPlan) -> None:
        self._plan = plan
        self._seen: dict[tuple[int, int], NDArray[np.bool_]] = {}
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
        """Refuse a block of which any unit has arrived before.

        Raises:
            OverlappingRange: Naming layer and role.
        """
        seen = self._seen.get((block.layer, block.role))
        if seen is not None and self._part(seen, block).any():
            raise OverlappingRange(
                f"part of tokens {block.token_start}..{block.token_start + block.token_count - 1}, heads "
                f"{block.head_start}..{block.head_start + block.head_count - 1} of layer {block.layer}, role "
                f"{block.role} has already arrived",
                field="token_start",
            )

    def add(self, block: Block) -> None:
        """Count a block in.

        Raises:
            OverlappingRange: As `check`; then nothing has changed.
        """
        self.check(block)
        key = (block.layer, int(block.role))
        seen = self._seen.get(key)
        if seen is None:
            plan = block.role_plan
            seen = self._seen[key] = np.zeros((plan.kv_heads, self._plan.group_count), dtype=np.bool_)
        self._part(seen, block)[...] = True
        self._missing -= block.head_count * block.group_count

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

    @staticmethod
    def _part(seen: NDArray[np.bool_], block: Block) -> NDArray[np.bool_]:
        heads = slice(block.head_start, block.head_start + block.head_count)
        return seen[heads, block.group_start : block.group_start + block.group_count]
