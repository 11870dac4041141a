"""The calls whose Triton kernels are compiled ahead of time: a few for each kernel, in the configurations that its table has."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnn.ops import activation, matmul
from fastnn.ops._operator import Operator

ALL = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Build:
    """A call of an operator. Tensors are written as their shape and dtype: ``t(4096, 4096)``.

    matrix: names of the kernels launched that must use the matrix instruction; best: it must be the newest one of each chip
    (wgmma, tcgen05). spills: bytes that are allowed. chips: what to compile for.
    """

    op: Operator
    args: tuple[Any, ...]
    matrix: tuple[str, ...] = ()
    best: bool = False
    spills: int = 0
    chips: tuple[str, ...] = ALL
    note: str = ""

    @property
    def family(self) -> str:
        return self.op.family

    @property
    def name(self) -> str:
        shapes = ", ".join(
            "×".join(map(str, a.shape)) + f" {str(a.dtype)[6:]}" if isinstance(a, Tensor) else str(a)
            for a in self.args if a is not None and a != []
        )  # fmt: skip
        return f"{self.op.name}({shapes}){self.note}"

    def call(self) -> tuple[Operator, tuple[Any, ...]]:
        return self.op, self.args


def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


F32, BF16 = torch.float32, torch.bfloat16
BUILDS: list[Build] = []

# Activations: one compiled kernel serves all chips' sizes; the other dtypes differ in two conversions.
BUILDS += [
    Build(activation.activation, (t(64, 4096), "gelu", [])),
    Build(activation.activation_backward, (t(64, 4096), t(64, 4096), "mish", [])),
    Build(activation.prelu_backward, (t(8, 64, 56, 56), t(8, 64, 56, 56), t(64))),
    Build(activation.glu_backward, (t(64, 4096), t(64, 8192), 1)),
    Build(activation.dropout, (t(64, 4096, dtype=F32), 0.1, 1 << 40)),
]

# Products: the large tile with its epilogue, a transposed operand, few tiles and a long sum, a batch, plain float32.
BUILDS += [
    Build(matmul.linear, (t(4096, 4096), t(4096, 4096), t(4096), t(4096, 4096), "gelu"), ("product",), best=True),
    Build(matmul.matmul, (t(4096, 2048).mT, t(4096, 3072)), ("product",), best=True),
    Build(matmul.linear, (t(8, 4096), t(4096, 4096), t(4096), None, None), ("product",)),
    Build(matmul.matmul, (t(96, 128, 64), t(96, 64, 128)), ("product",)),
    Build(matmul.matmul, (t(1024, 1024, dtype=F32), t(1024, 1024, dtype=F32))),
]
