"""Softmax, log-softmax and the losses on the CPU: how the lines that they run over lie, and which kernel takes them.

A line lies along the class dimension. Its elements may lie next to each other (rows), or the lines may (columns: the
class dimension is not the innermost); any other input is first copied, except that nothing of the logits' size is made
where ``cross_entropy`` can read them in place, as it can every contiguous tensor and its transposes and slices.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import linear_loss
from ..layout import outer_and_inner
from . import matmul
from .activation import SIGNATURE, run_elementwise
from .engine import threads
from .engine.build import Kernel, made_by
from .engine.overhead import torch_is_shorter
from .engine.workspace import workspace

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SERIAL = 32 << 10  # bytes below which a second thread costs more than it brings
_BLOCK = 4096  # softmax_code.BLOCK
_SLAB = 4 << 20  # bytes of a product that is added to another
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@cache
def _kernel(kind: str, signature: str, dtype: torch.dtype, *options: str | bool) -> Callable[..., None]:
    name = "_".join([kind, _NAMES[dtype], *(str(o) for o in options)])
    return Kernel(name, signature, made_by("softmax_code", kind, _NAMES[dtype], *options)).load()


class Lines(NamedTuple):
    """outer · inner lines of n elements; slots: each tensor's address, outer, inner and class stride in bytes."""

    outer: int
    inner: int
    n: int
    in_rows: bool
    slots: list[int]

    @property
    def number(self) -> int:
        return self.outer * self.inner

    def threads(self, size: int) -> int:
        return 1 if self.number * self.n * size < _SERIAL else threads.count()


