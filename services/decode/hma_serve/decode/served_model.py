"""What the front knows of the model without its weights, and what it can therefore accept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hma_serve.checkpoint import fingerprint, model_name, read_model_config, resolve_checkpoint
from hma_serve.checkpoint.k_offsets import read_k_offsets
from hma_serve.core.errors import InvalidArgument
from hma_serve.core.model_config import ModelConfig
from hma_serve.core.worker import CodecSpec, KvRopePairing, ModelInfo, RopeSpec
from hma_serve.kvblock import Acceptance, Codec, KvFormatError, OffsetTable, codec, codec_names, describe_support
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED, KvSupport


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One checkpoint.

    Attributes:
        name: What clients call it.
        checkpoint: Where it lies.
        config: Its configuration.
        fingerprint: SHA-256 hex of configuration and weights.
        k_offsets: What packed keys have lost, and scores are given back; may be empty.
        max_model_len: Prompt plus completion, tokens.
        codecs: Of KV that can be read here.
    """

    name: str
    checkpoint: Path
    config: ModelConfig
    fingerprint: str
    k_offsets: OffsetTable
    max_model_len: int
    codecs: tuple[Codec, ...]

    @property
    def rope(self) -> RopeSpec:
        """How its keys are turned."""
        return RopeSpec(KvRopePairing.HALF_SPLIT, self.config.rope_theta)

    @property
    def codec_specs(self) -> tuple[CodecSpec, ...]:
        """The codecs as the registry knows them."""
        return tuple(CodecSpec.from_proto(known.spec()) for known in self.codecs)

    @property
    def info(self) -> ModelInfo:
        """The model as the registry knows it."""
        config = self.config
        return ModelInfo(
            id=self.name,
            fingerprint=self.fingerprint,
            layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            rope=self.rope,
            kv_fingerprint=self.k_offsets.fingerprint(self.fingerprint) if self.k_offsets else "",
        )

    @property
    def support(self) -> KvSupport:
        """What producers may choose from."""
        return describe_support(
            self.acceptance.semantics,
            k_codecs=self.codecs,
            v_codecs=self.codecs,
            rope_pairings=(KV_ROPE_PAIRING_HALF_SPLIT, *self.acceptance.rope_pairings),
            k_offsets=bool(self.k_offsets),
        )

    @property
    def acceptance(self) -> Acceptance:
        """What a KV stream must match."""
        return Acceptance(
            model_fingerprint=self.k_offsets.fingerprint(self.fingerprint),
            layers=self.config.num_layers,
            kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            codecs=self.codecs,
            rope=self.rope.to_proto(),
            # Attention turns its queries into the order of the keys.
            rope_pairings=(KV_ROPE_PAIRING_INTERLEAVED,),
            qk_norm=True,
            k_offsets=bool(self.k_offsets),
            k_offset_digest=self.k_offsets.digest() if self.k_offsets else None,
        )


def read_served_model(
    model: str,
    max_model_len: int | None,
    k_offsets: Path | None = None,
    codecs: Sequence[str] | None = None,
) -> ServedModel:
    """Finds a checkpoint and reads everything but its weights; BLOCKING.

    Args:
        model: `demo`, a directory or a Hub id.
        max_model_len: Prompt plus completion; None: the model's window.
        k_offsets: Table of what packed keys have lost; None: nothing.
        codecs: Names of those to read beside BF16; None: all that fit the model.

    Raises:
        HmaError: There is no such checkpoint or codec, a codec does not fit, or the window is larger than the model's.
    """
    checkpoint = resolve_checkpoint(model)
    config = read_model_config(checkpoint)
    longest = config.max_position_embeddings
    if max_model_len is not None and max_model_len > longest:
        raise InvalidArgument(
            f"--max-model-len {max_model_len} is more than the model's window of {longest}", field="--max-model-len"
        )
    own = fingerprint(checkpoint)
    return ServedModel(
        name=model_name(model),
        checkpoint=checkpoint,
        config=config,
        fingerprint=own,
        k_offsets=read_k_offsets(k_offsets, config, model_fingerprint=own, profile=None),
        max_model_len=max_model_len or longest,
        codecs=_read_here(codecs, config.head_dim),
    )


def _read_here(names: Sequence[str] | None, head_dim: int) -> tuple[Codec, ...]:
    """Those named, and BF16, which every decode worker reads so that every producer finds a reader."""
    if names is None:
        return tuple(known for known in map(codec, codec_names()) if _fits(known, head_dim))
    try:
        chosen = tuple(dict.fromkeys(codec(name) for name in (*names, "bf16")))
        for known in chosen:
            known.check_geometry(head_dim)
    except KvFormatError as exc:
        raise InvalidArgument(f"--codecs: {exc.message}", field="--codecs") from exc
    return chosen


def _fits(known: Codec, head_dim: int) -> bool:
    try:
        known.check_geometry(head_dim)
    except KvFormatError:
        return False
    return True
