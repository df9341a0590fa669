"""Standard streams as `hma-serve kv` uses them: bytes of a known size in, bytes and plain text out, never a traceback.

A stream may be closed, end early, never end, or be read by somebody who leaves; text in files comes from strangers.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO, Final

MAX_BYTES: Final = 8 << 30
"""Of one file, or of values on a pipe."""
_PIECE: Final = 16 << 20


class WrongData(Exception):
    """The input is not what the options say, or cannot be packed."""


class WrongUse(Exception):
    """What was asked for cannot be done; the message says why."""


def require_stdout() -> None:
    """Refuses to work for nobody: a closed stdout would swallow everything without a word.

    Raises:
        WrongUse: It is closed.
    """
    if sys.stdout is None:
        raise WrongUse("stdout is closed")
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def abandon_stdout() -> None:
    """Lets nothing more be flushed into a stdout that takes nothing more, so that the exit status stays ours."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_exactly(size: int) -> bytearray:
    """All of stdin, which must have this size; not more than a piece beyond is read.

    Raises:
        WrongData: It has another size.
        WrongUse: It is closed, or the size is more than can be held.
    """
    if size > MAX_BYTES:
        raise WrongUse(f"these rows and columns take {size} bytes; {MAX_BYTES} are the most at once")
    data = _read(_stdin(), size + 1)
    if len(data) != size:
        found = "more bytes" if len(data) > size else f"{len(data)} bytes"
        raise WrongData(f"stdin has {found}, not the {size} of these rows and columns")
    return data


def read_file(name: str) -> bytearray:
    """A file's bytes; `-` is stdin.

    Raises:
        OSError: It cannot be read.
        WrongUse: It is too large, or neither a file nor stdin.
    """
    if name == "-":
        data = _read(_stdin(), MAX_BYTES + 1)
    else:
        with Path(name).open("rb") as file:
            data = _read(file, MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise WrongUse(f"{printable(name)} is larger than {MAX_BYTES} bytes")
    return data


def read_listed(path: Path, limit: int) -> bytes:
    """A file that another file names: a device or a pipe, which might never end, is none.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a regular file, or larger than the limit.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path.name} is larger than {limit} bytes")
    return data


def write_bytes(data: memoryview) -> None:
    """To stdout, all of it."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def printable(text: str) -> str:
    """Text from a stranger without what a terminal would obey: control characters and line breaks are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def file_error(error: OSError) -> str:
    """What an operating system's error says, without its number."""
    words = error.strerror or str(error)
    return words if error.filename is None else f"{os.fsdecode(error.filename)}: {words}"


def _stdin() -> BinaryIO:
    if sys.stdin is None:
        raise WrongUse("stdin is closed")
    return sys.stdin.buffer


def _read(file: BinaryIO, most: int) -> bytearray:
    """Up to so many bytes: memory grows with what comes, not with what was announced."""
    data = bytearray()
    while len(data) < most:
        piece = file.read(min(_PIECE, most - len(data)))
        if not piece:
            break
        data += piece
    return data
