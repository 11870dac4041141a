"""fastnn.functional and fastnn.nn against torch: values, gradients, errors, and everything around a call."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn
import fastnn.functional as f
from layer_cases import ACTIVATION, CASES, FUSED, MATMUL, SOFTMAX, Case

EVERY = [*CASES, *FUSED]
BACKENDS = ("auto", "reference", "torch")


def gradients(case: Case, call: Callable[..., Tensor], tensors: list[Tensor], **more: Any) -> list[Tensor]:
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = call(*tensors, **more)
    upstream = torch.linspace(-1, 2, out.numel()).to(out.dtype).reshape(out.shape).cos()
    return [out, *torch.autograd.grad(out, tensors, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_forward(case: Case, backend: str, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    expected = case.torch(*tensors)
    result = case.ours(*tensors, backend=backend)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_gradients(case: Case, backend: str) -> None:
    tensors = case.tensors(seed=1)
    ours, theirs = gradients(case, case.ours, tensors, backend=backend), gradients(case, case.torch, tensors)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    """Forward and backward err from float64 by at most twice what torch errs, and two ulp of the largest value."""
    tensors = case.tensors(dtype, seed=2)
    exact = gradients(case, case.torch, [t.double() for t in tensors])
    ours, theirs = gradients(case, case.ours, tensors), gradients(case, case.torch, tensors)
    for mine, expected, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == expected.dtype
        floor = 2 * torch.finfo(dtype).eps * float(truth.abs().max()) if truth.numel() else 0.0
        error, allowed = (float((t.double() - truth).abs().max()) for t in (mine, expected))
        assert error <= 2 * allowed + floor


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_gradcheck(case: Case, backend: str) -> None:
    tensors = case.tensors(torch.float64, seed=3, grad=True)
    # Along random directions, here and below: seconds for all cases instead of minutes.
    assert torch.autograd.gradcheck(lambda *t: case.ours(*t, backend=backend), tensors, fast_mode=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_gradgradcheck(case: Case, backend: str) -> None:
    tensors = case.tensors(torch.float64, seed=4, grad=True)
    assert torch.autograd.gradgradcheck(lambda *t: case.ours(*t, backend=backend), tensors, fast_mode=True)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_strided_and_expanded(case: Case) -> None:
    """Every operand once as a slice of every second element, once transposed in memory, once stride 0."""
    tensors = case.tensors(seed=5)
    expected = case.torch(*tensors)
    for i, t in enumerate(tensors):
        layouts = [torch.stack([t, -t], -1)[..., 0]]
        if t.dim() > 1:
            layouts.append(t.mT.contiguous().mT)
        for other in layouts:
            torch.testing.assert_close(case.ours(*tensors[:i], other, *tensors[i + 1 :]), expected)
        if t.dim():
            row = t[:1].expand(t.shape)
            stretched = [*tensors[:i], row, *tensors[i + 1 :]]
            torch.testing.assert_close(case.ours(*stretched), case.torch(*stretched))


EMPTY = [
    Case("matmul", ((0, 4), (4, 3))),
    Case("matmul", ((2, 0), (0, 3))),
    Case("matmul", ((2, 4), (4, 0))),
    Case("matmul", ((0, 2, 4), (4, 3))),
    Case("matmul", ((0,), (0,))),
    Case("linear", ((0, 4), (3, 4), (3,))),
    Case("linear", ((2, 0), (3, 0), (3,))),
    Case("addmm", ((3,), (2, 0), (0, 3)), {"beta": 2.0}),
    Case("relu", ((0, 3),)),
    Case("gelu", ((3, 0),)),
    Case("glu", ((0, 4),)),
    Case("prelu", ((0, 3), (3,))),
    Case("softmax", ((0, 3),), {"dim": 1}),
    Case("softmax", ((0, 3),), {"dim": 0}),
    Case("log_softmax", ((3, 0),), {"dim": 0}),
    Case("cross_entropy", ((0, 3),), {"target": torch.tensor([], dtype=torch.int64)}),
    Case("cross_entropy", ((0, 3),), {"target": torch.tensor([], dtype=torch.int64), "reduction": "none"}),
    Case("nll_loss", ((0, 3),), {"target": torch.tensor([], dtype=torch.int64), "reduction": "sum"}),
    Case("mse_loss", ((0, 3), (0, 3)), {"reduction": "sum"}),
    Case("conv2d", ((0, 3, 5, 5), (4, 3, 3, 3), (4,))),
]


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty(case: Case) -> None:
    tensors = case.tensors()
    ours, theirs = gradients(case, case.ours, tensors), gradients(case, case.torch, tensors)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, equal_nan=True)


@pytest.mark.parametrize("case", [c for c in EVERY if len(c.shapes) > 1], ids=str)
def test_only_needed_gradients(case: Case, calls: list[Any]) -> None:
    """An input that needs no gradient gets none, and the others' do not change."""
    tensors = case.tensors(seed=6)
    every = gradients(case, case.ours, tensors)[1:]
    for i in range(len(tensors)):
        some = [t.detach().clone().requires_grad_(j == i) for j, t in enumerate(tensors)]
        out = case.ours(*some)
        out.backward(torch.linspace(-1, 2, out.numel()).to(out.dtype).reshape(out.shape).cos())
        torch.testing.assert_close(some[i].grad, every[i])
        assert all(t.grad is None for j, t in enumerate(some) if j != i)


