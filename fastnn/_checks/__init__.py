"""What the numerics report checks: every operator on usual, special and adversarial data; a file a family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from . import activation, attention, conv, embedding, matmul, norm, pool, rnn, softmax
from .data import DTYPES, Check

__all__ = ["CHECKS", "DTYPES", "Check", "checks", "dtypes"]

CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "matmul": matmul.checks,
    "activation": activation.checks,
    "softmax": softmax.checks,
    "rnn": rnn.checks,
    "pool": pool.checks,
    "norm": norm.checks,
    "conv": conv.checks,
    "attention": attention.checks,
    "embedding": embedding.checks,
}


def checks(families: Iterable[str] = ()) -> list[Check]:
    """The checks of the named families, or of all.

    Raises:
        ValueError: there is no such family.
    """
    names = list(families) or list(CHECKS)
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"unknown family {name!r}; there are: {', '.join(CHECKS)}")
    return [check for name in names for check in CHECKS[name]()]


def dtypes(name: str | None) -> list[torch.dtype]:
    """The dtype of that name, or all.

    Raises:
        ValueError: there is no such dtype here.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    return [DTYPES[name]] if name else list(DTYPES.values())
