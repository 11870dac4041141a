"""Convolution and transposed convolution in one, two and three dimensions, with their gradients.

One operator serves them all: the rank is the length of its lists. A transposed convolution is the gradient of a
convolution in its input, and the other way round, so each is the other's backward; both share the gradient of the weight.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._operator import FLOATING, PLAIN, Operator, asks_directly, empty_matrix
from .activation import PARAMETERLESS, activation_backward, apply_torch, no_kernel_for
from .matmul import matmul, sum_of_rows

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _channels_last(t: Tensor) -> bool:
    """Whether torch takes the strides for a channels_last format: ambiguous ones are not."""
    if t.is_contiguous():
        return False
    sizes, strides, least = t.shape, t.stride(), 0
    if strides[1] == 0:
        return False
    for d in (1, *range(len(sizes) - 1, 1, -1), 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * (sizes[d] if sizes[d] > 1 else 1)
    return True


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """That of a result: channels_last as soon as one operand is."""
    last = _FORMATS.get(tensors[0].dim())
    return last if last is not None and any(map(_channels_last, tensors)) else torch.contiguous_format


def _check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    activation: str | None,
) -> tuple[int, ...] | str:
    b, r = bias is None or bias.shape, residual is None or residual.shape
    numbers = (tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups, activation)
    # A model asks the same again and again; a tracer's sizes may be symbols, which are not to be kept.
    plan = _output_shape if type(input) in PLAIN and type(weight) in PLAIN else _output_shape.__wrapped__
    shape: tuple[int, ...] = plan(input.shape, weight.shape, b, r, *numbers)
    dtype = input.dtype
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype) or (residual is not None and residual.dtype != dtype):
        op = f"conv{'_transpose' if transposed else ''}{len(stride)}d"
        for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
            if t is not None and t.dtype != dtype:
                raise RuntimeError(f"{op}(): {name} must have the same dtype as input, {dtype}, got {t.dtype}")
    if transposed and 0 in shape[2:]:
        return "an output of size 0"
    return shape if dtype in FLOATING else no_kernel_for(dtype)


@lru_cache(4096)
def _output_shape(
    x: Sequence[int],
    w: Sequence[int],
    bias: Sequence[int] | bool,
    residual: Sequence[int] | bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    activation: str | None,
) -> tuple[int, ...]:
    """The output's shape, of the tensors' shapes: those of bias and residual are True where there are none."""
    dims = len(stride)
    op = f"conv_transpose{dims}d" if transposed else f"conv{dims}d"
    if len(w) != dims + 2 or len(x) != dims + 2:
        raise RuntimeError(
            f"{op}(): input must have {dims + 1} (unbatched) or {dims + 2} dimensions and weight {dims + 2}, got "
            f"{tuple(x)} and {tuple(w)}"
        )
    _check_numbers(op, w, stride, padding, dilation, groups)
    if activation is not None and activation not in PARAMETERLESS:
        allowed = ", ".join(sorted(PARAMETERLESS))
        raise ValueError(f"{op}(): activation got {activation!r}, allowed are None, {allowed}")
    channels, outputs = (w[0], w[1] * groups) if transposed else (w[1] * groups, w[0])
    if w[0] % groups or w[0] < groups:
        raise RuntimeError(
            f"{op}(): the first dimension of weight {tuple(w)}, {w[0]}, must be a multiple of groups, {groups}"
        )
    if x[1] != channels:
        raise RuntimeError(
            f"{op}(): input {tuple(x)} must have {channels} channels for weight {tuple(w)} and groups={groups}, got {x[1]}"
        )
    size = (
        _transposed_size(op, x, w, stride, padding, dilation, output_padding)
        if transposed
        else _size(op, x, w, stride, padding, dilation)
    )
    shape = (x[0], outputs, *size)
    for name, found, expected in (("bias", bias, (outputs,)), ("residual", residual, shape)):
        if not isinstance(found, bool) and tuple(found) != expected:
            raise RuntimeError(f"{op}(): {name} must have shape {expected} for weight {tuple(w)}, got {tuple(found)}")
    return shape


def _check_numbers(
    op: str,
    w: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if min(values) < least:
            raise RuntimeError(f"{op}(): {name} must be at least {least}, got {tuple(values)}")
    if groups < 1:
        raise RuntimeError(f"{op}(): groups must be at least 1, got {groups}")
    if min(w[2:]) < 1:
        raise RuntimeError(f"{op}(): the kernel of weight {tuple(w)} must be at least 1 wide, got {tuple(w[2:])}")


def _size(
    op: str,
    x: Sequence[int],
    w: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    size = []
    for m, k, s, p, d in zip(x[2:], w[2:], stride, padding, dilation):
        if m < 1 or m + 2 * p < d * (k - 1) + 1:
            raise RuntimeError(
                f"{op}(): the kernel {tuple(w[2:])} with dilation {tuple(dilation)} must not be larger than the input "
                f"{tuple(x[2:])} padded by {tuple(padding)} on either side, and the input must not be empty"
            )
        size.append((m + 2 * p - d * (k - 1) - 1) // s + 1)
    return size


def _transposed_size(
    op: str,
    x: Sequence[int],
    w: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> list[int]:
    size = []
    for m, k, s, p, d, more in zip(x[2:], w[2:], stride, padding, dilation, output_padding):
        if more < 0 or more >= max(s, d):
            raise RuntimeError(
                f"{op}(): output_padding must be at least 0 and smaller than either stride {tuple(stride)} or dilation "
                f"{tuple(dilation)}, got {tuple(output_padding)}"
            )
        n = (m - 1) * s - 2 * p + d * (k - 1) + 1 + more
        if m < 1 or n < 0:
            raise RuntimeError(
                f"{op}(): input of size {tuple(x[2:])}, kernel {tuple(w[2:])} and padding {tuple(padding)} would give "
                f"an output of size {n}; it must be at least 0, of an input that is not empty"
            )
        size.append(n)
    return size


def _torch_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    activation: str | None,
) -> Tensor:
    if transposed:
        z = getattr(F, f"conv_transpose{len(stride)}d")(input, weight, bias, stride, padding, output_padding, groups, dilation)
    else:
        z = getattr(F, f"conv{len(stride)}d")(input, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        z = z + residual
    return z if activation is None else apply_torch(z, activation, [])


def _save(ctx: Any, args: Any, out: Tensor) -> None:
    input, weight, bias, residual, *ctx.options, ctx.activation = args
    needs_input, needs_weight = ctx.needs_input_grad[:2]
    ctx.shapes, ctx.format = (input.shape, weight.shape), memory_format(input, weight)
    if ctx.activation is not None:  # the backward convolves again, for the activation's slope
        ctx.save_for_backward(input, weight, bias, residual)
    else:
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)


def _sum_of_channels(grad: Tensor, backend: str | None) -> Tensor:
    """Of (N, C, …), each channel's sum (C). On the CPU products that read it where it lies; see matmul's ``sum_of_rows``."""
    if grad.is_cuda:
        return grad.sum([0, *range(2, grad.dim())])
    pixels = grad.movedim(1, -1)
    if pixels.is_contiguous():
        return sum_of_rows(pixels.flatten(0, -2), backend)
    planes = grad.flatten(2)
    return sum_of_rows(matmul.call(planes, planes.new_ones(planes.shape[-1]), backend), backend)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors[:2]
    stride, padding, dilation, transposed, _, groups = ctx.options
    if ctx.activation is not None:
        z = conv.call(*ctx.saved_tensors, *ctx.options, None, ctx.backend)
        grad = activation_backward.call(grad, z, ctx.activation, [], ctx.backend)
    if memory_format(grad) != ctx.format:  # once for both products: reading across the format costs each more than the copy
        grad = grad.contiguous(memory_format=ctx.format)
    needs_input, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    x, w = ctx.shapes
    grad_input = grad_weight = grad_bias = None
    if needs_input:
        more = [0] * len(stride)
        if not transposed:  # what the stride left over at the far edge
            more = [
                m - ((n - 1) * s - 2 * p + d * (k - 1) + 1)
                for m, n, k, s, p, d in zip(x[2:], grad.shape[2:], w[2:], stride, padding, dilation)
            ]
        grad_input = conv.call(
            grad, weight, None, None, stride, padding, dilation, not transposed, more, groups, None, ctx.backend
        )
        if transposed:  # output_padding may exceed the stride
            for d, n in enumerate(x[2:], 2):
                grad_input = grad_input.narrow(d, 0, n) if grad_input.shape[d] != n else grad_input
    if needs_weight:
        into, of = (input, grad) if transposed else (grad, input)
        grad_weight = conv_weight.call(into, of, list(w[2:]), stride, padding, dilation, groups, ctx.backend)
    if needs_bias:
        grad_bias = _sum_of_channels(grad, ctx.backend)
    return grad_input, grad_weight, grad_bias, grad if needs_residual else None, *[None] * 7


@lru_cache(4096)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _allocate(shape: tuple[int, ...], input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    if asks_directly(input) and input.is_contiguous() and weight.is_contiguous():
        return empty_matrix(shape, _strides(shape), input.dtype)
    form = memory_format(input, weight)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=form)


conv: Operator = Operator(
    "conv(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation,"
    " bool transposed, SymInt[] output_padding, int groups, str? activation) -> Tensor",
    "conv",
    check=_check,
    allocate=_allocate,
    torch=_torch_conv,
    save=_save,
    backward=_backward,
    autocast="lower",
)


# The gradient of the weight


def _check_weight(
    grad: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...] | str:
    g, x = grad.shape, input.shape
    if len(g) != len(x) or len(x) != len(kernel_size) + 2:
        raise RuntimeError(
            f"conv_weight(): grad and input must have {len(kernel_size) + 2} dimensions, got {tuple(g)} and {tuple(x)}"
        )
    if groups < 1 or g[1] % groups or x[1] % groups:
        raise RuntimeError(
            f"conv_weight(): the channels of grad {tuple(g)} and input {tuple(x)} must be multiples of groups, {groups}"
        )
    shape = (g[1], x[1] // groups, *kernel_size)
    _check_numbers("conv_weight", shape, stride, padding, dilation, groups)
    size = _size("conv_weight", x, shape, stride, padding, dilation)
    if g[0] != x[0] or any(n > m for n, m in zip(g[2:], size)):
        raise RuntimeError(f"conv_weight(): grad must have shape {(x[0], g[1], *size)}, got {tuple(g)}")
    if grad.dtype != input.dtype:
        raise RuntimeError(f"conv_weight(): grad must have input's dtype {input.dtype}, got {grad.dtype}")
    return shape if input.dtype in FLOATING else no_kernel_for(input.dtype)


def _torch_weight(
    grad: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    shape = (grad.shape[1], input.shape[1] // groups, *kernel_size)
    weight = torch.empty(shape, dtype=input.dtype, device=input.device)
    zeros = [0] * len(kernel_size)
    mask = (False, True, False)
    args = (stride, padding, dilation, False, zeros, groups, mask)
    return torch.ops.aten.convolution_backward(grad, input, weight, None, *args)[1]


conv_weight: Operator = Operator(
    "conv_weight(Tensor grad, Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor",
    "conv",
    check=_check_weight,
    allocate=lambda shape, grad, input, *_: torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    ),
    torch=_torch_weight,
)
