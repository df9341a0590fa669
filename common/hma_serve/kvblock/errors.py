"""One exception per rule of the KV block format, so that a refusal says exactly which rule a peer broke.

The package does not know the product's error table (it imports nothing of ours); each rule carries the
table's `code` instead, and callers translate at one place: `ERRORS[error.code](error.message,
field=error.field)`.

Two codes only. `data_loss`: these bytes are not what a correct peer sends, the attempt is over.
`failed_precondition`: the bytes may be right, but not between this pair or in this state.
"""

from __future__ import annotations

from typing import ClassVar


class KvFormatError(Exception):
    """Base of all refusals; never raised itself.

    Attributes:
        rule: Stable name of the broken rule, as in the rules table of docs/kv-block-format.md.
        code: Code of the product's error table.
        field: Path of the field at fault inside the message that was checked.
        message: What was found and what the rule wants.
    """

    rule: ClassVar[str] = ""
    code: ClassVar[str] = "data_loss"

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(f"{self.rule}: {field}: {message}")
        self.field = field
        self.message = str(self)


class MessageTooLarge(KvFormatError):
    """A frame is larger than the receiver's limit."""

    rule = "message_too_large"


class MalformedFrame(KvFormatError):
    """A frame is not a well-formed protobuf message."""

    rule = "malformed_frame"


class UnsupportedVersion(KvFormatError):
    """The manifest is of another major version."""

    rule = "unsupported_version"
    code = "failed_precondition"


class UnknownCriticalExtension(KvFormatError):
    """The producer demands understanding of something that this reader does not know."""

    rule = "unknown_critical_extension"
    code = "failed_precondition"


class LimitExceeded(KvFormatError):
    """A count or a derived size is above the receiver's cap; nothing was allocated for it."""

    rule = "limit_exceeded"
    code = "failed_precondition"


class UnknownCodec(KvFormatError):
    """No reader for this codec id, version and scale granularity."""

    rule = "unknown_codec"
    code = "failed_precondition"


class UnknownRole(KvFormatError):
    """A role that this version does not define."""

    rule = "unknown_role"
    code = "failed_precondition"


class UnknownLayer(KvFormatError):
    """The manifest names no such layer with this role."""

    rule = "unknown_layer"


class DuplicateLayer(KvFormatError):
    """The manifest names a layer, or a role of a layer, twice."""

    rule = "duplicate_layer"


class EmptyManifest(KvFormatError):
    """The manifest describes no layer, or a layer group without roles."""

    rule = "empty_manifest"


class BadGeometry(KvFormatError):
    """Heads or head_dim are zero, or do not fit the codec."""

    rule = "bad_geometry"


class BadOffset(KvFormatError):
    """A K offset names an unknown head, is not finite, is repeated or has the wrong length."""

    rule = "bad_k_offset"


class PartialGroup(KvFormatError):
    """A token range is empty or not made of whole groups of 32."""

    rule = "partial_group"


class WrongTicket(KvFormatError):
    """The block belongs to another request."""

    rule = "wrong_ticket"
    code = "failed_precondition"


class WrongEpoch(KvFormatError):
    """The block belongs to another attempt."""

    rule = "wrong_epoch"
    code = "failed_precondition"


class WrongSequence(KvFormatError):
    """A block is missing, repeated, out of order, or follows the one marked last."""

    rule = "wrong_sequence"


class WrongCodec(KvFormatError):
    """The block names another codec than the manifest does for its layer and role."""

    rule = "wrong_codec"


class WrongTokenOrder(KvFormatError):
    """A token order that this version does not define."""

    rule = "wrong_token_order"


class WrongPadding(KvFormatError):
    """Valid and padded token counts differ, which version 1 forbids."""

    rule = "wrong_padding"


class TokensOutOfRange(KvFormatError):
    """The block's tokens are not within the manifest's."""

    rule = "tokens_out_of_range"


class HeadsOutOfRange(KvFormatError):
    """The block's heads are not within the manifest's."""

    rule = "heads_out_of_range"


class BadPrefixHash(KvFormatError):
    """The prefix hash is longer than 64 bytes."""

    rule = "bad_prefix_hash"


class WrongSectionCount(KvFormatError):
    """The codec has another number of sections."""

    rule = "wrong_section_count"


class WrongSectionKind(KvFormatError):
    """The codec has another section at this place."""

    rule = "wrong_section_kind"


class WrongSectionOffset(KvFormatError):
    """A section does not begin where the one before ends."""

    rule = "wrong_section_offset"


class WrongSectionLength(KvFormatError):
    """A section's length is not the one that codec, heads, tokens and head_dim give."""

    rule = "wrong_section_length"


class TruncatedPayload(KvFormatError):
    """The payload ends before its sections do."""

    rule = "truncated_payload"


class TrailingBytes(KvFormatError):
    """The payload goes on after its sections end."""

    rule = "trailing_bytes"


class ChecksumMismatch(KvFormatError):
    """A section's CRC32C is not the header's."""

    rule = "checksum_mismatch"


class BannedCode(KvFormatError):
    """The payload holds a code that the codec bans: Inf, NaN, or a block-float code or exponent without meaning."""

    rule = "banned_code"


class OverlappingRange(KvFormatError):
    """A (layer, role, head, group) of the block has already arrived."""

    rule = "overlapping_range"


class UnevenScales(KvFormatError):
    """Units that must share a scale carry different ones."""

    rule = "uneven_scales"


class WrongBlockCount(KvFormatError):
    """The end frame counts other blocks than arrived."""

    rule = "wrong_block_count"


class IncompleteCoverage(KvFormatError):
    """The stream ended before every (layer, role, head, group) had arrived."""

    rule = "incomplete_coverage"


class Incompatible(KvFormatError):
    """Producer and receiver differ in meaning; `field` names in what."""

    rule = "incompatible"
    code = "failed_precondition"
