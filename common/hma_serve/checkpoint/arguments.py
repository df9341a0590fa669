"""The flags that say which model a process serves; every service has the same."""

from __future__ import annotations

import argparse

from hma_serve.checkpoint.locate import DEMO
from hma_serve.checkpoint.random_checkpoint import PREFIX


def add_model_arguments(
    parser: argparse._ActionsContainer, *, about: str = "the checkpoint", default: str = DEMO
) -> None:
    """Adds `--model` and `--random-weights`, which exclude each other; both fill `model`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=default, metavar="demo|DIR|HUB_ID", help=f"{about} (default: %(default)s)")
    which.add_argument(
        "--random-weights",
        dest="model",
        type=lambda shape: PREFIX + shape,
        # Both write to one place; the default is said above.
        default=argparse.SUPPRESS,
        metavar="CONFIG",
        help="no checkpoint but random weights in the shape of a config.json or of qwen3-{0.6b,1.7b,4b,8b,14b,32b}; "
        "@SEED may follow. Give every service the same",
    )
