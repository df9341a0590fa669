"""What the front knows of the model it serves: shapes, names and the manifest, without weights and without torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hma_serve.checkpoint import fingerprint, model_name, read_model_config, resolve_checkpoint
from hma_serve.checkpoint.k_offsets import read_k_offsets
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.model_config import ModelConfig
from hma_serve.core.worker import CodecSpec, KvRopePairing, ModelInfo, RopeSpec
from hma_serve.kvblock import Codec, OffsetTable, build_manifest, codec, codec_for, describe_support
from hma_serve.prefill.config import PrefillConfig
from hma_serve.prefill.kv_layout import KvLayout
from hma_serve.prefill.profiles import Profile, find_profile
from hma_serve.v1 import kv_block_pb2

ROUNDING = kv_block_pb2.KV_ROUNDING_NEAREST_EVEN


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One checkpoint under one profile.

    Attributes:
        name: What clients ask for.
        checkpoint: Its directory.
        config: Its shapes.
        profile: Fits the shapes.
        fingerprint: Of the checkpoint.
        k_offsets: What is subtracted from keys before they are packed; may be empty.
        layout: Of its packed KV.
        max_tokens: Longest prompt part that this instance takes, whole groups.
    """

    name: str
    checkpoint: Path
    config: ModelConfig
    profile: Profile
    fingerprint: str
    k_offsets: OffsetTable
    layout: KvLayout
    max_tokens: int

    @property
    def rope(self) -> RopeSpec:
        """How keys are turned."""
        return RopeSpec(KvRopePairing.HALF_SPLIT, self.config.rope_theta)

    @property
    def info(self) -> ModelInfo:
        """For the registry."""
        shape = self.config
        return ModelInfo(
            id=self.name,
            fingerprint=self.fingerprint,
            layers=shape.num_layers,
            hidden=shape.hidden_size,
            heads=shape.num_heads,
            kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab=shape.vocab_size,
            rope=self.rope,
            kv_fingerprint=self.k_offsets.fingerprint(self.fingerprint) if self.k_offsets else "",
        )

    @property
    def codecs(self) -> tuple[CodecSpec, CodecSpec]:
        """For the registry: keys', then values'."""
        k_spec, v_spec = (CodecSpec.from_proto(found.spec(ROUNDING)) for found in self.packed_as)
        return k_spec, v_spec

    @property
    def support(self) -> kv_block_pb2.KvSupport:
        """What decode may choose from: the profile's own codecs, or else BF16."""
        shape, rope, fallback = self.config, self.rope, codec("bf16")
        semantics = kv_block_pb2.KvSemantics(
            model_fingerprint=self.k_offsets.fingerprint(self.fingerprint),
            layers=shape.num_layers,
            kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rope_theta=rope.theta,
            rope_scaling_hash=rope.scaling_hash,
            qk_norm=True,
        )
        k_codec, v_codec = self.packed_as
        return describe_support(
            semantics,
            k_codecs=list(dict.fromkeys((k_codec, fallback))),
            v_codecs=list(dict.fromkeys((v_codec, fallback))),
            rope_pairings=[rope.to_proto().pairing],
            k_offsets=bool(self.k_offsets),
        )

    def manifest(
        self,
        token_start: int,
        token_count: int,
        agreement: kv_block_pb2.KvAgreement | None,
        producer: kv_block_pb2.KvProducer,
    ) -> kv_block_pb2.KvManifest:
        """Describes a transfer of the tokens [token_start, token_start + token_count), as agreed if anything was."""
        k_codec, v_codec = self.packed_as
        if agreement is not None:
            k_codec, v_codec = codec_for(agreement.k_codec), codec_for(agreement.v_codec)
        manifest = build_manifest(
            model_fingerprint=self.k_offsets.fingerprint(self.fingerprint),
            layers=self.config.num_layers,
            kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            k_codec=k_codec,
            v_codec=v_codec,
            token_start=token_start,
            token_count=token_count,
            rope=self.rope.to_proto(),
            qk_norm=True,
            rounding=ROUNDING,
            producer=producer,
        )
        manifest.k_offsets.extend(self.k_offsets.to_proto())
        return manifest

    @property
    def packed_as(self) -> tuple[Codec, Codec]:
        """What the engine packs keys and values in."""
        return codec(self.profile.k_codec), codec(self.profile.v_codec)


def read_served_model(config: PrefillConfig) -> ServedModel:
    """Finds the checkpoint and checks that profile and limits fit it; BLOCKING (may download).

    Raises:
        HmaError: It cannot be served; the message says why.
    """
    checkpoint = resolve_checkpoint(config.model)
    shape, profile = read_model_config(checkpoint), find_profile(config.profile, config.profiles)
    profile.check(shape, config.tp)
    window = shape.max_position_embeddings
    own = fingerprint(checkpoint)
    longest = min(config.max_model_len or window, config.kv_capacity_tokens or window, window)
    return ServedModel(
        name=model_name(config.model),
        checkpoint=checkpoint,
        config=shape,
        profile=profile,
        fingerprint=own,
        k_offsets=read_k_offsets(config.k_offsets, shape, model_fingerprint=own, profile=profile.name),
        layout=KvLayout.of(shape, profile),
        max_tokens=longest // GROUP_TOKENS * GROUP_TOKENS,
    )


def software() -> str:
    """Name and version of this program, for people."""
    try:
        return f"hma-serve {version('hma-serve')}"
    except PackageNotFoundError:
        return "hma-serve"
