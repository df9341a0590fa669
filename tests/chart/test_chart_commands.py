"""The commands in the chart's containers are ones that our images can run, and together they serve."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from hma_serve.decode.config import build_parser as decode_parser
from hma_serve.decode.config import config_of as decode_config
from hma_serve.prefill.config import build_parser as prefill_parser
from hma_serve.prefill.config import config_of as prefill_config
from hma_serve.registry import Watcher, open_readable_store
from hma_serve.router.config import parse_config as router_config
from support.cluster import free_port
from support.etcd_server import EtcdServer
from support.extra_environment import make_environment, packages_of
from support.helm_chart import CHART, EXAMPLES, TUNED, Object, service_containers, template

PARSERS: dict[str, Callable[[Sequence[str]], object]] = {
    "router": router_config,
    "prefill": lambda argv: prefill_config(prefill_parser().parse_args(argv)),
    "decode": lambda argv: decode_config(decode_parser().parse_args(argv)),
}
SECURED = [
    "--set=tls.enabled=true",
    "--set=tls.existingSecret=services",
    "--set=slo.ttftMs=500",
    "--set=slo.tpotMs=50",
]


def as_kubernetes_starts_it(container: Object, environment: dict[str, str]) -> list[str]:
    """Command and arguments with $(NAME) replaced."""

    def expanded(argument: str) -> str:
        for name, value in environment.items():
            argument = argument.replace(f"$({name})", value)
        return argument

    return [expanded(argument) for argument in (*container["command"], *container["args"])]


@pytest.mark.parametrize(
    "arguments",
    [[f"--values={path}"] for path in EXAMPLES] + [SECURED, TUNED],
    ids=[path.stem for path in EXAMPLES] + ["secured", "tuned"],
)
def test_our_command_line_takes_every_flag(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    containers = service_containers(template(*arguments))
    assert {container["name"] for container in containers} == {"router", "prefill", "decode"}
    for container in containers:
        names = {variable["name"] for variable in container["env"]}
        assert {"ETCD_ENDPOINTS", "POD_IP", "POD_NAME", "POD_NAMESPACE"} <= names
        (endpoints,) = [v["value"] for v in container["env"] if v["name"] == "ETCD_ENDPOINTS"]
        monkeypatch.setenv("ETCD_ENDPOINTS", endpoints)
        program, role, *argv = as_kubernetes_starts_it(container, {"POD_IP": "10.0.0.7"})
        assert (program, role) == ("hma-serve", container["name"])
        PARSERS[role](argv)


def test_an_image_has_only_what_its_role_needs() -> None:
    assert not {"torch", "triton", "safetensors"} & packages_of("router")
    assert "torch" in packages_of("decode") & packages_of("prefill")


@contextlib.contextmanager
def started(container: Object, program: Path, environment: dict[str, str], log: Path) -> Iterator[None]:
    """Runs a container's process; it must end well when it is asked to."""
    argv = [str(program), *as_kubernetes_starts_it(container, environment)[1:]]
    with log.open("w") as out:
        process = subprocess.Popen(argv, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent)
    try:
        yield
        process.terminate()
        assert process.wait(60) == 0, log.read_text()[-4000:]
    finally:
        process.kill()
        process.wait()


def wait_until_ready(port: int, seconds: float = 90) -> None:
    """What the readiness probe does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == httpx.codes.OK:
                return
        time.sleep(0.2)
    raise AssertionError(f"port {port} did not become ready within {seconds:g} s")


@pytest.mark.timeout(300)
def test_the_commands_serve_from_environments_of_their_own_extras(tmp_path: Path) -> None:
    """Router, prefill and decode, each exactly as the chart starts it, from its own extra's packages: one answer.

    And `hma-serve top`, called in a router's pod, sees every one of them.
    """
    http, ports = free_port(), [free_port() for _ in range(5)]
    values = {
        "router.ports.http": http,
        "router.ports.grpc": ports[0],
        "workerPorts.prefill": ports[1],
        "workerPorts.decode": ports[2],
    }
    example = f"--values={CHART / 'examples' / 'single-node-cpu.yaml'}"
    settings = [f"--set={name}={value}" for name, value in values.items()]
    # On one host two workers cannot share the port of their metrics, as pods do.
    by_role = {
        role: next(
            c
            for c in service_containers(template(example, *settings, f"--set=workerPorts.status={status}"))
            if c["name"] == role
        )
        for role, status in (("router", ports[3]), ("prefill", ports[3]), ("decode", ports[4]))
    }
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(EtcdServer(tmp_path / "etcd"))
        for role in ("decode", "prefill", "router"):
            container = by_role[role]
            program = make_environment(tmp_path / role, role)
            environment = {
                "PATH": f"{program.parent}:{os.environ['PATH']}",
                "POD_IP": "127.0.0.1",
                "ETCD_ENDPOINTS": etcd.url,
                "OMP_NUM_THREADS": "1",
                "HOME": str(tmp_path),
            }
            stack.enter_context(started(container, program, environment, tmp_path / f"{role}.log"))
            if role == "router":
                looking = [str(program), "top", "--interval=0.2"]
        for port in (ports[4], ports[3], http):
            wait_until_ready(port)
        request = {"prompt": "The sea " * 40, "max_tokens": 4}
        answer = httpx.post(f"http://127.0.0.1:{http}/v1/completions", json=request, timeout=60)
        logs = "\n".join((tmp_path / f"{role}.log").read_text()[-2000:] for role in by_role)
        assert answer.status_code == 200, f"{answer.text}\n{logs}"
        assert answer.json()["usage"]["completion_tokens"] == 4
        look = subprocess.run(looking, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert "1 router, 1 prefill, 1 decode" in look.stdout, look.stderr
        assert "no answer" not in look.stdout, look.stdout
        with Watcher(open_readable_store(etcd.url)) as watcher:
            assert watcher.wait_listed_blocking(10)
            fleet = watcher.current
        hosts = {one.http_address.rpartition(":")[0] for one in (*fleet.workers.values(), *fleet.routers.values())}
        assert hosts == {"127.0.0.1"}  # POD_IP, not every interface of whoever asks
