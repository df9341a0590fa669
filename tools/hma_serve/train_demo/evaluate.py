"""Measures a demo checkpoint: held-out loss, recital over a thousand tokens, look-up among distractors.

Greedy decoding is judged exactly but cheaply: one pass over prompt and expected answer shows how many tokens the model
gets right in a row, and only after a first mistake is anything generated step by step.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from hma_serve.checkpoint import read_model_config, resolve_checkpoint
from hma_serve.model import CausalAttention, Transformer, open_weights
from hma_serve.train_demo.card import write_card
from hma_serve.train_demo.corpus import Corpus, read_corpus
from hma_serve.train_demo.scores import COPY_DISTANCE, COPY_TOKENS, CUE_TOKENS, SHORT_CUE_TOKENS, Copying, Scores
from hma_serve.train_demo.tasks import Passages, TaskWriter
from hma_serve.train_demo.vocabulary import load_tokenizer

_WINDOW = 2048


def evaluate(model: Transformer, tokenizer: Tokenizer, corpus: Corpus, *, samples: int, seed: int = 1) -> Scores:
    """Measures everything, greedily, with `samples` prompts per task and as many windows of held-out text."""
    with torch.inference_mode():
        stream = _held_out_stream(tokenizer, corpus)
        generator = torch.Generator().manual_seed(seed)

        def copying(cue: int, *, noise: bool) -> Copying:
            return _copying(_copied(model, stream, generator, cue, noise=noise) for _ in range(samples))

        prose, noise = copying(CUE_TOKENS, noise=False), copying(CUE_TOKENS, noise=True)
        short_cue = copying(SHORT_CUE_TOKENS, noise=False)
        writer = TaskWriter(Passages.of(corpus.held_out), seed)
        found = _mean(_found(model, tokenizer, writer) for _ in range(samples))
        return Scores(_nats_per_byte(model, tokenizer, corpus, samples), prose, noise, short_cue, found, samples)


def guided(model: Transformer, prompt: list[int], expected: list[int]) -> list[int]:
    """The model's choice for each token of `expected`, given the prompt and all the expected tokens before it."""
    cache = CausalAttention(model.config.num_layers)
    ids = torch.tensor(prompt + expected[:-1], device=model.device)
    hidden = model.forward(ids, torch.arange(len(ids), device=model.device), cache)
    choices: list[int] = model.logits(hidden[len(prompt) - 1 :]).argmax(-1).tolist()
    return choices


def greedy(model: Transformer, prompt: list[int], expected: list[int]) -> list[int]:
    """Generates as many tokens as are expected.

    Args:
        model: The model.
        prompt: Token ids.
        expected: What a perfect answer would be; affects speed only, never the result.

    Returns:
        The greedy continuation of the prompt, of the length of `expected`.
    """
    guesses = guided(model, prompt, expected)
    right = next((n for n, pair in enumerate(zip(guesses, expected, strict=True)) if pair[0] != pair[1]), len(expected))
    return (
        guesses[: right + 1]
        if right + 1 >= len(expected)
        else _continued(model, prompt, guesses[: right + 1], len(expected))
    )


def _continued(model: Transformer, prompt: list[int], known: list[int], length: int) -> list[int]:
    cache = CausalAttention(model.config.num_layers)
    pending, done, out = prompt + known, 0, list(known)
    while True:
        ids = torch.tensor(pending, device=model.device)
        hidden = model.forward(ids, torch.arange(done, done + len(ids), device=model.device), cache)
        out.append(int(model.logits(hidden[-1:]).argmax()))
        if len(out) == length:
            return out
        pending, done = out[-1:], done + len(ids)


def _copied(model: Transformer, stream: torch.Tensor, generator: torch.Generator, cue: int, *, noise: bool) -> Copying:
    """Copies one passage after the `cue` tokens before it are given again."""
    start = int(torch.randint(len(stream) - COPY_DISTANCE, (1,), generator=generator))
    ids = stream[start : start + COPY_DISTANCE].clone()
    passage = cue + COPY_TOKENS
    if noise:
        ids[:passage] = torch.randint(3, model.config.vocab_size, (passage,), generator=generator)
    tokens: list[int] = ids.tolist()
    expected = tokens[cue:passage]
    prompt = tokens + tokens[:cue]
    choices = guided(model, prompt, expected)
    # Where every single step is right, going on alone takes the same steps.
    alone = choices if choices == expected else greedy(model, prompt, expected)
    return Copying(_agreement(choices, expected), _agreement(alone, expected))


def _found(model: Transformer, tokenizer: Tokenizer, writer: TaskWriter) -> float:
    task = writer.lookup()
    prompt = tokenizer.encode(task.prompt).ids
    expected = tokenizer.encode(task.prompt + task.answer).ids[len(prompt) :]
    return float(greedy(model, prompt, expected) == expected)


def _nats_per_byte(model: Transformer, tokenizer: Tokenizer, corpus: Corpus, windows: int) -> float:
    """Every window's first token is given, not predicted; its bytes are not counted either."""
    nats, length = 0.0, 0
    for section in corpus.held_out:
        ids = tokenizer.encode(section).ids
        for start in range(0, len(ids) - 1, _WINDOW):
            window = torch.tensor(ids[start : start + _WINDOW], device=model.device)
            positions = torch.arange(len(window) - 1, device=model.device)
            hidden = model.forward(window[:-1], positions, CausalAttention(model.config.num_layers))
            nats += float(functional.cross_entropy(model.logits(hidden).float(), window[1:], reduction="sum"))
            length += len(tokenizer.decode(window[1:].tolist()).encode())
            windows -= 1
            if windows == 0:
                return nats / length
    return nats / length


def _held_out_stream(tokenizer: Tokenizer, corpus: Corpus) -> torch.Tensor:
    sections = list(corpus.held_out)
    random.Random(0).shuffle(sections)
    return torch.tensor([token for section in sections for token in tokenizer.encode(section).ids])


def _agreement(out: list[int], expected: list[int]) -> float:
    return sum(a == b for a, b in zip(out, expected, strict=True)) / len(expected)


def _copying(attempts: Iterable[Copying]) -> Copying:
    listed = list(attempts)
    return Copying(_mean(attempt.guided for attempt in listed), _mean(attempt.alone for attempt in listed))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def load(directory: Path, device: str) -> tuple[Transformer, Tokenizer]:
    """A checkpoint's model, in float32, and its tokenizer."""
    config = read_model_config(directory)
    with open_weights(directory, config, device=device, dtype=torch.float32) as weights:
        return Transformer(config, weights), load_tokenizer(directory)


def main(arguments: list[str] | None = None) -> None:
    """Prints the scores of a checkpoint, and writes them into its card if asked to."""
    parser = argparse.ArgumentParser(prog="python -m hma_serve.train_demo.evaluate", description=main.__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="the corpus the model was trained from")
    parser.add_argument("--model", default="demo", help="demo or a checkpoint directory")
    parser.add_argument("--samples", type=int, default=50, help="prompts per task")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write-card", action="store_true", help="replace the checkpoint's README.md")
    options = parser.parse_args(arguments)
    directory = resolve_checkpoint(options.model)
    model, tokenizer = load(directory, options.device)
    scores = evaluate(model, tokenizer, read_corpus(options.corpus), samples=options.samples)
    print("\n".join(scores.lines()))
    if options.write_card:
        write_card(directory, scores)


if __name__ == "__main__":
    main()
