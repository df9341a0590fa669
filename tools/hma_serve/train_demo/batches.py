"""What the model sees: rows of book text, some with passages repeated inside them, and rows of task texts.

Everything is drawn on the training device from two long token streams, so a step never waits for Python. Labels hold
IGNORED wherever the next token cannot be known: arbitrary facts, random tokens, and the borders of repeated passages.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from hma_serve.train_demo.corpus import read_corpus
from hma_serve.train_demo.repeats import Repeats
from hma_serve.train_demo.tasks import Passages, Segment, TaskWriter
from hma_serve.train_demo.vocabulary import train_tokenizer

IGNORED = -100
COPY_WEIGHT = 3.0
"""How much a copied token counts: the few tokens after a cue, where copying must win over guessing, decide all."""

Tokens = npt.NDArray[np.uint16]
Learned = npt.NDArray[np.bool_]


def tokenise(tokenizer: Tokenizer, sections: tuple[str, ...]) -> Tokens:
    """All sections as one stream of token ids."""
    encoded = tokenizer.encode_batch_fast(list(sections), add_special_tokens=False)
    return np.concatenate([np.array(section.ids, dtype=np.uint16) for section in encoded])


@dataclass(frozen=True, slots=True)
class TaskStream:
    """Task texts end to end.

    Attributes:
        tokens: `[n]` token ids.
        learned: `[n]`, False where a token is arbitrary.
        starts: First index of each text.
    """

    tokens: Tokens
    learned: Learned
    starts: npt.NDArray[np.int64]

    @classmethod
    def join(cls, parts: list[TaskStream]) -> TaskStream:
        """Concatenates streams."""
        offsets = np.cumsum([0, *(len(part.tokens) for part in parts)])
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.learned for part in parts]),
            np.concatenate([part.starts + offset for part, offset in zip(parts, offsets, strict=False)]),
        )


def write_tasks(tokenizer: Tokenizer, sections: tuple[str, ...], texts: int, workers: int) -> TaskStream:
    """Generates and tokenises task texts in `workers` processes, each quoting from its own share of the sections."""
    shares = [sections[worker::workers] for worker in range(workers)]
    serialised = tokenizer.to_str()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(_write_share, serialised, share, texts // workers, seed) for seed, share in enumerate(shares)
        ]
        return TaskStream.join([future.result() for future in futures])


def _write_share(serialised: str, sections: tuple[str, ...], texts: int, seed: int) -> TaskStream:
    writer = TaskWriter(Passages.of(sections), seed)
    return encode_texts(Tokenizer.from_str(serialised), [writer.text() for _ in range(texts)])


def encode_texts(tokenizer: Tokenizer, texts: list[list[Segment]]) -> TaskStream:
    """Tokenises each text as a whole, as a prompt will be, and marks tokens by the segment they begin in."""
    encoded = tokenizer.encode_batch(["".join(text for text, _ in segments) for segments in texts])
    parts = []
    for segments, encoding in zip(texts, encoded, strict=True):
        learned_char = np.concatenate([np.full(len(text), learned) for text, learned in segments])
        begins = np.array([begin for begin, _ in encoding.offsets])
        tokens = np.array(encoding.ids, dtype=np.uint16)
        parts.append(TaskStream(tokens, learned_char[begins], np.zeros(1, dtype=np.int64)))
    return TaskStream.join(parts)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything training reads, made on a CPU beforehand so that an accelerator need not wait for it.

    Attributes:
        tokenizer: The tokenizer both streams are encoded with.
        books: The books' tokens.
        tasks: The task texts' tokens.
        corpus: Name of the corpus file.
        corpus_bytes: Length of the training text in bytes.
    """

    tokenizer: Tokenizer
    books: Tokens
    tasks: TaskStream
    corpus: str
    corpus_bytes: int

    def save(self, path: Path) -> None:
        """Writes one compressed .npz file."""
        np.savez_compressed(
            path,
            tokenizer=np.array(self.tokenizer.to_str()),
            books=self.books,
            tokens=self.tasks.tokens,
            learned=np.packbits(self.tasks.learned),
            starts=self.tasks.starts,
            corpus=np.array(self.corpus),
            corpus_bytes=np.array(self.corpus_bytes),
        )

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """Reads what `save` wrote."""
        with np.load(path) as file:
            tokens = file["tokens"]
            learned = np.unpackbits(file["learned"], count=len(tokens)).astype(np.bool_)
            tasks = TaskStream(tokens, learned, file["starts"])
            tokenizer = Tokenizer.from_str(str(file["tokenizer"]))
            return cls(tokenizer, file["books"], tasks, str(file["corpus"]), int(file["corpus_bytes"]))


