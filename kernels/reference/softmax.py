"""Softmax and the losses as plain maths: what the fast kernels must equal. Differentiable any number of times."""

import torch
from torch import Tensor

from .matmul import linear, matmul


def _below_maximum(input: Tensor, dim: int) -> Tensor:
    """input - max along dim, exact near the maximum however large that is; NaN in a row of NaN, of Inf, of -Inf only.

    Neither softmax changes when all of a line is moved, so no gradient goes through the maximum.
    """
    return input - input.detach().amax(dim, keepdim=True) if input.numel() else input


def softmax(input: Tensor, dim: int) -> Tensor:
    e = torch.exp(_below_maximum(input, dim))
    return e / e.sum(dim, keepdim=True)


def log_softmax(input: Tensor, dim: int) -> Tensor:
    below = _below_maximum(input, dim)
    return below - torch.log(torch.exp(below).sum(dim, keepdim=True))


def softmax_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    return output * (grad - (grad * output).sum(dim, keepdim=True))


def log_softmax_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    return grad - torch.exp(output) * grad.sum(dim, keepdim=True)


def _reduce(loss: Tensor, reduction: str, total: Tensor | float | int) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / total if reduction == "mean" else loss.sum()


def _classes_last(t: Tensor) -> Tensor:
    """(C) and (N, C, d1, …) with the classes moved to the last dimension."""
    return t if t.dim() == 1 else t.movedim(1, -1)


def _classes_back(t: Tensor) -> Tensor:
    return t if t.dim() == 1 else t.movedim(-1, 1)


def _target_weights(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> Tensor:
    """q in loss = -Σ q·log p, classes last: the target as a distribution, smoothed, times the class weights."""
    classes = input.shape[0 if input.dim() == 1 else 1]
    if target.is_floating_point():
        q = _classes_last(target)
    else:
        kept = target != ignore_index
        q = torch.nn.functional.one_hot(torch.where(kept, target, 0), classes).to(input.dtype) * kept.unsqueeze(-1)
    total = q.sum(-1, keepdim=True) if not target.is_floating_point() else 1.0
    q = q * (1 - smoothing) + smoothing / classes * total
    return q if weight is None else q * weight


def _mean_over(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor | float:
    """What reduction="mean" divides by: the rows for probabilities, else the summed weights of the target classes."""
    if target.is_floating_point():
        return target.numel() / max(1, input.shape[0 if input.dim() == 1 else 1])
    kept = target != ignore_index
    each = torch.ones_like(target, dtype=input.dtype) if weight is None else weight[torch.where(kept, target, 0)]
    return (each * kept).sum()


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The loss, and in float64 the log-sum-exp of each row in two parts: (2, …), the maximum and the rest."""
    x = _classes_last(input)
    q = _target_weights(input, target, weight, ignore_index, label_smoothing)
    logs = log_softmax(x, -1)
    loss = -torch.where(q == 0, torch.zeros_like(logs), q * logs).sum(-1)
    wide = x.detach().double()
    top = wide.amax(-1) if wide.numel() else wide.sum(-1)
    lse = torch.stack([top, torch.logsumexp(wide - top.unsqueeze(-1), -1)])
    return _reduce(loss, reduction, _mean_over(input, target, weight, ignore_index)), lse


def cross_entropy_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    q = _target_weights(input, target, weight, ignore_index, label_smoothing)
    p = torch.softmax(_classes_last(input), -1)  # not from lse, so that the second derivative sees it
    scale = grad / _mean_over(input, target, weight, ignore_index) if reduction == "mean" else grad
    return _classes_back(scale.unsqueeze(-1) * (p * q.sum(-1, keepdim=True) - q))


def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    q = _target_weights(input, target, weight, ignore_index, 0.0)
    x = _classes_last(input)
    loss = -torch.where(q == 0, torch.zeros_like(x), q * x).sum(-1)
    return _reduce(loss, reduction, _mean_over(input, target, weight, ignore_index))


def nll_loss_backward(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    q = _target_weights(input, target, weight, ignore_index, 0.0)
    scale = grad / _mean_over(input, target, weight, ignore_index) if reduction == "mean" else grad
    return _classes_back(-scale.unsqueeze(-1) * q)


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return _reduce((input - target) ** 2, reduction, input.numel())


def mse_loss_backward(grad: Tensor, input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    scale = grad / input.numel() if reduction == "mean" else grad
    return scale * 2 * (input - target)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    gradients: bool = False,
) -> tuple[Tensor, ...]:
    """The loss, what it was divided by, and, if wanted, the gradients of the rows' losses' sum by input, weight and bias."""
    logits = linear(input, weight, bias)
    loss, lse = cross_entropy(logits, target, class_weight, ignore_index, reduction, label_smoothing)
    mean = _mean_over(logits, target, class_weight, ignore_index) if reduction == "mean" else 1.0
    total = torch.as_tensor(mean, dtype=logits.dtype, device=logits.device)
    if not gradients:
        return loss, total, *(input.new_empty(0) for _ in range(3))
    d = cross_entropy_backward(torch.ones_like(total), logits, target, class_weight, lse, ignore_index, "sum", label_smoothing)
    return loss, total, *_linear_gradients(d, input, weight, bias)


def _linear_gradients(d: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    rows, inputs = d.reshape(-1, len(weight)), input.reshape(-1, weight.shape[1])
    return matmul(d, weight), matmul(rows.mT, inputs), rows.sum(0) if bias is not None else rows.new_empty(0)


def linear_cross_entropy_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    logits = linear(input, weight, bias)
    d = cross_entropy_backward(
        grad, logits, target, class_weight, logits, ignore_index, reduction, label_smoothing
    )
    return _linear_gradients(d, input, weight, bias)
