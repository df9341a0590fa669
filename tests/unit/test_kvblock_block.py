"""One test per rule that a block can break, by itself or as the next of its stream."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hma_serve import kvblock
from hma_serve.core.errors import ERRORS
from hma_serve.kvblock import errors
from hma_serve.kvblock.block import checksum
from hma_serve.v1.kv_block_pb2 import KV_ROLE_LATENT, KV_ROLE_UNSPECIFIED, KV_ROLE_V, KvBlockHeader, KvSection
from hma_serve.v1.kv_transfer_pb2 import PushEnd
from support.kv_streams import EPOCH, TICKET, one_block, random_units, small_plan

if TYPE_CHECKING:
    from collections.abc import Callable


def reader(plan: kvblock.StreamPlan) -> kvblock.StreamReader:
    return kvblock.StreamReader(plan, TICKET, EPOCH)


def test_a_right_block_is_read_without_copying() -> None:
    plan = small_plan()
    header, payload = one_block(plan, prefix_hash=b"h" * 64)
    block = reader(plan).validate(header, payload)
    assert (block.layer, block.role, block.sequence, block.last) == (1, 1, 0, False)
    assert (block.head_start, block.head_count, block.token_start, block.token_count) == (0, 2, 32, 64)
    assert (block.group_start, block.group_count, block.prefix_hash) == (0, 2, b"h" * 64)
    assert block.groups().shape == (2, 2, 1088)
    assert np.shares_memory(block.groups(), payload)
    assert np.array_equal(block.groups(), random_units(plan))


HEADER_RULES: list[tuple[dict[str, object], type[errors.KvFormatError], str]] = [
    ({"ticket": b"x" * 16}, errors.WrongTicket, "ticket"),
    ({"epoch": EPOCH - 1}, errors.WrongEpoch, "epoch"),
    ({"epoch": EPOCH + 1}, errors.WrongEpoch, "epoch"),
    ({"sequence": 1}, errors.WrongSequence, "sequence"),
    ({"role": KV_ROLE_UNSPECIFIED}, errors.UnknownRole, "role"),
    ({"role": KV_ROLE_LATENT}, errors.UnknownRole, "role"),
    ({"role": 200}, errors.UnknownRole, "role"),
    ({"layer": 2}, errors.UnknownLayer, "layer"),
    ({"codec": 1}, errors.WrongCodec, "codec"),
    ({"token_order": 0}, errors.WrongTokenOrder, "token_order"),
    ({"token_order": 2}, errors.WrongTokenOrder, "token_order"),
    ({"token_start": 33}, errors.PartialGroup, "token_start"),
    ({"token_count": 63}, errors.PartialGroup, "token_count"),
    ({"token_count": 0, "padded_count": 0}, errors.PartialGroup, "token_count"),
    ({"padded_count": 96}, errors.WrongPadding, "padded_count"),
    ({"token_start": 0}, errors.TokensOutOfRange, "token_start"),
    ({"token_start": 64}, errors.TokensOutOfRange, "token_start"),
    ({"token_start": 2**32 - 32}, errors.TokensOutOfRange, "token_start"),
    ({"head_start": 1}, errors.HeadsOutOfRange, "head_start"),
    ({"head_count": 0}, errors.HeadsOutOfRange, "head_start"),
    ({"head_count": 2**32 - 1}, errors.HeadsOutOfRange, "head_start"),
    ({"prefix_hash": bytes(65)}, errors.BadPrefixHash, "prefix_hash"),
]


@pytest.mark.parametrize(("fields", "rule", "field"), HEADER_RULES)
def test_each_header_rule_has_its_error(
    fields: dict[str, object], rule: type[errors.KvFormatError], field: str
) -> None:
    plan = small_plan()
    header, payload = one_block(plan, **fields)
    _refused(plan, header, payload, rule, field)


def _sections(*sections: KvSection) -> Callable[[KvBlockHeader], None]:
    def change(header: KvBlockHeader) -> None:
        del header.sections[:]
        header.sections.extend(sections)

    return change


def _section(**fields: int) -> Callable[[KvBlockHeader], None]:
    def change(header: KvBlockHeader) -> None:
        for name, value in fields.items():
            setattr(header.sections[0], name, value)

    return change


SECTION_RULES: list[tuple[Callable[[KvBlockHeader], None], type[errors.KvFormatError], str]] = [
    (_sections(), errors.WrongSectionCount, "sections"),
    (_sections(KvSection(), KvSection()), errors.WrongSectionCount, "sections"),
    (_section(kind=2), errors.WrongSectionKind, "sections[0].kind"),
    (_section(offset=1), errors.WrongSectionOffset, "sections[0].offset"),
    (_section(length=4 * 1088 - 1), errors.WrongSectionLength, "sections[0].length"),
    (_section(length=2**32 - 1), errors.WrongSectionLength, "sections[0].length"),
    (_section(crc32c=1), errors.ChecksumMismatch, "sections[0].crc32c"),
    (lambda header: header.critical_extensions.append(1), errors.UnknownCriticalExtension, "critical_extensions"),
]


@pytest.mark.parametrize(("change", "rule", "field"), SECTION_RULES)
def test_each_section_rule_has_its_error(
    change: Callable[[KvBlockHeader], None], rule: type[errors.KvFormatError], field: str
) -> None:
    plan = small_plan()
    header, payload = one_block(plan)
    change(header)
    _refused(plan, header, payload, rule, field)


def test_payload_rules_have_their_errors() -> None:
    plan = small_plan()
    header, payload = one_block(plan)
    _refused(plan, header, payload[:-1], errors.TruncatedPayload, "payload")
    _refused(plan, header, payload[:0], errors.TruncatedPayload, "payload")
    _refused(plan, header, np.append(payload, payload[:1]), errors.TrailingBytes, "payload")
    flipped = payload.copy()
    flipped[100] ^= 1
    _refused(plan, header, flipped, errors.ChecksumMismatch, "sections[0].crc32c")


def test_banned_codes_are_refused_even_with_a_right_checksum() -> None:
    plan = small_plan()
    units = random_units(plan)
    units[1, 1, 70] = 0x80
    header, payload = next(kvblock.StreamWriter(plan, TICKET, EPOCH).blocks(0, KV_ROLE_V, units, token_start=32))
    _refused(plan, header.block, payload.reshape(-1), errors.BannedCode, "payload")


def test_checksum_is_crc32c() -> None:
    assert checksum(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283


@pytest.mark.parametrize(
    "again", [{}, {"head_start": 1, "head_count": 1}, {"token_start": 64, "token_count": 32, "padded_count": 32}]
)
def test_overlapping_ranges_are_refused(again: dict[str, int]) -> None:
    plan = small_plan()
    stream = reader(plan)
    stream.validate(*one_block(plan))
    units = random_units(plan)[again.get("head_start", 0) :, : again.get("token_count", 64) // 32]
    writer = kvblock.StreamWriter(plan, TICKET, EPOCH)
    writer.sent = 1
    header, payload = next(
        writer.blocks(1, 1, units, token_start=again.get("token_start", 32), head_start=again.get("head_start", 0))  # type: ignore[arg-type]
    )
    with pytest.raises(errors.OverlappingRange) as refused:
        stream.validate(header.block, np.ascontiguousarray(payload))
    assert "layer 1" in refused.value.message
    assert stream.received == 1


def test_the_same_block_twice_is_a_wrong_sequence() -> None:
    plan = small_plan()
    stream = reader(plan)
    header, payload = one_block(plan)
    stream.validate(header, payload)
    with pytest.raises(errors.WrongSequence):
        stream.validate(header, payload)


def test_nothing_follows_the_last_block() -> None:
    plan = small_plan()
    stream = reader(plan)
    stream.validate(*one_block(plan, last=True))
    header, payload = one_block(plan, sequence=1)
    with pytest.raises(errors.WrongSequence) as refused:
        stream.validate(header, payload)
    assert refused.value.field == "last"


def test_the_end_is_refused_while_anything_is_missing() -> None:
    plan = small_plan()
    stream = reader(plan)
    stream.validate(*one_block(plan))
    with pytest.raises(errors.WrongBlockCount):
        stream.finish(PushEnd(blocks=2))
    with pytest.raises(errors.IncompleteCoverage, match="12 of 16 units are missing, 4 of them in layer 0"):
        stream.finish(PushEnd(blocks=1))


def test_a_refused_block_leaves_no_trace() -> None:
    plan = small_plan()
    stream = reader(plan)
    header, payload = one_block(plan)
    damaged = payload.copy()
    damaged[0] ^= 1
    with pytest.raises(errors.ChecksumMismatch):
        stream.validate(header, damaged)
    assert (stream.received, stream.payload_bytes, stream.coverage.missing) == (0, 0, plan.units)
    stream.validate(header, payload)
    assert (stream.received, stream.payload_bytes) == (1, payload.size)


RULES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.KvFormatError) and kind is not errors.KvFormatError
]


def test_every_rule_has_its_own_name_and_a_code_of_the_product() -> None:
    assert len({kind.rule for kind in RULES}) == len(RULES)
    assert all(kind.rule and kind.code in ERRORS for kind in RULES)


@pytest.mark.parametrize("kind", RULES)
def test_every_rule_stands_in_the_document_with_its_code(kind: type[errors.KvFormatError]) -> None:
    document = (Path(__file__).parents[2] / "docs" / "kv-block-format.md").read_text()
    rows = [line for line in document.splitlines() if line.startswith("|") and f"`{kind.rule}`" in line]
    assert len(rows) == 1
    assert f"`{kind.code}`" in rows[0]


def test_a_block_of_two_sections_is_written_and_read_back() -> None:
    """No codec of this version has two sections; those that will are held to the same path."""
    plan = small_plan()
    codec = _TwoSections(8)
    roles = {key: dataclasses.replace(role_plan, codec=codec) for key, role_plan in plan.roles.items()}
    plan = dataclasses.replace(plan, roles=roles)
    units = random_units(plan)
    header, payload = next(kvblock.StreamWriter(plan, TICKET, EPOCH).blocks(0, KV_ROLE_V, units, token_start=32))
    assert [(section.kind, section.offset, section.length) for section in header.block.sections] == [
        (2, 0, 4 * 64),
        (1, 4 * 64, 4 * 1024),
    ]
    assert np.array_equal(payload[: 4 * 64], units[..., :64].reshape(-1))
    assert np.array_equal(reader(plan).validate(header.block, payload).groups(), units)
    payload[-1] ^= 1
    _refused(plan, header.block, payload, errors.ChecksumMismatch, "sections[1].crc32c")


class _TwoSections(type(kvblock.codec("tt_bfp8_b"))):  # type: ignore[misc]
    def section_units(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        return ((2, head_dim // 32 * 64), (1, head_dim // 32 * 1024))

    def _find_banned(self, payload: object, head_dim: int) -> str:
        return ""


def _refused(
    plan: kvblock.StreamPlan,
    header: KvBlockHeader,
    payload: np.ndarray,
    rule: type[errors.KvFormatError],
    field: str,
) -> None:
    with pytest.raises(errors.KvFormatError) as refused:
        reader(plan).validate(header, payload)
    assert type(refused.value) is rule
    assert refused.value.field == field
