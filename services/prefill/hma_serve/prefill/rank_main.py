"""A rank beside the first of a tensor-parallel engine: holds its share of the weights and of every request's KV.

Started by the leading rank alone (`python -m hma_serve.prefill.rank_main`), which tells it what to compute. Ends when
the link does, and when anything fails: the ranks cannot go on without one another.
"""

from __future__ import annotations

import argparse
import logging
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hma_serve.core.error_detail import error_detail
from hma_serve.core.errors import HmaError
from hma_serve.internal.v1 import prefill_ranks_pb2 as pb
from hma_serve.ipc import Arena, EngineEndpoint, LinkClosed, add_engine_arguments, attach_engine
from hma_serve.prefill.accelerators import Accelerator, Completion, KvStore, Segment, open_accelerator, rank_group
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.load_arguments import add_load_arguments, spec_of
from hma_serve.telemetry.logs import setup_logging

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.0005
"""Between looks at copies that are under way, when no command comes."""


def build_parser() -> argparse.ArgumentParser:
    """The rank's arguments; the leader writes them."""
    parser = argparse.ArgumentParser(prog="hma-serve-prefill-rank", description=__doc__)
    add_load_arguments(parser)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--meeting-fd", type=int, required=True)
    add_engine_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    endpoint = attach_engine(args, receives=pb.RankCommand)
    setup_logging(f"prefill rank {args.rank}", args.log_format)
    torch.set_num_threads(args.threads)
    try:
        rank = _load(args, endpoint)
        while True:
            rank.serve()
    except LinkClosed:
        return 0


def _load(args: argparse.Namespace, endpoint: EngineEndpoint[pb.RankCommand]) -> Rank:
    shard = rank_group.join(args.rank, args.ranks, args.meeting_fd)
    try:
        spec = spec_of(args, shard)
        accelerator = open_accelerator(args.device, spec)
    except HmaError as exc:
        endpoint.link.send(pb.RankReply(failed=pb.RankFailed(error=error_detail(exc))))
        while True:  # until the leader has read why, and leaves
            endpoint.link.receive(None)
    if endpoint.arena is None:
        raise SystemExit("a rank needs an arena")
    accelerator.pin(endpoint.arena.memory)
    endpoint.link.send(pb.RankReply(ready=pb.RankReady(device=accelerator.device)))
    return Rank(endpoint, accelerator, endpoint.arena, KvLayout.of(shard.local(spec.model), spec.profile))


class Rank:
    """Follows the leader's commands in their order.

    Args:
        endpoint: The leader.
        accelerator: This rank's share.
        arena: Memory shared with the front.
        layout: Of the rank's packed KV.
    """

    def __init__(
        self, endpoint: EngineEndpoint[pb.RankCommand], accelerator: Accelerator, arena: Arena, layout: KvLayout
    ) -> None:
        self._link = endpoint.link
        self._accelerator = accelerator
        self._memory = np.frombuffer(arena.memory, dtype=np.uint8)
        self._group_bytes: dict[int, int] = dict(zip(ROLES, layout.group_bytes, strict=True))
        self._stores: dict[int, KvStore] = {}
        self._residual: dict[int, torch.Tensor] = {}
        self._copies: deque[Completion | None] = deque()

    def serve(self) -> None:
        """Waits for commands, follows them, and reports the copies that are done."""
        for command in self._link.receive(_POLL_SECONDS if self._copies else None):
            self._follow(command)
            self._report_copies()
        self._report_copies()

    def _follow(self, command: pb.RankCommand) -> None:
        match command.WhichOneof("command"):
            case "new_store":
                self._stores[command.new_store.store] = self._accelerator.new_store(command.new_store.tokens)
            case "drop_store":
                del self._stores[command.drop_store.store]
                self._residual.pop(command.drop_store.store, None)
            case "run_layer":
                self._run_layer(command.run_layer)
            case "copy_out":
                self._copy_out(command.copy_out)
            case "copy_in":
                self._copy_in(command.copy_in)

    def _run_layer(self, command: pb.RankRunLayer) -> None:
        parts = command.segments
        if command.layer == 0:
            rows = self._accelerator.embed([0] * sum(part.tokens for part in parts))
            hidden = rank_group.broadcast(rows)
        else:
            kept = [self._residual[part.store] for part in parts]
            hidden = kept[0] if len(kept) == 1 else torch.cat(kept)
        segments = [Segment(part.start, part.tokens, self._stores[part.store]) for part in parts]
        hidden = self._accelerator.run_layer(command.layer, hidden, segments)
        for part, rows in zip(parts, torch.split(hidden, [part.tokens for part in parts]), strict=True):
            self._residual[part.store] = rows

    def _copy_out(self, what: pb.RankCopy) -> None:
        heads, groups = _rectangle(what)
        if not what.HasField("shared_offset"):
            out = np.empty(self._shape(what), np.uint8)
            copy = self._stores[what.store].copy_out(what.layer, what.role, heads, groups, out)
            if copy is not None:
                copy.wait()
            rank_group.send(out, 0)
            return
        out = self._shared(what)
        self._copies.append(self._stores[what.store].copy_out(what.layer, what.role, heads, groups, out))

    def _copy_in(self, what: pb.RankCopy) -> None:
        packed = np.empty(self._shape(what), np.uint8)
        rank_group.receive(packed, 0)
        self._stores[what.store].copy_in(what.layer, what.role, *_rectangle(what), packed)

    def _shape(self, what: pb.RankCopy) -> tuple[int, int, int]:
        return what.head_count, what.group_count, self._group_bytes[what.role]

    def _shared(self, what: pb.RankCopy) -> NDArray[np.uint8]:
        shape = self._shape(what)
        return self._memory[what.shared_offset :][: int(np.prod(shape))].reshape(shape)

    def _report_copies(self) -> None:
        """In their order, so a number is enough for the leader."""
        while self._copies and ((first := self._copies[0]) is None or first.done()):
            self._copies.popleft()
            self._link.send(pb.RankReply(copied=pb.RankCopied()))


def _rectangle(what: pb.RankCopy) -> tuple[slice, slice]:
    heads = slice(what.head_start, what.head_start + what.head_count)
    return heads, slice(what.group_start, what.group_start + what.group_count)


if __name__ == "__main__":
    rank_group.run(main)
