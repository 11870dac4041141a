"""Checks of the embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._numerics import TORCH, Scale, results, widen
from .data import Check, all_of, normal, special_rows


def checks() -> Iterator[Check]:
    def check(name: str, table: Callable[[torch.dtype], Tensor], rows: int, n: int, **options: Any) -> Check:
        def run(F: Any, weight: Tensor, indices: Tensor) -> Tensor:
            return F.embedding(indices, weight, **options)

        makers = (table, lambda dtype: torch.randint(rows, (n, 3), generator=torch.Generator().manual_seed(2)))
        return Check("embedding", name, all_of(*makers), run, names=("weight", "indices"), scale=_summed_magnitudes(run))

    yield check("embedding", normal(997, 255, seed=1), 997, 300)
    yield check("embedding, padding_idx", normal(65, 1021, seed=1), 65, 300, padding_idx=7)
    yield check("embedding, many of a few rows", normal(7, 67, seed=1), 7, 3000, scale_grad_by_freq=True)
    special = special_rows(67)
    yield check("embedding, special values", special, len(special(torch.float32)), 300)


def _summed_magnitudes(run: Callable[..., Tensor]) -> Scale:
    """A gradient is a sum over the places that took the row: errors are counted at the sum of magnitudes"""

    def scale(inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
        weight, indices = inputs
        wide = torch.nan_to_num(weight.detach().double()).requires_grad_(grad is not None)
        found = results(lambda *v: run(TORCH, *v), [wide, indices], None if grad is None else widen(grad.abs()))
        return tuple(t.abs() for t in found)

    return scale