def test_no_product_for_a_gradient_that_is_not_needed() -> None:
    x, w = torch.randn(4, 5), torch.randn(3, 5, requires_grad=True)
    with fastnn.backend("reference"), fastnn.trace() as calls:
        f.linear(x, w).sum().backward()
    assert [call.op for call in calls] == ["linear", "matmul"]


@pytest.mark.parametrize("case", MATMUL, ids=str)
def test_every_product_of_a_backward_is_ours(case: Case) -> None:
    """Two, and one for a vector that was added to each row: the sum of the rows."""
    summed = len(case.shapes[-1]) == 1 if case.name == "linear" else case.name == "addmm" and len(case.shapes[0]) == 1
    out = case.ours(*case.tensors(grad=True), backend="cpu")
    with fastnn.trace() as calls:
        out.backward(torch.ones_like(out))
    assert [call.backend for call in calls] == ["cpu"] * (2 + summed)
    assert {call.op for call in calls} <= {"matmul", "addmm"}


def test_activation_is_apart_where_its_gradient_is_needed() -> None:
    x, w, r = torch.randn(4, 5), torch.randn(3, 5, requires_grad=True), torch.randn(4, 3)
    with fastnn.backend("reference"), fastnn.trace() as calls:
        y = f.linear(x, w, activation="gelu", residual=r)
        with torch.no_grad():
            fused = f.linear(x, w, activation="gelu", residual=r)
    assert [call.op for call in calls] == ["linear", "activation", "linear"]
    torch.testing.assert_close(y, F.gelu(F.linear(x, w) + r))
    torch.testing.assert_close(fused, F.gelu(F.linear(x, w) + r))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_residual(activation: str | None) -> None:
    act = F.silu if activation else (lambda z: z)
    tensors = [torch.randn(2, 4, 5), torch.randn(3, 5), torch.randn(3), torch.randn(2, 4, 3)]
    ours = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.clone().requires_grad_() for t in tensors]
    f.linear(*ours[:3], residual=ours[3], activation=activation).square().sum().backward()
    act(F.linear(*theirs[:3]) + theirs[3]).square().sum().backward()
    for mine, expected in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, expected.grad)


def test_the_op_itself_differentiates_through_its_activation() -> None:
    """torch.ops.fastnn.linear with an activation, which fastnn.functional never asks for under autograd."""
    x, w, b = (
        t.requires_grad_() for t in (torch.randn(4, 5).double(), torch.randn(3, 5).double(), torch.randn(3).double())
    )
    assert torch.autograd.gradcheck(lambda *t: torch.ops.fastnn.linear(*t, None, "gelu"), (x, w, b))


# out=


@pytest.mark.parametrize("case", [c for c in MATMUL if c.name != "linear"], ids=str)
def test_out(case: Case) -> None:
    tensors = case.tensors(seed=7)
    expected = case.torch(*tensors)
    out = torch.full_like(expected, torch.nan)
    assert case.ours(*tensors, out=out) is out
    torch.testing.assert_close(out, expected)
    strided = torch.full((*expected.shape, 2), torch.nan)[..., 0]
    case.ours(*tensors, out=strided)
    torch.testing.assert_close(strided, expected)
    empty = torch.empty(0)
    case.ours(*tensors, out=empty)
    torch.testing.assert_close(empty, expected)


