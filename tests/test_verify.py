"""The numerics report: its yardsticks are right, our kernels pass it, and every kind of broken kernel turns it red."""

import importlib
import json
import math
import re
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnn import _checks, _numerics, _verify_page, _warmup, backends, verify
from fastnn.__main__ import main
from fastnn.kernels.reference import activation as plain

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


@pytest.mark.parametrize(
    ("result", "torchs", "scale", "lost"),
    [
        ([-0.0, 0.0, 0.0], None, None, 0),
        ([0.0, 0.0, -0.0], None, None, 1),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], None, 0),  # as torch has it
        ([0.0, 0.0, 0.0], [-0.0, 0.0, 0.0], None, 1),
        ([0.0, 0.0, 0.0], None, [1.0, 0.0, 0.0], 0),  # a sum that cancels
        ([0.0, math.nan, 0.0], None, None, 2),
    ],
)
def test_error_finds_zeros_that_lost_their_sign(
    result: list[float], torchs: list[float] | None, scale: list[float] | None, lost: int
) -> None:
    reference = torch.tensor([-0.0, 0.0, 0.0], dtype=torch.float64)
    size = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    other = None if torchs is None else torch.tensor(torchs)
    assert _numerics.error(torch.tensor(result), reference, size, other, forward=True).specials == lost


def test_the_rule_allows_twice_torchs_error_and_a_floor() -> None:
    def of(worst: float, specials: int = 0) -> _numerics.Error:
        return _numerics.Error(worst, 0.0, 1, specials)

    assert of(14.0).within(of(5.0), torch.float32)
    assert not of(14.1).within(of(5.0), torch.float32)
    assert not of(12.1).within(of(5.0), torch.bfloat16)
    assert not of(1.0, specials=1).within(of(5.0), torch.float32)
    assert not of(math.nan).within(of(5.0), torch.float32)


@pytest.mark.parametrize("name", _checks.activation.POINTWISE)
def test_the_exact_formulas_are_the_functions(name: str) -> None:
    """Where float64 has no cancellation, mpmath and torch agree, in the values and in the slopes."""
    f = _checks.activation.POINTWISE[name]
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


@pytest.mark.parametrize("dtype", list(_checks.DTYPES))
@pytest.mark.parametrize("family", _checks.CHECKS)
def test_every_operator_is_right(family: str, dtype: str) -> None:
    lines = list(verify.run(verify.checks([family]), verify.dtypes(dtype)))
    assert [(line.name, line.dtype, line.what) for line in lines if not line.good] == []
    whats = {line.what for line in lines}
    assert "forward" in whats
    assert any(what.startswith("grad of ") for what in whats)
    # A report about torch's own kernels would be no report about ours.
    ours = sum("cpu" in line.served_by for line in lines)
    assert ours >= 0.9 * len(lines), [f"{line.name}, {line.what}: {line.served_by}" for line in lines]


@pytest.mark.parametrize(
    ("backend", "dtype", "families"), [("torch", "bfloat16", ["matmul", "norm"]), ("reference", "float32", [])]
)
def test_torch_and_the_plain_maths_pass_too(backend: str, dtype: str, families: list[str]) -> None:
    """A rule that torch itself breaks would be no rule; and the plain maths is what every kernel must equal."""
    assert [line for line in verify.run(verify.checks(families), verify.dtypes(dtype), backend) if not line.good] == []


def test_every_family_has_special_and_adversarial_data() -> None:
    every = [check.name for check in verify.checks()]

    def names(start: str) -> set[str]:
        return {name.split(", ", 1)[1] for name in every if name.startswith(start) and ", " in name}

    assert {"special values", "large means", "cancellation", "one-hot rows", "all equal", "subnormal"} <= names("matmul,")
    for op in ("softmax", "log_softmax", "cross_entropy"):
        assert {"special values", "large means", "one-hot rows", "all equal", "subnormal", "long rows"} <= names(f"{op},")
    for op in ("layer_norm", "rms_norm"):
        assert {"special values", "large means", "one-hot rows", "subnormal", "long rows"} <= names(f"{op},")
    assert {"special values", "large means", "cancellation", "one-hot rows", "all equal", "subnormal"} <= names("attention,")
    assert {"special values", "large means", "cancellation", "one-hot rows", "subnormal"} <= names("conv2d,")
    for op in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        assert {"special values", "one-hot inputs", "subnormal inputs"} <= names(f"{op},"), op
    assert {"special values", "special values of keys", "special values of values"} <= names("attention,")
    for start in (
        *_checks.activation.POINTWISE, "prelu", "glu", "dropout", "linear + bias", "addmm", "bmm", "nll_loss", "mse_loss",
        "linear_cross_entropy", "qrnn", "batch_norm", "batch_norm, known moments", "group_norm", "instance_norm", "embedding",
        "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "conv2d depthwise",
        *(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)),
    ):  # fmt: skip
        assert any(name.startswith(f"{start}, special values") for name in every), start


