"""One block: header and payload, checked against the plan of its stream.

The order of the checks is fixed and documented (docs/kv-block-format.md): identity, meaning, ranges, derived
sizes, then the two passes over the bytes. A rule may rely on those before it, so no number from the header
reaches an allocation or a slice unchecked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from hma_serve.kvblock.codecs.base import Payload, as_bytes, check_size
from hma_serve.kvblock.errors import (
    BadPrefixHash,
    ChecksumMismatch,
    HeadsOutOfRange,
    PartialGroup,
    TokensOutOfRange,
    UnknownLayer,
    UnknownRole,
    WrongCodec,
    WrongPadding,
    WrongSectionCount,
    WrongSectionKind,
    WrongSectionLength,
    WrongSectionOffset,
    WrongTokenOrder,
)
from hma_serve.kvblock.limits import GROUP_TOKENS, MAX_PREFIX_HASH_BYTES
from hma_serve.kvblock.manifest import KNOWN_ROLES, RolePlan, StreamPlan, check_extensions
from hma_serve.v1.kv_block_pb2 import KV_TOKEN_ORDER_ASCENDING

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.kvblock.codecs import Codec, Section
    from hma_serve.v1.kv_block_pb2 import KvBlockHeader, KvRole


@dataclass(frozen=True, slots=True)
class Block:
    """A block that broke no rule: a rectangle of heads and tokens of one layer and role, with its bytes.

    Attributes:
        role_plan: The manifest's entry for its layer and role.
        sequence: Its number in the stream.
        last: The stream's last block.
        head_start: First KV head.
        head_count: KV heads.
        token_start: Position of the first token in the prompt.
        token_count: Tokens, a multiple of 32.
        group_start: First group of 32 tokens, counted from the stream's first token.
        prefix_hash: Content hash of the prefix that ends with the block's tokens; may be empty.
        payload: uint8 [bytes], a view of the frame it came in.
    """

    role_plan: RolePlan
    sequence: int
    last: bool
    head_start: int
    head_count: int
    token_start: int
    token_count: int
    group_start: int
    prefix_hash: bytes
    payload: NDArray[np.uint8]

    @property
    def layer(self) -> int:
        """Layer index in the model."""
        return self.role_plan.layer

    @property
    def role(self) -> KvRole.ValueType:
        """KV_ROLE_K or KV_ROLE_V."""
        return self.role_plan.role

    @property
    def group_count(self) -> int:
        """Groups of 32 tokens."""
        return self.token_count // GROUP_TOKENS

    def groups(self) -> NDArray[np.uint8]:
        """Page units, uint8 [head_count, group_count, group_bytes]: a view if the codec has one section."""
        codec, head_dim = self.role_plan.codec, self.role_plan.head_dim
        sections = codec.payload_sections(self.head_count, self.token_count, head_dim)
        units = [
            self.payload[offset : offset + length].reshape(self.head_count, self.group_count, -1)
            for _, offset, length in sections
        ]
        return units[0] if len(units) == 1 else np.concatenate(units, axis=-1)


def to_sections(codec: Codec, head_dim: int, units: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The payload of page units: the inverse of `Block.groups`.

    Args:
        codec: Of the units.
        head_dim: Channels of a head.
        units: uint8 [heads, groups, group_bytes].

    Returns:
        `units` itself if the codec has one section, else uint8 [bytes], section after section.
    """
    sections = codec.section_units(head_dim)
    if len(sections) == 1:
        return units
    ends = np.cumsum([unit_bytes for _, unit_bytes in sections])
    return np.concatenate([part.reshape(-1) for part in np.split(units, ends[:-1], axis=-1)])


def validate_block(plan: StreamPlan, header: KvBlockHeader, payload: Payload) -> Block:
    """Check every rule that a block can break by itself; ticket, epoch, sequence and overlap belong to `StreamReader`.

    Args:
        plan: Of the stream.
        header: Of the block.
        payload: The frame's payload; the result holds a view of it.

    Raises:
        KvFormatError: The subclass of the first broken rule.
    """
    check_extensions(header.critical_extensions, "critical_extensions")
    role_plan = _check_address(plan, header)
    _check_tokens(plan, header)
    _check_heads(role_plan, header)
    if len(header.prefix_hash) > MAX_PREFIX_HASH_BYTES:
        raise BadPrefixHash(f"{len(header.prefix_hash)} bytes", field="prefix_hash")
    data = as_bytes(payload)
    _check_bytes(role_plan, header, data)
    return Block(
        role_plan=role_plan,
        sequence=header.sequence,
        last=header.last,
        head_start=header.head_start,
        head_count=header.head_count,
        token_start=header.token_start,
        token_count=header.token_count,
        group_start=(header.token_start - plan.token_start) // GROUP_TOKENS,
        prefix_hash=header.prefix_hash,
        payload=data,
    )