def test_out_that_overlaps_an_input_is_not_aliased() -> None:
    x, other = torch.randn(6, 6), torch.randn(6, 6)
    expected = x @ other
    y = x.clone()
    f.matmul(y, other, out=y)
    torch.testing.assert_close(y, expected)
    both = torch.cat([x, torch.zeros(1, 6)])
    f.mm(both[:6], other, out=both[1:])
    torch.testing.assert_close(both[1:], expected)
    square = x.clone()
    f.addmm(square, square, square, out=square)
    torch.testing.assert_close(square, x + x @ x)


def test_out_is_resized_with_torchs_warning() -> None:
    x = torch.randn(3, 3)
    with pytest.warns(UserWarning, match="An output with one or more elements was resized"):
        out = f.mm(x, x, out=torch.empty(2, 2))
    torch.testing.assert_close(out, x @ x)


def test_out_of_another_dtype_and_out_with_gradients_are_refused() -> None:
    x = torch.randn(3, 3)
    with pytest.raises(RuntimeError, match=r"out must have dtype torch.float32"):
        f.mm(x, x, out=torch.empty(3, 3, dtype=torch.float64))
    with pytest.raises(
        RuntimeError, match=r"functions with out=\.\.\. arguments don't support automatic differentiation"
    ):
        f.mm(x.requires_grad_(), x, out=torch.empty(3, 3))
    with torch.no_grad():
        torch.testing.assert_close(f.mm(x, x, out=torch.empty(3, 3)), x @ x)


# Values that are not numbers


@pytest.mark.parametrize("case", ACTIVATION, ids=str)
def test_nan_and_inf_propagate(case: Case) -> None:
    tensors = case.tensors()
    tensors[0].view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    exact = [t.double() for t in tensors]
    # against the plain maths: torch's own vectorised gelu gives NaN for +inf
    expected = case.ours(*exact, backend="reference").float()
    torch.testing.assert_close(case.ours(*tensors), expected, equal_nan=True)


def test_beta_zero_ignores_nan() -> None:
    out = f.addmm(torch.full((2, 2), torch.nan), torch.ones(2, 3), torch.ones(3, 2), beta=0)
    torch.testing.assert_close(out, torch.full((2, 2), 3.0))


# What only torch serves


def test_integers_and_complex_are_torchs(calls: list[Any]) -> None:
    i, z = torch.arange(6).reshape(2, 3), torch.randn(2, 3, dtype=torch.complex64)
    assert torch.equal(f.matmul(i, i.T), i @ i.T)
    assert torch.equal(f.addmm(i @ i.T, i, i.T, beta=2), torch.addmm(i @ i.T, i, i.T, beta=2))
    assert torch.equal(f.relu(i - 3), F.relu(i - 3))
    assert f.sigmoid(i).dtype == torch.float32
    torch.testing.assert_close(f.linear(z, z), F.linear(z, z))
    torch.testing.assert_close(f.tanh(z), torch.tanh(z))
    assert {call.backend for call in calls} == {"torch"}
    assert all("dtype" in call.reason for call in calls)


def test_inplace_is_torchs(calls: list[Any]) -> None:
    for name in ("relu", "leaky_relu", "relu6", "elu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh"):
        x = torch.randn(3, 4)
        expected = getattr(F, name)(x)
        assert getattr(f, name)(x, inplace=True) is x
        torch.testing.assert_close(x, expected)
    assert all(call.backend == "torch" and "inplace" in call.reason for call in calls)


def test_sparse_meta_and_negated_tensors_are_torchs(calls: list[Any]) -> None:
    x, w = torch.randn(4, 4), torch.randn(4, 4)
    sparse = x.relu().to_sparse()
    torch.testing.assert_close(f.matmul(sparse, w), torch.matmul(sparse, w))
    meta = f.linear(torch.empty(5, 4, device="meta"), torch.empty(3, 4, device="meta"), activation="relu")
    assert meta.device.type == "meta"
    assert meta.shape == (5, 3)
    negated = torch.randn(4, 4, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(f.matmul(negated, w), negated.clone() @ w)
    assert [call.backend for call in calls] == ["torch"] * 3
    assert all(call.reason for call in calls)


def test_a_subclass_keeps_its_type() -> None:
    class Tagged(Tensor):
        pass

    x = torch.randn(3, 4).as_subclass(Tagged)
    assert type(f.gelu(x)) is Tagged
    torch.testing.assert_close(
        f.linear(x, torch.ones(2, 4)).as_subclass(Tensor), x.as_subclass(Tensor).sum(1)[:, None].expand(3, 2)
    )


def test_forward_mode_tangents_are_not_lost() -> None:
    x, t, w = torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 4)
    with torch.autograd.forward_ad.dual_level():
        y = f.linear(torch.autograd.forward_ad.make_dual(x, t), w)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, t @ w.T)


