"""The numerics report: its yardsticks are right, our kernels pass it, and every kind of broken kernel turns it red."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnn import _checks, _numerics, _warmup, backends, verify
from fastnn.__main__ import main

# The yardsticks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", _checks.DTYPES.values(), ids=verify.DTYPES)
def test_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    tiny, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    values = torch.tensor([0.0, tiny / 2, tiny, 1.0, 1.5, 3.0, 1000.0, largest], dtype=torch.float64).to(dtype)
    # Below the largest number, neighbours lie as far apart downwards as the ulp says, except at powers of two.
    bits = values.view(torch.int64 if dtype.itemsize == 8 else torch.int32 if dtype.itemsize == 4 else torch.int16)
    next_up = (bits[:-1] + 1).view(dtype).double()
    assert torch.equal(next_up - values[:-1].double(), _numerics.ulp(values[:-1].double(), dtype))
    assert float(_numerics.ulp(values[-1:].double(), dtype)) == pytest.approx(
        largest * torch.finfo(dtype).eps / 2, rel=1e-2
    )


def test_error_counts_ulps_and_their_mean_square() -> None:
    reference = torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64)
    result = torch.tensor([1.0, 2.0 + 2 * 2**-22, -4.0 + 2**-21], dtype=torch.float32)
    found = _numerics.error(result, reference)
    assert found.worst == 2.0
    assert found.rms == pytest.approx(math.sqrt((0 + 4 + 1) / 3))
    assert found.specials == 0
    # Counted at a magnitude that is four times larger, the same error is a quarter.
    assert _numerics.error(result, reference, scale=4 * reference.abs()).worst == 0.5


def test_sums_of_16_bit_numbers_are_counted_in_float32_going_forward() -> None:
    """Near a cancellation bfloat16 results are as good as float32 sums: a looser scale would hide lost terms."""
    reference, scale = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([64.0, 64.0], dtype=torch.float64)
    result = torch.tensor([1.0 + 2**-7, 2**-18], dtype=torch.bfloat16)
    forward = _numerics.error(result, reference, scale, forward=True)
    assert forward.worst == 1.0
    assert forward.rms == pytest.approx(math.sqrt((1 + 2.0 ** (2 * (-18 - 6 + 16 + 7))) / 2))
    assert _numerics.error(result, reference, scale).worst == 2.0**-6


@pytest.mark.parametrize(
    ("result", "torchs", "lost"),
    [
        ([math.nan, math.inf, -math.inf], [math.nan, math.inf, -math.inf], 0),
        ([0.0, math.inf, -math.inf], [math.nan, math.inf, -math.inf], 1),
        ([math.nan, -math.inf, 1e38], [math.nan, math.inf, -math.inf], 2),
        ([math.nan, math.inf, math.nan], [math.nan, math.inf, math.nan], 0),  # as torch has it, though not as float64
    ],
)
def test_error_finds_lost_special_values(result: list[float], torchs: list[float], lost: int) -> None:
    reference = torch.tensor([math.nan, math.inf, -1e200], dtype=torch.float64)
    assert _numerics.error(torch.tensor(result), reference, yardstick=torch.tensor(torchs)).specials == lost


def test_the_rule_allows_twice_torchs_error_and_a_floor() -> None:
    def of(worst: float, specials: int = 0) -> _numerics.Error:
        return _numerics.Error(worst, 0.0, 1, specials)

    assert of(14.0).within(of(5.0), torch.float32)
    assert not of(14.1).within(of(5.0), torch.float32)
    assert not of(12.1).within(of(5.0), torch.bfloat16)
    assert not of(1.0, specials=1).within(of(5.0), torch.float32)
    assert not of(math.nan).within(of(5.0), torch.float32)


@pytest.mark.parametrize("name", _checks.POINTWISE)
def test_the_exact_formulas_are_the_functions(name: str) -> None:
    """Where float64 has no cancellation, mpmath and torch agree, in the values and in the slopes."""
    f = _checks.POINTWISE[name]
    x = torch.cat([torch.linspace(-2.9, -0.1, 9), torch.linspace(0.1, 9.7, 23)]).double().requires_grad_()
    y = f.theirs(_numerics.TORCH, x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    nothing = torch.full_like(x.detach(), math.nan)
    torch.testing.assert_close(verify._exact(f.exact, x.detach(), False, nothing), y.detach(), rtol=1e-12, atol=0)
    rtol = 2e-7 if name == "hardsigmoid" else 1e-6  # torch's slope is 1/6 in float32; 1 - tanh² cancels
    torch.testing.assert_close(verify._exact(f.exact, x.detach(), True, nothing), slope, rtol=rtol, atol=1e-14)


def test_the_careful_products_are_products() -> None:
    a, b, c = (torch.randn(s, dtype=torch.float64) for s in ((3, 1, 5, 7), (2, 7, 4), (5, 4)))
    careful, plain = _numerics.CAREFUL, _numerics.TORCH
    for left, right in ((a, b), (a[0, 0, 0], b), (a, b[0, :, 0]), (a[0, 0, 0], b[0, :, 0])):
        torch.testing.assert_close(careful.matmul(left, right), torch.matmul(left, right))
    addmm = {"beta": 0.5, "alpha": 3.0}
    torch.testing.assert_close(careful.addmm(c, a[0, 0], b[0], **addmm), plain.addmm(c, a[0, 0], b[0], **addmm))
    torch.testing.assert_close(careful.linear(a, b[0].t(), c[0]), plain.linear(a, b[0].t(), c[0]))


# Our kernels ----------------------------------------------------------------------------------------------------------

_OTHERS = [pytest.param(d, marks=pytest.mark.slow) for d in ("float64", "bfloat16", "float16")]


@pytest.mark.parametrize("dtype", ["float32", *_OTHERS])
@pytest.mark.parametrize("family", _checks.CHECKS)
def test_every_operator_is_right(family: str, dtype: str) -> None:
    lines = list(verify.run(verify.checks([family]), verify.dtypes(dtype)))
    assert [line for line in lines if not line.good] == []
    assert {"forward", "grad of input"} <= {line.what for line in lines}
    # A report about torch's own kernels would be no report about ours.
    ours = sum("cpu" in line.served_by for line in lines)
    assert ours >= 0.9 * len(lines), [f"{line.name}, {line.what}: {line.served_by}" for line in lines]


def test_a_check_covers_every_operator() -> None:
    """Each operator of each family has a line: a new one cannot be forgotten."""
    from fastnn.ops import _operator

    operators = {
        op.name
        for family in _checks.CHECKS
        for op in vars(importlib.import_module(f"fastnn.ops.{family}")).values()
        if isinstance(op, _operator.Operator)
    }
    with backends.backend("reference"), backends.trace() as calls:
        for check in verify.checks():
            _warmup.call(check, torch.float32)
    assert operators - {call.op for call in calls} == set()


# Broken kernels -------------------------------------------------------------------------------------------------------


def _damage(monkeypatch: pytest.MonkeyPatch, family: str, op: str, harm: Callable[[Tensor, int], None]) -> None:
    """Put a kernel in the registry that does harm to the right result; harm is told how often it was called before."""
    plain = getattr(importlib.import_module(f"fastnn.kernels.reference.{family}"), op)
    called = iter(range(1 << 30))

    def kernel(out: Any, *args: Any) -> None:
        with torch.no_grad():
            result = plain(*args)
        for target, value in zip(out, result) if isinstance(out, tuple) else [(out, result)]:
            target.copy_(value)
        harm(out[0] if isinstance(out, tuple) else out, next(called))

    monkeypatch.setitem(backends.tables["cpu"], op, (kernel, lambda op, *args: None))


def _red(*names: str) -> list[verify.Line]:
    chosen = [check for check in verify.checks() if check.name in names]
    assert len(chosen) == len(names)
    return [line for line in verify.run(chosen, [torch.float32]) if not line.good]


def test_an_unharmed_kernel_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests below put in place of a kernel is right until it is harmed."""
    for family, op in (("matmul", "matmul"), ("activation", "activation"), ("softmax", "softmax")):
        _damage(monkeypatch, family, op, lambda out, n: None)
    assert _red("matmul 67×131×93", "gelu", "gelu, special values", "softmax 5×7×11, dim 1") == []


