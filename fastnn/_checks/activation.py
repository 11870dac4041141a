"""Checks of the pointwise functions, prelu, glu and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._numerics import sum_of_magnitudes
from .data import Check, all_of, huge_and_tiny, normal, special_rows, special_vector, subnormal


def _log1p_exp(m: Any, x: Any) -> Any:
    return x + m.log1p(m.exp(-x)) if x > 0 else m.log1p(m.exp(x))


def _gelu_tanh(m: Any, x: Any) -> Any:
    u = m.sqrt(2 / m.pi) * (x + m.mpf("0.044715") * x**3)
    return x / (1 + m.exp(-2 * u))


def _clamp(x: Any, low: Any, high: Any) -> Any:
    return min(max(x, low), high)


def _mish_slope_scale(x: Tensor) -> Tensor:
    t = torch.tanh(torch.nn.functional.softplus(x))
    return t + x.abs() * torch.sigmoid(x) * (1 - t * t)


@dataclass(frozen=True)
class Pointwise:
    """A pointwise function.

    Attributes:
        theirs: in PyTorch's words.
        exact: by mpmath.
        scale: the magnitude at which its errors are counted, where the usual formula is a difference; None: its own.
        slope_scale: the same for the derivative.
    """

    theirs: Callable[..., Tensor]
    exact: Callable[[Any, Any], Any]
    scale: Callable[[Tensor], Tensor] | None = None
    slope_scale: Callable[[Tensor], Tensor] = torch.ones_like

    def magnitudes(self, inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
        x = inputs[0].detach()
        if grad is not None:
            return (grad.abs() * self.slope_scale(x),)
        return (self.scale(x) if self.scale else torch.zeros_like(x),)


POINTWISE: dict[str, Pointwise] = {
    "relu": Pointwise(lambda F, x: F.relu(x), lambda m, x: max(x, 0 * x)),
    "leaky_relu": Pointwise(lambda F, x: F.leaky_relu(x, 0.125), lambda m, x: x if x > 0 else x / 8),
    "relu6": Pointwise(lambda F, x: F.relu6(x), lambda m, x: _clamp(x, 0, 6)),
    "elu": Pointwise(lambda F, x: F.elu(x, 1.5), lambda m, x: x if x > 0 else 1.5 * m.expm1(x)),
    # 1 + erf and 1 + tanh cancel on the negative side, as 1 - sigmoid and 1 - tanh² do in the derivatives.
    "gelu": Pointwise(lambda F, x: F.gelu(x), lambda m, x: x * m.erfc(_clamp(-x / m.sqrt(2), -99, 999)) / 2, torch.abs),
    "gelu_tanh": Pointwise(lambda F, x: F.gelu(x, approximate="tanh"), _gelu_tanh, torch.abs),
    "silu": Pointwise(
        lambda F, x: F.silu(x),
        lambda m, x: x / (1 + m.exp(-x)),
        slope_scale=lambda x: torch.sigmoid(x) * (1 + x.abs() * torch.sigmoid(-x)),
    ),
    "mish": Pointwise(lambda F, x: F.mish(x), lambda m, x: x * m.tanh(_log1p_exp(m, x)), slope_scale=_mish_slope_scale),
    "sigmoid": Pointwise(lambda F, x: F.sigmoid(x), lambda m, x: 1 / (1 + m.exp(-x)), slope_scale=torch.sigmoid),
    "tanh": Pointwise(lambda F, x: F.tanh(x), lambda m, x: m.tanh(x)),
    "hardswish": Pointwise(lambda F, x: F.hardswish(x), lambda m, x: x * _clamp(x + 3, 0, 6) / 6),
    "hardsigmoid": Pointwise(lambda F, x: F.hardsigmoid(x), lambda m, x: _clamp(x + 3, 0, 6) / m.mpf(6)),
    "hardtanh": Pointwise(lambda F, x: F.hardtanh(x, -0.75, 2.5), lambda m, x: _clamp(x, -0.75, 2.5)),
    "softplus": Pointwise(
        lambda F, x: F.softplus(x, 2.0, 20.0), lambda m, x: x if 2 * x > 20 else _log1p_exp(m, 2 * x) / 2
    ),
}


def _usual_vector(dtype: torch.dtype) -> tuple[Tensor]:
    """Where activations are at work, and far out on both sides; many times over, for several threads."""
    near = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    values = torch.cat([near, torch.linspace(-25, 25, 71, dtype=torch.float64)])
    return (values.repeat(67).to(dtype).requires_grad_(),)


def _glu_scale(inputs: Sequence[Any], grad: Tensor | None, dim: int) -> tuple[Tensor, ...]:
    value, gate = inputs[0].detach().chunk(2, dim)
    if grad is None:
        return (torch.zeros_like(value),)
    s = torch.sigmoid(gate)
    return (torch.cat([(grad * s).abs(), (grad * value * s).abs()], dim),)  # the gate's 1 - s cancels


def _dropout_statistics(F: Any, x: Tensor, p: float) -> Tensor:
    """What dropout keeps, with what it zeroes filled in, so that all of it must be x / (1 - p).

    Raises:
        ArithmeticError: the keep rate, the seed's meaning or the backward's mask is wrong.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        y = F.dropout(x, p)
        other = F.dropout(x, p)
        torch.manual_seed(3)
        again = F.dropout(x, p)
    kept = y.detach() != 0
    rate, deviation = float(kept.double().mean()), math.sqrt(p * (1 - p) / x.numel())
    if abs(rate - (1 - p)) > 5 * deviation:
        raise ArithmeticError(f"{rate:.4f} of the elements are kept instead of {1 - p:.4f} ± {deviation:.4f}")
    columns = kept.double().mean(0)
    if float((columns - (1 - p)).abs().max()) > 6 * math.sqrt(p * (1 - p) / len(x)):
        raise ArithmeticError("some column is kept much more often than another")
    if not torch.equal(y, again):
        raise ArithmeticError("the same seed drops other elements")
    if torch.equal(kept, other.detach() != 0):
        raise ArithmeticError("the next call drops the same elements")
    if y.requires_grad:
        (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        if not torch.equal(slope != 0, kept):
            raise ArithmeticError("the backward drops other elements than the forward")
    return torch.where(kept, y, x / (1 - p))


def checks() -> Iterator[Check]:
    from ..kernels.reference import activation as plain

    for name, f in POINTWISE.items():
        yield Check("activation", name, _usual_vector, f.theirs, scale=f.magnitudes, exact=f.exact)
        yield Check(
            "activation", f"{name}, special values", special_vector, f.theirs, scale=f.magnitudes, exact=f.exact
        )

    def prelu(F: Any, x: Tensor, w: Tensor) -> Tensor:
        return F.prelu(x, w)

    both = sum_of_magnitudes(lambda F, x, w: F.prelu(-x, w))  # of the slope's gradient, a sum over all but the channels
    yield Check(
        "activation",
        "prelu, a slope a channel",
        all_of(normal(5, 13, 9, seed=1), normal(13, seed=2, scale=0.2)),
        prelu,
        names=("input", "weight"),
        scale=both,
    )
    yield Check(
        "activation",
        "prelu, one slope",
        all_of(normal(5, 13, 9, seed=1), normal(1, seed=2, scale=0.2)),
        prelu,
        names=("input", "weight"),
        scale=both,
    )
    yield Check(
        "activation",
        "prelu, special values",
        all_of(special_rows(13), normal(13, seed=2, scale=0.2)),
        prelu,
        names=("input", "weight"),
        scale=both,
    )
    yield Check(
        "activation",
        "prelu, huge and tiny in turn",
        all_of(huge_and_tiny(64, 13, 1, 0, 0.4), normal(13, seed=2, scale=0.2)),
        prelu,
        names=("input", "weight"),
        scale=both,
    )
    for dim, name, make in (
        (-1, "dim -1", normal(14, 66, seed=1, scale=3.0)),
        (0, "dim 0", normal(14, 66, seed=1, scale=3.0)),
        (-1, "special values", special_rows(14)),
        (-1, "huge and tiny in turn", huge_and_tiny(14, 66, 1, 1, 0.4)),
        (-1, "subnormal", subnormal(14, 66, seed=1)),
    ):
        yield Check(
            "activation",
            f"glu, {name}",
            all_of(make),
            lambda F, x, dim=dim: F.glu(x, dim),
            scale=partial(_glu_scale, dim=dim),
        )

    def dropout(F: Any, x: Tensor) -> Tensor:
        from ..ops import activation

        return activation.dropout(x, 0.3, 1234567)

    # The generator is ours, so the plain maths stands for PyTorch.
    for name, make in (
        ("", normal(11, 977, seed=1)),
        (", special values", special_rows(37)),
        (", subnormal", subnormal(11, 97, seed=1)),
    ):
        yield Check(
            "activation", f"dropout{name}", all_of(make), lambda F, x: plain.dropout(x, 0.3, 1234567), dropout
        )
    for p in (0.1, 0.5):
        yield Check(
            "activation",
            f"dropout, statistics at p = {p}",
            all_of(normal(64, 1021, seed=1)),
            lambda F, x, p=p: x / (1 - p),
            partial(_dropout_statistics, p=p),
        )
