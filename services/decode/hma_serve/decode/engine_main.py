"""The engine process: loads the model, says so, then turns the engine's loop until the link to its front closes.

Started by the front alone (`python -m hma_serve.decode.engine_main`).
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hma_serve.checkpoint import read_eos_token_ids, read_model_config
from hma_serve.checkpoint.k_offsets import read_k_offsets
from hma_serve.core.error_detail import error_detail
from hma_serve.core.errors import FailedPrecondition, HmaError, Internal
from hma_serve.core.model_config import ModelConfig
from hma_serve.decode.commitment import FullCommitment, OverCommitment
from hma_serve.decode.engine import Engine, EngineLimits
from hma_serve.decode.engine_links import EngineLinks
from hma_serve.decode.engine_parts import EngineParts, EngineSpec, open_cpu
from hma_serve.decode.grammar import GrammarCompiler, GrammarQueue
from hma_serve.decode.sampling_batch import SamplingBatches
from hma_serve.decode.scheduler import Scheduler
from hma_serve.decode.step_loop import StepLoop
from hma_serve.decode.tickets import TicketTable
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.ipc import Arena, LinkClosed, add_engine_arguments, attach_engine
from hma_serve.model import LoadLog
from hma_serve.telemetry.logs import setup_logging

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The engine's arguments; the front writes them, so none has a default but what may be absent."""
    parser = argparse.ArgumentParser(prog="hma-serve-decode-engine", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--dtype", choices=list(_DTYPES), required=True)
    parser.add_argument("--k-offsets", type=Path)
    parser.add_argument("--codecs", required=True)
    parser.add_argument("--kv-capacity-tokens", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--kv-mode", required=True)
    parser.add_argument("--overcommit", choices=["yes", "no"], required=True)
    parser.add_argument("--kv-lease", type=float, required=True)
    parser.add_argument("--max-running", type=int, required=True)
    parser.add_argument("--step-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--log-format", required=True)
    parser.add_argument("--receiver-fds", type=_sockets, default=(), help="sockets to the receivers, in their order")
    add_engine_arguments(parser)
    return parser


def _sockets(numbers: str) -> list[socket.socket]:
    return [socket.socket(fileno=int(number)) for number in numbers.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    endpoint = attach_engine(args, receives=pb.DecodeEngineCommand)
    links = EngineLinks(endpoint.link, args.receiver_fds)
    setup_logging("decode", args.log_format)
    torch.set_num_threads(args.threads)
    try:
        if endpoint.arena is None:
            raise Internal("the engine was started without an arena")
        _serve(_load(args, endpoint.arena, links), links)
    except LinkClosed:
        return 0
    except HmaError as exc:
        _log.error("%s", exc.message)
        links.send(pb.DecodeEngineEvent(died=pb.DecodeDied(error=error_detail(exc))))
        return 1
    return 0


def _load(args: argparse.Namespace, arena: Arena, links: EngineLinks) -> Engine:
    began = time.monotonic()
    config = read_model_config(args.checkpoint)
    parts = _parts(args, config, arena)
    eos = read_eos_token_ids(args.checkpoint)
    scheduler = Scheduler(max(args.step_tokens, args.max_running))
    batches = SamplingBatches(config.vocab_size, args.max_running, parts.sampling)
    steps = StepLoop(scheduler, parts.runner, batches, overlap=parts.overlap)
    engine = Engine(
        pool=parts.pool,
        intake=parts.intake,
        commitment=OverCommitment(parts.pool, scheduler, steps)
        if args.overcommit == "yes"
        else FullCommitment(parts.pool, scheduler),
        tickets=TicketTable(lease=args.kv_lease, clock=time.monotonic),
        scheduler=scheduler,
        steps=steps,
        grammars=GrammarQueue(GrammarCompiler(args.checkpoint, config.vocab_size, eos), args.max_running),
        limits=EngineLimits(args.max_running, frozenset(eos), config.vocab_size),
        arena=arena,
        arrival_share=parts.arrival_share,
        emit=links.send,
    )
    ready = pb.DecodeReady(
        device=parts.device,
        device_bytes=parts.device_bytes,
        load_seconds=time.monotonic() - began,
        kv_capacity_tokens=parts.pool.capacity_tokens,
        kv_bytes=parts.pool.memory_bytes,
    )
    links.send(pb.DecodeEngineEvent(ready=ready))
    return engine


def _parts(args: argparse.Namespace, config: ModelConfig, arena: Arena) -> EngineParts:
    spec = EngineSpec(
        checkpoint=args.checkpoint,
        config=config,
        dtype=_DTYPES[args.dtype],
        codecs=args.codecs.split(","),
        k_offsets=_k_offsets(args, config),
        kv_mode=args.kv_mode,
        kv_capacity_tokens=args.kv_capacity_tokens,
        max_model_len=args.max_model_len,
        max_running=args.max_running,
        step_tokens=max(args.step_tokens, args.max_running),
        progress=LoadLog(_log),
    )
    if args.device == "cpu":
        return open_cpu(spec)
    try:
        from hma_serve.decode.cuda import open_cuda
    except ImportError as exc:
        raise FailedPrecondition("--device cuda needs the package triton", field="--device") from exc
    return open_cuda(spec, arena.memory)


def _k_offsets(args: argparse.Namespace, config: ModelConfig) -> torch.Tensor | None:
    """float32 [layers, kv heads, head_dim]; None: packed keys are as they were."""
    table = read_k_offsets(args.k_offsets, config, model_fingerprint=None, profile=None)
    return torch.from_numpy(table.array(config.num_layers, config.num_kv_heads, config.head_dim)) if table else None


def _serve(engine: Engine, links: EngineLinks) -> None:
    patience: float | None = 0
    while True:
        patience = engine.turn(links.receive(patience))


if __name__ == "__main__":
    sys.exit(main())