def test_jit_trace_records_the_computation() -> None:
    w = torch.randn(2, 4)
    traced = torch.jit.trace(lambda x: f.gelu(f.linear(x, w)), torch.randn(3, 4))
    x = torch.randn(3, 4)
    torch.testing.assert_close(traced(x), F.gelu(F.linear(x, w)))


# Errors


X, W = torch.randn(2, 3), torch.randn(4, 3)
INDEX = torch.tensor([0, 2])
# a call, and words that our message must have; the exception's type is torch's
BAD: list[tuple[str, list[str]]] = [
    ("linear(X, torch.randn(4, 5))", ["weight", "(4, 5)", "(2, 3)"]),
    ("linear(X, W, torch.randn(5))", ["bias", "(4,)", "(5,)"]),
    ("linear(X, W.double())", ["weight", "float32", "float64"]),
    ("linear(X, W, torch.randn(4).double())", ["bias", "float32", "float64"]),
    ("linear(X, torch.randn(2, 4, 3))", ["weight", "(2, 4, 3)"]),
    ("linear(torch.tensor(1.0), W)", ["input", "weight"]),
    ("linear([1.0], W)", ["input", "Tensor", "list"]),
    ("linear(X, [1.0])", ["weight", "Tensor", "list"]),
    ("matmul(X, W)", ["other", "(2, 3)", "(4, 3)"]),
    ("matmul(X, torch.tensor(1.0))", ["other", "at least 1"]),
    ("matmul(X, W.mT.double())", ["other", "float32", "float64"]),
    ("matmul(torch.randn(2, 3, 3), torch.randn(4, 3, 3))", ["other", "(2,)", "(4,)"]),
    ("matmul(X, 2)", ["other", "Tensor", "int"]),
    ("mm(torch.randn(3), W.mT)", ["input", "matrix", "(3,)"]),
    ("mm(X, W)", ["(2, 3)", "(4, 3)"]),
    ("mm(X, [1.0])", ["mat2", "Tensor", "list"]),
    ("mv(X, torch.randn(4))", ["(2, 3)", "(4,)"]),
    ("mv(X, W)", ["vec", "vector", "(4, 3)"]),
    ("bmm(X, W)", ["input", "batch", "(2, 3)"]),
    ("bmm(torch.randn(3, 2, 2), torch.randn(4, 2, 2))", ["mat2", "3", "(4, 2, 2)"]),
    ("addmm(torch.randn(5), X, W.mT)", ["input", "(2, 4)", "(5,)"]),
    ("addmm(torch.randn(4), X, W)", ["mat1", "mat2", "(2, 3)", "(4, 3)"]),
    ("addmm(torch.randn(4).double(), X, W.mT)", ["float32", "float64"]),
    ("addmm(torch.randn(4), X[None], W.mT)", ["mat1", "matrix", "(1, 2, 3)"]),
    ("baddbmm(X, torch.randn(4, 2, 3), torch.randn(3, 3, 2))", ["(4, 2, 3)", "(3, 3, 2)"]),
    ("gelu(X, approximate='foo')", ["approximate", "none", "tanh", "foo"]),
    ("hardtanh(X, 1.0, -1.0)", ["min_val", "max_val"]),
    ("relu([1.0])", ["Tensor", "list"]),
    ("glu(X)", ["dimension", "even", "3"]),
    ("glu(X, 5)", ["dim", "-2, 1", "5"]),
    ("glu(torch.tensor(1.0))", ["scalar"]),
    ("prelu(X, torch.randn(4))", ["weight", "4", "3"]),
    ("prelu(X, torch.randn(1, 3))", ["weight", "vector", "(1, 3)"]),
    ("prelu(X, torch.randn(3).double())", ["weight", "float32", "float64"]),
    ("dropout(X, 1.5)", ["p", "between 0 and 1", "1.5"]),
    ("softmax(X, 2)", ["dim", "[-2, 1]", "2"]),
    ("log_softmax(X, -3)", ["dim", "[-2, 1]", "-3"]),
    ("cross_entropy(X, torch.tensor([0, 3]))", ["target", "3", "[0, 3)"]),
    ("cross_entropy(X, torch.tensor([0, -1]))", ["target", "-1", "[0, 3)"]),
    ("cross_entropy(X, torch.tensor([0, 1, 2]))", ["target", "(2,)", "(3,)"]),
    ("cross_entropy(X, torch.randn(2, 4))", ["target", "(2, 3)", "(2, 4)"]),
    ("cross_entropy(X, INDEX.int())", ["target", "int64", "int32"]),
    ("cross_entropy(X, INDEX.float())", ["target", "int64", "float32"]),
    ("cross_entropy(X, INDEX, torch.randn(4))", ["weight", "3", "(4,)"]),
    ("cross_entropy(X, INDEX, torch.randn(3).double())", ["weight", "float32", "float64"]),
    ("cross_entropy(X, INDEX, reduction='foo')", ["reduction", "foo", "mean"]),
    ("cross_entropy(X, INDEX, label_smoothing=2.0)", ["label_smoothing", "between 0.0 and 1.0", "2.0"]),
    ("cross_entropy(X, X, ignore_index=1)", ["ignore_index", "1"]),
    ("cross_entropy(torch.randn(2, 3, 4), torch.tensor([[0, 1, 2], [0, 1, 1]]))", ["target", "(2, 4)", "(2, 3)"]),
    ("nll_loss(X, torch.tensor([0, 3]))", ["target", "3", "[0, 3)"]),
    ("nll_loss(X, X)", ["target", "int64", "float32"]),
    ("nll_loss(X, INDEX, torch.randn(4))", ["weight", "3", "(4,)"]),
    ("nll_loss(X, INDEX, reduction='foo')", ["reduction", "foo", "mean"]),
    ("nll_loss(torch.tensor(1.0), torch.tensor(0))", ["input", "dimensions"]),
    ("mse_loss(X, torch.randn(2, 4))", ["3", "4"]),
    ("mse_loss(X, X, reduction='foo')", ["reduction", "foo", "mean"]),
]


