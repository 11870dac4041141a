"""Normalisation as plain maths: what the fast kernels must equal. Differentiable any number of times."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _along_channels(t: Tensor, like: Tensor) -> Tensor:
    """A number a channel, or a row of them for each image, as a factor of like."""
    return t.to(like.dtype).reshape(-1 if t.dim() > 1 else 1, like.shape[1], *[1] * (like.dim() - 2))


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * _along_channels(weight, x)
    return x if bias is None else x + _along_channels(bias, x)


def _less_mean(x: Tensor, mean: Tensor, dims: list[int]) -> Tensor:
    """x - mean, where mean is x's own over dims: what the mean's rounding leaves goes, too."""
    below = x - mean
    return below - below.mean(dims, keepdim=True)


def batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The normalised input and what it was normalised by: (mean, variance), the batch's own where none is given."""
    dims = [d for d in range(input.dim()) if d != 1]
    own = mean is None or var is None
    if mean is None or var is None:
        var, mean = torch.var_mean(input.double(), dims, correction=0)
    stats = torch.stack([mean.double(), var.double()])
    mean = _along_channels(stats[0], input)
    below = _less_mean(input, mean, dims) if own else input - mean
    unit = below * _along_channels(torch.rsqrt(stats[1] + eps), input)
    return _scaled(unit, weight, bias), stats.detach()


def batch_norm_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor, training: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradient of input, and of bias and weight, stacked: (2, C)."""
    dims = [d for d in range(input.dim()) if d != 1]
    if training:  # not from stats, so that the second derivative sees them
        var, mean = torch.var_mean(input, dims, correction=0)
    else:
        mean, var = stats
    rstd = _along_channels(torch.rsqrt(var + eps), input)
    unit = (_less_mean(input, _along_channels(mean, input), dims) if training else input - _along_channels(mean, input)) * rstd
    g = _scaled(grad, weight, None)
    inner = g - g.mean(dims, keepdim=True) - unit * (g * unit).mean(dims, keepdim=True) if training else g
    return inner * rstd, torch.stack([grad.sum(dims), (grad * unit).sum(dims)]).double()


def group_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The normalised input and each group's (mean, variance): (2, N, groups)."""
    grouped = input.reshape(input.shape[0], groups, -1)
    var, mean = torch.var_mean(grouped.double(), -1, correction=0)
    unit = _less_mean(grouped, mean.unsqueeze(-1).to(input.dtype), [-1]) * torch.rsqrt(var + eps).unsqueeze(-1).to(input.dtype)
    return _scaled(unit.reshape(input.shape), weight, bias), torch.stack([mean, var]).detach()


def group_norm_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradient of input, and of bias and weight: (2, C)."""
    grouped = input.reshape(input.shape[0], groups, -1)
    below = _less_mean(grouped, grouped.mean(-1, keepdim=True), [-1])
    rstd = torch.rsqrt(below.square().mean(-1, keepdim=True) + eps)
    unit = below * rstd
    g = _scaled(grad, weight, None).reshape(grouped.shape)
    inner = g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True)
    dims = [d for d in range(input.dim()) if d != 1]
    sums = [t.sum(dims) for t in (grad, grad * unit.reshape(input.shape))]
    return (inner * rstd).reshape(input.shape), torch.stack(sums).double()


# Rows: layer_norm and rms_norm


def _last(input: Tensor, shape: Sequence[int]) -> list[int]:
    return list(range(input.dim() - len(shape), input.dim()))


def _unit_rows(input: Tensor, dims: list[int], eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """The rows normalised, and what they were multiplied by; ``centred``: their mean is taken away first."""
    below = _less_mean(input, input.mean(dims, keepdim=True), dims) if centred else input
    rstd = torch.rsqrt(below.square().mean(dims, keepdim=True) + eps)
    return below * rstd, rstd


def layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """Ba, Kiros and Hinton 2016, equations 3 and 4: the normalised input, and each row's (mean, 1 / deviation)."""
    dims = _last(input, shape)
    unit, rstd = _unit_rows(input, dims, eps, True)
    y = unit if weight is None else unit * weight.to(input.dtype)
    stats = torch.stack([input.mean(dims), rstd.reshape(input.shape[: dims[0]])])
    return y if bias is None else y + bias.to(input.dtype), stats.double().detach()


def rms_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """Zhang and Sennrich 2019, equation 4: the input divided by the root of its mean square, and what it was multiplied by."""
    dims = _last(input, shape)
    unit, rstd = _unit_rows(input, dims, eps, False)
    y = unit if weight is None else unit * weight.to(input.dtype)
    return y if bias is None else y + bias.to(input.dtype), rstd.reshape(1, *input.shape[: dims[0]]).double().detach()


def add_layer_norm(input: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """layer_norm of the sum, and the sum"""
    total = input + residual
    y, stats = layer_norm(total, *rest)
    return y, total, stats


def add_rms_norm(input: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm of the sum, and the sum"""
    total = input + residual
    y, stats = rms_norm(total, *rest)
    return y, total, stats


def _rows_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, more: Tensor | None, shape: Sequence[int], eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    dims = _last(input, shape)
    unit, rstd = _unit_rows(input, dims, eps, centred)  # not from stats, so that the second derivative sees them
    g = grad if weight is None else grad * weight.to(grad.dtype)
    inner = g - unit * (g * unit).mean(dims, keepdim=True)
    if centred:
        inner = inner - g.mean(dims, keepdim=True)
    rows = list(range(dims[0]))
    sums = [t.sum(rows) if rows else t for t in (grad * unit, grad)]
    sums_type = torch.promote_types(input.dtype, torch.float32)
    result = inner * rstd
    return result if more is None else result + more, torch.stack(sums).to(sums_type)


def layer_norm_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor, more: Tensor | None, shape: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """The gradient of input, to which ``more`` is added; those of weight and bias, stacked."""
    return _rows_backward(grad, input, weight, more, shape, eps, True)


def rms_norm_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor, more: Tensor | None, shape: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """As ``layer_norm_backward``"""
    return _rows_backward(grad, input, weight, more, shape, eps, False)
