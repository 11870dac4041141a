"""A linear layer and the cross-entropy of its outputs, without the array of all logits, on CPU and GPU alike.

Rows are taken a chunk at a time: the chunk's logits are made, judged, and, where gradients are wanted, turned into their own
gradient, which is multiplied into those of input, weight and bias before the next chunk takes its room. So a training step is
three products, as it is with all logits; a chunk or two and the weight's gradient are the extra memory. Hsu et al. 2024, "Liger
Kernel", section 3.2; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", on why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_LEAST = 64  # rows of a chunk, at least
_ENOUGH = 4096, 256 << 20  # rows, and bytes: no chunk has more of both, as long ones cost memory and gain nothing


class Steps(NamedTuple):
    """What a backend does it with: host functions of its kernels, and the bytes of a chunk's logits, at most."""

    linear: Callable[..., None]
    matmul: Callable[..., None]
    add_product: Callable[[Tensor, Tensor, Tensor, bool], None]  # total, a, b, whether total is yet to be written
    cross_entropy: Callable[..., None]
    cross_entropy_backward: Callable[..., None]
    chunk: int
    in_place: bool  # whether the loss's backward may write over the logits


def _run(steps: Steps, each: Tensor | None, grads: Sequence[Tensor], factor: Tensor | None, input: Tensor, weight: Tensor,
         bias: Tensor | None, target: Tensor, class_weight: Tensor | None, ignore_index: int, smoothing: float) -> None:
    """Each row's loss, and the gradients of factor · loss, summed over rows, by input, weight and bias, unless grads is empty."""
    rows, classes = len(input), len(weight)
    row = classes * input.itemsize
    number = -(-rows * row // min(steps.chunk, max(_ENOUGH[0] * row, _ENOUGH[1])))
    size = min(rows, max(_LEAST, -(-rows // number // _LEAST) * _LEAST))
    room, one = input.new_empty(size, classes), input.new_ones(())
    other = room if steps.in_place or not grads else torch.empty_like(room)
    for at in range(0, rows, size):
        chunk = slice(at, at + size)
        x, t = input[chunk], target[chunk]
        logits = room[: len(x)]
        lse = input.new_empty(2, len(x), dtype=torch.float64)
        steps.linear(logits, x, weight, bias, None, None)
        losses = input.new_empty(len(x)) if each is None else each[chunk]
        steps.cross_entropy((losses, lse), logits, t, class_weight, ignore_index, "none", smoothing)
        if grads:
            by_input, by_weight, by_bias = grads
            slopes = other[: len(x)]
            steps.cross_entropy_backward(slopes, one, logits, t, class_weight, lse, ignore_index, "sum", smoothing)
            if factor is not None:
                slopes.mul_(factor[chunk, None])
            steps.matmul(by_input[chunk], slopes, weight)
            steps.add_product(by_weight, slopes.mT, x, at == 0)
            if bias is not None:
                sums = slopes.sum(0, dtype=by_bias.dtype)
                by_bias.copy_(sums if at == 0 else by_bias + sums)


def total_weight(input: Tensor, weight: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean divides by: the weights of the rows' classes, summed; in float32 at least."""
    wide = torch.promote_types(input.dtype, torch.float32)
    kept = target != ignore_index
    if class_weight is None:
        return kept.sum(dtype=wide)
    return (class_weight.to(wide)[target.clamp(0, len(weight) - 1)] * kept).sum()


def forward(steps: Steps, out: Sequence[Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
            class_weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float, gradients: bool) -> None:
    """out = (the loss, what it was divided by, the gradients of the losses' sum by input, weight and bias, if wanted)"""
    loss, total, *grads = out
    rows = input.numel() // input.shape[-1]
    if not rows:
        loss.fill_(float("nan") if reduction == "mean" else 0.0)
        for t in (total, *grads):
            t.zero_()
        return
    each = loss.view(rows) if reduction == "none" else input.new_empty(rows)
    if gradients:
        grads[0] = grads[0].view(rows, -1)
    _run(steps, each, grads if gradients else [], None, input.reshape(rows, -1), weight, bias, target.reshape(rows), class_weight,
         ignore_index, smoothing)
    total.fill_(1.0)
    if reduction == "mean":
        total.copy_(total_weight(input, weight, target, class_weight, ignore_index))
    if reduction != "none":
        loss.copy_(each.sum(dtype=total.dtype) / total)


def backward(steps: Steps, out: Sequence[Tensor], grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None,
             target: Tensor, class_weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float) -> None:
    """out = the gradients by input, weight and bias, of a reduced loss or of each row's"""
    rows = input.numel() // input.shape[-1]
    if not rows:
        for t in out:
            t.zero_()
        return
    wide = torch.promote_types(input.dtype, torch.float32)
    factor = grad.to(wide)
    if reduction == "mean":
        factor = mean_factor(factor, total_weight(input, weight, target, class_weight, ignore_index))
    sums = [t if t.dtype == wide else t.new_empty(t.shape, dtype=wide) for t in out[1:]]
    _run(steps, None, [out[0].view(rows, -1), *sums], factor.expand(target.shape).reshape(rows), input.reshape(rows, -1), weight,
         bias, target.reshape(rows), class_weight, ignore_index, smoothing)
    for t, s in zip(out[1:], sums, strict=True):
        if t is not s:
            t.copy_(s)


def mean_factor(grad: Tensor, total: Tensor) -> Tensor:
    """grad / total; 0 where all rows are ignored, whose gradients are"""
    return torch.where(total == 0, 0.0, grad / total)
