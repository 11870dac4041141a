"""layer_norm and rms_norm on the CPU against float64 and beside torch: values, gradients, sums with a residual, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn
import fastnn.functional as f
from rule import DTYPES, FLOOR, LAYOUTS, randn

pytestmark = pytest.mark.usefixtures("poison", "threads")
NAMES = ("layer_norm", "rms_norm")
#: Rows shorter than a vector, of several and one more, of more than a block; fewer rows than threads, and more than are summed
#: before their sums go to the total
SHAPES = [((5, 3), 1), ((3, 40), 1), ((2, 3, 33), 1), ((301, 67), 1), ((3, 4099), 1), ((4, 3, 5, 7), 3), ((9,), 1)]


def run(space: Any, name: str, x: Tensor, parameters: list[Tensor], grad: Tensor, wide: bool = False) -> list[Tensor]:
    leaves = [(t.double() if wide else t).detach().requires_grad_() for t in (x, *parameters)]
    shape = parameters[0].shape
    y = getattr(space, name)(leaves[0], tuple(shape), *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def check(name: str, x: Tensor, dims: int, dtype: torch.dtype | None = None) -> None:
    """The error rule, counted at the largest value of each result: differences from a mean cancel"""
    parameters = [randn(*x.shape[-dims:], dtype=dtype or x.dtype, seed=k) for k in range(2 if name == "layer_norm" else 1)]
    grad, before = randn(*x.shape, dtype=x.dtype, seed=6), x.clone()
    with fastnn.backend("cpu"):
        ours = run(f, name, x, parameters, grad)
    assert torch.equal(x, before)
    theirs, exact = (run(F, name, x, parameters, grad, wide) for wide in (False, True))
    for n, (mine, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        allowed, error = (float((t.double() - truth).abs().max()) for t in (other, mine))
        ulp = torch.finfo(mine.dtype).eps * max(1.0, float(truth.abs().max()))
        assert error <= 2 * allowed + 2 * FLOOR[mine.dtype] * ulp, f"result {n}: {error:.3g}, torch's own {allowed:.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, shape: tuple[tuple[int, ...], int]) -> None:
    sizes, dims = shape
    for mean in (0.0, 100.0):
        check(name, randn(*sizes) * 2 + mean, dims)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    for sizes in ((70, 33), (3, 2100)):
        x = (randn(*sizes) + 3).to(dtype)
        check(name, x, 1)
        if dtype.itemsize == 2:  # as a model's parameters may stay
            check(name, x, 1, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts(name: str, layout: str) -> None:
    for sizes, dims in (((6, 19), 1), ((4, 5, 7), 1), ((3, 4, 5, 6), 2)):
        check(name, LAYOUTS[layout](randn(*sizes)), dims)
    check(name, randn(1, 9).expand(5, 9), 1)
    check(name, randn(5, 1).expand(5, 9), 1)


def test_rows_of_one() -> None:
    """What is left of a number without its mean is 0, and so is its gradient"""
    x = randn(3, 1).requires_grad_()
    y = f.layer_norm(x, (1,), backend="cpu")
    assert not y.any()
    assert float(torch.autograd.grad(y, x, randn(3, 1, seed=1))[0].abs().max()) < 1e-4  # 1 / deviation is 316


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_large_means(mean: float) -> None:
    x = (randn(30, 500).double() + mean).float()
    wide = x.double()
    exact = (wide - wide.mean(1, keepdim=True)) / (wide.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert float((f.layer_norm(x, (500,), backend="cpu") - exact).abs().max()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sum_with_a_residual(name: str, dtype: torch.dtype, calls: list[Any]) -> None:
    """One pass gives what an addition and a norm give, to the bit, and both gradients"""
    x, r, w = randn(70, 67, dtype=dtype), randn(70, 67, dtype=dtype, seed=1), randn(67, dtype=dtype, seed=2)
    results = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, r, w)]
        norm = getattr(f, name)
        if fused:
            y, total = norm(leaves[0], (67,), leaves[2], residual=leaves[1], return_sum=True)
        else:
            total = leaves[0] + leaves[1]
            y = norm(total, (67,), leaves[2])
        results.append([y, total, *torch.autograd.grad([y, total], leaves, [torch.ones_like(y), torch.full_like(y, 0.5)])])
    assert [c.op for c in calls] == [f"add_{name}", f"{name}_backward", name, f"{name}_backward"]
    assert {c.backend for c in calls} == {"cpu"}
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=torch.finfo(dtype).eps * 2, atol=1e-5 if dtype == torch.float32 else 0.02)
    for mine, other in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(mine, other)
    y, total = getattr(f, name)(x, (67,), return_sum=True)
    assert total is x
    assert y.shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_specials_stay_in_their_row(name: str) -> None:
    for value in (float("nan"), float("inf")):
        x = randn(5, 37)
        x[2, 33] = value
        ours, theirs = (getattr(s, name)(x, (37,)) for s in (f, F))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_only_needed_gradients(name: str) -> None:
    tensors = [randn(6, 5), *(randn(5, seed=k) for k in range(2 if name == "layer_norm" else 1))]
    for wanted in range(len(tensors)):
        grads = []
        for space in (f, F):
            leaves = [t.clone().requires_grad_(k == wanted) for k, t in enumerate(tensors)]
            y = getattr(space, name)(leaves[0], (5,), *leaves[1:])
            grads.append(torch.autograd.grad(y.sin().sum(), leaves[wanted])[0])
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_large_results_go_past_the_caches(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnn.kernels.cpu import norm

    went: list[bool] = []
    real = norm._past

    def past(*args: int) -> bool:
        went.append(real(*args))
        return went[-1]

    monkeypatch.setattr(norm, "_past", past)
    x, grad, weight = randn(37, 165).to(dtype)[:, :160], randn(37, 160).to(dtype), randn(160).to(dtype)
    parameters, results = [weight, weight + 1][: 2 if name == "layer_norm" else 1], []
    for kept in (0.5, 0.0):
        monkeypatch.setattr(norm, "_KEPT", kept)
        with fastnn.backend("cpu"):
            results.append(run(f, name, x, parameters, grad))
    assert went == [False, False, True, True]
    for usual, large in zip(*results, strict=True):
        assert torch.equal(usual, large)


def test_same_bits_again() -> None:
    x, w, b, g = randn(333, 129), randn(129, seed=1), randn(129, seed=2), randn(333, 129, seed=3)
    for a, again in zip(run(f, "layer_norm", x, [w, b], g), run(f, "layer_norm", x, [w, b], g), strict=True):
        assert torch.equal(a, again)


def test_few_elements_are_torchs_by_rule(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastnn.kernels.cpu.engine.overhead.RULES", True)
    f.layer_norm(randn(8, 8), (8,))
    f.layer_norm(randn(257, 768), (768,))
    f.layer_norm(randn(8, 8), (8,), backend="cpu")
    assert [c.backend for c in calls] == ["torch", "cpu", "cpu"]


# Errors

X, W = torch.ones(2, 4, 3), torch.ones(3)
WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda s: s.layer_norm(X, 3), "normalized_shape.*int"),
    (lambda s: s.layer_norm(X, (4,)), r"4.*2, 4, 3"),
    (lambda s: s.layer_norm(X, ()), "at least 1"),
    (lambda s: s.layer_norm(X, (4, 3), W), r"weight.*3.*4, 3"),
    (lambda s: s.layer_norm(X, (3,), W, torch.ones(4)), r"bias.*4.*3"),
    (lambda s: s.layer_norm(X, (1, 2, 4, 3)), r"1, 2, 4, 3.*2, 4, 3"),
    (lambda s: s.layer_norm(X, (3,), W.double()), "dtype"),
    (lambda s: s.layer_norm(X.long(), (3,)), "Long"),
    (lambda s: s.rms_norm(X, 3), "normalized_shape.*int"),
    (lambda s: s.rms_norm(X, (4,)), r"4.*2, 4, 3"),
    (lambda s: s.rms_norm(X, (4, 3), W), r"weight.*3.*4, 3"),
    (lambda s: s.rms_norm(X, (1, 2, 4, 3)), r"1, 2, 4, 3.*2, 4, 3|4 dimensions"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_bad_input(number: int) -> None:
    """torch's error type, and a message with the numbers in it"""
    call, message = WRONG[number]
    with pytest.raises(Exception) as theirs:  # whatever torch raises
        call(F)
    with pytest.raises(theirs.type, match=message) as ours:
        call(f)
    assert ours.type is theirs.type


def test_a_residual_of_another_shape() -> None:
    for other in (torch.ones(4, 3), X.double()):
        with pytest.raises(RuntimeError, match=r"^layer_norm.*residual must have input's shape \(2, 4, 3\) and dtype.*float32"):
            f.layer_norm(X, (3,), residual=other)


@pytest.mark.parametrize("name", NAMES)
def test_empty_is_torchs(name: str, calls: list[Any]) -> None:
    for x, shape in ((X[:0], (3,)), (X[:, :, :0], (0,))):
        leaf = x.clone().requires_grad_()
        y = getattr(f, name)(leaf, shape)
        y.sum().backward()
        assert y.shape == x.shape
        y, total = getattr(f, name)(x, shape, residual=x, return_sum=True)
        assert y.shape == total.shape == x.shape
    assert {c.backend for c in calls} == {"torch"}