@pytest.mark.parametrize(("call", "words"), BAD, ids=[call for call, _ in BAD])
def test_errors(call: str, words: list[str]) -> None:
    scope = {"torch": torch, "X": X, "W": W, "INDEX": INDEX}
    name = call.partition("(")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as expected:
            eval(call, {**scope, name: getattr(F, name, None) or getattr(torch, name)})
        with pytest.raises(expected.type) as raised:
            eval(call, {**scope, name: getattr(f, name)})
    assert raised.type is expected.type
    for word in words:
        assert word in str(raised.value)


def test_unknown_activation() -> None:
    for x in (X, X.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"activation got 'swish', allowed are None, gelu"):
            f.linear(x, W, activation="swish")


def test_residual_of_another_shape() -> None:
    with pytest.raises(RuntimeError, match=r"residual must have the output's shape \(2, 4\), got \(4,\)"):
        f.linear(X, W, residual=torch.randn(4))


def test_mse_loss_broadcasts_with_torchs_warning() -> None:
    x, t = torch.randn(3, 4), torch.randn(4)
    with pytest.warns(UserWarning, match=r"Using a target size \(torch.Size\(\[4\]\)\)"):
        ours = f.mse_loss(x.requires_grad_(), t.requires_grad_())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = F.mse_loss(x, t)
    torch.testing.assert_close(ours, theirs)
    for mine, expected in zip(torch.autograd.grad(ours, (x, t)), torch.autograd.grad(theirs, (x, t))):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("legacy", [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}])
def test_deprecated_reductions(legacy: dict[str, bool]) -> None:
    x = torch.randn(4, 5)
    pairs: list[tuple[str, Tensor]] = [
        ("cross_entropy", INDEX.repeat(2)),
        ("nll_loss", INDEX.repeat(2)),
        ("mse_loss", x.cos()),
    ]
    for name, target in pairs:
        with pytest.warns(UserWarning, match="deprecated"):
            ours = getattr(f, name)(x, target, **legacy)
        with pytest.warns(UserWarning, match="deprecated"):
            theirs = getattr(F, name)(x, target, **legacy)
        torch.testing.assert_close(ours, theirs)


