"""`hma-serve up` as a user meets it: what it prints, how it ends, and what it says when it cannot start."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import time
from importlib.resources import files
from pathlib import Path

import httpx
import pytest

from hma_serve.cli import up
from hma_serve.core.errors import InvalidArgument
from support.cluster import command, environment, free_port, running_cluster, survivors


def run_up(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("up", *arguments), capture_output=True, text=True, env=environment(), timeout=timeout, check=False
    )


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `up` makes the directory that it was given none of."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_ctrl_c_drains_exits_0_and_leaves_no_process(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as cluster:
        for expected in ("OpenAI API", cluster.url, cluster.grpc_address, "tt_bfp8", "metrics", "etcd"):
            assert expected in cluster.output
        assert "It was a dark and stormy night" in cluster.output
        assert httpx.get(f"{cluster.url}/ready").status_code == 200
        pids = cluster.children()
        assert len(pids) >= 6  # etcd, router, and front and engine of prefill and decode
        assert cluster.interrupt() == 0, cluster.output
        assert survivors(pids) == []
    assert "killed" not in cluster.output
    assert re.search(r"draining, for [0-9]+ s at most; Ctrl-C again ends it at once", cluster.output)


def test_a_killed_up_takes_its_processes_along(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as cluster:
        pids = cluster.children()
        cluster.process.kill()
        cluster.process.wait()
        assert survivors(pids, within=20) == []


def test_a_reader_that_has_enough_ends_the_cluster_without_a_trace(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("up", "--http-port", "0", "--grpc-port", "0", "--etcd-port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment() | {"TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"starting")
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(60) == 141
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_dies_ends_the_cluster_with_a_sentence(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as cluster:
        pids = cluster.children()
        decode = next(pid for pid in pids if b"\0decode\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(decode, signal.SIGKILL)
        assert cluster.process.wait(15) == 1
        assert survivors(pids) == []
    assert "decode-0 was ended by SIGKILL" in cluster.output


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port", "--etcd-port"])
def test_a_taken_port_is_named(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ports = {"--http-port": str(free_port()), "--grpc-port": str(free_port()), "--etcd-port": "0", flag: port}
        result = run_up(*(part for pair in ports.items() for part in pair))
    assert result.returncode == 1
    assert result.stderr.strip() == f"hma-serve up: port {port} on 127.0.0.1 is taken; choose another with {flag}"


def test_etcd_listens_where_everybody_expects_it_unless_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(up, "ETCD_PORT", port := taken.getsockname()[1])
        assert up.parse_config([]).etcd_port == 0
    assert up.parse_config([]).etcd_port == port
    assert up.parse_config(["--etcd-port", "4001"]).etcd_port == 4001


@pytest.mark.parametrize("host", ["nosuch.invalid", "192.0.2.1"])
def test_a_host_that_is_not_ours_is_named(host: str) -> None:
    result = run_up("--host", host, "--http-port", "8000", "--grpc-port", "0")
    assert result.returncode == 1
    assert f"cannot listen on {host}" in result.stderr
    assert "--host" in result.stderr


def test_a_data_directory_serves_one_cluster_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_up("--data-dir", str(tmp_path), "--http-port", "0", "--grpc-port", "0")
    assert result.returncode == 1
    assert f"{tmp_path} is in use by another `hma-serve up`; choose another --data-dir" in result.stderr
    assert not (tmp_path / "logs").exists()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    result = run_up("--model", str(tmp_path / "nowhere"), "--http-port", "0", "--grpc-port", "0")
    assert result.returncode == 1
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_damaged_checkpoint_ends_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    result = run_up("--model", str(tmp_path / "model"), "--http-port", "0", "--grpc-port", "0")
    assert result.returncode == 1
    assert "config.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_etcd_that_does_not_answer_is_named(temporary: Path) -> None:
    result = run_up("--etcd", "http://127.0.0.1:1", "--http-port", "0", "--grpc-port", "0")
    assert result.returncode == 1
    assert "etcd" in result.stderr
    assert "--etcd" in result.stderr
    assert list(temporary.iterdir()) == []


def test_logs_that_an_error_points_to_stay(temporary: Path) -> None:
    result = run_up("--router-arg=--max-waiting=no", "--http-port", "0", "--grpc-port", "0", "--etcd-port", "0")
    assert result.returncode == 1
    [log] = temporary.glob("hma-serve-*/logs/router.log")
    assert f"router ended with status 2; the end of its log ({log}):" in result.stderr


@pytest.mark.parametrize("count", ["0", "1"])
def test_a_profile_that_prefill_has_not_is_found_before_anything_starts(count: str) -> None:
    arguments = ["--prefill", count, "--prefill-profile", "nope", "--etcd", "http://127.0.0.1:1"]
    result = run_up(*arguments, "--http-port", "0", "--grpc-port", "0")
    assert result.returncode == 1
    assert ("unknown profile 'nope'; choose one of " in result.stderr) == (count == "1")
    assert ("starting" in result.stdout) == (count == "0")


def test_profiles_of_ones_own_are_known(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="mine"):
        up.parse_config(["--prefill-profile", "mine"])
    built_in = files("hma_serve.prefill").joinpath("profile_data", "bf16.toml").read_text()
    (tmp_path / "mine.toml").write_text(built_in.replace('"bf16"', '"mine"', 1))
    assert up.parse_config(["--prefill-profile", "mine", f"--prefill-arg=--profiles={tmp_path}"])


@pytest.mark.parametrize(
    "arguments", [("--decode", "0"), ("--prefill", "65"), ("--http-port", "65536"), ("--etcd-port", "-1")]
)
def test_numbers_out_of_range_are_named(arguments: tuple[str, str]) -> None:
    result = run_up(*arguments)
    assert result.returncode == 1
    assert arguments[0] in result.stderr


def test_a_second_ctrl_c_ends_streams_with_an_error_at_once(tmp_path: Path) -> None:
    with running_cluster(tmp_path, "--drain-grace", "100") as cluster, httpx.Client(timeout=60) as client:
        body = {"prompt": "It was", "ignore_eos": True, "stream": True, "max_tokens": 4000}
        request = client.build_request("POST", f"{cluster.url}/v1/completions", json=body)
        endless = client.send(request, stream=True)
        cluster.process.send_signal(signal.SIGINT)
        while "draining" not in cluster.output:
            time.sleep(0.05)
        cluster.process.send_signal(signal.SIGINT)
        assert '"code":"unavailable"' in endless.read().decode().replace(" ", "")
        assert cluster.process.wait(20) == 0, cluster.output


def test_ctrl_c_lets_running_streams_end_and_cuts_those_that_do_not(tmp_path: Path) -> None:
    """A short stream ends by itself; an endless one is told why within the grace; nothing is killed."""
    with running_cluster(tmp_path, "--drain-grace", "6") as cluster, httpx.Client(timeout=60) as client:
        body = {"prompt": "It was", "ignore_eos": True, "stream": True}
        short = client.send(
            client.build_request("POST", f"{cluster.url}/v1/completions", json=body | {"max_tokens": 20}), stream=True
        )
        endless = client.send(
            client.build_request("POST", f"{cluster.url}/v1/completions", json=body | {"max_tokens": 4000}), stream=True
        )
        cluster.process.send_signal(signal.SIGINT)
        texts = [response.read().decode() for response in (short, endless)]
        assert cluster.process.wait(40) == 0, cluster.output
    assert texts[0].endswith("data: [DONE]\n\n")
    assert '"error"' in texts[1]
    assert "killed" not in cluster.output
