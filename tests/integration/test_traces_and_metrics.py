"""One request is one trace across all processes, as a real OTLP receiver gets it; and every service's metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from hma_serve.client import Client
from hma_serve.telemetry import spans
from support.cluster import Cluster, running_cluster
from support.otlp_collector import Collector, Told

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROMPT = "The sea was calm and the captain slept. " * 30

# Span -> (service, the span that it hangs below).
EXPECTED = {
    spans.REQUEST: ("hma-serve-router", None),
    spans.TOKENIZE: ("hma-serve-router", spans.REQUEST),
    spans.ADMISSION: ("hma-serve-router", spans.REQUEST),
    spans.PLACEMENT: ("hma-serve-router", spans.ADMISSION),
    spans.ATTEMPT: ("hma-serve-router", spans.REQUEST),
    spans.PREFILL: ("hma-serve-prefill", spans.ATTEMPT),
    spans.PREFILL_QUEUE: ("hma-serve-prefill", spans.PREFILL),
    spans.PREFILL_COMPUTE: ("hma-serve-prefill", spans.PREFILL),
    spans.KV_SEND: ("hma-serve-prefill", spans.PREFILL),
    spans.KV_RECEIVE: ("hma-serve-decode", spans.PREFILL),
    spans.DECODE: ("hma-serve-decode", spans.ATTEMPT),
    spans.DECODE_WAIT: ("hma-serve-decode", spans.DECODE),
    spans.DECODE_FIRST_STEP: ("hma-serve-decode", spans.DECODE),
    spans.DECODE_STEPS: ("hma-serve-decode", spans.DECODE),
}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def cluster(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        # Spans are sent often, so that a test need not wait for them.
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
            yield running


def whole(told: list[Told], trace_id: str) -> list[Told]:
    return [span for span in told if span.trace_id == trace_id]


def test_a_request_is_one_trace_from_the_edge_to_the_last_token(cluster: Cluster, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "mine"}
    body = {"prompt": PROMPT, "max_tokens": 5}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=30)
    assert answer.status_code == 200
    told = collector.wait_for(lambda seen: {s.name for s in whole(seen, TRACE_ID)} == set(EXPECTED))
    ours = whole(told, TRACE_ID)
    by_id = {span.span_id: span for span in ours}
    for span in ours:
        service, parent = EXPECTED[span.name]
        assert span.service == service, span
        assert not span.failed
        if parent is None:
            assert span.parent_id == PARENT_ID
        else:
            assert by_id[span.parent_id].name == parent, span

    one = {span.name: span for span in ours}
    request = one[spans.REQUEST]
    usage = answer.json()["usage"]
    assert request.attributes["hma.client_request_id"] == "mine"
    assert request.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert one[spans.DECODE_STEPS].attributes["hma.tokens"] == 5

    # Order: what is computed leaves, what has left is committed, and only then a token is sampled.
    assert request.start_ns <= one[spans.ADMISSION].start_ns <= one[spans.ATTEMPT].start_ns
    computed = sorted((s for s in ours if s.name == spans.PREFILL_COMPUTE), key=lambda s: s.start_ns)
    sent = sorted((s for s in ours if s.name == spans.KV_SEND), key=lambda s: s.start_ns)
    assert len(computed) == len(sent) > 1
    assert [s.attributes["hma.layer_first"] for s in computed] == [s.attributes["hma.layer_first"] for s in sent]
    assert sum(s.attributes["hma.bytes"] for s in sent) == one[spans.KV_RECEIVE].attributes["hma.bytes"]
    assert sent[-1].end_ns <= one[spans.DECODE_FIRST_STEP].end_ns
    assert one[spans.DECODE_WAIT].end_ns <= one[spans.DECODE_FIRST_STEP].end_ns <= one[spans.DECODE_STEPS].end_ns


def test_a_request_over_grpc_begins_a_trace_of_its_own(cluster: Cluster, collector: Collector) -> None:
    with Client(cluster.grpc_address) as client:
        client.generate("Short.", max_tokens=2).result()

    def complete(told: list[Told]) -> bool:
        roots = [s for s in told if s.name == spans.REQUEST and "rpc.method" in s.attributes]
        return bool(roots) and spans.DECODE in {s.name for s in whole(told, roots[0].trace_id)}

    (root,) = [s for s in collector.wait_for(complete) if "rpc.method" in s.attributes]
    assert root.parent_id == ""
    assert root.attributes["rpc.method"] == "hma_serve.v1.Inference/Generate"


NAMED = re.compile(r"(?P<name>(?:hma_(?P<role>[a-z]+)_[a-z0-9_]+)|vllm:[a-z_]+)")


@pytest.mark.parametrize("role", ["router", "prefill", "decode"])
def test_metrics_are_named_by_role_and_unit(cluster: Cluster, role: str) -> None:
    text = httpx.get(cluster.metrics_url(role)).text
    types = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    helps = {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")}
    assert len(types) > 10
    assert set(types) == helps
    for name, kind in types.items():
        match = NAMED.fullmatch(name)
        assert match is not None, name
        assert match["role"] in (None, role)
        if kind == "counter":
            assert name.endswith("_total")
        if kind == "histogram":
            assert name.endswith(("_seconds", "_bytes", "_tokens", "_ratio")), name
        if kind == "gauge" and not name.startswith("vllm:") and not name.endswith("_created"):
            assert name.endswith(("_seconds", "_tokens", "_requests", "_workers", "_registered")), name


def test_the_names_that_other_tools_read_are_mirrored(cluster: Cluster) -> None:
    for role in ("router", "decode"):
        text = httpx.get(cluster.metrics_url(role)).text
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            assert f"\n{name} " in text, (role, name)
    assert "\nvllm:kv_cache_usage_perc " in httpx.get(cluster.metrics_url("decode")).text
