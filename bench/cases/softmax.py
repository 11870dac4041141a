"""Softmax of attention scores and of wide rows, and the losses of classifiers and language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnn._numerics import softmax_scale

from . import Case, random, together, traffic

SHAPES = {
    "bert_base": (4096, 768),
    "bert_scores": (96, 128, 128),
    "gpt2_scores": (12, 1024, 1024),
    "vit_b_scores": (96, 197, 197),
    "llama_scores": (32, 512, 512),
    "gpt2_vocabulary": (512, 50257),
    "llama_rows": (32768, 1024),
    "llama_vocabulary": (256, 131072),
    "long_rows": (8, 1 << 20),
}
_CPU = list(SHAPES)[:6]
_LENGTHS = (256, 1000, 4096, 16384, 65536, 1 << 19)  # of rows, all together 32 million numbers
SHAPES |= {f"rows_of_{n}": ((1 << 25) // n, n) for n in _LENGTHS}


def rows(function: str, model: str, mode: str = "forward", dim: int = -1, **extra: Any) -> Case:
    """softmax or log_softmax of the last dimension, or of another."""
    shape = SHAPES[model]
    n = torch.Size(shape).numel()
    grad = mode == "backward"
    suffix = "" if dim == -1 else f"_dim{dim}"
    return Case(
        "softmax",
        f"{function}/{model}{suffix}/{'x'.join(map(str, shape))}",
        together(random(*shape, seed=1, scale=3.0, grad=grad)),
        theirs=lambda F, x: getattr(F, function)(x, dim),
        passes=((2 * n if grad else n, n),),
        mode=mode,
        scale=softmax_scale(function == "log_softmax", dim),
        **extra,
    )


def _classes(n: int, c: int) -> Any:
    return lambda dtype: torch.randint(c, (n,), generator=torch.Generator().manual_seed(7))


def cross_entropy(model: str, n: int, c: int, mode: str, **extra: Any) -> Case:
    """The loss on class indices: the forward reads the logits once, the backward again and writes their gradient."""

    def run(F: Any, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x, target)

    size = n * c
    passes = {"forward": ((size, 0),), "backward": ((size, size),), "train": ((size, 0), (size, size))}[mode]
    return Case(
        "softmax",
        f"cross_entropy/{model}/{n}x{c}",
        together(random(n, c, seed=1, scale=2.0, grad=mode != "forward"), _classes(n, c)),
        theirs=run,
        passes=passes,
        mode=mode,
        **extra,
    )


def linear_cross_entropy(model: str, n: int, d: int, c: int, mode: str, **extra: Any) -> Case:
    """A language model's last layer and its loss, without the array of all logits: one product, or three and their operands."""

    def theirs(F: Any, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), target)

    def ours(F: Any, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, w, target)

    grad = mode != "forward"
    return Case(
        "softmax",
        f"linear_cross_entropy/{model}/{n}x{d}x{c}",
        together(random(n, d, seed=1, grad=grad), random(c, d, seed=2, scale=d**-0.5, grad=grad), _classes(n, c)),
        theirs=theirs,
        ours=ours,
        flops=(6 if grad else 2) * n * d * c,
        passes=traffic(mode, n * d + c * d, 0, n * d + c * d),
        mode=mode,
        **extra,
    )


_GOALS = {"limit": 0.85, "torch": 2.5}
_BOTH = {"limit": 0.85, "best": 1.0}

CASES = [
    *(rows("softmax", model, goals=_GOALS, quick=model == "bert_base") for model in _CPU),
    *(rows("softmax", model, "backward", goals=_BOTH) for model in _CPU),
    rows("softmax", "bert_base", dim=0, goals=_BOTH),
    *(rows("log_softmax", model, goals=_BOTH) for model in ("bert_base", "gpt2_vocabulary")),
    *(rows("log_softmax", model, "backward", goals=_BOTH) for model in ("bert_base", "gpt2_vocabulary")),
    cross_entropy("bert_vocabulary", 512, 30522, "forward", goals={"best": 2.0}, quick=True),
    cross_entropy("bert_vocabulary", 512, 30522, "train", goals={"best": 2.0}),
    *(cross_entropy("resnet50", 256, 1000, mode, goals={"best": 2.0}) for mode in ("forward", "train")),
    *(cross_entropy("mnist", 64, 10, mode, goals={"best": 2.0}) for mode in ("forward", "train")),
    *(linear_cross_entropy("gpt2", 1024, 768, 50257, mode, goals={"limit": 0.8, "best": 1.0}) for mode in ("forward", "train")),
    *(
        linear_cross_entropy(
            "llama3", 8192, 4096, 131072, mode, dtypes=(torch.bfloat16,), goals={"limit": 0.8, "best": 1.0}, devices=("cuda",)
        )
        for mode in ("forward", "train")
    ),
    *(cross_entropy("gpt2", 4096, 50257, mode, goals={"best": 2.0}) for mode in ("forward", "backward", "train")),
]

# What `make gpu` measures
_GPU: dict[str, Any] = {"devices": ("cuda",), "quick": True, "dtypes": (torch.float32, torch.bfloat16)}
_COPY = {"limit": 0.8}
CASES += [
    rows("softmax", "llama_rows", goals=_COPY, **_GPU),
    cross_entropy("llama3", 1024, 131072, "forward", goals=_COPY, **_GPU),
    linear_cross_entropy("llama2", 2048, 4096, 32000, "train", goals={"torch": 1.0}, **_GPU | {"dtypes": (torch.bfloat16,)}),
    rows("softmax", "llama_vocabulary", "backward", goals=_COPY, **_GPU),
    rows("log_softmax", "long_rows", goals=_COPY, **_GPU),
    cross_entropy("llama3", 1024, 131072, "train", goals=_COPY, **_GPU),
    cross_entropy("long_rows", 8, 1 << 20, "forward", goals=_COPY, **_GPU),
]

# What `make gpu GPU=--long` measures besides
_LONG = _GPU | {"quick": False, "goals": {"limit": 0.9}}
CASES += [
    *(rows("softmax", f"rows_of_{n}", **_LONG) for n in _LENGTHS),
    *(cross_entropy(f"rows_of_{n}", (1 << 25) // n, n, "forward", **_LONG) for n in _LENGTHS),
    linear_cross_entropy("llama3", 2048, 4096, 131072, "train", **_LONG | {"goals": {"torch": 3.0}, "dtypes": (torch.bfloat16,)}),
]
