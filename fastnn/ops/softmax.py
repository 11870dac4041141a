"""Softmax, log-softmax and the losses (one of them with the linear layer before it), each with its backward.

cross_entropy keeps each row's log-sum-exp for its backward, so that the probabilities are never stored.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.kernels.linear_loss import mean_factor
from fastnn.kernels.reference import softmax as reference

from ._operator import Operator
from .activation import aten, check_dim, check_grad, only_torch

REDUCTIONS = ("none", "mean", "sum")  # at the index that aten calls them by


# softmax and log_softmax


def _make(name: str) -> tuple[Operator, Operator]:
    """softmax or log_softmax, and its backward from its output."""

    def check(input: Tensor, dim: int) -> str | None:
        check_dim(name, input.dim(), dim)
        return only_torch(input.dtype)

    def check_backward(grad: Tensor, output: Tensor, dim: int) -> str | None:
        check_dim(name, output.dim(), dim)
        return check_grad(f"{name}_backward", grad, output.shape, output.dtype)

    def allocate(plan: None, input: Tensor, dim: int) -> Tensor:
        return torch.empty_like(input, memory_format=torch.contiguous_format)

    def save(ctx: Any, args: Any, out: Tensor) -> None:
        ctx.dim = args[1]
        ctx.save_for_backward(out)

    forward = Operator(
        f"{name}(Tensor input, int dim) -> Tensor",
        "softmax",
        check=check,
        allocate=allocate,
        torch=getattr(torch, name),
        autocast="float32 on cuda",
        save=save,
        backward=lambda ctx, grad: (backward.call(grad, *ctx.saved_tensors, ctx.dim, ctx.backend), None),
    )
    from_output = getattr(aten, f"_{name}_backward_data")
    backward = Operator(
        f"{name}_backward(Tensor grad, Tensor output, int dim) -> Tensor",
        "softmax",
        check=check_backward,
        allocate=lambda plan, grad, output, dim: allocate(plan, output, dim),
        torch=lambda grad, output, dim: from_output(grad, output, dim, output.dtype),
    )
    return forward, backward


softmax, softmax_backward = _make("softmax")
log_softmax, log_softmax_backward = _make("log_softmax")


# cross_entropy and nll_loss


def check_reduction(op: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}(): {reduction} is not a valid value for reduction, allowed are {', '.join(REDUCTIONS)}")


def _loss_shape(rows: Sequence[int], reduction: str) -> Sequence[int]:
    return rows if reduction == "none" else ()


def _rows(shape: Sequence[int]) -> list[int]:
    """The shape of the rows that a loss classifies: (N, d1, …), or () for a single one."""
    return [*shape[:1], *shape[2:]] if len(shape) > 1 else []


def _classes(shape: Sequence[int]) -> int:
    return shape[1 if len(shape) > 1 else 0]


def _check_loss(
    op: str, shape: Sequence[int], dtype: torch.dtype, target: Tensor, weight: Tensor | None, reduction: str
) -> str | None:
    """What the losses of classes ask of their arguments alike; shape, dtype: those of the logits."""
    check_reduction(op, reduction)
    if not shape:
        raise ValueError(f"{op}(): input must have 1 or more dimensions, (C), (N, C) or (N, C, d1, …), got a scalar")
    classes, rows = _classes(shape), _rows(shape)
    if weight is not None and tuple(weight.shape) != (classes,):
        raise RuntimeError(
            f"{op}(): weight tensor should be defined for all {classes} classes of input or none, got shape "
            f"{tuple(weight.shape)}"
        )
    if not target.is_floating_point():
        if target.dtype not in (torch.int64, torch.uint8):
            raise RuntimeError(
                f"{op}(): target must have dtype torch.int64 (or uint8) for class indices, got {target.dtype}"
            )
        if not rows and target.shape == (1,):
            return "the class of a single row as a vector is served by torch"
        if list(target.shape) != rows:
            batch = len(shape) > 1 and target.dim() > 0 and target.shape[0] != shape[0]
            raise (ValueError if batch else RuntimeError)(
                f"{op}(): target of class indices must have shape {tuple(rows)} for input {tuple(shape)}, "
                f"got {tuple(target.shape)}"
            )
        if target.dtype == torch.uint8:
            return "target of dtype uint8 has no fastnn kernel"
    if weight is not None and weight.dtype != dtype:
        if target.is_floating_point():
            return "a weight of another dtype than input is promoted by torch"
        raise RuntimeError(f"{op}(): weight must have input's dtype {dtype}, got {weight.dtype}")
    if weight is not None and weight.requires_grad:
        return "a weight that requires a gradient is differentiated by torch, or refused"
    if not classes:
        return "there are no classes"
    return only_torch(dtype)


def _inspect_indices(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError if a class index is out of range."""
    if target.is_floating_point() or target.numel() == 0:
        return
    low, high = (int(bound) for bound in target.aminmax())
    if low < 0 or high >= classes:  # allowed only for the index to ignore
        wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
        if wrong.numel():
            raise IndexError(
                f"{op}(): Target {int(wrong[0])} is out of bounds: target must be in [0, {classes}) or equal "
                f"ignore_index, {ignore_index}"
            )