def prepare(path: Path, texts: int, workers: int, tokenizer: Tokenizer | None = None) -> Prepared:
    """Reads the corpus, learns a tokenizer unless one is given, and encodes books and task texts."""
    corpus = read_corpus(path)
    tokenizer = tokenizer or train_tokenizer(corpus.train)
    books = tokenise(tokenizer, corpus.train)
    tasks = write_tasks(tokenizer, corpus.train, texts, workers)
    return Prepared(tokenizer, books, tasks, path.name, sum(len(section.encode()) for section in corpus.train))


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to learn from.

    Attributes:
        ids: int64 `[rows, length]`, what the model reads.
        labels: int64 `[rows, length]`, the next token or IGNORED.
        weights: float32 `[rows, length]`, how much each label counts.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


class BatchSource:
    """Draws training rows on a device."""

    def __init__(
        self,
        books: Tokens,
        tasks: TaskStream,
        *,
        vocabulary: int,
        device: torch.device,
        seed: int,
        task_share: float = 0.25,
        repeat_share: float = 0.45,
    ) -> None:
        self._books = torch.from_numpy(books.astype(np.int32)).to(device)
        self._tasks = torch.from_numpy(tasks.tokens.astype(np.int32)).to(device)
        self._learned = torch.from_numpy(tasks.learned).to(device)
        self._starts = torch.from_numpy(tasks.starts).to(device)
        self._device = device
        self._random = torch.Generator(device).manual_seed(seed)
        self._repeats = Repeats(vocabulary, self._random)
        self._task_share = task_share
        self._repeat_share = repeat_share

    def draw(self, rows: int, length: int) -> Batch:
        """One batch: rows of tasks, rows of books with repeated passages, rows of plain books.

        Args:
            rows: Sequences in the batch.
            length: Tokens per sequence.
        """
        from_tasks, repeating = max(1, int(rows * self._task_share)), max(1, int(rows * self._repeat_share))
        books = self._window(self._books, self._below(len(self._books) - length - 1, rows - from_tasks), length)
        repeated = self._repeats.into(books[:repeating])
        starts = self._starts[self._below(len(self._starts), from_tasks)].clamp(max=len(self._tasks) - length - 1)
        tasks = self._window(self._tasks, starts, length)
        plain = torch.ones_like(books[repeating:], dtype=torch.bool)
        read = torch.cat((repeated.read, books[repeating:], tasks)).long()
        true = torch.cat((repeated.true, books[repeating:], tasks)).long()
        known = torch.cat((repeated.known, plain, self._window(self._learned, starts, length)))
        weights = torch.ones(true.shape, device=self._device)
        weights[:repeating].masked_fill_(repeated.copied, COPY_WEIGHT)
        return Batch(read[:, :-1], torch.where(known, true, IGNORED)[:, 1:], weights[:, 1:])

    def _window(self, stream: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
        return stream[starts[:, None] + torch.arange(length + 1, device=self._device)]

    def _below(self, limit: int, count: int) -> torch.Tensor:
        return torch.randint(max(1, limit), (count,), device=self._device, generator=self._random)
