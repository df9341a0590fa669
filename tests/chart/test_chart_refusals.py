"""Values that cannot work are refused with a sentence, by the schema or by the chart's own checks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.helm_chart import CHART, helm

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown value": ({"router": {"replica": 2}}, "additional properties 'replica' not allowed"),
    "wrong type": ({"router": {"replicas": "two"}}, "got string, want integer"),
    "no router": ({"router": {"replicas": 0}}, "minimum: got 0, want 1"),
    "port out of range": ({"workerPorts": {"decode": 70000}}, "maximum: got 70,000, want 65,535"),
    "pool without a name": ({"decode": {"pools": [{"replicas": 1}]}}, "missing property 'name'"),
    "pool without a profile": (
        {"prefill": {"pools": [{"name": "a", "accelerator": "cpu"}]}},
        "missing property 'profile'",
    ),
    "pool's name is no label": ({"decode": {"pools": [{"name": "H100_pool"}]}}, "does not match pattern"),
    "resource without a domain": (
        {"decode": {"pools": [{"name": "a", "device": {"resources": {"gpu": 1}}}]}},
        "invalid propertyName 'gpu'",
    ),
    "flag that is none": ({"router": {"extraArgs": ["max-body-bytes 5"]}}, "does not match pattern"),
    "half a digest": ({"router": {"image": {"digest": "sha256:12"}}}, "does not match pattern"),
    "scaler of another kind": ({"router": {"autoscaling": {"type": "vpa"}}}, "must be one of 'none', 'hpa', 'keda'"),
    "negative price": ({"decode": {"defaults": {"pricePerHour": -1}}}, "minimum: got -1, want 0"),
    "no registry": ({"etcd": {"enabled": False}}, "set etcd.enabled, or give etcd.externalEndpoints"),
    "two registries": ({"etcd": {"externalEndpoints": ["http://etcd:2379"]}}, "choose one"),
    "even members": ({"etcd": {"replicas": 2}}, "must be odd"),
    "endpoint without a port": ({"etcd": {"enabled": False, "externalEndpoints": ["http://etcd"]}}, "does not match"),
    "nobody decodes": ({"decode": {"pools": []}}, "nobody would sample a token"),
    "pool twice": ({"decode": {"pools": [{"name": "a"}, {"name": "a"}]}}, 'decode pool "a" is there twice'),
    "devices twice": (
        {
            "decode": {
                "pools": [
                    {
                        "name": "a",
                        "device": {"resources": {"nvidia.com/gpu": 1}},
                        "dra": {"deviceClassName": "gpu.nvidia.com"},
                    }
                ]
            }
        },
        "set device.resources or dra, not both",
    ),
    "update that never starts": (
        {"decode": {"pools": [{"name": "a", "strategy": {"maxSurge": 0, "maxUnavailable": 0}}]}},
        "could never be updated",
    ),
    "minimum above maximum": (
        {"router": {"autoscaling": {"type": "hpa", "minReplicas": 9, "maxReplicas": 2}}},
        "router: autoscaling.minReplicas is above maxReplicas",
    ),
    "hpa to zero": (
        {"decode": {"pools": [{"name": "a", "autoscaling": {"type": "hpa", "minReplicas": 0}}]}},
        "an HPA cannot scale to zero",
    ),
    "keda from zero": (
        {
            "monitoring": {"prometheusAddress": "http://prometheus:9090"},
            "decode": {"pools": [{"name": "a", "autoscaling": {"type": "keda", "minReplicas": 0}}]},
        },
        "would never start one",
    ),
    "members that forget": ({"etcd": {"persistence": {"enabled": False}}}, "set etcd.replicas to 1"),
    "a foreign authority for our own etcd": (
        {"etcd": {"externalTlsSecret": "s"}},
        "takes the certificates of tls",
    ),
    "a foreign authority but no TLS": (
        {"etcd": {"enabled": False, "externalEndpoints": ["http://etcd:2379"], "externalTlsSecret": "s"}},
        "without TLS",
    ),
    "a label that is no text": ({"router": {"nodeSelector": {"gpu": True}}}, "got boolean, want string"),
    "a mode that is none": ({"decode": {"pools": [{"name": "a", "kvMode": "packed"}]}}, "'fused', 'materialise'"),
    "a name that leaves no room": ({"fullnameOverride": "x" * 35}, "maxLength: got 35, want 34"),
    "keda without Prometheus": (
        {"decode": {"pools": [{"name": "a", "autoscaling": {"type": "keda"}}]}},
        "set monitoring.prometheusAddress",
    ),
    "TLS without certificates": ({"tls": {"enabled": True}}, "tls.existingSecret or tls.certManager.issuerName"),
    "TLS but not to etcd": (
        {
            "tls": {"enabled": True, "existingSecret": "s"},
            "etcd": {"enabled": False, "externalEndpoints": ["http://etcd:2379"]},
        },
        "without TLS",
    ),
}


@pytest.mark.parametrize(("values", "reason"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused(values: dict[str, Any], reason: str) -> None:
    arguments = [f"--set-json={key}={json.dumps(value)}" for key, value in values.items()]
    result = helm("template", "demo", CHART, *arguments)
    assert result.returncode != 0
    assert reason in " ".join(result.stderr.split())
