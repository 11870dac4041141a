"""Checks of the norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._numerics import TORCH, Scale, results, widen
from .data import Check, all_of, huge_and_tiny, images, normal, one_hot, subnormal, tame_special_rows


def checks() -> Iterator[Check]:
    """Counted at the largest result: differences from a mean cancel, and a gradient of a mean is small beside its terms."""

    def largest(function: Callable[..., Tensor]) -> Scale:
        def scale(inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
            wide = [widen(v) for v in inputs]
            found = results(lambda *v: function(TORCH, *v), wide, widen(grad))
            rows = inputs[0].shape[0] if inputs[0].dim() == 2 else 1  # over which a parameter's gradient is summed
            sizes = (t.abs().nan_to_num(0, 0, 0).amax().expand(t.shape) for t in found)
            return tuple(t * (rows**0.5 if t.dim() == 1 else 1) for t in sizes)

        return scale

    def norm(name: str, function: Callable[..., Tensor], make: Callable[[torch.dtype], Tensor], channels: int) -> Check:
        makers = (make, normal(channels, seed=2), normal(channels, seed=3))
        return Check("norm", name, all_of(*makers), function, names=("input", "weight", "bias"), scale=largest(function))

    def batch_norm(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, True)

    def known(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = torch.linspace(-1, 1, x.shape[1]).to(x.dtype)
        return F.batch_norm(x, mean, mean.abs() + 0.5, weight, bias)

    def group_norm(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(x, 3, weight, bias)

    def instance_norm(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.instance_norm(x, None, None, weight, bias)

    def instance_norm_updating(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The result and the running statistics after it"""
        mean, var = (torch.linspace(-1, 1, x.shape[1]).to(x.dtype) for _ in range(2))
        out = F.instance_norm(x, mean, var, weight, bias)
        return torch.cat([out.flatten(), mean, var])

    functions = (("batch_norm", batch_norm), ("batch_norm, known moments", known), ("group_norm", group_norm),
                 ("instance_norm", instance_norm))  # fmt: skip
    for last in (False, True):
        suffix = ", channels last" if last else ""
        for name, function in functions:
            for kind, make in (
                ("", images(normal(4 * 33 * 63, seed=1), 4, 33, 9, 7, last=last)),
                (", large means", images(normal(4 * 33 * 63, seed=1, mean=50), 4, 33, 9, 7, last=last)),
                (", one channel of large values", images(huge_and_tiny(33, 63, 1, 0, 0.1), 1, 33, 9, 7, last=last)),
                (", special values", _special(33, last, name)),
            ):
                yield norm(name + kind + suffix, function, make, 33)
        yield norm(f"instance_norm with running statistics{suffix}", instance_norm_updating,
                   images(normal(4 * 33 * 63, seed=1), 4, 33, 9, 7, last=last), 33)  # fmt: skip
        deep = images(normal(2 * 7 * 105, seed=1), 2, 7, 5, 3, 7, last=last)
        yield norm(f"instance_norm, three dimensions{suffix}", instance_norm, deep, 7)
    yield norm("batch_norm of rows", batch_norm, normal(97, 37, seed=1), 37)

    def layer_norm(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = F.layer_norm(x, weight.shape, weight, bias)
        return out

    def rms_norm(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight) + bias

    for name, function in (("layer_norm", layer_norm), ("rms_norm", rms_norm)):
        for kind, make, size in (
            ("", normal(1543, 131, seed=1), 131),  # more than a rule leaves to torch
            (", large means", normal(1543, 131, seed=1, mean=50), 131),
            (", long rows", normal(49, 4099, seed=1), 4099),
            (", one-hot rows", one_hot(1543, 131, 60.0, noise=1.0), 131),
            (", huge and tiny in turn", huge_and_tiny(1543, 131, 1, 0, 0.1), 131),
            (", subnormal", subnormal(1543, 131, seed=1), 131),
            (", special values", tame_special_rows(131), 131),
        ):
            yield norm(name + kind, function, make, size)
        added = partial(_added, function)
        names = ("input", "residual", "weight", "bias")
        for kind, rows, make in (("", 43, normal(43, 131, seed=1, mean=3)), (", special values", 29, tame_special_rows(131))):
            makers = (make, normal(rows, 131, seed=4), normal(131, seed=2), normal(131, seed=3))
            fused, title = partial(_fused_sum, name), f"{name} of a sum{kind}"
            yield Check("norm", title, all_of(*makers), added, fused, names, largest(added))


def _special(channels: int, last: bool, name: str) -> Callable[[torch.dtype], Tensor]:
    """Images with special values, each in an image of its own, or for batch_norm in a channel of its own."""
    by_channel = name.startswith("batch_norm")

    def make(dtype: torch.dtype) -> Tensor:
        rows = tame_special_rows(2 * 63 if by_channel else channels * 63)(dtype).detach()
        if not by_channel:
            return rows.view(-1, channels, 9, 7)
        rest = normal(channels - len(rows), 2 * 63, seed=4, grad=False)(dtype)
        return torch.cat([rows, rest]).view(channels, 2, 9, 7).transpose(0, 1).contiguous()

    return lambda dtype: images(make, *make(dtype).shape, last=last)(dtype)


def _added(function: Callable[..., Tensor], F: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    total = x + residual
    return function(F, total, weight, bias) + total.cos()


def _fused_sum(name: str, F: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parameters = (weight, bias) if name == "layer_norm" else (weight,)
    out, total = getattr(F, name)(x, weight.shape, *parameters, residual=residual, return_sum=True)
    return (out if name == "layer_norm" else out + bias) + total.cos()
