"""Compiles the decode step's kernels for an H200 that is not here; a program.

The interpreter runs a kernel as Python and lets pass what the compiler refuses: a constant that changes, two branches
that leave a name with different types, an instruction that the assembler does not know. So some
of `decode_kernel_checks` run once more with every launch compiled, down to machine code, instead of run.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hma_serve.decode.kernels.byte_pages import BYTE_PAGES
from hma_serve.decode.page_order import Role
from support.decode_kernel_checks import CORNER, misplaced_bytes, product_error, step_error

_launch = JITFunction.run


class _Hopper:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def loads_before_waiting(sass: str) -> bool:
    """Whether pages are loaded in front of the wait for the kernel before, as the source says.

    The assembler may move a load behind it without a word, and nothing but time is lost.
    """
    lines = sass.splitlines()
    last_wait = max(at for at, line in enumerate(lines) if "ACQBULK" in line)
    return any("LDG" in line and ".128" in line for line in lines[:last_wait])


def main() -> None:
    """Prints how many bytes each kernel's code takes, in each of its forms."""
    sizes: dict[str, set[int]] = {}

    def compiled(kernel: JITFunction[Any], *args: Any, warmup: bool, **options: Any) -> None:
        code = _launch(kernel, *args, warmup=True, **options)
        sizes.setdefault(kernel.__name__, set()).add(len(code.asm["cubin"]))
        if kernel.__name__ == "attend":
            assert loads_before_waiting(code.asm["sass"]), "attend loads nothing before it waits"

    driver.set_active(_Hopper())
    with (
        patch.object(JITFunction, "run", compiled),
        patch.object(torch.backends.cuda, "preferred_blas_library"),
    ):
        step_error(ptx=True)
        for rows in (1, 32):
            product_error(rows, 37, 100, ptx=True)
            product_error(rows, 96, 640, ptx=True)
        for name in BYTE_PAGES:
            misplaced_bytes(name, Role.K, 128)
        for checks in CORNER.values():
            for check in checks[-2:]:
                check.run(ptx=True)
    for name, forms in sorted(sizes.items()):
        print(name, *sorted(forms))
    expected = {
        "_matvec",
        "_place",
        "_skinny",
        "attend",
        "embed",
        "gate",
        "merge",
        "number_pages",
        "project",
        "residual_norm",
    }
    assert set(sizes) == expected, sizes


if __name__ == "__main__":
    main()
