"""Every metric of every service, in one file, so that names stay consistent and a dashboard's author reads one page.

Names are `hma_<role>_<name>_<unit>`; counters end in `_total`; times are seconds and sizes bytes. Each service is a
process of its own, so unused metrics of other roles are created only by the role's factory function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily

REGISTRY = CollectorRegistry(auto_describe=True)
"""The process's registry; prometheus_client's global one is left to the embedding program."""


class KeptCounter:
    """A counter whose value somebody else keeps, such as an engine that reports it.

    Args:
        name: Ends in `_total`.
        text: Its help.
        registry: Registers it.
    """

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._read: Callable[[], float] = float
        registry.register(self)

    def set_function(self, read: Callable[[], float]) -> None:
        """Takes the value from there from now on; it must never fall."""
        self._read = read

    def collect(self) -> Iterator[CounterMetricFamily]:
        """For the registry."""
        yield CounterMetricFamily(self._name, self._text, value=self._read())


# Router. --------------------------------------------------------------------------------------------------------------

_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 30, 60)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4, 10)
_TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """What a router counts. A *request* is what a client sent; a *completion* is one of its choices."""

    requests: Counter
    request_seconds: Histogram
    queue_seconds: Histogram
    time_to_first_token_seconds: Histogram
    time_per_output_token_seconds: Histogram
    prompt_tokens: Counter
    generated_tokens: Counter
    shed: Counter
    retries: Counter
    migrations: Counter
    local_prefills: Counter
    slo: Counter
    predicted_seconds: Histogram
    prediction_ratio: Histogram
    running: Gauge
    waiting: Gauge
    workers: Gauge
    vllm_running: Gauge
    vllm_waiting: Gauge


def router_metrics(registry: CollectorRegistry = REGISTRY) -> RouterMetrics:
    """Creates the router's metrics; once per registry."""

    def counter(name: str, text: str, *labels: str) -> Counter:
        return Counter(f"hma_router_{name}", text, labels, registry=registry)

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=registry)

    def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"hma_router_{name}", text, labels, registry=registry, buckets=buckets)

    return RouterMetrics(
        requests=counter("requests_total", "Requests ended, by outcome: ok, cancelled or the error's code.", "outcome"),
        request_seconds=histogram("request_seconds", "From arrival to the last token.", _REQUEST_BUCKETS),
        queue_seconds=histogram("queue_seconds", "From arrival until a pair of workers had room.", _TTFT_BUCKETS),
        time_to_first_token_seconds=histogram(
            "time_to_first_token_seconds", "From arrival to the completion's first token.", _TTFT_BUCKETS
        ),
        time_per_output_token_seconds=histogram(
            "time_per_output_token_seconds", "Mean over a completion's tokens after the first.", _TPOT_BUCKETS
        ),
        prompt_tokens=counter("prompt_tokens_total", "Prompt tokens of accepted requests."),
        generated_tokens=counter("generated_tokens_total", "Tokens relayed to clients."),
        shed=counter("shed_total", "Requests refused because of overload, by reason.", "reason"),
        retries=counter("retries_total", "Attempts repeated on another pair, by the leg that failed.", "leg"),
        migrations=counter(
            "migrations_total", "Completions that went on on another decode worker after their first token."
        ),
        local_prefills=counter(
            "local_prefills_total",
            "Prompts of more than one group of tokens that decode computed itself: shorter than the crossover, or for "
            "want of a prefill worker.",
        ),
        slo=counter(
            "slo_total",
            "Completions by objective (ttft, tpot; all: each one that was asked for) and outcome (attained, missed); "
            "one that failed or was shed, but not by the client's fault, missed all of them.",
            "objective",
            "outcome",
        ),
        predicted_seconds=histogram(
            "predicted_seconds", "What placement predicted, by objective (ttft, tpot).", _TTFT_BUCKETS, "objective"
        ),
        prediction_ratio=histogram(
            "prediction_ratio",
            "What it took over what placement predicted, by objective (ttft, tpot); 1 is exact.",
            _RATIO_BUCKETS,
            "objective",
        ),
        running=gauge("hma_router_running_requests", "Requests accepted and not ended, the waiting ones included."),
        waiting=gauge("hma_router_waiting_requests", "Completions that wait for a pair of workers."),
        workers=gauge("hma_router_workers", "Workers of the served model, by role and state.", "role", "state"),
        # The names that existing gateways and load tools read.
        vllm_running=gauge("vllm:num_requests_running", "As hma_router_running_requests."),
        vllm_waiting=gauge("vllm:num_requests_waiting", "As hma_router_waiting_requests."),
    )


# Prefill. -------------------------------------------------------------------------------------------------------------

_PHASE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass(frozen=True, slots=True)
class PrefillMetrics:
    """What a prefill worker counts."""

    requests: Counter
    tokens: Counter
    cached_tokens: Counter
    kv_sent_bytes: Counter
    queue_seconds: Histogram
    compute_seconds: Histogram
    exposed_transfer_seconds: Histogram
    discarded_layers: KeptCounter
    running: Gauge
    waiting: Gauge
    queued_tokens: Gauge
    registered: Gauge


