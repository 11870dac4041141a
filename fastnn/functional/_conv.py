"""Convolutions and transposed convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import activation as _activation
from ..ops import conv as _conv
from ._arguments import Ints, any_requires_grad, ints


def _convolve(
    op: str,
    dims: int,
    transposed: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    output_padding: Ints,
    groups: int,
    activation: str | None,
    residual: Tensor | None,
    backend: str | None,
) -> Tensor:
    for name, t in (("input", input), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(t).__name__}")
    if input.dim() == dims + 1:  # unbatched
        more = None if residual is None else residual.unsqueeze(0)
        return _convolve(op, dims, transposed, input.unsqueeze(0), weight, bias, stride, padding, dilation, output_padding,
                         groups, activation, more, backend).squeeze(0)
    strides, dilations = ints(op, "stride", stride, dims), ints(op, "dilation", dilation, dims)
    if isinstance(padding, str) and not transposed:
        input, paddings = _padded(op, dims, input, weight, strides, padding, dilations)
    else:
        paddings = ints(op, "padding", padding, dims)
    if type(groups) is not int:
        (groups,) = ints(op, "groups", groups, 1)
    fixed = (strides, paddings, dilations, transposed, ints(op, "output_padding", output_padding, dims), groups)
    if activation is not None and torch.is_grad_enabled() and any_requires_grad(input, weight, bias, residual):
        if activation not in _activation.PARAMETERLESS:
            _conv.conv.check(input, weight, bias, residual, *fixed, activation)
        z = _conv.conv.call(input, weight, bias, residual, *fixed, None, backend)
        return _activation.activation.call(z, activation, (), backend)
    return _conv.conv.call(input, weight, bias, residual, *fixed, activation, backend)


def _padded(
    op: str, dims: int, input: Tensor, weight: Tensor, stride: list[int], padding: str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """The padding that a name stands for; where it is uneven, the input with the odd zero at its far edge."""
    if padding not in ("same", "valid"):
        raise RuntimeError(f"{op}(): Invalid padding string: {padding!r}, allowed are 'same' and 'valid'")
    if padding == "valid" or weight.dim() != dims + 2:
        return input, [0] * dims
    if any(s != 1 for s in stride):
        raise RuntimeError(f"{op}(): padding='same' is not supported for strided convolutions, got stride {tuple(stride)}")
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
    if any(t % 2 for t in total):
        input = F.pad(input, [n for t in reversed(total) for n in (0, t % 2)])
    return input, [t // 2 for t in total]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(input ⋆ weight + bias + residual): cross-correlation along the last dimension.

    input (N, C, L) or (C, L), weight (out_channels, C / groups, kernel), bias (out_channels) → (N, out_channels, L_out).
    padding is a number or "same" or "valid"; activation and residual (of the output's shape) are as in linear.
    Raises RuntimeError for shapes that do not fit, a kernel larger than the padded input, or numbers out of range.
    """
    return _convolve("conv1d", 1, False, input, weight, bias, stride, padding, dilation, 0, groups, activation, residual,
                     backend)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The gradient of conv1d in its input, as a layer. Dumoulin & Visin 2016, chapter 4.

    input (N, C, L) or (C, L), weight (C, out_channels / groups, kernel) → (N, out_channels, L_out), where L_out is
    (L - 1)·stride - 2·padding + dilation·(kernel - 1) + output_padding + 1. Extras and errors are as in conv1d.
    """
    return _convolve("conv_transpose1d", 1, True, input, weight, bias, stride, padding, dilation, output_padding, groups,
                     activation, residual, backend)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """As conv1d, over the last two dimensions: input (N, C, H, W) or (C, H, W), weight (out_channels, C / groups, kH, kW).

    A channels_last input or weight gives a channels_last output, as in torch.
    """
    return _convolve("conv2d", 2, False, input, weight, bias, stride, padding, dilation, 0, groups, activation, residual,
                     backend)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """As conv_transpose1d, over the last two dimensions; memory formats as conv2d."""
    return _convolve("conv_transpose2d", 2, True, input, weight, bias, stride, padding, dilation, output_padding, groups,
                     activation, residual, backend)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """As conv2d, over the last three dimensions: weight (out_channels, C / groups, kD, kH, kW)."""
    return _convolve("conv3d", 3, False, input, weight, bias, stride, padding, dilation, 0, groups, activation, residual,
                     backend)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """As conv_transpose1d, over the last three dimensions."""
    return _convolve("conv_transpose3d", 3, True, input, weight, bias, stride, padding, dilation, output_padding, groups,
                     activation, residual, backend)
