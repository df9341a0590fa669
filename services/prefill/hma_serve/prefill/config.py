"""The configuration of a prefill worker: parsed once, checked, then passed on as a frozen value."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.prefill.profiles import PROFILES

_ANY_ADDRESS = ("0.0.0.0", "[::]", "")


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Everything that the command line decides.

    Attributes:
        model: `demo`, a directory or a Hub id.
        profile: What to compute in and how to pack.
        device: Kind of accelerator.
        chunk_tokens: Tokens computed together; a multiple of 32.
        layers_ahead: Layers of a request that may be computed before the oldest of them has left.
        max_model_len: Longest prompt part taken, tokens; None: the model's window.
        max_running: Requests whose KV may be held at once.
        max_waiting: Requests that may wait before new ones are refused.
        kv_capacity_tokens: Tokens whose KV may be held at once; None: the longest prompt times `max_running`.
        threads: Of the engine's arithmetic.
        stall_timeout: Seconds that decode may let one transfer wait for one thing.
        etcd: Registry; None: unregistered.
        registry_ttl: Seconds after which a silent worker vanishes from the registry.
        listen: host:port of gRPC; port 0 takes a free one.
        advertise: host or host:port that others use; None: the bound address.
        http_listen: host:port of /live, /ready and /metrics.
        price_per_hour: US dollars for the whole instance; 0: not stated.
        drain_grace: Seconds that running requests get after SIGTERM.
        events: File for the record of the pipeline's order; None: off.
        log_format: `human` or `json`.
    """

    model: str
    profile: str
    device: str
    chunk_tokens: int
    layers_ahead: int
    max_model_len: int | None
    max_running: int
    max_waiting: int
    kv_capacity_tokens: int | None
    threads: int
    stall_timeout: float
    etcd: str | None
    registry_ttl: float
    listen: str
    advertise: str | None
    http_listen: str
    price_per_hour: float
    drain_grace: float
    events: Path | None
    log_format: str

    def __post_init__(self) -> None:
        if self.chunk_tokens < GROUP_TOKENS or self.chunk_tokens % GROUP_TOKENS:
            raise InvalidArgument(
                f"--chunk-tokens must be a positive multiple of {GROUP_TOKENS}, not {self.chunk_tokens}",
                field="--chunk-tokens",
            )
        least = {
            "--layers-ahead": (self.layers_ahead, 1),
            "--max-model-len": (self.max_model_len, GROUP_TOKENS),
            "--max-running": (self.max_running, 1),
            "--max-waiting": (self.max_waiting, 0),
            "--kv-capacity-tokens": (self.kv_capacity_tokens, GROUP_TOKENS),
            "--threads": (self.threads, 1),
            "--stall-timeout": (self.stall_timeout, 0.1),
            "--registry-ttl": (self.registry_ttl, 2),
            "--price-per-hour": (self.price_per_hour, 0),
            "--drain-grace": (self.drain_grace, 0),
        }
        for flag, (value, minimum) in least.items():
            if value is not None and not value >= minimum:
                raise InvalidArgument(f"{flag} must be at least {minimum}, not {value}", field=flag)

    def advertised(self, bound: str) -> str:
        """The address that others use, given the bound one.

        Raises:
            InvalidArgument: Every interface is bound and `--advertise` does not say which one to name.
        """
        host, _, port = bound.rpartition(":")
        if self.advertise is None:
            if host in _ANY_ADDRESS and self.etcd is not None:
                raise InvalidArgument(
                    f"nobody can connect to {bound}: say with --advertise under which host name this worker is found",
                    field="--advertise",
                )
            return bound
        named = self.advertise
        has_port = named.rpartition(":")[2].isdigit() and not named.endswith("]") and (":" in named)
        return named if has_port else f"{named}:{port}"


def build_parser() -> argparse.ArgumentParser:
    """The command line of `hma-serve prefill`."""
    parser = argparse.ArgumentParser(
        prog="hma-serve prefill",
        description="Computes prompts' KV in low precision and pushes it to decode workers, layer by layer.",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default="demo", metavar="demo|DIR|HUB_ID", help="the checkpoint (default: %(default)s)"
    )
    model.add_argument(
        "--profile", default="tt_bfp8", choices=list(PROFILES), help="arithmetic and KV codec (default: %(default)s)"
    )
    model.add_argument(
        "--device", default="cpu", help="kind of accelerator; packages can add more (default: %(default)s)"
    )
    model.add_argument(
        "--threads", type=int, default=default_threads(), help="of the engine's arithmetic (default: %(default)s)"
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--chunk-tokens",
        type=int,
        default=512,
        help="tokens computed together, a multiple of 32 (default: %(default)s)",
    )
    work.add_argument(
        "--layers-ahead",
        type=int,
        default=2,
        help="layers computed before the oldest of them must have left (default: %(default)s)",
    )
    work.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest prompt; default: the model's window")
    work.add_argument(
        "--max-running", type=int, default=8, help="requests whose KV may be held at once (default: %(default)s)"
    )
    work.add_argument(
        "--max-waiting",
        type=int,
        default=64,
        help="requests that may wait before more are refused (default: %(default)s)",
    )
    work.add_argument(
        "--kv-capacity-tokens", type=int, metavar="TOKENS", help="KV held at once; default: max-running longest prompts"
    )
    work.add_argument(
        "--stall-timeout",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="how long decode may let a transfer wait (default: %(default)s)",
    )
    work.add_argument("--events", type=Path, metavar="FILE", help="record when each layer was computed and left")
    place = parser.add_argument_group("place")
    place.add_argument(
        "--etcd",
        default=os.environ.get("ETCD_ENDPOINTS", "none"),
        metavar="URL[,URL]|none",
        help="the registry; none: do not register (environment: ETCD_ENDPOINTS)",
    )
    place.add_argument(
        "--registry-ttl",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="lease in the registry (default: %(default)s)",
    )
    place.add_argument(
        "--listen",
        default="127.0.0.1:50061",
        metavar="HOST:PORT",
        help="gRPC; port 0: a free one (default: %(default)s)",
    )
    place.add_argument("--advertise", metavar="HOST[:PORT]", help="where others find this worker; default: as bound")
    place.add_argument(
        "--http-listen",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="/live, /ready and /metrics; port 0: a free one (default: %(default)s)",
    )
    place.add_argument(
        "--price-per-hour",
        type=float,
        default=0.0,
        metavar="USD",
        help="of this worker; 0: not stated (default: %(default)s)",
    )
    place.add_argument(
        "--drain-grace",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for running requests after SIGTERM (default: %(default)s)",
    )
    place.add_argument(
        "--log-format", default="human", choices=["human", "json"], help="of the log on stderr (default: %(default)s)"
    )
    return parser


def config_of(args: argparse.Namespace) -> PrefillConfig:
    """The configuration that parsed arguments describe.

    Raises:
        InvalidArgument: A value is out of range; names the flag.
    """
    values = vars(args) | {"etcd": None if args.etcd in ("", "none") else args.etcd}
    return PrefillConfig(**values)


def default_threads() -> int:
    """Half of the cores that this process may use, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // 2)
