"""Softmax and the losses on the GPU, or in Triton's interpreter, against float64, beside torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")

from fastnn.kernels import linear_loss
from fastnn.kernels.gpu import softmax as kernels
from fastnn.ops import softmax as ops
from gpu import DEVICE, DTYPES, check, filled, run, watched
from rule import LAYOUTS, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of NaN and Inf, where it is the interpreter
]
PAIRS = [(ops.softmax, ops.softmax_backward), (ops.log_softmax, ops.log_softmax_backward)]


def backward_scale(g: Tensor, y: Tensor, dim: int) -> list[Tensor]:
    """A difference is as exact as its terms."""
    p = y if bool((y >= 0).all()) else y.exp()
    return [g.abs() + g.abs().sum(dim, keepdim=True) * p]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p[0].name)
def test_rows_and_columns(pair: Any, dtype: torch.dtype) -> None:
    forward, backward = pair
    for shape, dim in (((5, 37), -1), ((3, 7, 41), 1), ((2, 2100), -1), ((1, 1), 0)):
        x, g = randn(*shape, dtype=dtype, scale=4.0), randn(*shape, dtype=dtype, seed=1)
        y = check(forward, x, dim, scale=(lambda x, dim: [x.abs()]) if forward is ops.log_softmax else None)
        check(backward, g, y, dim, scale=backward_scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x, g = randn(3, 6, 20), randn(3, 6, 20, seed=1)
    for dim in range(3):
        plain = run(ops.softmax, x.to(DEVICE), dim)
        assert torch.equal(run(ops.softmax, LAYOUTS[layout](x).to(DEVICE), dim), plain)
        slope = run(ops.softmax_backward, g.to(DEVICE), plain, dim)
        assert torch.equal(run(ops.softmax_backward, LAYOUTS[layout](g).to(DEVICE), LAYOUTS[layout](plain), dim), slope)


@pytest.mark.parametrize("shape", [(2, 300), (2, 300, 3)], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p[0].name)
def test_long_lines_are_cut(pair: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_WHOLE", 64)
    monkeypatch.setattr(kernels, "_STEP", 128)
    forward, backward = pair
    x, g = randn(*shape, scale=4.0), randn(*shape, seed=1)
    x[0, :128] = -float("inf")  # a part without a number
    y = check(forward, x, 1)
    check(backward, g, y, 1, scale=backward_scale)


@pytest.mark.parametrize(
    ("n", "dtype"), [(200, torch.float32), (301, torch.bfloat16), (301, torch.float32), (1000, torch.float16)], ids=str
)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p[0].name)
def test_lines_that_begin_anywhere(pair: Any, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiples of 8 and odd lengths, whole and in parts: each line's maximum in its head, its tail or between"""
    forward, backward = pair
    x, g = randn(9, n, dtype=dtype, scale=4.0), randn(9, n, dtype=dtype, seed=1)
    for row in range(9):
        x[row, (0, -1, 3, 150)[row % 4]] = 30.0
    for whole in (1 << 15, 64):
        monkeypatch.setattr(kernels, "_WHOLE", whole)
        monkeypatch.setattr(kernels, "_STEP", 128 if n < 1000 else 512)
        y = check(forward, x, 1, scale=(lambda x, dim: [x.abs()]) if forward is ops.log_softmax else None)
        check(backward, g, y, 1, scale=backward_scale)


@pytest.mark.parametrize(("n", "unit"), [(4096, 8), (1000, 8), (301, 0), (50257, 0), (37, 1)])
def test_what_is_known_of_addresses(n: int, unit: int) -> None:
    x = torch.empty(6, n, device="meta")
    assert kernels._lines(-1, [x, x])[0].unit == unit
    assert kernels._lines(0, [x.mT, x.mT])[0].unit == unit
    assert kernels._lines(0, [x, x])[0].unit == 1
    other = torch.empty(6, n + 3, device="meta")[:, :n]
    assert kernels._lines(-1, [x, other])[0].unit == 1


@pytest.mark.parametrize("n", [40000, 70001])
def test_long_lines(n: int) -> None:
    x, g = randn(2, n, dtype=torch.bfloat16, scale=4.0), randn(2, n, dtype=torch.bfloat16, seed=1)
    y = check(ops.softmax, x, -1)
    check(ops.softmax_backward, g, y, -1, scale=backward_scale)


