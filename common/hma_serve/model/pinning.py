"""Host memory that a GPU copies from and to by itself, without staging."""

from __future__ import annotations

import numpy as np
import torch

from hma_serve.core.errors import FailedPrecondition


def pin(memory: memoryview) -> None:
    """Pins memory for the current GPU as long as the process lives; no bytes at all are left alone.

    Raises:
        FailedPrecondition: CUDA refuses; the message has its error. 712 is memory that this process has pinned before.
    """
    if not memory.nbytes:  # CUDA refuses to register no bytes.
        return
    array = np.frombuffer(memory, dtype=np.uint8)
    status = torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0)  # type: ignore[no-untyped-call]
    if int(status) != 0:
        raise FailedPrecondition(f"cannot pin {array.nbytes} bytes of host memory for the GPU: error {int(status)}")
