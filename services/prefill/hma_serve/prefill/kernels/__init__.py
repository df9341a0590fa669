"""Triton kernels for prefill on CUDA and ROCm: everything between two matrix products, in one pass each."""
