"""What the chart renders: accepted by helm, by Kubernetes' own schemas and by the rules that we promise."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from hma_serve.decode.config import MOST_RECEIVERS
from support.helm_chart import (
    CHART,
    EXAMPLES,
    NAMESPACE,
    TUNED,
    Object,
    helm,
    of_kind,
    pod_spec,
    service_containers,
    template,
)

KUBERNETES = "1.34"
EVERYTHING = [
    "--set=monitoring.serviceMonitor.enabled=true",
    "--set=router.ingress.enabled=true",
    "--set=router.ingress.host=llm.example.com",
    "--set=router.ingress.tlsSecret=llm-tls",
    "--set=tls.enabled=true",
    "--set=tls.existingSecret=services",
    "--set=monitoring.prometheusAddress=http://prometheus:9090",
    "--set=router.autoscaling.type=keda",
    "--set=decode.defaults.autoscaling.type=keda",
    "--set=prefill.defaults.hugepages1Gi=2",
    "--set=model.hubTokenSecret.name=hub",
    "--set=commonLabels.team=inference",
]
VARIANTS: dict[str, list[str]] = {path.stem: [f"--values={path}"] for path in EXAMPLES}
VARIANTS |= {"tuned": TUNED, "defaults": [], "everything": EVERYTHING, "no-prefill": ["--set-json=prefill.pools=[]"]}

variants = pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)


def schemas() -> dict[str, Any]:
    """Schemas of custom resources, by kind."""
    loaded = [json.loads(path.read_text()) for path in (CHART / "schemas").glob("*.json")]
    return {schema["properties"]["kind"]["const"]: schema for schema in loaded}


def check(thing: Object) -> None:
    custom = schemas().get(thing["kind"])
    if custom is not None:
        jsonschema.validate(thing, custom, jsonschema.Draft202012Validator)
    else:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)


@variants
def test_helm_lints_it(arguments: list[str]) -> None:
    result = helm("lint", "--strict", CHART, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


@variants
def test_kubernetes_would_take_every_object(arguments: list[str]) -> None:
    objects = template(*arguments)
    for thing in objects:
        check(thing)
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in objects]
    assert len(names) == len(set(names))
    assert {thing["metadata"]["namespace"] for thing in objects} == {NAMESPACE}


def test_the_check_is_not_blind() -> None:
    objects = template(*VARIANTS["everything"])
    deployment, scaled = of_kind(objects, "Deployment")[0], of_kind(objects, "ScaledObject")[0]
    pod_spec(deployment)["containers"][0]["port"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check(deployment)
    del scaled["spec"]["triggers"][0]["metadata"]["serverAddress"]
    with pytest.raises(jsonschema.ValidationError):
        check(scaled)


@variants
def test_pods_meet_the_restricted_standard(arguments: list[str]) -> None:
    for workload in of_kind(template(*arguments), "Deployment", "StatefulSet"):
        spec = pod_spec(workload)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "limits" in container["resources"]
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume]


@variants
def test_selectors_reach_their_own_pods_alone(arguments: list[str]) -> None:
    objects = template(*arguments)
    workloads = of_kind(objects, "Deployment", "StatefulSet")
    labels = {w["metadata"]["name"]: w["spec"]["template"]["metadata"]["labels"] for w in workloads}

    def selected(selector: dict[str, str]) -> list[str]:
        return [name for name, have in labels.items() if selector.items() <= have.items()]

    for workload in workloads:
        assert selected(workload["spec"]["selector"]["matchLabels"]) == [workload["metadata"]["name"]]
    for service in of_kind(objects, "Service"):
        (name,) = selected(service["spec"]["selector"])
        (workload,) = [w for w in workloads if w["metadata"]["name"] == name]
        ports = {port["name"] for port in pod_spec(workload)["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert len(selected(budget["spec"]["selector"]["matchLabels"])) == 1
    for monitor in of_kind(objects, "ServiceMonitor"):
        services = of_kind(objects, "Service")
        wanted = monitor["spec"]["selector"]["matchLabels"]
        assert [s for s in services if wanted.items() <= s["metadata"]["labels"].items()]


@variants
def test_the_end_of_a_pod_waits_for_its_drain(arguments: list[str]) -> None:
    for deployment in of_kind(template(*arguments), "Deployment"):
        spec = pod_spec(deployment)
        (container,) = spec["containers"]
        flags = dict(flag.lstrip("-").partition("=")[::2] for flag in container["args"])
        waits = float(flags["drain-grace"]) + float(flags.get("kv-lease", 0))
        if "lifecycle" in container:
            waits += float(container["lifecycle"]["preStop"]["exec"]["command"][-1])
        assert spec["terminationGracePeriodSeconds"] > waits


def test_a_router_is_asked_to_end_only_when_it_is_forgotten() -> None:
    """Endpoints are withdrawn while a pod ends: one that refused at once would refuse requests still sent to it."""

    def hook(*arguments: str) -> Object | None:
        found: Object | None = service_containers(template(*arguments))[0].get("lifecycle")
        return found

    assert hook() == {"preStop": {"exec": {"command": ["sleep", "5"]}}}
    assert hook("--set=router.preStopSeconds=0") is None


@variants
def test_a_routers_rollout_waits_for_workers_that_start(arguments: list[str]) -> None:
    deadlines = {
        d["metadata"]["name"]: d["spec"]["progressDeadlineSeconds"] for d in of_kind(template(*arguments), "Deployment")
    }
    assert deadlines["demo-hma-serve-router"] == max(deadlines.values())


@variants
def test_names_are_as_short_as_kubernetes_wants_them(arguments: list[str]) -> None:
    """Of the longest release name that helm takes, with a pool of the longest name of ours."""
    pool = {"name": "a-name-of-20-letters", "profile": "bf16", "accelerator": "cpu"}
    sampler = {"name": pool["name"]}
    pools = [f"--set-json=prefill.pools={json.dumps([pool])}", f"--set-json=decode.pools={json.dumps([sampler])}"]
    rendered = helm("template", "r" * 53, CHART, *arguments, *pools)
    assert rendered.returncode == 0, rendered.stderr
    for thing in filter(None, yaml.safe_load_all(rendered.stdout)):
        pod = thing.get("spec", {}).get("template", {}).get("metadata", {})
        labels = thing["metadata"]["labels"] | pod.get("labels", {})
        assert max(map(len, [thing["metadata"]["name"], *labels.values()])) <= 63


@variants
def test_a_pod_names_each_variable_port_and_mount_once(arguments: list[str]) -> None:
    """Server-side apply, helm's own since version 4, refuses a list with a key twice."""
    for workload in of_kind(template(*arguments), "Deployment", "StatefulSet"):
        spec = pod_spec(workload)
        (container,) = spec["containers"]
        for things, key in (
            (container["env"], "name"),
            (container["ports"], "name"),
            (container["volumeMounts"], "mountPath"),
            (spec.get("volumes", []), "name"),
        ):
            keys = [thing[key] for thing in things]
            assert len(keys) == len(set(keys)), keys
        claimed = [claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])]
        volumes = {volume["name"] for volume in spec.get("volumes", [])} | set(claimed)
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_values_of_a_pool_become_its_flags_and_volumes() -> None:
    objects = template(*TUNED)
    pods = {d["metadata"]["name"].removeprefix("demo-hma-serve-"): pod_spec(d) for d in of_kind(objects, "Deployment")}
    flags = {name: set(spec["containers"][0]["args"]) for name, spec in pods.items()}
    shared = {"--overcommit", "--receivers=2", "--threads=4", "--max-model-len=8192", "--codecs=tt_bfp8_b,int8"}
    assert flags["decode-a"] >= shared | {"--kv-mode=fused"}
    assert flags["decode-b"] >= shared | {"--kv-mode=materialise"}
    assert flags["prefill-a"] >= {"--tp=2", "--max-model-len=4096", "--threads=2", "--listen=[::]:50061"}
    assert all("--etcd-tls-dir=/etc/hma-serve/etcd-tls" in each for each in flags.values())
    mounts = {name: {m["mountPath"] for m in spec["containers"][0]["volumeMounts"]} for name, spec in pods.items()}
    assert {name for name, paths in mounts.items() if "/dev/shm" in paths} == {"prefill-a"}
    caches = [v for spec in pods.values() for v in spec["volumes"] if v["name"] == "cache"]
    assert caches == [{"name": "cache", "persistentVolumeClaim": {"claimName": "hub"}}] * len(pods)
    environment = {variable["name"]: variable.get("value") for variable in pods["router"]["containers"][0]["env"]}
    assert (environment["HF_HOME"], environment["HF_ENDPOINT"]) == ("/mirror", "http://hub")