def _forget_last(out: Tensor, n: int) -> None:
    out.view(-1)[-1] = 0.0


def _imprecise(out: Tensor, n: int) -> None:
    out.mul_(1 + 1e-5)


def _restless(out: Tensor, n: int) -> None:
    out.view(-1)[0] *= 1 + n * 2**-23


def _lose_specials(out: Tensor, n: int) -> None:
    out.nan_to_num_()


@pytest.mark.parametrize("harm", [_forget_last, _imprecise, _restless])
@pytest.mark.parametrize(
    ("family", "op", "check"),
    [("matmul", "matmul", "matmul 67×131×93"), ("activation", "activation", "gelu"),
     ("activation", "activation_backward", "silu"), ("softmax", "softmax", "softmax 5×7×11, dim 1"),
     ("softmax", "cross_entropy", "cross_entropy, none"), ("softmax", "cross_entropy_backward", "cross_entropy, mean")],
)  # fmt: skip
def test_a_broken_kernel_turns_red(
    monkeypatch: pytest.MonkeyPatch, family: str, op: str, check: str, harm: Callable[[Tensor, int], None]
) -> None:
    _damage(monkeypatch, family, op, harm)
    assert _red(check) != []


@pytest.mark.parametrize(
    ("family", "op", "check"),
    [("matmul", "matmul", "matmul, special values"), ("activation", "activation", "tanh, special values"),
     ("softmax", "log_softmax", "log_softmax, special values")],
)  # fmt: skip
def test_lost_special_values_turn_red(monkeypatch: pytest.MonkeyPatch, family: str, op: str, check: str) -> None:
    _damage(monkeypatch, family, op, _lose_specials)
    assert "RED: special values" in {line.verdict for line in _red(check)}


