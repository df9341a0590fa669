"""The router's settings, parsed once at the edge."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hma_serve.checkpoint import add_model_arguments
from hma_serve.core.errors import InvalidArgument
from hma_serve.core.request import Slo
from hma_serve.rpc import TlsConfig
from hma_serve.worker import DefaultsHelpFormatter, add_etcd_tls_argument, add_tls_argument

_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How one router runs.

    Attributes:
        model: `demo`, a checkpoint directory or a Hub id; configuration and tokenizer are read from it.
        registry: Where workers register: etcd URLs, or `file:PATH` for a static list.
        http_listen: host:port of the OpenAI API, `/live`, `/ready` and `/metrics`.
        grpc_listen: host:port of the `Inference` service.
        advertise: host or host:port by which clients find this router, for its record in the registry; None: as bound,
            and no record where every interface is.
        registry_ttl: Seconds after which a silent router vanishes from the registry.
        max_waiting: Completions that may wait for a pair of workers.
        max_wait: Seconds that one may wait.
        request_timeout: Seconds that any request may take.
        max_attempts: Pairs that may fail one request before the client is told.
        max_body_bytes: Largest HTTP body.
        max_connections: HTTP connections at the same time.
        local_prefill: Let decode compute long prompts while there is no prefill worker.
        local_prefill_tokens: Longest prompt that decode computes itself while there are prefill workers, where the
            measured costs say that this gives the first token sooner; 0: none.
        slo_ttft_ms: Milliseconds to the first token that requests without an objective are placed for; 0: none.
        slo_tpot_ms: Milliseconds between two tokens, likewise.
        tenant_header: Header or metadata key in which a gateway that is trusted names the tenant; empty: everyone is
            one tenant.
        max_channels: Connections to workers that are kept open.
        tls_dir: Certificates for mutual TLS on gRPC and to etcd; None: no encryption.
        etcd_tls_dir: Certificates for an etcd of another authority; None: `tls_dir`.
        drain_grace: Seconds that running requests get after SIGTERM.
        log_format: `human` or `json`.
    """

    model: str = "demo"
    registry: str = ""
    http_listen: str = "0.0.0.0:8000"
    grpc_listen: str = "0.0.0.0:50051"
    advertise: str | None = None
    registry_ttl: float = 10.0
    max_waiting: int = 1024
    max_wait: float = 60.0
    request_timeout: float = 600.0
    max_attempts: int = 3
    max_body_bytes: int = 4 << 20
    max_connections: int = 4096
    local_prefill: bool = True
    local_prefill_tokens: int = 256
    slo_ttft_ms: float = 2000.0
    slo_tpot_ms: float = 100.0
    tenant_header: str = ""
    max_channels: int = 1024
    tls_dir: Path | None = None
    etcd_tls_dir: Path | None = None
    drain_grace: float = 30.0
    log_format: str = "human"

    def tls(self) -> TlsConfig | None:
        """The certificates, checked; None without TLS.

        Raises:
            InvalidArgument: They cannot be read.
        """
        return None if self.tls_dir is None else TlsConfig.in_directory(self.tls_dir)

    @property
    def static_registry(self) -> bool:
        """Whether the fleet is a file, in which nobody can register."""
        return self.registry.startswith("file:")

    def __post_init__(self) -> None:
        if not self.registry:
            raise InvalidArgument(
                "there is no registry to find workers in: give --etcd http://HOST:2379 or --etcd file:PATH, or set "
                "ETCD_ENDPOINTS",
                field="--etcd",
            )
        for flag, value in (
            ("--max-waiting", self.max_waiting),
            ("--max-wait", self.max_wait),
            ("--request-timeout", self.request_timeout),
            ("--max-attempts", self.max_attempts),
            ("--max-body-bytes", self.max_body_bytes),
            ("--max-connections", self.max_connections),
            ("--registry-ttl", self.registry_ttl),
        ):
            if not 0 < value < math.inf:
                raise InvalidArgument(f"{flag} must be a positive number, not {value:g}", field=flag)
        for flag, value in (
            ("--drain-grace", self.drain_grace),
            ("--local-prefill-tokens", self.local_prefill_tokens),
            ("--slo-ttft-ms", self.slo_ttft_ms),
            ("--slo-tpot-ms", self.slo_tpot_ms),
        ):
            if not 0 <= value < math.inf:
                raise InvalidArgument(f"{flag} must be 0 or more, not {value:g}", field=flag)

    @property
    def slo(self) -> Slo:
        """Objectives of requests that bring none."""
        return Slo(self.slo_ttft_ms / 1000 or None, self.slo_tpot_ms / 1000 or None)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="hma-serve router",
        description="Serves the OpenAI API and gRPC, and places each request on a prefill and a decode worker.",
        epilog="Try it: curl http://localhost:8000/v1/models",
        formatter_class=DefaultsHelpFormatter,
    )
    defaults = RouterConfig(registry="-")
    model = parser.add_argument_group("model")
    add_model_arguments(model, about="the checkpoint; weights are not needed here", default=defaults.model)
    place = parser.add_argument_group("place")
    place.add_argument(
        "--etcd",
        default=os.environ.get("ETCD_ENDPOINTS", ""),
        metavar="URL[,URL]",
        help="registry of the workers; file:PATH names a static list (environment: ETCD_ENDPOINTS)",
    )
    place.add_argument(
        "--http-listen", default=defaults.http_listen, metavar="HOST:PORT", help="OpenAI API, /ready and /metrics"
    )
    place.add_argument("--grpc-listen", default=defaults.grpc_listen, metavar="HOST:PORT", help="gRPC Inference")
    place.add_argument(
        "--advertise",
        metavar="HOST[:PORT]",
        help="where clients find this router; default: as bound, if to one host",
    )
    place.add_argument(
        "--registry-ttl", type=float, default=defaults.registry_ttl, metavar="SECONDS", help="lease in the registry"
    )
    add_tls_argument(place)
    add_etcd_tls_argument(place)
    queue = parser.add_argument_group("queue")
    queue.add_argument(
        "--max-waiting", type=int, default=defaults.max_waiting, metavar="N", help="requests that may wait for workers"
    )
    queue.add_argument(
        "--max-wait", type=float, default=defaults.max_wait, metavar="SECONDS", help="that one may wait for workers"
    )
    queue.add_argument(
        "--local-prefill",
        action=argparse.BooleanOptionalAction,
        default=defaults.local_prefill,
        help="let decode compute long prompts while there is no prefill worker",
    )
    queue.add_argument(
        "--local-prefill-tokens",
        type=int,
        default=defaults.local_prefill_tokens,
        metavar="N",
        help="let decode compute prompts of up to N tokens where that is faster by the measured costs; 0: never",
    )
    queue.add_argument(
        "--slo-ttft-ms",
        type=float,
        default=defaults.slo_ttft_ms,
        metavar="MS",
        help="to the first token, for requests that name no objective; 0: none",
    )
    queue.add_argument(
        "--slo-tpot-ms",
        type=float,
        default=defaults.slo_tpot_ms,
        metavar="MS",
        help="between two tokens, for requests that name no objective; 0: none",
    )
    queue.add_argument(
        "--tenant-header",
        default=defaults.tenant_header,
        metavar="NAME",
        help="header in which a trusted gateway names the tenant, for a fair queue; empty: everyone is one tenant",
    )
    requests = parser.add_argument_group("requests")
    requests.add_argument(
        "--request-timeout", type=float, default=defaults.request_timeout, metavar="SECONDS", help="for any request"
    )
    requests.add_argument(
        "--max-attempts",
        type=int,
        default=defaults.max_attempts,
        metavar="N",
        help="pairs of workers that may fail a request",
    )
    requests.add_argument(
        "--max-body-bytes", type=int, default=defaults.max_body_bytes, metavar="BYTES", help="largest HTTP body"
    )
    requests.add_argument(
        "--max-connections", type=int, default=defaults.max_connections, metavar="N", help="HTTP clients at once"
    )
    process = parser.add_argument_group("process")
    process.add_argument(
        "--drain-grace",
        type=float,
        default=defaults.drain_grace,
        metavar="SECONDS",
        help="for running requests after SIGTERM",
    )
    process.add_argument(
        "--log-format", choices=("human", "json"), default=defaults.log_format, help="json: one object a line"
    )
    return parser


def parse_config(argv: Sequence[str] | None) -> RouterConfig:
    """Parses and checks the command line; raises InvalidArgument."""
    args = vars(build_parser().parse_args(argv))
    for flag in ("http_listen", "grpc_listen"):
        args[flag] = _address(f"--{flag.replace('_', '-')}", args[flag])
    return RouterConfig(registry=args.pop("etcd"), **args)


def _address(flag: str, listen: str) -> str:
    """`host:port`; without a host, every interface."""
    host, colon, port = listen.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and int(port) <= _MAX_PORT):
        raise InvalidArgument(f"{flag} must be HOST:PORT, or :PORT for every interface, not {listen!r}", field=flag)
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise InvalidArgument(f"{flag} wants an IPv6 address in brackets, as in [::1]:{port}", field=flag)
    return f"{host or '0.0.0.0'}:{port}"
