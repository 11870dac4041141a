"""Normalisation on the CPU against float64 and beside torch: values, statistics, gradients, layouts, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn
import fastnn.functional as f
from fastnn.kernels.cpu import norm
from rule import DTYPES, FLOOR, randn
from test_pool import LAYOUTS

pytestmark = pytest.mark.usefixtures("poison", "threads")
#: Two-dimensional; runs shorter than a vector, longer, of more than a block; channels fewer than a vector and more; rows
#: of more than a block; more images than threads and less
SHAPES = [
    (2, 3), (70, 34), (3, 4, 17), (2, 6, 5, 7), (3, 34, 9, 11), (1, 8, 47, 71), (2, 4, 2, 3, 4),
    (300, 6, 2), (5, 2, 1, 1), (1, 1, 9),
]  # fmt: skip


def lay(x: Tensor, layout: str) -> Tensor:
    if x.dim() == 2:
        return x if layout == "contiguous" else x.t().contiguous().t()
    return LAYOUTS[layout](x, x.dim() - 2)


class Work:
    """One call with its parameters, to run in torch, in fastnn and in float64"""

    def __init__(self, kind: str, x: Tensor, affine: bool = True, groups: int = 1, parameters: torch.dtype | None = None) -> None:
        c, dtype = x.shape[1], parameters or x.dtype
        self.kind, self.groups, self.x = kind, groups, x
        self.weight = randn(c, dtype=dtype, seed=2) if affine else None
        self.bias = randn(c, dtype=dtype, seed=3) if affine else None
        self.mean = (x.double().mean() + randn(c, seed=4)).to(dtype)
        self.var = (randn(c, seed=5).abs() + 0.5).to(dtype)
        self.grad = randn(*x.shape, dtype=x.dtype, seed=6)

    def run(self, space: Any, wide: bool = False) -> list[Tensor]:
        """The output, the gradients, and the running statistics after the call"""
        def leaf(t: Tensor | None) -> Any:
            return None if t is None else (t.double() if wide else t).detach().requires_grad_()
        x, weight, bias = leaf(self.x), leaf(self.weight), leaf(self.bias)
        mean, var = (t.double() if wide else t.clone() for t in (self.mean, self.var))
        if self.kind == "group":
            y = space.group_norm(x, self.groups, weight, bias)
        elif self.kind == "instance":
            y = space.instance_norm(x, mean, var, weight, bias, True, 0.3)
        else:
            y = space.batch_norm(x, mean, var, weight, bias, self.kind == "train", 0.3)
        leaves = [t for t in (x, weight, bias) if t is not None]
        return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, self.grad.to(y.dtype))]

    def check(self) -> None:
        """The error rule, counted at the largest value of each result: sums and differences cancel"""
        before = self.x.clone()
        with fastnn.backend("cpu"):
            ours = self.run(f)
        assert torch.equal(self.x, before)
        for n, (mine, theirs, truth) in enumerate(zip(ours, self.run(F), self.run(F, True), strict=True)):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            assert mine.isfinite().all()
            allowed, error = (float((t.double() - truth).abs().max()) for t in (theirs, mine))
            ulp = torch.finfo(mine.dtype).eps * max(1.0, float(truth.abs().max()))
            assert error <= 2 * allowed + 2 * FLOOR[mine.dtype] * ulp, f"result {n}: {error:.3g}, torch's own {allowed:.3g}"


def single(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether torch refuses it, because the moments would be those of a single value."""
    pixels = torch.Size(shape[2:]).numel()
    return {"train": shape[0] * pixels, "instance": pixels}.get(kind) == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(k, s) for k in ("train", "eval", "group", "instance") for s in SHAPES if not single(k, s)],
    ids=str,
)
def test_values_and_gradients(kind: str, shape: tuple[int, ...], layout: str) -> None:
    scale = torch.linspace(0.5, 2, shape[1]).reshape(-1, *[1] * (len(shape) - 2))
    for mean, affine in ((0.0, True), (100.0, False)):
        x = lay(randn(*shape) * scale + mean, layout)
        for groups in {1, shape[1] // 2 if shape[1] % 2 == 0 else 1} if kind == "group" else (1,):
            Work(kind, x, affine, groups).check()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["train", "eval", "group", "instance"])
def test_dtypes(kind: str, layout: str, dtype: torch.dtype) -> None:
    for shape in ((2, 6, 5, 7), (3, 34, 9)):
        x = lay((randn(*shape) + 3).to(dtype), layout)
        Work(kind, x, groups=2).check()
        if dtype.itemsize == 2:  # as autocast leaves a model's parameters
            Work(kind, x, groups=2, parameters=torch.float32).check()


