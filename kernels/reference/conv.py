"""Convolution as plain maths: the explicit im2col, in PyTorch. Differentiable any number of times.

The columns are a copy of the input, one element for each output position and filter tap; then convolution is one product
(Chellapilla, Puri & Simard 2006). The fast kernels never write them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.kernels.reference.activation import activation as _activation


def _columns(input: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
             dilation: Sequence[int]) -> Tensor:
    """(N, C, *output, *kernel) of an input (N, C, *size): what each tap meets at each position."""
    dims = len(kernel)
    columns = F.pad(input, [p for p in reversed(padding) for _ in range(2)])
    for d, (k, s, step) in enumerate(zip(kernel, stride, dilation, strict=True)):
        size = (columns.shape[2 + d] - step * (k - 1) - 1) // s + 1
        index = torch.arange(size)[:, None] * s + torch.arange(k) * step
        columns = columns.index_select(2 + d, index.flatten()).unflatten(2 + d, (size, k)).movedim(3 + d, -1)
    assert columns.dim() == 2 + 2 * dims
    return columns


def _product(columns: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("ngcpt,goct->ngop", columns, weight)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    activation: str | None,
    product: Callable[[Tensor, Tensor], Tensor] = _product,
) -> Tensor:
    kernel, n = weight.shape[2:], input.shape[0]
    if transposed:  # a convolution of stride 1 over the input with zeros in between, by the filters turned round
        spread = input.new_zeros(*input.shape[:2], *((m - 1) * s + 1 for m, s in zip(input.shape[2:], stride)))
        every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
        spread[every] = input
        edges = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding)]
        both = zip(reversed(edges), reversed(output_padding))
        input = F.pad(spread, [e for edge, more in both for e in (edge, edge + more)])
        weight = weight.flip(list(range(2, weight.dim()))).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        stride, padding = [1] * len(kernel), [0] * len(kernel)
    columns = _columns(input, kernel, stride, padding, dilation)
    size = columns.shape[2 : 2 + len(kernel)]
    c = columns.unflatten(1, (groups, -1)).flatten(3, 2 + len(kernel)).flatten(4)  # n, groups, channels, positions, taps
    w = weight.unflatten(0, (groups, -1)).flatten(3)  # groups, outputs, channels, taps
    z = product(c, w).reshape(n, -1, *size)
    if bias is not None:
        z = z + bias.reshape(-1, *[1] * len(kernel))
    if residual is not None:
        z = z + residual
    return z if activation is None else _activation(z, activation)


def conv_weight(
    grad: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of conv's weight: for each tap the product of what it met and what came of it."""
    columns = _columns(input, kernel_size, stride, padding, dilation)
    met: tuple[Any, ...] = (..., *(slice(m) for m in grad.shape[2:]), *[slice(None)] * len(kernel_size))
    columns = columns[met]
    c = columns.unflatten(1, (groups, -1)).flatten(3, 2 + len(kernel_size)).flatten(4)
    g = grad.unflatten(1, (groups, -1)).flatten(3)
    return torch.einsum("ngcpt,ngop->goct", c, g).reshape(grad.shape[1], input.shape[1] // groups, *kernel_size)
