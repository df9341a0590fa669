"""Corpus in, checkpoint out: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

import torch

from hma_serve.core.model_config import ModelConfig
from hma_serve.train_demo.batches import BatchSource, tokenise, write_tasks
from hma_serve.train_demo.corpus import read_corpus
from hma_serve.train_demo.evaluate import evaluate, load
from hma_serve.train_demo.export import Provenance, write_card, write_checkpoint
from hma_serve.train_demo.training import Schedule, train
from hma_serve.train_demo.vocabulary import VOCABULARY, train_tokenizer

DEMO_CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope_theta=100_000.0,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    dtype="bfloat16",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hma_serve.train_demo", description="Trains the demo model.")
    parser.add_argument("--corpus", type=Path, required=True, help="UTF-8 text, gzipped or not")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--minutes", type=float, default=8.0, help="training budget, compilation included")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens-per-step", type=int, default=1 << 17)
    parser.add_argument("--task-texts", type=int, default=120_000, help="generated task texts")
    parser.add_argument("--samples", type=int, default=100, help="evaluation prompts per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Trains, exports, evaluates, and writes the card."""
    options = _parser().parse_args(arguments)
    began, device = time.monotonic(), torch.device(options.device)

    def say(what: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {what}", flush=True)

    corpus = read_corpus(options.corpus)
    tokenizer = train_tokenizer(corpus.train)
    say("tokenizer trained")
    books = tokenise(tokenizer, corpus.train)
    say(f"{len(books):,} tokens of books")
    tasks = write_tasks(tokenizer, corpus.train, options.task_texts, workers=os.cpu_count() or 1)
    say(f"{len(tasks.tokens):,} tokens of tasks in {len(tasks.starts):,} texts")

    source = BatchSource(books, tasks, vocabulary=VOCABULARY, device=device, seed=options.seed)
    schedule = Schedule(options.minutes, options.tokens_per_step)
    outcome = train(DEMO_CONFIG, source, schedule, device=device, compiled=not options.no_compile, seed=options.seed)
    write_checkpoint(options.out, DEMO_CONFIG, outcome.weights, tokenizer)
    say(f"trained {outcome.steps:,} steps")

    model, tokenizer = load(options.out, options.device)
    scores = evaluate(model, tokenizer, corpus, samples=options.samples)
    say("\n".join(scores.lines()))
    provenance = Provenance(
        corpus=options.corpus.name,
        corpus_bytes=sum(len(section.encode()) for section in corpus.train),
        steps=outcome.steps,
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "a CPU",
        seed=options.seed,
    )
    write_card(options.out, DEMO_CONFIG, provenance, scores)


if __name__ == "__main__":
    main()
