"""What is asked of CUDA to pin memory, and how its refusal is told; a GPU is not needed."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hma_serve.core.errors import FailedPrecondition
from hma_serve.model.pinning import pin


def answer_with(monkeypatch: pytest.MonkeyPatch, register: Callable[[int, int, int], int]) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))


def test_memory_is_pinned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    def register(address: int, size: int, flags: int) -> int:
        asked.append((address, size, flags))
        return 0

    answer_with(monkeypatch, register)
    memory = memoryview(mmap.mmap(-1, 3 * mmap.PAGESIZE))
    pin(memory)
    assert asked == [(np.frombuffer(memory, dtype=np.uint8).ctypes.data, 3 * mmap.PAGESIZE, 0)]


def test_no_memory_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, lambda *_: pytest.fail("asked CUDA"))
    pin(memoryview(b""))


def test_a_refusal_has_cudas_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, lambda *_: 712)
    with pytest.raises(FailedPrecondition, match="cannot pin 4096 bytes of host memory for the GPU: error 712"):
        pin(memoryview(bytearray(4096)))
