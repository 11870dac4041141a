"""Checks of the convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._numerics import sum_of_magnitudes
from .data import Check, all_of, cancelling, equal, images, normal, one_hot, repeated, specials, subnormal


def checks() -> Iterator[Check]:
    def check(
        name: str, function: Callable[..., Tensor], *makers: Callable[[torch.dtype], Any], fused: Any = None
    ) -> Check:
        names = ("input", "weight", "bias")[: len(makers)]
        return Check("conv", name, all_of(*makers), function, fused, names, sum_of_magnitudes(function))

    def last(make: Callable[[torch.dtype], Tensor]) -> Callable[[torch.dtype], Tensor]:
        return lambda dtype: make(dtype).detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    def conv(op: str, **options: Any) -> Callable[..., Tensor]:
        return lambda F, *tensors: getattr(F, op)(*tensors, **options)

    image, filters, bias = normal(3, 24, 19, 23, seed=1), normal(31, 24, 3, 3, seed=2, scale=0.1), normal(31, seed=3)
    small = normal(2, 24, 8, 9, seed=1)
    for form, place in (("", lambda make: make), (", channels last", last)):
        yield check(f"conv2d 3×3{form}", conv("conv2d", padding=1), place(image), place(filters), bias)
        yield check(f"conv2d 3×3, stride 2{form}", conv("conv2d", stride=2), place(image), place(filters), bias)
        yield check(f"conv2d 1×1{form}", conv("conv2d"), place(image), place(normal(31, 24, 1, 1, seed=4)), bias)
        yield check(f"conv2d depthwise{form}", conv("conv2d", padding=2, groups=24), place(image),
                    place(normal(24, 1, 5, 5, seed=5)), normal(24, seed=6))  # fmt: skip
        yield check(f"conv_transpose2d{form}", conv("conv_transpose2d", stride=2, padding=1), place(small),
                    place(normal(24, 31, 4, 4, seed=7, scale=0.1)), bias)  # fmt: skip
    def added(F: Any, x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return F.conv2d(x, w, b, padding=1) + r

    for form, place in (("", lambda make: make), (", channels last", last)):
        x, w = normal(2, 24, 7, 9, seed=1), normal(19, 24, 3, 3, seed=2, scale=0.1)
        b, r = normal(19, seed=3), normal(2, 19, 7, 9, seed=4)
        yield Check("conv", f"conv2d + bias + residual + relu{form}", all_of(place(x), place(w), b, place(r)),
                    lambda F, *tensors: F.relu(added(F, *tensors)),
                    lambda F, x, w, b, r: F.conv2d(x, w, b, padding=1, residual=r, activation="relu"),
                    ("input", "weight", "bias", "residual"), sum_of_magnitudes(added))  # fmt: skip
    yield check("conv2d, dilation, groups", conv("conv2d", padding=2, dilation=2, groups=4), image,
                normal(32, 6, 3, 3, seed=8), normal(32, seed=9))  # fmt: skip
    yield check("conv1d", conv("conv1d", stride=3, padding=4), normal(2, 5, 211, seed=1), normal(17, 5, 10, seed=2),
                normal(17, seed=3))  # fmt: skip
    yield check("conv3d", conv("conv3d", padding=1), normal(1, 5, 5, 7, 6, seed=1), normal(9, 5, 3, 3, 3, seed=2))
    yield check("conv1d, 7 taps of many channels", conv("conv1d", padding=3), normal(2, 40, 67, seed=1),
                normal(24, 40, 7, seed=2, scale=0.1), normal(24, seed=3))  # fmt: skip
    yield check("conv3d, many channels", conv("conv3d", padding=1), normal(1, 36, 4, 9, 10, seed=1),
                normal(40, 36, 3, 3, 3, seed=2, scale=0.1), normal(40, seed=3))  # fmt: skip
    yield check("conv2d, groups of 8", conv("conv2d", padding=1, groups=3), normal(2, 24, 13, 11, seed=1),
                normal(24, 8, 3, 3, seed=2, scale=0.1))  # fmt: skip
    yield check("conv_transpose2d, twice the size", conv("conv_transpose2d", stride=2, padding=1), normal(2, 260, 8, 8, seed=1),
                normal(260, 20, 4, 4, seed=2, scale=0.1))  # fmt: skip
    yield check("conv_transpose1d", conv("conv_transpose1d", stride=3), normal(2, 7, 31, seed=1), normal(7, 5, 5, seed=2))
    yield check("conv_transpose3d", conv("conv_transpose3d", stride=2), normal(1, 5, 3, 4, 2, seed=1),
                normal(5, 3, 3, 3, 3, seed=2))  # fmt: skip
    yield check("conv2d, long sums", conv("conv2d", padding=1), normal(1, 520, 5, 5, seed=1), normal(9, 520, 3, 3, seed=2))
    halves = images(repeated(normal(1, 32 * 81, seed=1), 1), 1, 64, 9, 9)
    yield check("conv2d, cancellation", conv("conv2d"), halves, images(cancelling(8, 32 * 9, 2, 1), 8, 64, 3, 3))
    yield check("conv2d, one-hot rows", conv("conv2d", padding=1), images(one_hot(9, 64 * 9, 60.0, noise=1.0), 1, 64, 9, 9),
                normal(8, 64, 3, 3, seed=2))  # fmt: skip
    yield check("conv2d, large means", conv("conv2d", padding=1), normal(1, 16, 9, 9, seed=1, mean=50),
                normal(8, 16, 3, 3, seed=2, mean=5))  # fmt: skip
    yield check("conv2d, alike terms", conv("conv2d", padding=1), equal(1, 64, 9, 9), equal(8, 64, 3, 3, value=0.3))
    yield check("conv2d, subnormal", conv("conv2d", padding=1), subnormal(1, 8, 9, 9, seed=1), normal(8, 8, 3, 3, seed=2))
    for dims, size in ((1, (63,)), (2, (7, 9)), (3, (3, 7, 3))):
        filters = normal(6, 1, *[3] * dims, seed=2)
        yield check(f"conv{dims}d, special values", conv(f"conv{dims}d", padding=1), _special(1, *size), filters)
        spread = conv(f"conv_transpose{dims}d", stride=2)
        yield check(f"conv_transpose{dims}d, special values", spread, _special(6, *size), filters)
    for form, place in (("", lambda make: make), (", channels last", last)):
        yield check(f"conv2d depthwise, special values{form}", conv("conv2d", padding=1, groups=6), place(_special(6, 7, 9)),
                    place(normal(6, 1, 3, 3, seed=2)))  # fmt: skip


def _special(channels: int, *size: int) -> Callable[[torch.dtype], Tensor]:
    """One special value in each image of a batch, the others normal; none so large that sums with it depend on their order."""

    def make(dtype: torch.dtype) -> Tensor:
        values = [v for v in specials(dtype) if not math.isfinite(v) or abs(v) < 100]
        x = torch.randn(len(values), channels, math.prod(size), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for n, value in enumerate(values):
            x[n, n % channels, 16 * n % x.shape[2]] = value
        return x.unflatten(2, size).to(dtype).requires_grad_()

    return make