@pytest.mark.parametrize("layout", ["rotated", "stepped", "sliced", "channels_last_sliced"])
@pytest.mark.parametrize("kind", ["train", "eval", "group", "instance"])
def test_layouts(kind: str, layout: str) -> None:
    for shape in ((2, 6, 5, 7), (3, 4, 9), (2, 4, 3, 4, 5)):
        Work(kind, lay(randn(*shape), layout), groups=2).check()
    Work(kind, randn(1, 4, 1, 5).expand(3, 4, 6, 5), groups=2).check()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["train", "eval", "group"])
def test_results_past_the_caches(kind: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As results larger than the caches are stored, where whole vectors follow each other; and where they do not."""
    went: list[bool] = []
    real = norm._past

    def past(*args: int) -> bool:
        went.append(real(*args))
        return went[-1]

    monkeypatch.setattr(norm, "_KEPT", 0.0)
    monkeypatch.setattr(norm, "_past", past)
    for shape in ((3, 16, 5, 16), (2, 48, 8, 8), (2, 6, 5, 7)):
        Work(kind, lay(randn(*shape), layout), groups=2).check()
    assert True in went
    assert False in went


@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_means(layout: str, mean: float) -> None:
    """A mean of ten thousand deviations: the sum of squares minus the square of the sum has no digit left in float32. Of a
    million: not even the mean itself fits into one."""
    x = lay(randn(4, 8, 20, 30).double() + mean, layout).float()
    y = f.batch_norm(x, None, None, training=True, backend="cpu")
    wide = x.double()
    exact = (wide - wide.mean((0, 2, 3), keepdim=True)) / (wide.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    assert float((y - exact).abs().max()) < 2e-6
    shifted = x - mean
    shifted[0, :, 0, 0] = 1e6  # the first value says nothing about the others
    y = f.group_norm(shifted, 8, backend="cpu")
    wide = shifted.double()
    exact = (wide - wide.mean((2, 3), keepdim=True)) / (wide.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_specials_stay_in_their_unit(layout: str) -> None:
    for value in (float("nan"), float("inf")):
        x = randn(3, 5, 6, 7)
        x[1, 2, 3, 4] = value
        x = lay(x, layout)
        for ours, theirs in (
            (f.batch_norm(x, None, None, training=True, backend="cpu"), F.batch_norm(x, None, None, training=True)),
            (f.group_norm(x, 5, backend="cpu"), F.group_norm(x, 5)),
            (f.batch_norm(x, torch.zeros(5), torch.ones(5), backend="cpu"), F.batch_norm(x, torch.zeros(5), torch.ones(5))),
        ):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_output_keeps_the_memory_format() -> None:
    for kind, x in (("train", randn(2, 4, 5, 6)), ("group", randn(2, 4, 3, 5, 6))):
        last = lay(x, "channels_last")
        ours, theirs = Work(kind, last).run(f), Work(kind, last).run(F)
        assert ours[0].stride() == theirs[0].stride()
        assert ours[3].stride(1) == 1


def test_only_needed_gradients() -> None:
    x, w, b = randn(3, 4, 5), randn(4, seed=1), randn(4, seed=2)
    for needed in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        leaves = [t.clone().requires_grad_(n) for t, n in zip((x, w, b), needed, strict=True)]
        for call in (lambda s: s.batch_norm(leaves[0], None, None, *leaves[1:], training=True),  # noqa: B023
                     lambda s: s.group_norm(leaves[0], 2, *leaves[1:])):  # noqa: B023
            wanted = [t for t, n in zip(leaves, needed, strict=True) if n]
            ours, theirs = (torch.autograd.grad(call(s).sin().sum(), wanted) for s in (f, F))
            torch.testing.assert_close(ours, theirs)


def test_same_bits_again() -> None:
    for layout in ("contiguous", "channels_last"):
        work = Work("train", lay(randn(4, 16, 20, 20), layout))
        for a, b in zip(work.run(f), work.run(f), strict=True):
            assert torch.equal(a, b)


MODULES: list[tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = [
    (lambda m: m.BatchNorm1d(4), (5, 4)),
    (lambda m: m.BatchNorm2d(4, momentum=None), (3, 4, 5, 2)),
    (lambda m: m.BatchNorm2d(4, momentum=0.7, affine=False, eps=0.1), (3, 4, 5, 2)),
    (lambda m: m.BatchNorm3d(4, track_running_stats=False), (2, 4, 3, 2, 2)),
    (lambda m: m.InstanceNorm1d(4), (4, 7)),
    (lambda m: m.InstanceNorm2d(4, affine=True, track_running_stats=True, momentum=0.4), (3, 4, 5, 2)),
    (lambda m: m.GroupNorm(2, 4, eps=0.1), (3, 4, 5, 2)),
]


@pytest.mark.parametrize("number", range(len(MODULES)))
def test_modules_train_and_keep_statistics(number: int, calls: list[Any]) -> None:
    """Three steps of training, then evaluation: outputs, statistics, counts and gradients are torch's"""
    make, shape = MODULES[number]
    ours, theirs = make(nn), make(nn)
    fastnn.replace(ours)
    assert type(ours).__module__ == "fastnn.nn.norm"
    for step in range(3):
        x = randn(*shape, seed=step) * (step + 1) + step
        torch.testing.assert_close(ours(x), theirs(x))
    upstream = randn(*shape, seed=9)
    grads = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(module(leaf), [leaf, *module.parameters()], upstream))
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert {c.backend for c in calls} == {"cpu"}


