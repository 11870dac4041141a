"""Pooling in one, two and three dimensions, each with its backward: one operator for all of them.

``size`` has a number for each dimension. It is the window's, or with ``adaptive`` the output's; then ``stride``,
``padding`` and ``dilation`` are empty. For its backward a max_pool keeps a code a window, which says where in it the
maximum is: usually a byte, where torch keeps a 64-bit index.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastnn.kernels.reference import pool as reference

from ._operator import Operator
from .activation import aten, only_torch

Sizes = Sequence[int]


def _name(kind: str, adaptive: bool, dims: int) -> str:
    return f"{'adaptive_' if adaptive else ''}{kind}_pool{dims}d"


def check_planes(op: str, shape: Sizes, dims: int, channels: bool = True) -> None:
    """input must be (N, C, …) or (C, …) with `dims` more, none of them empty but the batch (and C unless `channels`)."""
    if len(shape) not in (dims + 1, dims + 2):
        raise (IndexError if op == "avg_pool2d" and len(shape) <= dims else RuntimeError)(  # as torch has it
            f"{op}(): Expected {dims + 1}D or {dims + 2}D (batch mode) input, but got {len(shape)}D: {tuple(shape)}"
        )
    if 0 in shape[-dims - channels :]:
        raise RuntimeError(
            f"{op}(): Expected non-zero sizes for all but the batch dimension of input, but got {tuple(shape)}"
        )


def _output_shape(
    kind: str, input: Tensor, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil_mode: bool
) -> list[int]:
    """Raises RuntimeError for what torch refuses."""
    window = adaptive, tuple(size), tuple(stride), tuple(padding), tuple(dilation), ceil_mode
    try:
        return _known_shape(kind, input.shape, *window)
    except TypeError:  # a tracer's sizes cannot be looked up
        return _checked_shape(kind, input.shape, *window)


def _checked_shape(
    kind: str, shape: Sizes, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil_mode: bool
) -> list[int]:
    dims = len(size)
    op = _name(kind, adaptive, dims)
    check_planes(op, shape, dims, channels=not (adaptive and kind == "avg" and dims < 3))
    sizes = shape[-dims:]
    if adaptive:
        if min(size) < 0:
            raise RuntimeError(f"{op}(): output_size must be greater than or equal to 0, but got {tuple(size)}")
        return [*shape[:-dims], *size]
    for argument, values in (("kernel_size", size), ("stride", stride), ("dilation", dilation)):
        if min(values) <= 0:
            raise RuntimeError(f"{op}(): {argument} must be greater than zero, but got {tuple(values)}")
    for k, p in zip(size, padding, strict=True):
        if p < 0:
            raise RuntimeError(f"{op}(): padding must be non-negative, but got {tuple(padding)}")
        if p > k // 2:  # as in torch, whatever the dilation
            raise RuntimeError(
                f"{op}(): padding should be at most half of kernel size, but got padding={tuple(padding)} and "
                f"kernel_size={tuple(size)}"
            )
    outs = reference.output_size(sizes, adaptive, size, stride, padding, dilation, ceil_mode)
    if min(outs) <= 0:
        raise RuntimeError(
            f"{op}(): Given input size {tuple(sizes)} and kernel_size={tuple(size)}, stride={tuple(stride)}, "
            f"padding={tuple(padding)}, dilation={tuple(dilation)}, the output size would be {tuple(outs)}: too small"
        )
    return [*shape[:-dims], *outs]


_known_shape = lru_cache(1024)(_checked_shape)


def _channels_last(shape: Sizes, like_shape: Sizes, like_stride: Sizes) -> list[int] | None:
    """The strides of a tensor of this shape in a memory format; None for the usual one."""
    if len(shape) > 2 and len(like_shape) == len(shape) and 0 < like_stride[1] < like_stride[-1]:
        planes = torch.empty_strided(like_shape, like_stride, device="meta")
        planes = planes.unsqueeze(2) if len(shape) == 3 else planes
        if suggest_memory_format(planes) != torch.contiguous_format:
            _, c, *sizes = shape
            strides = [c * prod(sizes[d + 1 :]) for d in range(len(sizes))]
            return [c * prod(sizes), 1, *strides]
    return None


_known_channels_last = lru_cache(1024)(_channels_last)


def empty_like_format(like: Tensor, shape: Sizes, dtype: torch.dtype | None = None) -> Tensor:
    """For an output: in like's memory format. torch leaves it in some of three dimensions, where it has no kernels."""
    if like.dim() < 3 or not 0 < like.stride(1) < like.stride(-1):
        return like.new_empty(shape, dtype=dtype)
    try:
        strides = _known_channels_last(tuple(shape), like.shape, like.stride())
    except TypeError:  # a tracer's sizes cannot be looked up
        strides = _channels_last(shape, like.shape, like.stride())
    return like.new_empty(shape, dtype=dtype) if strides is None else like.new_empty_strided(shape, strides, dtype=dtype)


