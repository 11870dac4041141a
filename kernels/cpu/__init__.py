"""Kernels for the CPU: Numba functions on explicit SIMD vectors, one module a family, on the engine in ``engine``."""
