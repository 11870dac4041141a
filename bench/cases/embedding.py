"""The tables of words that language models begin with: rows taken, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnn._numerics import sum_of_magnitudes

from . import Case, random, together

TABLES = {"bert_base": (30522, 768, 4096), "minilm": (30522, 384, 2048), "characters": (1000, 64, 4096)}
_CPU = list(TABLES)
TABLES["llama"] = (32000, 4096, 16384)


def taken(model: str, mode: str = "forward", **extra: Any) -> Case:
    """A batch of words from a table; training writes a gradient as large as the table"""
    rows, size, words = TABLES[model]

    def indices(dtype: torch.dtype) -> Tensor:
        return torch.randint(rows, (words,), generator=torch.Generator().manual_seed(3))

    def run(F: Any, words: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(words, weight)

    n = words * size
    return Case(
        "embedding",
        f"embedding/{model}/{rows}x{size}_{words}",
        together(indices, random(rows, size, seed=1, grad=mode == "train")),
        theirs=run,
        parameters=(1,),
        passes=((n, n), (n, rows * size)) if mode == "train" else ((n, n),),
        mode=mode,
        scale=sum_of_magnitudes(run),  # of the places that took a row
        **extra,
    )


CASES = [
    *(taken(model, goals={"best": 1.0}, quick=model == "minilm") for model in _CPU),
    *(taken(model, "train", goals={"best": 1.0}) for model in _CPU),
]

# What `make gpu` measures
_GPU: dict[str, Any] = {"devices": ("cuda",), "quick": True, "dtypes": (torch.float32, torch.bfloat16)}
CASES += [taken("llama", mode, goals={"limit": 0.8}, **_GPU) for mode in ("forward", "train")]
