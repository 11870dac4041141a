"""Batch and group normalisation, each with its backward. Instance normalisation is a group a channel.

Besides their result the ops give the mean and the variance that they normalised by, in float64: the backward needs
them, and so does who keeps running statistics. Those are the caller's to update: an op changes nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.kernels.reference import norm as reference

from ._operator import Operator
from .activation import only_torch
from .pool import empty_like_format


def _check_channels(op: str, input: Tensor, **given: Tensor | None) -> str | None:
    """Each of ``given`` must have a number a channel, in input's dtype, or float32 beside a 16-bit input."""
    if input.dim() < 2:
        kind = IndexError if op == "batch_norm" else RuntimeError
        raise kind(f"{op}(): Expected at least 2 dimensions for input, (N, C, …), got shape {tuple(input.shape)}")
    channels = input.shape[1]
    for name, t in given.items():
        if t is None:
            continue
        if tuple(t.shape) != (channels,):
            raise RuntimeError(
                f"{op}(): {name} should contain {channels} elements, one for each channel of input "
                f"{tuple(input.shape)}, not {t.numel()} in shape {tuple(t.shape)}"
            )
    if input.numel() == 0:
        return "an empty input has no mean"
    for name, t in given.items():
        if t is not None and t.dtype != input.dtype and not (input.itemsize == 2 and t.dtype == torch.float32):
            return f"{name} of dtype {t.dtype} beside input of {input.dtype} is torch's to judge"
    return only_torch(input.dtype)


def _check_backward(op: str, grad: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor, shape: Any) -> str | None:
    reason = _check_channels(op, input, weight=weight)
    if grad.shape != input.shape or grad.dtype != input.dtype:
        raise RuntimeError(
            f"{op}_backward(): grad must have input's shape {tuple(input.shape)} and dtype {input.dtype}, got "
            f"{tuple(grad.shape)} and {grad.dtype}"
        )
    if tuple(stats.shape) != tuple(shape) or stats.dtype != torch.float64:
        raise RuntimeError(f"{op}_backward(): stats must be float64 {tuple(shape)}, got {stats.dtype} {tuple(stats.shape)}")
    return reason


def _parameter_gradients(ctx: Any, sums: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias, from (Σ g, Σ g x̂)."""
    _, weight, bias = ctx.needs_input_grad[:3]
    return sums[1].to(ctx.dtypes[0]) if weight else None, sums[0].to(ctx.dtypes[1]) if bias else None


def _dtypes(*tensors: Tensor | None) -> list[torch.dtype | None]:
    return [None if t is None else t.dtype for t in tensors]


# batch_norm


def _check_batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> str | None:
    if (mean is None) != (var is None):
        raise ValueError("batch_norm(): mean and var must either both be None or neither be None")
    return _check_channels("batch_norm", input, weight=weight, bias=bias, running_mean=mean, running_var=var)


def _batch_norm_by_torch(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    out = F.batch_norm(input, mean, var, weight, bias, mean is None, 0.0, eps)
    if mean is None or var is None:
        dims = [d for d in range(input.dim()) if d != 1]
        var, mean = torch.var_mean(input.detach().double(), dims, correction=0)
    return out, torch.stack([mean.detach().double(), var.detach().double()])


def _save_batch_norm(ctx: Any, args: Any, out: tuple[Tensor, Tensor]) -> None:
    input, weight, bias, mean, _, eps = args
    ctx.rest, ctx.dtypes = (mean is None, eps), _dtypes(weight, bias)
    ctx.save_for_backward(input, weight, out[1])


def _batch_norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_input, sums = batch_norm_backward.call(grad, *ctx.saved_tensors, *ctx.rest, ctx.backend)
    return grad_input, *_parameter_gradients(ctx, sums), None, None, None


batch_norm: Operator = Operator(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps) -> (Tensor, Tensor)",
    "norm",
    check=_check_batch_norm,
    allocate=lambda plan, input, *_: (
        empty_like_format(input, input.shape),
        input.new_empty((2, input.shape[1]), dtype=torch.float64),
    ),
    torch=_batch_norm_by_torch,
    save=_save_batch_norm,
    backward=_batch_norm_gradients,
)

batch_norm_backward: Operator = Operator(
    "batch_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor stats, bool training, float eps)"
    " -> (Tensor, Tensor)",
    "norm",
    check=lambda grad, input, weight, stats, *_: _check_backward(
        "batch_norm", grad, input, weight, stats, (2, input.shape[1])
    ),
    allocate=lambda plan, grad, input, *_: (
        empty_like_format(input, input.shape),
        input.new_empty((2, input.shape[1]), dtype=torch.float64),
    ),
    torch=reference.batch_norm_backward,
)


# group_norm


def _check_group_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> str | None:
    if groups <= 0:
        raise ValueError(f"group_norm(): num_groups must be greater than zero, got {groups}")
    reason = _check_channels("group_norm", input, weight=weight, bias=bias)
    if input.shape[1] % groups:
        raise RuntimeError(
            "group_norm(): Expected number of channels in input to be divisible by num_groups, but got input of shape "
            f"{tuple(input.shape)} and num_groups={groups}"
        )
    return reason


def _group_norm_by_torch(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    grouped = input.detach().double().reshape(input.shape[0], groups, input.shape[1:].numel() // groups)
    var, mean = torch.var_mean(grouped, -1, correction=0)
    return F.group_norm(input, groups, weight, bias, eps), torch.stack([mean, var])


def _save_group_norm(ctx: Any, args: Any, out: tuple[Tensor, Tensor]) -> None:
    input, weight, bias, *ctx.rest = args
    ctx.dtypes = _dtypes(weight, bias)
    ctx.save_for_backward(input, weight, out[1])


def _group_norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_input, sums = group_norm_backward.call(grad, *ctx.saved_tensors, *ctx.rest, ctx.backend)
    return grad_input, *_parameter_gradients(ctx, sums.sum(1)), None, None


group_norm: Operator = Operator(
    "group_norm(Tensor input, Tensor? weight, Tensor? bias, int groups, float eps) -> (Tensor, Tensor)",
    "norm",
    check=_check_group_norm,
    allocate=lambda plan, input, weight, bias, groups, eps: (
        empty_like_format(input, input.shape),
        input.new_empty((2, input.shape[0], groups), dtype=torch.float64),
    ),
    torch=_group_norm_by_torch,
    save=_save_group_norm,
    backward=_group_norm_gradients,
)

group_norm_backward: Operator = Operator(
    "group_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor stats, int groups, float eps)"
    " -> (Tensor, Tensor)",
    "norm",
    check=lambda grad, input, weight, stats, groups, eps: _check_backward(
        "group_norm", grad, input, weight, stats, (2, input.shape[0], groups)
    ),
    allocate=lambda plan, grad, input, *_: (
        empty_like_format(input, input.shape),
        input.new_empty((2, *input.shape[:2]), dtype=torch.float64),
    ),
    torch=reference.group_norm_backward,
)
