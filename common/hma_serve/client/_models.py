"""The models that a router serves."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from hma_serve.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked for by its id.

    Attributes:
        id: What `model=` takes.
        fingerprint: Of the weights and tokenizer; equal fingerprints mean equal models.
        max_model_len: Tokens that prompt and completion may have together.
        created: When the checkpoint was made.
    """

    id: str
    fingerprint: str
    max_model_len: int
    created: datetime


def read_models(response: inference_pb2.ListModelsResponse) -> tuple[Model, ...]:
    """The models of a reply."""
    return tuple(
        Model(
            id=model.id,
            fingerprint=model.fingerprint,
            max_model_len=model.max_model_len,
            created=datetime.fromtimestamp(model.created_unix_seconds, tz=UTC),
        )
        for model in response.models
    )