def _check_grad(kind: str, grad: Tensor, input: Tensor, shape: Sizes) -> str | None:
    if list(grad.shape) != list(shape) or grad.dtype != input.dtype:
        raise RuntimeError(
            f"{kind}_pool_backward(): grad must have shape {tuple(shape)} and dtype {input.dtype}, got "
            f"{tuple(grad.shape)} and {grad.dtype}"
        )
    return only_torch(input.dtype)


# max_pool


def _check_max(input: Tensor, *window: Any) -> Any:
    shape = _output_shape("max", input, *window)
    return only_torch(input.dtype) or shape


def _max_by_torch(
    input: Tensor, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil_mode: bool
) -> Any:
    function = getattr(F, _name("max", adaptive, len(size)) + "_with_indices")
    return function(input, size) if adaptive else function(input, size, stride, padding, dilation, ceil_mode)


def _empty_maxima(shape: Sizes, input: Tensor, adaptive: bool, size: Sizes, *window: Any) -> tuple[Tensor, Tensor]:
    """For the maxima and, where they are kept, their codes."""
    if not window[-1]:
        return empty_like_format(input, shape), input.new_empty(0, dtype=torch.uint8)
    dtype = reference.code_dtype(input.shape, adaptive, size)
    return empty_like_format(input, shape), empty_like_format(input, shape, dtype)


def _save_max(ctx: Any, args: Any, out: Any) -> None:
    input, *ctx.window, keep = args
    ctx.save_for_backward(out[1] if keep else None, input)


def _save_max_with_indices(ctx: Any, args: Any, out: Any) -> None:
    input, *ctx.window = args
    ctx.save_for_backward(None, input)


def _max_gradient(ctx: Any, grad: Tensor) -> Tensor:
    codes, input = ctx.saved_tensors
    if codes is None:
        codes = max_pool.overload(input.detach(), *ctx.window, True, backend=ctx.backend)[1]
    result: Tensor = max_pool_backward.call(grad, codes, input, *ctx.window, ctx.backend)
    return result


_WINDOW = "bool adaptive, int[] size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"

max_pool: Operator = Operator(
    f"max_pool(Tensor input, {_WINDOW}, bool keep) -> (Tensor, Tensor)",
    "pool",
    check=lambda input, *window: _check_max(input, *window[:-1]),
    allocate=_empty_maxima,
    torch=lambda *args: _max_by_torch(*args[:-1])[0],
    extra=lambda *args: reference.max_pool(*args)[1],
    save=_save_max,
    backward=lambda ctx, grad: (_max_gradient(ctx, grad), *[None] * 7),
)

max_pool_with_indices: Operator = Operator(
    f"max_pool_with_indices(Tensor input, {_WINDOW}) -> (Tensor, Tensor)",
    "pool",
    check=_check_max,
    allocate=lambda shape, input, *_: (empty_like_format(input, shape), empty_like_format(input, shape, torch.int64)),
    torch=_max_by_torch,
    save=_save_max_with_indices,
    backward=lambda ctx, grad: (_max_gradient(ctx, grad), *[None] * 6),
)


def _check_max_backward(grad: Tensor, codes: Tensor, input: Tensor, adaptive: bool, size: Sizes, *window: Any) -> str | None:
    shape = _output_shape("max", input, adaptive, size, *window)
    dtype = reference.code_dtype(input.shape, adaptive, size)
    if list(codes.shape) != list(shape) or codes.dtype != dtype:
        raise RuntimeError(
            f"max_pool_backward(): codes must have shape {tuple(shape)} and dtype {dtype}, got {tuple(codes.shape)} and "
            f"{codes.dtype}"
        )
    return _check_grad("max", grad, input, shape)


max_pool_backward: Operator = Operator(
    f"max_pool_backward(Tensor grad, Tensor codes, Tensor input, {_WINDOW}) -> Tensor",
    "pool",
    check=_check_max_backward,
    allocate=lambda plan, grad, codes, input, *_: empty_like_format(input, input.shape),
    torch=reference.max_pool_backward,
)


# avg_pool


def _average_shape(
    input: Tensor, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes, ceil_mode: bool, *_: Any
) -> list[int]:
    return _output_shape("avg", input, adaptive, size, stride, padding, [1] * len(size), ceil_mode)


