"""Unusual and wrong arguments of products, losses and activations: what torch makes of them, kernels and size rules alike."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn.functional as f
import guard
from fastnn.kernels.cpu.engine import overhead

X, PROBABILITIES, TARGET = torch.randn(4, 5), torch.randn(4, 5).softmax(1), torch.tensor([1, 0, 4, 2])
INF = torch.full((2, 2), torch.inf)


@pytest.fixture(params=["kernels", "rules"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as all tests run, the kernels however small their work, and once with the rules that leave small work to torch."""
    if request.param == "rules":
        monkeypatch.setattr(overhead, "RULES", True)


@pytest.mark.parametrize(
    ("ours", "theirs", "args", "options"),
    [
        (f.cross_entropy, F.cross_entropy, (X[0], TARGET[:1]), {}),
        (f.nll_loss, F.nll_loss, (X[0], TARGET[:1]), {}),
        (f.cross_entropy, F.cross_entropy, (X, PROBABILITIES, torch.rand(5).double()), {}),
        (f.cross_entropy, F.cross_entropy, (X, TARGET), {"label_smoothing": -1.0}),
        (f.cross_entropy, F.cross_entropy, (X, TARGET), {"label_smoothing": float("nan")}),
        (f.cross_entropy, F.cross_entropy, (torch.empty(4, 0), torch.empty(4, 0)), {}),
        (f.addmm, torch.addmm, (torch.ones(2, 2), INF, INF), {"alpha": 0}),
        (f.dropout, F.dropout, (X, torch.tensor(1.0)), {}),
    ],
)
def test_taken_as_torch_takes_it(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], args: tuple[Any, ...], options: dict[str, Any], either: None
) -> None:
    expected = theirs(*args, **options)
    torch.testing.assert_close(ours(*args, **options), expected, equal_nan=True)


META = torch.empty(3, 5, device="meta")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: f.cross_entropy(X, TARGET, label_smoothing=1.5), RuntimeError, "label_smoothing"),
        (lambda: f.cross_entropy(torch.empty(4, 0), TARGET), IndexError, "out of bounds"),
        (lambda: f.cross_entropy(X, TARGET, torch.rand(5, requires_grad=True)), RuntimeError, "weight"),
        (lambda: f.linear(X, META), RuntimeError, "weight must be on input's device, cpu, got meta"),
        (lambda: f.linear(X, torch.randn(3, 5), META[:, 0]), RuntimeError, "bias must be on input's device, cpu, got meta"),
        (lambda: f.mm(X, META.T), RuntimeError, r"mm\(\): mat2 must be on input's device, cpu, got meta"),
        (lambda: f.mm(X, X), RuntimeError, r"mm\(\): shapes of input and mat2 .*\(4, 5\) and \(4, 5\).*mat2 must have 5 rows"),
        (lambda: f.mm(X, X.T.double()), RuntimeError, r"mm\(\): mat2 must have the same dtype as input, torch.float32, got"),
        (lambda: f.mv(X, X[:, 0]), RuntimeError, r"mv\(\): .*vec must have 5 elements, got 4"),
        (lambda: f.bmm(X[None], X[None]), RuntimeError, r"bmm\(\): .*mat2 must have 5 rows, got 4"),
        (lambda: f.bmm(X[None], X.T.expand(2, 5, 4)), RuntimeError, r"bmm\(\): .*mat2 must have input's batch size 1, got 2"),
        (lambda: f.addmm(X, X, X), RuntimeError, r"addmm\(\): .*mat2 must have 5 rows, got 4"),
        (lambda: f.baddbmm(X[None], X[None], X[None]), RuntimeError, r"baddbmm\(\): .*batch2 must have 5 rows, got 4"),
        (lambda: f.baddbmm(X[None].double(), X[None], X.T[None]), RuntimeError, r"baddbmm\(\): batch1 must have the same dtype"),
        (lambda: f.baddbmm(X[0, :1], X[None], X.T[None], backend="gpu"), RuntimeError, r"^baddbmm\(\): backend='gpu' cannot"),
        (lambda: f.dropout(X, seed=1.5), TypeError, r"dropout\(\): argument 'seed' must be int, not float"),  # type: ignore[arg-type]
        (lambda: f.cross_entropy(X, META[0, :4].long()), RuntimeError, "target must be on input's device, cpu, got meta"),
        (lambda: f.linear(X[0], X[1], activation="foo"), ValueError, "activation got 'foo'"),
        (lambda: f.linear(X[0], X[1], activation="leaky_relu"), ValueError, "activation got 'leaky_relu'"),
        (lambda: f.linear([1.0], X, activation="relu"), TypeError, "must be Tensor, not list"),  # type: ignore[arg-type]
        (lambda: f.addmm(None, X, X.T), TypeError, "must be Tensor, not NoneType"),  # type: ignore[arg-type]
        (lambda: f.dropout([1.0]), TypeError, "must be Tensor, not list"),  # type: ignore[arg-type]
        (lambda: f.dropout(X, float("nan")), RuntimeError, "between 0 and 1"),
        (lambda: f.mm(X, X.T, out=[1]), TypeError, "'out' must be Tensor, not list"),  # type: ignore[arg-type]
    ],
)
def test_refused(call: Callable[[], Tensor], error: type[Exception], message: str, either: None) -> None:
    with pytest.raises(error, match=message):
        call()


def test_class_weights_have_the_gradient_that_torch_gives(either: None) -> None:
    ours, theirs = (torch.linspace(1, 2, 5).requires_grad_() for _ in range(2))
    f.cross_entropy(X, PROBABILITIES, ours).backward()
    F.cross_entropy(X, PROBABILITIES, theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_saved_tensor_that_out_overwrites_is_noticed(either: None) -> None:
    saved, parameter = torch.randn(5, 5), torch.randn(5, 5, requires_grad=True)
    y = (parameter * saved).sum()
    f.mm(X.T, X, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_out_of_another_layout_keeps_the_sign_of_zero(either: None) -> None:
    out = torch.empty(4, 4).T
    assert f.mm(torch.tensor([[-0.0], [0], [0], [0]]), torch.ones(1, 4), out=out, backend="torch").signbit()[0].all()
    assert out.signbit().sum() == 4


@pytest.mark.parametrize("inside", [False, True])
def test_an_inference_tensor_is_written_in_inference_mode_only(inside: bool, either: None) -> None:
    with torch.inference_mode():
        out = torch.empty(5, 5)
    with torch.inference_mode(inside), nullcontext() if inside else pytest.raises(RuntimeError, match="inference"):
        f.mm(X.T, X, out=out)
        torch.testing.assert_close(out, X.T @ X)


BACKWARDS = {
    case.op: case.args
    for family in guard.CASES
    for _, case in guard.cases(family, torch.float32)
    if case.op.endswith("_backward")
}  # of each backward the arguments of one call


@pytest.mark.parametrize("op", BACKWARDS)
def test_a_backward_refuses_a_gradient_that_is_not_its_outputs(op: str) -> None:
    """Kernels read a gradient by its address."""
    grad, *rest = BACKWARDS[op]
    more, double = torch.ones(*grad.shape, 3), grad.double()
    any_dtype = op in ("embedding_backward", "max_unpool_backward")  # which get nothing else that has one
    for wrong in (more,) if any_dtype else (more, double):
        with pytest.raises(RuntimeError, match="grad"):
            getattr(torch.ops.fastnn, op)(wrong, *rest, backend="cpu")
