"""What a codec is to the rest of the format: a payload layout, a normative decode function, a reference encoder, bans.

Every payload is made of *units*: one unit is the bytes of one head and one group of 32 tokens in one section.
A section holds its units head-major (all groups of head 0, then of head 1, ...). Sizes are therefore
products, any rectangle of heads and groups can be cut out without decoding, and a receiver moves units to
pages as opaque bytes.

A codec lives in one file: it subclasses `Codec` and gets one line in the table of `codecs/__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from hma_serve.kvblock.errors import BadGeometry, BannedCode, KvFormatError, TrailingBytes, TruncatedPayload
from hma_serve.kvblock.limits import GROUP_TOKENS
from hma_serve.v1.kv_block_pb2 import (
    KV_ROUNDING_NEAREST_EVEN,
    KV_SCALE_GRANULARITY_UNSPECIFIED,
    KV_SECTION_KIND_ELEMENTS,
    KvCodecSpec,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.v1.kv_block_pb2 import KvCodecId, KvRounding, KvScaleGranularity, KvSectionKind

Payload: TypeAlias = "bytes | bytearray | memoryview | NDArray[np.uint8]"
"""C-contiguous bytes."""


class SectionUnit(NamedTuple):
    """One section of a codec: its kind and the bytes of one unit."""

    kind: KvSectionKind.ValueType
    unit_bytes: int


class Section(NamedTuple):
    """Where a section lies in a payload, bytes."""

    kind: KvSectionKind.ValueType
    offset: int
    length: int


class Codec(ABC):
    """One element format with its scales, at one version of its decode function.

    Attributes:
        id: Id on the wire.
        name: The id's name in lower case; what configuration uses.
        version: Version of the decode function.
        granularity: What one scale covers, where the codec leaves it open.
        shared_bytes: The last bytes of a unit that repeat a scale of more than the unit; see `Coverage`.
        rounds: Encoding may lose something.
    """

    id: KvCodecId.ValueType
    name: str
    version: int = 1
    granularity: KvScaleGranularity.ValueType = KV_SCALE_GRANULARITY_UNSPECIFIED
    shared_bytes: int = 0
    rounds: bool = True

    def __repr__(self) -> str:
        return f"<codec {self.name} v{self.version}>"

    def spec(self, rounding: KvRounding.ValueType = KV_ROUNDING_NEAREST_EVEN) -> KvCodecSpec:
        """The manifest's entry for this codec, attesting the producer's `rounding`."""
        return KvCodecSpec(id=self.id, version=self.version, granularity=self.granularity, rounding=rounding)

    @abstractmethod
    def group_bytes(self, head_dim: int) -> int:
        """Bytes of one head and one group of 32 tokens, all sections together: what a page stores."""

    def section_units(self, head_dim: int) -> tuple[SectionUnit, ...]:
        """The codec's sections in payload order. One, with everything interleaved, unless a codec says otherwise."""
        return (SectionUnit(KV_SECTION_KIND_ELEMENTS, self.group_bytes(head_dim)),)

    @abstractmethod
    def check_geometry(self, head_dim: int) -> None:
        """Refuse a head_dim that the codec cannot lay out.

        Raises:
            BadGeometry: With what the codec needs.
        """

    def payload_bytes(self, heads: int, tokens: int, head_dim: int) -> int:
        """Bytes of a payload of `heads` x `tokens` (a multiple of 32)."""
        return heads * (tokens // GROUP_TOKENS) * self.group_bytes(head_dim)

    def payload_sections(self, heads: int, tokens: int, head_dim: int) -> tuple[Section, ...]:
        """Kind, offset and length of every section of such a payload, without gaps."""
        units = heads * (tokens // GROUP_TOKENS)
        sections = []
        offset = 0
        for kind, unit_bytes in self.section_units(head_dim):
            sections.append(Section(kind, offset, units * unit_bytes))
            offset += units * unit_bytes
        return tuple(sections)

    @abstractmethod
    def encode(
        self, values: NDArray[np.float32], rounding: KvRounding.ValueType = KV_ROUNDING_NEAREST_EVEN
    ) -> NDArray[np.uint8]:
        """Pack values: the reference encoder, for tests and tools.

        Args:
            values: float32 [heads, tokens, head_dim], tokens a multiple of 32.
            rounding: One that the codec knows.

        Returns:
            uint8 [heads, tokens / 32, group_bytes]: units, which are the payload's bytes in order if the codec has one
            section.

        Raises:
            ValueError: A value is not finite, does not fit the codec's range, or the rounding is not the codec's.
        """

    @abstractmethod
    def _decode(self, payload: NDArray[np.uint8], heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        """Decode a payload whose size is right."""

    @abstractmethod
    def _steps(self, payload: NDArray[np.uint8], heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        """`steps` of a payload whose size is right."""

    @abstractmethod
    def _find_banned(self, payload: NDArray[np.uint8], head_dim: int) -> str:
        """Say which banned code the payload holds, or return an empty string."""

    def decode(self, payload: Payload, heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        """Decode a payload: the normative function, for tests and tools. Banned codes decode to anything.

        Args:
            payload: Exactly `payload_bytes(heads, tokens, head_dim)` bytes.
            heads: KV heads in the payload.
            tokens: Tokens in the payload, a multiple of 32.
            head_dim: Channels of a head.

        Returns:
            float32 [heads, tokens, head_dim].

        Raises:
            BadGeometry: The codec cannot lay out head_dim.
            TruncatedPayload: Fewer bytes than that.
            TrailingBytes: More bytes than that.
        """
        return self._decode(self._sized(payload, heads, tokens, head_dim), heads, tokens, head_dim)

    def steps(self, payload: Payload, heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        """How finely a payload's own scales resolve each of its values, for tests and tools.

        Args:
            payload: As `decode`.
            heads: As `decode`.
            tokens: As `decode`.
            head_dim: As `decode`.

        Returns:
            float32 [heads, tokens, head_dim]: from each value to the farther one of its two neighbours among the values
            that the codec has under the value's scale. 0: the codec is exact, or the scale is 0.

        Raises:
            KvFormatError: As `decode`.
        """
        return self._steps(self._sized(payload, heads, tokens, head_dim), heads, tokens, head_dim)

    def check_payload(self, payload: Payload, heads: int, tokens: int, head_dim: int) -> None:
        """Refuse a payload of the wrong size or with codes that may not travel.

        Raises:
            BannedCode: With the kind of code found.
            KvFormatError: As `decode`.
        """
        self.check_codes(self._sized(payload, heads, tokens, head_dim), head_dim)

    def check_codes(self, payload: NDArray[np.uint8], head_dim: int) -> None:
        """Refuse banned codes in a payload whose size is known to be right.

        Raises:
            BannedCode: With the kind of code found.
        """
        banned = self._find_banned(payload, head_dim) if payload.size else ""
        if banned:
            raise BannedCode(f"{self.name} bans {banned}", field="payload")

    def _sized(self, payload: Payload, heads: int, tokens: int, head_dim: int) -> NDArray[np.uint8]:
        self.check_geometry(head_dim)
        view = as_bytes(payload)
        check_size(view.size, self.payload_bytes(heads, tokens, head_dim))
        return view


def as_bytes(payload: Payload) -> NDArray[np.uint8]:
    """A one-dimensional uint8 view of contiguous bytes, without copying."""
    if isinstance(payload, np.ndarray):
        return payload.reshape(-1).view(np.uint8)
    return np.frombuffer(payload, dtype=np.uint8)


def check_size(found: int, wanted: int) -> None:
    """Refuse a payload of any other size.

    Raises:
        TruncatedPayload: Too few bytes.
        TrailingBytes: Too many bytes.
    """
    if found != wanted:
        rule: type[KvFormatError] = TruncatedPayload if found < wanted else TrailingBytes
        raise rule(f"{found} bytes where the header gives {wanted}", field="payload")


def check_encodable(values: NDArray[np.float32]) -> None:
    """Refuse values that no codec can carry or that are not whole groups.

    Raises:
        ValueError: A value is Inf or NaN, or the shape is not [heads, groups * 32, head_dim].
    """
    if values.ndim != 3 or values.shape[1] % GROUP_TOKENS:
        raise ValueError(f"values must be [heads, tokens, head_dim] in whole groups of 32 tokens, not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("Inf and NaN cannot be encoded")


def check_multiple_of_32(codec: str, head_dim: int) -> None:
    """Refuse a head_dim that tiles or groups of 32 channels do not fill.

    Raises:
        BadGeometry: Not a positive multiple of 32.
    """
    if head_dim <= 0 or head_dim % 32:
        raise BadGeometry(f"{codec} needs a positive multiple of 32, not {head_dim}", field="head_dim")


def check_positive(codec: str, head_dim: int) -> None:
    """Refuse a head_dim of zero.

    Raises:
        BadGeometry: Not positive.
    """
    if head_dim <= 0:
        raise BadGeometry(f"{codec} needs a positive head_dim, not {head_dim}", field="head_dim")