def _check_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> str | None:
    if label_smoothing > 1:
        raise RuntimeError(f"cross_entropy(): label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not label_smoothing >= 0:
        return "torch takes a label_smoothing below 0, or NaN, for none"
    if target.shape == input.shape:
        if not target.is_floating_point():
            raise RuntimeError(
                f"cross_entropy(): Expected floating point type for target with class probabilities, got {target.dtype}"
            )
        if ignore_index >= 0:
            raise RuntimeError(
                f"cross_entropy(): ignore_index is for class indices, not probabilities: got {ignore_index}"
            )
    elif target.is_floating_point():
        raise RuntimeError(
            f"cross_entropy(): target of class probabilities must have input's shape {tuple(input.shape)}, or dtype "
            f"torch.int64 for class indices, got {tuple(target.shape)} and {target.dtype}"
        )
    reason = _check_loss("cross_entropy", input.shape, input.dtype, target, weight, reduction)
    if reason is None and target.is_floating_point():
        if target.dtype != input.dtype:
            return "class probabilities of another dtype than input are promoted by torch"
        if target.requires_grad:
            return "class probabilities that require a gradient are differentiated by torch"
    return reason


def _allocate_cross_entropy(
    plan: None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    rows = _rows(input.shape)
    loss = input.new_empty(rows if reduction == "none" else [])
    return loss, input.new_empty((2, *rows), dtype=torch.float64)


def _log_sum_exp(input: Tensor, *_: Any) -> Tensor:
    """log Σ exp(input) in two parts, the maximum and the rest: no dtype has the bits for their sum where the maximum is large."""
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    dim = 1 if input.dim() > 1 else 0
    top = wide.amax(dim, keepdim=True) if input.numel() else wide.new_zeros(()).expand_as(wide.sum(dim, keepdim=True))
    return torch.stack([top.squeeze(dim), (wide - top).logsumexp(dim)]).double()


def _save_cross_entropy(ctx: Any, args: Any, out: tuple[Tensor, Tensor]) -> None:
    input, target, weight, *ctx.rest = args
    ctx.save_for_backward(input, target, weight, out[1])


def _cross_entropy_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_input = cross_entropy_backward.call(grad, *ctx.saved_tensors, *ctx.rest, ctx.backend)
    return grad_input, None, None, None, None, None


cross_entropy: Operator = Operator(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index, str reduction, float label_smoothing)"
    " -> (Tensor, Tensor)",
    "softmax",
    check=_check_cross_entropy,
    explain=lambda input, target, weight, ignore_index, *_: _inspect_indices(
        "cross_entropy", target, _classes(input.shape), ignore_index
    ),
    allocate=_allocate_cross_entropy,
    torch=lambda input, target, weight, ignore_index, reduction, label_smoothing: F.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    ),
    extra=_log_sum_exp,
    save=_save_cross_entropy,
    backward=_cross_entropy_gradient,
    autocast="float32",
)



def _check_cross_entropy_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> str | None:
    reason = _check_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    if list(lse.shape) != [2, *_rows(input.shape)] or lse.dtype != torch.float64:
        raise RuntimeError(
            f"cross_entropy_backward(): lse must have shape {(2, *_rows(input.shape))} and dtype torch.float64, got "
            f"{tuple(lse.shape)} and {lse.dtype}"
        )
    return reason or check_grad("cross_entropy_backward", grad, _loss_shape(_rows(input.shape), reduction), input.dtype)


cross_entropy_backward: Operator = Operator(
    "cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor lse, int ignore_index,"
    " str reduction, float label_smoothing) -> Tensor",
    "softmax",
    check=_check_cross_entropy_backward,
    allocate=lambda plan, grad, input, *_: input.new_empty(input.shape),
    torch=reference.cross_entropy_backward,
)


def _check_nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> str | None:
    if target.is_floating_point():
        raise RuntimeError(f"nll_loss(): target must hold class indices, of dtype torch.int64, got {target.dtype}")
    return _check_loss("nll_loss", input.shape, input.dtype, target, weight, reduction)


