"""Checks of the products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._numerics import sum_of_magnitudes
from .data import Check, all_of, cancelling, equal, huge_and_tiny, normal, one_hot, repeated, special_rows, subnormal


def checks() -> Iterator[Check]:
    def product(
        name: str,
        function: Callable[..., Tensor],
        *makers: Callable[[torch.dtype], Any],
        names: Sequence[str] = ("input", "other"),
        plain: Callable[..., Tensor] | None = None,
        ours: Callable[..., Tensor] | None = None,
    ) -> Check:
        return Check("matmul", name, all_of(*makers), function, ours, tuple(names), sum_of_magnitudes(plain or function))

    def matmul(F: Any, a: Tensor, b: Tensor) -> Tensor:
        return F.matmul(a, b)

    yield product("matmul 67×131×93", matmul, normal(67, 131, seed=1), normal(131, 93, seed=2))
    yield product(
        "matmul, both transposed",
        lambda F, a, b: F.matmul(a.t(), b.t()),
        normal(131, 67, seed=1),
        normal(93, 131, seed=2),
    )
    yield product("matmul, batch broadcast", matmul, normal(3, 1, 17, 33, seed=1), normal(2, 33, 9, seed=2))
    yield product("matmul, matrix · vector", matmul, normal(129, 257, seed=1), normal(257, seed=2))
    yield product("matmul, vector · matrix", matmul, normal(257, seed=1), normal(257, 129, seed=2))
    yield product("matmul, vector · vector", matmul, normal(1009, seed=1), normal(1009, seed=2))
    yield product("matmul, long sums", matmul, normal(5, 65537, seed=1), normal(65537, 7, seed=2))
    yield product(
        "matmul, cancellation", matmul, cancelling(19, 256, 1, 1), repeated(normal(256, 23, seed=2), 0)
    )
    yield product("matmul, one-hot rows", matmul, one_hot(29, 67), normal(67, 41, seed=2))
    yield product(
        "matmul, huge and tiny in turn", matmul, huge_and_tiny(17, 131, 1, 1, 0.4), huge_and_tiny(131, 37, 2, 0, -0.4)
    )
    yield product("matmul, all equal", matmul, equal(17, 1023), equal(1023, 33))
    yield product("matmul, subnormal", matmul, subnormal(23, 67, seed=1), normal(67, 35, seed=2))
    yield product("matmul, large means", matmul, normal(23, 511, seed=1, mean=30), normal(511, 19, seed=2, mean=-30))
    yield product(
        "matmul, special values", matmul, special_rows(37, skip_huge=True), normal(37, 21, seed=2, scale=0.1)
    )
    yield product(
        "bmm, special values",
        lambda F, a, b: F.bmm(a.unsqueeze(0), b.unsqueeze(0)),
        special_rows(37, skip_huge=True),
        normal(37, 21, seed=2, scale=0.1),
    )
    yield product(
        "addmm, special values",
        lambda F, c, a, b: F.addmm(c, a, b, beta=0.5, alpha=2.0),
        lambda dtype: special_rows(21, skip_huge=True)(dtype),
        lambda dtype: normal(len(special_rows(21, skip_huge=True)(dtype)), 37, seed=1)(dtype),
        normal(37, 21, seed=2, scale=0.1),
        names=("input", "mat1", "mat2"),
    )
    yield product("mm", lambda F, a, b: F.mm(a, b), normal(33, 65, seed=1), normal(65, 17, seed=2))
    yield product("bmm", lambda F, a, b: F.bmm(a, b), normal(5, 31, 64, seed=1), normal(5, 64, 47, seed=2))
    yield product(
        "addmm",
        lambda F, c, a, b: F.addmm(c, a, b, beta=0.5, alpha=2.0),
        normal(33, 17, seed=3),
        normal(33, 65, seed=1),
        normal(65, 17, seed=2),
        names=("input", "mat1", "mat2"),
    )
    yield product(
        "baddbmm",
        lambda F, c, a, b: F.baddbmm(c, a, b, beta=0.5, alpha=2.0),
        normal(4, 1, 17, seed=3),
        normal(4, 33, 65, seed=1),
        normal(4, 65, 17, seed=2),
        names=("input", "batch1", "batch2"),
    )

    x, w, b = normal(37, 96, seed=1), normal(51, 96, seed=2, scale=0.1), normal(51, seed=3)
    names = ("input", "weight", "bias")

    def linear(F: Any, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, w, b)

    yield product("linear", linear, x, w, names=names)
    yield product("linear + bias", linear, x, w, b, names=names)
    special = special_rows(96, skip_huge=True)
    yield product("linear + bias, special values", linear, special, w, b, names=names)
    yield product("linear + bias, large means", linear, normal(37, 96, seed=1, mean=30), w, b, names=names)
    yield product(
        "linear + bias, cancellation", linear, cancelling(37, 96, 1, 1), repeated(normal(51, 96, seed=2), 1), b,
        names=names,
    )  # fmt: skip
    yield product(
        "linear + bias + relu, special values",
        lambda F, x, w, b: F.relu(F.linear(x, w, b)),
        special,
        w,
        b,
        names=names,
        plain=linear,
        ours=lambda F, x, w, b: F.linear(x, w, b, activation="relu"),
    )
    for name in ("relu", "gelu", "silu", "sigmoid", "tanh"):
        yield product(
            f"linear + bias + {name}",
            lambda F, x, w, b, name=name: getattr(F, name)(F.linear(x, w, b)),
            x,
            w,
            b,
            names=names,
            plain=linear,
            ours=lambda F, x, w, b, name=name: F.linear(x, w, b, activation=name),
        )
    yield product(
        "linear + bias + residual + gelu",
        lambda F, x, w, b, r: F.gelu(F.linear(x, w, b) + r),
        x,
        w,
        b,
        normal(37, 51, seed=4),
        names=(*names, "residual"),
        plain=lambda F, x, w, b, r: F.linear(x, w, b) + r,
        ours=lambda F, x, w, b, r: F.linear(x, w, b, residual=r, activation="gelu"),
    )
