"""A cluster of separate processes that a test may kill, drain and restart one by one.

`hma-serve up` ends when one of its processes does, so these are started as an operator would: etcd, then any number of
`hma-serve decode|prefill|router`, each with its own flags and ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx

from hma_serve.registry import PREFIX, decode_record, open_store
from support.cluster import command, descendants, environment, free_port, survivors
from support.etcd_server import EtcdServer

START_SECONDS = 90.0
PATIENCE = 60.0
"""Seconds until a condition that must come true is given up."""

Seen = TypeVar("Seen")

_ADDRESSES = (re.compile(r"gRPC (\S+?),? HTTP (\S+?)[;\s]"), re.compile(r"grpc=(\S+)"))


@dataclass
class Process:
    """One service."""

    role: str
    process: subprocess.Popen[str]
    http: str = ""
    grpc: str = ""
    lines: list[str] = field(default_factory=list)
    serving: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if self.role != "router" and (found := _ADDRESSES[0].search(line)):
                self.grpc, self.http = found.groups()
                self.serving.set()
            if self.role == "router" and _ADDRESSES[1].search(line):
                self.serving.set()
        self.serving.set()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_serving(self) -> None:
        self.serving.wait(START_SECONDS)
        assert self.alive, f"{self.role} did not start:\n{''.join(self.lines)}"

    def kill(self) -> None:
        """kill -9 of the front; its engine follows by itself."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def metric(self, name: str) -> float:
        """The value of a metric, labels and all; 0 if nothing has been counted yet."""
        return self.metrics().get(name, 0.0)

    def metrics(self) -> dict[str, float]:
        """All metrics of this role by their names after `hma_<role>_`, labels and all."""
        text = httpx.get(f"http://{self.http}/metrics", timeout=20).text
        found = re.findall(rf"^hma_{self.role}_(.+) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}


class ProcessFleet:
    """The cluster; made by `process_fleet`."""

    def __init__(self, etcd: str, flags: dict[str, tuple[str, ...]], variables: dict[str, str]) -> None:
        self._etcd = etcd
        self._flags = flags
        self._environment = environment() | variables
        self.processes: list[Process] = []

    def start(self, role: str) -> Process:
        """Starts one more of a role, with the flags that all of it have; returns at once."""
        listen = ["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"]
        http = grpc = ""
        if role == "router":
            http, grpc = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
            listen = ["--http-listen", http, "--grpc-listen", grpc]
        return self._launch(role, listen, http, grpc)

    def restart_router(self, old: Process) -> Process:
        """Starts a router where another one was."""
        listen = ["--http-listen", old.http, "--grpc-listen", old.grpc]
        return self._launch("router", listen, old.http, old.grpc)

    def _launch(self, role: str, listen: list[str], http: str, grpc: str) -> Process:
        process = subprocess.Popen(
            command(role, "--etcd", self._etcd, *listen, *self._flags.get(role, ())),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        started = Process(role, process, http, grpc)
        self.processes.append(started)
        return started

    def of(self, role: str) -> list[Process]:
        """The live ones of a role."""
        return [process for process in self.processes if process.role == role and process.alive]

    @property
    def routers(self) -> list[str]:
        """gRPC addresses."""
        return [router.grpc for router in self.of("router")]

    @property
    def url(self) -> str:
        """Of the first router's HTTP API."""
        return f"http://{self.of('router')[0].http}"

    def registered(self) -> set[str]:
        """gRPC addresses of all that the registry knows."""
        store = open_store(self._etcd)
        try:
            records = store.list(PREFIX, 10).entries
            return {decode_record(entry.value).address for entry in records}
        finally:
            store.close()

    async def settled(self, *, prefill: int, decode: int) -> None:
        """Waits until every router can reach exactly so many workers and answers that it is ready."""

        def sees_all(router: Process) -> bool:
            return (
                router.metric('workers{role="prefill",state="open"}') == prefill
                and router.metric('workers{role="decode",state="open"}') == decode
                and httpx.get(f"http://{router.http}/ready").status_code == 200
            )

        def ready() -> bool:
            # A router that was just started does not listen yet.
            with contextlib.suppress(httpx.TransportError):
                return all(map(sees_all, self.of("router")))
            return False

        await eventually(ready, "the routers do not see the fleet that there is")

    async def idle(self) -> None:
        """Waits until no live worker holds anything of a request: pages are back at their baseline."""

        def empty() -> bool:
            held = [worker.metric("kv_used_tokens") for worker in self.of("decode")]
            for worker in (*self.of("decode"), *self.of("prefill")):
                held += [worker.metric("running_requests"), worker.metric("waiting_requests")]
            return not any(held)

        await eventually(empty, "a worker still holds something")

    def logs(self) -> str:
        return "\n".join(f"== {p.role} {p.process.pid}\n{''.join(p.lines)[-3000:]}" for p in self.processes)


async def eventually(look: Callable[[], Seen], otherwise: str) -> Seen:
    """Looks until there is something; what that is."""
    end = time.monotonic() + PATIENCE
    while not (seen := await asyncio.to_thread(look)):
        assert time.monotonic() < end, otherwise
        await asyncio.sleep(0.02)
    return seen


@contextmanager
def process_fleet(
    directory: Path,
    *,
    prefill: int,
    decode: int,
    routers: int,
    flags: dict[str, tuple[str, ...]],
    variables: dict[str, str],
) -> Iterator[ProcessFleet]:
    """Starts a cluster and yields it when each process serves; ends what is left of it afterwards."""
    with EtcdServer(directory / "etcd") as etcd:
        fleet = ProcessFleet(etcd.url, flags, variables)
        try:
            for role, count in (("decode", decode), ("prefill", prefill), ("router", routers)):
                for _ in range(count):
                    fleet.start(role)
            for process in fleet.processes:
                process.wait_serving()
            yield fleet
        finally:
            pids = [pid for process in fleet.processes for pid in descendants(process.process.pid)]
            for process in fleet.processes:
                process.kill()
                process.reader.join(10)
                assert process.process.stderr is not None
                process.process.stderr.close()
            for pid in survivors(pids):
                os.kill(pid, signal.SIGKILL)
