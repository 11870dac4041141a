"""Rows of a table on the CPU: taken as bytes, whatever their dtype; gradients summed a row of the table at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .engine import overhead, threads
from .engine.build import Kernel, made_by

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SERIAL = 64 << 10  # bytes below which a second thread costs more than it brings
SMALL = 8 << 20  # bytes up to which torch, whose call is the shorter one, copies rows as fast


@cache
def _kernel(kind: str, integers: int, *names: str) -> Callable[..., None]:
    return Kernel("_".join(["embedding", kind, *names]), "i" * integers, made_by("embedding_code", kind, *names)).load()


def _threads(t: Tensor) -> int:
    return 1 if t.numel() * t.itemsize < _SERIAL else threads.count()


def _raise_if_bad(bad: Tensor, indices: Tensor, rows: int) -> None:
    place = int(bad)
    if place:
        raise IndexError(f"embedding(): index out of range: got {int(indices[place - 1])}, allowed are 0 to {rows - 1}")


def supports(op: str, first: Tensor, *rest: Any) -> str | None:
    if op == "embedding" and first.stride(1) != 1 and first.shape[1] != 1:
        return "the numbers of a row do not lie next to each other"
    return None


def embedding(out: Tensor, weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> None:
    """out = weight[indices]"""
    if not indices.numel():
        return
    numbers, bad = indices.reshape(-1).to(torch.int64).contiguous(), indices.new_zeros((), dtype=torch.int64)
    rows, size = weight.shape
    _kernel("gather", 9)(_threads(out), numbers.shape[0], numbers.data_ptr(), weight.data_ptr(), rows,
                         weight.stride(0) * weight.itemsize, size * weight.itemsize, out.data_ptr(), bad.data_ptr())
    _raise_if_bad(bad, numbers, rows)


def embedding_backward(out: Tensor, grad: Tensor, indices: Tensor, rows: int, padding_idx: int,
                       scale_grad_by_freq: bool) -> None:
    """out = for each row the sum of those of grad that were taken from it"""
    out.zero_()
    if not grad.numel():
        return
    size, bad = grad.shape[-1], indices.new_zeros((), dtype=torch.int64)
    grad = grad.reshape(-1, size)
    grad = grad if grad.stride(1) == 1 or size == 1 else grad.contiguous()
    numbers, places = indices.reshape(-1).to(torch.int64).sort(stable=True)
    _kernel("scatter", 12, _NAMES[out.dtype])(
        _threads(grad), numbers.shape[0], numbers.data_ptr(), places.data_ptr(), grad.data_ptr(), grad.stride(0) * grad.itemsize,
        size, out.data_ptr(), rows, padding_idx, scale_grad_by_freq, bad.data_ptr())
    _raise_if_bad(bad, numbers, rows)


KERNELS: dict[str, Callable[..., None]] = {"embedding": embedding, "embedding_backward": embedding_backward}


def _small(weight: Tensor, indices: Tensor, *_: Any) -> str | None:
    size = indices.numel() * weight.shape[-1] * weight.itemsize
    return "torch is faster for so few bytes, as measured" if overhead.RULES and size <= SMALL else None


TORCH_IS_FASTER = {"embedding": _small}
