"""What every process of an engine is told to load, on its command line: the first rank reads it and passes it on."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from hma_serve.checkpoint import read_model_config
from hma_serve.checkpoint.k_offsets import read_k_offsets
from hma_serve.model import LoadLog
from hma_serve.prefill.accelerators import AcceleratorSpec
from hma_serve.prefill.accelerators.sharding import WHOLE, Shard
from hma_serve.prefill.profiles import find_profile

_log = logging.getLogger(__name__)

_NEEDED = ("checkpoint", "device", "profile", "threads", "log_format")
_OPTIONAL = ("profiles", "k_offsets", "decoded_bytes")


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them; the front writes them, so hardly any has a default."""
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--profiles", type=Path)
    parser.add_argument("--k-offsets", type=Path)
    parser.add_argument("--decoded-bytes", type=int)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--log-format", required=True)


def load_arguments(args: argparse.Namespace) -> list[str]:
    """The same again, for another process."""
    given = {name: getattr(args, name) for name in _NEEDED + _OPTIONAL}
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None]
    return [str(part) for pair in pairs for part in pair]


def spec_of(args: argparse.Namespace, shard: Shard = WHOLE) -> AcceleratorSpec:
    """What to load, of which a rank holds its share.

    Raises:
        HmaError: The checkpoint, the profile or the offsets cannot be read.
    """
    model, profile = read_model_config(args.checkpoint), find_profile(args.profile, args.profiles)
    return AcceleratorSpec(
        args.checkpoint,
        model,
        profile,
        progress=LoadLog(_log) if shard.rank == 0 else None,
        shard=shard,
        k_offsets=read_k_offsets(args.k_offsets, model, model_fingerprint=None, profile=profile.name),
        decoded_bytes=args.decoded_bytes,
    )
