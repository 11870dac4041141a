"""How tensors lie, and what the host code of CPU and GPU kernels says of it alike. Strides are in elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Dims = list[tuple[int, list[int]]]  # size, and each tensor's stride
Sizes = Sequence[int]

# Elements -----------------------------------------------------------------------------------------------------------------------


def merged(shape: Sizes, strides: Sequence[Sizes], order: Sizes | None = None) -> Dims:
    """These dimensions (all, outermost of the first tensor first); those merged that all tensors can walk as one."""
    if order is None:
        order = sorted(range(len(shape)), key=lambda d: -strides[0][d])
    dims: Dims = []
    for d in order:
        size, steps = shape[d], [s[d] for s in strides]
        if size == 1:
            continue
        if dims and dims[-1][1] == [size * step for step in steps]:
            dims[-1] = (dims[-1][0] * size, steps)
        else:
            dims.append((size, steps))
    return dims or [(1, [1] * len(strides))]


def last_three(dims: Dims) -> Dims:
    """At most three dimensions as three: those missing, outermost, are 1."""
    return [*[(1, [0] * len(dims[0][1]))] * (3 - len(dims)), *dims]


def row_major(shape: Sizes) -> list[int]:
    """The strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]


def like(out: Tensor, t: Tensor) -> Tensor:
    """A copy of t in out's layout."""
    return torch.empty_like(out, dtype=t.dtype).copy_(t)


def halves(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    size = t.shape[dim] // 2
    return t.narrow(dim, 0, size), t.narrow(dim, size, size)


# PReLU's weight: one, or one a channel (dimension 1)


def along_channels(weight: Tensor, like: Tensor) -> Tensor:
    """The weight as a tensor of like's shape."""
    if weight.numel() == 1 or like.dim() < 2:
        return weight.reshape(()).expand(like.shape)
    return weight.reshape(-1, *[1] * (like.dim() - 2)).expand(like.shape)


def sum_by_channel(share: Tensor, weight: Tensor) -> Tensor:
    """What each element adds to the weight's gradient, summed."""
    one = weight.numel() == 1 or share.dim() < 2
    total = share.sum() if one else share.sum([d for d in range(share.dim()) if d != 1])
    return total.reshape(weight.shape)


# Dropout's random numbers: a hash of (seed, index), as kernels/reference/activation.py has it


def mix(h: int) -> int:
    """Wellons' hash of 32 bits"""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def dropout_keys(seed: int) -> tuple[int, int]:
    """What a kernel has to know of the seed: its low 32 bits, and the hash of its high ones"""
    return seed & 0xFFFFFFFF, mix(((seed >> 32 & 0xFFFFFFFF) + 0x9E3779B9) & 0xFFFFFFFF)


# Lines along one dimension ------------------------------------------------------------------------------------------------------


def outer_and_inner(shape: Sizes, strides: Sequence[Sizes], dim: int) -> Dims | None:
    """The dimensions beside dim as two, row-major; None if they are more."""
    dims = merged(shape, strides, [d for d in range(len(shape)) if d != dim])
    return None if len(dims) > 2 else last_three(dims)[1:]


# Images -------------------------------------------------------------------------------------------------------------------------


def three(values: Sizes, missing: int) -> list[int]:
    """Of depth, height, width"""
    return [*[missing] * (3 - len(values)), *values]


def image(values: Sizes, dims: int, missing: int) -> list[int]:
    """Sizes (missing = 1) or strides (0) of N, C, depth, height, width"""
    found = list(values)
    if len(found) == dims + 1:
        found = [missing, *found]
    return [*found[:2], *three(found[2:], missing)]


def windows(adaptive: bool, sizes: Sizes, outs: Sizes, size: Sizes, stride: Sizes, padding: Sizes,
            dilation: Sizes) -> tuple[bool, list[int], list[int], list[int], list[int]]:
    """(adaptive, size, stride, padding, dilation) of a pooling's windows; adaptive ones that are all alike are plain ones."""
    dims = len(size)
    k, s, p, d = (three(v or [m] * dims, m) for v, m in ((size, 1), (stride, 1), (padding, 0), (dilation, 1)))
    if adaptive and all(o and a % o == 0 for a, o in zip(sizes, outs, strict=True)):
        adaptive, k = False, [a // o for a, o in zip(sizes, outs, strict=True)]
        s = k
    return adaptive, k, s, p, d
