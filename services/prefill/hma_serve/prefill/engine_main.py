"""The engine process: loads the model, says so, then alternates between the front's commands and one layer of work.

Started by the front alone (`python -m hma_serve.prefill.engine_main`). It ends when the link does.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from hma_serve.core.error_detail import error_detail
from hma_serve.core.errors import FailedPrecondition, HmaError
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.prefix import prefix_root
from hma_serve.internal.v1 import prefill_engine_pb2 as pb
from hma_serve.ipc import Arena, EngineEndpoint, LinkClosed, add_engine_arguments, attach_engine
from hma_serve.prefill.accelerators import Accelerator, AcceleratorSpec, open_accelerator, rank_group
from hma_serve.prefill.accelerators.tensor_parallel import Ranks, TensorParallel
from hma_serve.prefill.engine import Engine, EngineOptions
from hma_serve.prefill.job import Job
from hma_serve.prefill.kv_layout import KvLayout
from hma_serve.prefill.load_arguments import add_load_arguments, load_arguments, spec_of
from hma_serve.prefill.prefix_cache import PrefixCache
from hma_serve.prefill.scheduler import Scheduler
from hma_serve.telemetry.logs import setup_logging

_log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The engine's arguments; the front writes them."""
    parser = argparse.ArgumentParser(prog="hma-serve-prefill-engine", description=__doc__)
    add_load_arguments(parser)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--chunk-tokens", type=int, required=True)
    parser.add_argument("--layers-ahead", type=int, required=True)
    parser.add_argument("--max-running", type=int, required=True)
    parser.add_argument("--max-waiting", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--kv-capacity-tokens", type=int, required=True)
    parser.add_argument("--overlap", choices=("on", "off"), required=True)
    parser.add_argument("--prefix-cache-bytes", type=int, required=True)
    parser.add_argument("--fingerprint", required=True)
    add_engine_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    endpoint = attach_engine(args, receives=pb.PrefillEngineCommand)
    setup_logging("prefill", args.log_format)
    torch.set_num_threads(args.threads)
    try:
        engine = _load(args, endpoint)
        _serve(engine, endpoint)
    except LinkClosed:
        return 0
    except HmaError as exc:
        return _report(exc, endpoint)
    return 0


def _load(args: argparse.Namespace, endpoint: EngineEndpoint[pb.PrefillEngineCommand]) -> Engine:
    started = time.monotonic()
    if endpoint.arena is None:
        raise SystemExit("the engine needs an arena")
    spec = spec_of(args)
    model, profile = spec.model, spec.profile
    accelerator = _open(args, spec, endpoint.arena)
    capacity = kv_capacity(args.kv_capacity_tokens, accelerator.kv_tokens, longest=args.max_tokens)
    scheduler: Scheduler[Job] = Scheduler(
        max_running=args.max_running, max_waiting=args.max_waiting, capacity_tokens=capacity
    )
    layout = KvLayout.of(model, profile)
    cache = PrefixCache(layout, args.prefix_cache_bytes)
    for memory in (endpoint.arena.memory, cache.memory):
        accelerator.pin(memory)
    # Whatever the bytes depend on, the tokens apart.
    settings = (args.fingerprint, profile.name, profile.k_codec, profile.v_codec)
    options = EngineOptions(
        chunk_tokens=args.chunk_tokens,
        layers_ahead=args.layers_ahead,
        overlap=args.overlap == "on",
        prefix_root=lambda tenant: prefix_root(*settings, tenant),
    )
    engine = Engine(
        accelerator=accelerator,
        layout=layout,
        arena=endpoint.arena,
        scheduler=scheduler,
        cache=cache,
        options=options,
        emit=endpoint.link.send,
    )
    ready = pb.PrefillReady(
        device=accelerator.device,
        load_seconds=time.monotonic() - started,
        prefix_cache_tokens=cache.capacity * GROUP_TOKENS,
    )
    endpoint.link.send(pb.PrefillEngineEvent(ready=ready))
    return engine


def kv_capacity(asked: int, room: int | None, *, longest: int) -> int:
    """Tokens of running prompts: what was asked for, as far as the device has room.

    Args:
        asked: Tokens.
        room: Of the device; None: it does not say.
        longest: Tokens of one prompt at most.

    Raises:
        FailedPrecondition: Not even one longest prompt fits.
    """
    capacity = asked if room is None else min(asked, room)
    if capacity < longest:
        raise FailedPrecondition(
            f"the device has room for the KV of {capacity} tokens beside the weights, and one prompt may have "
            f"{longest}; lower --max-model-len or share the model among more devices with --tp",
            field="--max-model-len",
        )
    return capacity


def _open(args: argparse.Namespace, spec: AcceleratorSpec, slots: Arena) -> Accelerator:
    """One device, or this rank's and the others."""
    if args.tp == 1:
        return open_accelerator(args.device, spec)
    ranks = Ranks(args.tp, load_arguments(args), slots)
    return TensorParallel(
        ranks, spec.model.num_kv_heads, lambda shard: open_accelerator(args.device, replace(spec, shard=shard))
    )


def _serve(engine: Engine, endpoint: EngineEndpoint[pb.PrefillEngineCommand]) -> None:
    """Until the link closes. Commands are read between any two layers, so a cancellation takes at most one."""
    more = False
    while True:
        engine.handle(endpoint.link.receive(0 if more else None))
        more = engine.step()


def _report(error: HmaError, endpoint: EngineEndpoint[pb.PrefillEngineCommand]) -> int:
    """Tells the front why the engine cannot go on; job 0 is none."""
    _log.error("%s", error.message)
    endpoint.link.send(pb.PrefillEngineEvent(failed=pb.PrefillFailed(job=0, error=error_detail(error))))
    return 1


if __name__ == "__main__":
    rank_group.run(main)
