"""Matrix products: matmul (mm, bmm, mv and vectors are the same op), addmm (and baddbmm), linear.

Of their gradients torch makes only what is no product: sums over broadcast batches and, for addmm, a full matrix times beta.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._operator import FLOATING, Operator
from .activation import PARAMETERLESS, activation_backward, apply_torch, no_kernel_for


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _same_dtype(op: str, **tensors: Tensor | None) -> None:
    first = next(iter(tensors))
    expected = tensors[first].dtype  # type: ignore[union-attr]
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != expected:
            raise RuntimeError(f"{op}(): {name} must have the same dtype as {first}, {expected}, got {tensor.dtype}")


def _broadcast(op: str, a: torch.Size, b: torch.Size) -> torch.Size:
    """The batch dimensions of a product."""
    if a == b or not b:
        return a
    if not a:
        return b
    try:
        return torch.broadcast_shapes(a, b)
    except RuntimeError:
        raise RuntimeError(
            f"{op}(): batch dimensions of other must broadcast with those of input, {tuple(a)}, got {tuple(b)}"
        ) from None


def sum_of_rows(rows: Tensor, backend: str | None) -> Tensor:
    """Of a matrix. On the CPU a product too: torch's sum, where it takes several threads, would hang in a forked process."""
    return rows.sum(0) if rows.is_cuda else matmul.call(rows.new_ones(rows.shape[0]), rows, backend)


# matmul


def _check_matmul(input: Tensor, other: Tensor) -> tuple[int, ...] | str:
    a, b = input.shape, other.shape
    if not a or not b:
        raise RuntimeError(
            f"matmul(): both input and other must be at least 1-dimensional, got shapes {tuple(a)} and {tuple(b)}"
        )
    inner = b[0] if len(b) == 1 else b[-2]
    if a[-1] != inner:
        raise RuntimeError(
            f"matmul(): shapes cannot be multiplied ({tuple(a)} and {tuple(b)}): the last dimension of input, {a[-1]}, "
            f"must equal the {'only' if len(b) == 1 else 'second last'} dimension of other, {inner}"
        )
    if input.dtype is not other.dtype:
        _same_dtype("matmul", input=input, other=other)
    if input.dtype not in FLOATING:
        return no_kernel_for(input.dtype)
    if len(a) == 2 and len(b) == 2:
        return a[0], b[1]
    return *_broadcast("matmul", a[:-2], b[:-2]), *a[-2:-1], *(b[-1:] if len(b) > 1 else ())


def _save_matmul(ctx: Any, args: Any, out: Tensor) -> None:
    input, other = args
    ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, other if ctx.needs_input_grad[0] else None)
    ctx.shapes = input.shape, other.shape


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    input, other = ctx.saved_tensors
    a, b = ctx.shapes
    if len(a) == 1:
        grad = grad.unsqueeze(-2 if len(b) > 1 else -1)
    if len(b) == 1:
        grad = grad.unsqueeze(-1)
    grad_input = grad_other = None
    if ctx.needs_input_grad[0]:
        other = other.unsqueeze(-1) if len(b) == 1 else other
        if len(a) <= 2 and len(b) > 2:  # every batch adds to the same matrix: one product
            grad_input = matmul.call(grad.movedim(-2, 0).flatten(1), other.mT.flatten(0, -2), ctx.backend).reshape(a)
        else:
            grad_input = matmul.call(grad, other.mT, ctx.backend).sum_to_size((1, *a) if len(a) == 1 else a).reshape(a)
    if ctx.needs_input_grad[1]:
        input = input.unsqueeze(0) if len(a) == 1 else input
        if len(b) <= 2:  # likewise
            grad_other = matmul.call(input.flatten(0, -2).mT, grad.flatten(0, -2), ctx.backend).reshape(b)
        else:
            grad_other = matmul.call(input.mT, grad, ctx.backend).sum_to_size(b)
    return grad_input, grad_other


matmul: Operator = Operator(
    "matmul(Tensor input, Tensor other) -> Tensor",
    "matmul",
    check=_check_matmul,
    torch=torch.matmul,
    save=_save_matmul,
    backward=_matmul_backward,
    autocast="lower",
)


# addmm and baddbmm


