"""Matrix products on the CPU: which kernel serves a call, and how the work is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .engine import threads
from .engine.build import Kernel
from .engine.host import caches, simd
from .engine.workspace import workspace

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@cache
def _shape(name: str) -> tuple[int, int, int, bool, int, int]:
    """(lanes, rows, vecs, pairs, bytes of a packed lane, memory size) of the kernels for a dtype."""
    s = simd()
    size = {"float32": 4, "float64": 8}.get(name, 2)
    unit = max(4, size)
    rows = 8 if s.registers == 32 else 4
    return s.width // unit, rows, 3, name == "bfloat16" and s.bf16_dot, unit, size


def _make_product(name: str) -> Callable[[], Callable[..., Any]]:
    def make() -> Callable[..., Any]:
        from .matmul_code import product

        return product(name, _shape(name)[3])
    return make


_PRODUCT = {name: Kernel(f"product_{name}", "i" * 34 + "f" * 4, _make_product(name)) for name in _NAMES.values()}


def _cut(n: int, lanes: int, vecs: int, parts: int) -> int:
    """Panels that n columns are cut into: at most ``vecs`` vectors each, their number a multiple of ``parts`` if it can be."""
    vectors = -(-n // lanes)
    return min(vectors, -(-max(1, -(-vectors // vecs)) // parts) * parts)


def gemm(out: Tensor, a: Tensor, b: Tensor, nt: int, bias=None, packed: int = 0, cut: int = 0, direct: int = 0, mc=0, kc=0, act=0):
    name = _NAMES[a.dtype]
    lanes, rows, vecs, pairs, unit, size = _shape(name)
    m, k = a.shape[-2:]
    n = b.shape[-1]
    batch = 1 if a.dim() == 2 else a.shape[0]
    tn = nt if batch == 1 else 1
    tm = 1
    cut = cut or _cut(n, lanes, vecs, tn)
    mc = mc or 192
    half = size == 2
    pack_a = int(half and (not pairs or k % 2 == 1 or a.stride(-1) != 1))
    depth = (k + 1) // 2 if pairs else k
    kc = max(1, depth if half else (kc or 512))
    ws_size = 64 * 1024 + (mc + 16) * kc * unit * pack_a + (0 if packed or direct else (-(-n // lanes) + vecs) * lanes * kc * unit)
    ws_size = -(-ws_size // 4096) * 4096
    ws = workspace(ws_size * nt)
    _PRODUCT[name].load()(
        nt, batch * tm * tn, tm, tn, 0, m, n, k,
        a.data_ptr(), a.stride(0) * size if batch > 1 else 0, a.stride(-2) * size, a.stride(-1) * size,
        b.data_ptr(), b.stride(0) * size if batch > 1 else 0, b.stride(-2) * size, b.stride(-1) * size,
        packed, cut, direct, out.data_ptr(), m * n * size, n * size, 0 if bias is None else bias.data_ptr(), 0, 0, 0, 0, act, int(act>0),
        mc, kc, pack_a, ws, ws_size, 1.0, 0.0, 0.0, 0.0)
    return out
