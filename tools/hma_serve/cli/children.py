"""The processes of a local cluster: started together, watched, stopped in order.

Every child runs tethered to this process, in a process group of its own (the terminal's Ctrl-C reaches `up` alone,
which then drains in order), and writes its log to a file, whose end is quoted when the child fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hma_serve.core.errors import Unavailable

_QUOTED_LINES = 12
_POLL_SECONDS = 0.05


@dataclass
class Child:
    """One process of the cluster.

    Attributes:
        name: For people, for example `decode-0`.
        process: The running process.
        log: Its standard output and error.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def log_tail(self) -> str:
        """The last lines that the child wrote, indented."""
        lines = self.log.read_text(errors="replace").splitlines()[-_QUOTED_LINES:]
        return "\n".join(f"    {line}" for line in lines)


class Children:
    """All processes of a cluster, in the order in which they were started.

    Args:
        log_directory: Gets one file a child.
    """

    def __init__(self, log_directory: Path) -> None:
        self.log_directory = log_directory
        self.log_directory.mkdir(parents=True, exist_ok=True)
        self.running: list[Child] = []

    def start(self, name: str, command: Sequence[str]) -> Child:
        """Starts one child."""
        log = self.log_directory / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "hma_serve.cli.tethered", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                env=os.environ | {"HMA_TETHER_PID": str(os.getpid())},
            )
        child = Child(name, process, log)
        self.running.append(child)
        return child

    def check(self) -> None:
        """Raises Unavailable if a child has ended."""
        for child in self.running:
            status = child.process.poll()
            if status is not None:
                raise Unavailable(
                    f"{child.name} {describe_end(status)}; the end of its log ({child.log}):\n{child.log_tail()}"
                )

    def stop(self, grace: float) -> list[str]:
        """Ends all children, the last started first; kills what has not left after `grace` seconds each.

        Returns:
            Names of those that had to be killed.
        """
        killed = []
        for child in reversed(self.running):
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
                if not _ended(child.process, grace):
                    child.process.kill()
                    child.process.wait()
                    killed.append(child.name)
        self.running.clear()
        return killed

    def hurry(self, name: str, within: float) -> None:
        """Signals a child that is being stopped once more, and waits until it has left, at most `within` seconds."""
        for child in list(self.running):
            if child.name == name and child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
                _ended(child.process, within)

    def kill(self) -> None:
        """Ends all children at once."""
        for child in self.running:
            child.process.kill()
        for child in self.running:
            child.process.wait()
        self.running.clear()


def _ended(process: subprocess.Popen[bytes], grace: float) -> bool:
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return True
        time.sleep(_POLL_SECONDS)
    return process.poll() is not None


def describe_end(status: int) -> str:
    """How a process ended, to follow its name in a sentence."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
