"""Softmax, log-softmax and the losses on the CPU against float64, beside torch."""

import ctypes
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnn
import fastnn.functional as ours
from fastnn import ops
from fastnn._numerics import CAREFUL, softmax_scale
from fastnn.kernels.cpu.softmax import KERNELS
from rule import DTYPES, LAYOUTS, check, far_apart, randn

F = torch.nn.functional
INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.usefixtures("poison", "threads")

# Softmax


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 1003, 4096, 4097, 9001])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_rows(name: str, length: int, dtype: torch.dtype) -> None:
    for spread in (1.0, 8.0):
        x = randn(3, length, dtype=dtype, scale=spread).requires_grad_()
        check(lambda space, x: getattr(space, name)(x, -1), [x], softmax_scale(name == "log_softmax"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [2, 15, 16, 17, 64, 65, 131])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_columns(name: str, inner: int, dtype: torch.dtype) -> None:
    for n in (1, 3, 65, 200):
        x = randn(2, n, inner, dtype=dtype, scale=2.0).requires_grad_()
        check(lambda space, x: getattr(space, name)(x, 1), [x], softmax_scale(name == "log_softmax", 1))


@pytest.mark.parametrize("shape", [(5,), (0, 4), (4, 0), (3, 7), (2, 3, 17), (3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, shape: tuple[int, ...]) -> None:
    """Any dimension of any strides has the values of its contiguous copy, and the output is contiguous."""
    x, g = randn(*shape), randn(*shape, seed=1)
    lying = LAYOUTS[layout](x) if len(shape) > 1 and x.numel() else x
    grad = LAYOUTS["rotated"](g) if len(shape) > 1 and x.numel() else g
    for name, dim in itertools.product(("softmax", "log_softmax"), range(-len(shape), len(shape))):
        op, back = getattr(ops.softmax, name), getattr(ops.softmax, f"{name}_backward")
        y = op(lying, dim, backend="cpu")
        assert y.is_contiguous()
        torch.testing.assert_close(y, getattr(torch, name)(x, dim), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(back(grad, y, dim, backend="cpu"), back(g, y, dim, backend="torch"), rtol=1e-5,
                                   atol=1e-6)


def test_scalar_and_expanded() -> None:
    for x, dim in [(randn(1)[0], 0), (randn(1, 33).expand(5, 33), 1), (randn(5, 1).expand(5, 33), 1),
                   (randn(1).expand(9), 0)]:
        torch.testing.assert_close(ours.softmax(x, dim, backend="cpu"), torch.softmax(x, dim))


@pytest.mark.parametrize("n", [3, 16, 70, 9000])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_special_rows(name: str, dim: int, n: int) -> None:
    x = randn(8, n)
    x[0] = -INF
    x[1, 0] = INF
    x[2, -1] = NAN
    x[3, 1:] = -INF
    x[4, : n // 2] = -INF
    x[5] = 3e38
    x[6, 0], x[6, 1] = 1e4, -1e4
    x[7, 0] = x[7, -1] = INF
    x = x if dim == 1 else x.t().contiguous()
    for dtype in (torch.float32, torch.bfloat16):
        y = getattr(ours, name)(x.to(dtype), dim, backend="cpu")
        close = {torch.float32: 1e-5, torch.bfloat16: 0.01}[dtype]
        expected = getattr(torch, name)(x.to(dtype), dim)
        torch.testing.assert_close(y, expected, rtol=close, atol=close, equal_nan=True)


# Cross entropy


def entropy_inputs(shape: tuple[int, ...], probabilities: bool, dtype: torch.dtype,
                   scale: float = 3.0) -> tuple[Tensor, Tensor]:
    dim = 1 if len(shape) > 1 else 0
    x = randn(*shape, dtype=dtype, scale=scale)
    if probabilities:
        return x, torch.softmax(randn(*shape, seed=1).double(), dim).to(dtype)
    rows = [*shape[:1], *shape[2:]] if len(shape) > 1 else []
    return x, torch.randint(0, shape[dim], rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9,), (7, 1), (6, 5), (5, 67), (3, 5003), (2, 5, 33), (2, 3, 4, 21)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy(probabilities: bool, weighted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, target = entropy_inputs(shape, probabilities, dtype)
    classes = shape[1 if len(shape) > 1 else 0]
    weight = randn(classes, dtype=dtype, seed=2).abs() if weighted else None

    def scale(inputs: Any, grad: Tensor | None) -> tuple[Tensor, ...]:
        """Of Σ c (lse - x), and of its gradient p Σ c - c, whose p is an exponential of x - lse."""
        wide = inputs[0].detach().double()
        dim = 1 if wide.dim() > 1 else 0
        if grad is None:
            terms = F.cross_entropy(wide, wide_target, wide_weight, reduction=reduction, label_smoothing=smoothing)
            return (terms + (0 if reduction != "none" else wide.abs().amax(dim)),)
        hot = F.one_hot(target, classes).double() if not probabilities else target.double().movedim(dim, -1)
        c = hot * (1 - smoothing) + smoothing / classes
        factor = grad.double().abs()
        if wide_weight is not None:
            c = c * wide_weight
        if reduction == "mean":
            factor = factor / (hot.sum() if probabilities or wide_weight is None else (hot * wide_weight).sum())
        elif reduction == "none":
            factor = factor.unsqueeze(-1)
        x = wide.movedim(dim, -1)
        p = torch.softmax(x, -1) * (1 + x.amax(-1, keepdim=True) - x)
        return ((factor * (p * c.sum(-1, keepdim=True) + c)).movedim(-1, dim),)

    wide_target = target.double() if probabilities else target
    wide_weight = None if weight is None else weight.double()
    for reduction, smoothing in itertools.product(("none", "mean", "sum"), (0.0, 0.1)):
        def call(space: Any, x: Tensor, reduction: str = reduction, smoothing: float = smoothing) -> Tensor:
            wide = x.dtype == torch.float64
            return space.cross_entropy(x, wide_target if wide else target, wide_weight if wide else weight,
                                       reduction=reduction, label_smoothing=smoothing)
        # In float64 torch's own sum of 5003 exponentials is wrong by tens of ulp where it has AVX2.
        check(call, [x.requires_grad_()], scale, lambda space, x, call=call: call(CAREFUL, x))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(8, 70), (2, 5, 40)], ids=str)
def test_ignored_rows(shape: tuple[int, ...], smoothing: float, reduction: str) -> None:
    """They count in no sum, even where they hold NaN, and have a gradient of 0, or NaN where torch has it."""
    x, target = entropy_inputs(shape, False, torch.float32)
    target.view(-1)[::3] = 2
    rows = x.movedim(1, -1).reshape(-1, shape[1])
    rows[0] = NAN
    x = rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
    weight = randn(shape[1], seed=3).abs()
    found = []
    for space in (ours, F):
        leaf = x.clone().requires_grad_()
        with fastnn.backend("cpu"):
            loss = space.cross_entropy(leaf, target, weight, ignore_index=2, reduction=reduction,
                                       label_smoothing=smoothing)
        loss.backward(torch.ones_like(loss))
        found.append((loss.detach(), leaf.grad))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_all_rows_ignored() -> None:
    x, target = randn(4, 9).requires_grad_(), torch.full((4,), -100)
    for reduction, value in (("mean", NAN), ("sum", 0.0), ("none", 0.0)):
        loss = ours.cross_entropy(x, target, reduction=reduction, backend="cpu")
        assert torch.equal(loss.nan_to_num(7.0), torch.full_like(loss, value).nan_to_num(7.0))
    (grad,) = torch.autograd.grad(ours.cross_entropy(x, target, reduction="sum", backend="cpu"), x)
    assert not grad.any()


def test_empty() -> None:
    for shape, rows in [((0, 5), (0,)), ((2, 5, 0), (2, 0))]:
        x, target = torch.empty(shape), torch.empty(rows, dtype=torch.int64)
        for reduction in ("none", "mean", "sum"):
            mine = ours.cross_entropy(x, target, reduction=reduction, backend="cpu")
            assert torch.equal(mine.nan_to_num(7.0), F.cross_entropy(x, target, reduction=reduction).nan_to_num(7.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 50), (3, 7, 35), (2, 4, 3, 9)], ids=str)
def test_cross_entropy_layouts(shape: tuple[int, ...], layout: str) -> None:
    for probabilities in (False, True):
        x, target = entropy_inputs(shape, probabilities, torch.float32)
        lying = LAYOUTS[layout](x).requires_grad_()
        loss = ours.cross_entropy(lying, target, backend="cpu")
        torch.testing.assert_close(loss, F.cross_entropy(x, target))
        (grad,) = torch.autograd.grad(loss, lying)
        (wanted,) = torch.autograd.grad(F.cross_entropy(leaf := x.clone().requires_grad_(), target), leaf)
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_logits_far_from_zero(offset: float) -> None:
    """exp(x - lse) has no room for an lse that was rounded to float32."""
    x = (randn(5, 300) + offset).requires_grad_()
    target = torch.randint(0, 300, (5,))
    check(lambda space, x: space.cross_entropy(x, target, reduction="sum"), [x], lambda inputs, grad: (
        (inputs[0].detach().double().abs().amax(1).sum(),) if grad is None else
        (grad.double().abs() * torch.softmax(inputs[0].detach().double(), 1) + 1e-3,)))


@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**40)])
@pytest.mark.parametrize("shape", [(9, 5), (2, 5, 20)], ids=str)
def test_class_out_of_range_is_an_index_error(shape: tuple[int, ...], bad: int) -> None:
    """From the public function, and from the kernels themselves, which read nothing there."""
    x, target = entropy_inputs(shape, False, torch.float32)
    target.view(-1)[7] = bad
    for function in (ours.cross_entropy, ours.nll_loss):
        with pytest.raises(IndexError, match=rf"{bad}.*\[0, 5\).*-100"):
            function(x, target)
    loss, lse = torch.empty(()), torch.empty((2, *target.shape), dtype=torch.float64)
    with pytest.raises(IndexError, match=rf"Target {bad} "):
        KERNELS["cross_entropy"]((loss, lse), x, target, None, -100, "mean", 0.0)
    with pytest.raises(IndexError, match=rf"Target {bad} "):
        KERNELS["nll_loss"](loss, x, target, None, -100, "mean")
    lse.zero_()
    for name, args in (("cross_entropy_backward", (lse, -100, "sum", 0.0)), ("nll_loss_backward", (-100, "sum"))):
        with pytest.raises(IndexError, match=rf"Target {bad} "):
            KERNELS[name](torch.empty_like(x), torch.ones(()), x, target, None, *args)


