"""Activations (elementwise), PReLU, GLU and dropout, each with its backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.kernels.reference import activation as reference

from ._operator import FLOATING, Operator

aten = torch.ops.aten

# name: (number of parameters, torch's function, torch's backward from the input)
_TORCH: dict[str, tuple[int, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu": (0, F.relu, lambda g, x: aten.threshold_backward(g, x, 0)),
    "leaky_relu": (1, F.leaky_relu, lambda g, x, slope: aten.leaky_relu_backward(g, x, slope, False)),
    "relu6": (0, F.relu6, lambda g, x: aten.hardtanh_backward(g, x, 0, 6)),
    "elu": (1, F.elu, lambda g, x, alpha: aten.elu_backward(g, alpha, 1, 1, False, x)),
    "gelu": (0, F.gelu, lambda g, x: aten.gelu_backward(g, x)),
    "gelu_tanh": (
        0,
        lambda x: F.gelu(x, approximate="tanh"),
        lambda g, x: aten.gelu_backward(g, x, approximate="tanh"),
    ),
    "silu": (0, F.silu, lambda g, x: aten.silu_backward(g, x)),
    "mish": (0, F.mish, lambda g, x: aten.mish_backward(g, x)),
    "sigmoid": (0, torch.sigmoid, lambda g, x: aten.sigmoid_backward(g, torch.sigmoid(x))),
    "tanh": (0, torch.tanh, lambda g, x: aten.tanh_backward(g, torch.tanh(x))),
    "hardswish": (0, F.hardswish, lambda g, x: aten.hardswish_backward(g, x)),
    "hardsigmoid": (0, F.hardsigmoid, lambda g, x: aten.hardsigmoid_backward(g, x)),
    "hardtanh": (2, F.hardtanh, lambda g, x, low, high: aten.hardtanh_backward(g, x, low, high)),
    "softplus": (2, F.softplus, lambda g, x, beta, threshold: aten.softplus_backward(g, x, beta, threshold)),
}
PARAMETERLESS = frozenset(name for name, (count, _, _) in _TORCH.items() if count == 0)


def apply_torch(input: Tensor, name: str, params: Sequence[float]) -> Tensor:
    return _TORCH[name][1](input, *params)


def no_kernel_for(dtype: torch.dtype) -> str:
    return f"dtype {dtype} has no fastnn kernel"


def only_torch(dtype: torch.dtype) -> str | None:
    """Why only torch can serve a dtype; None if a kernel might."""
    return None if dtype in FLOATING else no_kernel_for(dtype)


# activation


def _check_activation(input: Tensor, name: str, params: Sequence[float]) -> str | None:
    if name not in _TORCH:
        raise ValueError(f"activation(): name got {name!r}, allowed are {', '.join(sorted(_TORCH))}")
    if len(params) != _TORCH[name][0]:
        raise ValueError(f"activation(): params of {name} must have {_TORCH[name][0]} numbers, got {len(params)}")
    return only_torch(input.dtype)


def check_grad(op: str, grad: Tensor, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """A kernel reads a gradient by its address: it must be the output's, of its shape and dtype. RuntimeError if not."""
    if tuple(grad.shape) != tuple(shape) or grad.dtype != dtype:
        raise RuntimeError(
            f"{op}(): grad must have shape {tuple(shape)} and dtype {dtype}, got {tuple(grad.shape)} and {grad.dtype}"
        )
    return only_torch(dtype)


def _check_activation_backward(grad: Tensor, input: Tensor, name: str, params: Sequence[float]) -> str | None:
    _check_activation(input, name, params)
    return check_grad("activation_backward", grad, input.shape, input.dtype)


def _save_activation(ctx: Any, args: Any, out: Tensor) -> None:
    input, ctx.name, ctx.params = args
    ctx.save_for_backward(input)


activation: Operator = Operator(
    "activation(Tensor input, str name, float[] params) -> Tensor",
    "activation",
    check=_check_activation,
    allocate=lambda plan, input, name, params: torch.empty_like(input),
    torch=apply_torch,
    save=_save_activation,
    public=lambda input, name, params: name.removesuffix("_tanh"),
    backward=lambda ctx, grad: (
        activation_backward.call(grad, *ctx.saved_tensors, ctx.name, ctx.params, ctx.backend),
        None,
        None,
    ),
)

activation_backward: Operator = Operator(
    "activation_backward(Tensor grad, Tensor input, str name, float[] params) -> Tensor",
    "activation",
    check=_check_activation_backward,
    allocate=lambda plan, grad, input, name, params: torch.empty_like(input),
    torch=lambda grad, input, name, params: _TORCH[name][2](grad, input, *params),
)


# prelu