def _uncovered(chosen: Iterable[verify.Check]) -> set[str]:
    """The operators of all families that the CPU has a kernel for and that none of the checks calls, forward or backward."""
    from fastnn.ops import _operator

    operators = {
        op.name
        for family in _checks.CHECKS
        for op in vars(importlib.import_module(f"fastnn.ops.{family}")).values()
        if isinstance(op, _operator.Operator) and backends.load("cpu", op)[0] is not None
    }
    assert len(operators) > 40
    with backends.backend("reference"), backends.trace() as calls:
        for check in chosen:
            _warmup.call(check, torch.float32)
    return operators - {call.op for call in calls}


def test_a_check_covers_every_operator() -> None:
    """A new one cannot be forgotten."""
    assert _uncovered(verify.checks()) == set()


def test_special_values_cover_every_operator() -> None:
    assert _uncovered(check for check in verify.checks() if "special values" in check.name) == set()


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

    monkeypatch.setitem(backends.tables["cpu"], op, (kernel, None, None))


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


def _lose_signs(out: Tensor, n: int) -> None:
    out.add_(0.0)  # −0 + 0 is +0


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
     ("softmax", "log_softmax", "log_softmax, special values"), ("conv", "conv", "conv1d, special values"),
     ("conv", "conv", "conv_transpose2d, special values"), ("pool", "avg_pool", "avg_pool2d, special values"),
     ("norm", "batch_norm", "batch_norm, special values"), ("norm", "group_norm", "group_norm, special values"),
     ("attention", "attention", "attention, special values of keys"),
     ("softmax", "linear_cross_entropy", "linear_cross_entropy, special values, none")],
)  # fmt: skip
def test_lost_special_values_turn_red(monkeypatch: pytest.MonkeyPatch, family: str, op: str, check: str) -> None:
    _damage(monkeypatch, family, op, _lose_specials)
    assert "RED: special values" in {line.verdict for line in _red(check)}