def test_the_forward_makes_nothing_of_the_logits_size() -> None:
    """Of 64 MB of logits, forward and what it keeps for the backward raise the largest memory in use by less than 16 MB,
    where one array of their size would by 60."""
    import resource

    x, target = torch.zeros(512, 32768), torch.zeros(512, dtype=torch.int64)
    ours.cross_entropy(x[:2], target[:2], backend="cpu")
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    room = torch.empty(1 << 18)  # what the call may touch
    del room
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert before > 0
    filled = torch.zeros(1 << 25)  # the high-water mark is now at most this far above what is in use
    del filled
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = torch.zeros((1 << 25) - (1 << 20))  # leave 4 MB below the mark
    ours.cross_entropy(x.requires_grad_(), target, backend="cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - mark < 16 << 10
    assert held.numel()


# nll_loss and mse_loss


def test_nll_loss_keeps_the_sign_of_zero() -> None:
    """−0 for a certain class, as torch; +0 for an ignored one and in a sum."""
    x, target = torch.zeros(40, 3), torch.arange(40) % 3
    for ignore, reduction in ((-100, "none"), (1, "none"), (-100, "sum"), (-100, "mean")):
        mine, theirs = (space.nll_loss(x, target, ignore_index=ignore, reduction=reduction, **more)
                        for space, more in ((ours, {"backend": "cpu"}), (torch.nn.functional, {})))
        assert torch.equal(mine.signbit(), theirs.signbit()), (ignore, reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9,), (6, 5), (5, 1003), (2, 5, 33), (2, 3, 4, 21)], ids=str)