def _check_addmm(input: Tensor, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> tuple[int, ...] | str:
    dims = mat1.dim()
    op, left, right = ("addmm", "mat1", "mat2") if dims == 2 else ("baddbmm", "batch1", "batch2")
    if dims not in (2, 3) or mat2.dim() != dims:
        raise RuntimeError(
            f"{op}(): {left} and {right} must both be matrices, or both batches of them, got {_both(mat1, mat2)}"
        )
    if mat1.shape[-1] != mat2.shape[-2] or mat1.shape[:-2] != mat2.shape[:-2]:
        raise RuntimeError(f"{op}(): {left} and {right} shapes cannot be multiplied: {_both(mat1, mat2)}")
    _same_dtype(op, input=input, **{left: mat1, right: mat2})
    shape = (*mat1.shape[:-1], mat2.shape[-1])
    if not _expandable(input.shape, shape):
        raise RuntimeError(f"{op}(): input must be expandable to {shape}, got {_shape(input)}")
    return shape if input.dtype in FLOATING else no_kernel_for(input.dtype)


def _both(mat1: Tensor, mat2: Tensor) -> str:
    return f"{_shape(mat1)} and {_shape(mat2)}"


def _torch_addmm(input: Tensor, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    if not (input.is_floating_point() or input.is_complex()):  # torch refuses a float factor for integers
        beta, alpha = (int(f) if f == int(f) else f for f in (beta, alpha))
    return (torch.addmm if mat1.dim() == 2 else torch.baddbmm)(input, mat1, mat2, beta=beta, alpha=alpha)


def _save_addmm(ctx: Any, args: Any, out: Tensor) -> None:
    input, mat1, mat2, ctx.beta, ctx.alpha = args
    ctx.save_for_backward(mat1 if ctx.needs_input_grad[2] else None, mat2 if ctx.needs_input_grad[1] else None)
    ctx.shape = input.shape


def _addmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    mat1, mat2 = ctx.saved_tensors
    needs_input, needs_mat1, needs_mat2 = ctx.needs_input_grad[:3]

    def product(left: Tensor, right: Tensor) -> Tensor:
        if ctx.alpha in (0, 1):  # 0 times infinity is NaN in a gradient, but not in addmm
            found = matmul.call(left, right, ctx.backend)
            return found if ctx.alpha else found * ctx.alpha
        return addmm.call(left.new_zeros(()), left, right, 0.0, ctx.alpha, ctx.backend)

    grad_input = None
    if needs_input:
        vector = grad.dim() == 2 and ctx.shape in ((grad.shape[1],), (1, grad.shape[1]))
        summed = sum_of_rows(grad, ctx.backend).reshape(ctx.shape) if vector else grad.sum_to_size(ctx.shape)
        grad_input = summed if ctx.beta == 1 else summed * ctx.beta
    return (
        grad_input, product(grad, mat2.mT) if needs_mat1 else None, product(mat1.mT, grad) if needs_mat2 else None, None, None
    )  # fmt: skip


addmm: Operator = Operator(
    "addmm(Tensor input, Tensor mat1, Tensor mat2, float beta, float alpha) -> Tensor",
    "matmul",
    check=_check_addmm,
    torch=_torch_addmm,
    save=_save_addmm,
    public=lambda input, mat1, *_: "addmm" if mat1.dim() == 2 else "baddbmm",
    backward=_addmm_backward,
    autocast="lower",
)


# linear


def _check_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> tuple[int, ...] | str:
    a = input.shape
    w = weight.shape
    dtype = input.dtype
    if activation is not None and activation not in PARAMETERLESS:
        allowed = ", ".join(sorted(PARAMETERLESS))
        raise ValueError(f"linear(): activation got {activation!r}, allowed are None, {allowed}")
    if len(w) != 2 or not a:
        return _unusual_linear(a, w)
    n, k = w
    if a[-1] != k:
        raise RuntimeError(
            f"linear(): input and weight shapes cannot be multiplied: the last dimension of input {tuple(a)} "
            f"must be the in_features of weight {tuple(w)}, {k}, got {a[-1]}"
        )
    shape = (a[0], n) if len(a) == 2 else (*a[:-1], n)
    if weight.dtype is not dtype:
        _same_dtype("linear", input=input, weight=weight)
    if bias is not None:
        if bias.dtype is not dtype:
            _same_dtype("linear", input=input, bias=bias)
        if bias.shape != (n,):
            if not _expandable(bias.shape, shape):
                raise RuntimeError(f"linear(): bias must have shape ({n},) for weight {tuple(w)}, got {_shape(bias)}")
            return "a bias that is not a vector of out_features is broadcast by torch"
    if residual is not None:
        _same_dtype("linear", input=input, residual=residual)
        if residual.shape != shape:
            raise RuntimeError(f"linear(): residual must have the output's shape {shape}, got {_shape(residual)}")
    return shape if dtype in FLOATING else no_kernel_for(dtype)


def _unusual_linear(a: torch.Size, w: torch.Size) -> str:
    if len(w) != 1 or a[-1:] != w:
        raise RuntimeError(
            "linear(): input must be (…, in_features) and weight (out_features, in_features) or (in_features), "
            f"got {tuple(a)} and {tuple(w)}"
        )
    return "a weight of one dimension is served by torch"


def _expandable(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to)))


def _torch_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> Tensor:
    z = torch.nn.functional.linear(input, weight, bias)
    if residual is not None:
        z = z + residual
    return z if activation is None else apply_torch(z, activation, [])


def _save_linear(ctx: Any, args: Any, out: Tensor) -> None:
    input, weight, bias, residual, ctx.activation = args
    needs_input, needs_weight = ctx.needs_input_grad[:2]
    if ctx.activation is not None:  # the backward computes the product again, for the activation's slope
        ctx.save_for_backward(input, weight, bias, residual)
    else:
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors[:2]
    if ctx.activation is not None:
        z = linear.call(*ctx.saved_tensors, None, ctx.backend)
        grad = activation_backward.call(grad, z, ctx.activation, [], ctx.backend)
    needs_input, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad.unsqueeze(0)
    grad_input = grad_weight = grad_bias = None
    if needs_input:
        grad_input = matmul.call(rows, weight, ctx.backend).reshape(*grad.shape[:-1], weight.shape[1])
    if needs_weight:
        inputs = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
        grad_weight = matmul.call(rows.mT, inputs, ctx.backend)
    if needs_bias:
        grad_bias = sum_of_rows(rows, ctx.backend)
    return grad_input, grad_weight, grad_bias, grad if needs_residual else None, None


linear: Operator = Operator(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str? activation) -> Tensor",
    "matmul",
    check=_check_linear,
    torch=_torch_linear,
    save=_save_linear,
    backward=_linear_backward,
    autocast="lower",
)
