"""Triton kernels of the decode step, each with its two limits and its layout in docs/kernels.md."""
