"""Triton kernels: what a kernel is for, its source text, loading it, and calling it."""
