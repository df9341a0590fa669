"""The instance record: what a worker says of itself and all that placement may know before it pairs two workers.

The record exists twice. `hma_serve.v1.worker_pb2.WorkerInfo` is its form on the wire and in the registry; the frozen
dataclasses here are its form in decisions, because snapshots are shared between threads and must not change under a
reader. Numbers that a newer version added, and that this one does not know, become `UNSPECIFIED`, which is compatible
with nothing: an old router leaves such a worker alone instead of failing on it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from hma_serve.v1 import kv_block_pb2, worker_pb2


class WorkerRole(StrEnum):
    """Which half of a request a worker computes; or a router, whose record only says where it is found."""

    UNSPECIFIED = "unspecified"
    PREFILL = "prefill"
    DECODE = "decode"
    ROUTER = "router"


class WorkerState(StrEnum):
    """Whether new work may be placed on a worker."""

    UNSPECIFIED = "unspecified"
    READY = "ready"
    DRAINING = "draining"


class _OpenEnum(IntEnum):
    """An enum of the wire: a number from a newer schema reads as 0, which every one of them calls UNSPECIFIED."""

    @classmethod
    def _missing_(cls, value: object) -> _OpenEnum:
        return cls(0)


class KvCodecId(_OpenEnum):
    """Codecs of the KV block format; numbers as in `kv_block.proto`."""

    UNSPECIFIED = 0
    F32 = 1
    BF16 = 2
    TT_BFP8_B = 3
    TT_BFP4_B = 4
    TT_BFP2_B = 5
    FP8_E4M3FN = 6
    FP8_E4M3FNUZ = 7
    FP8_E4M3_IEEE = 8
    MXFP8_E4M3 = 9
    MXINT8 = 10
    MXFP4 = 11
    NVFP4 = 12
    INT8 = 13
    INT4 = 14


class KvScaleGranularity(_OpenEnum):
    """What one scale covers, for codecs that leave it open."""

    UNSPECIFIED = 0
    TENSOR = 1
    HEAD = 2
    TOKEN_HEAD = 3
    TOKEN_GROUP = 4
    CHANNEL_GROUP = 5


class KvRounding(_OpenEnum):
    """What a producer attests of its encoder."""

    UNSPECIFIED = 0
    NEAREST_EVEN = 1
    NEAREST_AWAY = 2
    TRUNCATE = 3


class KvRopePairing(_OpenEnum):
    """Which channels RoPE turns together."""

    UNSPECIFIED = 0
    HALF_SPLIT = 1
    INTERLEAVED = 2


_ROLES = {
    worker_pb2.WORKER_ROLE_UNSPECIFIED: WorkerRole.UNSPECIFIED,
    worker_pb2.WORKER_ROLE_PREFILL: WorkerRole.PREFILL,
    worker_pb2.WORKER_ROLE_DECODE: WorkerRole.DECODE,
    worker_pb2.WORKER_ROLE_ROUTER: WorkerRole.ROUTER,
}
_STATES = {
    worker_pb2.WORKER_STATE_UNSPECIFIED: WorkerState.UNSPECIFIED,
    worker_pb2.WORKER_STATE_READY: WorkerState.READY,
    worker_pb2.WORKER_STATE_DRAINING: WorkerState.DRAINING,
}
_ROLE_NUMBERS = {role: number for number, role in _ROLES.items()}
_STATE_NUMBERS = {state: number for number, state in _STATES.items()}


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """One KV codec that a worker produces or accepts.

    Attributes:
        id: The codec.
        version: Version of its decode function.
        granularity: What one scale covers; UNSPECIFIED where the codec fixes it or has no scales.
        rounding: Attested by a producer, of interest to people only.
    """

    id: KvCodecId
    version: int = 1
    granularity: KvScaleGranularity = KvScaleGranularity.UNSPECIFIED
    rounding: KvRounding = KvRounding.UNSPECIFIED

    def decodes_like(self, other: CodecSpec) -> bool:
        """Whether one decode function reads both; false for a codec that this version does not know."""
        known = self.id is not KvCodecId.UNSPECIFIED
        return known and (self.id, self.version, self.granularity) == (other.id, other.version, other.granularity)

    @classmethod
    def from_proto(cls, message: kv_block_pb2.KvCodecSpec) -> CodecSpec:
        """The dataclass of a message."""
        return cls(
            id=KvCodecId(message.id),
            version=message.version,
            granularity=KvScaleGranularity(message.granularity),
            rounding=KvRounding(message.rounding),
        )

    def to_proto(self) -> kv_block_pb2.KvCodecSpec:
        """The message of this value."""
        return kv_block_pb2.KvCodecSpec(
            id=kv_block_pb2.KvCodecId.ValueType(self.id),
            version=self.version,
            granularity=kv_block_pb2.KvScaleGranularity.ValueType(self.granularity),
            rounding=kv_block_pb2.KvRounding.ValueType(self.rounding),
        )


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How positions were turned into keys.

    Attributes:
        pairing: UNSPECIFIED means that the model has no RoPE.
        theta: Base of the frequencies.
        scaling_hash: SHA-256 hex of the scaling parameters; empty means none.
    """

    pairing: KvRopePairing = KvRopePairing.UNSPECIFIED
    theta: float = 0.0
    scaling_hash: str = ""

    @classmethod
    def from_proto(cls, message: kv_block_pb2.KvRope) -> RopeSpec:
        """The dataclass of a message."""
        return cls(KvRopePairing(message.pairing), message.theta, message.scaling_hash)

    def to_proto(self) -> kv_block_pb2.KvRope:
        """The message of this value."""
        return kv_block_pb2.KvRope(
            pairing=kv_block_pb2.KvRopePairing.ValueType(self.pairing),
            theta=self.theta,
            scaling_hash=self.scaling_hash,
        )