@pytest.mark.parametrize("name", ["tanh", "relu6"])
def test_zeros_that_lose_their_sign_turn_red(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _damage(monkeypatch, "activation", "activation", _lose_signs)
    assert "RED: special values" in {line.verdict for line in _red(f"{name}, special values")}


def test_a_dropped_term_turns_red_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 131 products forgotten: the smallest of the mistakes that a kernel with tiles makes."""

    def kernel(out: Tensor, a: Tensor, b: Tensor) -> None:
        out.copy_((a[..., :-1].double() @ b[:-1].double()).to(out.dtype))

    monkeypatch.setitem(backends.tables["cpu"], "matmul", (kernel, None, None))
    chosen = [check for check in verify.checks(["matmul"]) if check.name == "matmul 67×131×93"]
    for dtype in _checks.DTYPES.values():
        lines = list(verify.run(chosen, [dtype]))
        assert not next(line for line in lines if line.what == "forward").good, dtype


def test_a_kernel_that_raises_is_a_red_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(out: Tensor, *args: Any) -> None:
        raise RuntimeError("the tile is on fire\nand more")

    monkeypatch.setitem(backends.tables["cpu"], "softmax", (kernel, None, None))
    assert [line.verdict for line in _red("softmax 5×7×11, dim 1")] == ["RED: RuntimeError: the tile is on fire"] * 2


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).float()


def _flush(t: Tensor) -> Tensor:
    return torch.where(t.abs() < torch.finfo(t.dtype).tiny, 0.0, t)


def _strassen(a: Tensor, b: Tensor) -> Tensor:
    """Seven products for eight, of sums: terms that are no part of a result leave their rounding in it."""
    rows, columns = a.shape[0], b.shape[1]
    a, b = (torch.nn.functional.pad(t, (0, t.shape[1] % 2, 0, t.shape[0] % 2)) for t in (a, b))
    (a11, a12), (a21, a22) = (half.chunk(2, 1) for half in a.chunk(2))
    (b11, b12), (b21, b22) = (half.chunk(2, 1) for half in b.chunk(2))
    p, q, r = (a11 + a22) @ (b11 + b22), (a21 + a22) @ b11, a11 @ (b12 - b22)
    s, t, u, v = a22 @ (b21 - b11), (a11 + a12) @ b22, (a21 - a11) @ (b11 + b12), (a12 - a22) @ (b21 + b22)
    return torch.cat([torch.cat([p + s - t + v, r + t], 1), torch.cat([q + s, p - q + r + u], 1)])[:rows, :columns]


def _one_pass(x: Tensor, dims: list[int]) -> Tensor:
    """Normalised by a variance that is the difference of two means"""
    mean = x.mean(dims, keepdim=True)
    return (x - mean) * torch.rsqrt(x.square().mean(dims, keepdim=True) - mean.square() + 1e-5)


#: Mistakes that normal numbers hardly show: the op, the check that does, and the mistake.
CARELESS: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    "the maximum not subtracted": (
        "softmax", "softmax, large means", lambda x, dim: torch.exp(x - torch.logsumexp(x, dim, keepdim=True))),
    "the logarithm of what has underflowed": (
        "log_softmax", "log_softmax, huge and tiny in turn", lambda x, dim: torch.log(torch.softmax(x, dim))),
    "the square multiplied out": (
        "mse_loss", "mse_loss, cancellation", lambda x, t, reduction: (x * x - 2 * x * t + t * t).mean()),
    "subnormal results flushed": ("matmul", "matmul, subnormal", lambda a, b: _flush(_exact_product(a, b))),
    "zeros skipped": ("matmul", "matmul, special values", lambda a, b: _exact_product(a, b.nan_to_num()).nan_to_num()),
    "a long sum in few digits": (
        "matmul", "matmul, long sums",
        lambda a, b: (a.unsqueeze(-1) * b).bfloat16().float().sum(-2)),
    "products of sums": ("matmul", "matmul, one-hot rows", _strassen),
    "small probabilities lost beside a large one": (
        "softmax", "softmax, one-hot rows", lambda x, dim: (torch.softmax(x, dim) + 1).sub(1)),
    "the logarithm of a probability, kept from 0": (
        "cross_entropy", "cross_entropy, one-hot rows",
        lambda x, target, *_: -torch.log(torch.softmax(x, 1) + 1e-12).gather(1, target.unsqueeze(1)).squeeze(1)),
    "batch_norm's variance in one pass": (
        "batch_norm", "batch_norm, large means",
        lambda x, weight, bias, *_: _one_pass(x, [0, 2, 3]) * weight[:, None, None] + bias[:, None, None]),
    "layer_norm's variance in one pass": (
        "layer_norm", "layer_norm, large means", lambda x, weight, bias, *_: _one_pass(x, [1]) * weight + bias),
}  # fmt: skip


@pytest.mark.parametrize(("op", "name", "mistake"), CARELESS.values(), ids=CARELESS)
def test_adversarial_data_finds_careless_kernels(
    monkeypatch: pytest.MonkeyPatch, op: str, name: str, mistake: Callable[..., Tensor]
) -> None:
    family = next(check.family for check in verify.checks() if check.name == name)
    right = getattr(importlib.import_module(f"fastnn.kernels.reference.{family}"), op)

    def kernel(out: Any, *args: Any) -> None:
        with torch.no_grad():
            if isinstance(out, tuple):  # what the backward needs besides the result is right
                for target, value in zip(out, right(*args), strict=True):
                    target.copy_(value)
            (out[0] if isinstance(out, tuple) else out).copy_(mistake(*args))

    monkeypatch.setitem(backends.tables["cpu"], op, (kernel, None, None))
    assert "forward" in {line.what for line in _red(name) if line.verdict in ("RED: error", "RED: special values")}


def _biased(out: Tensor, x: Tensor, p: float, seed: int) -> None:
    out.copy_(plain.dropout(x, p, seed) * (torch.arange(x.numel()).view(x.shape) % 10 != 0))


def _unscaled(out: Tensor, x: Tensor, p: float, seed: int) -> None:
    out.copy_(plain.dropout(x, p, seed) * (1 - p))


_calls = iter(range(1 << 30))


def _seedless(out: Tensor, x: Tensor, p: float, seed: int) -> None:
    out.copy_(plain.dropout(x, p, next(_calls)))


def _always_the_same(out: Tensor, x: Tensor, p: float, seed: int) -> None:
    out.copy_(plain.dropout(x, p, 7))


def _another_mask_backward(out: Tensor, x: Tensor, p: float, seed: int) -> None:
    out.copy_(plain.dropout(x, p, seed + int(bool((x == x.flatten()[0]).all()))))  # the gradient of a sum is all ones


@pytest.mark.parametrize(
    ("kernel", "says"),
    [(_biased, "of the elements are kept instead of 0.5000"), (_unscaled, "RED: error"),
     (_seedless, "the same seed drops other elements"), (_always_the_same, "the next call drops the same elements"),
     (_another_mask_backward, "the backward drops other elements than the forward")],
)  # fmt: skip
def test_a_dropout_that_only_looks_random_turns_red(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., None], says: str
) -> None:
    """Each of them keeps about half and would pass for dropout."""
    monkeypatch.setitem(backends.tables["cpu"], "dropout", (kernel, None, None))
    verdicts = " | ".join(line.verdict for line in _red("dropout, statistics at p = 0.5"))
    assert says in verdicts


def _by_threads(out: Tensor, n: int) -> None:
    out.mul_(1 + torch.get_num_threads() * 2**-23)


def test_bits_that_depend_on_the_threads_are_stated_and_no_fault(
    monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    torch.set_num_threads(2)
    _damage(monkeypatch, "softmax", "softmax", _by_threads)
    checks = [check for check in verify.checks(["softmax"]) if "5×7×11" in check.name]
    lines = {(line.name.split()[0], line.what): line for line in verify.run(checks, [torch.float32])}
    assert [line.threads for line in lines.values()] == ["differ", "differ", "same", "same"]
    assert all(line.good for line in lines.values())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert {line.threads for line in verify.run(checks, [torch.float32])} == {""}


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


def _one_element(out: Tensor, n: int) -> None:
    out.view(-1)[out.abs().argmax()] *= 1.001


def _no_last_column(out: Tensor, n: int) -> None:
    out[..., -1] = 0.0


def _zero(out: Tensor, n: int) -> None:
    out.zero_()


@pytest.mark.parametrize("harm", [None, _one_element, _no_last_column, _zero, _restless])
@pytest.mark.parametrize(
    ("family", "op", "check"),
    [("matmul", "matmul", "matmul 67×131×93"), ("matmul", "linear", "linear + bias"),
     ("activation", "activation_backward", "silu"), ("activation", "dropout", "dropout"),
     ("softmax", "softmax_backward", "softmax 37×1003, dim -1"), ("softmax", "mse_loss_backward", "mse_loss, none")],
)  # fmt: skip
def test_a_broken_kernel_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, op: str, check: str,
    harm: Callable[[Tensor, int], None] | None,
) -> None:  # fmt: skip
    """And with an unharmed kernel in its place it does not."""
    chosen = [c for c in verify.checks() if c.name == check]
    assert len(chosen) == 1
    monkeypatch.setattr(verify, "checks", lambda families: chosen)
    _damage(monkeypatch, family, op, harm or (lambda out, n: None))
    page, records = tmp_path / "report.html", tmp_path / "report.json"
    status = main(["verify", family, "--dtype", "float32", "--html", str(page), "--json", str(records)])
    assert status == (0 if harm is None else 1)
    assert ("RED" in capsys.readouterr().out) == bool(status)
    assert ("<tr class=red>" in page.read_text("utf-8")) == bool(status)
    assert all(line["good"] for line in json.loads(records.read_text("utf-8"))["lines"]) == (not status)


class _Reader(HTMLParser):
    """Tags that are open, resources that a page asks for, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe") or any(name in ("src", "href") for name, _ in attrs):
            self.asked.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNN_CACHE_DIR", "")
    error = _numerics.Error
    lines = [
        verify.Line("softmax", "<b>&\"'", "float32", "forward", error(1.0, 1.0, 1), error(0.5, 1.0, 1), "cpu", threads="same"),
        verify.Line("softmax", "fine", "float32", "forward", error(0.5, 1.0, 1), error(1.0, 1.0, 1), "cpu", threads="differ"),
        verify.Line("matmul", "wrong", "float64", "grad of <x>", error(math.nan, 1.0, 1), error(1.0, 1.0, 1), "cpu"),
    ]
    page = _verify_page.page(lines, verify.RULE, verify.summary(lines), verify._HEAD, "python -m fastnn verify <script>")
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert (reader.open, reader.asked) == ([], [])
    assert not re.search(r"url\(|@import", page)
    for text in ("<b>&\"'", "grad of <x>", "verify <script>", verify.RULE, torch.__version__, "3 lines: 2 good, 1 red",
                 f"threads{torch.get_num_threads()}", "RED: error"):  # fmt: skip
        assert text in reader.text, text
    rows = re.findall(r"<tr class=(\w+)><td>(fine|wrong|&lt;b)", page)
    assert rows == [("red", "wrong"), ("red", "wrong"), ("worse", "&lt;b"), ("better", "fine")]
    records = json.loads(_verify_page.as_json(lines, verify.RULE, "verify"))["lines"]
    assert (records[2]["ours"]["max_ulp"], records[0]["theirs"]["max_ulp"]) == (None, 0.5)
    assert [record["threads"] for record in records] == ["same", "differ", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nonsense"], "unknown family 'nonsense'; there are: matmul, activation, softmax"),
     (["--dtype", "int8"], "dtype is 'int8'; allowed: float32, float64, bfloat16, float16"),
     (["--backend", "quantum"], "'quantum'"),
     (["--html", "/nowhere/at/all.html"], "/nowhere/at/all.html cannot be written: there is no folder /nowhere/at")],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err
