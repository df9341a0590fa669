"""The configuration of a prefill worker: parsed once, checked, then passed on as a frozen value."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from hma_serve.checkpoint import add_model_arguments
from hma_serve.core.errors import InvalidArgument
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.worker import (
    MOST_THREADS,
    PlaceConfig,
    add_place_arguments,
    default_threads,
    registry_of,
    require_at_least,
    require_at_most,
)


@dataclass(frozen=True, slots=True)
class PrefillConfig(PlaceConfig):
    """Everything that the command line decides, the place of the worker included.

    Attributes:
        model: `demo`, a directory or a Hub id.
        profile: What to compute in and how to pack.
        profiles: Directory of more profiles; None: the built-in ones.
        k_offsets: Table that is subtracted from keys before they are packed; None: nothing is.
        device: Kind of accelerator.
        tp: Devices, a rank each, that share the model.
        chunk_tokens: Tokens computed together; a multiple of 32.
        layers_ahead: Layers of a request that may be computed before the oldest of them has left.
        max_model_len: Longest prompt part taken, tokens; None: the model's window.
        max_running: Requests whose KV may be held at once.
        max_waiting: Requests that may wait before new ones are refused.
        kv_capacity_tokens: Tokens whose KV may be held at once; None: `max_running` longest prompts, if memory does.
        prefix_cache_bytes: Host memory for the KV of prompts seen before; 0: none is kept; None: by free memory.
        overlap: `on`: a layer leaves while later ones are computed; `off`: all leave after the last, to compare.
        threads: Of the engine's arithmetic.
        stall_timeout: Seconds that decode may let one transfer wait for one thing.
        resume_timeout: Seconds after a lost connection until a transfer must go on.
        events: File for the record of the pipeline's order; None: off.
    """

    model: str
    profile: str
    profiles: Path | None
    k_offsets: Path | None
    device: str
    tp: int
    chunk_tokens: int
    layers_ahead: int
    max_model_len: int | None
    max_running: int
    max_waiting: int
    kv_capacity_tokens: int | None
    prefix_cache_bytes: int | None
    overlap: str
    threads: int
    stall_timeout: float
    resume_timeout: float
    events: Path | None

    def __post_init__(self) -> None:
        if self.chunk_tokens < GROUP_TOKENS or self.chunk_tokens % GROUP_TOKENS:
            raise InvalidArgument(
                f"--chunk-tokens must be a positive multiple of {GROUP_TOKENS}, not {self.chunk_tokens}",
                field="--chunk-tokens",
            )
        least = {
            "--layers-ahead": (self.layers_ahead, 1),
            "--max-model-len": (self.max_model_len, GROUP_TOKENS),
            "--max-running": (self.max_running, 1),
            "--max-waiting": (self.max_waiting, 0),
            "--kv-capacity-tokens": (self.kv_capacity_tokens, GROUP_TOKENS),
            "--prefix-cache-bytes": (self.prefix_cache_bytes, 0),
            "--threads": (self.threads, 1),
            "--tp": (self.tp, 1),
            "--stall-timeout": (self.stall_timeout, 0.1),
            "--resume-timeout": (self.resume_timeout, 0.0),
        }
        require_at_least(least | self.least_of_place)
        require_at_most({"--threads": (self.threads, MOST_THREADS)})


def build_parser() -> argparse.ArgumentParser:
    """The command line of `hma-serve prefill`."""
    parser = argparse.ArgumentParser(
        prog="hma-serve prefill",
        description="Computes prompts' KV in low precision and pushes it to decode workers, layer by layer.",
    )
    model = parser.add_argument_group("model")
    add_model_arguments(model)
    model.add_argument(
        "--profile", default="tt_bfp8", metavar="NAME", help="arithmetic and KV codec (default: %(default)s)"
    )
    model.add_argument("--profiles", type=Path, metavar="DIR", help="more profiles, one TOML file each")
    model.add_argument(
        "--k-offsets", type=Path, metavar="FILE", help="subtract these from keys (made by `hma-serve kv calibrate`)"
    )
    model.add_argument(
        "--device", default="cpu", help="kind of accelerator; packages can add more (default: %(default)s)"
    )
    model.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="devices that share the model, each with whole key/value heads (default: %(default)s)",
    )
    model.add_argument(
        "--threads",
        type=int,
        default=default_threads(),
        help="of the arithmetic, shared by the ranks (default: %(default)s)",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--chunk-tokens",
        type=int,
        default=512,
        help="tokens computed together, a multiple of 32 (default: %(default)s)",
    )
    work.add_argument(
        "--layers-ahead",
        type=int,
        default=2,
        help="layers computed before the oldest of them must have left (default: %(default)s)",
    )
    work.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest prompt; default: the model's window")
    work.add_argument(
        "--max-running", type=int, default=8, help="requests whose KV may be held at once (default: %(default)s)"
    )
    work.add_argument(
        "--max-waiting",
        type=int,
        default=64,
        help="requests that may wait before more are refused (default: %(default)s)",
    )
    work.add_argument(
        "--kv-capacity-tokens",
        type=int,
        metavar="TOKENS",
        help="KV held at once; default: max-running longest prompts, if there is memory for them",
    )
    work.add_argument(
        "--prefix-cache-bytes",
        type=int,
        metavar="BYTES",
        help="host memory for KV of prompts seen before, 0 for none; default: 1 GiB, if that is little of what is free",
    )
    work.add_argument(
        "--overlap",
        choices=("on", "off"),
        default="on",
        help="whether KV leaves while later layers are computed; off is for comparing (default: %(default)s)",
    )
    work.add_argument(
        "--stall-timeout",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="how long decode may let a transfer wait (default: %(default)s)",
    )
    work.add_argument(
        "--resume-timeout",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="how long a transfer may take to go on after its connection was lost (default: %(default)s)",
    )
    work.add_argument("--events", type=Path, metavar="FILE", help="record when each layer was computed and left")
    add_place_arguments(parser, listen="127.0.0.1:50061")
    return parser


def config_of(args: argparse.Namespace) -> PrefillConfig:
    """The configuration that parsed arguments describe.

    Raises:
        InvalidArgument: A value is out of range; names the flag.
    """
    values = vars(args) | {"etcd": registry_of(args.etcd)}
    return PrefillConfig(**values)
