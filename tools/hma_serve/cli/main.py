"""`hma-serve COMMAND ...`: finds the command's module and hands it the rest.

Each role's code is imported only when its command is asked for, so that an image with one role's dependencies can run
that role's command, and `hma-serve --help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from hma_serve.core.errors import HmaError


@dataclass(frozen=True)
class Command:
    """One command of the program.

    Attributes:
        module: Holds `main(argv) -> int`.
        extra: The distribution's extra that brings what the module imports.
        summary: One line of help.
    """

    module: str
    extra: str
    summary: str


COMMANDS = {
    "up": Command("hma_serve.cli.up", "local", "serve a model from a whole cluster on this machine"),
    "router": Command("hma_serve.router.main", "router", "run a router: the HTTP and gRPC entrance"),
    "prefill": Command("hma_serve.prefill.main", "prefill", "run a prefill worker"),
    "decode": Command("hma_serve.decode.main", "decode", "run a decode worker"),
    "complete": Command("hma_serve.cli.complete", "local", "continue a text, streamed to the terminal"),
    "chat": Command("hma_serve.cli.chat", "local", "talk to a model"),
    "top": Command("hma_serve.cli.top", "router", "watch workers, load, KV and objectives in the terminal"),
    "kv": Command("hma_serve.cli.kv", "service", "pack, unpack, show and check KV in the wire format"),
    "certs": Command("hma_serve.cli.certs", "local", "make certificates for trying mutual TLS"),
    "completion": Command("hma_serve.cli.completion_script", "local", "print a script for the shell's Tab key"),
}

USAGE_ERROR = 2

_SERVICES = frozenset({"router", "prefill", "decode"})


def usage() -> str:
    """The text of `hma-serve --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hma-serve COMMAND [OPTION ...]",
            "",
            "Low-precision prefill on cheap accelerators, BF16 decode on HBM GPUs, quantised KV in between.",
            "",
            "commands:",
            *lines,
            "",
            "`hma-serve COMMAND --help` tells a command's options; `hma-serve --version` the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name; returns the exit status."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    rest = rest[:-1]
    if name in ("", "-h", "--help", "help"):
        print(usage())
        return 0 if name else USAGE_ERROR
    if name in ("-V", "--version", "version"):
        print(f"hma-serve {version('hma-serve')}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(f"hma-serve: there is no command {name!r}; `hma-serve --help` lists them", file=sys.stderr)
        return USAGE_ERROR
    if name not in _SERVICES:
        # gRPC's chatter about connections is for a service's log, not for a terminal; it reads this when imported.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        module = importlib.import_module(command.module)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("hma_serve."):
            raise
        print(
            f"hma-serve {name}: the package {exc.name!r} is missing; install hma-serve with its extra "
            f"{command.extra!r} (in a clone: pip install '.[{command.extra}]')",
            file=sys.stderr,
        )
        return 1
    try:
        status: int = module.main(rest)
    except HmaError as exc:
        print(f"hma-serve {name}: {exc.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