def _lines(dim: int, tensors: Sequence[Tensor]) -> Lines | None:
    """How the lines along dim lie in all tensors (of one shape) at once; None if they have to be copied first."""
    shape = tensors[0].shape
    if dim == len(shape) - 1 and shape[dim] and all(t.is_contiguous() for t in tensors):  # the usual case, without a detour
        n = shape[dim]
        slots = []
        for t in tensors:
            slots += [t.data_ptr(), 0, n * t.itemsize, t.itemsize]
        return Lines(1, tensors[0].numel() // n, n, True, slots)
    strides = [t.stride() for t in tensors]
    beside = outer_and_inner(shape, strides, dim)
    if beside is None:
        return None
    (outer, outer_steps), (inner, inner_steps) = beside
    n = shape[dim] if shape else 1
    along = [s[dim] if shape and n > 1 else 1 for s in strides]
    in_rows = set(along) == {1}
    if not in_rows and (inner == 1 or set(inner_steps) != {1}):
        return None
    slots = []
    for k, t in enumerate(tensors):
        slots += [t.data_ptr(), outer_steps[k] * t.itemsize, inner_steps[k] * t.itemsize, along[k] * t.itemsize]
    return Lines(outer, inner, n, in_rows, slots)


def _lines_of(dim: int, tensors: Sequence[Tensor]) -> tuple[Lines, Sequence[Tensor]]:
    """The lines, of contiguous copies where it must be; keep the tensors for as long as the lines are used."""
    dim = dim % max(1, tensors[0].dim())
    lines = _lines(dim, tensors)
    if lines is None:
        tensors = [t.contiguous() for t in tensors]
        lines = _lines(dim, tensors)
        assert lines is not None, "contiguous tensors always lie in lines"
    return lines, tensors


def _softmax(op: str, out: Tensor, input: Tensor, grad: Tensor, dim: int) -> None:
    if out.numel():
        lines, kept = _lines_of(dim, (input, grad, out))
        kernel = _kernel("softmax", "i" * 16, out.dtype, op, lines.in_rows)
        kernel(lines.outer, lines.inner, lines.n, lines.threads(out.itemsize), *lines.slots)
        if kept[-1] is not out and kept[-1].data_ptr() != out.data_ptr():
            out.copy_(kept[-1])


def softmax(out: Tensor, input: Tensor, dim: int) -> None:
    """out = exp(input - max) / Σ exp(input - max)"""
    _softmax("softmax", out, input, input, dim)


def softmax_backward(out: Tensor, grad: Tensor, output: Tensor, dim: int) -> None:
    """out = output (grad - Σ grad output)"""
    _softmax("softmax_backward", out, output, grad, dim)


def log_softmax(out: Tensor, input: Tensor, dim: int) -> None:
    """out = input - max - log Σ exp(input - max)"""
    _softmax("log_softmax", out, input, input, dim)


def log_softmax_backward(out: Tensor, grad: Tensor, output: Tensor, dim: int) -> None:
    """out = grad - exp(output) Σ grad"""
    _softmax("log_softmax_backward", out, output, grad, dim)


# Losses --------------------------------------------------------------------------------------------------------------


def _room(size: int) -> tuple[ctypes.c_int64, int]:
    """Where a kernel notes a row whose class index is out of range, and scratch memory of that size."""
    address = workspace(64 + size)
    bad = ctypes.c_int64.from_address(address)
    bad.value = 0
    return bad, address + 64


def _raise_if_bad(op: str, row: int, target: Tensor, classes: int, ignore_index: int) -> None:
    if row:
        got = int(target.reshape(-1)[row - 1])
        raise IndexError(f"{op}(): Target {got} is out of bounds: target must be in [0, {classes}) or equal "
                         f"ignore_index, {ignore_index}")


def _kind(input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor | None,
          smoothing: float) -> tuple[str, Tensor | None]:
    """Which kernel, and the class weights that it reads."""
    kind = "logs" if lse is None else "probabilities" if target.is_floating_point() else "smoothed" if smoothing else "indices"
    if weight is None and kind in ("probabilities", "smoothed"):
        weight = input.new_ones(input.shape[1 if input.dim() > 1 else 0])
    return kind, None if weight is None else weight.contiguous()


def _entropy(op: str, out: Tensor, lse: Tensor | None, input: Tensor, target: Tensor, weight: Tensor | None,
             ignore_index: int, reduction: str, smoothing: float) -> None:
    probabilities = target.is_floating_point()
    dim = 1 if input.dim() > 1 else 0
    lines, _kept = _lines_of(dim, (input, target) if probabilities else (input,))
    if not lines.number or not lines.n:
        out.fill_(float("nan") if reduction == "mean" else 0.0)
        if lse is not None:
            lse.zero_()
        return
    if not probabilities:
        target = target.contiguous()
    slots = lines.slots if probabilities else [*lines.slots, target.data_ptr(), 0, 0, 0]
    kind, weight = _kind(input, target, weight, lse, smoothing)
    bad, losses = _room(5 * 8 * lines.number)
    kernel = _kernel("cross_entropy", "i" * 20 + "f", input.dtype, lines.in_rows or lse is None, kind)
    kernel(lines.outer, lines.inner, lines.n, lines.threads(input.itemsize), _REDUCTIONS[reduction], ignore_index,
           *slots, 0 if weight is None else weight.data_ptr(), losses + 2 * 8 * lines.number,
           0 if lse is None else lse.data_ptr(), losses, out.data_ptr(), ctypes.addressof(bad), float(smoothing))
    if not probabilities:
        _raise_if_bad(op, bad.value, target, lines.n, ignore_index)


def _entropy_backward(op: str, out: Tensor, grad: Tensor, lse: Tensor | None, input: Tensor, target: Tensor,
                      weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float) -> None:
    if not out.numel():
        return
    probabilities = target.is_floating_point()
    dim = 1 if input.dim() > 1 else 0
    if lse is None:
        out.zero_()
    lines, kept = _lines_of(dim, (input, target, out) if probabilities else (input, out))
    x, y = lines.slots[:4], lines.slots[-4:]
    if not probabilities:
        target = target.contiguous()
    q = lines.slots[4:8] if probabilities else [target.data_ptr(), 0, 0, 0]
    kind, weight = _kind(input, target, weight, lse, smoothing)
    lse = None if lse is None else lse.double().contiguous()
    grad = grad.contiguous()
    bad, scratch = _room(4 * 8 * lines.number)
    kernel = _kernel("cross_entropy_backward", "i" * 24 + "f", input.dtype, lines.in_rows or lse is None, kind)
    kernel(lines.outer, lines.inner, lines.n, lines.threads(input.itemsize), int(reduction == "mean"), ignore_index,
           *x, *q, 0 if weight is None else weight.data_ptr(), scratch,
           0 if lse is None else lse.data_ptr(), *y, grad.data_ptr(), grad.itemsize if reduction == "none" else 0,
           ctypes.addressof(bad), float(smoothing))
    if not probabilities:
        _raise_if_bad(op, bad.value, target, lines.n, ignore_index)
    if kept[-1].data_ptr() != out.data_ptr():
        out.copy_(kept[-1])


def cross_entropy(out: tuple[Tensor, Tensor], input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
                  reduction: str, label_smoothing: float) -> None:
    """(loss, lse): lse, (2, …), float64: each line's maximum m and log Σ exp(x - m); nothing of the input's size is made.

    Raises IndexError if a class index is out of range and not ``ignore_index``.
    """
    loss, lse = out
    _entropy("cross_entropy", loss, lse, input, target, weight, ignore_index, reduction, label_smoothing)


def cross_entropy_backward(out: Tensor, grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor,
                           ignore_index: int, reduction: str, label_smoothing: float) -> None:
    """out = the gradient of input"""
    _entropy_backward("cross_entropy_backward", out, grad, lse, input, target, weight, ignore_index, reduction,
                      label_smoothing)


def nll_loss(out: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
             reduction: str) -> None:
    """-weight[target] · input[target]. Raises IndexError as ``cross_entropy`` does."""
    _entropy("nll_loss", out, None, input, target, weight, ignore_index, reduction, 0.0)


def nll_loss_backward(out: Tensor, grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None,
                      ignore_index: int, reduction: str) -> None:
    """out = the gradient of input: zero but for the target's class"""
    _entropy_backward("nll_loss_backward", out, grad, None, input, target, weight, ignore_index, reduction, 0.0)


# A linear layer and its cross-entropy


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, rows that the cache holds at a time."""
    if first and total.dtype == a.dtype:
        matmul.matmul(total, a, b)
        return
    size = max(64, _SLAB // (b.shape[1] * b.itemsize))
    room = a.new_empty(min(size, len(a)), b.shape[1])
    for at in range(0, len(a), size):
        part, to = room[: len(a) - at], total[at : at + size]
        matmul.matmul(part, a[at : at + size], b)
        to.copy_(part) if first else to.add_(part)


_STEPS = linear_loss.Steps(matmul.linear, matmul.matmul, _add_product, cross_entropy, cross_entropy_backward, 128 << 20,
                           in_place=False)  # a row's last vector overlaps the one before


def linear_cross_entropy(out: tuple[Tensor, ...], *args: Any) -> None:
    """out = (the loss, what it was divided by, the gradients of the losses' sum by input, weight and bias, if wanted)"""
    linear_loss.forward(_STEPS, out, *args)


def linear_cross_entropy_backward(out: tuple[Tensor, ...], *args: Any) -> None:
    """out = the gradients by input, weight and bias"""
    linear_loss.backward(_STEPS, out, *args)


def mse_loss(out: Tensor, input: Tensor, target: Tensor, reduction: str) -> None:
    """(input - target)², reduced"""
    n = input.numel()
    if reduction == "none":
        run_elementwise(_kernel("mse_loss", SIGNATURE, input.dtype), out, (input, target))
    elif n == 0:
        out.fill_(0.0 if reduction == "sum" else float("nan"))
    else:
        input, target = input.contiguous(), target.contiguous()
        parts = torch.empty(-(-n // _BLOCK), dtype=torch.float64)
        nt = 1 if n * input.itemsize < _SERIAL else threads.count()
        kernel = _kernel("squared_error", "iiiiiif", input.dtype)
        kernel(n, nt, input.data_ptr(), target.data_ptr(), parts.data_ptr(), out.data_ptr(),
               1.0 / n if reduction == "mean" else 1.0)


def mse_loss_backward(out: Tensor, grad: Tensor, input: Tensor, target: Tensor, reduction: str) -> None:
    """out = 2 (input - target) grad, over the number of elements for "mean" """
    if reduction == "none":
        kernel = _kernel("mse_loss_backward", SIGNATURE, input.dtype, True)
        run_elementwise(kernel, out, (input, target, grad), (2.0, 0.0))
    elif out.numel():
        kernel = _kernel("mse_loss_backward", SIGNATURE, input.dtype, False)
        factor = 2.0 * grad.item() / (input.numel() if reduction == "mean" else 1)
        run_elementwise(kernel, out, (input, target), (factor, 0.0))


KERNELS: dict[str, Callable[..., None]] = {
    "softmax": softmax, "softmax_backward": softmax_backward,
    "log_softmax": log_softmax, "log_softmax_backward": log_softmax_backward,
    "cross_entropy": cross_entropy, "cross_entropy_backward": cross_entropy_backward,
    "nll_loss": nll_loss, "nll_loss_backward": nll_loss_backward,
    "mse_loss": mse_loss, "mse_loss_backward": mse_loss_backward,
    "linear_cross_entropy": linear_cross_entropy, "linear_cross_entropy_backward": linear_cross_entropy_backward,
}

#: When the automatic choice is torch, by measurement: op → (*args) → the reason, or None.
TORCH_IS_FASTER: dict[str, Callable[..., str | None]] = {
    "softmax": lambda input, dim: torch_is_shorter(input, 1 << 15, 1 << 18),
    "log_softmax": lambda input, dim: torch_is_shorter(input, 1 << 15, 1 << 18),
    "cross_entropy": lambda input, *_: torch_is_shorter(input, 1 << 16, 1 << 17),
    "nll_loss": lambda input, *_: torch_is_shorter(input, 1 << 16, 1 << 17),
    "mse_loss": lambda input, *_: torch_is_shorter(input, 0, 1 << 16),
}