@pytest.mark.parametrize("whole", [64, 1 << 14])
def test_special_values(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_WHOLE", whole)
    inf = float("inf")
    x = randn(5, 100)
    x[0, 3], x[1, 4], x[2, :], x[3, 5], x[4, :3] = inf, -inf, -inf, float("nan"), 1e38
    for op in (ops.softmax, ops.log_softmax):
        mine = run(op, x.to(DEVICE), 1).cpu()
        torch.testing.assert_close(mine, op(x, 1, backend="torch"), rtol=1e-5, atol=1e-6, equal_nan=True)


def losses_of(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, classes of which some are ignored, probabilities, weights"""
    x = randn(*shape, dtype=dtype, scale=3.0)
    rows = [*shape[:1], *shape[2:]] if len(shape) > 1 else []
    classes = shape[1] if len(shape) > 1 else shape[0]
    target = torch.randint(classes, rows, generator=torch.Generator().manual_seed(3))
    if rows:
        target.view(-1)[::4] = -100
    p = randn(*shape, scale=2.0, seed=5).softmax(1 if len(shape) > 1 else 0).to(dtype)
    return x, target, p, randn(classes, dtype=dtype, seed=6).abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (9, 37), (3, 11, 5)], ids=str)
def test_cross_entropy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, target, p, weight = losses_of(dtype, shape)
    rows = () if len(shape) == 1 else (shape[0], *shape[2:])
    for w in (None, weight):
        for q, smoothing in ((target, 0.0), (target, 0.2), (p, 0.1)):
            for reduction in ("mean", "none") if w is None else ("sum",):
                rest = (-100, reduction, smoothing)

                def scale(x: Tensor, *_: Any, reduction: str = reduction) -> list[Any]:
                    each = filled(rows, float(x.abs().max()) + 5.0)
                    most = each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()
                    return [most, filled((2, *rows), float(x.abs().max()))]

                _, lse = check(ops.cross_entropy, x, q, w, *rest, scale=scale)
                grad = randn(*rows, dtype=dtype, seed=8) if reduction == "none" else torch.tensor(1.5, dtype=dtype)
                check(
                    ops.cross_entropy_backward, grad, x, q, w, lse, *rest,
                    scale=lambda g, x, q, w, *_: [filled(shape, float(g.abs().max()) * (3.0 if w is not None else 1.0))],
                )  # fmt: skip


@pytest.mark.parametrize("shape", [(7,), (9, 37), (3, 11, 5)], ids=str)
def test_nll(shape: tuple[int, ...]) -> None:
    x, target, _, weight = losses_of(torch.float32, shape)
    for w in (None, weight):
        for reduction in ("mean", "sum", "none"):
            size = float(x.abs().max()) * 3 * (target.numel() if reduction == "sum" else 1)
            rows = target.shape if reduction == "none" else ()
            check(ops.nll_loss, x, target, w, -100, reduction,
                  scale=lambda *_, rows=rows, size=size: [filled(rows, size)])  # fmt: skip
            grad = randn(*rows, seed=8) if rows else torch.tensor(1.5)
            check(ops.nll_loss_backward, grad, x, target, w, -100, reduction)


def test_ignored_lines_may_hold_anything_and_wrong_classes_give_nan() -> None:
    x = randn(3, 8).to(DEVICE)
    x[0] = float("nan")
    target = torch.tensor([-100, 9, 2], device=DEVICE)
    loss, lse = run(ops.cross_entropy, x, target, None, -100, "none", 0.0)
    assert loss[0] == 0
    assert loss[1].isnan()
    assert loss[2].isfinite()
    grad = run(ops.cross_entropy_backward, torch.ones(3, device=DEVICE), x, target, None, lse, -100, "none", 0.0)
    assert torch.equal(grad[0], torch.zeros(8, device=DEVICE))
    assert grad[1].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_in_any_layout(layout: str) -> None:
    x, target, p, _ = losses_of(torch.float32, (4, 9, 5))
    for q in (target, p):
        lay = LAYOUTS[layout](q) if q is p else q
        plain, lse = run(ops.cross_entropy, x.to(DEVICE), q.to(DEVICE), None, -100, "mean", 0.1)
        other, _ = run(ops.cross_entropy, LAYOUTS[layout](x).to(DEVICE), lay.to(DEVICE), None, -100, "mean", 0.1)
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=0)
        rest = (None, lse, -100, "mean", 0.1)
        g = torch.tensor(1.0, device=DEVICE)
        slope = run(ops.cross_entropy_backward, g, x.to(DEVICE), q.to(DEVICE), *rest)
        again = run(ops.cross_entropy_backward, g, LAYOUTS[layout](x).to(DEVICE), lay.to(DEVICE), *rest)
        torch.testing.assert_close(again, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mse(dtype: torch.dtype) -> None:
    for shape in ((33,), (5, 4099), (0, 3)):
        x, y = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
        for reduction in ("mean", "sum", "none"):
            check(ops.mse_loss, x, y, reduction)
            grad = randn(*shape, dtype=dtype, seed=2) if reduction == "none" else torch.tensor(0.75, dtype=dtype)
            check(ops.mse_loss_backward, grad, x, y, reduction,
                  scale=lambda g, x, y, r: [2 * (x - y).abs() * g.abs() / (max(1, x.numel()) if r == "mean" else 1)])  # fmt: skip
    check(ops.mse_loss, randn(6, 7).mT, randn(7, 6, seed=1), "mean")


@pytest.mark.parametrize("whole", [64, 1 << 14])
def test_losses_of_many_classes_are_taken_in_steps(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one program or, few lines with more classes than ``whole``, by several"""
    monkeypatch.setattr(kernels, "_STEP", 32)
    monkeypatch.setattr(kernels, "_WHOLE", whole)
    launched = watched(monkeypatch, lambda kernel, options: kernel.__name__)
    x, target, p, weight = losses_of(torch.float32, (3, 100))
    for q, smoothing in ((target, 0.0), (target, 0.2), (p, 0.1)):
        rest = (-100, "none", smoothing)
        _, lse = check(ops.cross_entropy, x, q, weight, *rest, scale=lambda x, *_: [filled((3,), 20.0), filled((2, 3), 20.0)])
        g = randn(3, seed=8)
        check(ops.cross_entropy_backward, g, x, q, weight, lse, *rest, scale=lambda *_: [filled((3, 100), 10.0)])
    check(ops.nll_loss_backward, randn(3, seed=8), x, target, weight, -100, "none")
    assert ("line_sums" in launched) == (whole == 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "whole"), [(1000, 1 << 14), (301, 1 << 14), (301, 64), (50257, 1 << 16)])
def test_losses_of_lines_that_begin_anywhere(n: int, whole: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_WHOLE", whole)
    rows = 9 if n < 10000 else 2
    x, target, p, weight = losses_of(dtype, (rows, n))
    target[:] = torch.tensor([0, n - 1, 2, -100, n // 2, 1, n - 2, n - 3, 5])[:rows]
    for q, smoothing in ((target, 0.0), (target, 0.2), (p, 0.1)):
        rest = (-100, "none", smoothing)
        _, lse = check(ops.cross_entropy, x, q, weight, *rest, scale=lambda *_: [filled((rows,), 30.0), filled((2, rows), 30.0)])
        g = randn(rows, dtype=dtype, seed=8)
        check(ops.cross_entropy_backward, g, x, q, weight, lse, *rest, scale=lambda *_: [filled((rows, n), 10.0)])
    check(ops.nll_loss_backward, g, x, target, weight, -100, "none")


# A linear layer and its cross-entropy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two chunks, the second's gradients added where they are made; and each row's loss with a gradient of its own."""
    monkeypatch.setattr(linear_loss, "_LEAST", 16)
    monkeypatch.setattr(kernels, "_STEPS", kernels._STEPS._replace(chunk=1))
    x, w, b = randn(21, 24, dtype=dtype), randn(43, 24, dtype=dtype, scale=0.3, seed=1), randn(43, dtype=dtype, seed=2)
    _, target, _, weight = losses_of(dtype, (21, 43))
    size = float((x.double().abs() @ w.double().abs().mT + b.double().abs()).max()) + 5
    for bias, class_weight, smoothing in ((b, None, 0.0), (None, weight, 0.1)):
        rest = (x, w, bias, target, class_weight, -100)

        def scale(*args: Any, sums: float = 21.0) -> list[Any]:
            number = 1 if args[6] == "none" else sums
            shapes = (21, 24), (43, 24), (0,) if args[2] is None else (43,)
            gradients = [filled(shape, size * times) for shape, times in zip(shapes, (1, 21, 21), strict=True)]
            return [filled((21,) if args[6] == "none" else (), size * number), None, *gradients]

        for reduction in ("mean", "sum"):
            check(ops.linear_cross_entropy, *rest, reduction, smoothing, True, scale=scale)
        grad = randn(21, dtype=dtype, seed=8)
        check(ops.linear_cross_entropy_backward, grad, *rest, "none", smoothing, scale=lambda g, *args: scale(*args)[2:])


@pytest.mark.parametrize(("classes", "rows", "sizes"), [(131072, 8192, [4096, 4096]), (32000, 8192, [4096, 4096]),
                                                        (1000, 100000, [100000]), (1 << 20, 1024, [512, 512])])  # fmt: skip
def test_chunks_are_long_enough_for_the_weights_gradient(
    classes: int, rows: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    nothing: Any = lambda *args: None  # noqa: E731
    steps = kernels._STEPS._replace(
        linear=lambda y, *_: seen.append(len(y)), matmul=nothing, add_product=nothing, cross_entropy=nothing,
        cross_entropy_backward=nothing,
    )  # fmt: skip
    x, w = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in (rows, classes))
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    linear_loss._run(steps, None, [x, w.float(), w], None, x, w, None, target, None, -100, 0.0)
    assert seen == sizes
