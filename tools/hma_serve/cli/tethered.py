"""Runs a command that dies with its parent: `python -m hma_serve.cli.tethered COMMAND ...`.

The kernel's parent-death signal survives `exec`, so this works for any program, and a killed `hma-serve up` leaves no
process behind. Linux only; elsewhere the command just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Sets the signal and becomes the command."""
    parent = int(os.environ.pop("HMA_TETHER_PID", "0"))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if parent and os.getppid() != parent:
            sys.exit("the parent process is gone")
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
