"""Activations and dropout on what passes between the layers of BERT-base (32 sentences of 128 tokens) and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnn._checks.activation import POINTWISE
from fastnn._numerics import sum_of_magnitudes

from . import Case, random, together

BERT = {"bert_base": (4096, 768), "bert_base_up": (4096, 3072)}
SIZES = BERT | {
    "gpt2_up": (1024, 3072),
    "vit_b_up": (3152, 3072),  # 16 images of 197 tokens
    "llama_gate": (512, 14336),
    "mobilenet_v2": (768, 12544),  # 8 images, 96 channels of 112 × 112
    "mnist_hidden": (64, 512),
    "llama_batch": (8192, 4096),
}
#: The activation that a model really has.
_OF_MODELS = [
    ("gelu_tanh", "gpt2_up"),
    ("gelu", "vit_b_up"),
    ("silu", "llama_gate"),
    ("relu6", "mobilenet_v2"),
    ("relu", "mnist_hidden"),
]


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


def dropout(model: str, **extra: Any) -> Case:
    """Every provider draws other elements: what it keeps must be right, and a tenth must be zero."""
    rows, columns = SIZES[model]
    n, p = rows * columns, 0.1

    def judge(out: Tensor, x: Tensor) -> Tensor:
        dropped = (out == 0) & (x != 0)
        if abs(dropped.double().mean().item() - p) > 6 * (p * (1 - p) / n) ** 0.5:  # six standard deviations
            return torch.full_like(out, torch.nan)
        return torch.where(dropped, x / (1 - p), out)

    return Case(
        "activation",
        f"dropout/{model}/{rows}x{columns}",
        together(random(rows, columns, seed=1)),
        theirs=lambda F, x: F.dropout(x, p),
        judge=judge,
        passes=((n, n),),
        **extra,
    )


def _goals(name: str) -> dict[str, float]:
    return {"limit": 0.85} | ({"best": 1.0} if name != "gelu" else {"torch": 2.5})



CASES = [
    *(
        forward(name, model, goals=_goals(name), quick=name == "gelu" and model == "bert_base")
        for model in BERT
        for name in POINTWISE
    ),
    *(
        backward(name, model, goals=_goals(name))
        for model in BERT
        for name in POINTWISE
    ),
    *(make(name, model, goals=_goals(name)) for name, model in _OF_MODELS for make in (forward, backward)),
    dropout("bert_base", goals=_goals("")),
    *(make("bert_base", mode, goals=_goals("")) for make in (prelu, glu) for mode in ("forward", "backward")),
]

# What `make gpu` measures
_GPU: dict[str, Any] = {"devices": ("cuda",), "quick": True, "dtypes": (torch.float32, torch.bfloat16)}
CASES += [
    forward("gelu", "llama_batch", goals={"limit": 0.8}, **_GPU),
    backward("gelu", "llama_batch", goals={"limit": 0.8}, **_GPU),
    dropout("llama_batch", goals={"limit": 0.8}, **_GPU),
]
