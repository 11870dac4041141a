"""What the ways of convolution on the CPU share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from .engine import packed
from .engine.build import Kernel, made_by

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SERIAL = 1 << 19  # multiplications below which a second thread costs more than it brings
_SMALL_WEIGHT = 4096  # elements below which arranging anew is cheaper than looking the arranged weight up


def _kernel(module: str, kind: str, dtype: torch.dtype, signature: str) -> Kernel:
    return Kernel(f"{kind}_{_NAMES[dtype]}", signature, made_by(module, kind, _NAMES[dtype]))


_ARRANGE = {d: _kernel("conv_code", "arrange", d, "i" * 12) for d in _NAMES}


def _three(values: Sequence[int], missing: int) -> list[int]:
    return [missing] * (3 - len(values)) + list(values)


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _cut(n: int, most: int) -> int:
    """n in as few, as even stretches as can be."""
    return -(-n // -(-n // most)) if n > 0 else 1


def _even(steps: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether the elements of dimensions, the innermost first, are at even distances."""
    expected = None
    for step, n in zip(steps, sizes, strict=True):
        if n > 1:
            if expected is not None and step != expected:
                return False
            expected = step * n
    return True


def _keep(weight: Tensor, size: int, pack: Callable[[int], int], how: Hashable) -> packed.Packing | None:
    if weight.is_inference() or not (weight.is_contiguous() or weight.movedim(1, -1).is_contiguous()):
        return None
    return packed.get(weight, size, pack, how)