@dataclass(frozen=True, slots=True)
class KvSupport:
    """What a worker can send or read of packed KV, as far as placement compares it; lists in order of preference.

    Attributes:
        semantic_hash: Of what both sides must agree in.
        k_codecs: Of keys.
        v_codecs: Of values.
        page_tokens: Sizes of pages.
        rope_pairings: Orders of the keys' channels.
        message: The serialised message, for the partner: it may hold what only a newer version knows.
    """

    semantic_hash: str
    k_codecs: tuple[CodecSpec, ...]
    v_codecs: tuple[CodecSpec, ...]
    page_tokens: tuple[int, ...]
    rope_pairings: tuple[KvRopePairing, ...]
    message: bytes = field(repr=False)

    @classmethod
    def from_proto(cls, message: kv_block_pb2.KvSupport) -> KvSupport:
        """The dataclass of a message."""
        return cls(
            semantic_hash=message.semantic_hash,
            k_codecs=tuple(CodecSpec.from_proto(codec) for codec in message.k_codecs),
            v_codecs=tuple(CodecSpec.from_proto(codec) for codec in message.v_codecs),
            page_tokens=tuple(message.page_tokens),
            rope_pairings=tuple(KvRopePairing(pairing) for pairing in message.rope_pairings),
            message=message.SerializeToString(deterministic=True),
        )

    def to_proto(self) -> kv_block_pb2.KvSupport:
        """The message, as it came."""
        return kv_block_pb2.KvSupport.FromString(self.message)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a worker computes.

    Attributes:
        id: The name clients ask for.
        fingerprint: SHA-256 hex of weights revision and config.
        layers: Decoder layers.
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Channels of one head.
        vocab: Size of the output.
        rope: How keys were turned.
        kv_fingerprint: `fingerprint` with the hash of the K offsets that keys are packed with; empty: there are none.
    """

    id: str
    fingerprint: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope: RopeSpec = field(default_factory=RopeSpec)
    kv_fingerprint: str = ""

    @property
    def stream_fingerprint(self) -> str:
        """What KV streams carry; two workers pair only if theirs are equal."""
        return self.kv_fingerprint or self.fingerprint

    @classmethod
    def from_proto(cls, message: worker_pb2.ModelInfo) -> ModelInfo:
        """The dataclass of a message."""
        return cls(
            id=message.id,
            fingerprint=message.fingerprint,
            layers=message.layers,
            hidden=message.hidden,
            heads=message.heads,
            kv_heads=message.kv_heads,
            head_dim=message.head_dim,
            vocab=message.vocab,
            rope=RopeSpec.from_proto(message.rope),
            kv_fingerprint=message.kv_fingerprint,
        )

    def to_proto(self) -> worker_pb2.ModelInfo:
        """The message of this value."""
        return worker_pb2.ModelInfo(
            id=self.id,
            fingerprint=self.fingerprint,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab=self.vocab,
            rope=self.rope.to_proto(),
            kv_fingerprint=self.kv_fingerprint,
        )


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What a worker refuses beyond.

    Attributes:
        max_model_len: Prompt plus completion, tokens.
        max_running: Requests that may run at once.
        max_waiting: Requests that may wait inside the worker.
        kv_capacity_tokens: Decode: tokens of KV that fit; 0 for prefill.
        overcommit: Decode: a request begins with memory for its prompt and is given more as it grows, instead of all
            that it may need.
    """

    max_model_len: int
    max_running: int
    max_waiting: int
    kv_capacity_tokens: int = 0
    overcommit: bool = False

    @classmethod
    def from_proto(cls, message: worker_pb2.WorkerLimits) -> WorkerLimits:
        """The dataclass of a message."""
        return cls(
            message.max_model_len,
            message.max_running,
            message.max_waiting,
            message.kv_capacity_tokens,
            message.overcommit,
        )

    def to_proto(self) -> worker_pb2.WorkerLimits:
        """The message of this value."""
        return worker_pb2.WorkerLimits(
            max_model_len=self.max_model_len,
            max_running=self.max_running,
            max_waiting=self.max_waiting,
            kv_capacity_tokens=self.kv_capacity_tokens,
            overcommit=self.overcommit,
        )


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a worker runs on.

    Attributes:
        vendor: For people, for example "nvidia"; "cpu" where there is no accelerator.
        name: For people.
        count: Devices of this one instance.
        memory_bytes: Of all of them together.
        price_per_hour: US dollars for the whole instance, as the operator states it; 0 means not stated.
    """

    vendor: str = ""
    name: str = ""
    count: int = 1
    memory_bytes: int = 0
    price_per_hour: float = 0.0

    @classmethod
    def from_proto(cls, message: worker_pb2.DeviceInfo) -> DeviceInfo:
        """The dataclass of a message."""
        return cls(message.vendor, message.name, message.count, message.memory_bytes, message.price_per_hour)

    def to_proto(self) -> worker_pb2.DeviceInfo:
        """The message of this value."""
        return worker_pb2.DeviceInfo(
            vendor=self.vendor,
            name=self.name,
            count=self.count,
            memory_bytes=self.memory_bytes,
            price_per_hour=self.price_per_hour,
        )


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One instance of a worker.

    Attributes:
        instance: Minted at process start by `mint_instance`; names the registry key.
        role: Prefill or decode.
        address: host:port of the worker's gRPC services.
        model: What it computes.
        codecs: Decode: accepted on receipt. Prefill: produced, one per KV role (K, then V).
        limits: What it refuses beyond.
        device: What it runs on.
        state: Whether new work may be placed on it.
        epoch: Raised at each registration of the same process; 0 before the first.
        profile: Prefill: what computes and packs, for example "tt_bfp8".
        http_address: host:port of /metrics, /live and /ready.
        rope_pairings: Decode: channel orders of K that are read besides that of the model's RoPE.
        kv: All that it can send or read; None: an older record, which states `codecs` and `rope_pairings` alone.
    """

    instance: str
    role: WorkerRole
    address: str
    model: ModelInfo
    codecs: tuple[CodecSpec, ...]
    limits: WorkerLimits
    device: DeviceInfo = field(default_factory=DeviceInfo)
    state: WorkerState = WorkerState.READY
    epoch: int = 0
    profile: str = ""
    http_address: str = ""
    rope_pairings: tuple[KvRopePairing, ...] = ()
    kv: KvSupport | None = None

    @classmethod
    def from_proto(cls, message: worker_pb2.WorkerInfo) -> WorkerInfo:
        """The dataclass of a message; fields and numbers of newer versions are left out."""
        return cls(
            instance=message.instance,
            role=_ROLES.get(message.role, WorkerRole.UNSPECIFIED),
            address=message.address,
            model=ModelInfo.from_proto(message.model),
            codecs=tuple(CodecSpec.from_proto(codec) for codec in message.codecs),
            limits=WorkerLimits.from_proto(message.limits),
            device=DeviceInfo.from_proto(message.device),
            state=_STATES.get(message.state, WorkerState.UNSPECIFIED),
            epoch=message.epoch,
            profile=message.profile,
            http_address=message.http_address,
            rope_pairings=tuple(KvRopePairing(pairing) for pairing in message.rope_pairings),
            kv=KvSupport.from_proto(message.kv) if message.HasField("kv") else None,
        )

    def to_proto(self) -> worker_pb2.WorkerInfo:
        """The message of this value."""
        return worker_pb2.WorkerInfo(
            instance=self.instance,
            epoch=self.epoch,
            role=_ROLE_NUMBERS[self.role],
            state=_STATE_NUMBERS[self.state],
            address=self.address,
            model=self.model.to_proto(),
            codecs=[codec.to_proto() for codec in self.codecs],
            limits=self.limits.to_proto(),
            device=self.device.to_proto(),
            profile=self.profile,
            http_address=self.http_address,
            rope_pairings=[kv_block_pb2.KvRopePairing.ValueType(pairing) for pairing in self.rope_pairings],
            kv=None if self.kv is None else self.kv.to_proto(),
        )


def mint_instance(role: WorkerRole) -> str:
    """A name for one process's life, for example `decode-1f0c9a4be07d2c55`; never used twice."""
    return f"{role}-{secrets.token_hex(8)}"
