"""Both ends of one KV stream: the writer numbers and checksums blocks, the reader takes only the next right one.

A writer and a reader belong to one stream, that is to one ticket and attempt, and to one task; they hold no
bytes. After a refusal a reader must not be used again: the stream is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from hma_serve.kvblock.block import Block, to_sections, validate_block
from hma_serve.kvblock.coverage import Coverage
from hma_serve.kvblock.errors import (
    UnknownLayer,
    WrongBlockCount,
    WrongEpoch,
    WrongSequence,
    WrongTicket,
)
from hma_serve.kvblock.frame import contiguous_pieces, encode_frame
from hma_serve.kvblock.limits import BEST_PAYLOAD_BYTES, GROUP_TOKENS
from hma_serve.kvblock.split import Rectangle, split_blocks
from hma_serve.v1.kv_block_pb2 import KV_TOKEN_ORDER_ASCENDING, KvBlockHeader, KvSection
from hma_serve.v1.kv_transfer_pb2 import PushHeader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hma_serve.kvblock.codecs import Payload
    from hma_serve.kvblock.manifest import RolePlan, StreamPlan
    from hma_serve.v1.kv_block_pb2 import KvRole
    from hma_serve.v1.kv_transfer_pb2 import PushEnd


class StreamWriter:
    """Cuts packed layers into blocks with headers, in the order of its calls.

    Attributes:
        sent: Blocks so far; what the end frame reports.
        payload_bytes: Their payloads; what credits count.
    """

    def __init__(self, plan: StreamPlan, ticket: bytes, epoch: int) -> None:
        self._plan = plan
        self._ticket = ticket
        self._epoch = epoch
        self.sent = 0
        self.payload_bytes = 0

    def blocks(
        self,
        layer: int,
        role: KvRole.ValueType,
        packed: NDArray[np.uint8],
        *,
        token_start: int,
        head_start: int = 0,
        last: bool = False,
        max_payload: int = BEST_PAYLOAD_BYTES,
    ) -> Iterator[tuple[PushHeader, NDArray[np.uint8]]]:
        """Cut the packed KV of one layer and role, a chunk of tokens, into blocks.

        Args:
            layer: Layer index in the model.
            role: KV_ROLE_K or KV_ROLE_V.
            packed: uint8 [heads, groups, group_bytes] as a codec's encoder gives it; must not change until it is sent.
            token_start: Position of the chunk's first token in the prompt.
            head_start: First head, when this producer holds a part of them.
            last: The stream's last chunk: its last block is marked.
            max_payload: Payload bytes of a block.

        Yields:
            Header and payload, a view of `packed`, for `encode_frame`.

        Raises:
            UnknownLayer: The manifest has no such layer and role.
            ValueError: `packed` is not what the manifest's codec gives.
        """
        role_plan = self._role_plan(layer, role)
        if packed.ndim != 3 or packed.dtype != np.uint8 or packed.shape[2] != role_plan.group_bytes:
            raise ValueError(f"packed must be uint8 [heads, groups, {role_plan.group_bytes}], not {packed.shape}")
        parts = list(split_blocks(packed.shape[0], packed.shape[1], role_plan.group_bytes, max_payload))
        for part in parts:
            payload = to_sections(role_plan.codec, role_plan.head_dim, part.of(packed))
            header = self._header(role_plan, part, payload, token_start, head_start)
            header.last = last and part is parts[-1]
            self.sent += 1
            self.payload_bytes += payload.size
            yield PushHeader(block=header), payload

    def frames(
        self,
        layer: int,
        role: KvRole.ValueType,
        packed: NDArray[np.uint8],
        *,
        token_start: int,
        head_start: int = 0,
        last: bool = False,
        max_payload: int = BEST_PAYLOAD_BYTES,
    ) -> Iterator[bytes]:
        """As `blocks`, as serialised `PushRequest`s: each copies its payload once."""
        for header, payload in self.blocks(
            layer,
            role,
            packed,
            token_start=token_start,
            head_start=head_start,
            last=last,
            max_payload=max_payload,
        ):
            yield encode_frame(header, payload)

    def _role_plan(self, layer: int, role: KvRole.ValueType) -> RolePlan:
        found = self._plan.roles.get((layer, int(role)))
        if found is None:
            raise UnknownLayer(f"the manifest has no layer {layer} with role {role}", field="layer")
        return found

    def _header(
        self, role_plan: RolePlan, part: Rectangle, payload: NDArray[np.uint8], token_start: int, head_start: int
    ) -> KvBlockHeader:
        tokens = part.group_count * GROUP_TOKENS
        return KvBlockHeader(
            ticket=self._ticket,
            epoch=self._epoch,
            sequence=self.sent,
            layer=role_plan.layer,
            role=role_plan.role,
            token_start=token_start + part.group_start * GROUP_TOKENS,
            token_count=tokens,
            padded_count=tokens,
            token_order=KV_TOKEN_ORDER_ASCENDING,
            head_start=head_start + part.head_start,
            head_count=part.head_count,
            codec=role_plan.codec_index,
            sections=_sections(role_plan, part, payload),
        )


class StreamReader:
    """Checks the blocks of one stream in their order.

    Raises:
        Incompatible: `coverage` is that of another cache.

    Attributes:
        received: Blocks so far.
        payload_bytes: Their payloads.
        coverage: What has arrived; shared when several streams fill one ticket.
    """

    def __init__(self, plan: StreamPlan, ticket: bytes, epoch: int, coverage: Coverage | None = None) -> None:
        self._plan = plan
        self._ticket = ticket
        self._epoch = epoch
        self._ended = False
        self.received = 0
        self.payload_bytes = 0
        self.coverage = coverage or Coverage(plan)
        self.coverage.admit(plan)

    @property
    def complete(self) -> bool:
        """Every unit of the manifest has arrived."""
        return self.coverage.complete

    def validate(self, header: KvBlockHeader, payload: Payload) -> Block:
        """Check every rule for the stream's next block and count it in. State changes only if all hold.

        Args:
            header: Of the block.
            payload: The frame's payload; the result holds a view of it.

        Raises:
            KvFormatError: The subclass of the first broken rule.
        """
        self._check_identity(header)
        block = validate_block(self._plan, header, payload)
        self.coverage.add(block)
        self.received += 1
        self.payload_bytes += block.payload.size
        self._ended = block.last
        return block

    def finish(self, end: PushEnd) -> None:
        """Check the end frame: all blocks came, and with the ticket's last stream the manifest is covered.

        Raises:
            WrongBlockCount: The producer sent another number of blocks.
            IncompleteCoverage: Something never came, and no other stream can bring it.
        """
        if end.blocks != self.received:
            raise WrongBlockCount(f"{end.blocks} sent, {self.received} received", field="blocks")
        self.coverage.end_stream()

    def _check_identity(self, header: KvBlockHeader) -> None:
        if header.ticket != self._ticket:
            raise WrongTicket("the block belongs to another ticket", field="ticket")
        if header.epoch != self._epoch:
            raise WrongEpoch(f"attempt {header.epoch}, this stream is attempt {self._epoch}", field="epoch")
        if header.sequence != self.received:
            raise WrongSequence(f"{header.sequence} where {self.received} is next", field="sequence")
        if self._ended:
            raise WrongSequence("a block follows the last one", field="last")


def _sections(role_plan: RolePlan, part: Rectangle, payload: NDArray[np.uint8]) -> list[KvSection]:
    tokens = part.group_count * GROUP_TOKENS
    sections = role_plan.codec.payload_sections(part.head_count, tokens, role_plan.head_dim)
    if len(sections) == 1:  # a view of the layer, possibly strided
        return [KvSection(kind=sections[0].kind, length=sections[0].length, crc32c=_checksum(payload))]
    return [
        KvSection(kind=kind, offset=offset, length=length, crc32c=_checksum(payload[offset : offset + length]))
        for kind, offset, length in sections
    ]


def _checksum(payload: NDArray[np.uint8]) -> int:
    crc = 0
    for piece in contiguous_pieces(payload):
        crc = google_crc32c.extend(crc, np.asarray(piece))
    return crc
