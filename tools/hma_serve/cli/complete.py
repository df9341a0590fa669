"""`hma-serve complete PROMPT`: continues a text and streams what comes to stdout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from hma_serve.cli.asking import (
    EXIT_STATUSES,
    add_sampling_flags,
    add_server_flags,
    open_client,
    run,
    sampling_options,
)
from hma_serve.client import Completion, InvalidArgument, Stream


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="hma-serve complete",
        description="Continue a text; the continuation is streamed to stdout.",
        epilog=EXIT_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the text; - or none reads stdin, without its last line break"
    )
    add_sampling_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    add_server_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("no prompt: give one, or pipe one in")
    return run(parser.prog, lambda: complete(args))


def complete(args: argparse.Namespace) -> int:
    """Asks and prints; raises HmaError."""
    prompt = read_stdin() if args.prompt in (None, "-") else args.prompt
    with open_client(args) as client, client.generate(prompt, **sampling_options(args)) as stream:
        if args.json:
            print(as_json(stream.result()), flush=True)
        else:
            show(stream)
    return 0


def read_stdin() -> str:
    """The prompt on stdin; raises InvalidArgument when it is closed or not UTF-8."""
    if sys.stdin is None:
        raise InvalidArgument("stdin is closed")
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as exc:
        raise InvalidArgument("the prompt on stdin is not UTF-8 text") from exc
    return text.removesuffix("\n")


def show(stream: Stream) -> None:
    """Writes the text as it comes; ends the line, whatever happens."""
    last = ""
    try:
        for delta in stream:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            last = delta.text or last
    finally:
        if last and not last.endswith("\n"):
            print(flush=True)


def as_json(completion: Completion) -> str:
    """The whole answer on one line."""
    choice = completion.choices[0]
    return json.dumps(
        {
            "request_id": completion.request_id,
            "model": completion.model,
            "text": choice.text,
            "token_ids": choice.token_ids,
            "finish_reason": choice.finish_reason,
            "stop_match": choice.stop_match,
            "usage": dataclasses.asdict(completion.usage),
        },
        ensure_ascii=False,
    )
