"""Rows of a table on the GPU; gradients summed a row of the table at a time, no atomics: always in the same order. A row that is
taken often is summed in chunks, by several programs.

An index out of range gives a row of NaN: to raise an error, the call would have to wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import launch
from .engine.launch import power_of_two


@triton.jit
def gather(y, w, indices, number, rows, n, w_r, w_n, across, R: tl.constexpr, C: tl.constexpr):
    """R rows, C elements of each"""
    pid = tl.program_id(0).to(tl.int64)
    i = pid // across * R + tl.arange(0, R)
    j = pid % across * C + tl.arange(0, C)
    row = tl.load(indices + i, mask=i < number, other=0).to(tl.int64)
    right = (row >= 0) & (row < rows)
    inside = (i < number)[:, None] & (j < n)[None, :]
    v = tl.load(w + row[:, None] * w_r + j[None, :] * w_n, mask=inside & right[:, None], other=float("nan"))
    tl.store(y + i[:, None] * n + j[None, :], v, mask=inside)


@triton.jit
def _sum_of_rows(g, places, first, last, j, n, g_r, g_n, T: tl.constexpr, C: tl.constexpr):
    """The sum of g's rows places[first : last], or first to last themselves, T at a time"""
    sums = tl.zeros((T, C), tl.float32)
    for at in tl.range(first, last, T):
        place = (at + tl.arange(0, T)).to(tl.int64)
        there = place < last
        if places is not None:
            place = tl.load(places + place, mask=there, other=0)
        inside = there[:, None] & (j < n)[None, :]
        sums += tl.load(g + place[:, None] * g_r + j[None, :] * g_n, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(sums, 0)


@triton.jit
def scatter_chunks(
    sums, g, numbers, places, n, g_r, g_n, padding, across, CHUNK: tl.constexpr, T: tl.constexpr, C: tl.constexpr
):
    """The sum of a chunk of places that are all one row's"""
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid // across
    j = pid % across * C + tl.arange(0, C)
    row = tl.load(numbers + chunk * CHUNK)
    if (row == tl.load(numbers + chunk * CHUNK + CHUNK - 1)) & (row != padding):
        s = _sum_of_rows(g, places, chunk * CHUNK, chunk * CHUNK + CHUNK, j, n, g_r, g_n, T, C)
        tl.store(sums + chunk * n + j, s, mask=j < n)


@triton.jit
def scatter(
    y, g, chunks, places, bounds, n, g_r, g_n, padding, across,
    BY_FREQUENCY: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A row of the table: the sum of g at places[bounds[row] : bounds[row + 1]], where it was taken; chunks are summed already"""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // across
    j = pid % across * C + tl.arange(0, C)
    first = tl.load(bounds + row)
    last = tl.load(bounds + row + 1)
    last = tl.where(row == padding, first, last)
    whole = tl.cdiv(first, CHUNK)
    end = tl.maximum(last // CHUNK, whole)
    head = tl.minimum(whole * CHUNK, last)
    tail = tl.maximum(head, tl.minimum(end * CHUNK, last))
    sums = _sum_of_rows(g, places, first, head, j, n, g_r, g_n, T, C)
    if chunks is not None:
        sums += _sum_of_rows(chunks, None, whole, end, j, n, n, 1, T, C)
    sums += _sum_of_rows(g, places, tail, last, j, n, g_r, g_n, T, C)
    if BY_FREQUENCY:
        sums /= tl.maximum(last - first, 1).to(tl.float32)
    tl.store(y + row * n + j, sums.to(y.dtype.element_ty), mask=j < n)


_CHUNK = 128  # places of a frequent row that one program sums


def embedding(out: Tensor, weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> None:
    """out = weight[indices]"""
    if not out.numel():
        return
    rows, n = weight.shape
    number = indices.numel()
    c = power_of_two(n, most=1024)
    r = min(2048 // c, power_of_two(number))
    across = -(-n // c)
    launch.run(gather, -(-number // r) * across, out.device, out, weight, indices.contiguous(), number, rows, n, *weight.stride(),
               across, R=r, C=c, num_warps=4)  # fmt: skip


def embedding_backward(out: Tensor, grad: Tensor, indices: Tensor, rows: int, padding_idx: int,
                       scale_grad_by_freq: bool) -> None:
    """out = for each row the sum of those of grad that were taken from it"""
    if not out.numel():
        return
    if not grad.numel():
        out.zero_()
        return
    n = grad.shape[-1]
    g = grad.reshape(-1, n)
    numbers, places = indices.reshape(-1).to(torch.int64).sort(stable=True)
    bounds = torch.searchsorted(numbers, torch.arange(rows + 1, device=out.device))  # where each row's numbers begin
    c = power_of_two(n, most=1024)
    across = -(-n // c)
    options = {"CHUNK": _CHUNK, "T": max(4, min(32, 2048 // c)), "C": c, "num_warps": 4}
    chunks = None
    if number := len(places) // _CHUNK:
        chunks = torch.empty((number, n), dtype=torch.float32, device=out.device)
        launch.run(scatter_chunks, number * across, out.device, chunks, g, numbers, places, n, *g.stride(), padding_idx, across,
                   **options)  # fmt: skip
    launch.run(scatter, rows * across, out.device, out, g, chunks, places, bounds, n, *g.stride(), padding_idx, across,
               BY_FREQUENCY=scale_grad_by_freq, **options)  # fmt: skip


def supports(op: str, *args: Any) -> str | None:
    return launch.refuses(*(a for a in args if isinstance(a, Tensor)))


KERNELS: dict[str, Callable[..., None]] = {"embedding": embedding, "embedding_backward": embedding_backward}
