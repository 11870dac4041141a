"""Activations, PReLU, GLU and dropout on the CPU against float64, beside torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnn
import fastnn.functional as ours
from fastnn import ops
from fastnn.kernels.cpu import activation as kernels
from fastnn.kernels.cpu.engine.activation_codes import PARAMETERS
from fastnn.kernels.layout import mix
from fastnn.kernels.reference import activation as reference
from rule import DTYPES, LAYOUTS, check, far_apart, randn

pytestmark = pytest.mark.usefixtures("poison", "threads")
NUMBERS = {"leaky_relu": [0.1], "elu": [1.5], "hardtanh": [-0.5, 0.75], "softplus": [2.0, 3.0]}
SIZES = [0, 1, 7, 15, 16, 17, 63, 64, 65, 127, 4099]
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.0, -3.0, 6.0, 20.0, 1.0, -1.0, 100.0, -100.0, 1e-30]


#: Better than torch's formulas in float64: no cancellation for negative numbers; 1/6 in all digits.
EXACT: dict[str, Callable[..., Tensor]] = {
    "gelu": lambda space, x: x * torch.special.erfc(x * -(0.5**0.5)) / 2,
    "hardsigmoid": lambda space, x: (x + 3).clamp(0, 6) / 6,
    "gelu_tanh": lambda space, x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}


def call(name: str) -> Callable[..., Tensor]:
    """An activation of either namespace."""
    if name == "gelu_tanh":
        return lambda space, x: space.gelu(x, approximate="tanh")
    return lambda space, x: getattr(space, name)(x, *NUMBERS.get(name, []))


def slope_scale(inputs: Any, grad: Tensor | None) -> tuple[Tensor, ...]:
    """A slope is a sum, Φ(x) + x φ(x) say, and as exact as its largest term, which is at most 1 + |x|."""
    x = inputs[0].detach().double().abs()
    return (torch.zeros_like(x) if grad is None else grad.double().abs() * (1 + x),)


def test_the_slope_of_silu_keeps_its_sign_where_it_vanishes() -> None:
    x = torch.linspace(-1e4, -90, 37).repeat(2).requires_grad_()
    upstream = torch.ones(74).index_fill(0, torch.arange(37), -1.0)
    found, expected = (
        torch.autograd.grad(y, x, upstream)[0] for y in (ours.silu(x, backend="cpu"), torch.nn.functional.silu(x))
    )
    assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_beyond_two_gigabytes(dtype: torch.dtype) -> None:
    x, grad = randn(3, 700, dtype=dtype), randn(3, 700, dtype=dtype, seed=1)
    for name, args in (("activation", ("silu", [])), ("dropout", (0.3, 7))):
        near, far = torch.empty_like(x), far_apart(x)
        kernels.KERNELS[name](near, x, *args)
        kernels.KERNELS[name](out := far_apart(x), far, *args)
        assert torch.equal(out, near)
    near = torch.empty_like(x)
    kernels.KERNELS["activation_backward"](near, grad, x, "silu", [])
    kernels.KERNELS["activation_backward"](out, far_apart(grad), far, "silu", [])
    assert torch.equal(out, near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PARAMETERS)
def test_error(name: str, dtype: torch.dtype) -> None:
    for size, spread in [(4099, 3.0), (2000, 0.01), (3000, 30.0)]:
        check(call(name), [randn(size, dtype=dtype, scale=spread).requires_grad_()], slope_scale, EXACT.get(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PARAMETERS)
def test_special_values(name: str, dtype: torch.dtype) -> None:
    """As torch has them, in its vectors of 16 or more; NaN stays NaN."""
    x = torch.tensor(SPECIAL * 8, dtype=dtype)
    with fastnn.backend("cpu"):
        y = call(name)(ours, x)
    expected = call(name)(torch.nn.functional, x)
    if name == "gelu":  # its limit, where torch has NaN or Inf by the place in the tensor
        expected[x == float("inf")] = float("inf")
    at_most = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(y, expected, rtol=at_most, atol=at_most, equal_nan=True)


@pytest.mark.parametrize("name", PARAMETERS)
def test_special_values_of_the_gradient(name: str) -> None:
    x = torch.tensor(SPECIAL[:2] + SPECIAL[5:], dtype=torch.float64).repeat(8)
    for bad in (float("nan"), float("inf")):
        g = torch.full_like(x, bad)
        mine = ops.activation.activation_backward(g, x, name, NUMBERS.get(name, []), backend="cpu")
        wanted = ops.activation.activation_backward(g, x, name, NUMBERS.get(name, []), backend="torch")
        assert torch.equal(mine.isnan() | mine.isinf(), wanted.isnan() | wanted.isinf())
        assert torch.equal(mine == 0, wanted == 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype: torch.dtype, size: int) -> None:
    for name in ("relu", "silu"):
        check(call(name), [randn(size, dtype=dtype).requires_grad_()], slope_scale)


@pytest.mark.parametrize("shape", [(3, 5), (7, 65), (2, 3, 17), (4, 3, 5, 6), (1, 40), (129, 1)], ids=str)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, other: str, shape: tuple[int, ...]) -> None:
    """The values do not depend on where they lie; the output lies as torch's does."""
    x, g = randn(*shape), randn(*shape, seed=1)
    lying, grad = LAYOUTS[layout](x), LAYOUTS[other](g)
    mine = ops.activation.activation(lying, "silu", [], backend="cpu")
    assert torch.equal(mine, ops.activation.activation(x, "silu", [], backend="cpu"))
    assert mine.stride() == torch.empty_like(lying).stride()
    mine = ops.activation.activation_backward(grad, lying, "silu", [], backend="cpu")
    assert torch.equal(mine, ops.activation.activation_backward(g, x, "silu", [], backend="cpu"))