def test_nll_loss(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, target = entropy_inputs(shape, False, dtype)
    classes = shape[1 if len(shape) > 1 else 0]
    if target.numel() > 2:
        target.view(-1)[1] = 0
    weight = randn(classes, dtype=dtype, seed=2).abs()
    magnitudes = (x.double().abs() * weight.double().amax()).amax()
    for reduction, w, ignore in itertools.product(("none", "mean", "sum"), (None, weight), (-100, 0)):
        def call(space: Any, x: Tensor, reduction: str = reduction, w: Tensor | None = w,
                 ignore: int = ignore) -> Tensor:
            w = w.double() if w is not None and x.dtype == torch.float64 else w
            return space.nll_loss(x, target, w, ignore_index=ignore, reduction=reduction)

        def scale(inputs: Any, grad: Tensor | None, reduction: str = reduction) -> tuple[Tensor, ...]:
            if grad is not None:
                return (inputs[0].detach().double() * 0,)
            return (magnitudes if reduction != "none" else torch.zeros(target.shape, dtype=torch.float64),)
        check(call, [x.requires_grad_()], scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (17,), (64, 65), (3, 5000), (2, 3, 4), (0, 3)], ids=str)
def test_mse_loss(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y = randn(*shape, dtype=dtype) if shape else randn(1, dtype=dtype)[0], randn(*shape, 1, dtype=dtype,
                                                                                    seed=4)[..., 0]
    for reduction in ("none", "mean", "sum"):
        check(lambda space, a, b, r=reduction: space.mse_loss(a, b, reduction=r), [x.requires_grad_(),
                                                                                   y.requires_grad_()])
    if len(shape) > 1 and x.numel():
        for lay in LAYOUTS:
            check(lambda space, a, b: space.mse_loss(a, b, reduction="none"),
                  [LAYOUTS[lay](x.detach()).requires_grad_(), y])


# Far apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_beyond_two_gigabytes(dtype: torch.dtype) -> None:
    """The same bits as of rows that are near: they are added in the same order."""
    x, grad, target = randn(3, 700, dtype=dtype), randn(3, 700, dtype=dtype, seed=1), torch.tensor([5, 699, 0])
    far, far_grad, upstream = far_apart(x), far_apart(grad), grad[:, 0].contiguous()
    for name in ("softmax", "log_softmax"):
        call, back = getattr(ops.softmax, name), getattr(ops.softmax, f"{name}_backward")
        y = call(x, 1, backend="cpu")
        assert torch.equal(call(far, 1, backend="cpu"), y)
        assert torch.equal(back(far_grad, far_apart(y), 1, backend="cpu"), back(grad, y, 1, backend="cpu"))
    for name, wanted, options in (("cross_entropy", (target,), (0.1,)), ("cross_entropy", (grad.softmax(1),), (0.1,)),
                                  ("nll_loss", (target,), ())):
        call, back = getattr(torch.ops.fastnn, name), getattr(torch.ops.fastnn, f"{name}_backward")
        further = [far_apart(t) if t.dim() > 1 else t for t in wanted]
        found = []
        for logits, targets in ((x, wanted), (far, further)):
            args = (*targets, None, -100, "none", *options)
            loss, *kept = out if isinstance(out := call(logits, *args, backend="cpu"), tuple) else (out,)
            found.append((loss, back(upstream, logits, *targets, None, *kept, *args[2:], backend="cpu")))
        for near, other in zip(*found, strict=True):
            assert torch.equal(near, other)


# Threads


def test_same_bits_for_any_number_of_threads() -> None:
    x, g = randn(37, 3003), randn(37, 3003, seed=1)
    target, soft = torch.randint(0, 3003, (37,)), torch.softmax(randn(37, 3003, seed=2), 1)
    found: list[list[Tensor]] = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = []
        for name, dim in itertools.product(("softmax", "log_softmax"), (0, 1)):
            y = getattr(ops.softmax, name)(x, dim, backend="cpu")
            results += [y, getattr(ops.softmax, f"{name}_backward")(g, y, dim, backend="cpu")]
        for wanted, logits in itertools.product((target, soft), (x, x.t().contiguous().t())):
            leaf = logits.clone().requires_grad_()
            loss = ours.cross_entropy(leaf, wanted, label_smoothing=0.1, backend="cpu")
            results += [loss.detach(), *torch.autograd.grad(loss, leaf)]
        results.append(ours.mse_loss(x, g, backend="cpu"))
        found.append(results)
    for results in found[1:]:
        for a, b in zip(results, found[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_classes(reduction: str) -> None:
    x, target = torch.empty(2, 0), torch.full((2,), -100)
    for name in ("cross_entropy", "nll_loss"):
        theirs = getattr(F, name)(x, target, reduction=reduction)
        torch.testing.assert_close(getattr(ours, name)(x, target, reduction=reduction), theirs, equal_nan=True)