def _save_nll_loss(ctx: Any, args: Any, out: Tensor) -> None:
    input, target, weight, *ctx.rest = args
    ctx.save_for_backward(input, target, weight)


nll_loss: Operator = Operator(
    "nll_loss(Tensor input, Tensor target, Tensor? weight, int ignore_index, str reduction) -> Tensor",
    "softmax",
    check=_check_nll_loss,
    explain=lambda input, target, weight, ignore_index, reduction: _inspect_indices(
        "nll_loss", target, _classes(input.shape), ignore_index
    ),
    allocate=lambda plan, input, target, weight, ignore_index, reduction: input.new_empty(
        _rows(input.shape) if reduction == "none" else []
    ),
    torch=lambda input, target, weight, ignore_index, reduction: F.nll_loss(
        input, target, weight, ignore_index=ignore_index, reduction=reduction
    ),
    save=_save_nll_loss,
    backward=lambda ctx, grad: (
        nll_loss_backward.call(grad, *ctx.saved_tensors, *ctx.rest, ctx.backend),
        *[None] * 4,
    ),
    autocast="float32",
)


def _check_nll_loss_backward(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> str | None:
    reason = _check_nll_loss(input, target, weight, ignore_index, reduction)
    return reason or check_grad("nll_loss_backward", grad, _loss_shape(_rows(input.shape), reduction), input.dtype)


nll_loss_backward: Operator = Operator(
    "nll_loss_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, int ignore_index, str reduction)"
    " -> Tensor",
    "softmax",
    check=_check_nll_loss_backward,
    allocate=lambda plan, grad, input, *_: input.new_empty(input.shape),
    torch=reference.nll_loss_backward,
)


# linear_cross_entropy: a linear layer and the cross-entropy of its outputs, without the array of all logits
#
# The forward makes the gradients of the losses' sum on its way where they will be wanted (`gradients`), as no logits
# are kept to make them of; the backward multiplies them. Where each row's loss has a gradient of its own, and for a
# double backward, the logits are computed again.

_LINEAR_TENSORS = "Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight"
_LINEAR_OPTIONS = "int ignore_index, str reduction, float label_smoothing"


def _check_linear_loss(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, ignore_index: int,
    reduction: str, label_smoothing: float, gradients: bool = False,
) -> str | None:  # fmt: skip
    name = "linear_cross_entropy"
    if input.dim() not in (1, 2) or weight.dim() < 2 or input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"{name}(): input must be (in_features) or (N, in_features) and linear_weight (classes, …, in_features), got "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    for word, t in (("linear_weight", weight), ("linear_bias", bias)):
        if t is not None and t.dtype != input.dtype:
            raise RuntimeError(f"{name}(): {word} must have input's dtype {input.dtype}, got {t.dtype}")
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(
            f"{name}(): linear_bias must have shape {tuple(weight.shape[:-1])} for linear_weight {tuple(weight.shape)}, got "
            f"{tuple(bias.shape)}"
        )
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"{name}(): label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if weight.dim() > 2:
        return "losses of several dimensions hold their logits"
    if target.is_floating_point():
        return "class probabilities are as large as the logits"
    if not weight.numel():
        return "nothing to multiply"
    return _check_loss(name, (*input.shape[:-1], len(weight)), input.dtype, target, class_weight, reduction)


def _allocate_linear_loss(
    plan: None, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    ignore_index: int, reduction: str, label_smoothing: float, gradients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.promote_types(input.dtype, torch.float32)
    loss = input.new_empty(target.shape if reduction == "none" else ())
    grads = [input.new_empty(0), *(input.new_empty(0, dtype=wide) for _ in range(2))]
    if gradients:  # those that are sums over rows in float32 at least
        grads[0] = input.new_empty(input.shape)
        grads[1] = input.new_empty(weight.shape, dtype=wide)
        grads[2] = input.new_empty(0 if bias is None else bias.shape, dtype=wide)
    return loss, input.new_empty((), dtype=wide), *grads


def _linear_loss_by_torch(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, ignore_index: int,
    reduction: str, label_smoothing: float, gradients: bool,
) -> Tensor:  # fmt: skip
    logits = F.linear(input, weight.flatten(0, -2), None if bias is None else bias.flatten())
    return F.cross_entropy(
        logits.reshape(*input.shape[:-1], *weight.shape[:-1]), target, class_weight, ignore_index=ignore_index,
        reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip


def _linear_loss_extra(*args: Any) -> tuple[Tensor, ...]:
    promised = _allocate_linear_loss(None, *args)[1:]
    if isinstance(_check_linear_loss(*args), str):
        return promised
    with torch.no_grad():
        return tuple(r.to(p.dtype) for p, r in zip(promised, reference.linear_cross_entropy(*args)[1:], strict=True))


def _save_linear_loss(ctx: Any, args: Any, out: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ignore_index, ctx.reduction, ctx.label_smoothing, ctx.gradients = args
    ctx.save_for_backward(*tensors, *out[1:])


def _linear_loss_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, target, class_weight, total, *grads = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if ctx.gradients and ctx.reduction != "none" and not torch.is_grad_enabled():
        factor = mean_factor(grad.to(total.dtype), total)
        room = [g.new_empty(g.shape, dtype=input.dtype) if needed else None for g, needed in zip(grads, needs)]
        found = [None if out is None else torch.mul(g, factor, out=out) for g, out in zip(grads, room)]  # rounded as it is made
    else:
        made = linear_cross_entropy_backward.call(
            grad, input, weight, bias, target, class_weight, ctx.ignore_index, ctx.reduction, ctx.label_smoothing, ctx.backend
        )
        found = [g if needed else None for g, needed in zip(made, needs)]
    return (*found, *[None] * 6)


linear_cross_entropy: Operator = Operator(
    f"linear_cross_entropy({_LINEAR_TENSORS}, {_LINEAR_OPTIONS}, bool gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "softmax",
    check=_check_linear_loss,
    explain=lambda input, weight, bias, target, class_weight, ignore_index, *_: _inspect_indices(
        "linear_cross_entropy", target, len(weight), ignore_index
    ),
    allocate=_allocate_linear_loss,
    torch=_linear_loss_by_torch,
    extra=_linear_loss_extra,
    save=_save_linear_loss,
    backward=_linear_loss_gradients,
    autocast="lower",
)


def _check_linear_loss_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    ignore_index: int, reduction: str, label_smoothing: float,
) -> str | None:  # fmt: skip
    reason = _check_linear_loss(input, weight, bias, target, class_weight, ignore_index, reduction, label_smoothing)
    shape = _loss_shape(target.shape, reduction)
    return reason or check_grad("linear_cross_entropy_backward", grad, shape, input.dtype)


linear_cross_entropy_backward: Operator = Operator(
    f"linear_cross_entropy_backward(Tensor grad, {_LINEAR_TENSORS}, {_LINEAR_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    "softmax",
    check=_check_linear_loss_backward,
    allocate=lambda plan, grad, input, weight, bias, *_: (
        input.new_empty(input.shape),
        input.new_empty(weight.shape),
        input.new_empty(0 if bias is None else bias.shape),
    ),
    torch=reference.linear_cross_entropy_backward,
)


# mse_loss


def _check_mse_loss(input: Tensor, target: Tensor, reduction: str) -> str | None:
    check_reduction("mse_loss", reduction)
    if input.shape != target.shape:
        raise RuntimeError(
            f"mse_loss(): target must have input's shape {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if input.dtype != target.dtype:
        return "input and target of different dtypes are promoted by torch"
    return only_torch(input.dtype)


def _save_mse_loss(ctx: Any, args: Any, out: Tensor) -> None:
    input, target, ctx.reduction = args
    ctx.save_for_backward(input, target)


def _mse_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_input = mse_loss_backward.call(grad, *ctx.saved_tensors, ctx.reduction, ctx.backend)
    needs_input, needs_target = ctx.needs_input_grad[:2]
    return grad_input if needs_input else None, -grad_input if needs_target else None, None


mse_loss: Operator = Operator(
    "mse_loss(Tensor input, Tensor target, str reduction) -> Tensor",
    "softmax",
    check=_check_mse_loss,
    allocate=lambda plan, input, target, reduction: (
        torch.empty_like(input) if reduction == "none" else input.new_empty([])
    ),
    torch=lambda input, target, reduction: aten.mse_loss(input, target, REDUCTIONS.index(reduction)),
    save=_save_mse_loss,
    backward=_mse_gradients,
    autocast="float32",
)


def _check_mse_loss_backward(grad: Tensor, input: Tensor, target: Tensor, reduction: str) -> str | None:
    reason = _check_mse_loss(input, target, reduction)
    return reason or check_grad("mse_loss_backward", grad, _loss_shape(input.shape, reduction), input.dtype)


mse_loss_backward: Operator = Operator(
    "mse_loss_backward(Tensor grad, Tensor input, Tensor target, str reduction) -> Tensor",
    "softmax",
    check=_check_mse_loss_backward,
    allocate=lambda plan, grad, input, target, reduction: torch.empty_like(input),
    torch=lambda grad, input, target, reduction: aten.mse_loss_backward(
        grad, input, target, REDUCTIONS.index(reduction)
    ),
)
