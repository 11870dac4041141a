"""The vector functions against float64 (for float32) and mpmath (for float64), over the whole range, in ulp."""

from collections.abc import Callable
from functools import cache
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from fastnn._numerics import ulp
from fastnn.kernels.cpu.engine.build import Kernel

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "exp": (torch.exp, mpmath.exp),
    "expm1": (torch.expm1, mpmath.expm1),
    "log": (torch.log, mpmath.log),
    "log1p_unit": (torch.log1p, mpmath.log1p),
    "tanh": (torch.tanh, mpmath.tanh),
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + mpmath.exp(-x))),
    "erf": (torch.erf, mpmath.erf),
}
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 1e30, -1e30]


@cache
def compiled(function: str, elem: str, vectors: int) -> Callable[..., None]:
    """kernel(x, y, n): y = function(x), with ``vectors`` computed as one."""

    def make() -> Callable[..., None]:
        from fastnn.kernels.cpu.engine import vecmath
        from fastnn.kernels.cpu.engine.simd import ELEMS, load_n, store_n, wide

        elem_type = wide(ELEMS[elem], vectors)
        f, lanes, size = getattr(vecmath, function), elem_type.lanes, elem_type.size

        def kernel(x, y, n):  # type: ignore[no-untyped-def]
            for i in range(0, n, lanes):
                store_n(elem_type, y + i * size, f(load_n(elem_type, x + i * size, n - i)), n - i)

        return kernel

    return Kernel(f"test_{function}_{elem}_{vectors}", "iii", make).load()


def ours(function: str, x: Tensor, vectors: int = 1) -> Tensor:
    y = torch.full_like(x, float("nan"))
    compiled(function, str(x.dtype).removeprefix("torch."), vectors)(x.data_ptr(), y.data_ptr(), x.numel())
    return y


@cache
def float32_inputs(function: str) -> Tensor:
    """Six million numbers: all exponents and signs evenly, more where the function is neither flat nor linear."""
    bits = torch.arange(-(2**31), 2**31, 1201, dtype=torch.int64).to(torch.int32).view(torch.float32)
    generator = torch.Generator().manual_seed(3)
    dense = [(torch.rand(1_000_000, generator=generator) * 2 - 1) * reach for reach in (1.0, 10.0, 110.0)]
    x = torch.cat([bits, *dense, torch.tensor(SPECIAL)])
    match function:
        case "log1p_unit":
            return x.abs()[x.abs() <= 1]
        case "log":
            return torch.cat([x.abs(), x[-1000:]])
    return x


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32_within_two_ulp(function: str) -> None:
    x = float32_inputs(function)
    y, truth = ours(function, x), FUNCTIONS[function][0](x.double())
    rounded = truth.float()
    finite = y.isfinite() & rounded.isfinite()
    same = (y == rounded) | (y.isnan() & rounded.isnan())
    assert bool((finite | same).all()), f"not as it should be at {x[~(finite | same)][:5].tolist()}"
    off = ((y.double() - truth).abs() / ulp(truth, torch.float32))[finite]
    assert float(off.max()) <= 2.0, f"{float(off.max()):.3f} ulp at {float(x[finite][off.argmax()])!r}"
    zero = (y == 0) & (rounded == 0)
    assert torch.equal(y[zero].signbit(), rounded[zero].signbit())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64_within_two_ulp(function: str) -> None:
    generator = torch.Generator().manual_seed(5)

    def uniform(n: int, low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64) * (high - low) + low

    x = torch.cat([uniform(1500, -3, 3), uniform(600, -40, 40), uniform(300, -745, 709), uniform(300, -700, 5).exp(),
                   -uniform(300, -700, 5).exp()])
    if function == "log":
        x = torch.cat([x.abs(), uniform(600, -744, 709).exp(), uniform(600, 0.5, 2)])
    if function == "log1p_unit":
        x = torch.cat([uniform(1500, 0, 1), uniform(500, -700, 0).exp()])
    with mpmath.workdps(40):
        for a, b in zip(x.tolist(), ours(function, x).tolist(), strict=True):
            truth = FUNCTIONS[function][1](mpmath.mpf(a))
            exponent = int(mpmath.floor(mpmath.log(abs(truth), 2))) if truth else -1074
            off = abs(mpmath.mpf(b) - truth) / mpmath.mpf(2) ** max(exponent - 52, -1074)
            assert off <= 2, f"{float(off):.3f} ulp at {a!r}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_special_values(function: str, dtype: torch.dtype) -> None:
    x = torch.tensor([*SPECIAL, 1e4, -1e4, torch.finfo(dtype).tiny / 8, -torch.finfo(dtype).tiny / 8], dtype=dtype)
    if function == "log1p_unit":
        x = torch.tensor([0.0, 1.0, float("nan"), torch.finfo(dtype).tiny / 8], dtype=dtype)
    torch.testing.assert_close(ours(function, x), FUNCTIONS[function][0](x.double()).to(dtype), equal_nan=True,
                               rtol=4 * torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("function", [*FUNCTIONS, "normal_cdf", "normal_pdf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_several_vectors_as_one_give_the_same_bits(function: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 30, 997, dtype=dtype), torch.tensor(SPECIAL, dtype=dtype)])
    assert torch.equal(ours(function, x, 4).nan_to_num(7.0), ours(function, x).nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normal_distribution(dtype: torch.dtype) -> None:
    x = torch.linspace(-40, 40, 20001, dtype=dtype)
    cdf = torch.special.erfc(-x.double() * 0.5**0.5) / 2
    off = (ours("normal_cdf", x).double() - cdf).abs()
    eps = torch.finfo(dtype).eps
    power = 0.4 if dtype == torch.float32 else 0.3  # the relative error grows where the value is tiny
    assert bool((off <= 4 * eps * cdf.clamp(min=eps) ** power).all())
    pdf = torch.exp(-x.double() ** 2 / 2) * 0.3989422804014327
    assert bool(((ours("normal_pdf", x).double() - pdf).abs() <= (4 + x.double() ** 2) * eps * pdf + 1e-40).all())
