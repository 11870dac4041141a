"""Batch, group, layer and root-mean-square normalisation, each with its backward. Instance normalisation is a group a
channel.

Besides their result the ops give what they normalised by, in float64: the backward needs it, and so does who keeps
running statistics. Those are the caller's to update: an op changes nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.kernels.reference import norm as reference

from ._operator import FLOATING, Operator
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
    reason = _check_channels("group_norm", input, weight=weight, bias=bias)
    if groups <= 0:
        raise (RuntimeError if groups else ZeroDivisionError)(f"group_norm(): num_groups must be greater than zero, got {groups}")
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
    return grad_input, *_parameter_gradients(ctx, sums), None, None


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
    autocast="float32 on cuda",
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
        input.new_empty((2, input.shape[1]), dtype=torch.float64),
    ),
    torch=reference.group_norm_backward,
)


# layer_norm and rms_norm: of rows, the last dimensions. add_layer_norm and add_rms_norm normalise a sum, and give it too.


def _check_rows(
    op: str, input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None = None
) -> str | None:
    dims, dtype, given = len(shape), input.dtype, {"weight": weight, "bias": bias}
    if (
        dims
        and input.shape[-dims:] == shape
        and dtype in FLOATING
        and (weight is None or (weight.shape == shape and weight.dtype is dtype))
        and (bias is None or (bias.shape == shape and bias.dtype is dtype))
        and input.numel()
    ):
        return None
    if dims == 0:
        raise RuntimeError(f"{op}(): Expected normalized_shape to be at least 1-dimensional, but got normalized_shape = []")
    for name, t in given.items():
        if t is not None and tuple(t.shape) != tuple(shape):
            raise RuntimeError(
                f"{op}(): Expected {name} to be of same shape as normalized_shape, but got {name} of shape "
                f"{tuple(t.shape)} and normalized_shape = {tuple(shape)}"
            )
    if input.dim() < dims or tuple(input.shape[-dims:]) != tuple(shape):
        short = op.endswith("rms_norm") and input.dim() < dims  # torch has another type for it
        raise (ValueError if short else RuntimeError)(
            f"{op}(): Given normalized_shape={tuple(shape)}, expected input with shape (*, "
            f"{', '.join(map(str, shape))}), but got input of size {tuple(input.shape)}"
        )
    if input.numel() == 0:
        return "an empty input has no moments"
    for name, t in given.items():
        if t is not None and t.dtype != input.dtype and not (input.itemsize == 2 and t.dtype == torch.float32):
            return f"{name} of dtype {t.dtype} beside input of {input.dtype} is torch's to judge"
    return only_torch(input.dtype)


def _check_like(op: str, name: str, t: Tensor | None, input: Tensor) -> None:
    if t is not None and (t.shape != input.shape or t.dtype != input.dtype):
        raise RuntimeError(
            f"{op}(): {name} must have input's shape {tuple(input.shape)} and dtype {input.dtype}, got {tuple(t.shape)} and "
            f"{t.dtype}"
        )


def _torch_rows(centred: bool, input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Any, eps: float) -> Tensor:
    if centred:
        return torch.layer_norm(input, shape, weight, bias, eps)
    y = F.rms_norm(input, shape, weight, eps)
    return y if bias is None else y + bias.to(y.dtype)


def _make_rows(name: str, centred: bool) -> tuple[Operator, Operator, Operator]:
    """layer_norm or rms_norm; that of a sum; and the backward of both."""

    def stats_shape(input: Tensor, shape: Sequence[int]) -> list[int]:
        return [2 if centred else 1, *input.shape[: input.dim() - len(shape)]]

    def stats_of(input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], eps: float) -> Tensor:
        if input.numel() == 0:
            return empty_stats(input, shape)
        stats: Tensor = getattr(reference, name)(input.detach().double(), None, None, shape, eps)[1]
        return stats

    def save(ctx: Any, parameters: Any, x: Tensor, stats: Tensor) -> None:
        weight, bias, *ctx.rest = parameters
        ctx.dtypes = _dtypes(weight, bias)
        ctx.save_for_backward(x, weight, stats)

    def gradients(ctx: Any, grad: Tensor, more: Tensor | None, tensors: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        result, sums = backward.call(grad, *ctx.saved_tensors, more, *ctx.rest, ctx.backend)
        weight, bias = ctx.needs_input_grad[tensors : tensors + 2]
        return result, sums[0].to(ctx.dtypes[0]) if weight else None, sums[1].to(ctx.dtypes[1]) if bias else None

    def of_sum(ctx: Any, grad: Tensor, more: Tensor | None) -> tuple[Tensor | None, ...]:
        result, weight, bias = gradients(ctx, grad, more, 2)
        return result, result, weight, bias, None, None

    def sum_by_torch(input: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        total = input + residual
        return _torch_rows(centred, total, *rest), total

    def check_sum(input: Tensor, residual: Tensor, weight: Any, bias: Any, shape: Sequence[int], eps: float) -> str | None:
        reason = _check_rows(name, input, shape, weight, bias)
        _check_like(name, "residual", residual, input)
        return reason

    def check_backward(
        grad: Tensor, input: Tensor, weight: Any, stats: Tensor, more: Any, shape: Sequence[int], eps: float
    ) -> str | None:
        reason = _check_rows(f"{name}_backward", input, shape, weight)
        _check_like(f"{name}_backward", "grad", grad, input)
        _check_like(f"{name}_backward", "more", more, input)
        if list(stats.shape) != stats_shape(input, shape) or stats.dtype != torch.float64:
            raise RuntimeError(
                f"{name}_backward(): stats must be float64 {stats_shape(input, shape)}, got {stats.dtype} {tuple(stats.shape)}"
            )
        return reason

    def backward_by_torch(*args: Any) -> tuple[Tensor, Tensor]:
        dtype = args[1].dtype
        wide = (t.float() if isinstance(t, Tensor) and t.itemsize == 2 else t for t in args)
        result, sums = getattr(reference, f"{name}_backward")(*wide)
        return result.to(dtype), sums

    contiguous = torch.contiguous_format

    def like(input: Tensor) -> Tensor:
        return torch.empty_like(input, memory_format=contiguous)

    def empty_stats(input: Tensor, shape: Sequence[int]) -> Tensor:
        return torch.empty(stats_shape(input, shape), dtype=torch.float64, device=input.device)

    forward = Operator(
        f"{name}(Tensor input, Tensor? weight, Tensor? bias, SymInt[] shape, float eps) -> (Tensor, Tensor)",
        "norm",
        check=lambda input, weight, bias, shape, eps: _check_rows(name, input, shape, weight, bias),
        allocate=lambda plan, input, weight, bias, shape, eps: (like(input), empty_stats(input, shape)),
        torch=lambda *args: _torch_rows(centred, *args),
        extra=stats_of,
        autocast="float32 on cuda" if centred else None,
        save=lambda ctx, args, out: save(ctx, args[1:], args[0], out[1]),
        backward=lambda ctx, grad: (*gradients(ctx, grad, None, 1), None, None),
    )
    added = Operator(
        f"add_{name}(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, SymInt[] shape, float eps)"
        " -> (Tensor, Tensor, Tensor)",
        "norm",
        check=check_sum,
        allocate=lambda plan, input, residual, weight, bias, shape, eps: (
            like(input),
            like(input),
            empty_stats(input, shape),
        ),
        torch=sum_by_torch,
        extra=lambda input, residual, *rest: stats_of(input + residual, *rest),
        visible=2,
        save=lambda ctx, args, out: save(ctx, args[2:], out[1], out[2]),
        backward=of_sum,
    )
    backward = Operator(
        f"{name}_backward(Tensor grad, Tensor input, Tensor? weight, Tensor stats, Tensor? more, SymInt[] shape, float eps)"
        " -> (Tensor, Tensor)",
        "norm",
        check=check_backward,
        allocate=lambda plan, grad, input, weight, stats, more, shape, eps: (
            like(input),
            input.new_empty((2, *shape), dtype=torch.promote_types(input.dtype, torch.float32)),
        ),
        torch=backward_by_torch,
    )
    return forward, added, backward


layer_norm, add_layer_norm, layer_norm_backward = _make_rows("layer_norm", True)
rms_norm, add_rms_norm, rms_norm_backward = _make_rows("rms_norm", False)
