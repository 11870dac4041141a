"""What the numerics report checks: every operator on usual, special and adversarial data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._numerics import TORCH, Scale, attention_scale, results, softmax_scale, sum_of_magnitudes, widen

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


# Adversarial data: what a careless kernel gets wrong though normal numbers show nothing.


def _cancelling(rows: int, columns: int, seed: int, dim: int) -> Callable[[torch.dtype], Tensor]:
    """Along dim the second half is the first, negated but for a millionth (16 bits: some of the last places).

    Times a matrix whose halves are equal, the terms cancel to that part of their magnitude.
    """

    def make(dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        half = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype).double()
        rest = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * max(1e-6, torch.finfo(dtype).eps)
        return torch.cat([half, half * (rest - 1)], dim).to(dtype).requires_grad_()

    return make


def _repeated(make: Callable[[torch.dtype], Tensor], dim: int) -> Callable[[torch.dtype], Tensor]:
    """Both halves along dim the same."""
    return lambda dtype: torch.cat([make(dtype).detach()] * 2, dim).requires_grad_()


def _one_hot(rows: int, columns: int, value: float = 1.0, noise: float = 0.0) -> Callable[[torch.dtype], Tensor]:
    """One value in each row, at a wandering place, above normal numbers times ``noise``."""

    def make(dtype: torch.dtype) -> Tensor:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * noise
        x[torch.arange(rows), torch.arange(rows) * 7 % columns] = value
        return x.to(dtype).requires_grad_()

    return make


def _huge_and_tiny(rows: int, columns: int, seed: int, dim: int, power: float) -> Callable[[torch.dtype], Tensor]:
    """Normal numbers, along dim in turn multiplied and divided by the dtype's largest number to that power."""

    def make(dtype: torch.dtype) -> Tensor:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        factor = torch.finfo(dtype).max ** power
        x.movedim(dim, 0)[::2] *= factor
        x.movedim(dim, 0)[1::2] /= factor
        return x.to(dtype).requires_grad_()

    return make


def _equal(*shape: int, value: float = 0.1) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.full(shape, value, dtype=torch.float64).to(dtype).requires_grad_()


