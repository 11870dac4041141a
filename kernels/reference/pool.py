"""Pooling as plain maths: what the fast kernels must equal. Differentiable any number of times.

Any number of dimensions: ``size`` has one number for each, and is the window's, or with ``adaptive`` the output's.
"""

from collections.abc import Sequence
from math import inf, prod

import torch
from torch import Tensor


def _positions(
    n: int, out: int, adaptive: bool, size: int, stride: int, padding: int, dilation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each output of a dimension of n its window: (indices, whether they are inside, how many count with the padding)."""
    o = torch.arange(out).unsqueeze(1)
    if adaptive:
        first, last = o * n // out, -((-(o + 1) * n) // out)
        at = first + torch.arange(largest_window(n, out))
        return at.clamp(max=max(n - 1, 0)), at < last, (last - first).squeeze(1)
    first = o * stride - padding
    at = first + torch.arange(size) * dilation
    counted = (first + size).clamp(max=n + padding) - first
    return at.clamp(0, max(n - 1, 0)), (at >= 0) & (at < n), counted.squeeze(1)


def largest_window(n: int, out: int) -> int:
    """What the windows of an adaptive pooling from n pixels to ``out`` have room in, in one dimension."""
    return 0 if not out else n // out if n % out == 0 else -(-n // out) + 1


def code_dtype(shape: Sequence[int], adaptive: bool, size: Sequence[int]) -> torch.dtype:
    """Of the codes, which say where in its window a maximum is, counted through all pixels that the window has room for."""
    sizes = map(largest_window, shape[-len(size) :], size) if adaptive else size
    return torch.int32 if prod(sizes) > 256 else torch.uint8


def output_size(
    sizes: Sequence[int],
    adaptive: bool,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """The output's pixels in each dimension. With ceil_mode a last window may hang over, but must start inside."""
    if adaptive:
        return list(size)
    result = []
    for n, k, s, p, d in zip(sizes, size, stride, padding, dilation, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        out = (room + (s - 1 if ceil_mode else 0)) // s + 1
        result.append(out - 1 if ceil_mode and (out - 1) * s >= n + p else out)
    return result


def _windows(
    input: Tensor,
    adaptive: bool,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pixels of each window, last: (values, whether inside, their index in the plane, how many count with padding)."""
    dims, sizes = len(size), input.shape[-len(size) :]
    outs = output_size(sizes, adaptive, size, stride, padding, dilation, ceil_mode)
    flat = input.flatten(-dims)
    place, inside = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    count = torch.ones(1, dtype=torch.int64)
    for k in range(dims):
        one = [1] * dims if adaptive else None
        at, ok, counted = _positions(
            sizes[k], outs[k], adaptive, size[k], *((one or p)[k] for p in (stride, padding, dilation))
        )
        place = (place[:, None, :, None] * sizes[k] + at[None, :, None, :]).flatten(0, 1).flatten(1)
        inside = (inside[:, None, :, None] & ok[None, :, None, :]).flatten(0, 1).flatten(1)
        count = (count[:, None] * counted).flatten()
    shape = [*input.shape[:-dims], *outs]
    values = flat[..., place.flatten()].reshape(*shape, -1) if flat.numel() else flat.new_empty([*shape, place.shape[1]])
    return values, inside.reshape(*outs, -1), place.reshape(*outs, -1), count.reshape(outs)


def _best(values: Tensor, inside: Tensor) -> Tensor:
    """Which of each window's pixels is its maximum: the first of equals, the last NaN."""
    seen = torch.where(inside, values.detach(), -inf)
    last_nan = seen.shape[-1] - 1 - seen.isnan().flip(-1).to(torch.uint8).argmax(-1)
    first = ((seen == seen.amax(-1, keepdim=True)) & inside).to(torch.uint8).argmax(-1)
    return torch.where(seen.isnan().any(-1), last_nan, first)


def max_pool_with_indices(
    input: Tensor,
    adaptive: bool,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """Each window's maximum, and its index in the plane."""
    values, inside, place, _ = _windows(input, adaptive, size, stride, padding, dilation, ceil_mode)
    if not values.numel():
        return values.new_empty(values.shape[:-1]), values.new_empty(values.shape[:-1], dtype=torch.int64)
    best = _best(values, inside).unsqueeze(-1)
    return values.gather(-1, best).squeeze(-1), place.expand(values.shape).gather(-1, best).squeeze(-1)


def max_pool(
    input: Tensor,
    adaptive: bool,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each window's maximum, and with ``keep`` its code: where in the window it is."""
    values, inside, _, _ = _windows(input, adaptive, size, stride, padding, dilation, ceil_mode)
    dtype = code_dtype(input.shape, adaptive, size) if keep else torch.uint8
    if not values.numel():
        return values.new_empty(values.shape[:-1]), values.new_empty(values.shape[:-1] if keep else 0, dtype=dtype)
    best = _best(values, inside)
    codes = best.to(dtype) if keep else best.new_empty(0, dtype=dtype)
    return values.gather(-1, best.unsqueeze(-1)).squeeze(-1), codes


def max_pool_backward(
    grad: Tensor,
    codes: Tensor,
    input: Tensor,
    adaptive: bool,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """From the codes that ``max_pool`` has kept; of the input nothing but its shape counts."""
    dims = len(size)
    zeros = grad.new_zeros([*input.shape[:-dims], prod(input.shape[-dims:])])
    if not grad.numel():
        return zeros.reshape(input.shape)
    _, _, place, _ = _windows(input.detach(), adaptive, size, stride, padding, dilation, ceil_mode)
    indices = place.expand(*grad.shape, -1).gather(-1, codes.long().unsqueeze(-1))
    indices = indices.squeeze(-1).flatten(-dims)
    return zeros.scatter_add(-1, indices, grad.flatten(-dims)).reshape(input.shape)


def avg_pool(
    input: Tensor,
    adaptive: bool,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
) -> Tensor:
    """Each window's sum over ``divisor``; if that is 0, over the pixels inside, or with count_include_pad all."""
    values, inside, _, count = _windows(input, adaptive, size, stride, padding, [1] * len(size), ceil_mode)
    total = torch.where(inside, values, torch.zeros_like(values)).sum(-1)
    counted = count if count_include_pad or adaptive else inside.sum(-1)
    return total / (divisor or counted)


def avg_pool_backward(
    grad: Tensor,
    input: Tensor,
    adaptive: bool,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
) -> Tensor:
    _, inside, place, count = _windows(input.detach(), adaptive, size, stride, padding, [1] * len(size), ceil_mode)
    counted = count if count_include_pad or adaptive else inside.sum(-1)
    dims = len(size)
    share = (grad / (divisor or counted)).unsqueeze(-1) * inside.to(grad.dtype)
    zeros = grad.new_zeros([*input.shape[:-dims], prod(input.shape[-dims:])])
    where = place.expand(share.shape).flatten(-dims - 1)
    return zeros.scatter_add(-1, where, share.flatten(-dims - 1)).reshape(input.shape)


def max_unpool(input: Tensor, indices: Tensor, output_size: Sequence[int]) -> Tensor:
    dims = len(output_size)
    zeros = input.new_zeros([*input.shape[:-dims], prod(output_size)])
    return zeros.scatter(-1, indices.flatten(-dims), input.flatten(-dims)).reshape([*input.shape[:-dims], *output_size])


def max_unpool_backward(grad: Tensor, indices: Tensor, output_size: Sequence[int]) -> Tensor:
    dims = len(output_size)
    return grad.flatten(-dims).gather(-1, indices.flatten(-dims)).reshape(indices.shape)
