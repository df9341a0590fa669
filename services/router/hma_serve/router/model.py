"""The model that this router serves: its name, tokenizer, chat template and limits, read once at start."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from hma_serve.checkpoint import fingerprint, model_name, read_model_config, resolve_checkpoint
from hma_serve.core.errors import HmaError
from hma_serve.core.worker import ModelInfo, WorkerInfo
from hma_serve.text import ChatTemplate, Tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What clients ask for and workers must hold.

    Attributes:
        name: The name in requests and answers.
        fingerprint: Of the checkpoint; empty when the router's copy has no weights to tell it from.
        vocab_size: Token ids in prompts are below it.
        max_positions: The longest context the model itself allows, tokens.
        tokenizer: The checkpoint's.
        chat_template: The checkpoint's; None: it has none, and conversations are refused.
        created: Unix seconds.
    """

    name: str
    fingerprint: str
    vocab_size: int
    max_positions: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def info(self) -> ModelInfo:
        """What the router's record says of the model: its names; geometry is the workers' to tell."""
        return ModelInfo(
            id=self.name,
            fingerprint=self.fingerprint,
            layers=0,
            hidden=0,
            heads=0,
            kv_heads=0,
            head_dim=0,
            vocab=self.vocab_size,
        )

    def served_by(self, worker: WorkerInfo) -> bool:
        """Whether the worker computes this model: by fingerprint if ours is known, else by name."""
        if self.fingerprint:
            return worker.model.fingerprint == self.fingerprint
        return worker.model.id == self.name


def load_model(model: str) -> ServedModel:
    """Reads a checkpoint's configuration, tokenizer and chat template; BLOCKING.

    Args:
        model: `demo`, a directory or a Hub id.

    Raises:
        HmaError: It cannot be found or used.
    """
    directory = resolve_checkpoint(model)
    config = read_model_config(directory)
    return ServedModel(
        name=model_name(model),
        fingerprint=_fingerprint(directory),
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        tokenizer=Tokenizer.from_directory(directory),
        chat_template=ChatTemplate.from_directory(directory),
    )


def _fingerprint(directory: Path) -> str:
    """The fingerprint, or nothing when the directory has no (whole) weights, which a router does not need."""
    try:
        return fingerprint(directory)
    except HmaError as exc:
        _log.warning("workers are matched by model name, since this copy has no usable weights: %s", exc)
        return ""
