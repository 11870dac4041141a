"""Activations on what passes between the layers of BERT-base (32 sentences of 128 tokens) and larger."""

from __future__ import annotations

from typing import Any

from fastnn._checks import POINTWISE
from fastnn._numerics import sum_of_magnitudes

from . import Case, random, together

SIZES = {"bert_base": (4096, 768), "bert_base_up": (4096, 3072)}


def forward(name: str, model: str, **extra: Any) -> Case:
    rows, columns = SIZES[model]
    n = rows * columns
    return Case(
        "activation",
        f"{name}/{model}/{rows}x{columns}",
        together(random(rows, columns, seed=1, scale=2.0)),
        theirs=POINTWISE[name].theirs,
        scale=POINTWISE[name].magnitudes,
        passes=((n, n),),
        **extra,
    )


def backward(name: str, model: str, **extra: Any) -> Case:
    rows, columns = SIZES[model]
    n = rows * columns
    return forward(name, model, **extra).on(
        make=together(random(rows, columns, seed=1, scale=2.0, grad=True)), mode="backward", passes=((2 * n, n),)
    )


def prelu(model: str, mode: str, **extra: Any) -> Case:
    """One slope a channel, as in the networks for images: the channels are dimension 1."""
    rows, columns = SIZES[model]
    n, grad = rows * columns, mode == "backward"
    return Case(
        "activation",
        f"prelu/{model}/{rows}x{columns}",
        together(random(rows, columns, seed=1, grad=grad), random(columns, seed=2, scale=0.1, grad=grad)),
        theirs=lambda F, x, w: F.prelu(x, w),
        passes=((2 * n if grad else n, n),),
        mode=mode,
        # The slope's gradient is a sum over rows: its errors are counted at the sum of magnitudes.
        scale=sum_of_magnitudes(lambda F, x, w: F.prelu(-x, w)) if grad else None,
        **extra,
    )


def glu(model: str, mode: str, **extra: Any) -> Case:
    rows, columns = SIZES[model]
    n, grad = rows * columns, mode == "backward"
    return Case(
        "activation",
        f"glu/{model}/{rows}x{columns}",
        together(random(rows, columns, seed=1, grad=grad)),
        theirs=lambda F, x: F.glu(x),
        passes=((n + n // 2, n) if grad else (n, n // 2),),
        mode=mode,
        **extra,
    )


def _goals(name: str) -> dict[str, float]:
    return {"limit": 0.85} | ({"best": 1.0} if name != "gelu" else {"torch": 2.5})


_QUICK = ("relu", "gelu", "silu")

CASES = [
    *(
        forward(name, model, goals=_goals(name), quick=name in _QUICK and model == "bert_base")
        for model in SIZES
        for name in POINTWISE
    ),
    *(
        backward(name, model, goals=_goals(name), quick=name == "gelu" and model == "bert_base")
        for model in SIZES
        for name in POINTWISE
    ),
    *(make("bert_base", mode, goals=_goals("")) for make in (prelu, glu) for mode in ("forward", "backward")),
]
