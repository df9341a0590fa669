"""The configuration of a decode worker: parsed once, checked, then passed on as a frozen value."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.model_config import ModelConfig

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}

_ANY_ADDRESS = ("0.0.0.0", "[::]", "")
_KV_SHARE_OF_MEMORY = 4
_KV_BYTES_CAP = 4 << 30


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Everything that the command line decides.

    Attributes:
        model: `demo`, a directory or a Hub id.
        dtype: Of weights and of KV that decode computes: `bfloat16` or `float32`.
        threads: Of the engine's arithmetic.
        max_model_len: Prompt plus completion, tokens; None: the model's window.
        kv_capacity_tokens: Unquantised tokens of KV that fit; None: from the free memory.
        max_running: Requests that hold pages at once, those that wait for their KV included.
        step_tokens: Tokens that one step computes at most: how long a prompt may hold up the others.
        kv_lease: Seconds that a request waits for its KV without a sign of life.
        stall_timeout: Seconds to wait for a KV stream's first frame, and for its producer to read responses.
        arena_slots: Shared buffers of 2 MiB that blocks pass through.
        etcd: Registry; None: unregistered.
        registry_ttl: Seconds after which a silent worker vanishes from the registry.
        listen: host:port of gRPC; port 0 takes a free one.
        advertise: host or host:port that others use; None: the bound address.
        http_listen: host:port of /live, /ready and /metrics.
        price_per_hour: US dollars for the whole instance; 0: not stated.
        drain_grace: Seconds that running requests get after SIGTERM.
        log_format: `human` or `json`.
    """

    model: str
    dtype: str
    threads: int
    max_model_len: int | None
    kv_capacity_tokens: int | None
    max_running: int
    step_tokens: int
    kv_lease: float
    stall_timeout: float
    arena_slots: int
    etcd: str | None
    registry_ttl: float
    listen: str
    advertise: str | None
    http_listen: str
    price_per_hour: float
    drain_grace: float
    log_format: str

    def __post_init__(self) -> None:
        least = {
            "--threads": (self.threads, 1),
            "--max-model-len": (self.max_model_len, 2),
            "--kv-capacity-tokens": (self.kv_capacity_tokens, GROUP_TOKENS),
            "--max-running": (self.max_running, 1),
            "--step-tokens": (self.step_tokens, GROUP_TOKENS),
            "--kv-lease": (self.kv_lease, 0.1),
            "--stall-timeout": (self.stall_timeout, 0.1),
            "--arena-slots": (self.arena_slots, 2),
            "--registry-ttl": (self.registry_ttl, 2),
            "--price-per-hour": (self.price_per_hour, 0),
            "--drain-grace": (self.drain_grace, 0),
        }
        for flag, (value, minimum) in least.items():
            if value is not None and not value >= minimum:
                raise InvalidArgument(f"{flag} must be at least {minimum}, not {value}", field=flag)

    def capacity_tokens(self, model: ModelConfig, max_model_len: int) -> int:
        """Unquantised tokens of KV to make room for.

        Raises:
            InvalidArgument: The longest request would not fit.
        """
        if self.kv_capacity_tokens is not None:
            tokens = self.kv_capacity_tokens
        else:
            budget = min(_KV_BYTES_CAP, available_memory() // _KV_SHARE_OF_MEMORY)
            tokens = budget // (model.kv_elements_per_token * DTYPE_BYTES[self.dtype])
            # More than every running request's whole window is of no use; packed ones may be wider than plain ones.
            tokens = min(tokens, 2 * self.max_running * max_model_len)
        if tokens < max_model_len:
            raise InvalidArgument(
                f"room for {tokens} tokens of KV is less than one request of {max_model_len}; "
                "lower --max-model-len or raise --kv-capacity-tokens",
                field="--kv-capacity-tokens",
            )
        return tokens

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
    """The command line of `hma-serve decode`."""
    parser = argparse.ArgumentParser(
        prog="hma-serve decode",
        description="Holds prompts' KV as prefill packed it, computes and samples every token.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="demo", metavar="demo|DIR|HUB_ID", help="the checkpoint")
    model.add_argument("--dtype", default="bfloat16", choices=list(DTYPE_BYTES), help="of weights and computed KV")
    model.add_argument("--threads", type=int, default=default_threads(), help="of the engine's arithmetic")
    model.add_argument(
        "--max-model-len", type=int, metavar="TOKENS", help="prompt plus completion; default: the model's window"
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--kv-capacity-tokens", type=int, metavar="TOKENS", help="unquantised KV that fits; default: by free memory"
    )
    work.add_argument("--max-running", type=int, default=64, help="requests that hold pages at once")
    work.add_argument(
        "--step-tokens", type=int, default=256, help="tokens of one step: how long a prompt may hold up the others"
    )
    work.add_argument(
        "--kv-lease", type=float, default=30.0, metavar="SECONDS", help="how long a request waits for its KV"
    )
    work.add_argument(
        "--stall-timeout", type=float, default=30.0, metavar="SECONDS", help="for a KV stream's first frame and reads"
    )
    work.add_argument("--arena-slots", type=int, default=16, help="buffers of 2 MiB that KV passes through")
    place = parser.add_argument_group("place")
    place.add_argument(
        "--etcd",
        default=os.environ.get("ETCD_ENDPOINTS", "none"),
        metavar="URL[,URL]|none",
        help="the registry; none: do not register (environment: ETCD_ENDPOINTS)",
    )
    place.add_argument("--registry-ttl", type=float, default=10.0, metavar="SECONDS", help="lease in the registry")
    place.add_argument("--listen", default="127.0.0.1:50071", metavar="HOST:PORT", help="gRPC; port 0: a free one")
    place.add_argument("--advertise", metavar="HOST[:PORT]", help="where others find this worker; default: as bound")
    place.add_argument(
        "--http-listen",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="/live, /ready, /metrics; port 0: a free one",
    )
    place.add_argument("--price-per-hour", type=float, default=0.0, metavar="USD", help="of this worker; 0: not stated")
    place.add_argument(
        "--drain-grace", type=float, default=60.0, metavar="SECONDS", help="for running requests after SIGTERM"
    )
    place.add_argument("--log-format", default="human", choices=["human", "json"], help="of the log on stderr")
    return parser


def config_of(args: argparse.Namespace) -> DecodeConfig:
    """The configuration that parsed arguments describe.

    Raises:
        InvalidArgument: A value is out of range; names the flag.
    """
    values = vars(args) | {"etcd": None if args.etcd in ("", "none") else args.etcd}
    return DecodeConfig(**values)


def default_threads() -> int:
    """Half of the cores that this process may use, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def available_memory() -> int:
    """Bytes that can be taken without swapping, as the kernel estimates them."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
