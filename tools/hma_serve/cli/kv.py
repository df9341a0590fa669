"""`hma-serve kv`: packs, unpacks, shows and checks KV in the wire format, in pipes and on files.

What a vendor needs beside docs/kv-block-format.md to write a producer and to prove it: reference bytes to compare with,
and a reader that says which rule a file breaks, and where.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from hma_serve.cli.kv_capture import Capture, read_capture
from hma_serve.cli.kv_report import as_json, as_table
from hma_serve.cli.kv_vectors import INDEX, verify_vectors, write_vectors
from hma_serve.kvblock import GROUP_TOKENS, Codec, KvFormatError, codec, codec_names
from hma_serve.v1.kv_block_pb2 import (
    KV_ROUNDING_NEAREST_AWAY,
    KV_ROUNDING_NEAREST_EVEN,
    KV_ROUNDING_TRUNCATE,
)

EXIT_STATUSES: Final = """exit status: 0 right; 1 the data breaks a rule (stderr or the report says which and where);
2 wrong use or a file that cannot be read; 141 the reader of the output went away"""
_WRONG_DATA: Final = 1
_WRONG_USE: Final = 2
_BROKEN_PIPE: Final = 141
_MAX_FILE_BYTES: Final = 8 << 30
_ROUNDINGS: Final = {
    "nearest_even": KV_ROUNDING_NEAREST_EVEN,
    "nearest_away": KV_ROUNDING_NEAREST_AWAY,
    "truncate": KV_ROUNDING_TRUNCATE,
}


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="hma-serve kv",
        description="Pack, unpack, show and check KV in the wire format (docs/kv-block-format.md).",
        epilog=EXIT_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    encode = commands.add_parser("encode", help="float32 on stdin to a payload on stdout", epilog=EXIT_STATUSES)
    _add_shape(encode)
    encode.add_argument("--rounding", choices=_ROUNDINGS, default="nearest_even", help="default: %(default)s")
    decode = commands.add_parser("decode", help="a payload on stdin to float32 on stdout", epilog=EXIT_STATUSES)
    _add_shape(decode)
    inspect = commands.add_parser("inspect", help="show a capture's manifest and blocks", epilog=EXIT_STATUSES)
    inspect.add_argument("file", metavar="FILE", help="a capture or one frame; - reads stdin")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    verify = commands.add_parser(
        "verify", help="check a producer's captures and vectors against the format", epilog=EXIT_STATUSES
    )
    verify.add_argument(
        "path", metavar="FILE|DIR", help=f"a capture (- reads stdin), or a folder of captures (*.kv) and an {INDEX}"
    )
    vectors = commands.add_parser("vectors", help="write the golden vectors", epilog=EXIT_STATUSES)
    vectors.add_argument("out", metavar="OUT", type=Path, help="folder; made if it is not there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        status = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing is flushed into it at exit
        return _BROKEN_PIPE
    except KvFormatError as error:
        print(f"{parser.prog} {args.command}: {error.message}", file=sys.stderr)
        return _WRONG_DATA
    except _WrongData as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return _WRONG_DATA
    except (OSError, _WrongUse) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return _WRONG_USE
    return status


class _WrongData(Exception):
    """The input is not what the options say, or cannot be packed."""


class _WrongUse(Exception):
    """What was asked for cannot be done; the message says why."""


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--codec", required=True, metavar="C", help=f"one of {', '.join(codec_names())}")
    parser.add_argument("--rows", required=True, type=_positive, metavar="R", help="tokens of a head, a multiple of 32")
    parser.add_argument("--cols", required=True, type=_positive, metavar="D", help="channels of a head")
    parser.add_argument(
        "--heads", type=_positive, default=1, metavar="H", help="heads, one after the other (default: 1)"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _run(args: argparse.Namespace) -> int:
    if args.command == "encode":
        return _encode(args)
    if args.command == "decode":
        return _decode(args)
    if args.command == "inspect":
        return _inspect(args)
    if args.command == "verify":
        return _verify(args.path)
    count = write_vectors(args.out)
    print(f"{count} files in {args.out}")
    return 0


def _encode(args: argparse.Namespace) -> int:
    packer = _packer(args)
    values = np.frombuffer(_stdin(4 * args.heads * args.rows * args.cols), dtype="<f4")
    try:
        units = packer.encode(values.reshape(args.heads, args.rows, args.cols), _ROUNDINGS[args.rounding])
    except ValueError as error:
        raise _WrongData(str(error)) from error
    sys.stdout.buffer.write(np.ascontiguousarray(units).data)
    sys.stdout.buffer.flush()
    return 0


def _decode(args: argparse.Namespace) -> int:
    packer = _packer(args)
    payload = _stdin(packer.payload_bytes(args.heads, args.rows, args.cols))
    packer.check_payload(payload, args.heads, args.rows, args.cols)
    values = packer.decode(payload, args.heads, args.rows, args.cols)
    sys.stdout.buffer.write(np.ascontiguousarray(values, dtype="<f4").data)
    sys.stdout.buffer.flush()
    return 0


def _packer(args: argparse.Namespace) -> Codec:
    try:
        packer = codec(args.codec)
        packer.check_geometry(args.cols)
    except KvFormatError as error:
        raise _WrongUse(error.message) from error
    if args.rows % GROUP_TOKENS:
        raise _WrongUse(f"--rows {args.rows} is not a multiple of {GROUP_TOKENS}")
    return packer


def _stdin(size: int) -> bytes:
    """All of it, which must be this long; not more than one byte beyond is read."""
    data = sys.stdin.buffer.read(size + 1)
    if len(data) != size:
        found = "more bytes" if len(data) > size else f"{len(data)} bytes"
        raise _WrongData(f"stdin has {found}, not the {size} of these rows and columns")
    return data


def _read_file(name: str) -> bytes:
    if name == "-":
        data = sys.stdin.buffer.read(_MAX_FILE_BYTES + 1)
    else:
        with Path(name).open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise _WrongUse(f"{name} is larger than {_MAX_FILE_BYTES} bytes")
    return data


def _inspect(args: argparse.Namespace) -> int:
    capture = read_capture(_read_file(args.file))
    print(json.dumps(as_json(capture), indent=2) if args.json else as_table(capture))
    return _WRONG_DATA if capture.problems else 0


def _verify(path: str) -> int:
    folder = Path(path)
    if path == "-" or not folder.is_dir():
        return _judge(path, read_capture(_read_file(path)))
    captures = sorted(folder.rglob("*.kv"))
    index = folder / INDEX
    if not captures and not index.exists():
        raise _WrongUse(f"{path} holds neither captures (*.kv) nor an {INDEX}")
    statuses = [_judge(str(file.relative_to(folder)), read_capture(_read_file(str(file)))) for file in captures]
    if index.exists():
        problems, checked = verify_vectors(index)
        for problem in problems:
            print(problem)
        print(f"{INDEX}: {checked} payloads, {len(problems)} wrong")
        statuses.append(_WRONG_DATA if problems else 0)
    return max(statuses)


def _judge(name: str, capture: Capture) -> int:
    for problem in capture.problems:
        print(f"{name}: {problem}")
    if capture.problems:
        return _WRONG_DATA
    print(f"{name}: right: {capture.summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
