"""A check, and the data that checks are made on: usual, special and adversarial."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._numerics import Scale

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
Make = Callable[[torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True)
class Check:
    """One operator on one kind of data.

    Attributes:
        name: the operator, and the variant.
        make: dtype → inputs; those that require a gradient have theirs checked.
        theirs: the work in PyTorch's words, ``theirs(F, *inputs)``; ours: in fastnn's, where they differ.
        names: of the inputs, for the lines of the gradients.
        scale: the magnitudes at which errors are counted, for sums that may cancel.
        exact: for pointwise functions: (mpmath, x) → value, x an mpf.
    """

    family: str
    name: str
    make: Make
    theirs: Callable[..., Tensor]
    ours: Callable[..., Tensor] | None = None
    names: tuple[str, ...] = ("input",)
    scale: Scale | None = None
    exact: Callable[[Any, Any], Any] | None = None


def normal(
    *shape: int, seed: int = 0, scale: float = 1.0, mean: float = 0.0, grad: bool = True
) -> Callable[[torch.dtype], Tensor]:
    def make(dtype: torch.dtype) -> Tensor:
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (values * scale + mean).to(dtype).requires_grad_(grad)

    return make


def specials(dtype: torch.dtype) -> list[float]:
    """NaN, infinities, zeros of both signs, subnormal, tiny, huge and largest numbers, and where kinks are."""
    info = torch.finfo(dtype)
    huge = info.max**0.75
    some = [
        math.inf,
        0.0,
        info.tiny,
        info.tiny / 4,
        info.tiny * info.eps,
        huge,
        info.max,
        1e-3,
        0.5,
        1.0,
        3.0,
        6.0,
        20.0,
        80.0,
    ]
    return [math.nan, *some, *(-v for v in some)]


def special_vector(dtype: torch.dtype) -> tuple[Tensor]:
    """Five times over, so that both the vectors and the tail of a loop meet each of them in several lanes."""
    return (torch.tensor(specials(dtype) * 5, dtype=torch.float64).to(dtype).requires_grad_(),)


def special_rows(columns: int, skip_huge: bool = False) -> Callable[[torch.dtype], Tensor]:
    """A matrix of normal numbers with one special value in each row, at a wandering place."""

    def make(dtype: torch.dtype) -> Tensor:
        values = [v for v in specials(dtype) if not (skip_huge and abs(v) == torch.finfo(dtype).max)]
        rows = torch.randn(len(values), columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for n, value in enumerate(values):
            rows[n, 7 * n % columns] = value
        return rows.to(dtype).requires_grad_()

    return make


def tame_special_rows(columns: int) -> Callable[[torch.dtype], Tensor]:
    """The same, with 100 in the place of numbers whose squares are not finite: sums with those depend on their order."""

    def make(dtype: torch.dtype) -> Tensor:
        rows = special_rows(columns)(dtype).detach()
        large = rows.isfinite() & (rows.abs() > torch.finfo(dtype).max ** 0.4)
        return rows.masked_fill(large, 100.0).requires_grad_()

    return make


def cancelling(rows: int, columns: int, seed: int, dim: int) -> Callable[[torch.dtype], Tensor]:
    """Along dim the second half is the first, negated but for a millionth (16 bits: some of the last places).

    Times a matrix whose halves are equal, the terms cancel to that part of their magnitude.
    """

    def make(dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        half = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype).double()
        rest = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * max(1e-6, torch.finfo(dtype).eps)
        return torch.cat([half, half * (rest - 1)], dim).to(dtype).requires_grad_()

    return make


def repeated(make: Callable[[torch.dtype], Tensor], dim: int) -> Callable[[torch.dtype], Tensor]:
    """Both halves along dim the same."""
    return lambda dtype: torch.cat([make(dtype).detach()] * 2, dim).requires_grad_()


def one_hot(rows: int, columns: int, value: float = 1.0, noise: float = 0.0) -> Callable[[torch.dtype], Tensor]:
    """One value in each row, at a wandering place, above normal numbers times ``noise``."""

    def make(dtype: torch.dtype) -> Tensor:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * noise
        x[torch.arange(rows), torch.arange(rows) * 7 % columns] = value
        return x.to(dtype).requires_grad_()

    return make


def huge_and_tiny(rows: int, columns: int, seed: int, dim: int, power: float) -> Callable[[torch.dtype], Tensor]:
    """Normal numbers, along dim in turn multiplied and divided by the dtype's largest number to that power."""

    def make(dtype: torch.dtype) -> Tensor:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        factor = torch.finfo(dtype).max ** power
        x.movedim(dim, 0)[::2] *= factor
        x.movedim(dim, 0)[1::2] /= factor
        return x.to(dtype).requires_grad_()

    return make


def equal(*shape: int, value: float = 0.1) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.full(shape, value, dtype=torch.float64).to(dtype).requires_grad_()


def subnormal(*shape: int, seed: int = 0) -> Callable[[torch.dtype], Tensor]:
    """Normal numbers times a sixteenth of the smallest that is not subnormal."""
    return lambda dtype: normal(*shape, seed=seed, scale=torch.finfo(dtype).tiny / 16)(dtype)


def all_of(*makers: Callable[[torch.dtype], Any]) -> Make:
    return lambda dtype: tuple(make(dtype) for make in makers)


def constant(value: Any) -> Callable[[torch.dtype], Any]:
    return lambda dtype: value


def indices(n: int, classes: int, *more: int, ignored: int | None = None) -> Callable[[torch.dtype], Tensor]:
    def make(dtype: torch.dtype) -> Tensor:
        target = torch.randint(classes, (n, *more), generator=torch.Generator().manual_seed(11))
        if ignored is not None:
            target.view(-1)[::5] = ignored
        return target

    return make


def probabilities(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: (
        torch.rand(*shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64).softmax(1).to(dtype)
    )


def images(make: Callable[[torch.dtype], Tensor], *shape: int, last: bool = False) -> Callable[[torch.dtype], Tensor]:
    """The numbers as a batch of images, with ``last`` in memory format channels_last."""

    def images(dtype: torch.dtype) -> Tensor:
        x = make(dtype).detach().reshape(shape)
        return (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).requires_grad_()

    return images
