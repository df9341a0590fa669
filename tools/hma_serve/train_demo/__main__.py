"""Corpus in, checkpoint out: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import torch

from hma_serve.core.model_config import ModelConfig
from hma_serve.train_demo.batches import BatchSource, Prepared, prepare
from hma_serve.train_demo.card import Run, read_runs, write_card
from hma_serve.train_demo.corpus import read_corpus
from hma_serve.train_demo.evaluate import evaluate, load
from hma_serve.train_demo.export import write_checkpoint
from hma_serve.train_demo.training import Schedule, train
from hma_serve.train_demo.vocabulary import VOCABULARY, load_tokenizer
from hma_serve.train_demo.widen import initial_weights

DEMO_CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    rms_norm_eps=1e-6,
    rope_theta=1e10,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    dtype="bfloat16",
)

_RECORDED = (
    "minutes",
    "peak",
    "plateau_share",
    "short_length",
    "short_share",
    "tokens_per_step",
    "task_share",
    "repeat_share",
    "seed",
)
"""The options that a card repeats: those that shape the training, not where files lie."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hma_serve.train_demo", description="Trains the demo model.")
    parser.add_argument("--corpus", type=Path, help="UTF-8 text, gzipped or not; also what evaluation reads")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="only prepare the data, on a CPU, into this .npz")
    parser.add_argument("--prepared", type=Path, metavar="FILE", help="train on data that --prepare wrote")
    parser.add_argument("--out", type=Path, help="directory for the checkpoint")
    parser.add_argument("--init", type=Path, metavar="DIR", help="go on from this checkpoint and its tokenizer")
    parser.add_argument("--minutes", type=float, default=8.0, help="training budget, compilation included")
    parser.add_argument("--peak", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--plateau-share", type=float, default=0.5, help="share of the budget before the rates decline")
    parser.add_argument("--short-length", type=int, default=1024, help="row length at first, later 4,096")
    parser.add_argument("--short-share", type=float, default=0.5, help="share of the budget on short rows")
    parser.add_argument("--tokens-per-step", type=int, default=1 << 17)
    parser.add_argument("--task-share", type=float, default=0.25, help="share of the rows with task texts")
    parser.add_argument("--repeat-share", type=float, default=0.45, help="share of the rows with repeated passages")
    parser.add_argument("--task-texts", type=int, default=100_000, help="generated task texts")
    parser.add_argument("--samples", type=int, default=100, help="evaluation prompts per task")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Prepares, trains, exports; with a corpus at hand, evaluates and writes the card as well."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not (options.corpus or options.prepared) or not (options.out or options.prepare):
        parser.error("need --corpus or --prepared, and --out or --prepare")
    tokenizer = load_tokenizer(options.init) if options.init else None
    if options.prepared:
        prepared = Prepared.load(options.prepared)
    else:
        prepared = prepare(options.corpus, options.task_texts, os.cpu_count() or 1, tokenizer)
    print(f"{len(prepared.books):,} tokens of books, {len(prepared.tasks.tokens):,} of tasks", flush=True)
    if options.prepare:
        prepared.save(options.prepare)
        return
    _train(options, prepared)
    if options.corpus:
        model, tokenizer = load(options.out, options.device)
        scores = evaluate(model, tokenizer, read_corpus(options.corpus), samples=options.samples)
        print("\n".join(scores.lines()), flush=True)
        write_card(options.out, scores)


def _train(options: argparse.Namespace, prepared: Prepared) -> None:
    device = torch.device(options.device)
    source = BatchSource(
        prepared.books,
        prepared.tasks,
        vocabulary=VOCABULARY,
        device=device,
        seed=options.seed,
        task_share=options.task_share,
        repeat_share=options.repeat_share,
    )
    schedule = Schedule(
        options.minutes,
        options.tokens_per_step,
        options.peak,
        short_length=options.short_length,
        short_share=options.short_share,
        plateau_share=options.plateau_share,
    )
    outcome = train(
        DEMO_CONFIG,
        source,
        schedule,
        device=device,
        compiled=not options.no_compile,
        seed=options.seed,
        initial=initial_weights(options.init, DEMO_CONFIG, options.seed) if options.init else None,
    )
    run = Run(
        corpus=prepared.corpus,
        corpus_bytes=prepared.corpus_bytes,
        arguments=" ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in _RECORDED),
        steps=outcome.steps,
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "a CPU",
    )
    earlier = read_runs(options.init) if options.init else []
    write_checkpoint(options.out, DEMO_CONFIG, outcome.weights, prepared.tokenizer, [*earlier, run])


if __name__ == "__main__":
    main()
