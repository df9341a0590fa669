"""What a container's limits leave of the machine, told by files as cgroup v2 has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hma_serve.worker import available_memory, default_threads, host

MIB = 1 << 20


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "threads"),
    [
        ("max 100000", 32),
        ("400000 100000", 2),
        ("50000 100000", 1),
        ("nonsense", 32),
        (None, 32),
        ("9900000 100000", 32),
    ],
)
def test_threads_are_half_of_what_the_container_may_use(cgroup: Path, limit: str | None, threads: int) -> None:
    if limit is not None:
        (cgroup / "cpu.max").write_text(f"{limit}\n")
    assert default_threads() == threads


def test_memory_is_what_the_containers_limit_leaves_and_files_give_up(cgroup: Path) -> None:
    unlimited = available_memory()
    assert unlimited > 64 * MIB
    (cgroup / "memory.max").write_text(f"{64 * MIB}\n")
    (cgroup / "memory.current").write_text(f"{32 * MIB}\n")
    (cgroup / "memory.stat").write_text(f"anon 1\ninactive_file {8 * MIB}\n")
    assert available_memory() == 40 * MIB
    (cgroup / "memory.max").write_text("max\n")
    assert available_memory() > 64 * MIB
