"""embedding on the CPU: the bits of its rows, gradients against float64, options, layouts, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn
import fastnn.functional as f
from rule import DTYPES, FLOOR, randn

pytestmark = pytest.mark.usefixtures("poison", "threads")
OPTIONS: list[dict[str, Any]] = [{}, {"padding_idx": 3}, {"padding_idx": -2}, {"scale_grad_by_freq": True}]


def numbers(*shape: int, rows: int, seed: int = 0) -> Tensor:
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 33, 130])
def test_values_and_gradients(size: int, dtype: torch.dtype, calls: list[Any]) -> None:
    weight, grad = randn(41, size, dtype=dtype), randn(7, 90, size, dtype=dtype, seed=1)
    indices = numbers(7, 90, rows=41)
    indices[:, ::3] = 5  # a row that is summed in several steps
    for options in OPTIONS:
        found = []
        for space, wide in ((f, False), (F, False), (F, True)):
            leaf = (weight.double() if wide else weight).clone().requires_grad_()
            y = space.embedding(indices, leaf, **options)
            found.append((y.detach(), torch.autograd.grad(y, leaf, grad.to(leaf.dtype))[0]))
        (ours, mine), (theirs, other), (_, truth) = found
        assert torch.equal(ours, theirs)
        error, allowed = (float((t.double() - truth).abs().max()) for t in (mine, other))
        assert mine.dtype == other.dtype
        assert error <= 2 * allowed + FLOOR[dtype] * torch.finfo(dtype).eps * float(truth.abs().max())
    assert {c.backend for c in calls} == {"cpu"}


def test_kinds_of_numbers_and_layouts() -> None:
    weight = randn(41, 18)
    indices = numbers(6, 5, rows=41)
    for table in (weight, weight[:, 3:12], weight[::3], weight[3:4].expand(41, 18), weight.t().contiguous().t()):
        for index in (indices % len(table), (indices % len(table)).int(), indices.t() % len(table), indices[:, ::2] % len(table)):
            assert torch.equal(f.embedding(index, table), F.embedding(index, table))
    assert torch.equal(f.embedding(torch.tensor(3), weight), weight[3])
    leaf = weight.clone().requires_grad_()
    grad = randn(18, 30).t()
    for g in (grad, grad[:1].expand(30, 18)):
        ours, theirs = (torch.autograd.grad(s.embedding(indices.flatten(), leaf), leaf, g)[0] for s in (f, F))
        torch.testing.assert_close(ours, theirs)


def test_every_bit_is_moved() -> None:
    for dtype, integer in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)):
        bits = torch.randint(-(2**15), 2**15, (30, 8), dtype=integer) << (8 * (dtype.itemsize - 2))
        table = bits.view(dtype)
        assert torch.equal(f.embedding(torch.arange(30), table).view(integer), bits)


def test_gradients_do_not_depend_on_the_threads() -> None:
    weight, indices, grad = randn(17, 33).requires_grad_(), numbers(3000, rows=17), randn(3000, 33)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(torch.autograd.grad(f.embedding(indices, weight), weight, grad)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives(options: dict[str, Any], backend: str) -> None:
    weight = randn(6, 3, dtype=torch.float64).requires_grad_()
    indices = torch.tensor([[1, 3, 1], [5, 4, 3]])
    if not options:
        assert torch.autograd.gradcheck(lambda w: f.embedding(indices, w, backend=backend), weight)
    ours, theirs = (torch.autograd.grad(s.sin().sum(), weight, create_graph=True)[0] for s in (
        f.embedding(indices, weight, **options, backend=backend), F.embedding(indices, weight, **options)))  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    if options.get("scale_grad_by_freq"):
        return  # torch's second derivative knows nothing of the scale
    second, theirs = (torch.autograd.grad(t.square().sum(), weight)[0] for t in (ours, theirs))
    torch.testing.assert_close(second, theirs)


def test_modules(calls: list[Any]) -> None:
    indices = numbers(4, 6, rows=9)
    for options in ({}, {"padding_idx": 0}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}):
        torch.manual_seed(1)
        theirs = nn.Embedding(9, 5, **options)
        torch.manual_seed(1)
        ours = fastnn.nn.Embedding(9, 5, **options)
        assert repr(ours) == repr(theirs)
        for module in (ours, theirs):
            module(indices).sin().sum().backward()
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        assert type(nn.Sequential(theirs)[0]) is nn.Embedding
        fastnn.replace(theirs)
        assert type(theirs) is fastnn.nn.Embedding
    assert {c.backend for c in calls} == {"cpu"}


def test_sparse_gradients_are_torchs(calls: list[Any]) -> None:
    weight = randn(9, 5).requires_grad_()
    f.embedding(numbers(4, rows=9), weight, sparse=True).sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_sparse
    assert [(c.backend, c.reason) for c in calls] == [("torch", "sparse gradients are torch's")]
    with pytest.raises(RuntimeError, match="sparse gradients are torch's"):
        f.embedding(numbers(4, rows=9), weight, sparse=True, backend="cpu")


def test_use_serves_torchs_calls(calls: list[Any]) -> None:
    weight, indices = randn(9, 5), numbers(4, rows=9)
    with fastnn.use():
        for y in (F.embedding(indices, weight, 2), torch.embedding(weight, indices), nn.Embedding(9, 5, _weight=weight)(indices)):
            assert torch.equal(y, weight[indices])
    assert [c.op for c in calls] == ["embedding"] * 3


def test_small_ones_are_torchs_by_rule(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastnn.kernels.cpu.engine.overhead.RULES", True)
    monkeypatch.setattr("fastnn.kernels.cpu.embedding.SMALL", 80)
    f.embedding(numbers(4, rows=9), randn(9, 5))
    f.embedding(numbers(5, rows=9), randn(9, 5))
    assert [c.backend for c in calls] == ["torch", "cpu"]


def test_compiled() -> None:
    torch._dynamo.reset()
    step = torch.compile(lambda i, w: f.embedding(i, w, 2).sin(), fullgraph=True, backend="aot_eager")
    for n in (4, 6):
        leaf = randn(9, 5).requires_grad_()
        indices = numbers(n, rows=9)
        y = step(indices, leaf)
        torch.testing.assert_close(y, F.embedding(indices, leaf, 2).sin())
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), leaf)[0] for t in (y, F.embedding(indices, leaf, 2).sin())))


def test_empty() -> None:
    for indices, weight in ((torch.empty(0, 3, dtype=torch.int64), randn(4, 5)), (torch.tensor([1, 2]), randn(4, 0))):
        leaf = weight.requires_grad_()
        y = f.embedding(indices, leaf)
        assert y.shape == (*indices.shape, weight.shape[1])
        assert not torch.autograd.grad(y.sum(), leaf)[0].any()


W = torch.ones(4, 3)
WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda s: s.embedding(torch.tensor([1, 4]), W), "index out of range.*4.* 0 to 3"),
    (lambda s: s.embedding(torch.tensor([1, -1]), W), "index out of range.*-1.* 0 to 3"),
    (lambda s: s.embedding(torch.tensor([[1, 9]]), W.clone(), max_norm=1.0), r"index 9 out of range.*4, 3"),
    (lambda s: s.embedding(torch.tensor([1.0]), W), "indices.*Float|indices.*float32"),
    (lambda s: s.embedding(torch.tensor([1]), W[0]), r"2-D"),
    (lambda s: s.embedding(torch.tensor([1]), W, 4), "Padding_idx"),
    (lambda s: s.embedding(torch.tensor([1]), W, -5), "Padding_idx"),
]


@pytest.mark.parametrize("rules", [False, True], ids=["kernels", "rules"])
@pytest.mark.parametrize("number", range(len(WRONG)))
def test_bad_input(number: int, rules: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's error type, and a message with the numbers in it, where torch serves too"""
    monkeypatch.setattr("fastnn.kernels.cpu.engine.overhead.RULES", rules)
    call, message = WRONG[number]
    with pytest.raises(Exception) as theirs:  # whatever torch raises
        call(F)
    with pytest.raises(theirs.type, match=message) as ours:
        call(f)
    assert ours.type is theirs.type
