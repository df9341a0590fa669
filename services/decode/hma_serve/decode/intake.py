"""What becomes of a prompt's KV when it arrives: kept as it was packed, or decoded once.

*Fused* keeps the bytes; attention reads them for as long as the request lives. *Materialised* decodes each block when
it arrives, into the elements that decode computes with, so that attention reads nothing else: more memory, and every
read moves more bytes, but nothing is decoded twice. Which is faster is a question to the device, so both can be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from hma_serve.core.errors import DataLoss, FailedPrecondition
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.page_order import Role
from hma_serve.decode.pages import Need, PagePool, Reservation
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.kvblock import channel_order
from hma_serve.quant import codec
from hma_serve.v1.kv_block_pb2 import KV_ROLE_K, KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED, KvRopePairing


@dataclass(frozen=True, slots=True)
class Packed:
    """What a producer sends for one request.

    Attributes:
        k_codec: Name of the keys' codec.
        v_codec: Of the values'.
        rope_pairing: Order of the keys' channels.
        tokens: The prompt's first tokens, in whole groups, that are packed.
    """

    k_codec: str
    v_codec: str
    rope_pairing: KvRopePairing.ValueType
    tokens: int

    @classmethod
    def of(cls, admit: pb.DecodeAdmit) -> Packed:
        """What a request announces."""
        return cls(admit.k_codec, admit.v_codec, admit.rope_pairing, admit.packed_tokens)

    @property
    def interleaved(self) -> bool:
        """Whether channel 2j turns with 2j + 1."""
        return self.rope_pairing == KV_ROPE_PAIRING_INTERLEAVED

    def codec(self, role: Role) -> str:
        """The codec of a role."""
        return self.k_codec if role is Role.K else self.v_codec


class Intake(Protocol):
    """Decides in which form packed KV is held."""

    def need(self, packed: Packed, total_tokens: int) -> Need:
        """The pages of a request of `total_tokens`."""
        ...

    def store(
        self,
        packed: Packed,
        role: Role,
        layer: int,
        addresses: torch.Tensor,
        heads: slice,
        units: torch.Tensor,
    ) -> None:
        """Puts units, uint8 [heads, groups, group_bytes] as on the wire, into pages.

        Args:
            packed: What they are.
            role: K or V.
            layer: Which layer.
            addresses: int64 [groups], of the pages, out of what `placed` gave.
            heads: Which heads.
            units: In a slot, which must be left alone until `settle`.
        """
        ...

    def placed(self, addresses: torch.Tensor) -> torch.Tensor:
        """Addresses of pages, int64, where `store` reads them; once a request rather than once a block."""
        ...

    def settle(self) -> None:
        """Returns when everything that was given to `store` has left its slot."""
        ...


class _HostIntake:
    """Where the engine itself moves the bytes, before `store` returns."""

    def placed(self, addresses: torch.Tensor) -> torch.Tensor:
        """See `Intake`."""
        return addresses

    def settle(self) -> None:
        """See `Intake`."""


class FusedIntake(_HostIntake):
    """Keeps what arrives.

    Args:
        pool: The pages.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool

    def need(self, packed: Packed, total_tokens: int) -> Need:
        """See `Intake`."""
        return Need.of(
            packed_tokens=packed.tokens,
            total_tokens=total_tokens,
            k_format=packed.k_codec,
            v_format=packed.v_codec,
            interleaved=packed.interleaved,
        )

    def store(
        self, packed: Packed, role: Role, layer: int, addresses: torch.Tensor, heads: slice, units: torch.Tensor
    ) -> None:
        """See `Intake`."""
        self._pool.store(packed.codec(role), role, layer, addresses, heads, units)


