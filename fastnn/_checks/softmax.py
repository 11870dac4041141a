"""Checks of softmax and the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._numerics import TORCH, softmax_scale, sum_of_magnitudes
from .data import (
    Check,
    all_of,
    equal,
    huge_and_tiny,
    indices,
    normal,
    one_hot,
    probabilities,
    repeated,
    special_rows,
    subnormal,
    tame_special_rows,
)


def _adversarial_rows(special: int, columns: int) -> dict[str, Callable[[torch.dtype], Tensor]]:
    return {
        "special values": special_rows(special),
        "large means": normal(9, columns, seed=1, mean=1e4),
        "one-hot rows": one_hot(9, columns, 60.0, noise=1.0),
        "all equal": equal(9, columns, value=-3.7),
        "huge and tiny in turn": huge_and_tiny(9, columns, 1, 1, 0.4),
        "subnormal": subnormal(9, columns, seed=1),
        "long rows": normal(3, 65537, seed=1, scale=2.0),
    }


def checks() -> Iterator[Check]:
    from ..kernels.reference import softmax as plain

    for name in ("softmax", "log_softmax"):
        for shape, dim in (((37, 1003), -1), ((37, 1003), 0), ((5, 7, 11), 1)):
            yield Check(
                "softmax",
                f"{name} {'×'.join(map(str, shape))}, dim {dim}",
                all_of(normal(*shape, seed=1, scale=4.0)),
                lambda F, x, name=name, dim=dim: getattr(F, name)(x, dim),
                scale=softmax_scale(name == "log_softmax", dim),
            )
        for kind, make in _adversarial_rows(37, 211).items():
            yield Check(
                "softmax",
                f"{name}, {kind}",
                all_of(make),
                lambda F, x, name=name: getattr(F, name)(x, -1),
                scale=softmax_scale(name == "log_softmax"),
            )
        yield Check(
            "softmax",
            f"{name}, large means, dim 0",
            all_of(normal(211, 19, seed=1, mean=1e4)),
            lambda F, x, name=name: getattr(F, name)(x, 0),
            scale=softmax_scale(name == "log_softmax", 0),
        )

    n, c = 29, 1009
    weights = torch.rand(c, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    logits = normal(n, c, seed=1, scale=2.0)

    def entropy(
        name: str,
        x: Callable[[torch.dtype], Any],
        target: Callable[[torch.dtype], Any],
        weighted: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        smoothing: float = 0.0,
    ) -> Check:
        def run(F: Any, x: Tensor, target: Tensor) -> Tensor:
            weight = weights.to(x.dtype) if weighted else None
            return F.cross_entropy(
                x, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
            )

        def scale(inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
            """Losses are counted at 1 or more. A gradient is a difference of weighted probabilities and targets."""
            x, target = inputs[0].detach(), inputs[1]
            if grad is None:
                return (torch.ones_like(run(TORCH, x, target)),)
            weight = weights if weighted else None
            q = plain._classes_back(plain._target_weights(x, target, weight, ignore_index, smoothing))
            g = grad / plain._mean_over(x, target, weight, ignore_index) if reduction == "mean" else grad
            p = torch.softmax(x, 1) * (1 + x.amax(1, keepdim=True) - x)
            return ((g.abs() if g.dim() == 0 else g.abs().unsqueeze(1)) * (p * q.sum(1, keepdim=True) + q),)

        return Check("softmax", f"cross_entropy, {name}", all_of(x, target), run, names=("input", "target"), scale=scale)

    for reduction in ("mean", "sum", "none"):
        yield entropy(reduction, logits, indices(n, c), reduction=reduction)
    yield entropy("weight, ignore_index", logits, indices(n, c, ignored=7), True, 7)
    yield entropy("weight, ignore_index, smoothing", logits, indices(n, c, ignored=7), True, 7, smoothing=0.1)
    yield entropy("probabilities, weight", logits, probabilities(n, c), True)
    yield entropy("N×C×d", normal(6, 31, 10, seed=1, scale=2.0), indices(6, 31, 10))
    for kind, make in _adversarial_rows(37, 211).items():
        yield entropy(kind, make, partial(_wandering_target, make), reduction="none")
    yield entropy("one-hot rows, mean", one_hot(9, 211, 60.0, noise=1.0), indices(9, 211))
    yield Check(
        "softmax",
        "nll_loss, special values",
        all_of(special_rows(37), partial(_wandering_target, special_rows(37))),
        lambda F, x, t: F.nll_loss(x, t, reduction="none") + 0.0,  # torch's loss of a zero is −0, and nobody's concern
        names=("input", "target"),
    )
    yield Check(
        "softmax",
        "nll_loss",
        all_of(logits, indices(n, c, ignored=-100)),
        lambda F, x, t: F.nll_loss(x, t),
        names=("input", "target"),
        scale=sum_of_magnitudes(lambda F, x, t: -F.nll_loss(x, t)),
    )
    yield from _linear_losses()
    for name, left, right in (
        ("", normal(17, 61, seed=1), normal(17, 61, seed=2)),
        (", none", normal(97, 211, seed=1), normal(97, 211, seed=2)),
        (", special values, none", special_rows(37), lambda dtype: normal(*special_rows(37)(dtype).shape)(dtype)),
        (", large means", normal(17, 61, seed=1, mean=200), normal(17, 61, seed=2, mean=200)),
        (", cancellation", normal(17, 61, seed=1), lambda dtype: _almost(normal(17, 61, seed=1)(dtype))),
        (", huge and tiny in turn, none", huge_and_tiny(17, 61, 1, 1, 0.4), huge_and_tiny(17, 61, 2, 1, 0.4)),
        (", subnormal, none", subnormal(17, 61, seed=1), subnormal(17, 61, seed=2)),
    ):
        reduction = "none" if name.endswith("none") else "mean"
        yield Check(
            "softmax",
            f"mse_loss{name}",
            all_of(left, right),
            lambda F, x, t, reduction=reduction: F.mse_loss(x, t, reduction=reduction),
            names=("input", "target"),
        )


def _linear_losses() -> Iterator[Check]:
    """A linear layer with its cross-entropy: more rows than are taken at a time by a kernel with a small chunk."""
    n, c, d = 133, 307, 41

    def theirs(F: Any, x: Tensor, w: Tensor, b: Tensor, t: Tensor, reduction: str) -> Tensor:
        loss = F.cross_entropy(F.linear(x, w, b), t, reduction=reduction, label_smoothing=0.1)
        return loss + 0.0  # that of an ignored row may be −0

    def ours(F: Any, x: Tensor, w: Tensor, b: Tensor, t: Tensor, reduction: str) -> Tensor:
        return F.linear_cross_entropy(x, w, t, linear_bias=b, reduction=reduction, label_smoothing=0.1)

    def scale(inputs: Sequence[Any], grad: Tensor | None, reduction: str) -> tuple[Tensor, ...]:
        """Logits, and so losses and slopes, are as exact as their terms are large."""
        (x, w, b), target = (t.detach() for t in inputs[:3]), inputs[3]
        size = 1 + (x.abs() @ w.abs().mT + b.abs()).amax(1)
        kept = (target != -100).to(x.dtype)
        share = kept / kept.sum() if reduction == "mean" else kept
        if grad is None:
            return (size * kept if reduction == "none" else (size * share).sum(),)
        slopes = torch.softmax(x @ w.mT + b, 1) * size[:, None] + 0.1
        slopes = (slopes + torch.nn.functional.one_hot(target.clamp(min=0), c)) * (share * grad.abs())[:, None]
        return slopes @ w.abs(), slopes.mT @ x.abs(), slopes.sum(0)

    for reduction, kind, x, rows in (
        ("mean", "", normal(n, d, seed=1), n),
        ("mean", ", large means", normal(n, d, seed=1, mean=30), n),
        ("none", "", normal(n, d, seed=1), n),
        ("none", ", large means", normal(n, d, seed=1, mean=30), n),
        ("none", ", special values", repeated(tame_special_rows(d), 0), 58),
    ):
        yield Check(
            "softmax",
            f"linear_cross_entropy{kind}, {reduction}",
            all_of(x, normal(c, d, seed=2, scale=0.3), normal(c, seed=3), indices(rows, c, ignored=-100)),
            partial(theirs, reduction=reduction),
            partial(ours, reduction=reduction),
            names=("input", "weight", "bias", "target"),
            scale=partial(scale, reduction=reduction),
        )


def _almost(x: Tensor) -> Tensor:
    """x but for a millionth, or some of the last places."""
    return (x.detach() * (1 + 3 * max(3e-7, torch.finfo(x.dtype).eps))).requires_grad_()


def _wandering_target(make: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> Tensor:
    """For half of the rows the class where `special_rows` and `one_hot` put their value, for the rest the next."""
    rows, classes = make(dtype).shape
    n = torch.arange(rows)
    return (7 * n + n % 2) % classes
