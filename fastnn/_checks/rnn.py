"""Checks of the recurrent layers.

A state is made of all that went before, so errors are counted at the largest number of each result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._numerics import TORCH, Scale, results
from .data import Check, all_of, normal, one_hot, subnormal, tame_special_rows


def _of_the_largest(run: Callable[..., Tensor]) -> Scale:
    def scale(inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
        finite = [v.nan_to_num(0, 0, 0).detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in inputs]
        return tuple(torch.full_like(t, float(t.abs().max())) for t in results(partial(run, TORCH), finite, grad))

    return scale


def _special_first(dtype: torch.dtype) -> Tensor:
    """Two steps of a batch: special values in the first"""
    return torch.stack([tame_special_rows(20)(dtype).detach(), normal(29, 20, seed=1, grad=False)(dtype)]).requires_grad_()


def _first(name: str, F: Any, *inputs: Tensor) -> Tensor:
    out: Tensor = getattr(F, name)(*inputs)[0]
    return out


def checks() -> Iterator[Check]:
    gates = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}

    def layers(
        mode: str, kind: str, steps: int, batch: int, inputs: int, units: int, bidirectional: bool = False, projection: int = 0,
        data: Callable[[torch.dtype], Tensor] | None = None, gain: float = 1.0, sizes: Sequence[int] | None = None,
    ) -> Check:  # fmt: skip
        directions, out, wide = 1 + bidirectional, projection or units, gates[mode] * units
        shapes = [(wide, inputs), (wide, out), (wide,), (wide,), *([(projection, units)] if projection else [])] * directions
        states = [(directions, batch, out), *([(directions, batch, units)] if mode == "lstm" else [])]
        rows = (sum(sizes), inputs) if sizes else (steps, batch, inputs)

        def make(dtype: torch.dtype) -> tuple[Any, ...]:
            # Rounding to 16 bits moves numbers across relu's kink, and gradients jump there.
            grad = mode != "rnn_relu" or dtype.itemsize > 2
            x = (data or normal(*rows, seed=1))(dtype).reshape(rows).detach().requires_grad_(grad)
            others = [*((shape, 1.0) for shape in states), *((shape, gain * units**-0.5) for shape in shapes)]
            return x, *(normal(*shape, seed=n + 2, scale=by, grad=grad)(dtype) for n, (shape, by) in enumerate(others))

        def run(F: Any, x: Tensor, *rest: Tensor, packed: bool = True) -> Tensor:
            hx: Any = tuple(rest[:2]) if mode == "lstm" else rest[0]
            options = (list(rest[len(states) :]), True, 1, 0.0, False, bidirectional)
            if not sizes:
                found = getattr(F, mode)(x, hx, *options, False)
            elif packed:
                found = getattr(F, mode)(x, torch.tensor(sizes), hx, *options)
            else:
                found = getattr(F, mode)(x, hx, *options, batch_sizes=torch.tensor(sizes))
            return torch.cat([t.flatten() for t in found])

        names = ("input", "h", "c")[: 1 + len(states)] + ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")[: len(shapes) // directions]
        if bidirectional:
            names += tuple(f"{name} back" for name in names[1 + len(states) :])
        return Check("rnn", f"{mode}, {kind}", make, run, partial(run, packed=False), names, _of_the_largest(run))

    for mode in gates:
        gain = 0.7 if mode == "rnn_relu" else 1.0
        yield layers(mode, "37 steps", 37, 5, 33, 41, gain=gain)
        yield layers(mode, "both directions", 11, 9, 70, 67, True, gain=gain)
        yield layers(mode, "packed", 0, 4, 19, 24, True, sizes=(4, 4, 3, 1, 1), gain=gain)
        yield layers(mode, "long sums", 3, 5, 515, 260, gain=gain)
        yield layers(mode, "large inputs", 9, 3, 20, 24, data=normal(9, 3, 20, seed=1, scale=30.0), gain=gain)
        yield layers(mode, "subnormal inputs", 5, 3, 20, 24, data=subnormal(5, 3, 20, seed=1), gain=gain)
        yield layers(mode, "one-hot inputs", 9, 3, 20, 24, data=one_hot(27, 20), gain=gain)
        # One step: rnn_relu's next would multiply an infinite state by weights of both signs.
        yield layers(mode, "special values", 1, 29, 20, 24, data=tame_special_rows(20), gain=gain)
    yield layers("lstm", "1,000 steps", 1000, 2, 5, 17)
    yield layers("gru", "1,000 steps", 1000, 2, 5, 17)
    yield layers("lstm", "projection", 13, 6, 21, 40, True, 17)

    def pooled(F: Any, x: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A QRNN step by step."""
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        z, f, o = F.linear(torch.cat([before, x], 2), weight, bias).chunk(3, 2)
        z, f, o = F.tanh(z), F.sigmoid(f), F.sigmoid(o)
        states = []
        for forget, new in zip(f.unbind(), ((1 - f) * z).unbind()):
            c = forget * c + new
            states.append(c)
        return o * torch.stack(states)

    for kind, steps, batch in (("37 steps", 37, 3), ("1,000 steps", 1000, 3), ("special values", 2, 29)):
        data = _special_first if kind == "special values" else normal(steps, batch, 20, seed=1)
        makers = (data, normal(batch, 17, seed=2), normal(51, 40, seed=3, scale=0.2), normal(51, seed=4))
        names = ("input", "cell", "weight", "bias")
        ours = partial(_first, "qrnn")
        yield Check("rnn", f"qrnn, {kind}", all_of(*makers), pooled, ours, names, _of_the_largest(pooled))