def _check_average(input: Tensor, *window: Any) -> Any:
    shape = _average_shape(input, *window)
    return only_torch(input.dtype) or shape


def _average_by_torch(
    input: Tensor,
    adaptive: bool,
    size: Sizes,
    stride: Sizes,
    padding: Sizes,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
) -> Tensor:
    function: Callable[..., Tensor] = getattr(F, _name("avg", adaptive, len(size)))
    if adaptive:
        return function(input, size)
    more = () if len(size) == 1 else (divisor or None,)
    return function(input, size, stride, padding, ceil_mode, count_include_pad, *more)


def _average_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return avg_pool_backward.call(grad, *ctx.saved_tensors, *ctx.window, ctx.backend), *[None] * 7


def _save_average(ctx: Any, args: Any, out: Any) -> None:
    input, *ctx.window = args
    ctx.save_for_backward(input)


_AVG = (
    "(Tensor input, bool adaptive, int[] size, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, "
    "int divisor)"
)

avg_pool: Operator = Operator(
    f"avg_pool{_AVG} -> Tensor",
    "pool",
    check=_check_average,
    allocate=lambda shape, input, *_: empty_like_format(input, shape),
    torch=_average_by_torch,
    save=_save_average,
    backward=_average_gradient,
)

avg_pool_backward: Operator = Operator(
    f"avg_pool_backward{_AVG.replace('(', '(Tensor grad, ', 1)} -> Tensor",
    "pool",
    check=lambda grad, input, *window: _check_grad("avg", grad, input, _average_shape(input, *window)),
    allocate=lambda plan, grad, input, *_: empty_like_format(input, input.shape),
    torch=reference.avg_pool_backward,
)


# max_unpool


def _check_unpool(input: Tensor, indices: Tensor, output_size: Sizes) -> Any:
    dims = len(output_size)
    op = f"max_unpool{dims}d"
    check_planes(op, input.shape, dims)
    if indices.dtype != torch.int64:
        raise RuntimeError(f"{op}(): indices must have dtype torch.int64, got {indices.dtype}")
    if indices.shape != input.shape:
        raise RuntimeError(
            f"{op}(): indices must have input's shape {tuple(input.shape)}, got {tuple(indices.shape)}"
        )
    if min(output_size) < 0:
        raise RuntimeError(f"{op}(): output_size must be non-negative, got {tuple(output_size)}")
    return only_torch(input.dtype) or [*input.shape[:-dims], *output_size]


def _unpool_by_torch(input: Tensor, indices: Tensor, output_size: Sizes) -> Tensor:
    if len(output_size) == 1:
        return aten.max_unpool2d(input.unsqueeze(-1), indices.unsqueeze(-1), [*output_size, 1]).squeeze(-1)
    if len(output_size) == 2:
        return aten.max_unpool2d(input, indices, output_size)
    ones = [1, 1, 1]  # stride and padding, which only have to be positive and not negative
    return aten.max_unpool3d(input, indices, output_size, ones, [0, 0, 0])


def _save_unpool(ctx: Any, args: Any, out: Tensor) -> None:
    _, indices, ctx.size = args
    ctx.save_for_backward(indices)


max_unpool: Operator = Operator(
    "max_unpool(Tensor input, Tensor indices, int[] output_size) -> Tensor",
    "pool",
    check=_check_unpool,
    allocate=lambda shape, input, *_: empty_like_format(input, shape),
    torch=_unpool_by_torch,
    save=_save_unpool,
    backward=lambda ctx, grad: (max_unpool_backward.call(grad, *ctx.saved_tensors, ctx.size, ctx.backend), None, None),
    autocast="float32",
)


def _check_unpool_backward(grad: Tensor, indices: Tensor, output_size: Sizes) -> Any:
    shape = [*indices.shape[: -len(output_size)], *output_size]
    if list(grad.shape) != shape or indices.dtype != torch.int64:
        raise RuntimeError(
            f"max_unpool_backward(): grad must have shape {tuple(shape)} and indices dtype torch.int64, got "
            f"{tuple(grad.shape)} and {indices.dtype}"
        )
    return only_torch(grad.dtype)


max_unpool_backward: Operator = Operator(
    "max_unpool_backward(Tensor grad, Tensor indices, int[] output_size) -> Tensor",
    "pool",
    check=_check_unpool_backward,
    allocate=lambda plan, grad, indices, output_size: empty_like_format(indices, indices.shape, grad.dtype),
    torch=reference.max_unpool_backward,
)
