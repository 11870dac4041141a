"""Activations, PReLU, GLU and dropout on the CPU: which elements lie where, and which kernel walks them.

Tensors of any strides are walked in place where, once dimensions that lie behind each other are merged, at most three
remain and all tensors have unit stride in the innermost; another tensor is first copied into the output's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..layout import (
    Dims,
    along_channels,
    dropout_keys,
    halves,
    last_three,
    like,
    merged,
    row_major,
    sum_by_channel,
)
from .engine import threads
from .engine.build import Kernel, made_by
from .engine.overhead import torch_is_shorter

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SIGNATURE = "i" * 26 + "ff"  # of every kernel of activation_code
_SERIAL = 32 << 10  # bytes below which a second thread costs more than it brings
_BLOCK = 4096  # elements, at least, that a thread takes at once


@cache
def _kernel(kind: str, dtype: torch.dtype, option: str | bool | None = None) -> Callable[..., None]:
    args = (_NAMES[dtype],) if option is None else (_NAMES[dtype], option)
    return Kernel("_".join([kind, *map(str, args)]), SIGNATURE, made_by("activation_code", kind, *args)).load()


def _run(kernel: Callable[..., None], dims: Dims, inputs: Sequence[Tensor], outputs: Sequence[Tensor],
         index: Sequence[int] = (0, 0, 0), ints: Sequence[int] = (0, 0, 0),
         floats: Sequence[float] = (0.0, 0.0)) -> None:
    """Launch over at most three dims; their strides are listed in the order outputs, inputs."""
    outer, rows, (n, _) = last_three(dims)
    total = outer[0] * rows[0] * n
    nt = 1 if total * outputs[0].itemsize < _SERIAL else threads.count()
    split = nt > 1 and outer[0] * rows[0] < 8 * nt
    block = max(_BLOCK, -(-n // (8 * nt) // 64) * 64) if split else n
    slots = []
    for tensors, room, first in ((inputs, 3, len(outputs)), (outputs, 2, 0)):
        for k in range(room):
            t = tensors[k] if k < len(tensors) else None
            if t is None:
                slots += [0, 0, 0]
            else:
                slots += [t.data_ptr(), outer[1][first + k] * t.itemsize, rows[1][first + k] * t.itemsize]
    kernel(outer[0], rows[0], n, block, nt, *slots, *index, *ints, *floats)


def run_elementwise(kernel: Callable[..., None], out: Tensor, inputs: Sequence[Tensor],
                    floats: Sequence[float] = (0.0, 0.0)) -> None:
    """Same-shaped tensors into an output that is dense, in whatever order its dimensions lie."""
    n = out.numel()
    if n == 0:
        return
    if out.is_contiguous() and all(t.is_contiguous() for t in inputs):  # the usual case, without a detour
        nt = 1 if n * out.itemsize < _SERIAL else threads.count()
        block = n if nt == 1 else max(_BLOCK, -(-n // (8 * nt) // 64) * 64)
        a, b, c, *_ = *[t.data_ptr() for t in inputs], 0, 0
        kernel(1, 1, n, block, nt, a, 0, 0, b, 0, 0, c, 0, 0, out.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, *floats)
    else:
        dims = merged(out.shape, [out.stride(), *(t.stride() for t in inputs)])
        if len(dims) > 3 or dims[-1][1] != [1] * (1 + len(inputs)):
            inputs = [t if t.stride() == out.stride() else like(out, t) for t in inputs]
            dims = [(n, [1] * (1 + len(inputs)))]
        _run(kernel, dims, inputs, (out,), floats=floats)


def _two(params: Sequence[float]) -> tuple[float, float]:
    return (float(params[0]) if params else 0.0, float(params[1]) if len(params) > 1 else 0.0)


def activation(out: Tensor, input: Tensor, name: str, params: Sequence[float]) -> None:
    """out = f(input)"""
    run_elementwise(_kernel("activation", input.dtype, name), out, (input,), _two(params))


def activation_backward(out: Tensor, grad: Tensor, input: Tensor, name: str, params: Sequence[float]) -> None:
    """out = grad f'(input)"""
    run_elementwise(_kernel("activation_backward", input.dtype, name), out, (grad, input), _two(params))