class MaterialisedIntake(_HostIntake):
    """Decodes what arrives.

    Args:
        pool: The pages.
        k_offsets: Subtracted from packed keys, float32 [layers, kv_heads, head_dim] in the producer's order of
            channels; None: nothing was.
    """

    def __init__(self, pool: PagePool, k_offsets: torch.Tensor | None = None) -> None:
        self._pool = pool
        self._k_offsets = k_offsets
        order = channel_order(pool.geometry.head_dim, KV_ROPE_PAIRING_INTERLEAVED, KV_ROPE_PAIRING_HALF_SPLIT)
        self._half_split = torch.from_numpy(order).to(pool.memory.device)

    def need(self, packed: Packed, total_tokens: int) -> Need:
        """See `Intake`."""
        form = self._pool.plain_format
        return Need.of(
            packed_tokens=packed.tokens, total_tokens=total_tokens, k_format=form, v_format=form, offset=False
        )

    def store(
        self, packed: Packed, role: Role, layer: int, addresses: torch.Tensor, heads: slice, units: torch.Tensor
    ) -> None:
        """See `Intake`."""
        values = codec(packed.codec(role)).decode(units)
        if role is Role.K and self._k_offsets is not None:
            values = values + self._k_offsets[layer, heads].unsqueeze(1)
        if role is Role.K and packed.interleaved:
            values = values.index_select(-1, self._half_split)
        form = self._pool.plain_format
        self._pool.store(form, role, layer, addresses, heads, codec(form).encode(values))


@dataclass(slots=True)
class Arrival:
    """What one request waits for, and how much of it has landed.

    Attributes:
        packed: What was announced.
        pages: Where it goes.
        landed: Units (one layer, role, head and group each) in their pages.
    """

    packed: Packed
    pages: Reservation
    landed: int = field(default=0)
    _places: dict[Role, torch.Tensor] = field(default_factory=dict)

    @property
    def present_tokens(self) -> int:
        """Packed tokens that need not come."""
        return self.pages.present_groups * GROUP_TOKENS

    def check(self, attach: pb.DecodeAttach) -> None:
        """Refuses a stream that brings something else.

        Raises:
            FailedPrecondition: Naming the manifest's field.
        """
        start, count = self.present_tokens, self.packed.tokens - self.present_tokens
        if count and (attach.token_start, attach.token_count) != (start, count):
            raise FailedPrecondition(
                f"the stream covers {attach.token_count} tokens from {attach.token_start}, the ticket {count} from "
                f"{start}",
                field="manifest.token_count",
            )
        offered = self.packed
        if count and (attach.k_codec, attach.v_codec) != (offered.k_codec, offered.v_codec):
            raise FailedPrecondition(
                f"the stream brings K as {attach.k_codec} and V as {attach.v_codec}; {offered.k_codec} and "
                f"{offered.v_codec} were offered",
                field="manifest.codecs",
            )
        if count and attach.rope_pairing != offered.rope_pairing:
            raise FailedPrecondition("the stream pairs channels otherwise than was offered", field="manifest.rope")

    def take(self, block: pb.DecodeBlock, data: memoryview, intake: Intake) -> None:
        """From a slot into the pages."""
        role = Role.K if block.role == KV_ROLE_K else Role.V
        if role not in self._places:
            self._places[role] = intake.placed(self.pages.packed_k if role is Role.K else self.pages.packed_v)
        first = self.pages.present_groups + block.group_start
        units = torch.frombuffer(data, dtype=torch.uint8).view(block.head_count, block.group_count, -1)
        heads = slice(block.head_start, block.head_start + block.head_count)
        groups = self._places[role][first : first + block.group_count]
        intake.store(self.packed, role, block.layer, groups, heads, units)
        self.landed += block.head_count * block.group_count

    def require_complete(self, layers: int, kv_heads: int) -> None:
        """Refuses to go on with a hole.

        Raises:
            DataLoss: Saying how much is missing.
        """
        groups = self.packed.tokens // GROUP_TOKENS - self.pages.present_groups
        expected = 2 * groups * kv_heads * layers
        if self.landed != expected:
            raise DataLoss(f"{self.landed} of {expected} page units arrived", field="blocks")
