"""Runs mutated inputs through every parser: no exception but a refusal, no hang, no memory beyond a cap.

`python tests/hostile/fuzz.py [--inputs N] [--seed S] [NAME ...]`, or `make fuzz`. Mutations know the shape of protobuf:
besides bits, bytes and slices they change varints and lengths and splice inputs with each other. An input that a parser
refuses with a rule not met before, and some that it accepts, join the corpus, so that the search goes on from there. A
failure prints its input.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hostile.targets import TARGETS, seeds

from hma_serve.kvblock import KvFormatError

MEMORY_CAP = 512 << 20
"""Address space that a run may take beyond what it has when it begins."""
HANG_SECONDS = 5
MAX_INPUT = 16 << 10
MAX_CORPUS = 400
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
_VARINTS = (
    b"\x00",
    b"\x20",
    b"\x7f",
    b"\x80\x01",
    b"\xff\xff\xff\xff\x0f",
    b"\xff" * 9 + b"\x01",
    b"\xe0\xff\xff\xff\x0f",
)
Mutation = Callable[[random.Random, bytearray], None]


def _flip(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[at] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray) -> None:
    data[_place(rng, data)] = rng.choice(_INTERESTING) if rng.random() < 0.5 else rng.randrange(256)


def _cut(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    del data[at : at + rng.randint(1, 16)]


def _copy(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[_place(rng, data) : 0] = data[at : at + rng.randint(1, 32)]


def _varint(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[at : at + rng.choice((0, 1, 1, 2))] = rng.choice(_VARINTS)


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[_place(rng, data) :]


def _append(rng: random.Random, data: bytearray) -> None:
    data += rng.randbytes(rng.randint(1, 8))


MUTATIONS: Sequence[Mutation] = (_flip, _flip, _set, _set, _cut, _copy, _varint, _varint, _truncate, _append)


def _place(rng: random.Random, data: bytearray) -> int:
    """Headers stand first, so most changes do."""
    length = len(data)
    return rng.randrange(min(length, 160)) if rng.random() < 0.8 else rng.randrange(length)


def mutate(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """An input near one of the corpus."""
    data = bytearray(rng.choice(corpus)[:MAX_INPUT])
    if rng.random() < 0.05:
        other = rng.choice(corpus)[:MAX_INPUT]
        cut = rng.randrange(len(other) + 1)
        data = data[: rng.randrange(len(data) + 1)] + other[cut:]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        if data:
            rng.choice(MUTATIONS)(rng, data)
    return bytes(data)


class Hang(BaseException):
    """An input took too long; no parser may catch it."""


def _alarm(signum: int, frame: FrameType | None) -> None:
    raise Hang


def fuzz(name: str, inputs: int, seed: int) -> dict[str, int]:
    """Runs one target.

    Returns:
        How many inputs were accepted (`accepted`), and refused by each rule.

    Raises:
        AssertionError: An input broke the target; the message holds it in hex.
    """
    rng = random.Random(f"{seed} {name}")
    target, corpus, outcomes = TARGETS[name], seeds(name), dict[str, int]()
    kept = len(corpus)
    previous = signal.signal(signal.SIGALRM, _alarm)
    try:
        for number in range(inputs):
            data = mutate(rng, corpus)
            if number % 256 == 0:
                signal.alarm(HANG_SECONDS)
            try:
                target(data)
                outcome = "accepted"
            except KvFormatError as refusal:
                outcome = refusal.rule
            except (Exception, Hang) as error:
                raise AssertionError(f"{name}: {error!r} on {data.hex()}") from error
            if outcome not in outcomes or (outcome == "accepted" and rng.random() < 0.01):
                corpus[kept:] = [*corpus[kept:], data][-MAX_CORPUS:]
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return outcomes


def cap_memory() -> None:
    """From here on an allocation beyond the cap fails, and with it the run."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_CAP
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the named targets, or all; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="per parser (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}; default: all")
    args = parser.parse_args(argv)
    cap_memory()
    for name in args.names or TARGETS:
        start = time.monotonic()
        outcomes = fuzz(name, args.inputs, args.seed)
        counts = ", ".join(f"{rule} {count}" for rule, count in sorted(outcomes.items()))
        print(f"{name}: {args.inputs} inputs in {time.monotonic() - start:.0f} s: {counts}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
