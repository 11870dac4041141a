"""Activations and dropout as plain maths: what the fast kernels must equal. Differentiable any number of times."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _pdf(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) * math.sqrt(0.5 / math.pi)


def _gelu_tanh_inner(x: Tensor) -> Tensor:
    return torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    t = _gelu_tanh_inner(x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def _softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def _mish_slope(x: Tensor) -> Tensor:
    t, s = torch.tanh(_softplus(x)), torch.sigmoid(x)
    return t + x * s * (1 - t * t)


def _where(condition: Tensor, x: Tensor, other: Tensor | float) -> Tensor:
    return torch.where(condition, x, torch.as_tensor(other, dtype=x.dtype, device=x.device))


def _inside(x: Tensor, low: float, high: float, slope: float = 1.0) -> Tensor:
    """`slope` strictly between the two bounds, else 0; NaN counts as outside, as in torch's vectors."""
    return _where((x > low) & (x < high), torch.full_like(x, slope), 0.0)


def _elu_slope(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), alpha * torch.exp(x.clamp(max=0)))


def _hardswish_slope(x: Tensor) -> Tensor:
    return torch.where(x <= -3, torch.zeros_like(x), torch.where(x >= 3, torch.ones_like(x), (2 * x + 3) / 6))


# name: (the function, its derivative); both take the input and the parameters. At the kinks and at NaN as torch has it.
FORMULAS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu": (lambda x: x.clamp(min=0), lambda x: _where(x <= 0, torch.zeros_like(x), 1.0)),
    "leaky_relu": (
        lambda x, slope: torch.where(x > 0, x, x * slope),
        lambda x, slope: _where(x > 0, torch.ones_like(x), slope),
    ),
    "relu6": (lambda x: x.clamp(0, 6), lambda x: _inside(x, 0, 6)),
    "elu": (lambda x, alpha: torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0))), _elu_slope),
    "gelu": (lambda x: x * _cdf(x), lambda x: _cdf(x) + x * _pdf(x)),
    "gelu_tanh": (lambda x: 0.5 * x * (1 + _gelu_tanh_inner(x)), _gelu_tanh_slope),
    "silu": (lambda x: x * torch.sigmoid(x), lambda x: torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x)))),
    "mish": (lambda x: x * torch.tanh(_softplus(x)), _mish_slope),
    "sigmoid": (torch.sigmoid, lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x))),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
    "hardswish": (lambda x: x * (x + 3).clamp(0, 6) / 6, _hardswish_slope),
    "hardsigmoid": (
        lambda x: (x + 3).clamp(0, 6) / 6,
        lambda x: _where((x > -3) & (x < 3), torch.full_like(x, 1 / 6), 0.0),
    ),
    "hardtanh": (lambda x, low, high: x.clamp(low, high), _inside),
    "softplus": (
        lambda x, beta, threshold: torch.where(x * beta > threshold, x, _softplus(x * beta) / beta),
        lambda x, beta, threshold: _where(x * beta > threshold, torch.ones_like(x), torch.sigmoid(x * beta)),
    ),
}


def activation(input: Tensor, name: str, params: Sequence[float] = ()) -> Tensor:
    return FORMULAS[name][0](input, *params)


def activation_backward(grad: Tensor, input: Tensor, name: str, params: Sequence[float] = ()) -> Tensor:
    return grad * FORMULAS[name][1](input, *params)


def _along_channels(weight: Tensor, input: Tensor) -> Tensor:
    """PReLU's weight, shaped to meet dimension 1 of the input."""
    return weight.reshape(-1, *[1] * (input.dim() - 2)) if weight.numel() > 1 else weight.reshape([1] * input.dim())


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    return torch.where(input > 0, input, input * _along_channels(weight, input))


def prelu_backward(grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    slope = _along_channels(weight, input)
    below = torch.where(input > 0, torch.zeros_like(input), input)
    return torch.where(input > 0, grad, grad * slope), (grad * below).sum_to_size(slope.shape).reshape(weight.shape)


def glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


def glu_backward(grad: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    s = torch.sigmoid(gate)
    return torch.cat([grad * s, grad * value * s * (1 - s)], dim)


def _mix(h: Tensor) -> Tensor:
    """Wellons' 32-bit hash `lowbias32` of int64 tensors that hold 32-bit values (nullprogram.com/blog/2018/07/31)."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK32
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK32
    return h ^ (h >> 16)


def random_bits(n: int, seed: int, device: torch.device | None = None) -> Tensor:
    """32 random bits for each i in 0…n-1, a function of (seed, i) only: mix(mix(lo(i) + a) ^ b), int64 tensor.

    lo and hi are the halves of a 64-bit number; a = mix(lo(seed) ^ mix(hi(i))), b = mix(hi(seed) + 0x9E3779B9).
    """
    i = torch.arange(n, device=device)
    low, high = torch.tensor(seed & _MASK32, device=device), torch.tensor((seed >> 32) & _MASK32, device=device)
    a, b = _mix(low ^ _mix(i >> 32)), _mix((high + 0x9E3779B9) & _MASK32)
    return _mix(_mix(((i & _MASK32) + a) & _MASK32) ^ b)


def dropout(input: Tensor, p: float, seed: int) -> Tensor:
    """Element i (row-major) is kept, and scaled by 1/(1-p), where its random bits are at least p·2³²."""
    keep = random_bits(input.numel(), seed, input.device).reshape(input.shape) >= round(p * 2**32)
    return torch.where(keep, input * (1 / (1 - p) if p < 1 else 0.0), torch.zeros_like(input))
