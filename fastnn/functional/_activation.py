"""Activations and dropout."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..ops import activation as _activation
from ..ops._operator import FLOATING
from ._arguments import integer, is_traced

_activation_call = _activation.activation.call


def _inplace(by_torch: Callable[..., Tensor], input: Tensor, params: tuple[float, ...], backend: str | None) -> Tensor:
    reason = "inplace=True changes the input, which fastnn's kernels never do"
    backends.torch_serves(by_torch.__name__, (input,), backend, reason)
    return by_torch(input, *params, inplace=True)


def relu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """max(input, 0), elementwise."""
    if inplace:
        return _inplace(F.relu, input, (), backend)
    return _activation_call(input, "relu", (), backend)


def leaky_relu(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False, *, backend: str | None = None
) -> Tensor:
    """input where positive, else negative_slope·input."""
    if inplace:
        return _inplace(F.leaky_relu, input, (negative_slope,), backend)
    return _activation_call(input, "leaky_relu", (negative_slope,), backend)


def relu6(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """input clamped to [0, 6]."""
    if inplace:
        return _inplace(F.relu6, input, (), backend)
    return _activation_call(input, "relu6", (), backend)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """input where positive, else alpha·(exp(input) - 1). Clevert et al. 2015."""
    if inplace:
        return _inplace(F.elu, input, (alpha,), backend)
    return _activation_call(input, "elu", (alpha,), backend)


def gelu(input: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """input·Φ(input), or with approximate="tanh" the tanh form. Hendrycks & Gimpel 2016, section 2."""
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"gelu(): approximate argument must be either none or tanh, got {approximate!r}")
    return _activation_call(input, "gelu" if approximate == "none" else "gelu_tanh", (), backend)


def silu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """input·sigmoid(input)."""
    if inplace:
        return _inplace(F.silu, input, (), backend)
    return _activation_call(input, "silu", (), backend)


def mish(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """input·tanh(softplus(input)). Misra 2019."""
    if inplace:
        return _inplace(F.mish, input, (), backend)
    return _activation_call(input, "mish", (), backend)


def sigmoid(input: Tensor, *, backend: str | None = None) -> Tensor:
    """1 / (1 + exp(-input))."""
    return _activation_call(input, "sigmoid", (), backend)


def tanh(input: Tensor, *, backend: str | None = None) -> Tensor:
    """Hyperbolic tangent."""
    return _activation_call(input, "tanh", (), backend)


def hardswish(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """input·relu6(input + 3) / 6. Howard et al. 2019 (MobileNetV3), section 5.2."""
    if inplace:
        return _inplace(F.hardswish, input, (), backend)
    return _activation_call(input, "hardswish", (), backend)


def hardsigmoid(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """relu6(input + 3) / 6."""
    if inplace:
        return _inplace(F.hardsigmoid, input, (), backend)
    return _activation_call(input, "hardsigmoid", (), backend)


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False, *, backend: str | None = None
) -> Tensor:
    """input clamped to [min_val, max_val]. ValueError if min_val is greater than max_val."""
    if min_val > max_val:
        raise ValueError(f"hardtanh(): min_val cannot be greater than max_val, got {min_val} and {max_val}")
    if inplace:
        return _inplace(F.hardtanh, input, (min_val, max_val), backend)
    return _activation_call(input, "hardtanh", (min_val, max_val), backend)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20, *, backend: str | None = None) -> Tensor:
    """log(1 + exp(beta·input)) / beta, and input itself where beta·input exceeds threshold."""
    return _activation_call(input, "softplus", (beta, threshold), backend)


def prelu(input: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """input where positive, else weight·input: weight has 1 element or one a channel (dimension 1). He et al. 2015."""
    return _activation.prelu.call(input, weight, backend)


def glu(input: Tensor, dim: int = -1, *, backend: str | None = None) -> Tensor:
    """a·sigmoid(b), where a and b are the halves of input along dim. Dauphin et al. 2016."""
    return _activation.glu.call(input, dim, backend)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Zero each element with probability p and scale the rest by 1/(1-p); the input itself if not training.

    Whether element i is kept is a function of (seed, i) only, and the backward repeats it. Without a seed one is drawn
    from torch's default generator, so torch.manual_seed repeats the run (torch's own dropout draws other elements).
    """
    p = float(p)
    if not 0.0 <= p <= 1.0:
        error = ValueError if p == p else RuntimeError
        raise error(f"dropout(): p is a probability and has to be between 0 and 1, but got {p}")
    if not isinstance(input, Tensor):
        raise TypeError(f"dropout(): argument 'input' must be Tensor, not {type(input).__name__}")
    if seed is not None:
        try:
            seed = integer(seed)
        except TypeError:
            raise TypeError(f"dropout(): argument 'seed' must be int, not {type(seed).__name__}") from None
    if not training:
        return F.dropout(input, p, False, inplace)
    if inplace:
        return _torch_dropout(
            input, p, inplace, seed, backend, "inplace=True changes the input, which no kernel here does"
        )
    if seed is None:
        if is_traced():
            return _torch_dropout(input, p, inplace, seed, backend, "a traced call cannot draw a new seed each time")
        if backends.chosen(backend) == "torch" or input.dtype not in FLOATING:
            return _torch_dropout(input, p, inplace, seed, backend, "torch was named, or has the only kernel")
        seed = int(torch.randint(2**63 - 1, ()))
    return _activation.dropout.call(input, p, seed, backend)


def _torch_dropout(
    input: Tensor, p: float, inplace: bool, seed: int | None, backend: str | None, reason: str
) -> Tensor:
    if seed is not None:
        raise RuntimeError(f"dropout(): seed={seed} cannot be honoured: {reason}. Leave out seed or inplace.")
    backends.torch_serves("dropout", (input,), backend, reason)
    return F.dropout(input, p, True, inplace)