def _check_prelu(input: Tensor, weight: Tensor) -> str | None:
    if weight.dim() > 1:
        raise RuntimeError(f"prelu(): weight must be a scalar or a vector, got shape {tuple(weight.shape)}")
    channels = input.shape[1] if input.dim() > 1 else 1
    if weight.numel() not in (1, channels):
        raise RuntimeError(
            f"prelu(): weight must have 1 element or one for each channel of input {tuple(input.shape)}, {channels}, "
            f"got {weight.numel()}"
        )
    if weight.dtype != input.dtype:
        raise RuntimeError(f"prelu(): weight must have input's dtype {input.dtype}, got {weight.dtype}")
    return only_torch(input.dtype)


def _check_prelu_backward(grad: Tensor, input: Tensor, weight: Tensor) -> str | None:
    _check_prelu(input, weight)
    return check_grad("prelu_backward", grad, input.shape, input.dtype)


def _prelu_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    grad_input, grad_weight = prelu_backward.call(grad, *ctx.saved_tensors, ctx.backend)
    needs_input, needs_weight = ctx.needs_input_grad[:2]
    return grad_input if needs_input else None, grad_weight if needs_weight else None


prelu: Operator = Operator(
    "prelu(Tensor input, Tensor weight) -> Tensor",
    "activation",
    check=_check_prelu,
    allocate=lambda plan, input, weight: torch.empty_like(input),
    torch=torch.prelu,
    save=lambda ctx, args, out: ctx.save_for_backward(*args),
    backward=_prelu_gradients,
    autocast="lower",
)

prelu_backward: Operator = Operator(
    "prelu_backward(Tensor grad, Tensor input, Tensor weight) -> (Tensor, Tensor)",
    "activation",
    check=_check_prelu_backward,
    allocate=lambda plan, grad, input, weight: (torch.empty_like(input), torch.empty_like(weight)),
    torch=reference.prelu_backward,
)


# glu


def check_dim(op: str, dims: int, dim: int) -> int:
    """The dimension counted from the front."""
    low, high = -max(dims, 1), max(dims, 1) - 1
    if not low <= dim <= high:
        raise IndexError(f"{op}(): dim is out of range: expected to be in [{low}, {high}], but got {dim}")
    return dim % max(dims, 1)


def _halved(input: Tensor, dim: int) -> list[int]:
    shape = list(input.shape)
    shape[dim] //= 2
    return shape


def _check_glu(input: Tensor, dim: int) -> str | None:
    if input.dim() == 0:
        raise RuntimeError("glu(): input must have at least 1 dimension, got a scalar")
    size = input.shape[check_dim("glu", input.dim(), dim)]
    if size % 2:
        raise RuntimeError(f"glu(): dimension {dim} of input {tuple(input.shape)} must be even, got {size}")
    return only_torch(input.dtype)


def _check_glu_backward(grad: Tensor, input: Tensor, dim: int) -> str | None:
    _check_glu(input, dim)
    return check_grad("glu_backward", grad, _halved(input, dim), input.dtype)


def _save_glu(ctx: Any, args: Any, out: Tensor) -> None:
    input, ctx.dim = args
    ctx.save_for_backward(input)


glu: Operator = Operator(
    "glu(Tensor input, int dim) -> Tensor",
    "activation",
    check=_check_glu,
    allocate=lambda plan, input, dim: input.new_empty(_halved(input, dim)),
    torch=F.glu,
    save=_save_glu,
    backward=lambda ctx, grad: (glu_backward.call(grad, *ctx.saved_tensors, ctx.dim, ctx.backend), None),
)

glu_backward: Operator = Operator(
    "glu_backward(Tensor grad, Tensor input, int dim) -> Tensor",
    "activation",
    check=_check_glu_backward,
    allocate=lambda plan, grad, input, dim: input.new_empty(input.shape),
    torch=lambda grad, input, dim: aten.glu_backward(grad, input, dim),
)


# dropout


def _check_dropout(input: Tensor, p: float, seed: int) -> str | None:
    if not 0 <= p <= 1:
        raise (ValueError if p == p else RuntimeError)(f"dropout(): p has to be between 0 and 1, but got {p}")
    return only_torch(input.dtype)


def _save_dropout(ctx: Any, args: Any, out: Tensor) -> None:
    _, ctx.p, ctx.seed = args


dropout: Operator = Operator(
    "dropout(Tensor input, float p, int seed) -> Tensor",
    "activation",
    check=_check_dropout,
    allocate=lambda plan, input, p, seed: torch.empty_like(input),
    torch=reference.dropout,  # torch's own draws other numbers: the seed would mean nothing
    save=_save_dropout,
    backward=lambda ctx, grad: (dropout.call(grad, ctx.p, ctx.seed, ctx.backend), None, None),
)
