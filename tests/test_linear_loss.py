"""A linear layer with the cross-entropy of its outputs, by chunks of rows, against float64 beside torch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastnn
import fastnn.functional as ours
from fastnn import ops
from fastnn.kernels import linear_loss
from fastnn.kernels.cpu import softmax as kernels
from rule import DTYPES, LAYOUTS, check, randn

pytestmark = pytest.mark.usefixtures("poison")
ROWS, FEATURES, CLASSES = 23, 37, 61


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 rows, the last of 7; and all but the last classes' gradients are added up 64 at a time."""
    monkeypatch.setattr(linear_loss, "_LEAST", 8)
    monkeypatch.setattr(kernels, "_STEPS", kernels._STEPS._replace(chunk=1))
    monkeypatch.setattr(kernels, "_SLAB", 1)


def both(x: Tensor, w: Tensor, target: Tensor, b: Tensor | None, **options: Any) -> Tensor:
    """In torch's words"""
    return F.cross_entropy(F.linear(x, w, b), target, **options)


def inputs(dtype: torch.dtype, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias; targets of which some are ignored"""
    target = torch.randint(classes, (ROWS,), generator=torch.Generator().manual_seed(3))
    target[::4] = -100
    x, w, b = randn(ROWS, FEATURES, dtype=dtype), randn(classes, FEATURES, dtype=dtype, scale=0.3), randn(classes, dtype=dtype)
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), target


def magnitudes(options: dict[str, Any], target: Tensor) -> Any:
    """Of the loss, and of gradients whose logits are as exact as their terms are large"""

    def scale(tensors: Any, grad: Tensor | None) -> tuple[Tensor, ...]:
        x, w, b = (t.detach().double() for t in tensors[:3])
        size = (x.abs() @ w.abs().mT + b.abs()).amax(1)
        kept = (target != -100).double()
        number = kept.sum() if options["reduction"] == "mean" else 1.0
        if grad is None:
            each = (size + 5) * kept
            return (each if options["reduction"] == "none" else each.sum() / number,)
        logits = x @ w.mT + b
        hot = F.one_hot(target.clamp(min=0), len(w))
        d = (torch.softmax(logits, 1) * (1 + size[:, None]) + hot + 0.1) * (kept * grad.double().abs() / number)[:, None]
        if options.get("weight") is not None:
            d = d * 3
        return d @ w.abs(), d.mT @ x.abs(), d.sum(0)

    return scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_float64(reduction: str, dtype: torch.dtype) -> None:
    """The loss and all gradients; more classes than the gradient of the weight is added up for at a time."""
    for classes, more in ((CLASSES, {}), (97, {"label_smoothing": 0.1, "weight": randn(97, seed=4).abs()})):
        *tensors, target = inputs(dtype, classes)
        options = {"reduction": reduction, **more}

        def call(space: Any, x: Tensor, w: Tensor, b: Tensor, options: dict[str, Any] = options, t: Tensor = target) -> Tensor:
            options = {name: value.to(x.dtype) if isinstance(value, Tensor) else value for name, value in options.items()}
            if space is ours:
                return ours.linear_cross_entropy(x, w, t, linear_bias=b, **options)
            return both(x, w, t, b, **options)

        check(call, tensors, magnitudes(options, target))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x, w, _, target = inputs(torch.float32)
    wanted = torch.autograd.grad(both(x, w, target, None), (x, w))
    lying = [LAYOUTS[layout](t.detach()).requires_grad_() for t in (x, w)]
    found = torch.autograd.grad(ours.linear_cross_entropy(lying[0], lying[1], target, backend="cpu"), lying)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_single_row_no_rows_and_only_ignored_ones() -> None:
    x, w, b, target = inputs(torch.float32)
    for rows, t in ((x[1], target[1]), (x[:0], target[:0]), (x[:3], torch.full((3,), -100))):
        for reduction in ("mean", "sum", "none"):
            mine = ours.linear_cross_entropy(rows, w, t, linear_bias=b, reduction=reduction, backend="cpu")
            theirs = both(rows, w, t, b, reduction=reduction)
            torch.testing.assert_close(mine, theirs, equal_nan=True)
            for a, c in zip(*(torch.autograd.grad(y.sum(), (x, w, b)) for y in (mine, theirs)), strict=True):
                torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


def test_derivatives() -> None:
    *tensors, target = inputs(torch.float64, 7)
    x, w, b = (t.detach()[:5, ...].requires_grad_() for t in tensors)
    w, b = w[:, :4].detach().requires_grad_(), b.detach().requires_grad_()
    x = x[:, :4].detach().requires_grad_()

    def call(x: Tensor, w: Tensor, b: Tensor, reduction: str = "mean") -> Tensor:
        return ours.linear_cross_entropy(x, w, target[:5] % 5, linear_bias=b, reduction=reduction, backend="cpu")

    assert torch.autograd.gradcheck(call, (x, w, b))
    assert torch.autograd.gradcheck(lambda x, w, b: call(x, w, b, "none"), (x, w, b))
    assert torch.autograd.gradgradcheck(call, (x, w, b))


def test_a_backward_may_be_repeated() -> None:
    x, w, _, target = inputs(torch.float32)
    loss = ours.linear_cross_entropy(x, w, target, backend="cpu")
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    again = torch.autograd.grad(loss, (x, w), torch.tensor(2.0))
    for one, two in zip(first, again, strict=True):
        torch.testing.assert_close(2 * one, two)


def test_no_array_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is allocated, forward or backward, is as large, but for the weight's gradient."""
    monkeypatch.setattr(linear_loss, "_LEAST", 64)
    x, w, target = randn(4096, 8).requires_grad_(), randn(500, 8).requires_grad_(), torch.arange(4096) % 500
    for reduction in ("mean", "none"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            ours.linear_cross_entropy(x, w, target, reduction=reduction, backend="cpu").sum().backward()
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert 64 * 500 * 4 <= largest < 4096 * 500 * 4 / 8


def test_what_torch_serves(calls: list[Any]) -> None:
    x, w, b, _ = inputs(torch.float32)
    p = randn(ROWS, CLASSES).softmax(1)
    torch.testing.assert_close(ours.linear_cross_entropy(x, w, p, linear_bias=b), both(x, w, p, b))
    wide, grid = randn(5, 3, FEATURES), torch.arange(ROWS * 3).reshape(ROWS, 3) % 5
    theirs = F.cross_entropy((x @ wide.flatten(0, 1).mT).reshape(ROWS, 5, 3), grid)
    torch.testing.assert_close(ours.linear_cross_entropy(x, wide, grid), theirs)
    assert [call.backend for call in calls if call.op == "linear_cross_entropy"] == ["torch", "torch"]


def test_autocast_gives_torchs_dtype() -> None:
    x, w, _, target = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = ours.linear_cross_entropy(x, w, target), both(x, w, target, None)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(mine, (x, w)))


@pytest.mark.parametrize(("change", "words"), [
    ({"target": torch.tensor([0, CLASSES])}, ["61", "[0, 61)"]), ({"linear_weight": randn(CLASSES, 4)}, ["(2, 37)", "(61, 4)"]),
    ({"linear_bias": randn(4)}, ["linear_bias", "(4,)", "(61,)"]),
    ({"linear_weight": randn(CLASSES, FEATURES).double()}, ["float64"]),
    ({"reduction": "foo"}, ["foo", "mean"]), ({"label_smoothing": 2.0}, ["2.0", "1.0"]), ({"weight": randn(4)}, ["61", "(4,)"]),
    ({"target": torch.tensor([0, 1, 2])}, ["(2,)", "(3,)"]),
], ids=str)  # fmt: skip
def test_errors(change: dict[str, Any], words: list[str]) -> None:
    arguments: dict[str, Any] = {
        "input": randn(2, FEATURES), "linear_weight": randn(CLASSES, FEATURES), "target": torch.tensor([0, 1])
    }  # fmt: skip
    for backend in ("cpu", None, "reference"):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
            ours.linear_cross_entropy(**arguments | change, backend=backend)
        assert all(word in str(caught.value) for word in words), caught.value


def test_under_compile() -> None:
    x, w, b, target = inputs(torch.float32)
    op = ops.softmax.linear_cross_entropy
    eager = op(x, w, b, target, None, -100, "mean", 0.0, True, backend="cpu")

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ours.linear_cross_entropy(x, w, target, linear_bias=b)

    loss = torch.compile(call, backend="aot_eager", fullgraph=True)(x, w, b)
    torch.testing.assert_close(loss, eager)
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, w, b)) for y in (loss, eager)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has this layer from 2.13 on")
@pytest.mark.parametrize("options", [
    {}, {"bias": True, "weight": torch.linspace(0.1, 1, 6), "label_smoothing": 0.1}, {"out_features": (4,), "bias": True},
    {"ignore_index": 2},
], ids=str)  # fmt: skip
def test_layer(options: dict[str, Any]) -> None:
    theirs = nn.LinearCrossEntropyLoss(5, 6, **options)
    x, target = randn(3, 5), torch.tensor([0, 5, 2])
    target = target[:, None].expand(3, 4) if "out_features" in options else target
    wanted = theirs(x, target)
    assert len(fastnn.replace(theirs).replaced) >= 1
    assert type(theirs) is fastnn.nn.LinearCrossEntropyLoss
    torch.testing.assert_close(theirs(x, target), wanted)
