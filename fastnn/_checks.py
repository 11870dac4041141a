"""What the numerics report checks: every operator on usual, special and adversarial data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._numerics import TORCH, Scale, softmax_scale, sum_of_magnitudes

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

Make = Callable[[torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True)
class Check:
    """One operator on one kind of data.

    Attributes:
        name: the operator, and the variant.
        make: dtype → inputs; those that require a gradient have theirs checked.
        theirs: the work in PyTorch's words, ``theirs(F, *inputs)``; ours: in fastnn's, where they differ.
        names: of the inputs, for the lines of the gradients.
        scale: the magnitudes at which errors are counted, for sums that may cancel.
        exact: for pointwise functions: (mpmath, x) → value, x an mpf.
    """

    family: str
    name: str
    make: Make
    theirs: Callable[..., Tensor]
    ours: Callable[..., Tensor] | None = None
    names: tuple[str, ...] = ("input",)
    scale: Scale | None = None
    exact: Callable[[Any, Any], Any] | None = None


# Data -----------------------------------------------------------------------------------------------------------------


def _normal(
    *shape: int, seed: int = 0, scale: float = 1.0, mean: float = 0.0, grad: bool = True
) -> Callable[[torch.dtype], Tensor]:
    def make(dtype: torch.dtype) -> Tensor:
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (values * scale + mean).to(dtype).requires_grad_(grad)

    return make


def specials(dtype: torch.dtype) -> list[float]:
    """NaN, infinities, zeros of both signs, subnormal, tiny, huge and largest numbers, and where kinks are."""
    info = torch.finfo(dtype)
    huge = info.max**0.75
    some = [
        math.inf,
        0.0,
        info.tiny,
        info.tiny / 4,
        info.tiny * info.eps,
        huge,
        info.max,
        1e-3,
        0.5,
        1.0,
        3.0,
        6.0,
        20.0,
        80.0,
    ]
    return [math.nan, *some, *(-v for v in some)]


def _special_vector(dtype: torch.dtype) -> tuple[Tensor]:
    """Five times over, so that both the vectors and the tail of a loop meet each of them in several lanes."""
    return (torch.tensor(specials(dtype) * 5, dtype=torch.float64).to(dtype).requires_grad_(),)


def _special_rows(columns: int, skip_huge: bool = False) -> Callable[[torch.dtype], Tensor]:
    """A matrix of normal numbers with one special value in each row, at a wandering place."""

    def make(dtype: torch.dtype) -> Tensor:
        values = [v for v in specials(dtype) if not (skip_huge and abs(v) == torch.finfo(dtype).max)]
        rows = torch.randn(len(values), columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for n, value in enumerate(values):
            rows[n, 7 * n % columns] = value
        return rows.to(dtype).requires_grad_()

    return make


def _all(*makers: Callable[[torch.dtype], Any]) -> Make:
    return lambda dtype: tuple(make(dtype) for make in makers)


def _constant(value: Any) -> Callable[[torch.dtype], Any]:
    return lambda dtype: value


def _indices(n: int, classes: int, *more: int, ignored: int | None = None) -> Callable[[torch.dtype], Tensor]:
    def make(dtype: torch.dtype) -> Tensor:
        target = torch.randint(classes, (n, *more), generator=torch.Generator().manual_seed(11))
        if ignored is not None:
            target.view(-1)[::5] = ignored
        return target

    return make


def _probabilities(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: (
        torch.rand(*shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64).softmax(1).to(dtype)
    )


# The checks -----------------------------------------------------------------------------------------------------------


def _matmul_checks() -> Iterator[Check]:
    def product(
        name: str,
        function: Callable[..., Tensor],
        *makers: Callable[[torch.dtype], Any],
        names: Sequence[str] = ("input", "other"),
        plain: Callable[..., Tensor] | None = None,
        ours: Callable[..., Tensor] | None = None,
    ) -> Check:
        return Check("matmul", name, _all(*makers), function, ours, tuple(names), sum_of_magnitudes(plain or function))

    def matmul(F: Any, a: Tensor, b: Tensor) -> Tensor:
        return F.matmul(a, b)

    yield product("matmul 67×131×93", matmul, _normal(67, 131, seed=1), _normal(131, 93, seed=2))
    yield product(
        "matmul, both transposed",
        lambda F, a, b: F.matmul(a.t(), b.t()),
        _normal(131, 67, seed=1),
        _normal(93, 131, seed=2),
    )
    yield product("matmul, batch broadcast", matmul, _normal(3, 1, 17, 33, seed=1), _normal(2, 33, 9, seed=2))
    yield product("matmul, matrix · vector", matmul, _normal(129, 257, seed=1), _normal(257, seed=2))
    yield product("matmul, vector · matrix", matmul, _normal(257, seed=1), _normal(257, 129, seed=2))
    yield product("matmul, vector · vector", matmul, _normal(1009, seed=1), _normal(1009, seed=2))
    yield product("matmul, long sums", matmul, _normal(5, 20011, seed=1), _normal(20011, 7, seed=2))
    yield product("matmul, large means", matmul, _normal(23, 511, seed=1, mean=30), _normal(511, 19, seed=2, mean=-30))
    yield product(
        "matmul, special values", matmul, _special_rows(37, skip_huge=True), _normal(37, 21, seed=2, scale=0.1)
    )
    yield product("mm", lambda F, a, b: F.mm(a, b), _normal(33, 65, seed=1), _normal(65, 17, seed=2))
    yield product("bmm", lambda F, a, b: F.bmm(a, b), _normal(5, 31, 64, seed=1), _normal(5, 64, 47, seed=2))
    yield product(
        "addmm",
        lambda F, c, a, b: F.addmm(c, a, b, beta=0.5, alpha=2.0),
        _normal(33, 17, seed=3),
        _normal(33, 65, seed=1),
        _normal(65, 17, seed=2),
        names=("input", "mat1", "mat2"),
    )
    yield product(
        "baddbmm",
        lambda F, c, a, b: F.baddbmm(c, a, b, beta=0.5, alpha=2.0),
        _normal(4, 1, 17, seed=3),
        _normal(4, 33, 65, seed=1),
        _normal(4, 65, 17, seed=2),
        names=("input", "batch1", "batch2"),
    )

    x, w, b = _normal(37, 96, seed=1), _normal(51, 96, seed=2, scale=0.1), _normal(51, seed=3)
    names = ("input", "weight", "bias")

    def linear(F: Any, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, w, b)

    yield product("linear", linear, x, w, names=names)
    yield product("linear + bias", linear, x, w, b, names=names)
    for name in ("relu", "gelu", "silu", "sigmoid", "tanh"):
        yield product(
            f"linear + bias + {name}",
            lambda F, x, w, b, name=name: getattr(F, name)(F.linear(x, w, b)),
            x,
            w,
            b,
            names=names,
            plain=linear,
            ours=lambda F, x, w, b, name=name: F.linear(x, w, b, activation=name),
        )
    yield product(
        "linear + bias + residual + gelu",
        lambda F, x, w, b, r: F.gelu(F.linear(x, w, b) + r),
        x,
        w,
        b,
        _normal(37, 51, seed=4),
        names=(*names, "residual"),
        plain=lambda F, x, w, b, r: F.linear(x, w, b) + r,
        ours=lambda F, x, w, b, r: F.linear(x, w, b, residual=r, activation="gelu"),
    )


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
    """Where activations are at work, and far out on both sides."""
    near = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    return (torch.cat([near, torch.linspace(-25, 25, 71, dtype=torch.float64)]).to(dtype).requires_grad_(),)


def _glu_scale(inputs: Sequence[Any], grad: Tensor | None, dim: int) -> tuple[Tensor, ...]:
    value, gate = inputs[0].detach().chunk(2, dim)
    if grad is None:
        return (torch.zeros_like(value),)
    s = torch.sigmoid(gate)
    return (torch.cat([(grad * s).abs(), (grad * value * s).abs()], dim),)  # the gate's 1 - s cancels


def _activation_checks() -> Iterator[Check]:
    from .kernels.reference import activation as plain

    for name, f in POINTWISE.items():
        yield Check("activation", name, _usual_vector, f.theirs, scale=f.magnitudes, exact=f.exact)
        yield Check(
            "activation", f"{name}, special values", _special_vector, f.theirs, scale=f.magnitudes, exact=f.exact
        )

    def prelu(F: Any, x: Tensor, w: Tensor) -> Tensor:
        return F.prelu(x, w)

    both = sum_of_magnitudes(lambda F, x, w: F.prelu(-x, w))  # of the slope's gradient, a sum over all but the channels
    yield Check(
        "activation",
        "prelu, a slope a channel",
        _all(_normal(5, 13, 9, seed=1), _normal(13, seed=2, scale=0.2)),
        prelu,
        names=("input", "weight"),
        scale=both,
    )
    yield Check(
        "activation",
        "prelu, one slope",
        _all(_normal(5, 13, 9, seed=1), _normal(1, seed=2, scale=0.2)),
        prelu,
        names=("input", "weight"),
        scale=both,
    )
    for dim in (-1, 0):
        yield Check(
            "activation",
            f"glu, dim {dim}",
            _all(_normal(14, 66, seed=1, scale=3.0)),
            lambda F, x, dim=dim: F.glu(x, dim),
            scale=partial(_glu_scale, dim=dim),
        )

    def dropout(F: Any, x: Tensor) -> Tensor:
        from .ops import activation

        return activation.dropout(x, 0.3, 1234567)

    # The generator is ours, so the plain maths stands for PyTorch.
    yield Check(
        "activation", "dropout", _all(_normal(11, 977, seed=1)), lambda F, x: plain.dropout(x, 0.3, 1234567), dropout
    )


def _softmax_checks() -> Iterator[Check]:
    from .kernels.reference import softmax as plain

    for name in ("softmax", "log_softmax"):
        for shape, dim in (((37, 1003), -1), ((37, 1003), 0), ((5, 7, 11), 1)):
            yield Check(
                "softmax",
                f"{name} {'×'.join(map(str, shape))}, dim {dim}",
                _all(_normal(*shape, seed=1, scale=4.0)),
                lambda F, x, name=name, dim=dim: getattr(F, name)(x, dim),
                scale=softmax_scale(name == "log_softmax", dim),
            )
        yield Check(
            "softmax",
            f"{name}, special values",
            _all(_special_rows(37)),
            lambda F, x, name=name: getattr(F, name)(x, -1),
            scale=softmax_scale(name == "log_softmax"),
        )
        yield Check(
            "softmax",
            f"{name}, large means",
            _all(_normal(9, 211, seed=1, mean=1000)),
            lambda F, x, name=name: getattr(F, name)(x, -1),
            scale=softmax_scale(name == "log_softmax"),
        )

    n, c = 29, 1009
    weights = torch.rand(c, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    logits = _normal(n, c, seed=1, scale=2.0)

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

        return Check("softmax", f"cross_entropy, {name}", _all(x, target), run, names=("input", "target"), scale=scale)

    for reduction in ("mean", "sum", "none"):
        yield entropy(reduction, logits, _indices(n, c), reduction=reduction)
    yield entropy("weight, ignore_index", logits, _indices(n, c, ignored=7), True, 7)
    yield entropy("weight, ignore_index, smoothing", logits, _indices(n, c, ignored=7), True, 7, smoothing=0.1)
    yield entropy("probabilities, weight", logits, _probabilities(n, c), True)
    yield entropy("N×C×d", _normal(6, 31, 10, seed=1, scale=2.0), _indices(6, 31, 10))
    yield entropy(
        "special values", _special_rows(37), lambda dtype: torch.arange(len(specials(dtype))) % 37, reduction="none"
    )
    yield Check(
        "softmax",
        "nll_loss",
        _all(logits, _indices(n, c, ignored=-100)),
        lambda F, x, t: F.nll_loss(x, t),
        names=("input", "target"),
        scale=sum_of_magnitudes(lambda F, x, t: -F.nll_loss(x, t)),
    )
    yield Check(
        "softmax",
        "mse_loss",
        _all(_normal(17, 61, seed=1), _normal(17, 61, seed=2)),
        lambda F, x, t: F.mse_loss(x, t),
        names=("input", "target"),
    )


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "matmul": _matmul_checks,
    "activation": _activation_checks,
    "softmax": _softmax_checks,
}


def checks(families: Iterable[str] = ()) -> list[Check]:
    """The checks of the named families, or of all.

    Raises:
        ValueError: there is no such family.
    """
    names = list(families) or list(CHECKS)
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"unknown family {name!r}; there are: {', '.join(CHECKS)}")
    return [check for name in names for check in CHECKS[name]()]


def dtypes(name: str | None) -> list[torch.dtype]:
    """The dtype of that name, or all.

    Raises:
        ValueError: there is no such dtype here.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    return [DTYPES[name]] if name else list(DTYPES.values())
