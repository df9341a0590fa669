"""What `complete` and `chat` share: the flags that reach a router, and how its errors read in a terminal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from hma_serve.client import (
    Client,
    ContextLengthExceeded,
    DeadlineExceeded,
    HmaError,
    InvalidArgument,
    NotFound,
    Options,
    PayloadTooLarge,
    ResourceExhausted,
    RetryPolicy,
    Tls,
    Unavailable,
)

DEFAULT_ADDRESS = "localhost:50051"

FAILED = 1
WRONG_REQUEST = 2
TRY_LATER = 75
TOO_LATE = 124
INTERRUPTED = 130
PIPE_CLOSED = 141

EXIT_STATUSES = f"""exit status:
  0    the answer is complete
  {WRONG_REQUEST}    the request is wrong: change the command
  {TRY_LATER}   no server, or a full one: the same command may work later
  {TOO_LATE}  the time is up
  {INTERRUPTED}  Ctrl-C
  {FAILED}    anything else"""

# An interactive user would rather hear at once that nobody listens.
_RETRY = RetryPolicy(rounds=3)

_HINTS = {
    "address": "is `hma-serve up` running? --address takes the router's gRPC address, as it prints it, not HTTP's",
    "timeout": "raise --timeout",
    "tls": "see --tls, --tls-ca, --tls-cert and --tls-key",
    "prompt": "change the prompt",
}
_SAMPLING_FLAGS = ("model", "max_tokens", "temperature", "top_p", "seed", "stop")


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say whom to ask."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--address",
        default=os.environ.get("HMA_ADDRESS", DEFAULT_ADDRESS),
        metavar="HOST:PORT[,...]",
        help=f"a router's gRPC address, or several (default: $HMA_ADDRESS or {DEFAULT_ADDRESS})",
    )
    group.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for an answer (default: 600)")
    group.add_argument("--tls", action="store_true", help="encrypt, and trust the public certificate authorities")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="encrypt, and trust this authority")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="show this certificate to the server")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="the certificate's private key")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say what to ask for."""
    group = parser.add_argument_group("answer")
    group.add_argument("--model", metavar="ID", help="not needed where only one is served")
    group.add_argument("--max-tokens", type=int, metavar="N", help="at most so many (default: what the context takes)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: 1)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this much probability"
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")


def open_client(args: argparse.Namespace) -> Client:
    """The client that the flags describe; raises InvalidArgument."""
    encrypted = args.tls or args.tls_ca or args.tls_cert or args.tls_key
    tls = Tls(ca=args.tls_ca, certificate=args.tls_cert, key=args.tls_key) if encrypted else None
    return Client(args.address, tls=tls, timeout=args.timeout, retry=_RETRY)


def sampling_options(args: argparse.Namespace) -> Options:
    """What the flags ask for."""
    return Options(
        model=args.model,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
    )


def run(program: str, work: Callable[[], int]) -> int:
    """Does a command's work and turns whatever ends it into a sentence and an exit status."""
    if sys.stdout is None:
        print(f"{program}: stdout is closed", file=sys.stderr)
        return WRONG_REQUEST
    try:
        return work()
    except HmaError as error:
        print(f"{program}: {sentence(error)}", file=sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return leave_stdout()


def leave_stdout() -> int:
    """Gives up a stdout that nobody reads any more; returns the exit status that says so."""
    # Python would write the rest once more at exit, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED


def sentence(error: HmaError) -> str:
    """The error in one line, with the flag to change where one is to blame."""
    message = " ".join(error.message.split())
    hint = _HINTS.get(error.field)
    if error.field in _SAMPLING_FLAGS:
        hint = f"change --{error.field.replace('_', '-')}"
    return f"{message}; {hint}" if hint else message


def exit_status(error: HmaError) -> int:
    """The status that tells a script what to do about the error."""
    if isinstance(error, (InvalidArgument, ContextLengthExceeded, NotFound, PayloadTooLarge)):
        return WRONG_REQUEST
    if isinstance(error, (Unavailable, ResourceExhausted)):
        return TRY_LATER
    return TOO_LATE if isinstance(error, DeadlineExceeded) else FAILED
