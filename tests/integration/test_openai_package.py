"""The official `openai` package against a whole cluster.

The package lives in an environment of its own, made once and kept in pytest's cache, so that nothing that it depends on
can hide what the product needs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cluster import Cluster, environment, running_cluster

OPENAI = "3.54.0"
SCRIPT = Path(__file__).parents[1] / "support" / "openai_calls.py"
NAMES = re.findall(r"^@(?:call|blocking)\n(?:async )?def (\w+)", SCRIPT.read_text(), re.MULTILINE)
INSTALL_SECONDS = 240


@pytest.fixture(scope="module")
def openai_python(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the package."""
    cache = pytestconfig.cache
    root = cache.mkdir(f"openai-{OPENAI}") if cache is not None else tmp_path_factory.mktemp("openai")
    python, done = root / "bin" / "python", root / "done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", root], check=True, timeout=INSTALL_SECONDS)
        install = [str(python), "-m", "pip", "install", "--quiet", f"openai=={OPENAI}"]
        installed = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        if installed.returncode:
            pytest.skip(f"pip cannot install openai: {installed.stderr[-500:]}")
        done.touch()
    return python


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("openai-cluster")) as found:
        yield found


@pytest.fixture(scope="module")
def outcomes(openai_python: Path, cluster: Cluster) -> dict[str, str | None]:
    """What was wrong with each call; None: nothing."""
    command = [str(openai_python), str(SCRIPT), cluster.url]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return {entry["call"]: entry["error"] for entry in map(json.loads, result.stdout.splitlines())}


@pytest.mark.timeout(INSTALL_SECONDS + 400)
@pytest.mark.parametrize("name", NAMES)
def test_a_call(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None, outcomes[name]


def test_there_are_thirty() -> None:
    assert len(NAMES) >= 30


@pytest.mark.timeout(INSTALL_SECONDS + 400)
def test_the_services_logged_no_traceback(outcomes: dict[str, str | None], cluster: Cluster) -> None:
    assert outcomes
    logs = cluster.logs()
    assert "Traceback" not in logs, logs
