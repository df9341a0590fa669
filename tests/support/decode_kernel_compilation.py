"""Compiles the decode step's kernels for GPUs that are not here, an H200 or an MI300; a program.

The interpreter runs a kernel as Python and lets pass what the compiler refuses: a constant that changes, two branches
that leave a name with different types, an instruction that the assembler does not know. So some
of `decode_kernel_checks` run once more with every launch compiled, down to machine code, instead of run.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hma_serve.decode.kernels.byte_pages import BYTE_PAGES
from hma_serve.decode.page_order import Role
from support import small_kernel_checks as small
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


class _Mi300(_Hopper):
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", "gfx942", 64)


def waits_before_loading(sass: str) -> bool:
    """Whether a product asks L2 for its matrix, then waits, and loads nothing in between."""
    lines = sass.splitlines()
    wait = next(at for at, line in enumerate(lines) if "ACQBULK" in line)
    asked = any("UBLKPF" in line for line in lines[:wait])
    return asked and not any("LDG" in line for line in lines[:wait])


def loads_before_waiting(sass: str) -> bool:
    """Whether pages are loaded in front of the wait for the kernel before, as the source says.

    The assembler may move a load behind it without a word, and nothing but time is lost.
    """
    lines = sass.splitlines()
    last_wait = max(at for at, line in enumerate(lines) if "ACQBULK" in line)
    return any("LDG" in line and ".128" in line for line in lines[:last_wait])


def _for_nvidia() -> None:
    step_error(ptx=True)
    small.gate_error(2, 100, ptx=True)
    for rows in (1, 32):
        product_error(rows, 37, 104, ptx=True)
        product_error(rows, 96, 640, ptx=True)
        product_error(rows, 96, 640, ptx=True, gated=True)
    for name in BYTE_PAGES:
        misplaced_bytes(name, Role.K, 128)
    for checks in CORNER.values():
        for check in checks[-2:]:
            check.run(ptx=True)


def _for_amd() -> None:
    # One reader: they take a minute and more. Products are a library's there.
    CORNER["single"][1].run(ptx=False)
    small.norm_error(2, 2560, 1, ptx=False)
    small.gate_error(2, 100, ptx=False)
    small.embed_error(2, 100)
    small.Projection(2, 4, 128).run(ptx=False)
    for name in BYTE_PAGES:
        misplaced_bytes(name, Role.K, 128)


_SHARED = {"_place", "attend", "embed", "gate", "merge", "number_pages", "project", "residual_norm"}
TARGETS = {
    "nvidia": (_Hopper, _for_nvidia, "cubin", _SHARED | {"_matvec", "_skinny"}),
    "amd": (_Mi300, _for_amd, "hsaco", _SHARED),
}
"""The device, what launches the kernels, the name of its machine code, and whose there must be."""


def main() -> None:
    """Prints how many bytes each kernel's code takes on a vendor's GPU, in each of its forms."""
    device, launch_all, form, expected = TARGETS[sys.argv[1]]
    sizes: dict[str, set[int]] = {}

    def compiled(kernel: JITFunction[Any], *args: Any, warmup: bool, **options: Any) -> None:
        code = _launch(kernel, *args, warmup=True, **options)
        sizes.setdefault(kernel.__name__, set()).add(len(code.asm[form]))
        if form == "cubin" and kernel.__name__ == "attend":
            assert loads_before_waiting(code.asm["sass"]), "attend loads nothing before it waits"
        if kernel.__name__ == "_skinny":
            assert waits_before_loading(code.asm["sass"]), "a product does not ask ahead, or does not wait"

    driver.set_active(device())
    with (
        patch.object(JITFunction, "run", compiled),
        patch.object(torch.backends.cuda, "preferred_blas_library"),
    ):
        launch_all()
    for name, forms in sorted(sizes.items()):
        print(name, *sorted(forms))
    assert set(sizes) == expected, sizes


if __name__ == "__main__":
    main()