def test_expanded_and_scalar() -> None:
    row, column = randn(1, 33), randn(9, 1)
    for x in (row.expand(9, 33), column.expand(9, 33), randn(1)[0], randn(1).expand(77)):
        check(call("tanh"), [x])


def test_large_tensors_are_shared_by_threads_with_the_same_bits() -> None:
    x, g = randn(301, 1003), randn(301, 1003, seed=1)
    for name in PARAMETERS:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((ops.activation.activation(x, name, NUMBERS.get(name, []), backend="cpu"),
                          ops.activation.activation_backward(g, x, name, NUMBERS.get(name, []), backend="cpu")))
        for y, b in found[1:]:
            assert torch.equal(y, found[0][0])
            assert torch.equal(b, found[0][1])


# PReLU and GLU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33,), (5, 7), (2, 65), (3, 4, 33), (2, 3, 5, 7), (0, 3, 4)], ids=str)
def test_prelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    channels = shape[1] if len(shape) > 1 else 1

    def scale(inputs: Any, grad: Tensor | None) -> tuple[Tensor, ...]:
        x, w = (t.detach().double().abs() for t in inputs)
        if grad is None:
            return (x * 0,)
        terms = grad.double().abs() * x
        dims = [d for d in range(x.dim()) if d != 1 or len(w) == 1]
        return x * 0, (terms.sum(dims) if dims else terms).reshape(w.shape)

    for weights in {1, channels}:
        for lay in LAYOUTS if len(shape) > 1 and shape[0] else ("contiguous",):
            x = LAYOUTS[lay](randn(*shape, dtype=dtype)) if len(shape) > 1 else randn(*shape, dtype=dtype)
            weight = randn(weights, dtype=dtype, seed=2).requires_grad_()
            check(lambda space, x, w: space.prelu(x, w), [x.requires_grad_(), weight], scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(34,), (6, 8), (2, 130), (4, 6, 34), (2, 4, 6, 8), (0, 4)], ids=str)
def test_glu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for dim in range(len(shape)):
        for lay in LAYOUTS if len(shape) > 1 and shape[0] else ("contiguous",):
            x = LAYOUTS[lay](randn(*shape, dtype=dtype)) if len(shape) > 1 else randn(*shape, dtype=dtype)
            check(lambda space, x, d=dim: space.glu(x, d), [x.requires_grad_()])


# Dropout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (65,), (40, 1001), (3, 5, 7), (2, 3, 5, 6)], ids=str)
def test_dropout_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for seed in (0, 1, 12345678901234567, -5):
        for p in (0.0, 0.1, 0.5, 0.999, 1.0):
            for lay in LAYOUTS if len(shape) > 1 else ("contiguous",):
                x = LAYOUTS[lay](randn(*shape, dtype=dtype)) if len(shape) > 1 else randn(*shape, dtype=dtype)
                mine = ops.activation.dropout(x, p, seed, backend="cpu")
                torch.testing.assert_close(mine, reference.dropout(x, p, seed), rtol=torch.finfo(dtype).eps, atol=0)
                assert torch.equal(mine == 0, reference.dropout(x, p, seed) == 0)


def test_dropout_keeps_the_share_that_it_should() -> None:
    ones = torch.ones(1_000_000)
    for p in (0.1, 0.5, 0.9):
        kept = [ops.activation.dropout(ones, p, seed, backend="cpu") != 0 for seed in (1, 2)]
        for k in kept:
            share, sigma = float(k.double().mean()), (p * (1 - p) / k.numel()) ** 0.5
            assert abs(share - (1 - p)) < 5 * sigma
        both = float((kept[0] & kept[1]).double().mean())  # two seeds, and two neighbours, know nothing of each other
        near = float((kept[0][1:] & kept[0][:-1]).double().mean())
        for value in (both, near):
            assert abs(value - (1 - p) ** 2) < 5e-3


def test_dropout_is_the_same_for_any_number_of_threads_and_in_the_backward() -> None:
    x = randn(257, 1003)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ours.dropout(x, 0.3, seed=7, backend="cpu"))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    leaf = x.clone().requires_grad_()
    ours.dropout(leaf, 0.3, seed=7, backend="cpu").backward(torch.ones_like(x))
    assert leaf.grad is not None
    assert torch.equal(leaf.grad != 0, found[0] != 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [1, 3])
def test_dropout_counts_past_two_to_the_32(step: int, dtype: torch.dtype) -> None:
    """Rows of a tensor too large to make: the kernel is told that they start near multiples of 2^32."""
    n, start, seed = 777, 2**33 - 1000, 99
    x, out = torch.ones(2, n, dtype=dtype), torch.full((2, n), float("nan"), dtype=dtype)
    kernel = kernels._kernel("dropout", dtype)
    high = mix((0 + 0x9E3779B9) & 0xFFFFFFFF)
    kernels._run(kernel, [(2, [n, n]), (n, [1, 1])], (x,), (out,), (0, start, step), (seed, high, 2**31), (2.0, 0.0))
    for row in range(2):
        for k in range(n):
            i = row * start + k * step
            bits = mix(mix(((i & 0xFFFFFFFF) + mix(seed ^ mix(i >> 32))) & 0xFFFFFFFF) ^ high)
            assert float(out[row, k]) == (2.0 if bits >= 2**31 else 0.0), (row, k)