def _prelu(kind: str, tensors: Sequence[Tensor], outputs: Sequence[Tensor], weight: Tensor) -> None:
    """The kernel with the weight along the elements of a row, or with one weight a row."""
    shape, w = outputs[0].shape, along_channels(weight, outputs[0])
    dims = merged(shape, [t.stride() for t in (*outputs, *tensors, w)])
    *steps, w_step = dims[-1][1]
    if len(dims) > 3 or set(steps) != {1} or w_step not in (0, 1):
        tensors = [like(outputs[0], t) for t in tensors]
        dims = merged(shape, [t.stride() for t in (*outputs, *tensors, w)])
        if len(dims) > 3 or dims[-1][1][-1] not in (0, 1):
            w = like(outputs[0], w)
            dims = merged(shape, [t.stride() for t in (*outputs, *tensors, w)])
    _run(_kernel(kind, weight.dtype, dims[-1][1][-1] == 0), dims, (*tensors, w), outputs)


def prelu(out: Tensor, input: Tensor, weight: Tensor) -> None:
    """out = input, times its channel's weight where negative"""
    if out.numel():
        _prelu("prelu", (input,), (out,), weight)


def prelu_backward(out: tuple[Tensor, Tensor], grad: Tensor, input: Tensor, weight: Tensor) -> None:
    """(grad of input, grad of weight)"""
    if not out[0].numel():
        out[1].zero_()
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    share = torch.empty_like(out[0], dtype=wide)
    _prelu("prelu_backward", (grad, input), (out[0], share), weight)
    out[1].copy_(sum_by_channel(share, weight))


def _glu(kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    dims = merged(outputs[0].shape, [t.stride() for t in (*outputs, *inputs)])
    if len(dims) > 3 or set(dims[-1][1]) != {1}:
        inputs = [t.contiguous() for t in inputs]
        dims = merged(outputs[0].shape, [t.stride() for t in (*outputs, *inputs)])
    _run(_kernel(kind, inputs[0].dtype), dims, inputs, outputs)


def glu(out: Tensor, input: Tensor, dim: int) -> None:
    """out = first half · sigmoid(second half)"""
    if out.numel():
        _glu("glu", halves(input, dim), (out,))


def glu_backward(out: Tensor, grad: Tensor, input: Tensor, dim: int) -> None:
    """The gradient of both halves, in place in the two halves of out."""
    if out.numel():
        _glu("glu_backward", (grad, *halves(input, dim)), halves(out, dim))


def dropout(out: Tensor, input: Tensor, p: float, seed: int) -> None:
    """out = input / (1 - p) where the 32 random bits of (seed, index) are at least p·2³², else 0.

    The bits are mix(mix(low(index) + a) ^ b) with a = mix(low(seed) ^ mix(high(index))), b = mix(high(seed) +
    0x9E3779B9), low and high the halves of 64 bits, index row-major, and mix Wellons' hash: the same for any strides
    and number of threads.
    """
    threshold = round(p * 2**32)
    if threshold >= 2**32:
        out.zero_()
        return
    if not out.numel():
        return
    k = (*dropout_keys(seed), threshold)
    kernel, floats = _kernel("dropout", input.dtype), (1.0 / (1.0 - p), 0.0)
    order = row_major(out.shape)
    dims = merged(out.shape, [out.stride(), input.stride(), order])
    if len(dims) > 3 or dims[-1][1][:2] != [1, 1] or dims[-1][1][2] >= 1 << 26:
        contiguous = torch.empty_like(out, memory_format=torch.contiguous_format)
        dense = contiguous if contiguous.stride() != out.stride() else out
        _run(kernel, [(out.numel(), [1, 1, 1])], (input.contiguous(),), (dense,), (0, 0, 1), k, floats)
        if dense is not out:
            out.copy_(dense)
        return
    index = [0] * (3 - len(dims)) + [steps[2] for _, steps in dims]
    _run(kernel, dims, (input,), (out,), index, k, floats)


KERNELS: dict[str, Callable[..., None]] = {
    "activation": activation, "activation_backward": activation_backward,
    "prelu": prelu, "prelu_backward": prelu_backward,
    "glu": glu, "glu_backward": glu_backward,
    "dropout": dropout,
}

# By measurement: elements below which torch's shorter call wins, without and with a gradient to come. What costs an operation or
# two is memory's work, and torch does it as well.
_CHEAP = (1 << 20, 1 << 22)
_SHORTER: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("relu", "relu6", "leaky_relu", "hardtanh", "hardsigmoid", "hardswish"), _CHEAP),
    **dict.fromkeys(("sigmoid", "silu"), (1 << 14, 1 << 17)), "tanh": (1 << 12, 1 << 16),
    **dict.fromkeys(("elu", "softplus"), (1 << 11, 1 << 14)), "mish": (1 << 9, 1 << 12),
}

#: When the automatic choice is torch, by measurement: op → (*args) → the reason, or None.
TORCH_IS_FASTER: dict[str, Callable[..., str | None]] = {
    "activation": lambda input, name, params: torch_is_shorter(input, *_SHORTER.get(name, (0, 0))),
}
