"""The ranks of one engine as a torch.distributed group: gloo between CPUs, NCCL between GPUs.

Commands do not travel here, so an idle group waits for nothing and no collective can time out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from hma_serve.prefill.accelerators.sharding import Shard

_TIMEOUT = timedelta(minutes=10)
"""For one collective; its partners are at the same layer, or dead, which is noticed sooner."""


def leave(status: int) -> NoReturn:
    """Ends the process at once: NCCL's clean-up at the end of a program waits for ranks that may be gone, for ever."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def run(main: Callable[[], int]) -> NoReturn:
    """Runs the program of a process that may be a rank, and leaves with its status."""
    status = 1
    try:
        status = main()
    except SystemExit as exc:
        if isinstance(exc.code, int):
            status = exc.code
        elif exc.code is not None:
            print(exc.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    leave(status)


def join(rank: int, count: int, meeting: int) -> Shard:
    """Waits until every rank is there; once per process.

    Args:
        rank: This one.
        count: All of them.
        meeting: An open file that the ranks share, empty at first.

    Returns:
        The rank's share, with its reductions.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks are of one host
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = distributed.FileStore(f"/proc/self/fd/{meeting}", count)  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_TIMEOUT)
    return Shard(rank, count, sum=_sum, largest=_largest)


def _sum(x: torch.Tensor) -> torch.Tensor:
    """On CPUs in the order of the ranks: a ring's order depends on where a row lies in the batch."""
    if x.is_cuda:
        distributed.all_reduce(x)
        return x
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _largest(x: torch.Tensor) -> torch.Tensor:
    distributed.all_reduce(x, op=distributed.ReduceOp.MAX)
    return x


def broadcast(x: torch.Tensor) -> torch.Tensor:
    """The leader's tensor, on every rank; the others pass one of the same shape, which is overwritten."""
    distributed.broadcast(x, src=0)
    return x


def send(array: NDArray[np.uint8], rank: int) -> None:
    """Sends host bytes to another rank."""
    distributed.send(torch.from_numpy(np.ascontiguousarray(array)), dst=rank)


def receive(array: NDArray[np.uint8], rank: int) -> None:
    """Receives host bytes, contiguous, from another rank."""
    distributed.recv(torch.from_numpy(array), src=rank)
