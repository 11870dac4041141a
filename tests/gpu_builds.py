"""The calls whose Triton kernels are compiled ahead of time: a few for each kernel, in the configurations that its table has."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnn.ops import activation, embedding, matmul, norm, softmax
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


F32, F64, I64 = torch.float32, torch.float64, torch.int64
BUILDS: list[Build] = []

# Elementwise: one kernel for all; the operation with most registers, and two outputs, and integers.
BUILDS += [
    Build(activation.activation_backward, (t(64, 4096), t(64, 4096), "mish", [])),
    Build(activation.glu_backward, (t(64, 4096), t(64, 8192), 1)),
    Build(activation.dropout, (t(64, 4096, dtype=F32), 0.1, 1 << 40)),
]

# Products: the large tile with its epilogue, a transposed operand, few tiles and a long sum, plain float32.
BUILDS += [
    Build(matmul.linear, (t(4096, 4096), t(4096, 4096), t(4096), t(4096, 4096), "gelu"), ("product",), best=True),
    Build(matmul.matmul, (t(4096, 2048).mT, t(4096, 3072)), ("product",), best=True),
    Build(matmul.linear, (t(8, 4096), t(4096, 4096), t(4096), None, None), ("product",)),
    Build(matmul.matmul, (t(1024, 1024, dtype=F32), t(1024, 1024, dtype=F32))),
]

# Softmax and losses: whole rows, lines that are cut; the losses of a language model.
BUILDS += [
    Build(softmax.softmax, (t(4096, 4096), -1)),
    Build(softmax.softmax, (t(16, 128000), -1)),
    Build(softmax.cross_entropy, (t(8192, 32000), t(8192, dtype=I64), None, -100, "mean", 0.0)),
    Build(
        softmax.cross_entropy_backward,
        (t(dtype=F32), t(8192, 32000), t(8192, dtype=I64), t(32000), t(2, 8192, dtype=F64), -100, "mean", 0.1),
    ),
    Build(softmax.mse_loss, (t(1 << 20), t(1 << 20), "mean")),
]

# Norms: rows that fit and rows that do not; a residual; both layouts of an image; few lines, cut into parts. Embedding.
IMAGE = t(8, 64, 56, 56)
ACROSS = IMAGE.contiguous(memory_format=torch.channels_last)
BUILDS += [
    Build(norm.add_layer_norm, (t(4096, 1024), t(4096, 1024), t(1024), t(1024), [1024], 1e-5)),
    Build(norm.layer_norm_backward, (t(4096, 1024), t(4096, 1024), t(1024), t(2, 4096, dtype=F64), t(4096, 1024), [1024], 1e-5)),
    Build(norm.rms_norm_backward, (t(64, 16384), t(64, 16384), t(16384), t(1, 64, dtype=F64), None, [16384], 1e-5)),
    Build(norm.rms_norm_backward, (t(64, 8192), t(64, 8192), t(8192), t(1, 64, dtype=F64), None, [8192], 1e-5)),
    Build(norm.batch_norm, (IMAGE, t(64), t(64), None, None, 1e-5)),
    Build(norm.batch_norm_backward, (ACROSS, ACROSS, t(64), t(2, 64, dtype=F64), True, 1e-5), note=" channels last"),
    Build(norm.group_norm, (ACROSS, t(64), t(64), 32, 1e-5), note=" channels last"),
    Build(embedding.embedding, (t(32000, 768), t(8, 512, dtype=I64), -1, False)),
    Build(embedding.embedding_backward, (t(8, 512, 768), t(8, 512, dtype=I64), 32000, 0, True)),
]
