"""The configuration of a decode worker: parsed once, checked, then passed on as a frozen value."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from hma_serve.checkpoint import add_model_arguments
from hma_serve.core.errors import InvalidArgument
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.memory_plan import MemoryPlan, weight_bytes, workspace_bytes
from hma_serve.core.model_config import ModelConfig
from hma_serve.worker import (
    MOST_THREADS,
    DefaultsHelpFormatter,
    PlaceConfig,
    add_place_arguments,
    available_memory,
    default_threads,
    registry_of,
    require_at_least,
    require_at_most,
)

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}

_KV_SHARE_OF_MEMORY = 4
_KV_BYTES_CAP = 4 << 30

MOST_RECEIVERS = 16
"""As many ports after its own a decode worker may be reached at."""


@dataclass(frozen=True, slots=True)
class DecodeConfig(PlaceConfig):
    """Everything that the command line decides, the place of the worker included.

    Attributes:
        model: `demo`, a directory or a Hub id.
        device: `cpu` or `cuda`.
        dtype: Of weights and of KV that decode computes: `bfloat16` or `float32`.
        k_offsets: Table of what prefill subtracts from keys; None: nothing.
        codecs: Names of the KV codecs to read beside BF16; None: all.
        threads: Of the engine's arithmetic.
        max_model_len: Prompt plus completion, tokens; None: the model's window.
        kv_capacity_tokens: Unquantised tokens of KV that fit; None: from the free memory.
        kv_mode: `fused`: packed KV is read as it came; `materialise`: decoded when it arrives.
        share_prefixes: Requests of one tenant share the pages of a common prompt prefix.
        overcommit: Requests take memory for their output as it grows, and the youngest of the lowest
            priority begins again when none is left.
        max_running: Requests that hold pages at once, those that wait for their KV included.
        step_tokens: Tokens that one step computes at most: how long a prompt may hold up the others.
        kv_lease: Seconds that a request waits for its KV without a sign of life.
        stall_timeout: Seconds to wait for a KV stream's first frame, and for its producer to read responses.
        receivers: Processes that take KV in; 0: the one that answers requests does.
        arena_slots: Shared buffers of 2 MiB that blocks pass through, for each process that takes KV in.
    """

    model: str
    device: str
    dtype: str
    k_offsets: Path | None
    codecs: tuple[str, ...] | None
    threads: int
    max_model_len: int | None
    kv_capacity_tokens: int | None
    kv_mode: str
    share_prefixes: bool
    overcommit: bool
    max_running: int
    step_tokens: int
    kv_lease: float
    stall_timeout: float
    receivers: int
    arena_slots: int

    def __post_init__(self) -> None:
        least = {
            "--threads": (self.threads, 1),
            "--max-model-len": (self.max_model_len, 2),
            "--kv-capacity-tokens": (self.kv_capacity_tokens, GROUP_TOKENS),
            "--max-running": (self.max_running, 1),
            "--step-tokens": (self.step_tokens, GROUP_TOKENS),
            "--kv-lease": (self.kv_lease, 0.1),
            "--stall-timeout": (self.stall_timeout, 0.1),
            "--receivers": (self.receivers, 0),
            "--arena-slots": (self.arena_slots, 2),
        }
        require_at_least(least | self.least_of_place)
        require_at_most({"--threads": (self.threads, MOST_THREADS), "--receivers": (self.receivers, MOST_RECEIVERS)})
        self.require_ports_after("--receivers", self.receivers)
        if self.receivers and self.advertises_port:
            raise InvalidArgument(
                "receivers listen on ports of their own: --advertise must name a host without a port",
                field="--advertise",
            )

    def memory_plan(self, model: ModelConfig, kv_bytes: int) -> MemoryPlan:
        """What the model needs of this machine's memory beside so much KV."""
        itemsize = DTYPE_BYTES[self.dtype]
        return MemoryPlan(
            weights=weight_bytes(model, itemsize),
            kv=kv_bytes,
            workspace=workspace_bytes(model, itemsize, tokens=self.step_tokens, sampled=self.max_running),
            available=available_memory(),
            device="this machine",
        )

    def capacity_tokens(self, model: ModelConfig, max_model_len: int) -> int:
        """Unquantised tokens of KV to make room for.

        Raises:
            InvalidArgument: The longest request would not fit what was asked for.
            FailedPrecondition: The model does not fit the machine.
        """
        if self.kv_capacity_tokens is not None:
            tokens = self.kv_capacity_tokens
        else:
            per_token = model.kv_elements_per_token * DTYPE_BYTES[self.dtype]
            plan = self.memory_plan(model, max_model_len * per_token)
            plan.check("choose a smaller model or --max-model-len")
            share = (plan.available - plan.weights - plan.workspace) // _KV_SHARE_OF_MEMORY
            tokens = max(max_model_len, min(_KV_BYTES_CAP, share) // per_token)
            # More than every running request's whole window is of no use; packed ones may be wider than plain ones.
            tokens = min(tokens, 2 * self.max_running * max_model_len)
        if tokens < max_model_len:
            raise InvalidArgument(
                f"room for {tokens} tokens of KV is less than one request of {max_model_len}; "
                "lower --max-model-len or raise --kv-capacity-tokens",
                field="--kv-capacity-tokens",
            )
        return tokens


def build_parser() -> argparse.ArgumentParser:
    """The command line of `hma-serve decode`."""
    parser = argparse.ArgumentParser(
        prog="hma-serve decode",
        description="Holds prompts' KV as prefill packed it, computes and samples every token.",
        formatter_class=DefaultsHelpFormatter,
    )
    model = parser.add_argument_group("model")
    add_model_arguments(model)
    model.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="what computes")
    model.add_argument("--dtype", default="bfloat16", choices=list(DTYPE_BYTES), help="of weights and computed KV")
    model.add_argument(
        "--k-offsets", type=Path, metavar="FILE", help="what prefill subtracts from keys (`hma-serve kv calibrate`)"
    )
    model.add_argument(
        "--codecs",
        type=lambda names: tuple(names.split(",")),
        metavar="NAME,...",
        help="KV codecs to read beside bf16, to which other prefill workers then fall back; default: all",
    )
    model.add_argument("--threads", type=int, default=default_threads(), help="of the engine's arithmetic")
    model.add_argument(
        "--max-model-len", type=int, metavar="TOKENS", help="prompt plus completion; default: the model's window"
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--kv-capacity-tokens", type=int, metavar="TOKENS", help="unquantised KV that fits; default: by free memory"
    )
    work.add_argument(
        "--kv-mode",
        default="fused",
        choices=["fused", "materialise"],
        help="read packed KV as it came, or decode it when it arrives; a GPU decodes int4, f32 and KV "
        "whose keys are in interleaved RoPE channels in any case",
    )
    work.add_argument(
        "--share-prefixes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="requests of one tenant share the pages of a common prompt prefix",
    )
    work.add_argument(
        "--overcommit",
        action="store_true",
        help="take memory for output as it grows; the youngest request of the lowest priority computes again when "
        "none is left",
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
    work.add_argument(
        "--receivers",
        type=int,
        default=0,
        metavar="N",
        help="processes that take KV in, on the N ports after that of --listen; 0: the one that answers requests does",
    )
    work.add_argument(
        "--arena-slots", type=int, default=16, help="buffers of 2 MiB that KV passes through, for each receiver"
    )
    add_place_arguments(parser, listen="127.0.0.1:50071")
    return parser


def config_of(args: argparse.Namespace) -> DecodeConfig:
    """The configuration that parsed arguments describe.

    Raises:
        InvalidArgument: A value is out of range; names the flag.
    """
    values = vars(args) | {"etcd": registry_of(args.etcd)}
    return DecodeConfig(**values)
