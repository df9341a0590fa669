"""`hma-serve kv`: packs, unpacks, shows and checks KV in the wire format, in pipes and on files.

What a vendor needs beside docs/kv-block-format.md to write a producer and to prove it: reference bytes to compare with,
and a reader that says which rule a file breaks, and where.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from hma_serve.cli.kv_capture import Capture, read_capture
from hma_serve.cli.kv_pipes import (
    WrongData,
    WrongUse,
    abandon_stdout,
    file_error,
    printable,
    read_exactly,
    read_file,
    require_stdout,
    write_bytes,
)
from hma_serve.cli.kv_report import STOPPED, as_json, as_table
from hma_serve.cli.kv_vectors import INDEX, verify_vectors, write_vectors
from hma_serve.core.errors import HmaError
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
_MOST_DIGITS: Final = 12
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
        "path", metavar="FILE|DIR", help=f"a capture (- reads stdin), or a folder of captures (*.kv) and a {INDEX}"
    )
    vectors = commands.add_parser("vectors", help="write the golden vectors", epilog=EXIT_STATUSES)
    vectors.add_argument("out", metavar="OUT", type=Path, help="folder; made if it is not there")
    _add_calibrate(commands.add_parser("calibrate", help="draw K offsets from prompts", epilog=EXIT_STATUSES))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        require_stdout()
        status = _COMMANDS[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:
        abandon_stdout()
        return _BROKEN_PIPE
    except (KvFormatError, HmaError) as error:
        status = _WRONG_DATA if isinstance(error, KvFormatError) else _WRONG_USE
        return _fail(args.command, error.message, status)
    except WrongData as error:
        return _fail(args.command, str(error), _WRONG_DATA)
    except WrongUse as error:
        return _fail(args.command, str(error), _WRONG_USE)
    except OSError as error:
        abandon_stdout()  # it may be what failed
        return _fail(args.command, file_error(error), _WRONG_USE)
    except MemoryError:
        return _fail(args.command, "there is not enough memory for this much at once", _WRONG_USE)
    return status


def _fail(command: str, message: str, status: int) -> int:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"hma-serve kv {command}: {printable(message)}", file=sys.stderr)
    return status


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--codec", required=True, metavar="C", help=f"one of {', '.join(codec_names())}")
    parser.add_argument("--rows", required=True, type=_positive, metavar="R", help="tokens of a head, a multiple of 32")
    parser.add_argument("--cols", required=True, type=_positive, metavar="D", help="channels of a head")
    parser.add_argument(
        "--heads", type=_positive, default=1, metavar="H", help="heads, one after the other (default: 1)"
    )


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs a text through a prefill profile and writes the mean of each layer's and KV head's keys, which prefill "
        "and decode take with --k-offsets. Use texts and lengths like those that will be served."
    )
    parser.add_argument("--model", required=True, metavar="demo|DIR|HUB_ID", help="the checkpoint")
    parser.add_argument("--profile", required=True, help="of the prefill workers that will use the table")
    parser.add_argument("--profiles", type=Path, metavar="DIR", help="more profiles, as of `hma-serve prefill`")
    parser.add_argument("--text", required=True, type=Path, nargs="+", metavar="FILE", help="what to run, UTF-8")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the table; - writes to stdout")
    parser.add_argument("--tokens", type=_positive, default=1024, help="of a prompt, at most (default: %(default)s)")
    parser.add_argument("--prompts", type=_positive, default=16, help="at most (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="kind of accelerator (default: %(default)s)")
    parser.add_argument("--threads", type=_positive, help="of the arithmetic (default: all cores)")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= _MOST_DIGITS and int(text)):
        raise argparse.ArgumentTypeError(f"{printable(text[:20])!r} is not a positive whole number in reach")
    return int(text)


def _encode(args: argparse.Namespace) -> int:
    packer, rounding = _packer(args), _ROUNDINGS[args.rounding]
    values = np.frombuffer(read_exactly(4 * args.heads * args.rows * args.cols), dtype="<f4")
    values = values.reshape(args.heads, args.rows, args.cols)
    try:
        packer.encode(values[:0], rounding)
    except ValueError as error:
        raise WrongUse(str(error)) from error
    try:
        units = packer.encode(values, rounding)
    except ValueError as error:
        raise WrongData(str(error)) from error
    write_bytes(np.ascontiguousarray(units).data)
    return 0


def _decode(args: argparse.Namespace) -> int:
    packer = _packer(args)
    payload = read_exactly(packer.payload_bytes(args.heads, args.rows, args.cols))
    packer.check_payload(payload, args.heads, args.rows, args.cols)
    values = packer.decode(payload, args.heads, args.rows, args.cols)
    write_bytes(np.ascontiguousarray(values, dtype="<f4").data)
    return 0


def _packer(args: argparse.Namespace) -> Codec:
    try:
        packer = codec(args.codec)
        packer.check_geometry(args.cols)
    except KvFormatError as error:
        raise WrongUse(error.message) from error
    if args.rows % GROUP_TOKENS:
        raise WrongUse(f"--rows {args.rows} is not a multiple of {GROUP_TOKENS}")
    return packer


def _inspect(args: argparse.Namespace) -> int:
    capture = read_capture(read_file(args.file))
    print(json.dumps(as_json(capture), indent=2) if args.json else as_table(capture))
    return _WRONG_DATA if capture.problems else 0


def _verify(args: argparse.Namespace) -> int:
    folder = Path(args.path)
    if args.path == "-" or not folder.is_dir():
        return _judge(args.path, read_capture(read_file(args.path)))
    captures = sorted(path for path in folder.rglob("*.kv") if path.is_file())
    index = folder / INDEX
    if not captures and not index.exists():
        raise WrongUse(f"{args.path} holds neither captures (*.kv) nor a {INDEX}")
    statuses = [_judge(str(file.relative_to(folder)), read_capture(read_file(str(file)))) for file in captures]
    if index.exists():
        problems, checked = verify_vectors(index)
        for problem in problems:
            print(problem)
        print(f"{INDEX}: {checked} payloads, {len(problems)} wrong")
        statuses.append(_WRONG_DATA if problems else 0)
    return max(statuses)


def _vectors(args: argparse.Namespace) -> int:
    count = write_vectors(args.out)
    print(f"{count} files in {printable(str(args.out))}")
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    try:
        from hma_serve.cli import kv_calibrate  # brings torch, which nothing else here needs
    except ModuleNotFoundError as error:
        raise WrongUse(f"the package {error.name!r} is missing; install hma-serve[local]") from error
    told = kv_calibrate.run(args)
    print(told, file=sys.stderr if args.output == "-" else sys.stdout)
    return 0


def _judge(name: str, capture: Capture) -> int:
    name = printable(name)
    for problem in capture.problems:
        print(printable(f"{name}: {problem}"))
    if capture.stopped:
        print(f"{name}: {STOPPED}")
    if capture.problems:
        return _WRONG_DATA
    print(f"{name}: right: {capture.summary}")
    return 0


_COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    "encode": _encode,
    "decode": _decode,
    "inspect": _inspect,
    "verify": _verify,
    "vectors": _vectors,
    "calibrate": _calibrate,
}


if __name__ == "__main__":
    sys.exit(main())