def test_implicit_softmax_dimension() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        ours = f.softmax(x)
    torch.testing.assert_close(ours, torch.softmax(x, 0))


def test_mse_loss_weight_is_torchs() -> None:
    x, t, w = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 4)
    torch.testing.assert_close(f.mse_loss(x, t, weight=w), (w * (x - t) ** 2).sum() / w.sum())


def test_gradient_of_class_probabilities_is_torchs() -> None:
    x, t = torch.randn(3, 4), torch.rand(3, 4)
    for target, call in ((t.clone().requires_grad_(), f.cross_entropy), (t.clone().requires_grad_(), F.cross_entropy)):
        call(x, target).backward()
        torch.testing.assert_close(target.grad, -torch.log_softmax(x, 1) / 3)


@pytest.mark.parametrize("name", ["Linear", "Conv1d", "Conv2d", "Conv3d"])
def test_a_residual_is_named(name: str) -> None:
    """What torch's modules do not take has no place among what they do."""
    layer = getattr(fastnn.nn, name)(3, 3, *[1] * (name != "Linear"))
    x = torch.randn(3, 3, *[2] * (layer.weight.dim() - 2))
    torch.testing.assert_close(layer(x, residual=x), layer(x) + x)
    with pytest.raises(TypeError, match="positional argument"):
        layer(x, x)


# Dropout


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_dropout(p: float, backend: str) -> None:
    x = torch.randn(300, 100).exp()
    y = f.dropout(x, p, seed=7, backend=backend)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - p))
    spread = 5 * (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - p)) <= spread + 1e-12


def test_dropout_backward_repeats_the_mask() -> None:
    x = torch.randn(50, 40, requires_grad=True)
    y = f.dropout(x, 0.4)
    upstream = torch.randn(50, 40)
    (grad,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(grad, torch.where(y != 0, upstream / 0.6, 0))


def test_dropout_seed() -> None:
    """The mask is the seed's, whatever strides and backend; without a seed torch.manual_seed repeats it."""
    x = torch.ones(37, 41)
    masks = [f.dropout(x, 0.5, seed=seed) for seed in (0, 1, 2**40, -3)]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    for backend in ("auto", "reference", "torch"):
        assert torch.equal(masks[1], f.dropout(x, 0.5, seed=1, backend=backend))
    assert torch.equal(masks[1], f.dropout(torch.ones(41, 37).T, 0.5, seed=1))
    assert torch.equal(masks[1].flatten(), f.dropout(x.flatten(), 0.5, seed=1))
    torch.manual_seed(5)
    first, second = f.dropout(x), f.dropout(x)
    torch.manual_seed(5)
    assert torch.equal(first, f.dropout(x))
    assert not torch.equal(first, second)


def test_dropout_out_of_training_is_the_input() -> None:
    x = torch.randn(4)
    assert f.dropout(x, 0.5, training=False) is x
    assert fastnn.nn.Dropout(0.5).eval()(x) is x


@pytest.mark.parametrize("inplace", [False, True])
def test_the_dropout_module_in_training(inplace: bool) -> None:
    x, layer = torch.ones(1000), fastnn.nn.Dropout(0.5, inplace)
    y = layer(x)
    assert (y is x) == inplace
    assert 300 < int((y == 0).sum()) < 700
    assert {0.0, 2.0} == set(y.tolist())
    assert not torch.equal(layer(torch.ones(1000)), y)


def test_dropout_in_place() -> None:
    x = torch.ones(1000)
    assert f.dropout(x, 0.5, inplace=True) is x
    assert {0.0, 2.0} == set(x.tolist())
    with pytest.raises(RuntimeError, match=r"seed=3 cannot be honoured"):
        f.dropout(x, 0.5, inplace=True, seed=3)


# Autocast, modes


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_gives_torchs_dtypes(case: Case, lower: torch.dtype) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = case.tensors(dtype)
        with torch.autocast("cpu", lower):
            expected = case.torch(*tensors)
            for backend in BACKENDS:
                result = case.ours(*tensors, backend=backend)
                assert result.dtype == expected.dtype
                torch.testing.assert_close(result, expected, rtol=3e-2, atol=3e-2)


def test_autocast_trains() -> None:
    x, w = torch.randn(8, 6), torch.randn(5, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        f.cross_entropy(f.linear(x, w), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])).backward()
    ours, w.grad = w.grad, None
    F.cross_entropy(F.linear(x, w), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])).backward()
    assert ours is not None
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, w.grad, rtol=3e-2, atol=3e-3)


