"""Lines from a person or from a pipe.

A person gets a prompt, line editing and a history that outlives the program; a pipe gets none of it, so that a script
reads nothing but answers. A line that ends in a backslash goes on in the next, for both.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

HISTORY_LINES = 1000

_PROMPT = "> "
_MORE = ". "


def history_path() -> Path:
    """Where the history is kept: below $XDG_STATE_HOME, or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return root / "hma-serve" / "chat_history"


@contextlib.contextmanager
def line_editing(path: Path) -> Iterator[None]:
    """Line editing with the history in `path`; a history that cannot be read or written is done without."""
    import readline  # takes hold of the terminal, which a pipe must not feel

    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            readline.write_history_file(path)


def read_message(*, interactive: bool) -> str | None:
    """The next message, several lines joined; None at the end of input. Raises KeyboardInterrupt on Ctrl-C."""
    lines: list[str] = []
    while (line := _read_line(_MORE if lines else _PROMPT, interactive=interactive)) is not None:
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line.removesuffix("\\"))
    return "\n".join(lines) if lines else None


def _read_line(prompt: str, *, interactive: bool) -> str | None:
    if interactive:
        try:
            return input(prompt)
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None