def _subnormal(*shape: int, seed: int = 0) -> Callable[[torch.dtype], Tensor]:
    """Normal numbers times a sixteenth of the smallest that is not subnormal."""
    return lambda dtype: _normal(*shape, seed=seed, scale=torch.finfo(dtype).tiny / 16)(dtype)


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
    yield product("matmul, long sums", matmul, _normal(5, 65537, seed=1), _normal(65537, 7, seed=2))
    yield product(
        "matmul, cancellation", matmul, _cancelling(19, 256, 1, 1), _repeated(_normal(256, 23, seed=2), 0)
    )
    yield product("matmul, one-hot rows", matmul, _one_hot(29, 67), _normal(67, 41, seed=2))
    yield product(
        "matmul, huge and tiny in turn", matmul, _huge_and_tiny(17, 131, 1, 1, 0.4), _huge_and_tiny(131, 37, 2, 0, -0.4)
    )
    yield product("matmul, all equal", matmul, _equal(17, 1023), _equal(1023, 33))
    yield product("matmul, subnormal", matmul, _subnormal(23, 67, seed=1), _normal(67, 35, seed=2))
    yield product("matmul, large means", matmul, _normal(23, 511, seed=1, mean=30), _normal(511, 19, seed=2, mean=-30))
    yield product(
        "matmul, special values", matmul, _special_rows(37, skip_huge=True), _normal(37, 21, seed=2, scale=0.1)
    )
    yield product(
        "bmm, special values",
        lambda F, a, b: F.bmm(a.unsqueeze(0), b.unsqueeze(0)),
        _special_rows(37, skip_huge=True),
        _normal(37, 21, seed=2, scale=0.1),
    )
    yield product(
        "addmm, special values",
        lambda F, c, a, b: F.addmm(c, a, b, beta=0.5, alpha=2.0),
        lambda dtype: _special_rows(21, skip_huge=True)(dtype),
        lambda dtype: _normal(len(_special_rows(21, skip_huge=True)(dtype)), 37, seed=1)(dtype),
        _normal(37, 21, seed=2, scale=0.1),
        names=("input", "mat1", "mat2"),
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
    special = _special_rows(96, skip_huge=True)
    yield product("linear + bias, special values", linear, special, w, b, names=names)
    yield product("linear + bias, large means", linear, _normal(37, 96, seed=1, mean=30), w, b, names=names)
    yield product(
        "linear + bias, cancellation", linear, _cancelling(37, 96, 1, 1), _repeated(_normal(51, 96, seed=2), 1), b,
        names=names,
    )  # fmt: skip
    yield product(
        "linear + bias + relu, special values",
        lambda F, x, w, b: F.relu(F.linear(x, w, b)),
        special,
        w,
        b,
        names=names,
        plain=linear,
        ours=lambda F, x, w, b: F.linear(x, w, b, activation="relu"),
    )
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
    yield Check(
        "activation",
        "prelu, special values",
        _all(_special_rows(13), _normal(13, seed=2, scale=0.2)),
        prelu,
        names=("input", "weight"),
        scale=both,
    )
    yield Check(
        "activation",
        "prelu, huge and tiny in turn",
        _all(_huge_and_tiny(64, 13, 1, 0, 0.4), _normal(13, seed=2, scale=0.2)),
        prelu,
        names=("input", "weight"),
        scale=both,
    )
    for dim, name, make in (
        (-1, "dim -1", _normal(14, 66, seed=1, scale=3.0)),
        (0, "dim 0", _normal(14, 66, seed=1, scale=3.0)),
        (-1, "special values", _special_rows(14)),
        (-1, "huge and tiny in turn", _huge_and_tiny(14, 66, 1, 1, 0.4)),
        (-1, "subnormal", _subnormal(14, 66, seed=1)),
    ):
        yield Check(
            "activation",
            f"glu, {name}",
            _all(make),
            lambda F, x, dim=dim: F.glu(x, dim),
            scale=partial(_glu_scale, dim=dim),
        )

    def dropout(F: Any, x: Tensor) -> Tensor:
        from .ops import activation

        return activation.dropout(x, 0.3, 1234567)

    # The generator is ours, so the plain maths stands for PyTorch.
    for name, make in (
        ("", _normal(11, 977, seed=1)),
        (", special values", _special_rows(37)),
        (", subnormal", _subnormal(11, 97, seed=1)),
    ):
        yield Check(
            "activation", f"dropout{name}", _all(make), lambda F, x: plain.dropout(x, 0.3, 1234567), dropout
        )
    for p in (0.1, 0.5):
        yield Check(
            "activation",
            f"dropout, statistics at p = {p}",
            _all(_normal(64, 1021, seed=1)),
            lambda F, x, p=p: x / (1 - p),
            partial(_dropout_statistics, p=p),
        )


def _adversarial_rows(special: int, columns: int) -> dict[str, Callable[[torch.dtype], Tensor]]:
    return {
        "special values": _special_rows(special),
        "large means": _normal(9, columns, seed=1, mean=1e4),
        "one-hot rows": _one_hot(9, columns, 60.0, noise=1.0),
        "all equal": _equal(9, columns, value=-3.7),
        "huge and tiny in turn": _huge_and_tiny(9, columns, 1, 1, 0.4),
        "subnormal": _subnormal(9, columns, seed=1),
        "long rows": _normal(3, 65537, seed=1, scale=2.0),
    }


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
        for kind, make in _adversarial_rows(37, 211).items():
            yield Check(
                "softmax",
                f"{name}, {kind}",
                _all(make),
                lambda F, x, name=name: getattr(F, name)(x, -1),
                scale=softmax_scale(name == "log_softmax"),
            )
        yield Check(
            "softmax",
            f"{name}, large means, dim 0",
            _all(_normal(211, 19, seed=1, mean=1e4)),
            lambda F, x, name=name: getattr(F, name)(x, 0),
            scale=softmax_scale(name == "log_softmax", 0),
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
    for kind, make in _adversarial_rows(37, 211).items():
        yield entropy(kind, make, partial(_wandering_target, make), reduction="none")
    yield entropy("one-hot rows, mean", _one_hot(9, 211, 60.0, noise=1.0), _indices(9, 211))
    yield Check(
        "softmax",
        "nll_loss, special values",
        _all(_special_rows(37), partial(_wandering_target, _special_rows(37))),
        lambda F, x, t: F.nll_loss(x, t, reduction="none"),
        names=("input", "target"),
    )
    yield Check(
        "softmax",
        "nll_loss",
        _all(logits, _indices(n, c, ignored=-100)),
        lambda F, x, t: F.nll_loss(x, t),
        names=("input", "target"),
        scale=sum_of_magnitudes(lambda F, x, t: -F.nll_loss(x, t)),
    )
    for name, left, right in (
        ("", _normal(17, 61, seed=1), _normal(17, 61, seed=2)),
        (", none", _normal(97, 211, seed=1), _normal(97, 211, seed=2)),
        (", special values, none", _special_rows(37), lambda dtype: _normal(*_special_rows(37)(dtype).shape)(dtype)),
        (", large means", _normal(17, 61, seed=1, mean=200), _normal(17, 61, seed=2, mean=200)),
        (", cancellation", _normal(17, 61, seed=1), lambda dtype: _almost(_normal(17, 61, seed=1)(dtype))),
        (", huge and tiny in turn, none", _huge_and_tiny(17, 61, 1, 1, 0.4), _huge_and_tiny(17, 61, 2, 1, 0.4)),
        (", subnormal, none", _subnormal(17, 61, seed=1), _subnormal(17, 61, seed=2)),
    ):
        reduction = "none" if name.endswith("none") else "mean"
        yield Check(
            "softmax",
            f"mse_loss{name}",
            _all(left, right),
            lambda F, x, t, reduction=reduction: F.mse_loss(x, t, reduction=reduction),
            names=("input", "target"),
        )


def _almost(x: Tensor) -> Tensor:
    """x but for a millionth, or some of the last places."""
    return (x.detach() * (1 + 3 * max(3e-7, torch.finfo(x.dtype).eps))).requires_grad_()


def _wandering_target(make: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> Tensor:
    """For half of the rows the class where `_special_rows` and `_one_hot` put their value, for the rest the next."""
    rows, classes = make(dtype).shape
    n = torch.arange(rows)
    return (7 * n + n % 2) % classes


# Recurrent layers: a state is made of all that went before, so errors are counted at the largest number of each result.


def _of_the_largest(run: Callable[..., Tensor]) -> Scale:
    def scale(inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
        finite = [v.nan_to_num(0, 0, 0).detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in inputs]
        return tuple(torch.full_like(t, float(t.abs().max())) for t in results(partial(run, TORCH), finite, grad))

    return scale


def _first(name: str, F: Any, *inputs: Tensor) -> Tensor:
    out: Tensor = getattr(F, name)(*inputs)[0]
    return out


def _rnn_checks() -> Iterator[Check]:
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
            x = (data or _normal(*rows, seed=1))(dtype).reshape(rows).detach().requires_grad_(grad)
            others = [*((shape, 1.0) for shape in states), *((shape, gain * units**-0.5) for shape in shapes)]
            return x, *(_normal(*shape, seed=n + 2, scale=by, grad=grad)(dtype) for n, (shape, by) in enumerate(others))

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
        yield layers(mode, "large inputs", 9, 3, 20, 24, data=_normal(9, 3, 20, seed=1, scale=30.0), gain=gain)
        yield layers(mode, "subnormal inputs", 5, 3, 20, 24, data=_subnormal(5, 3, 20, seed=1), gain=gain)
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

    for kind, steps in (("37 steps", 37), ("1,000 steps", 1000)):
        makers = (_normal(steps, 3, 20, seed=1), _normal(3, 17, seed=2), _normal(51, 40, seed=3, scale=0.2), _normal(51, seed=4))
        names = ("input", "cell", "weight", "bias")
        ours = partial(_first, "qrnn")
        yield Check("rnn", f"qrnn, {kind}", _all(*makers), pooled, ours, names, _of_the_largest(pooled))
def _images(make: Callable[[torch.dtype], Tensor], *shape: int, last: bool = False) -> Callable[[torch.dtype], Tensor]:
    """The numbers as a batch of images, with ``last`` in memory format channels_last."""

    def images(dtype: torch.dtype) -> Tensor:
        x = make(dtype).detach().reshape(shape)
        return (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).requires_grad_()

    return images


def _pool_checks() -> Iterator[Check]:
    def pool(name: str, function: Callable[..., Tensor], make: Callable[[torch.dtype], Tensor]) -> Check:
        scale = sum_of_magnitudes(function) if "avg" in name else None
        return Check("pool", name, _all(make), function, scale=scale)

    def with_indices(F: Any, x: Tensor) -> Tensor:
        """The maxima and, as numbers that 16 bits can hold, where they are."""
        y, at = F.max_pool2d(x, 2, return_indices=True)
        return torch.cat([y.flatten(), at.flatten().to(y.dtype)])

    def special(last: bool) -> Callable[[torch.dtype], Tensor]:
        return _images(lambda dtype: _special_rows(36)(dtype), 1, 29, 6, 6, last=last)

    for last in (False, True):
        suffix = ", channels last" if last else ""
        for name, shape, function in (
            ("max_pool1d", (2, 5, 131), lambda F, x: F.max_pool1d(x, 3, 2, 1)),
            ("max_pool2d", (2, 5, 13, 37), lambda F, x: F.max_pool2d(x, 3, 2, 1)),
            ("max_pool2d, overlapping", (2, 35, 9, 7), lambda F, x: F.max_pool2d(x, 3, 1, 1)),
            ("max_pool3d", (2, 3, 6, 7, 9), lambda F, x: F.max_pool3d(x, 2)),
            ("adaptive_max_pool2d", (2, 5, 13, 37), lambda F, x: F.adaptive_max_pool2d(x, 5)),
            ("avg_pool2d", (2, 5, 13, 37), lambda F, x: F.avg_pool2d(x, 3, 2, 1)),
            ("avg_pool2d, overlapping", (2, 35, 9, 7), lambda F, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
            ("adaptive_avg_pool2d", (2, 5, 13, 37), lambda F, x: F.adaptive_avg_pool2d(x, 5)),
            ("adaptive_avg_pool2d, global", (2, 5, 31, 37), lambda F, x: F.adaptive_avg_pool2d(x, 1)),
            ("max_pool2d with indices", (2, 5, 12, 20), with_indices),
            ("max_unpool2d", (2, 5, 12, 20), lambda F, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
        ):
            n = torch.Size(shape).numel()
            yield pool(name + suffix, function, _images(_normal(n, seed=1), *shape, last=last))
        yield pool(
            f"max_pool2d, special values{suffix}", lambda F, x: F.max_pool2d(x, 2), special(last)
        )
        yield pool(
            f"avg_pool2d, huge and tiny in turn{suffix}",
            lambda F, x: F.avg_pool2d(x, 3, 1, 1),
            _images(_huge_and_tiny(45, 63, 1, 1, 0.4), 1, 45, 9, 7, last=last),
        )
        yield pool(
            f"avg_pool2d, large means{suffix}",
            lambda F, x: F.avg_pool2d(x, 7),
            _images(_normal(6, 3087, seed=1, mean=200), 6, 7, 21, 21, last=last),
        )


def _norm_checks() -> Iterator[Check]:
    """Counted at the largest result: differences from a mean cancel, and a gradient of a mean is small beside its terms."""

    def largest(function: Callable[..., Tensor]) -> Scale:
        def scale(inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
            wide = [widen(v) for v in inputs]
            found = results(lambda *v: function(TORCH, *v), wide, widen(grad))
            rows = inputs[0].shape[0] if inputs[0].dim() == 2 else 1  # over which a parameter's gradient is summed
            return tuple(t.abs().amax().expand(t.shape) * (rows**0.5 if t.dim() == 1 else 1) for t in found)

        return scale

    def norm(name: str, function: Callable[..., Tensor], make: Callable[[torch.dtype], Tensor], channels: int) -> Check:
        makers = (make, _normal(channels, seed=2), _normal(channels, seed=3))
        return Check("norm", name, _all(*makers), function, names=("input", "weight", "bias"), scale=largest(function))

    def batch_norm(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, True)

    def known(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = torch.linspace(-1, 1, x.shape[1]).to(x.dtype)
        return F.batch_norm(x, mean, mean.abs() + 0.5, weight, bias)

    def group_norm(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(x, 3, weight, bias)

    def instance_norm(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.instance_norm(x, None, None, weight, bias)

    functions = (("batch_norm", batch_norm), ("batch_norm, known moments", known), ("group_norm", group_norm),
                 ("instance_norm", instance_norm))  # fmt: skip
    for last in (False, True):
        suffix = ", channels last" if last else ""
        for name, function in functions:
            for kind, make in (
                ("", _images(_normal(4 * 33 * 63, seed=1), 4, 33, 9, 7, last=last)),
                (", large means", _images(_normal(4 * 33 * 63, seed=1, mean=50), 4, 33, 9, 7, last=last)),
                (", one channel of large values", _images(_huge_and_tiny(33, 63, 1, 0, 0.1), 1, 33, 9, 7, last=last)),
            ):
                yield norm(name + kind + suffix, function, make, 33)
    yield norm("batch_norm of rows", batch_norm, _normal(97, 37, seed=1), 37)

    def layer_norm(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = F.layer_norm(x, weight.shape, weight, bias)
        return out

    def rms_norm(F: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight) + bias

    for name, function in (("layer_norm", layer_norm), ("rms_norm", rms_norm)):
        for kind, make, size in (
            ("", _normal(1543, 131, seed=1), 131),  # more than a rule leaves to torch
            (", large means", _normal(1543, 131, seed=1, mean=50), 131),
            (", long rows", _normal(49, 4099, seed=1), 4099),
            (", one-hot rows", _one_hot(1543, 131, 60.0, noise=1.0), 131),
            (", huge and tiny in turn", _huge_and_tiny(1543, 131, 1, 0, 0.1), 131),
            (", subnormal", _subnormal(1543, 131, seed=1), 131),
        ):
            yield norm(name + kind, function, make, size)
        added = partial(_added, function)
        makers = (_normal(43, 131, seed=1, mean=3), _normal(43, 131, seed=4), _normal(131, seed=2), _normal(131, seed=3))
        names = ("input", "residual", "weight", "bias")
        yield Check("norm", f"{name} of a sum", _all(*makers), added, partial(_fused_sum, name), names, largest(added))


def _added(function: Callable[..., Tensor], F: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    total = x + residual
    return function(F, total, weight, bias) + total.cos()


def _fused_sum(name: str, F: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parameters = (weight, bias) if name == "layer_norm" else (weight,)
    out, total = getattr(F, name)(x, weight.shape, *parameters, residual=residual, return_sum=True)
    return (out if name == "layer_norm" else out + bias) + total.cos()


def _conv_checks() -> Iterator[Check]:
    def check(
        name: str, function: Callable[..., Tensor], *makers: Callable[[torch.dtype], Any], fused: Any = None
    ) -> Check:
        names = ("input", "weight", "bias")[: len(makers)]
        return Check("conv", name, _all(*makers), function, fused, names, sum_of_magnitudes(function))

    def last(make: Callable[[torch.dtype], Tensor]) -> Callable[[torch.dtype], Tensor]:
        return lambda dtype: make(dtype).detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    def conv(op: str, **options: Any) -> Callable[..., Tensor]:
        return lambda F, *tensors: getattr(F, op)(*tensors, **options)

    image, filters, bias = _normal(3, 24, 19, 23, seed=1), _normal(31, 24, 3, 3, seed=2, scale=0.1), _normal(31, seed=3)
    small = _normal(2, 24, 8, 9, seed=1)
    for form, place in (("", lambda make: make), (", channels last", last)):
        yield check(f"conv2d 3×3{form}", conv("conv2d", padding=1), place(image), place(filters), bias)
        yield check(f"conv2d 3×3, stride 2{form}", conv("conv2d", stride=2), place(image), place(filters), bias)
        yield check(f"conv2d 1×1{form}", conv("conv2d"), place(image), place(_normal(31, 24, 1, 1, seed=4)), bias)
        yield check(f"conv2d depthwise{form}", conv("conv2d", padding=2, groups=24), place(image),
                    place(_normal(24, 1, 5, 5, seed=5)), _normal(24, seed=6))  # fmt: skip
        yield check(f"conv_transpose2d{form}", conv("conv_transpose2d", stride=2, padding=1), place(small),
                    place(_normal(24, 31, 4, 4, seed=7, scale=0.1)), bias)  # fmt: skip
    yield check("conv2d, dilation, groups", conv("conv2d", padding=2, dilation=2, groups=4), image,
                _normal(32, 6, 3, 3, seed=8), _normal(32, seed=9))  # fmt: skip
    yield check("conv1d", conv("conv1d", stride=3, padding=4), _normal(2, 5, 211, seed=1), _normal(17, 5, 10, seed=2),
                _normal(17, seed=3))  # fmt: skip
    yield check("conv3d", conv("conv3d", padding=1), _normal(1, 5, 5, 7, 6, seed=1), _normal(9, 5, 3, 3, 3, seed=2))
    yield check("conv_transpose1d", conv("conv_transpose1d", stride=3), _normal(2, 7, 31, seed=1), _normal(7, 5, 5, seed=2))
    yield check("conv_transpose3d", conv("conv_transpose3d", stride=2), _normal(1, 5, 3, 4, 2, seed=1),
                _normal(5, 3, 3, 3, 3, seed=2))  # fmt: skip
    yield check("conv2d, long sums", conv("conv2d", padding=1), _normal(1, 520, 5, 5, seed=1), _normal(9, 520, 3, 3, seed=2))
    yield check("conv2d, alike terms", conv("conv2d", padding=1), _equal(1, 64, 9, 9), _equal(8, 64, 3, 3, value=0.3))
    yield check("conv2d, subnormal", conv("conv2d", padding=1), _subnormal(1, 8, 9, 9, seed=1), _normal(8, 8, 3, 3, seed=2))
    yield Check("conv", "conv2d, special values", _all(_special_image, _normal(6, 1, 3, 3, seed=2)),
                conv("conv2d", padding=1), names=("input", "weight"),
                scale=sum_of_magnitudes(conv("conv2d", padding=1)))  # fmt: skip


def _special_image(dtype: torch.dtype) -> Tensor:
    """One special value in each image of a batch, the others normal; none so large that sums with it depend on their order."""
    values = [v for v in specials(dtype) if not math.isfinite(v) or abs(v) < 100]
    x = torch.randn(len(values), 1, 7, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for n, value in enumerate(values):
        x[n, 0, n % 7, 7 * n % 9] = value
    return x.to(dtype).requires_grad_()


def _attention_checks() -> Iterator[Check]:
    def attention(name: str, *makers: Callable[[torch.dtype], Any], lse: bool = False, **options: Any) -> Check:
        def theirs(F: Any, *inputs: Any) -> Tensor:
            return F.scaled_dot_product_attention(*inputs, **options)

        def ours(F: Any, *inputs: Any) -> Tensor:
            own = {"return_lse": True} if lse and F is not TORCH else {}
            out = F.scaled_dot_product_attention(*inputs, **options, **own)
            return out[0] if own else out

        names = ("query", "key", "value", "attn_mask")[: len(makers)]
        return Check("attention", f"attention, {name}", _all(*makers), theirs, ours, names, attention_scale(**options))

    def three(*shape: int, scale: float = 1.0, long: int = 0, mean: float = 0.0) -> list[Callable[[torch.dtype], Tensor]]:
        keys = (*shape[:-2], long or shape[-2], shape[-1])
        return [_normal(*shape, seed=1, scale=scale, mean=mean), _normal(*keys, seed=2, scale=scale), _normal(*keys, seed=3)]

    def hidden(dtype: torch.dtype) -> Tensor:
        """-Inf for a third of the keys, and for all keys of two rows"""
        mask = torch.randn(37, 61, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        mask = mask.masked_fill(mask > 0.4, -math.inf)
        mask[[3, 36]] = -math.inf
        return mask.to(dtype).requires_grad_()

    yield attention("2×3×37×61×24", *three(2, 3, 37, 24, long=61))
    yield attention("causal", *three(1, 2, 131, 33), lse=True, is_causal=True)
    yield attention("grouped heads", *three(1, 4, 37, 16)[:1], *three(1, 2, 61, 16)[1:], enable_gqa=True)
    yield attention("one query", *three(1, 2, 1, 64, long=1031))
    yield attention("long rows", *three(1, 1, 5, 16, long=9001))
    yield attention("large logits", *three(1, 2, 37, 16, scale=12.0))
    yield attention("large means", *three(1, 2, 37, 16, mean=50.0))
    yield attention("boolean mask", *three(1, 2, 37, 16, long=61), lambda dtype: torch.isfinite(hidden(dtype)).detach())
    yield attention("-Inf in the mask", *three(1, 2, 37, 16, long=61), hidden)
    for name, shape in (("full", (2, 2, 37, 61)), ("of heads", (2, 37, 61)), ("of rows", (37, 1)), ("of keys", (2, 1, 1, 61))):
        yield attention(f"gradient of a bias, {name}", *three(2, 2, 37, 16, long=61), _normal(*shape, seed=9))
    yield attention("all equal", *[_equal(1, 2, 37, 16)] * 3)
    yield attention("subnormal", *[_subnormal(1, 2, 37, 16, seed=n) for n in range(3)])
    special = _special_rows(24)
    yield attention(
        "special values", lambda dtype: special(dtype).detach()[None, None].requires_grad_(), *three(1, 1, 37, 24)[1:]
    )


def _embedding_checks() -> Iterator[Check]:
    def check(name: str, table: Callable[[torch.dtype], Tensor], rows: int, n: int, **options: Any) -> Check:
        def run(F: Any, weight: Tensor, indices: Tensor) -> Tensor:
            return F.embedding(indices, weight, **options)

        makers = (table, lambda dtype: torch.randint(rows, (n, 3), generator=torch.Generator().manual_seed(2)))
        return Check("embedding", name, _all(*makers), run, names=("weight", "indices"), scale=_summed_magnitudes(run))

    yield check("embedding", _normal(997, 255, seed=1), 997, 300)
    yield check("embedding, padding_idx", _normal(65, 1021, seed=1), 65, 300, padding_idx=7)
    yield check("embedding, many of a few rows", _normal(7, 67, seed=1), 7, 3000, scale_grad_by_freq=True)
    special = _special_rows(67)
    yield check("embedding, special values", special, len(special(torch.float32)), 300)


def _summed_magnitudes(run: Callable[..., Tensor]) -> Scale:
    """A gradient is a sum over the places that took the row: errors are counted at the sum of magnitudes"""

    def scale(inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
        weight, indices = inputs
        wide = torch.nan_to_num(weight.detach().double()).requires_grad_(grad is not None)
        found = results(lambda *v: run(TORCH, *v), [wide, indices], None if grad is None else widen(grad.abs()))
        return tuple(t.abs() for t in found)

    return scale


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "matmul": _matmul_checks,
    "activation": _activation_checks,
    "softmax": _softmax_checks,
    "rnn": _rnn_checks,
    "pool": _pool_checks,
    "norm": _norm_checks,
    "conv": _conv_checks,
    "attention": _attention_checks,
    "embedding": _embedding_checks,
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