def test_routers_and_etcd_spread_over_nodes_unless_told_otherwise() -> None:
    def constraints(*arguments: str) -> dict[str, list[Object]]:
        workloads = of_kind(template(*arguments), "Deployment", "StatefulSet")
        found = {pod_spec(w)["containers"][0]["name"]: (w, pod_spec(w)) for w in workloads}
        for workload, spec in found.values():
            for one in spec.get("topologySpreadConstraints", []):
                labels = workload["spec"]["template"]["metadata"]["labels"]
                assert one.get("labelSelector", {}).get("matchLabels", {}).items() <= labels.items()
        return {name: spec.get("topologySpreadConstraints", []) for name, (_, spec) in found.items()}

    usual = constraints()
    assert [len(usual[name]) for name in ("router", "etcd", "prefill", "decode")] == [1, 1, 0, 0]
    own = {
        "maxSkew": 1,
        "topologyKey": "zone",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {}},
    }
    asked = [f"--set-json={part}.topologySpreadConstraints={json.dumps([own])}" for part in ("router", "etcd")]
    told = constraints(*asked)
    assert told["router"] == told["etcd"] == [own]


@variants
def test_an_autoscaler_owns_the_number_of_replicas(arguments: list[str]) -> None:
    objects = template(*arguments)
    scaled = {s["spec"]["scaleTargetRef"]["name"] for s in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")}
    for deployment in of_kind(objects, "Deployment"):
        assert ("replicas" in deployment["spec"]) != (deployment["metadata"]["name"] in scaled)


@variants
def test_policies_select_every_pod(arguments: list[str]) -> None:
    objects = template(*arguments)
    (everyone,) = [p["spec"] for p in of_kind(objects, "NetworkPolicy") if p["metadata"]["name"] == "demo-hma-serve"]
    assert everyone["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in everyone
    for workload in of_kind(objects, "Deployment", "StatefulSet"):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert everyone["podSelector"]["matchLabels"].items() <= labels.items()


def test_policies_let_these_calls_pass_and_no_other() -> None:
    """Every caller against every port, by the rules of Kubernetes; a gateway and Prometheus are in other namespaces."""
    gateway, prometheus = ({"namespaceSelector": {"matchLabels": {"team": team}}} for team in ("gateway", "monitoring"))
    given = [
        f"--set-json=networkPolicy.clients={json.dumps([gateway])}",
        f"--set-json=networkPolicy.monitoring={json.dumps([prometheus])}",
    ]
    objects = template(f"--values={CHART / 'examples' / 'tenstorrent-h100.yaml'}", *given)
    policies, pods = _policies_and_pods(objects)
    callers = {name: {"podSelector": pod["metadata"]["labels"]} for name, pod in pods.items()}
    callers |= {team: {"namespaceSelector": {"team": team}} for team in ("gateway", "monitoring", "elsewhere")}

    def passes(caller: str, target: str, port: int) -> bool:
        into = _allowed(policies, "ingress", pods[target], callers[caller], port)
        out = caller not in pods or _allowed(policies, "egress", pods[caller], callers[target], port)
        return into and out

    found = {
        (caller, target, port["name"])
        for caller in callers
        for target, pod in pods.items()
        for port in pod["spec"]["containers"][0]["ports"]
        if passes(caller, target, port["containerPort"])
    }
    assert found == {
        ("gateway", "router", "http"),
        ("gateway", "router", "grpc"),
        ("router", "prefill", "grpc"),
        ("router", "decode", "grpc"),
        ("prefill", "decode", "grpc"),
        *((name, "etcd", "client") for name in pods),
        ("etcd", "etcd", "peer"),
        # Metrics: for Prometheus, and for `hma-serve top` in a router's pod.
        *((caller, "router", "http") for caller in ("monitoring", "router")),
        *((caller, name, "status") for caller in ("monitoring", "router") for name in ("prefill", "decode", "etcd")),
    }
    # Outside: name servers and the collector, nothing else.
    outside = {port for port in (53, 80, 443, 4317, 6443) if _allowed(policies, "egress", pods["decode"], {}, port)}
    assert outside == {53, 4317}


def test_as_many_receivers_as_decode_may_have_can_be_set_and_reached() -> None:
    def receivers(count: int) -> list[str]:
        pool = {"name": "a", "receivers": count}
        return [f"--set=decode.defaults.receivers={count}", f"--set-json=decode.pools={json.dumps([pool])}"]

    policies, pods = _policies_and_pods(template(*receivers(MOST_RECEIVERS)))
    prefill = {"podSelector": pods["prefill"]["metadata"]["labels"]}
    (own,) = [p["containerPort"] for p in pods["decode"]["spec"]["containers"][0]["ports"] if p["name"] == "grpc"]
    around = range(own - 1, own + MOST_RECEIVERS + 2)
    reached = [port - own for port in around if _allowed(policies, "ingress", pods["decode"], prefill, port)]
    assert reached == list(range(MOST_RECEIVERS + 1))
    for argument in receivers(MOST_RECEIVERS + 1):
        refused = helm("template", "demo", CHART, argument)
        assert f"maximum: got {MOST_RECEIVERS + 1}, want {MOST_RECEIVERS}" in refused.stderr


def _policies_and_pods(objects: list[Object]) -> tuple[list[Object], dict[str, Object]]:
    """Rules, and templates of pods by the name of their container."""
    workloads = of_kind(objects, "Deployment", "StatefulSet")
    pods = {pod_spec(workload)["containers"][0]["name"]: workload["spec"]["template"] for workload in workloads}
    return [policy["spec"] for policy in of_kind(objects, "NetworkPolicy")], pods


def _allowed(policies: list[Object], way: str, pod: Object, peer: Object, port: int) -> bool:
    """Whether the pod may call a peer or be called by it. A peer: its labels by the kind of selector that finds it."""

    def selects(selector: Object, labels: dict[str, str]) -> bool:
        listed = selector.get("matchExpressions", ())
        return selector.get("matchLabels", {}).items() <= labels.items() and all(
            labels.get(one["key"]) in one["values"] for one in listed
        )

    def matches(rule: Object) -> bool:
        known = [
            one
            for kind, labels in peer.items()
            for one in rule.get(ends, ())
            if selects(one.get(kind, {"matchLabels": {"": ""}}), labels)
        ]
        return (ends not in rule or bool(known)) and ("ports" not in rule or any(map(covers, rule["ports"])))

    def covers(ports: Object) -> bool:
        first: int = ports["port"]
        last: int = ports.get("endPort", first)
        return first <= port <= last

    ends = {"ingress": "from", "egress": "to"}[way]
    bound = [
        p for p in policies if way.title() in p["policyTypes"] and selects(p["podSelector"], pod["metadata"]["labels"])
    ]
    return not bound or any(matches(rule) for policy in bound for rule in policy.get(way, ()))


def test_devices_reach_the_container() -> None:
    def containers(example: str) -> dict[str, Object]:
        objects = template(f"--values={CHART / 'examples' / example}")
        return {d["metadata"]["name"]: pod_spec(d)["containers"][0] for d in of_kind(objects, "Deployment")}

    cards = containers("tenstorrent-h100.yaml")["demo-hma-serve-prefill-blackhole"]
    assert cards["resources"]["limits"] == {"memory": "64Gi", "tenstorrent.com/p150": 1, "hugepages-1Gi": "1Gi"}
    assert {"name": "hugepages", "mountPath": "/dev/hugepages-1G"} in cards["volumeMounts"]
    claimed = containers("l40s-h200.yaml")["demo-hma-serve-decode-h200"]
    assert claimed["resources"]["claims"] == [{"name": "devices"}]
    pair = containers("gaudi-mi300x.yaml")["demo-hma-serve-prefill-r9700"]
    assert pair["resources"]["limits"]["amd.com/gpu"] == 2
    assert "--tp=2" in pair["args"]


@variants
def test_a_pool_with_devices_computes_on_them(arguments: list[str]) -> None:
    """Devices that nothing uses would be paid for and idle."""
    for deployment in of_kind(template(*arguments), "Deployment"):
        container = pod_spec(deployment)["containers"][0]
        devices = [name for name in container["resources"]["limits"] if "/" in name]
        devices += [claim["name"] for claim in container["resources"].get("claims", ())]
        assert not devices or "--device=cpu" not in container["args"], deployment["metadata"]["name"]
        assert container["name"] == "router" or any(arg.startswith("--device=") for arg in container["args"])


def test_an_image_is_named_by_digest_before_tag() -> None:
    digest = "sha256:" + "0" * 64
    objects = template("--set=image.registry=registry.example.com/team", f"--set=router.image.digest={digest}")
    images = {d["metadata"]["name"]: pod_spec(d)["containers"][0]["image"] for d in of_kind(objects, "Deployment")}
    assert images["demo-hma-serve-router"] == f"registry.example.com/team/hma-serve/router@{digest}"
    assert images["demo-hma-serve-decode-cpu"] == "registry.example.com/team/hma-serve/decode:0.1.0"


def test_the_schema_knows_every_value() -> None:
    """Defaults and schema name the same values, so a default cannot be forgotten in either."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def known(part: dict[str, Any]) -> dict[str, Any]:
        return known(schema["$defs"][part["$ref"].rpartition("/")[2]]) if "$ref" in part else part

    def compare(values: dict[str, Any], part: dict[str, Any], path: str) -> None:
        properties = known(part).get("properties")
        if properties is None:
            return
        assert known(part)["additionalProperties"] is False, path
        assert set(values) == set(properties) - {"global"}, path
        for name, value in values.items():
            if isinstance(value, dict):
                compare(value, properties[name], f"{path}.{name}")

    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "values")