def test_a_dropped_term_turns_red_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 131 products forgotten: the smallest of the mistakes that a kernel with tiles makes."""

    def kernel(out: Tensor, a: Tensor, b: Tensor) -> None:
        out.copy_((a[..., :-1].double() @ b[:-1].double()).to(out.dtype))

    monkeypatch.setitem(backends.tables["cpu"], "matmul", (kernel, lambda op, *args: None))
    chosen = [check for check in verify.checks(["matmul"]) if check.name == "matmul 67×131×93"]
    for dtype in _checks.DTYPES.values():
        lines = list(verify.run(chosen, [dtype]))
        assert not next(line for line in lines if line.what == "forward").good, dtype


def test_a_kernel_that_raises_is_a_red_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(out: Tensor, *args: Any) -> None:
        raise RuntimeError("the tile is on fire\nand more")

    monkeypatch.setitem(backends.tables["cpu"], "softmax", (kernel, lambda op, *args: None))
    assert [line.verdict for line in _red("softmax 5×7×11, dim 1")] == ["RED: RuntimeError: the tile is on fire"] * 2


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_says_what_is_red_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", "softmax", "--dtype", "float32", "--failures"]
    assert main(arguments) == 0
    quiet = capsys.readouterr().out
    assert " 0 red" in quiet
    assert "softmax 37×1003" not in quiet
    _damage(monkeypatch, "softmax", "softmax", _imprecise)
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "RED: error" in out
    assert "softmax 37×1003, dim -1" in out
    assert "log_softmax 37×1003" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nonsense"], "unknown family 'nonsense'; there are: matmul, activation, softmax"),
     (["--dtype", "int8"], "dtype is 'int8'; allowed: float32, float64, bfloat16, float16"),
     (["--backend", "quantum"], "'quantum'")],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err