def test_compiled_training_updates_the_statistics() -> None:
    ours, theirs = fastnn.nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    torch._dynamo.reset()
    step = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        x = randn(2, 3, 4, 5, seed=seed)
        torch.testing.assert_close(step(x), theirs(x))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


# Errors


X, W = torch.ones(2, 4, 3, 3), torch.ones(4)
WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda s: s.batch_norm(X, None, None, torch.ones(5), None, True), "weight.*4.*5"),
    (lambda s: s.batch_norm(X, None, None, None, torch.ones(3), True), "bias.*4.*3"),
    (lambda s: s.batch_norm(X, torch.ones(5), torch.ones(5)), "running_mean.*4.*5"),
    (lambda s: s.batch_norm(X, torch.ones(5), torch.ones(5), training=True), "running_mean.*4.*5"),
    (lambda s: s.batch_norm(X, None, None), "running_mean"),
    (lambda s: s.batch_norm(X, W, None, training=True), "running_mean"),
    (lambda s: s.batch_norm(torch.ones(1, 4), None, None, training=True), "1, 4"),
    (lambda s: s.batch_norm(torch.ones(4), None, None, training=True), "4"),
    (lambda s: s.batch_norm(X, W, W, training=True, eps=0.0), "0.0"),
    (lambda s: s.batch_norm(X, W, W, eps=-1.0), "-1.0"),
    (lambda s: s.batch_norm(X, None, None, W.double(), W.double(), True), "dtype"),
    (lambda s: s.batch_norm(X.long(), W, W), "Long"),
    (lambda s: s.batch_norm(X, W, None), "running_var"),
    (lambda s: s.batch_norm(X, W.clone().requires_grad_(), W), "running_mean"),
    (lambda s: s.instance_norm(X, W, W.clone().requires_grad_()), "running_var"),
    (lambda s: s.instance_norm(X, W, None), "both be None"),
    (lambda s: s.group_norm(X, 0), "got 0"),
    (lambda s: s.group_norm(X, -2), "-2"),
    (lambda s: s.group_norm(W, 0), "4"),
    (lambda s: s.group_norm(X, 3), "3"),
    (lambda s: s.group_norm(X, 2, torch.ones(5)), "5"),
    (lambda s: s.group_norm(torch.ones(3), 1), "3"),
    (lambda s: s.group_norm(torch.ones(1, 4), 4), "1, 4"),
    (lambda s: s.instance_norm(torch.ones(2, 4)), "2, 4"),
    (lambda s: s.instance_norm(torch.ones(2, 4, 1)), "2, 4, 1"),
    (lambda s: s.instance_norm(X, weight=torch.ones(5)), "5"),
    (lambda s: s.instance_norm(X, torch.ones(5), torch.ones(5)), "5"),
    (lambda s: s.instance_norm(X, use_input_stats=False), "running_mean"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_bad_input(number: int) -> None:
    """torch's error type, and a message with the numbers in it"""
    call, message = WRONG[number]
    with pytest.raises(Exception) as theirs:  # whatever torch raises
        call(F)
    with pytest.raises(theirs.type, match=message) as ours:
        call(f)
    assert ours.type is theirs.type


def test_empty_is_torchs(calls: list[Any]) -> None:
    for x in (X[:0], X[:, :, :0]):
        assert f.batch_norm(x, W, W).shape == x.shape
        assert f.group_norm(x, 2).shape == x.shape
        mean = W.clone()
        assert f.batch_norm(x, mean, W.clone(), training=True).shape == x.shape
    assert f.batch_norm(X[:, :0], W[:0], W[:0], training=True).shape == (2, 0, 3, 3)
    for x in (X[:0], X[:, :0]):
        means = [torch.zeros(x.shape[1]) for _ in range(2)]
        for space, mean in zip((F, f), means, strict=True):
            assert space.instance_norm(x, mean, torch.ones_like(mean)).shape == x.shape
        torch.testing.assert_close(means[1], means[0], equal_nan=True)
    assert {c.backend for c in calls} == {"torch"}
