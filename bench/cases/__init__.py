"""What is measured, as data: one file a family, each with a list ``CASES``.

A new kernel is benchmarked by declaring its cases here and nothing else: the same declaration serves speed and
correctness.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastnn._numerics import Scale

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        family: matmul, activation, softmax, …
        name: ``group/what/size``; the first part is the row of the speed table that the case belongs to.
        make: dtype → the inputs, the same for every provider. Tensors that require a gradient get one in ``backward``
            and ``train``.
        theirs: the work in PyTorch's words: ``theirs(F, *inputs)``, F having torch's functions; also the float64
            reference. Its result is a tensor or, without gradients, may be a tuple of several.
        reference: the float64 reference where ``theirs`` has weights of its own, which float64 inputs do not widen.
        judge: what of the output is compared where the output itself is random: ``judge(output, *inputs)``.
        ours: the same in fastnn's words, where they differ (``activation=`` for a fused GELU).
        numpy: the same on NumPy arrays, where NumPy has the operation: ``numpy(*arrays)``.
        parameters: positions of the inputs that are a model's constant weights in inference, which peers may pack beforehand.
        flops: floating-point operations, a multiply-add counted as two; 0 where memory is the measure.
        passes: (elements read, elements written) of each pass over memory that nobody can avoid.
        mode: forward (no gradients), backward (of a forward done before), train (both).
        dtypes: those of the default run.
        scale: the magnitudes at which errors are counted where the results themselves may cancel (see
            fastnn._numerics).
        goals: what the project wants: "limit" (fraction of it), "best" (ratio to the best peer), a peer's name (ratio
            to it), "mean" (geometric mean of "best" over the group), "float32" (ratio to our own float32 time),
            "seconds" (at most).
        quick: part of ``--quick``.
        programs: for what only a new process can show, a program a provider that prints the seconds and whether the
            result was right; ``cold``: each with an empty kernel cache.
        devices: where it can be measured.
        moved: called with the inputs once they are on a GPU, for what a library there wants of them.
    """

    family: str
    name: str
    make: Callable[[torch.dtype], Inputs]
    theirs: Callable[..., Any]
    ours: Callable[..., Any] | None = None
    numpy: Callable[..., Any] | None = None
    reference: Callable[..., Tensor] | None = None
    judge: Callable[..., Tensor] | None = None
    parameters: tuple[int, ...] = ()
    flops: int = 0
    passes: tuple[tuple[int, int], ...] = ()
    mode: str = "forward"
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    scale: Scale | None = None
    goals: Mapping[str, float] = field(default_factory=dict)
    quick: bool = False
    programs: Mapping[str, str] = field(default_factory=dict)
    cold: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    moved: Callable[[Inputs], object] | None = None

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    def bytes(self, dtype: torch.dtype) -> int:
        """The least memory traffic of one call."""
        return sum(map(sum, self.passes)) * dtype.itemsize

    def on(self, **changes: Any) -> Case:
        """A variant of this case."""
        return replace(self, **changes)


def traffic(mode: str, inputs: int, out: int, leaves: int) -> tuple[tuple[int, int], ...]:
    """``passes`` of a product or the like: a backward reads the inputs and the output's gradient, and writes the leaves'."""
    forward, backward = (inputs, out), (inputs + out, leaves)
    return {"forward": (forward,), "backward": (backward,), "train": (forward, backward)}[mode]


def families() -> list[str]:
    """The names of all families that have cases."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def cases(family: str) -> list[Case]:
    """The cases of a family.

    Raises:
        ValueError: there is no such family.
    """
    if family not in families():
        raise ValueError(f"unknown family {family!r}; there are: {', '.join(families())}")
    return list(import_module(f"{__name__}.{family}").CASES)


def random(*shape: int, seed: int = 0, scale: float = 1.0, grad: bool = False) -> Callable[[torch.dtype], Tensor]:
    """A maker of one normally distributed tensor; it is the same in every run."""

    def make(dtype: torch.dtype) -> Tensor:
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(scale).to(dtype)
        return values.requires_grad_(grad)

    return make


def together(*makers: Callable[[torch.dtype], Any]) -> Callable[[torch.dtype], Inputs]:
    """A maker of all inputs from the makers of each."""
    return lambda dtype: tuple(make(dtype) for make in makers)
