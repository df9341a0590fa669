"""What this machine, or the container it is in, gives this process: memory and cores."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 62


def available_memory() -> int:
    """Bytes that can be taken without swapping or being killed, as the kernel estimates them."""
    return min(_of_the_machine(), _of_the_container())


def default_threads() -> int:
    """Half of the cores that this process may use, at least one."""
    return max(1, int(min(len(os.sched_getaffinity(0)), _cores_of_the_container())) // 2)


def _cores_of_the_container() -> float:
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return float(quota) / float(period) if quota != "max" else math.inf
    except (OSError, ValueError):
        return math.inf


def _of_the_machine() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _of_the_container() -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = (_CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return _NO_LIMIT
    if limit == "max":
        return _NO_LIMIT
    # Cached files count as used but are given up when memory is short.
    cached = sum(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
    return max(0, int(limit) - used + cached)