def prefill_metrics(registry: CollectorRegistry = REGISTRY) -> PrefillMetrics:
    """Creates prefill's metrics; once per registry."""

    def counter(name: str, text: str, *labels: str) -> Counter:
        return Counter(f"hma_prefill_{name}", text, labels, registry=registry)

    def gauge(name: str, text: str) -> Gauge:
        return Gauge(f"hma_prefill_{name}", text, registry=registry)

    def histogram(name: str, text: str) -> Histogram:
        return Histogram(f"hma_prefill_{name}", text, registry=registry, buckets=_PHASE_BUCKETS)

    return PrefillMetrics(
        requests=counter("requests_total", "Requests ended, by outcome: ok, cancelled or the error's code.", "outcome"),
        tokens=counter("tokens_total", "Prompt tokens computed."),
        cached_tokens=counter("cached_tokens_total", "Prompt tokens found in the prefix cache."),
        kv_sent_bytes=counter("kv_sent_bytes_total", "Payload bytes of KV handed to the transport."),
        queue_seconds=histogram("queue_seconds", "From acceptance to the first layer."),
        compute_seconds=histogram("compute_seconds", "Computation of one request, all layers and chunks."),
        exposed_transfer_seconds=histogram(
            "exposed_transfer_seconds", "From the end of the computation until decode committed the KV."
        ),
        discarded_layers=KeptCounter(
            "hma_prefill_discarded_layers_total",
            "Layers that came after their request had ended: what cancellations cost.",
            registry,
        ),
        running=gauge("running_requests", "Requests being computed or sent."),
        waiting=gauge("waiting_requests", "Requests accepted and not started."),
        queued_tokens=gauge("queued_tokens", "Tokens waiting or being computed."),
        registered=gauge("registered", "1 while routers can find this worker, else 0."),
    )


# Decode. --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DecodeMetrics:
    """What a decode worker counts."""

    requests: Counter
    tokens: Counter
    wait_seconds: Histogram
    kv_received_bytes: Counter
    pushes_refused: Counter
    late_blocks: Counter
    expired_tickets: Counter
    running: Gauge
    waiting: Gauge
    kv_used_tokens: Gauge
    kv_capacity_tokens: Gauge
    step_seconds: Gauge
    steps: KeptCounter
    preemptions: KeptCounter
    registered: Gauge
    vllm_running: Gauge
    vllm_waiting: Gauge
    vllm_kv_usage: Gauge


def decode_metrics(registry: CollectorRegistry = REGISTRY) -> DecodeMetrics:
    """Creates decode's metrics; once per registry."""

    def counter(name: str, text: str, *labels: str) -> Counter:
        return Counter(f"hma_decode_{name}", text, labels, registry=registry)

    def gauge(name: str, text: str) -> Gauge:
        return Gauge(f"hma_decode_{name}", text, registry=registry)

    return DecodeMetrics(
        requests=counter("requests_total", "Streams ended, by outcome: ok, cancelled or the error's code.", "outcome"),
        tokens=counter("tokens_total", "Tokens sampled and handed to their streams."),
        wait_seconds=Histogram(
            "hma_decode_wait_seconds",
            "From the ticket until the prompt's KV was complete and a step had run.",
            registry=registry,
            buckets=_PHASE_BUCKETS,
        ),
        kv_received_bytes=counter("kv_received_bytes_total", "Payload bytes of KV that broke no rule."),
        pushes_refused=counter(
            "pushes_refused_total", "KV streams refused, by the broken rule or the error's code.", "rule"
        ),
        late_blocks=counter("late_blocks_total", "KV blocks dropped because their ticket was gone when they came."),
        expired_tickets=counter("expired_tickets_total", "Reservations swept because nobody renewed them."),
        running=gauge("running_requests", "Requests in the batch."),
        waiting=gauge("waiting_requests", "Requests that hold pages and wait for their KV."),
        kv_used_tokens=gauge("kv_used_tokens", "Held KV memory, in unquantised tokens."),
        kv_capacity_tokens=gauge("kv_capacity_tokens", "KV memory, in unquantised tokens."),
        step_seconds=gauge("step_seconds", "Running mean of a step's duration."),
        steps=KeptCounter("hma_decode_steps_total", "Steps.", registry),
        preemptions=KeptCounter(
            "hma_decode_preemptions_total", "Requests that lost computed KV for want of memory.", registry
        ),
        registered=gauge("registered", "1 while routers can find this worker, else 0."),
        # The names that existing gateways and load tools read.
        vllm_running=Gauge("vllm:num_requests_running", "As hma_decode_running_requests.", registry=registry),
        vllm_waiting=Gauge("vllm:num_requests_waiting", "As hma_decode_waiting_requests.", registry=registry),
        vllm_kv_usage=Gauge("vllm:kv_cache_usage_perc", "Held KV memory over all of it, 0 to 1.", registry=registry),
    )