def _check_address(plan: StreamPlan, header: KvBlockHeader) -> RolePlan:
    if int(header.role) not in KNOWN_ROLES:
        raise UnknownRole(f"role {header.role} is not defined in this version", field="role")
    role_plan = plan.roles.get((header.layer, int(header.role)))
    if role_plan is None:
        raise UnknownLayer(f"the manifest has no layer {header.layer} with role {header.role}", field="layer")
    if header.codec != role_plan.codec_index:
        raise WrongCodec(f"{header.codec} where the manifest says {role_plan.codec_index}", field="codec")
    if header.token_order != KV_TOKEN_ORDER_ASCENDING:
        raise WrongTokenOrder(f"order {header.token_order} is not defined in this version", field="token_order")
    return role_plan


def _check_tokens(plan: StreamPlan, header: KvBlockHeader) -> None:
    start, count = header.token_start, header.token_count
    if start % GROUP_TOKENS:
        raise PartialGroup(f"{start} is not a multiple of {GROUP_TOKENS}", field="token_start")
    if not count or count % GROUP_TOKENS:
        raise PartialGroup(f"{count} is not a positive multiple of {GROUP_TOKENS}", field="token_count")
    if header.padded_count != count:
        raise WrongPadding(f"{header.padded_count} padded for {count} valid tokens", field="padded_count")
    if start < plan.token_start or start + count > plan.token_start + plan.token_count:
        raise TokensOutOfRange(
            f"[{start}, {start + count}) is not within [{plan.token_start}, {plan.token_start + plan.token_count})",
            field="token_start",
        )


def _check_heads(role_plan: RolePlan, header: KvBlockHeader) -> None:
    start, count = header.head_start, header.head_count
    if not count or start + count > role_plan.kv_heads:
        raise HeadsOutOfRange(
            f"[{start}, {start + count}) is empty or not within the {role_plan.kv_heads} heads", field="head_start"
        )


def _check_bytes(role_plan: RolePlan, header: KvBlockHeader, data: NDArray[np.uint8]) -> None:
    codec, head_dim = role_plan.codec, role_plan.head_dim
    wanted = codec.payload_sections(header.head_count, header.token_count, head_dim)
    _check_sections(header, wanted)
    check_size(data.size, wanted[-1].offset + wanted[-1].length)
    for index, section in enumerate(header.sections):
        found = checksum(data[section.offset : section.offset + section.length])
        if found != section.crc32c:
            raise ChecksumMismatch(
                f"CRC32C of the bytes is {found:08x}, the header says {section.crc32c:08x}",
                field=f"sections[{index}].crc32c",
            )
    codec.check_codes(data, head_dim)


def _check_sections(header: KvBlockHeader, wanted: tuple[Section, ...]) -> None:
    if len(header.sections) != len(wanted):
        raise WrongSectionCount(f"{len(header.sections)} where the codec has {len(wanted)}", field="sections")
    for index, (section, right) in enumerate(zip(header.sections, wanted, strict=True)):
        field = f"sections[{index}]"
        if section.kind != right.kind:
            raise WrongSectionKind(f"{section.kind} where the codec has {right.kind}", field=f"{field}.kind")
        if section.offset != right.offset:
            raise WrongSectionOffset(f"{section.offset}, not {right.offset}", field=f"{field}.offset")
        if section.length != right.length:
            raise WrongSectionLength(f"{section.length}, not {right.length}", field=f"{field}.length")


def checksum(data: NDArray[np.uint8]) -> int:
    """CRC32C (Castagnoli) of contiguous bytes. The library refuses memoryviews but reads arrays without copying."""
    return int(google_crc32c.value(data))
