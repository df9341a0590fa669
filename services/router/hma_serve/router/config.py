"""The router's settings, parsed once at the edge."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from hma_serve.core.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How one router runs.

    Attributes:
        model: `demo`, a checkpoint directory or a Hub id; configuration and tokenizer are read from it.
        registry: Where workers register: etcd URLs, or `file:PATH` for a static list.
        http_listen: host:port of the OpenAI API, `/live`, `/ready` and `/metrics`.
        grpc_listen: host:port of the `Inference` service.
        max_waiting: Completions that may wait for a pair of workers.
        max_wait: Seconds that one may wait.
        request_timeout: Seconds that any request may take.
        max_attempts: Pairs that may fail one request before the client is told.
        max_body_bytes: Largest HTTP body.
        local_prefill: Let decode compute long prompts while there is no prefill worker.
        max_channels: Connections to workers that are kept open.
        drain: Seconds that running requests get after SIGTERM.
        log_format: `human` or `json`.
    """

    model: str = "demo"
    registry: str = ""
    http_listen: str = "0.0.0.0:8000"
    grpc_listen: str = "0.0.0.0:50051"
    max_waiting: int = 1024
    max_wait: float = 60.0
    request_timeout: float = 600.0
    max_attempts: int = 3
    max_body_bytes: int = 4 << 20
    local_prefill: bool = True
    max_channels: int = 1024
    drain: float = 30.0
    log_format: str = "human"

    def __post_init__(self) -> None:
        if not self.registry:
            raise InvalidArgument("give the registry with --etcd or ETCD_ENDPOINTS", field="--etcd")
        for flag, value in (
            ("--max-waiting", self.max_waiting),
            ("--max-wait", self.max_wait),
            ("--request-timeout", self.request_timeout),
            ("--max-attempts", self.max_attempts),
            ("--max-body-bytes", self.max_body_bytes),
        ):
            if value <= 0:
                raise InvalidArgument(f"{flag} must be positive, not {value}", field=flag)
        for flag, listen in (("--http-listen", self.http_listen), ("--grpc-listen", self.grpc_listen)):
            host, colon, port = listen.rpartition(":")
            if not (host and colon and port.isascii() and port.isdigit() and int(port) <= 65535):
                raise InvalidArgument(f"{flag} must be host:port, not {listen!r}", field=flag)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="hma-serve router",
        description="Serve the OpenAI API and gRPC, and place requests on prefill and decode workers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = RouterConfig(registry="-")
    parser.add_argument("--model", default=defaults.model, help="demo, a checkpoint directory or a Hub id")
    parser.add_argument(
        "--etcd",
        default=os.environ.get("ETCD_ENDPOINTS", ""),
        metavar="URL[,URL]",
        help="registry of the workers; file:PATH names a static list (environment: ETCD_ENDPOINTS)",
    )
    parser.add_argument("--http-listen", default=defaults.http_listen, metavar="HOST:PORT", help="OpenAI API")
    parser.add_argument("--grpc-listen", default=defaults.grpc_listen, metavar="HOST:PORT", help="gRPC Inference")
    parser.add_argument("--max-waiting", type=int, default=defaults.max_waiting, help="requests that may queue")
    parser.add_argument("--max-wait", type=float, default=defaults.max_wait, help="seconds that one may queue")
    parser.add_argument(
        "--request-timeout", type=float, default=defaults.request_timeout, help="seconds that any request may take"
    )
    parser.add_argument(
        "--max-attempts", type=int, default=defaults.max_attempts, help="pairs that may fail one request"
    )
    parser.add_argument("--max-body-bytes", type=int, default=defaults.max_body_bytes, help="largest HTTP body")
    parser.add_argument(
        "--local-prefill",
        action=argparse.BooleanOptionalAction,
        default=defaults.local_prefill,
        help="let decode compute long prompts while there is no prefill worker",
    )
    parser.add_argument("--drain", type=float, default=defaults.drain, help="seconds for running requests on SIGTERM")
    parser.add_argument("--log-format", choices=("human", "json"), default=defaults.log_format, help="of the log")
    return parser


def parse_config(argv: Sequence[str] | None) -> RouterConfig:
    """Parses and checks the command line; raises InvalidArgument."""
    args = vars(build_parser().parse_args(argv))
    return RouterConfig(registry=args.pop("etcd"), **args)
