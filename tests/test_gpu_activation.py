"""Activations, PReLU, GLU and dropout on the GPU, or in Triton's interpreter, against float64, beside torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")

import triton
import triton.language as tl

from fastnn.kernels.cpu.engine.activation_codes import PARAMETERS
from fastnn.kernels.gpu import activation as kernels
from fastnn.kernels.gpu.engine import functions
from fastnn.kernels.gpu.engine.launch import signed
from fastnn.kernels.layout import mix
from fastnn.kernels.reference import activation as reference
from fastnn.ops import activation as ops
from gpu import DEVICE, DTYPES, HERE, _mend_interpreter, check, run
from rule import LAYOUTS, randn
from test_activation import NUMBERS, SPECIAL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of NaN and Inf, where it is the interpreter
]


def exact(x: Tensor, name: str, params: Any) -> Tensor:
    """Better than the reference's formulas in float64, where those cancel for negative numbers."""
    if name == "gelu":
        return x * torch.special.erfc(x * -(0.5**0.5)) / 2
    if name == "gelu_tanh":
        return x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return reference.activation(x, name, params)


@triton.jit
def exponentials(y: Any, x: Any, n: tl.constexpr) -> None:
    i = tl.arange(0, n)
    tl.store(y + i, functions.exp(tl.load(x + i)))


def test_exp_to_the_end_of_its_range() -> None:
    if not HERE:
        _mend_interpreter()
    inf = float("inf")
    x = torch.cat([torch.linspace(-87.3, 88.72, 1016), torch.tensor([88.73, 95.0, 99.9, 101.0, -104.0, inf, -inf, float("nan")])])
    y = torch.empty_like(x, device=DEVICE)
    exponentials[(1,)](y, x.to(DEVICE), 1024)
    torch.testing.assert_close(y.cpu(), x.double().exp().float(), rtol=3e-7, atol=1e-38, equal_nan=True)


def lies(layout: str, t: Tensor) -> Tensor:
    return LAYOUTS[layout](t) if t.dim() > 1 else t


@pytest.mark.parametrize("name", PARAMETERS)
def test_activation(name: str) -> None:
    """The gradient is a sum, Φ(x) + x φ(x) say, and as exact as its largest term, at most 1 + |x|."""
    params = NUMBERS.get(name, [])
    for dtype in DTYPES:
        x = torch.cat([randn(1500, dtype=dtype, scale=s) for s in (3.0, 0.01, 30.0)])
        g = randn(4500, dtype=dtype, seed=1)
        check(ops.activation, x, name, params, exact=exact)
        check(ops.activation_backward, g, x, name, params, scale=lambda g, x, *_: [g.abs() * (1 + x.abs())])


@pytest.mark.parametrize("name", PARAMETERS)
def test_special_values(name: str) -> None:
    x = torch.tensor(SPECIAL)
    params = NUMBERS.get(name, [])
    mine, theirs = run(ops.activation, x, name, params), ops.activation(x, name, params, backend="torch")
    if name.startswith("gelu"):  # the limits
        theirs[x == float("inf")], theirs[x == -float("inf")] = float("inf"), 0.0
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (5, 67), (2, 3, 4, 5), (129, 1)], ids=str)
def test_layouts(shape: tuple[int, ...]) -> None:
    """The values do not depend on where they lie; an input is walked in place or copied."""
    x, g = randn(*shape), randn(*shape, seed=1)
    plain, slope = run(ops.activation, x, "silu", []), run(ops.activation_backward, g, x, "silu", [])
    for layout in LAYOUTS:
        for other in LAYOUTS if layout == "rotated" else ("contiguous",):
            assert torch.equal(run(ops.activation, lies(layout, x), "silu", []), plain)
            assert torch.equal(run(ops.activation_backward, lies(other, g), lies(layout, x), "silu", []), slope)
    row = x[:1].expand(3, *shape[1:])
    assert torch.equal(run(ops.activation, row, "silu", []), run(ops.activation, row.contiguous(), "silu", []))


@pytest.mark.parametrize("shape", [(33,), (5, 7), (2, 3, 5, 7), (2, 2051)], ids=str)
def test_prelu(shape: tuple[int, ...]) -> None:
    def scale(g: Tensor, x: Tensor, w: Tensor) -> list[Any]:
        dims = [d for d in range(x.dim()) if d != 1 or len(w) == 1]
        return [None, (g * x).abs().sum(dims).reshape(w.shape)]

    for dtype in (torch.float32, torch.bfloat16):
        for weights in {1, shape[1] if len(shape) > 1 else 1}:
            for layout in ("contiguous", "rotated", "stepped"):
                x, w = lies(layout, randn(*shape, dtype=dtype)), randn(weights, dtype=dtype, seed=2)
                check(ops.prelu, x, w)
                check(ops.prelu_backward, randn(*shape, dtype=dtype, seed=3), x, w, scale=scale)


@pytest.mark.parametrize("shape", [(34,), (6, 8), (2, 4, 6, 8), (2, 4098)], ids=str)
def test_glu(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float16):
        for dim in {0, len(shape) - 1}:
            for layout in ("contiguous", "rotated", "stepped"):
                x = lies(layout, randn(*shape, dtype=dtype))
                half = x.narrow(dim, 0, shape[dim] // 2)
                check(ops.glu, x, dim)
                check(ops.glu_backward, randn(*half.shape, dtype=dtype, seed=1), x, dim)


@pytest.mark.parametrize("shape", [(65,), (40, 101), (2, 3, 5, 6)], ids=str)
def test_dropout_drops_what_the_cpu_drops(shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    for seed, p in ((0, 0.3), (12345678901234567, 0.0), (12345678901234567, 0.999), (-5, 0.3), (-5, 1.0)):
        assert torch.equal(check(ops.dropout, x, p, seed), ops.dropout(x, p, seed, backend="cpu"))
    for layout in LAYOUTS:
        y = lies(layout, x)
        assert torch.equal(run(ops.dropout, y.to(DEVICE), 0.3, 7).cpu(), ops.dropout(y, 0.3, 7, backend="cpu"))


def test_random_bits_go_on_past_two_to_the_32() -> None:
    """Rows of a tensor too large to make: the kernel is told that they start near a multiple of 2^32."""
    n, start, seed = 300, 2**33 - 100, 99
    x, out = torch.ones(n, device=DEVICE), torch.full((n,), float("nan"), device=DEVICE)
    high = mix(0x9E3779B9)
    keys = [signed(k) for k in (seed, high, 2**31)]
    rows = (1, [0, 0]), (1, [0, 0]), (n, [1, 1])
    kernels._run("dropout", None, list(rows), (out,), (x,), (0, 0, 3), (2.0, 0.0), keys)
    kernels._run("dropout", None, [(2, [0, 0]), (n, [1, 1])], (out,), (x,), (0, start, 3), (2.0, 0.0), keys)  # row 1 last
    for k in range(n):
        i = start + 3 * k
        bits = mix(mix(((i & 0xFFFFFFFF) + mix(seed ^ mix(i >> 32))) & 0xFFFFFFFF) ^ high)
        assert float(out[k]) == (2.0 if bits >= 2**31 else 0.0), k


def test_float64_is_refused_with_a_reason() -> None:
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16, not float64"):
        run(ops.activation, torch.ones(3, dtype=torch.float64, device=DEVICE), "relu", [])
