"""The calls whose Triton kernels are compiled ahead of time: a few for each kernel, in the configurations that its table has."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnn.ops import activation, attention, conv, embedding, matmul, norm, rnn, softmax
from fastnn.ops._operator import Operator

ALL = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Build:
    """A call of an operator. Tensors are written as their shape and dtype: ``t(4096, 4096)``.

    matrix: names of the kernels launched that must use the matrix instruction; best: it must be the newest one of each chip
    (wgmma, tcgen05). copied: kernels that must read, or add to memory, by tensor maps (TMA) where the chip has them. spills:
    bytes that are allowed, by Triton 3.6 and 3.7, which differ.
    chips: what to compile for; only: these of the kernels launched, where another build has the rest.
    """

    op: Operator
    args: tuple[Any, ...]
    matrix: tuple[str, ...] = ()
    best: bool = False
    copied: tuple[str, ...] = ()
    spills: int = 0
    chips: tuple[str, ...] = ALL
    only: tuple[str, ...] = ()
    note: str = ""
    float32: str | None = None  # what set_float32_precision is told
    plain: bool = False  # convolutions by columns
    deterministic: bool = False

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


F32, F64, I64, BF16, F16 = torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.float16
BUILDS: list[Build] = []

# Elementwise: one kernel for all; the operation with most registers, and two outputs, and integers.
BUILDS += [
    Build(activation.activation_backward, (t(64, 4096), t(64, 4096), "mish", [])),
    Build(activation.glu_backward, (t(64, 4096), t(64, 8192), 1)),
    Build(activation.dropout, (t(64, 4096, dtype=F32), 0.1, 1 << 40)),
]

# Products: the large tile with its epilogue, a transposed operand, few tiles and a long sum, plain float32.
BUILDS += [
    Build(matmul.linear, (t(4096, 4096), t(4096, 4096), t(4096), t(4096, 4096), "gelu"), ("product",), best=True,
          copied=("product",)),
    Build(matmul.matmul, (t(4096, 2048).mT, t(4096, 3072)), ("product",), best=True, copied=("product",)),
    Build(matmul.matmul, (t(16, 12, 512, 64), t(16, 12, 512, 64).mT), ("product",), best=True, copied=("product",),
          chips=("sm_90", "sm_100")),
    Build(matmul.linear, (t(8, 4096), t(1024, 4096), t(1024), None, None), ("product",)),
    Build(matmul.matmul, (t(1024, 1024, dtype=F32), t(1024, 1024, dtype=F32).mT)),  # as recurrences and columns have it
    Build(matmul.matmul, (t(2048, 2048, dtype=F32), t(2048, 2048, dtype=F32)), ("product",), float32="tf32x3", note=" tf32x3",
          chips=("sm_90",)),
    Build(matmul.matmul, (t(2048, 2048, dtype=F32), t(2048, 2048, dtype=F32)), ("product",), float32="bf16x3", note=" bf16x3",
          chips=("gfx942",)),
]

# Softmax and losses: whole rows, lines that are cut; the losses of a language model.
BUILDS += [
    Build(softmax.softmax, (t(4096, 4096), -1)),
    Build(softmax.softmax, (t(4096, 30522), -1), chips=("sm_90", "gfx942")),
    Build(softmax.softmax_backward, (t(4096, 16384, dtype=F32), t(4096, 16384, dtype=F32), -1)),
    Build(softmax.softmax, (t(16, 128000), -1)),
    Build(softmax.cross_entropy, (t(8192, 32000), t(8192, dtype=I64), None, -100, "mean", 0.0)),
    Build(softmax.cross_entropy, (t(8192, 50257), t(8192, dtype=I64), None, -100, "mean", 0.0), chips=("sm_90",)),
    Build(softmax.cross_entropy, (t(8, 1 << 20), t(8, 1 << 20), None, -100, "mean", 0.1), chips=("sm_90",), note=" in parts"),
    Build(
        softmax.cross_entropy_backward,
        (t(), t(8192, 32000), t(8192, dtype=I64), t(32000), t(2, 8192, dtype=F64), -100, "mean", 0.1),
    ),
    Build(
        softmax.linear_cross_entropy,
        (t(2048, 4096), t(131072, 4096), None, t(2048, dtype=I64), None, -100, "mean", 0.0, True), ("product",), best=True,
        chips=("sm_90", "gfx942"),
    ),
    Build(softmax.mse_loss, (t(1 << 20), t(1 << 20), "mean")),
]

# Norms: rows that fit and rows that do not; a residual; both layouts of an image; few lines, cut into parts. Embedding.
IMAGE = t(8, 64, 56, 56)
ACROSS = IMAGE.contiguous(memory_format=torch.channels_last)
BUILDS += [
    Build(norm.add_layer_norm, (t(4096, 1024), t(4096, 1024), t(1024), t(1024), [1024], 1e-5)),
    Build(norm.layer_norm, (t(4096, 1000), t(1000), t(1000), [1000], 1e-5), chips=("sm_90",)),
    Build(norm.add_layer_norm, (t(64, 32768), t(64, 32768), t(32768), t(32768), [32768], 1e-5)),
    Build(norm.layer_norm_backward, (t(4096, 1024), t(4096, 1024), t(1024), t(2, 4096, dtype=F64), t(4096, 1024), [1024], 1e-5)),
    Build(norm.add_layer_norm, (t(16, 131072), t(16, 131072), t(131072), t(131072), [131072], 1e-5)),
    Build(norm.rms_norm_backward, (t(64, 16384), t(64, 16384), t(16384), t(1, 64, dtype=F64), t(64, 16384), [16384], 1e-5)),
    Build(norm.rms_norm_backward, (t(64, 8192), t(64, 8192), t(8192), t(1, 64, dtype=F64), None, [8192], 1e-5), chips=("sm_90",)),
    Build(norm.batch_norm, (IMAGE, t(64), t(64), None, None, 1e-5)),
    Build(norm.batch_norm, (t(64, 512, 7, 7), t(512), t(512), None, None, 1e-5), chips=("sm_90", "gfx942")),
    Build(norm.batch_norm_backward, (ACROSS, ACROSS, t(64), t(2, 64, dtype=F64), True, 1e-5), note=" channels last"),
    Build(norm.group_norm, (ACROSS, t(64), t(64), 32, 1e-5), note=" channels last"),
    Build(embedding.embedding, (t(32000, 768), t(8, 512, dtype=I64), -1, False)),
    Build(embedding.embedding_backward, (t(8, 512, 768), t(8, 512, dtype=I64), 32000, 0, True)),
]

# Attention: each kernel with numbers of 16 bits, in a model's usual sizes; few queries; a bias with a gradient; plain float32.


def attend(*sizes: int, dtype: torch.dtype = BF16, causal: bool = True, mask: Tensor | None = None, left: int = -1,
           ) -> tuple[Any, ...]:  # fmt: skip
    """Batch, heads, heads of keys, queries, keys, size of a head"""
    batch, heads, kv_heads, queries, keys, size = sizes
    q, k = t(batch, heads, queries, size, dtype=dtype), t(batch, kv_heads, keys, size, dtype=dtype)
    return q, k, k, mask, None, None, None, 0.0, 0, 0.1, left, 0 if causal else -1, True, 0, 0.0


def attend_backward(*shape: int, **options: Any) -> tuple[Any, ...]:
    q, k, v, mask, *rest = attend(*shape, **options)
    return q, q, k, v, mask, *rest[:3], q, t(2, *q.shape[:-1], dtype=F32), None, mask is not None, *rest[3:]


ROWS, LINES, ENDS = t(12, 4096, 64, dtype=F16), t(16, 4096, 128), t(9, dtype=I64)  # of sequences one after the other
BUILDS += [
    Build(attention.attention, attend(4, 16, 16, 2048, 2048, 128), ("forward",), best=True, note=" causal"),
    Build(attention.attention, attend(4, 16, 16, 2048, 2048, 128, causal=False), ("forward",), best=True, chips=("sm_90",)),
    Build(attention.attention, attend(1, 16, 16, 65536, 65536, 128, left=1024), ("forward",), best=True, chips=("sm_90",),
          note=" a window"),
    Build(attention.attention, attend(4, 12, 12, 512, 512, 64, left=256), ("forward",), best=True, chips=("sm_90",),
          note=" a window"),
    Build(attention.attention, attend(4, 12, 12, 512, 512, 64, causal=False, mask=t(4, 1, 1, 512, dtype=torch.bool)),
          ("forward",), best=True, chips=("sm_90",), note=" padded"),
    Build(attention.attention, attend(4, 16, 16, 2048, 2048, 128, causal=False, mask=t(2048, 2048, dtype=torch.bool)),
          ("forward",), best=True, chips=("sm_90",), note=" masked"),
    Build(attention.attention, (LINES, LINES, LINES, None, None, ENDS, ENDS, 0.0, 0, 0.1, -1, 0, True, 0, 0.0), ("forward",),
          best=True, spills=56, chips=("sm_90",), note=" sequences"),
    Build(attention.attention, attend(4, 8, 8, 2048, 2048, 256), ("forward",), best=True, chips=("sm_90",)),
    Build(
        attention.attention_backward, attend_backward(4, 16, 16, 2048, 2048, 80), ("backward_keys",),
        best=True, spills=272, chips=("sm_90",), only=("backward_keys",), note=" heads of 80",
    ),
    Build(
        attention.attention_backward, attend_backward(4, 16, 16, 2048, 2048, 128, left=1024), ("backward_keys",),
        best=True, spills=472, chips=("sm_90",), only=("backward_keys",), note=" a window",
    ),
    Build(
        attention.attention_backward, attend_backward(4, 16, 16, 2048, 2048, 128, causal=False), ("backward_keys",),
        best=True, spills=128, chips=("sm_90",), only=("backward_rows", "backward_keys"), note=" all see all",
    ),
    Build(
        attention.attention_backward, attend_backward(4, 16, 16, 2048, 2048, 128, causal=False, mask=t(16, 2048, 2048)),
        ("backward_keys",), best=True, spills=160, chips=("sm_90",), only=("backward_keys",), note=" a bias",
    ),
    Build(
        attention.attention_backward, (*attend_backward(4, 16, 16, 2048, 2048, 128)[:12], 0.1, 1 << 40, 0.1, -1, 0, True, 0, 0.0),
        ("backward_keys",), best=True, spills=176, chips=("sm_90",), note=" dropout",
    ),
    Build(
        attention.attention_backward, attend_backward(4, 16, 16, 2048, 2048, 128), ("backward_queries", "backward_keys"),
        best=True, chips=("sm_80", "sm_100", "gfx942"), note=" causal",
    ),
    Build(
        attention.attention_backward, attend_backward(4, 16, 16, 2048, 2048, 128), ("backward_keys",),
        best=True, copied=("backward_keys",), spills=264, chips=("sm_90",), only=("backward_keys",), note=" causal",
    ),
    Build(
        attention.attention_backward, attend_backward(4, 16, 16, 2048, 2048, 128), ("backward_queries", "backward_keys"),
        best=True, spills=112, chips=("sm_90",), deterministic=True, note=" in one order",
    ),
    Build(
        attention.attention_backward,
        (LINES, LINES, LINES, LINES, None, None, ENDS, ENDS, LINES, t(2, 16, 4096, dtype=F32), None, False, 0.0, 0, 0.1, -1, 0,
         True, 0, 0.0),
        ("backward_keys",), best=True, spills=344, chips=("sm_90",), only=("backward_keys",), note=" sequences",
    ),
    Build(
        attention.attention, attend(4, 12, 12, 512, 512, 64, dtype=F16, causal=False), ("forward",), best=True, chips=("sm_90",)
    ),
    Build(
        attention.attention_backward,
        (ROWS, ROWS, ROWS, ROWS, t(4096, 4096, dtype=F16), t(12, dtype=F32), ENDS, ENDS, ROWS, t(2, 12, 4096, dtype=F32),
         t(12, 4096, dtype=F32), True, 0.1, 1 << 40, 0.1, 256, 0, True, 4, 30.0),
        ("backward_queries", "backward_keys", "backward_mask"), spills=224, chips=("sm_90",), deterministic=True,
        note=" everything",
    ),
    Build(
        attention.attention_backward, attend_backward(4, 12, 12, 512, 512, 64), ("backward_queries", "backward_keys"),
        chips=("sm_100",),
    ),
    Build(
        attention.attention_backward, attend_backward(4, 12, 12, 512, 512, 64, causal=False, mask=t(12, 512, 512)),
        ("backward_mask",), chips=("sm_80", "sm_100", "gfx942"), only=("backward_mask",), note=" a mask's gradient",
    ),
    Build(attention.attention, attend(4, 32, 8, 1, 4096, 128), ("forward",), chips=("sm_90",), note=" few queries"),
    Build(attention.attention, attend(4, 32, 8, 1, 4096, 128), only=("join",), note=" few queries"),
    Build(attention.attention, attend(4, 12, 12, 512, 512, 64, dtype=F32), chips=("sm_90",)),
    Build(attention.attention, attend(4, 12, 12, 512, 512, 64, dtype=F32), ("forward",), best=True, float32="tf32", note=" tf32",
          chips=("sm_90",)),
    Build(
        attention.attention_backward, attend_backward(4, 16, 16, 2048, 2048, 128, dtype=F32), ("backward_queries",), best=True,
        float32="bf16x3", spills=32, note=" bf16x3", chips=("sm_90",),
    ),
]

# Convolutions: a usual layer in both formats, its input's gradient and its weight's, a stride; channels that 16 does not divide;
# small images, whose rows 8 does not divide; a first layer of three channels; depthwise; each kind of float32.
LAST = torch.channels_last
X, W3 = t(32, 128, 56, 56).to(memory_format=LAST), t(128, 128, 3, 3).to(memory_format=LAST)
FIRST, WEIGHT = t(32, 128, 56, 56), t(128, 128, 3, 3)
IMAGES, STEM = t(32, 3, 224, 224), t(64, 3, 7, 7)
ONE, TWO, SAME = ([1, 1], [1, 1], [1, 1]), ([2, 2], [1, 1], [1, 1]), [0, 0]
SEVEN = [2, 2], [3, 3], [1, 1]
CONV, WEIGHT_CONV = ("convolution",), ("weight_gradient",)
BUILDS += [
    Build(conv.conv, (X, W3, t(128), X, *ONE, False, SAME, 1, "gelu"), CONV, note=" channels last", best=True, copied=CONV),
    Build(conv.conv, (FIRST, WEIGHT, t(128), FIRST, *ONE, False, SAME, 1, "gelu"), CONV, best=True, copied=CONV),
    Build(conv.conv, (X, t(256, 128, 3, 3), t(256), None, *ONE, False, SAME, 1, "gelu"), CONV, best=True, copied=CONV),
    Build(
        conv.conv, (X, W3, None, None, *TWO, True, [1, 1], 1, None), CONV, chips=("sm_90",), best=True, copied=CONV
    ),
    Build(conv.conv, (X, W3, t(128), None, *TWO, False, SAME, 1, "relu"), CONV, best=True, chips=("sm_90", "gfx942")),
    Build(
        conv.conv, (t(32, 200, 28, 28), t(200, 200, 3, 3), t(200), None, *ONE, False, SAME, 1, None), CONV, best=True,
        copied=CONV, chips=("sm_90",),
    ),
    Build(
        conv.conv, (t(32, 512, 7, 7), t(512, 512, 3, 3), t(512), t(32, 512, 7, 7), *ONE, False, SAME, 1, "silu"), CONV,
        best=True, copied=CONV, chips=("sm_90", "gfx942"),
    ),
    Build(conv.conv, (X, t(128, 4, 3, 3), None, None, *ONE, False, SAME, 32, None), CONV, chips=("sm_90", "gfx942")),
    Build(conv.conv, (IMAGES, STEM, t(64), None, *SEVEN, False, SAME, 1, "relu"), CONV),
    Build(conv.conv, (X, t(128, 1, 3, 3), t(128), X, *ONE, False, SAME, 128, "gelu"), note=" channels last"),
    Build(conv.conv, (FIRST, t(128, 1, 3, 3), t(128), FIRST, *ONE, False, SAME, 128, "gelu"), chips=("sm_90", "gfx942")),
    Build(conv.conv, (X.float(), W3.float(), None, None, *ONE, False, SAME, 1, None), plain=True, note=" by columns"),
    Build(
        conv.conv, (X.float(), W3.float(), None, None, *TWO, True, [1, 1], 1, None), plain=True, only=("col2im",),
        note=" by columns",
    ),
    Build(conv.conv_weight, (X, X, [3, 3], *ONE, 1), WEIGHT_CONV, best=True, copied=WEIGHT_CONV),
    Build(conv.conv_weight, (t(32, 128, 28, 28), FIRST, [3, 3], *TWO, 1), WEIGHT_CONV, chips=("sm_90",)),
    Build(conv.conv_weight, (t(32, 64, 112, 112), IMAGES, [7, 7], *SEVEN, 1), WEIGHT_CONV, chips=("sm_90",)),
    Build(conv.conv_weight, (X, X, [3, 3], *ONE, 128), chips=("sm_90", "gfx942")),
    Build(conv.conv, (FIRST.float(), WEIGHT.float(), t(128, dtype=F32), None, *ONE, False, SAME, 1, None)),
    Build(
        conv.conv, (FIRST.float(), WEIGHT.float(), t(128, dtype=F32), FIRST.float(), *ONE, False, SAME, 1, "gelu"), CONV,
        float32="tf32", note=" tf32", chips=("sm_80", "sm_90", "sm_100"), best=True, copied=CONV,
    ),
    Build(
        conv.conv, (FIRST.float(), WEIGHT.float(), t(128, dtype=F32), None, *ONE, False, SAME, 1, None), CONV, float32="tf32x3",
        note=" tf32x3", chips=("sm_80", "sm_90"), copied=CONV,
    ),
    Build(conv.conv_weight, (FIRST.float(), FIRST.float(), [3, 3], *ONE, 1)),
    Build(conv.conv_weight, (FIRST.float(), FIRST.float(), [3, 3], *ONE, 1), WEIGHT_CONV, float32="tf32", note=" tf32"),
    Build(conv.conv_weight, (FIRST.float(), FIRST.float(), [3, 3], *ONE, 1), WEIGHT_CONV, float32="bf16x3", note=" bf16x3",
          chips=("sm_90", "gfx942")),
]  # fmt: skip

# Recurrent layers step by step; at once they are CUDA C.
STATE, WIDE = t(1024, 1024, dtype=F32), t(4096, 1024, dtype=F32)
BUILDS += [
    Build(rnn.recurrent, (STATE, STATE, STATE, WIDE, WIDE, None, None, None, None, "lstm", False, True)),
    Build(
        rnn.recurrent_backward,
        (STATE, STATE, t(0, dtype=F32), STATE, STATE, None, WIDE[:3072], WIDE[:3072], None, None, None, STATE,
         t(1024, 4096, dtype=F32), None, "gru", False, [True, True, False, True, True, False, False, False]),
        only=("step_back",),
    ),
]  # fmt: skip
