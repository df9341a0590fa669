"""A whole cluster for tests: `hma-serve up` as a user starts it, on free ports."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from support.metrics import metric_in

START_SECONDS = 90.0
STOP_SECONDS = 45.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """A running `hma-serve up`."""

    process: subprocess.Popen[str]
    http_port: int
    grpc_port: int
    directory: Path
    lines: list[str] = field(default_factory=list)
    serving: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def logs(self) -> str:
        """Everything that the services logged."""
        files = sorted((self.directory / "logs").glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in files)

    def metrics_url(self, role: str) -> str:
        """Where the only service of a role tells its metrics."""
        if role == "router":
            return f"{self.url}/metrics"
        (url,) = re.findall(rf"{role}-\w+ +metrics +(\S+)", self.output)
        return str(url)

    def metric(self, role: str, name: str) -> float:
        """A metric of the only service of a role, by its name after `hma_<role>_`."""
        return metric_in(httpx.get(self.metrics_url(role)).text, f"hma_{role}_{name}")

    def children(self) -> list[int]:
        """Pids of all live descendants of `up`."""
        return descendants(self.process.pid)

    def interrupt(self) -> int:
        """Ctrl-C; returns the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_SECONDS)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("serving"):
                self.serving.set()
        self.serving.set()


def descendants(pid: int) -> list[int]:
    """Live processes below `pid`, without zombies."""
    found: list[int] = []
    frontier = [pid]
    while frontier:
        parent = frontier.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                frontier += map(int, task.read_text().split())
        found += [parent] if parent != pid else []
    return [child for child in found if alive(child)]


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "hma_serve.cli.main", *arguments]


def environment() -> dict[str, str]:
    """One thread an engine: the machine that runs the tests has two cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def running_cluster(directory: Path, *arguments: str) -> Iterator[Cluster]:
    """Starts `hma-serve up ARGUMENTS` and yields it when it serves; ends it afterwards, whatever happened."""
    http_port, grpc_port = free_port(), free_port()
    ports = ["--http-port", str(http_port), "--grpc-port", str(grpc_port), "--etcd-port", "0"]
    ports += ["--data-dir", str(directory)]
    # Where a short prompt is computed depends on measured times, and what a quantising profile gives on where.
    ports.append("--router-arg=--local-prefill-tokens=0")
    process = subprocess.Popen(
        command("up", *ports, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        process_group=0,
    )
    cluster = Cluster(process, http_port, grpc_port, directory)
    reader = threading.Thread(target=cluster._read, daemon=True)
    reader.start()
    pids: Sequence[int] = ()
    try:
        cluster.serving.wait(START_SECONDS)
        if process.poll() is not None or not cluster.output.rstrip().endswith("stops"):
            raise AssertionError(f"the cluster did not start:\n{cluster.output}\n{cluster.logs()}")
        yield cluster
    finally:
        pids = cluster.children()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(5)
        assert process.stdout is not None
        process.stdout.close()
        for pid in survivors(pids):
            os.kill(pid, signal.SIGKILL)


def survivors(pids: Sequence[int], within: float = 5.0) -> list[int]:
    """Which of the processes still run after `within` seconds."""
    deadline = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]
