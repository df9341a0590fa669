"""The model card, and the record of training runs it is written from.

Where the weights come from travels inside the weights' file, so that a card can be written again after any evaluation.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from hma_serve.checkpoint import read_model_config
from hma_serve.core.errors import FailedPrecondition
from hma_serve.train_demo.scores import Scores

_RUNS = "training"


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Attributes:
        corpus: Name of the corpus file.
        corpus_bytes: Length of its training text in bytes.
        arguments: What the trainer was called with.
        steps: Optimiser steps.
        tokens: Tokens seen, repetitions counted.
        seconds: Training time.
        device: What it ran on.
        note: What its arguments do not say.
    """

    corpus: str
    corpus_bytes: int
    arguments: str
    steps: int
    tokens: int
    seconds: float
    device: str
    note: str = ""


def metadata(runs: list[Run]) -> dict[str, str]:
    """What to store beside the weights so that `read_runs` finds the runs again."""
    return {"format": "pt", _RUNS: json.dumps([dataclasses.asdict(run) for run in runs])}


def read_runs(directory: Path) -> list[Run]:
    """The runs that a checkpoint of ours came from, oldest first.

    Raises:
        FailedPrecondition: The checkpoint was not written by this trainer.
    """
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        history = (file.metadata() or {}).get(_RUNS)
    if history is None:
        raise FailedPrecondition(f"{directory} was not written by this trainer: it does not say how it was trained")
    return [Run(**run) for run in json.loads(history)]


def write_card(directory: Path, scores: Scores) -> None:
    """Writes README.md, the model card, from the checkpoint and its scores."""
    config, runs = read_model_config(directory), read_runs(directory)
    measured = "\n".join(f"- {line}" for line in scores.lines())
    history = "\n".join(
        f"- {run.steps:,} steps, {run.tokens / 1e6:,.0f} M tokens, {run.seconds / 60:.1f} minutes on {run.device}: "
        f"`python -m hma_serve.train_demo {run.arguments}`{f' ({run.note})' if run.note else ''}"
        for run in runs
    )
    (directory / "README.md").write_text(
        f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# hma-serve demo model

A Qwen3-architecture model of {config.parameter_count:,} parameters that ships with hma-serve, so that a fresh clone can
serve real text. It writes in the manner of old English novels, copies and looks up what stands in its context, and
takes simple chat turns. It knows nothing about the world: a demonstration and a test object, not an assistant.

| | |
|---|---|
| layers, width, MLP width | {config.num_layers}, {config.hidden_size}, {config.intermediate_size} |
| query heads, key/value heads, head size | {config.num_heads}, {config.num_kv_heads}, {config.head_dim} |
| context | {config.max_position_embeddings:,} tokens |
| vocabulary | {config.vocab_size:,} byte-level BPE tokens, tied embeddings |

## Training

Corpus: `{runs[-1].corpus}`, {runs[-1].corpus_bytes / 1e6:.1f} MB of public-domain English books, and generated
in-context tasks (look-ups, recitals, short chats). Some rows are tasks, in some passages of the book repeat, some are
plain. Tokens count repetitions. Steps: {sum(run.steps for run in runs):,} in all, in this order:

{history}

## Evaluation

Greedy decoding, weights in BF16, arithmetic in float32, {scores.samples} samples per task. Held-out text is every 128th
section of 64 Ki characters: passages never trained on, from the same books.

{measured}

Measure again: `python -m hma_serve.train_demo.evaluate --corpus {runs[-1].corpus}`

## Licence

Apache-2.0. The books are in the public domain.
"""
    )