def test_inference_mode_and_no_grad() -> None:
    x, w = torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)
    with torch.inference_mode():
        y = f.gelu(f.linear(x, w))
        assert y.is_inference()
    with torch.no_grad():
        z = f.gelu(f.linear(x, w))
    assert not z.requires_grad
    torch.testing.assert_close(y.clone(), z)
    assert f.linear(x, w).requires_grad


def test_saved_tensor_changed_in_place_is_noticed() -> None:
    x = torch.randn(3, 4)
    y = f.linear(x, torch.randn(2, 4, requires_grad=True), backend="reference")
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpoint_repeats_dropout() -> None:
    x = torch.randn(20, 30, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda t: f.dropout(f.tanh(t), 0.5), x, use_reentrant=False)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(y != 0, 2 * (1 - torch.tanh(x) ** 2), 0))


# Modules

MODULES: list[tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = [
    (lambda m: m.Linear(6, 4), (3, 6)),
    (lambda m: m.Linear(6, 4, bias=False), (2, 3, 6)),
    *((lambda m, name=name: getattr(m, name)(), (3, 6)) for name in (
        "ReLU", "LeakyReLU", "ReLU6", "ELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh", "Hardswish", "Hardsigmoid",
        "Hardtanh", "Softplus", "PReLU", "GLU",
    )),
    (lambda m: m.ReLU(inplace=True), (3, 6)),
    (lambda m: m.LeakyReLU(0.3), (3, 6)),
    (lambda m: m.ELU(0.7), (3, 6)),
    (lambda m: m.GELU("tanh"), (3, 6)),
    (lambda m: m.Hardtanh(-0.5, 0.25), (3, 6)),
    (lambda m: m.Softplus(2.0, 3.0), (3, 6)),
    (lambda m: m.PReLU(6, 0.1), (3, 6)),
    (lambda m: m.GLU(0), (4, 6)),
    (lambda m: m.Softmax(0), (3, 6)),
    (lambda m: m.LogSoftmax(-1), (3, 6)),
    (lambda m: m.Dropout(0.5).eval(), (3, 6)),
    *((lambda m, d=d: getattr(m, f"MaxPool{d}d")(3, 2, 1), (2, 3, *[7] * d)) for d in (1, 2, 3)),
    *((lambda m, d=d: getattr(m, f"AvgPool{d}d")(3, 2, 1), (2, 3, *[7] * d)) for d in (1, 2, 3)),
    *((lambda m, d=d: getattr(m, f"AdaptiveMaxPool{d}d")(3), (2, 3, *[7] * d)) for d in (1, 2, 3)),
    *((lambda m, d=d: getattr(m, f"AdaptiveAvgPool{d}d")(3), (2, 3, *[7] * d)) for d in (1, 2, 3)),
    *((lambda m, d=d: getattr(m, f"LPPool{d}d")(2, 2), (2, 3, *[6] * d)) for d in (1, 2, 3)),
    *((lambda m, d=d: getattr(m, f"BatchNorm{d}d")(3), (2, 3, *[4] * d)) for d in (1, 2, 3)),
    *((lambda m, d=d: getattr(m, f"BatchNorm{d}d")(3, momentum=None).eval(), (2, 3, *[4] * d)) for d in (1, 2, 3)),
    *((lambda m, d=d: getattr(m, f"InstanceNorm{d}d")(3, affine=True), (2, 3, *[4] * d)) for d in (1, 2, 3)),
    (lambda m: m.GroupNorm(2, 4), (2, 4, 5)),
    (lambda m: m.LayerNorm((4, 5), bias=False), (2, 4, 5)),
    (lambda m: m.LayerNorm(5, elementwise_affine=False), (2, 4, 5)),
    (lambda m: m.RMSNorm(5, eps=0.1), (2, 4, 5)),
    (lambda m: m.RMSNorm((4, 5), elementwise_affine=False), (2, 4, 5)),
    (lambda m: m.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (lambda m: m.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (4, 9)),
    (lambda m: m.Conv2d(4, 6, (3, 2), padding="same", bias=False), (2, 4, 9, 5)),
    (lambda m: m.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect", groups=2), (2, 4, 9, 5)),
    (lambda m: m.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"), (1, 2, 3, 4, 5)),
    (lambda m: m.ConvTranspose1d(4, 6, 3, stride=2), (4, 9)),
    (lambda m: m.ConvTranspose2d(4, 6, 4, stride=2, padding=1, output_padding=1), (2, 4, 3, 5)),
    (lambda m: m.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1)), (1, 2, 3, 2, 3)),
]  # fmt: skip
LOSSES: list[tuple[Callable[[Any], nn.Module], Tensor]] = [
    (lambda m: m.CrossEntropyLoss(torch.rand(6), label_smoothing=0.1), torch.tensor([0, 5, -100])),
    (lambda m: m.CrossEntropyLoss(reduction="sum", ignore_index=2), torch.tensor([0, 5, 2])),
    (lambda m: m.NLLLoss(torch.rand(6)), torch.tensor([0, 5, -100])),
    (lambda m: m.MSELoss(reduction="none"), torch.randn(3, 6)),
]


def same(make: Callable[[Any], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    ours = make(fastnn.nn)
    torch.manual_seed(3)
    theirs = make(nn)
    return ours, theirs


@pytest.mark.parametrize(("make", "shape"), MODULES)
def test_modules(make: Callable[[Any], nn.Module], shape: tuple[int, ...]) -> None:
    ours, theirs = same(make)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    x = torch.randn(shape)
    torch.testing.assert_close(ours(x.clone()), theirs(x.clone()))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        torch.testing.assert_close(other(x.clone()), theirs(x.clone()))


@pytest.mark.parametrize(("make", "target"), LOSSES)
def test_loss_modules(make: Callable[[Any], nn.Module], target: Tensor) -> None:
    ours, theirs = same(make)
    x = torch.randn(3, 6).log_softmax(1)
    leaf, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    theirs(expected, target).sum().backward()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(module) is type(ours)
        with fastnn.trace() as calls:
            loss = module(leaf, target)
            torch.testing.assert_close(loss, theirs(x, target))
            leaf.grad = None
            loss.sum().backward()
        torch.testing.assert_close(leaf.grad, expected.grad)
        assert [call.backend for call in calls] == ["cpu", "cpu"]


def test_every_module_has_been_tested() -> None:
    tested = {type(make(fastnn.nn)).__name__ for make, _ in [*MODULES, *LOSSES]}
    tested |= {f"MaxUnpool{d}d" for d in (1, 2, 3)}  # in test_pool
    tested |= {"LinearCrossEntropyLoss"} & set(fastnn.nn.__all__)  # in test_linear_loss
    recurrent = {"LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "QRNN"}  # in test_rnn, and their functions
    steps = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
    attention = {"MultiheadAttention", "SwiGLU", "GeGLU", "Transformer"}  # in test_transformer
    attention |= {f"Transformer{part}{layer}" for part in ("Encoder", "Decoder") for layer in ("", "Layer")}
    others = {"dropout", "qrnn", "multi_head_attention_forward"}
    others |= {"sinusoidal_positions", "learned_positions", "rotary", "rotary_angles"}  # in test_positions
    others |= {"relative_shift", "t5_buckets", "t5_bias"}
    others |= {"embedding"}  # in test_embedding
    others |= {"linear_cross_entropy"}  # in test_linear_loss
    assert tested | recurrent | attention | {"Embedding"} == set(fastnn.nn.__all__)
    assert set(f.__all__) == {case.name for case in CASES} | others | steps | {f"{name}_cell" for name in steps}


def test_state_dict_travels_by_file() -> None:
    ours, theirs = nn.Sequential(fastnn.nn.Linear(3, 4), fastnn.nn.PReLU()), nn.Sequential(nn.Linear(3, 4), nn.PReLU())
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 3)
    torch.testing.assert_close(ours(x), theirs(x))


def test_softmax_cases_cover_every_dimension() -> None:
    assert {c.options["dim"] for c in SOFTMAX if c.name == "softmax"} >= {0, 1, 2, -1}
