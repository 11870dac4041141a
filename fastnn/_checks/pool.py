"""Checks of pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._numerics import sum_of_magnitudes
from .data import Check, all_of, huge_and_tiny, images, normal, special_rows


def checks() -> Iterator[Check]:
    def pool(name: str, function: Callable[..., Tensor], make: Callable[[torch.dtype], Tensor]) -> Check:
        scale = sum_of_magnitudes(function) if "avg" in name else None
        return Check("pool", name, all_of(make), function, scale=scale)

    def with_indices(F: Any, x: Tensor) -> Tensor:
        """The maxima and, as numbers that 16 bits can hold, where they are."""
        y, at = F.max_pool2d(x, 2, return_indices=True)
        return torch.cat([y.flatten(), at.flatten().to(y.dtype)])

    def special(last: bool) -> Callable[[torch.dtype], Tensor]:
        return images(lambda dtype: special_rows(36)(dtype), 1, 29, 6, 6, last=last)

    for last in (False, True):
        suffix = ", channels last" if last else ""
        for name, shape, function in (
            ("max_pool1d", (2, 5, 131), lambda F, x: F.max_pool1d(x, 3, 2, 1)),
            ("max_pool2d", (2, 5, 13, 37), lambda F, x: F.max_pool2d(x, 3, 2, 1)),
            ("max_pool2d, overlapping", (2, 35, 9, 7), lambda F, x: F.max_pool2d(x, 3, 1, 1)),
            ("max_pool2d, dilation, ceil_mode", (2, 5, 13, 37), lambda F, x: F.max_pool2d(x, 3, 2, 1, 2, True)),
            ("max_pool3d", (2, 3, 6, 7, 9), lambda F, x: F.max_pool3d(x, 2)),
            ("adaptive_max_pool2d", (2, 5, 13, 37), lambda F, x: F.adaptive_max_pool2d(x, 5)),
            ("avg_pool2d", (2, 5, 13, 37), lambda F, x: F.avg_pool2d(x, 3, 2, 1)),
            ("avg_pool2d, overlapping", (2, 35, 9, 7), lambda F, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
            ("avg_pool3d", (2, 3, 6, 7, 9), lambda F, x: F.avg_pool3d(x, 3, 2, 1)),
            ("lp_pool2d", (2, 5, 12, 20), lambda F, x: F.lp_pool2d(x, 2.0, 2)),
            ("adaptive_avg_pool2d", (2, 5, 13, 37), lambda F, x: F.adaptive_avg_pool2d(x, 5)),
            ("adaptive_avg_pool2d, global", (2, 5, 31, 37), lambda F, x: F.adaptive_avg_pool2d(x, 1)),
            ("max_pool2d with indices", (2, 5, 12, 20), with_indices),
            ("max_unpool1d", (2, 5, 131), lambda F, x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2)),
            ("max_unpool3d", (2, 3, 6, 8, 10), lambda F, x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2)),
            ("max_unpool2d", (2, 5, 12, 20), lambda F, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
        ):
            n = torch.Size(shape).numel()
            yield pool(name + suffix, function, images(normal(n, seed=1), *shape, last=last))
        for name, function in (
            ("max_pool2d", lambda F, x: F.max_pool2d(x, 2)),
            ("max_pool2d with indices", with_indices),
            ("max_unpool2d", lambda F, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
            ("avg_pool2d", lambda F, x: F.avg_pool2d(x, 2)),
            ("adaptive_avg_pool2d", lambda F, x: F.adaptive_avg_pool2d(x, 5)),
        ):
            yield pool(f"{name}, special values{suffix}", function, special(last))
        yield pool(
            f"avg_pool2d, huge and tiny in turn{suffix}",
            lambda F, x: F.avg_pool2d(x, 3, 1, 1),
            images(huge_and_tiny(45, 63, 1, 1, 0.4), 1, 45, 9, 7, last=last),
        )
        yield pool(
            f"avg_pool2d, large means{suffix}",
            lambda F, x: F.avg_pool2d(x, 7),
            images(normal(6, 3087, seed=1, mean=200), 6, 7, 21, 21, last=last),
        )
