"""Several devices as one accelerator: a process per rank, each with whole heads of the model and of the KV.

This process is rank 0. It tells the others what to compute, in one order, and computes its share of it; the residual
stream is the same on every rank, so each keeps its own and only the first layer's travels. A rank leaves its heads'
bytes in the memory shared with the front by itself. Ranks live and die together: when one ends, this process ends, and
the parent-death signal takes the rest along.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hma_serve.core.error_detail import from_error_detail
from hma_serve.core.errors import Unavailable
from hma_serve.internal.v1 import prefill_ranks_pb2 as pb
from hma_serve.ipc import Arena, LinkClosed, SyncLink
from hma_serve.prefill.accelerators import Accelerator, Completion, KvStore, Segment, rank_group
from hma_serve.prefill.accelerators.sharding import Shard

RANK_MODULE = "hma_serve.prefill.rank_main"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ranks:
    """How to start the other ranks.

    Attributes:
        count: All of them, this one included.
        arguments: Of `RANK_MODULE`, the same for each: what to load and how.
        slots: Memory shared with the front; the ranks write layers there.
    """

    count: int
    arguments: Sequence[str]
    slots: Arena


class TensorParallel:
    """See `hma_serve.prefill.accelerators.Accelerator`.

    Args:
        ranks: How to start the others.
        kv_heads: Of the whole model.
        load: Loads this rank's share, given which it is.
    """

    def __init__(self, ranks: Ranks, kv_heads: int, load: Callable[[Shard], Accelerator]) -> None:
        meeting = os.memfd_create("hma-serve-ranks")  # kept: the ranks meet anew for each kind of memory
        self._peers = [_Peer(rank, ranks, meeting) for rank in range(1, ranks.count)]
        self._shard = rank_group.join(0, ranks.count, meeting)
        self._own = load(self._shard)
        self._slots, self._kv_heads = ranks.slots, kv_heads
        self._stores = 0
        self._dropped: list[int] = []
        devices = [self._own.device, *(peer.ready() for peer in self._peers)]
        self.device = f"{ranks.count} x {devices[0]}" if len(set(devices)) == 1 else ", ".join(devices)

    @property
    def kv_tokens(self) -> int | None:
        """See `Accelerator`: ranks hold the same tokens, each its own heads of them, on devices of a kind."""
        return self._own.kv_tokens

    def pin(self, memory: memoryview) -> None:
        """See `Accelerator`."""
        self._own.pin(memory)

    def fence(self) -> Completion | None:
        """See `Accelerator`: the ranks go in step, so this one's."""
        return self._own.fence()

    def new_store(self, tokens: int) -> KvStore:
        """See `Accelerator`."""
        self._stores += 1
        self._tell(pb.RankCommand(new_store=pb.RankNewStore(store=self._stores, tokens=tokens)))
        store = RankedKv(self, self._stores, self._own.new_store(tokens))
        weakref.finalize(store, self._dropped.append, self._stores)
        return store

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """See `Accelerator`."""
        return self._own.embed(token_ids)

    def run_layer(self, layer: int, hidden: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """See `Accelerator`."""
        stores = [_ranked(part.store) for part in segments]
        named = [
            pb.RankSegment(store=store.number, start=part.start, tokens=part.tokens)
            for part, store in zip(segments, stores, strict=True)
        ]
        own = [Segment(part.start, part.tokens, store.own) for part, store in zip(segments, stores, strict=True)]
        self._tell(pb.RankCommand(run_layer=pb.RankRunLayer(layer=layer, segments=named)))
        try:
            if layer == 0:
                rank_group.broadcast(hidden)
            return self._own.run_layer(layer, hidden, own)
        except Exception:
            # The others are in the middle of this layer and can neither go on nor go back.
            _log.exception("rank 0 failed in layer %d; the ranks end together", layer)
            rank_group.leave(1)

    def copy(
        self,
        store: RankedKv,
        layer: int,
        role: int,
        heads: slice,
        groups: slice,
        array: NDArray[np.uint8],
        *,
        out: bool,
    ) -> Completion | None:
        """Moves packed bytes [heads, groups, group bytes] out of the ranks that hold them, or into them."""
        self._flush_dropped()
        start, stop, _ = heads.indices(self._kv_heads)
        pending = []
        for rank in range(self._shard.count):
            held = Shard(rank, self._shard.count).heads(self._kv_heads)
            first, last = max(start, held.start), min(stop, held.stop)
            if first >= last:
                continue
            part, local = array[first - start : last - start], slice(first - held.start, last - held.start)
            if rank:
                what = _copy_command(store.number, layer, role, local, groups)
                done = self._peers[rank - 1].copy(what, part, self._offset(part), out=out)
            elif out:
                done = store.own.copy_out(layer, role, local, groups, part)
            else:
                store.own.copy_in(layer, role, local, groups, part)
                done = None
            if done is not None:
                pending.append(done)
        return _All(pending) if pending else None

    def _offset(self, part: NDArray[np.uint8]) -> int | None:
        """Where an array lies in the memory shared with the front; None: elsewhere."""
        base = np.frombuffer(self._slots.slot(0), dtype=np.uint8).ctypes.data
        offset = part.ctypes.data - base
        inside = offset >= 0 and offset + part.nbytes <= self._slots.slots * self._slots.slot_bytes
        return offset if inside and part.flags.c_contiguous else None

    def _tell(self, command: pb.RankCommand) -> None:
        self._flush_dropped()
        for peer in self._peers:
            peer.tell(command)

    def _flush_dropped(self) -> None:
        """Stores are dropped by the garbage collector, at any time; the ranks hear of it before the next command."""
        while self._dropped:
            command = pb.RankCommand(drop_store=pb.RankDropStore(store=self._dropped.pop()))
            for peer in self._peers:
                peer.tell(command)


class RankedKv:
    """See `hma_serve.prefill.accelerators.KvStore`: one request's KV, spread over the ranks.

    Attributes:
        number: What the ranks call it.
        own: This rank's share.
    """

    def __init__(self, ranks: TensorParallel, number: int, own: KvStore) -> None:
        self.number = number
        self.own = own
        self._ranks = ranks

    def copy_out(self, layer: int, role: int, heads: slice, groups: slice, out: NDArray[np.uint8]) -> Completion | None:
        """See `KvStore`."""
        return self._ranks.copy(self, layer, role, heads, groups, out, out=True)

    def copy_in(self, layer: int, role: int, heads: slice, groups: slice, packed: NDArray[np.uint8]) -> None:
        """See `KvStore`."""
        self._ranks.copy(self, layer, role, heads, groups, packed, out=False)


def _ranked(store: KvStore) -> RankedKv:
    if not isinstance(store, RankedKv):
        raise TypeError(f"{type(store).__name__} was not made by this accelerator")
    return store


def _copy_command(store: int, layer: int, role: int, heads: slice, groups: slice) -> pb.RankCopy:
    return pb.RankCopy(
        store=store,
        layer=layer,
        role=role,
        head_start=heads.start,
        head_count=heads.stop - heads.start,
        group_start=groups.start,
        group_count=groups.stop - groups.start,
    )


class _Peer:
    """Another rank's process, as the leader sees it."""

    def __init__(self, rank: int, ranks: Ranks, meeting: int) -> None:
        self.rank = rank
        self._told = self._copied = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        slots = ranks.slots
        inherited = {"--link-fd": theirs.fileno(), "--arena-fd": slots.fd, "--meeting-fd": meeting}
        sizes = {"--arena-slots": slots.slots, "--arena-slot-bytes": slots.slot_bytes}
        place = {"--rank": rank, "--ranks": ranks.count}
        flags = [str(part) for pair in (place | inherited | sizes).items() for part in pair]
        command = [sys.executable, "-m", RANK_MODULE, *ranks.arguments, *flags]
        self._process = subprocess.Popen(command, pass_fds=tuple(inherited.values()), process_group=0)
        theirs.close()
        self._link: SyncLink[pb.RankReply] = SyncLink(ours, pb.RankReply)
        self._watcher = threading.Thread(target=self._watch, name=f"rank-{rank}", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        """A rank that ends leaves this process in a collective that may never return."""
        status = self._process.wait()
        _log.critical("rank %d ended with status %d; the ranks end together", self.rank, status)
        rank_group.leave(1)

    def ready(self) -> str:
        """Waits until the rank has loaded its share; its device.

        Raises:
            HmaError: It cannot; says why.
        """
        for reply in self._receive(None):
            if reply.HasField("failed"):
                raise from_error_detail(reply.failed.error)
            if reply.HasField("ready"):
                return reply.ready.device
        raise Unavailable(f"rank {self.rank} did not load")

    def tell(self, command: pb.RankCommand) -> None:
        """Queues a command."""
        try:
            self._link.send(command)
        except LinkClosed:
            self._watcher.join()  # it says why, and ends this process
            raise

    def copy(self, what: pb.RankCopy, part: NDArray[np.uint8], offset: int | None, *, out: bool) -> Completion | None:
        """Has bytes copied; see `TensorParallel.copy`."""
        if out and offset is not None:
            what.shared_offset = offset
            self.tell(pb.RankCommand(copy_out=what))
            self._told += 1
            return _Copied(self, self._told)
        if not out:
            self.tell(pb.RankCommand(copy_in=what))
            rank_group.send(part, self.rank)
            return None
        self.tell(pb.RankCommand(copy_out=what))
        received = np.empty(part.shape, np.uint8)
        rank_group.receive(received, self.rank)
        np.copyto(part, received)
        return None

    def copied(self, number: int, timeout: float | None) -> bool:
        """Whether that copy into shared memory is done, after at most `timeout` seconds; None: waits for it."""
        while self._copied < number:
            replies = self._receive(timeout)
            if not replies:
                return False
            self._copied += sum(reply.HasField("copied") for reply in replies)
        return True

    def _receive(self, timeout: float | None) -> list[pb.RankReply]:
        try:
            return self._link.receive(timeout)
        except LinkClosed:
            self._watcher.join()  # it says why, and ends this process
            raise


@dataclass(frozen=True, slots=True)
class _Copied:
    """See `Completion`."""

    peer: _Peer
    number: int

    def done(self) -> bool:
        return self.peer.copied(self.number, 0)

    def wait(self) -> None:
        self.peer.copied(self.number, None)


@dataclass(frozen=True, slots=True)
class _All:
    """See `Completion`."""

    parts: Sequence[Completion]

    def done(self) -> bool:
        return all(part.done() for part in self.parts)

    def wait(self) -> None:
        for part in self.parts:
            part.wait()
