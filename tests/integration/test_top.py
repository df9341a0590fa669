"""`hma-serve top` on a real cluster: one look in a pipe, and the live view in a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest

from support.cluster import Cluster, command, environment, running_cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


def etcd_of(cluster: Cluster) -> str:
    return next(line.split()[-1] for line in cluster.lines if line.split()[:1] == ["etcd"])


def test_one_look_in_a_pipe(cluster: Cluster) -> None:
    body = {"prompt": "The sea was calm. " * 40, "max_tokens": 4}
    assert httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=30).status_code == 200
    asked = command("top", "--etcd", etcd_of(cluster), "--interval", "0.2")
    result = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment(), timeout=30)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "1 router, 1 prefill, 1 decode" in result.stdout
    assert cluster.url in rows
    (prefill,) = [line for name, line in rows.items() if name.startswith("prefill-")]
    (decode,) = [line for name, line in rows.items() if name.startswith("decode-")]
    assert "tt_bfp8" in prefill
    assert "ready" in decode
    assert "%" in decode
    assert "no answer" not in result.stdout
    assert "\x1b" not in result.stdout


def test_the_live_view_leaves_the_terminal_as_it_was(cluster: Cluster) -> None:
    main, terminal = pty.openpty()
    asked = command("top", "--etcd", etcd_of(cluster), "--router", cluster.url, "--interval", "0.2")
    with subprocess.Popen(asked, stdin=terminal, stdout=terminal, stderr=terminal, env=environment()) as process:
        os.close(terminal)
        shown = b""
        deadline = time.monotonic() + 30
        while shown.count(b"hma-serve") < 3:
            assert time.monotonic() < deadline, shown
            if select.select([main], [], [], 1.0)[0]:
                shown += os.read(main, 65536)
        os.write(main, b"q")
        # The terminal's end is an input error on Linux.
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                shown += os.read(main, 65536)
        assert process.wait(10) == 0
    os.close(main)
    assert shown.startswith(b"\x1b[?1049h\x1b[?25l")
    assert shown.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")
    assert b"decode-" in shown


def test_a_registry_that_is_not_there_is_an_error() -> None:
    result = subprocess.run(
        command("top", "--etcd", "http://127.0.0.1:1", "--once"),
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("hma-serve top: ")
    assert "Traceback" not in result.stderr
