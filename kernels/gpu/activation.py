"""Activations, PReLU, GLU and dropout on the GPU: one walk over the elements for all of them.

Elements are a tile of rows times elements along n. At most three dimensions are walked in place, once those that lie behind each
other are merged; an input with more is first copied into the output's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
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
from .engine import functions, launch
from .engine.launch import power_of_two, signed

_BLOCK = 2048  # elements of a program: eight of each thread, which are 16 bytes of 16-bit numbers


@triton.jit(do_not_specialize=["io", "ir", "step", "k0", "k1", "k2"])  # else a seed would be another compiled kernel
def elementwise(
    y, z, a, b, c,  # up to two outputs, up to three inputs; None where there are fewer
    outer, rows, n,  # sizes
    yo, yr, yn, zo, zr, zn, ao, ar, an, bo, br, bn, co, cr, cn,  # each tensor's strides along them
    io, ir, step,  # the row-major index of an element, for what depends on it
    p0, p1, k0, k1, k2,  # numbers that belong to the operation
    OP: tl.constexpr, NAME: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y, z = OP(a, b, c) for a tile of R rows and C elements"""
    along = tl.cdiv(n, C)
    pid = tl.program_id(0).to(tl.int64)
    r = pid // along * R + tl.arange(0, R)
    j = (pid % along * C + tl.arange(0, C))[None, :]
    o = (r // rows)[:, None]
    r = (r % rows)[:, None]
    mask = (o < outer) & (j < n)
    va = tl.load(a + o * ao + r * ar + j * an, mask).to(tl.float32)
    vb = va
    vc = va
    if b is not None:
        vb = tl.load(b + o * bo + r * br + j * bn, mask).to(tl.float32)
    if c is not None:
        vc = tl.load(c + o * co + r * cr + j * cn, mask).to(tl.float32)
    vz = va
    if OP == "activation":
        vy = functions.activation(va, NAME, p0, p1)
    elif OP == "activation_backward":
        vy = functions.activation_backward(va, vb, NAME, p0, p1)
    elif OP == "prelu":
        vy = tl.where(va > 0.0, va, va * vb)
    elif OP == "prelu_backward":  # grad, input, weight
        vy = tl.where(vb > 0.0, va, va * vc)
        vz = tl.where(vb > 0.0, 0.0, va * vb)
    elif OP == "glu":
        vy = va * functions.sigmoid(vb)
    elif OP == "glu_backward":  # grad, value, gate
        vy = va * functions.sigmoid(vc)
        vz = va * vb * functions.sigmoid_slope(vc)
    elif OP == "dropout" or OP == "dropout_near":
        if OP == "dropout":
            bits = functions.random_bits(o * io + r * ir + j * step, k0, k1)
        else:  # all indices are of 32 bits
            low = (o * io + r * ir).to(tl.uint32) + (j * step).to(tl.uint32)
            bits = functions.random_bits_near(low, pid * 0, k0, k1)
        vy = tl.where(bits < k2.to(tl.uint32), 0.0, va * p0)
    elif OP == "mse_loss":
        vy = (va - vb) * (va - vb)
    else:  # input, target, grad
        tl.static_assert(OP == "mse_loss_backward", "an unknown operation")
        vy = (va - vb) * (vc * p0)
    tl.store(y + o * yo + r * yr + j * yn, vy.to(y.dtype.element_ty), mask)
    if z is not None:
        tl.store(z + o * zo + r * zr + j * zn, vz.to(z.dtype.element_ty), mask)


def _run(op: str, name: str | None, dims: Dims, outputs: Sequence[Tensor], inputs: Sequence[Tensor],
         index: Sequence[int] = (0, 0, 0), floats: Sequence[float] = (0.0, 0.0), ints: Sequence[int] = (0, 0, 0)) -> None:
    """Launch over at most three dims; their strides are listed in the order outputs, inputs."""
    outer, rows, inner = last_three(dims)
    n = inner[0]
    c = power_of_two(n, most=_BLOCK)
    r = min(_BLOCK // c, power_of_two(outer[0] * rows[0]))
    slots: list[int] = []
    tensors: list[Tensor | None] = []
    for given, room, first in ((outputs, 2, 0), (inputs, 3, len(outputs))):
        for k in range(room):
            there = k < len(given)
            tensors.append(given[k] if there else None)
            slots += [d[1][first + k] if there else 0 for d in (outer, rows, inner)]
    programs = -(-outer[0] * rows[0] // r) * -(-n // c)
    launch.run(elementwise, programs, outputs[0].device, *tensors, outer[0], rows[0], n, *slots, *index, *floats, *ints,
               OP=op, NAME=name, R=r, C=c, num_warps=4)  # fmt: skip


def run_elementwise(op: str, out: Tensor, inputs: Sequence[Tensor], name: str | None = None,
                    floats: Sequence[float] = (0.0, 0.0)) -> None:
    """Same-shaped tensors into an output that is dense, in whatever order its dimensions lie."""
    n = out.numel()
    if n == 0:
        return
    dims: Dims = [(n, [1] * (1 + len(inputs)))]
    if not (out.is_contiguous() and all(t.is_contiguous() for t in inputs)):
        dims = merged(out.shape, [out.stride(), *(t.stride() for t in inputs)])
        if len(dims) > 3:
            inputs = [t if t.stride() == out.stride() else like(out, t) for t in inputs]
            dims = [(n, [1] * (1 + len(inputs)))]
    _run(op, name, dims, (out,), inputs, floats=floats)


def _two(params: Sequence[float]) -> tuple[float, float]:
    return (float(params[0]) if params else 0.0, float(params[1]) if len(params) > 1 else 0.0)


def activation(out: Tensor, input: Tensor, name: str, params: Sequence[float]) -> None:
    """out = f(input)"""
    run_elementwise("activation", out, (input,), name, _two(params))


def activation_backward(out: Tensor, grad: Tensor, input: Tensor, name: str, params: Sequence[float]) -> None:
    """out = grad f'(input)"""
    run_elementwise("activation_backward", out, (grad, input), name, _two(params))


def _prelu(op: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor], weight: Tensor) -> None:
    inputs = (*inputs, along_channels(weight, outputs[0]))
    dims = merged(outputs[0].shape, [t.stride() for t in (*outputs, *inputs)])
    if len(dims) > 3:
        inputs = [like(outputs[0], t) for t in inputs]
        dims = merged(outputs[0].shape, [t.stride() for t in (*outputs, *inputs)])
    _run(op, None, dims, outputs, inputs)


def prelu(out: Tensor, input: Tensor, weight: Tensor) -> None:
    """out = input, times its channel's weight where negative"""
    if out.numel():
        _prelu("prelu", (out,), (input,), weight)


def prelu_backward(out: tuple[Tensor, Tensor], grad: Tensor, input: Tensor, weight: Tensor) -> None:
    """(grad of input, grad of weight): the weight's is torch's sum of what each element adds to it."""
    if not out[0].numel():
        out[1].zero_()
        return
    share = torch.empty_like(out[0], dtype=torch.float32)
    _prelu("prelu_backward", (out[0], share), (grad, input), weight)
    out[1].copy_(sum_by_channel(share, weight))


def _glu(op: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    dims = merged(outputs[0].shape, [t.stride() for t in (*outputs, *inputs)])
    if len(dims) > 3:
        inputs = [t.contiguous() for t in inputs]
        dims = merged(outputs[0].shape, [t.stride() for t in (*outputs, *inputs)])
    _run(op, None, dims, outputs, inputs)


def glu(out: Tensor, input: Tensor, dim: int) -> None:
    """out = first half · sigmoid(second half)"""
    if out.numel():
        _glu("glu", (out,), halves(input, dim))


def glu_backward(out: Tensor, grad: Tensor, input: Tensor, dim: int) -> None:
    """The gradient of both halves, in place in the two halves of out."""
    if out.numel():
        _glu("glu_backward", halves(out, dim), (grad, *halves(input, dim)))


def dropout(out: Tensor, input: Tensor, p: float, seed: int) -> None:
    """out = input / (1 - p) where the 32 random bits of (seed, row-major index) are at least p·2³², else 0: the CPU's choice."""
    threshold = round(p * 2**32)
    if threshold >= 2**32:
        out.zero_()
        return
    if not out.numel():
        return
    order = row_major(out.shape)
    dims = merged(out.shape, [out.stride(), input.stride(), order])
    if len(dims) > 3:
        input = like(out, input)
        dims = merged(out.shape, [out.stride(), input.stride(), order])
    index = [0] * (3 - len(dims)) + [steps[2] for _, steps in dims]
    keys = [signed(k) for k in (*dropout_keys(seed), threshold)]
    op = "dropout_near" if out.numel() <= 1 << 32 else "dropout"
    _run(op, None, dims, (out,), (input,), index, (1.0 / (1.0 - p), 0.0), keys)


def supports(op: str, *args: Any) -> str | None:
    return launch.refuses(*(a for a in args if isinstance(a, Tensor)))


KERNELS: dict[str, Callable[..., None]] = {
    "activation": activation, "activation_backward": activation_backward,
    "prelu": prelu, "prelu_backward": prelu_backward,
    "glu": glu, "glu_backward": glu_backward,
    "dropout": dropout,
}
