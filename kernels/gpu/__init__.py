"""Kernels for the GPU: Triton, or CUDA C launched through CuPy, one module a family, on what ``engine`` gives them."""
