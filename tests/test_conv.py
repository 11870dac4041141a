"""Convolutions on the CPU against float64, beside torch: shapes, strides, formats, epilogues, gradients, kept weights."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastnn
import fastnn.functional as ours
from fastnn import ops
from fastnn._numerics import error, sum_of_magnitudes
from fastnn.kernels.cpu import conv as host
from fastnn.kernels.cpu import conv_depthwise, conv_planes, conv_winograd, matmul
from fastnn.kernels.cpu.engine import packed, workspace
from fastnn.kernels.cpu.engine.host import caches, simd
from rule import DTYPES, FLOOR, LAYOUTS, check, randn

F = torch.nn.functional
pytestmark = pytest.mark.usefixtures("poison", "threads")
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda t: t,
    "last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
}


def agree(op: str, x: Tensor, w: Tensor, b: Tensor | None = None, **options: Any) -> None:
    """Output and all gradients obey the error rule."""

    def run(space: Any, *tensors: Tensor) -> Tensor:
        return getattr(space, op)(*tensors, **options)

    tensors = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    check(run, tensors, sum_of_magnitudes(run))


# (op, input, weight, options): each takes another way through the kernels
PROBLEMS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ("conv2d", (2, 5, 9, 13), (11, 5, 3, 3), {"padding": 1}),
    "wide rows": ("conv2d", (1, 3, 4, 131), (5, 3, 3, 3), {"padding": 1}),
    "whole vectors of few channels": ("conv2d", (1, 3, 8, 104), (7, 3, 3, 3), {"padding": 1}),
    "narrow rows": ("conv2d", (3, 5, 40, 1), (7, 5, 3, 1), {"padding": (1, 0)}),
    "deep": ("conv2d", (2, 150, 5, 6), (9, 150, 3, 3), {"padding": 1}),
    "many outputs": ("conv2d", (1, 3, 5, 6), (131, 3, 2, 2), {}),
    "stride 2": ("conv2d", (2, 3, 19, 23), (6, 3, 3, 3), {"stride": 2, "padding": 1}),
    "stride 3, uneven": ("conv2d", (2, 3, 17, 20), (6, 3, 4, 3), {"stride": (3, 4), "padding": (2, 1)}),
    "dilation": ("conv2d", (2, 3, 17, 15), (6, 3, 3, 3), {"dilation": (2, 5), "padding": (2, 5)}),
    "padding beyond the kernel": ("conv2d", (1, 2, 3, 4), (3, 2, 2, 2), {"padding": 5}),
    "1x1": ("conv2d", (3, 37, 7, 9), (29, 37, 1, 1), {}),
    "1x1, long rows": ("conv2d", (3, 530, 13, 19), (21, 530, 1, 1), {}),
    "1x1, stride 2": ("conv2d", (3, 17, 7, 9), (29, 17, 1, 1), {"stride": 2}),
    "kernel is the image": ("conv2d", (5, 6, 7, 5), (8, 6, 7, 5), {}),
    "groups": ("conv2d", (2, 12, 9, 7), (20, 3, 3, 3), {"groups": 4, "padding": 1}),
    "groups of whole vectors": ("conv2d", (2, 32, 5, 23), (32, 16, 3, 3), {"groups": 2, "padding": 1, "stride": (1, 2)}),
    "depthwise": ("conv2d", (2, 19, 9, 43), (19, 1, 3, 3), {"groups": 19, "padding": 1}),
    "depthwise, stride 2": ("conv2d", (2, 11, 15, 21), (11, 1, 5, 5), {"groups": 11, "padding": 2, "stride": 2}),
    "depthwise, two filters": ("conv2d", (2, 5, 9, 11), (10, 1, 3, 3), {"groups": 5, "padding": 2, "dilation": 2}),
    "same": ("conv2d", (2, 3, 8, 9), (4, 3, 2, 4), {"padding": "same"}),
    "valid": ("conv1d", (2, 3, 50), (4, 3, 5), {"padding": "valid"}),
    "1d": ("conv1d", (2, 3, 400), (13, 3, 10), {"stride": 5, "padding": 3}),
    "1d, long kernel": ("conv1d", (2, 1, 700), (6, 1, 301), {"stride": 4}),
    "1d depthwise": ("conv1d", (2, 9, 61), (9, 1, 4), {"groups": 9, "padding": 3}),
    "3d": ("conv3d", (2, 3, 5, 6, 7), (6, 3, 3, 3, 3), {"padding": 1, "stride": (1, 2, 1)}),
    "3d depthwise": ("conv3d", (1, 9, 4, 5, 6), (9, 1, 3, 3, 3), {"groups": 9, "padding": 1}),
    "transposed": ("conv_transpose2d", (2, 5, 6, 7), (5, 9, 3, 3), {"padding": 1}),
    "transposed, stride 2": ("conv_transpose2d", (2, 5, 6, 7), (5, 9, 4, 4), {"stride": 2, "padding": 1}),
    "transposed, gaps": ("conv_transpose2d", (2, 5, 6, 7), (5, 9, 2, 1), {"stride": 3, "output_padding": (2, 1)}),
    "transposed, dilation": ("conv_transpose2d", (1, 3, 5, 4), (3, 4, 3, 3), {"dilation": 3, "stride": 2, "output_padding": 2}),
    "transposed, groups": ("conv_transpose2d", (2, 6, 5, 4), (6, 5, 3, 3), {"groups": 3, "stride": 2}),
    "transposed, depthwise": ("conv_transpose2d", (2, 11, 5, 4), (11, 1, 3, 3), {"groups": 11, "stride": 2, "padding": 1}),
    "transposed 1d": ("conv_transpose1d", (2, 3, 37), (3, 5, 4), {"stride": 3}),
    "transposed 3d": ("conv_transpose3d", (1, 3, 3, 4, 3), (3, 5, 3, 2, 3), {"stride": 2, "padding": 1}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(  # one dimension has no channels-last format
    ("problem", "form"), [(p, form) for p in PROBLEMS for form in FORMATS if form != "last" or len(PROBLEMS[p][1]) > 3]
)
def test_error_rule(problem: str, form: str, dtype: torch.dtype) -> None:
    op, x, w, options = PROBLEMS[problem]
    outputs = w[1] * options.get("groups", 1) if "transpose" in op else w[0]
    place = FORMATS[form]
    image = place(randn(*x, dtype=dtype))
    agree(op, image, place(randn(*w, dtype=dtype, seed=1)), randn(outputs, dtype=dtype, seed=2), **options)
    agree(op, image, randn(*w, dtype=dtype, seed=1), **options)


@pytest.mark.parametrize("problem", ["1d", "1d depthwise", "transposed 1d"])
def test_sequences_with_neighbouring_channels(problem: str) -> None:
    """As x.transpose(1, 2) of a sequence of vectors has them."""
    op, x, w, options = PROBLEMS[problem]
    agree(op, FORMATS["last"](randn(*x)), randn(*w, seed=1), **options)


SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 16, 17, 25])


@settings(max_examples=100)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    """Random shapes, strides in memory and numbers, with bias, residual and activation."""
    draw = data.draw
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 1, 2, 3]))
    transposed = draw(st.booleans())
    kernel, stride, dilation = ([draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(3))
    padding = [draw(st.integers(0, d * (k - 1))) for d, k in zip(dilation, kernel)]
    size = [draw(SIZES if d == dims - 1 else st.integers(1, 5)) + d_ * (k - 1)
            for d, (d_, k) in enumerate(zip(dilation, kernel))]
    more = [draw(st.integers(0, s - 1)) if transposed else 0 for s in stride]
    channels, outputs = groups * draw(SIZES), groups * draw(SIZES)
    w = (channels, outputs // groups, *kernel) if transposed else (outputs, channels // groups, *kernel)
    places = st.sampled_from([*LAYOUTS.values(), FORMATS["last"]])
    x, weight = draw(places)(randn(2, channels, *size)), draw(places)(randn(*w, seed=1))
    bias = randn(outputs, seed=2) if draw(st.booleans()) else None
    fixed = (stride, padding, dilation, transposed, more, groups)
    activation = draw(st.sampled_from([None, "relu", "silu"]))
    plain = ops.conv.conv(x, weight, bias, None, *fixed, None, backend="torch")
    residual = draw(places)(randn(*plain.shape, seed=3)) if draw(st.booleans()) else None
    args = (x, weight, bias, residual, *fixed, activation)
    expected = ops.conv.conv(*args, backend="reference")
    torch.testing.assert_close(ops.conv.conv(*args, backend="cpu"), expected, rtol=1e-4, atol=1e-3)
    grad = draw(places)(randn(*plain.shape, seed=4))
    pair = (x, grad) if transposed else (grad, x)
    problem = (*pair, kernel, stride, padding, dilation, groups)
    expected = ops.conv.conv_weight(*problem, backend="reference")
    torch.testing.assert_close(ops.conv.conv_weight(*problem, backend="cpu"), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("x_form", "w_form"), list(itertools.product(FORMATS, FORMATS)))
def test_memory_format_is_torchs(x_form: str, w_form: str, dtype: torch.dtype) -> None:
    for shape, kernel in (((2, 5, 7, 6), (4, 5, 3, 3)), ((2, 5, 7, 6), (4, 5, 1, 1)), ((2, 1, 7, 6), (4, 1, 3, 3))):
        x, w = FORMATS[x_form](randn(*shape, dtype=dtype)), FORMATS[w_form](randn(*kernel, dtype=dtype))
        for op, weight in ((ours.conv2d, w), (ours.conv_transpose2d, w.transpose(0, 1))):
            theirs = getattr(F, op.__name__)
            assert op(x, weight, backend="cpu").stride() == theirs(x, weight).stride()


def test_gradients_of_a_sum() -> None:
    """Its gradient has stride 0."""
    for op, x, w, options in PROBLEMS.values():
        tensors = [randn(*x).requires_grad_(), randn(*w).requires_grad_()]
        mine = torch.autograd.grad(getattr(ours, op)(*tensors, **options, backend="cpu").sum(), tensors)
        theirs = torch.autograd.grad(getattr(F, op)(*tensors, **options).sum(), tensors)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_the_gradient_of_the_bias_is_ours(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of long sums of one sign too, read where it lies: no sum of torch's and no copy."""
    problems = (("conv2d", (3, 2, 121, 130), (7, 2, 1, 1)), ("conv_transpose2d", (2, 2, 40, 131), (2, 5, 2, 2)),
                ("conv1d", (2, 1, 5001), (3, 1, 2)), ("conv3d", (1, 2, 9, 8, 70), (6, 2, 1, 1, 1)),
                ("conv2d", (1, 1, 3, 3), (1, 1, 3, 3)))
    for op, x, w in problems:
        outputs = w[1] if "transpose" in op else w[0]
        tensors = [FORMATS[form](randn(*s, dtype=dtype)) for s in (x, w)]
        bias = torch.zeros(outputs, dtype=dtype, requires_grad=True)
        y = getattr(ours, op)(*tensors, bias, backend="cpu")
        grad = FORMATS[form](randn(*y.shape, dtype=dtype).abs())
        theirs = torch.autograd.grad(getattr(F, op)(*tensors, bias), bias, grad)[0]
        with monkeypatch.context() as patched:
            for name in ("sum", "contiguous", "clone"):
                patched.setattr(Tensor, name, None)
            (mine,) = torch.autograd.grad(y, bias, grad)
        truth = grad.double().sum([0, *range(2, grad.dim())])
        our, their = error(mine, truth), error(theirs, truth)
        assert our.worst <= 2 * their.worst + FLOOR[dtype], (op, our.worst, their.worst)


@pytest.mark.parametrize("form", FORMATS)
def test_epilogue(form: str) -> None:
    place = FORMATS[form]
    for op, w, groups, x_shape in (
        ("conv2d", (9, 5, 3, 3), 1, (2, 5, 7, 11)), ("conv2d", (5, 1, 3, 3), 5, (2, 5, 7, 11)),
        ("conv2d", (35, 1, 3, 3), 35, (1, 35, 21, 43)), ("conv2d", (32, 5, 3, 3), 2, (2, 10, 7, 19)),
        ("conv_transpose2d", (5, 9, 3, 3), 1, (2, 5, 7, 11)), ("conv2d", (6, 5, 3, 3), 1, (1, 5, 17, 65)),
    ):  # fmt: skip
        x, weight = place(randn(*x_shape)), place(randn(*w, seed=1))
        plain = getattr(F, op)(x, weight, stride=2, groups=groups)
        bias = randn(plain.shape[1], seed=2)
        for other, activation in itertools.product(FORMATS.values(), ("relu", "relu6", "gelu", None)):
            residual = other(randn(*plain.shape, seed=3))
            z = plain + bias[:, None, None] + residual
            expected = z if activation is None else getattr(F, activation)(z)
            mine = getattr(ours, op)(x, weight, bias, 2, groups=groups, residual=residual, activation=activation, backend="cpu")
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
            assert mine.stride() == plain.stride()


@pytest.mark.parametrize("form", FORMATS)
def test_special_values_reach_what_meets_them(form: str) -> None:
    """NaN and Inf spread as in torch: nothing is multiplied by padding or by a neighbour's lane."""
    for value, groups in itertools.product((float("nan"), float("inf")), (1, 6)):
        x, w = randn(2, 6, 9, 13), randn(6, 6 // groups, 3, 3, seed=1)
        x[0, 2, 4, 12], x[1, 5, 8, 0] = value, -value
        x, w = FORMATS[form](x), FORMATS[form](w)
        torch.testing.assert_close(ours.conv2d(x, w, padding=1, groups=groups, backend="cpu"),
                                   F.conv2d(x, w, padding=1, groups=groups), equal_nan=True)  # fmt: skip
        g = randn(2, 6, 9, 13, seed=3)
        args = ([3, 3], [1, 1], [1, 1], [1, 1], groups)
        mine, theirs = (ops.conv.conv_weight(g, x, *args, backend=backend) for backend in ("cpu", "torch"))
        torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads_used", [1, 2, 3, 7])
def test_threads(threads_used: int) -> None:
    """Any number of threads; the same one gives the same bits."""
    torch.set_num_threads(threads_used)
    for name in ("3x3", "deep", "many outputs", "groups", "depthwise", "1d", "transposed, stride 2"):
        op, x, w, options = PROBLEMS[name]
        for place in FORMATS.values():
            image, weight = (place(randn(3 * s[0], *s[1:])) if len(s) > 3 else randn(*s) for s in (x, w))
            if "transpose" in op:
                weight = randn(*w)
            if options.get("groups", 1) > 1:
                weight = randn(*w)
            tensors = [image.requires_grad_(), weight.requires_grad_()]
            both = []
            for _ in range(2):
                y = getattr(ours, op)(*tensors, **options, backend="cpu")
                both.append([y, *torch.autograd.grad(y, tensors, torch.ones_like(y))])
            for a, b in zip(*both, strict=True):
                assert torch.equal(a, b)
            torch.testing.assert_close(both[0][0], getattr(F, op)(*tensors, **options), rtol=1e-4, atol=1e-3)


def test_weights_are_arranged_once_and_anew_when_they_change() -> None:
    packed.clear()
    x, conv = FORMATS["last"](randn(2, 32, 5, 5)), nn.Conv2d(32, 48, 3)
    conv.weight.data = FORMATS["last"](conv.weight.data)
    with torch.no_grad():
        for change in (lambda w: None, lambda w: w.mul_(2), lambda w: w.data.add_(1), lambda w: w[3].zero_()):
            change(conv.weight)
            for _ in range(3):
                torch.testing.assert_close(ours.conv2d(x, conv.weight, conv.bias, backend="cpu"), conv(x), rtol=1e-4, atol=1e-4)
            held = packed.held()
            assert held >= conv.weight.nbytes
        y = randn(1, 48, 4, 4)  # the same weight, in another way
        for _ in range(3):
            torch.testing.assert_close(ours.conv_transpose2d(y, conv.weight, stride=2, backend="cpu"),
                                       F.conv_transpose2d(y, conv.weight, stride=2), rtol=1e-4, atol=1e-4)  # fmt: skip
            torch.testing.assert_close(ours.conv2d(x, conv.weight, backend="cpu"), F.conv2d(x, conv.weight), rtol=1e-4, atol=1e-4)
    packed.clear()


def test_extra_memory_is_a_tile_a_thread() -> None:
    """The explicit columns of this problem would take 58 MiB; a thread's scratch memory is a cache's size."""
    for kind in (host.PLANES, host.PIXELS):
        x, w, y = (8, 64, 56, 56), (64, 64, 3, 3), (8, 64, 56, 56)
        strides = [torch.empty(s, memory_format=[torch.contiguous_format, torch.channels_last][kind], device="meta").stride()
                   for s in (x, w, y)]
        tensors = (x, strides[0], w, strides[1], y, strides[2])
        (phase,) = host._plan(kind, torch.float32, 2, *tensors, (1, 1), (1, 1), (1, 1), False, 1)
        assert phase.scratch < 2 << 20
        assert phase.arranged <= 64 * 64 * 9 * 4


def test_extra_memory_of_the_benchmarks_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory once the weight is kept, as it is from the second call on; and what is kept."""
    from fastnn.bench.cases import conv as layers

    asked: list[int] = []

    def spy(size: int, real: Callable[[int], int] = workspace.workspace) -> int:
        asked.append(size)
        return real(size)

    for module in (host, conv_depthwise, conv_planes, conv_winograd, matmul):
        monkeypatch.setattr(module, "workspace", spy)
    torch.set_num_threads(1)
    most = 4 * max(1 << 20, caches().l2)
    for case in layers.CASES:
        if "cpu" not in case.devices or case.mode == "train" or case.name.startswith("changing"):
            continue
        tensors = case.make(torch.float32)
        packed.clear()
        for _ in range(2):
            asked.clear()
            y = case.theirs(ours, *tensors)
            if case.mode == "backward":
                torch.autograd.grad(y, tensors, y.detach())
        held, weight = packed.held(), tensors[1].nbytes
        allowed = most + (weight if case.mode == "backward" else 0)  # the sums of the weight's gradient
        assert max(asked, default=0) <= allowed, f"{case.name}: {max(asked) / 2**20:.1f} MiB of scratch memory"
        ways = 1 if case.mode == "forward" else 2
        assert held <= 4.6 * ways * weight + 65536, f"{case.name}: {held / weight:.1f} weights kept"
    packed.clear()


def counted(monkeypatch: pytest.MonkeyPatch, way: str) -> list[bool]:
    """Whether that way served, call by call."""
    taken: list[bool] = []
    run = getattr(host, way)

    def counting(*args: Any) -> bool:
        taken.append(run(*args))
        return taken[-1]

    monkeypatch.setattr(host, way, counting)
    return taken


@pytest.fixture
def winograd(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call that Winograd's way took came to a finite end."""
    return counted(monkeypatch, "_run_winograd")


# input, outputs, padding: one tile and many, tiles that hang over, blocks that end within a row, one or several groups
WINOGRAD: dict[str, tuple[tuple[int, ...], int, Any]] = {
    "even": ((2, 64, 8, 12), 64, 1), "uneven": ((3, 67, 9, 7), 35, (1, 0)), "one tile": ((2, 64, 3, 4), 37, 1),
    "few channels": ((2, 17, 13, 22), 35, 1),
    "long rows": ((1, 33, 3, 301), 9, (0, 1)), "many outputs": ((1, 64, 7, 7), 203, 1), "many": ((5, 130, 14, 13), 50, 1),
}  # fmt: skip
# the same dilated, and by how much: images of several sizes in one, blocks that end within a row, one way only, another padding
DILATED: dict[str, tuple[tuple[int, ...], int, Any, Any]] = {
    "dilated": ((2, 67, 26, 31), 11, 2, 2), "dilated far": ((1, 64, 61, 67), 20, 5, 5),
    "in long rows": ((1, 65, 38, 73), 9, 3, 3), "into small images": ((1, 130, 33, 33), 20, 6, 6),
    "along rows": ((3, 64, 12, 49), 65, (1, 0), (1, 4)), "down": ((1, 67, 61, 12), 64, (2, 1), (5, 1)),
    "with another padding": ((1, 70, 25, 37), 64, (1, 2), (2, 3)),
    "into small images, many outputs": ((1, 130, 33, 33), 400, 6, 6),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [*WINOGRAD, *DILATED])
def test_winograd(shape: str, form: str, winograd: list[bool]) -> None:
    """The error rule for output and gradients, in images of one sign too; epilogues; the same bits by any number of threads."""
    x, outputs, padding, dilation = DILATED[shape] if shape in DILATED else (*WINOGRAD[shape], 1)
    place = FORMATS[form]
    for positive in (False, True):
        image, w = randn(*x), randn(outputs, x[1], 3, 3, seed=1)
        if positive:
            image, w = image.relu(), w.abs()
        agree("conv2d", place(image), place(w), randn(outputs, seed=2), padding=padding, dilation=dilation)
        agree("conv_transpose2d", place(image), place(w).transpose(0, 1).contiguous(), padding=dilation, dilation=dilation)
    assert len(winograd) >= 6
    assert all(winograd)
    options = {"padding": padding, "dilation": dilation}
    plain = F.conv2d(image, w, **options)
    residual, bias = place(randn(*plain.shape, seed=3)), randn(outputs, seed=2)
    every = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with fastnn.backend("cpu"):
            every.append(ours.conv2d(place(image), place(w), bias, **options, residual=residual, activation="relu"))
            every.append(ours.conv2d(place(image), place(w), **options))
    torch.testing.assert_close(every[0], (plain + bias[:, None, None] + residual).relu(), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(every[2:], every))


# input, weight, padding, groups: several bands of planes, planes that meet some of the filter's, fewer of them than it has
VOLUMES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]] = {
    "bands": ((1, 35, 11, 8, 13), (19, 35, 3, 3, 3), (1, 1, 1), 1), "images": ((3, 64, 5, 7, 7), (37, 64, 2, 3, 3), (0, 1, 0), 1),
    "shallow": ((2, 64, 2, 14, 15), (64, 64, 3, 3, 3), (2, 1, 1), 1), "deep": ((1, 32, 9, 6, 7), (8, 32, 5, 3, 3), (3, 0, 1), 1),
    "one plane": ((2, 66, 6, 9, 5), (50, 66, 1, 3, 3), (0, 1, 1), 1),
    "groups": ((1, 66, 4, 13, 9), (18, 33, 3, 3, 3), (1, 1, 1), 2),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", VOLUMES)
def test_winograd_in_three_dimensions(shape: str, form: str, winograd: list[bool]) -> None:
    """As ``test_winograd``"""
    x, weight, padding, groups = VOLUMES[shape]
    place, last = FORMATS[form], weight[2] - 1
    for positive in (False, True):
        image, w = randn(*x), randn(*weight, seed=1)
        if positive:
            image, w = image.relu(), w.abs()
        agree("conv3d", place(image), place(w), randn(weight[0], seed=2), padding=padding, groups=groups)
        turned = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()
        agree("conv_transpose3d", place(image), place(turned), padding=(last - padding[0], 1, 1), groups=groups)
    assert len(winograd) >= 6
    assert all(winograd)
    options: dict[str, Any] = {"padding": padding, "groups": groups}
    plain = F.conv3d(image, w, **options)
    residual, bias = place(randn(*plain.shape, seed=3)), randn(weight[0], seed=2)
    every = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with fastnn.backend("cpu"):
            every.append(ours.conv3d(place(image), place(w), bias, **options, residual=residual, activation="relu"))
    torch.testing.assert_close(every[0], (plain + bias[:, None, None, None] + residual).relu(), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(every[0], other) for other in every)
    image[0, 3, -1, 2, 4] = float("nan")
    mine = ours.conv3d(place(image), place(w), **options, backend="cpu")
    torch.testing.assert_close(mine, F.conv3d(image, w, **options), equal_nan=True, rtol=1e-4, atol=1e-3)
    assert not winograd.pop()


# op, input, weight, options: one tile and many, filters that fill their last plane or do not, several stretches of planes,
# sequences that are one pixel wide images, an image's rows, groups, dilation
ROWS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "three taps": ("conv1d", (2, 35, 131), (19, 35, 3), {"padding": 1}),
    "four": ("conv1d", (1, 64, 60), (37, 64, 4), {"padding": 2}),
    "many taps": ("conv1d", (3, 130, 70), (40, 130, 17), {"padding": 8}),
    "short": ("conv1d", (17, 32, 64), (16, 32, 63), {"padding": 1}),
    "one pixel wide": ("conv2d", (2, 33, 90, 1), (64, 33, 7, 1), {"padding": (3, 0)}),
    "rows": ("conv2d", (2, 64, 5, 17), (50, 64, 1, 7), {"padding": (0, 3)}),
    "short rows": ("conv2d", (3, 64, 11, 7), (200, 64, 1, 3), {"padding": (0, 1)}),
    "groups": ("conv1d", (2, 66, 50), (34, 33, 5), {"padding": 2, "groups": 2}),
    "dilation": ("conv1d", (2, 64, 200), (18, 64, 5), {"padding": 8, "dilation": 4}),
    "dilation, stretches": ("conv1d", (1, 64, 200), (192, 64, 15), {"padding": 35, "dilation": 5}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", ROWS)
def test_winograd_along_rows(case: str, form: str, winograd: list[bool]) -> None:
    """As ``test_winograd``, for filters of one row"""
    op, shape, weight, options = ROWS[case]
    if form == "last" and len(shape) == 3:
        shape, weight, op = (*shape[:2], 1, shape[2]), (*weight[:2], 1, weight[2]), "conv2d"
        apart = {"dilation": (1, options["dilation"])} if "dilation" in options else {}
        options = options | {"padding": (0, options["padding"])} | apart
    elif form == "last" and shape[-1] == 1:
        shape, weight, options = (*shape[:2], 1, shape[2]), (*weight[:2], 1, weight[2]), {"padding": options["padding"][::-1]}
    place, groups = FORMATS[form], options.get("groups", 1)
    for positive in (False, True):
        x, w = randn(*shape), randn(*weight, seed=1)
        if positive:
            x, w = x.relu(), w.abs()
        agree(op, place(x), place(w), randn(weight[0], seed=2), **options)
        turned = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()
        agree(f"conv_transpose{op[4:]}", place(x), place(turned), **options)
    assert len(winograd) >= 4
    assert all(winograd)
    plain = getattr(F, op)(x, w, **options)
    residual, bias = place(randn(*plain.shape, seed=3)), randn(weight[0], seed=2)
    every = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        more = {"residual": residual, "activation": "relu", "backend": "cpu"}
        every.append(getattr(ours, op)(place(x), place(w), bias, **options, **more))
    expected = plain + bias.reshape(-1, *[1] * (plain.dim() - 2)) + residual
    torch.testing.assert_close(every[0], expected.relu(), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(every[0], other) for other in every)


@pytest.mark.parametrize("form", FORMATS)
def test_winograd_by_groups(form: str, winograd: list[bool]) -> None:
    """Short rows, whose ends are written with the next one's beginnings; a number of outputs that is no vector's."""
    place = FORMATS[form]
    for positive in (False, True):
        image, w, turned = randn(3, 66, 13, 7), randn(18, 33, 3, 3, seed=1), randn(66, 9, 3, 3, seed=2)
        if positive:
            image, w, turned = image.relu(), w.abs(), turned.abs()
        agree("conv2d", place(image), place(w), randn(18, seed=3), padding=1, groups=2)
        agree("conv_transpose2d", place(image), place(turned), padding=1, groups=2)
    assert len(winograd) >= 6
    assert all(winograd)
    plain, residual = F.conv2d(image, w, randn(18, seed=3), groups=2), place(randn(3, 18, 11, 5, seed=4))
    with fastnn.backend("cpu"):
        mine = ours.conv2d(place(image), place(w), randn(18, seed=3), groups=2, residual=residual, activation="relu")
    torch.testing.assert_close(mine, (plain + residual).relu(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", FORMATS)
def test_winograd_gives_way(form: str, winograd: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a value is not finite or overflows on the way, for other dtypes and geometries, and where it is turned off."""
    x, w = randn(1, 64, 9, 9), randn(8, 64, 3, 3, seed=1)
    for value in (float("nan"), float("inf"), -float("inf"), 1e38):
        bad = x.clone()
        bad[0, 3, 8, 5], bad[0, 63, 0, 0] = value, -value
        image = FORMATS[form](bad)
        torch.testing.assert_close(ours.conv2d(image, w, padding=1, backend="cpu"), F.conv2d(image, w, padding=1), equal_nan=True,
                                   rtol=1e-4, atol=1e-3)  # fmt: skip
    assert winograd == [False] * 4
    x = FORMATS[form](x)
    others: list[dict[str, Any]] = [
        {"stride": 2}, {"dilation": 5, "padding": 5}, {"dilation": 2, "padding": 3}, {"padding": 2}, {"groups": 8}]
    for options in others:
        part = w[:, :8] if "groups" in options else w
        torch.testing.assert_close(ours.conv2d(x, part, **options, backend="cpu"), F.conv2d(x, part, **options),
                                   rtol=1e-4, atol=1e-3)  # fmt: skip
    ours.conv2d(x.double(), w.double(), backend="cpu")
    ours.conv2d(x[:, :15], w[:, :15], backend="cpu")
    monkeypatch.setattr(conv_winograd, "WINOGRAD_ALLOWED", False)
    ours.conv2d(x, w, backend="cpu")
    assert len(winograd) == 4


def test_winograd_keeps_its_weights_by_version(winograd: list[bool]) -> None:
    packed.clear()
    x, w, grad = randn(1, 64, 9, 9), randn(16, 64, 3, 3, seed=1), randn(1, 64, 9, 9, seed=2)
    for change in (lambda w: None, lambda w: w.mul_(2), lambda w: w[3].zero_()):
        change(w)
        for _ in range(3):
            torch.testing.assert_close(ours.conv2d(x, w, backend="cpu"), F.conv2d(x, w), rtol=1e-4, atol=1e-3)
        turned = w.repeat(4, 1, 1, 1)  # as a transposed convolution's, the same tensor means another filter
        for op in ("conv2d", "conv_transpose2d") * 2:
            torch.testing.assert_close(getattr(ours, op)(grad, turned, padding=1, backend="cpu"),
                                       getattr(F, op)(grad, turned, padding=1), rtol=1e-4, atol=1e-3)  # fmt: skip
        assert packed.held() >= 4 * w.nbytes
    assert len(winograd) == 21
    packed.clear()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(2, 260, 8, 8), (3, 230, 9, 11), (1, 130, 17, 33), (9, 520, 4, 4)])
def test_winograd_by_phases(shape: tuple[int, int, int, int], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``test_winograd``, where a transposed convolution doubles an image"""
    monkeypatch.setattr(conv_winograd.overhead, "RULES", False)
    phases, place, (n, channels, h, w) = counted(monkeypatch, "_run_phases"), FORMATS[form], shape
    options: dict[str, Any] = {"stride": 2, "padding": 1}
    for positive in (False, True):
        x, weight = randn(n, channels, h, w), randn(channels, 37, 4, 4, seed=1)
        if positive:
            x, weight = x.relu(), weight.abs()
        agree("conv_transpose2d", place(x), place(weight), randn(37, seed=2), **options)
        grouped = {**options, "groups": 2}
        agree("conv_transpose2d", place(x.repeat(1, 2, 1, 1)), weight.repeat(2, 1, 1, 1), None, **grouped)
    assert phases.count(True) >= 4
    plain, bias, every = F.conv_transpose2d(x, weight, **options), randn(37, seed=2), []
    residual = place(randn(*plain.shape, seed=3))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        more: dict[str, Any] = {"residual": residual, "activation": "relu", "backend": "cpu"}
        every.append(ours.conv_transpose2d(place(x), weight, bias, **options, **more))
    torch.testing.assert_close(every[0], (plain + bias[:, None, None] + residual).relu(), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(every[0], other) for other in every)
    phases.clear()
    x[0, 5, -1, 2] = float("inf")
    mine = ours.conv_transpose2d(place(x), weight, **options, backend="cpu")
    torch.testing.assert_close(mine, F.conv_transpose2d(x, weight, **options), equal_nan=True, rtol=1e-4, atol=1e-3)
    assert phases == [False]


# input, weight, options: overlapping taps and none, several bands of rows, groups of outputs, channels in parts, gaps
SCATTERED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "few outputs": ((2, 35, 19, 33), (35, 3, 4, 4), {"stride": 2, "padding": 1}),
    "one tap each": ((1, 128, 40, 17), (128, 7, 2, 2), {"stride": 2}),
    "uneven": ((3, 300, 9, 23), (300, 5, 3, 5), {"stride": (2, 3), "padding": (1, 2), "output_padding": (1, 2)}),
    "gaps": ((1, 11, 4, 18), (11, 3, 1, 2), {"stride": (3, 1)}),
    "many": ((1, 530, 21, 40), (530, 41, 3, 2), {"stride": (3, 2), "padding": (1, 0), "output_padding": 1}),
    "all padding": ((1, 7, 1, 16), (7, 2, 5, 2), {"stride": (2, 4), "padding": (2, 0), "output_padding": (0, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("problem", SCATTERED)
def test_transposed_as_a_product_and_a_sum(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error rule; epilogues; Inf and NaN; the same bits by any number of threads."""
    x_shape, w_shape, options = SCATTERED[problem]
    taken = counted(monkeypatch, "_run_scatter")
    x, w, bias = randn(*x_shape), randn(*w_shape, seed=1), randn(w_shape[1], seed=2)
    agree("conv_transpose2d", x, w, bias, **options)
    plain = F.conv_transpose2d(x, w, **options)
    residual, every = randn(*plain.shape, seed=3), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with fastnn.backend("cpu"):
            every.append(ours.conv_transpose2d(x, w, bias, **options, residual=residual, activation="relu"))
    torch.testing.assert_close(every[0], (plain + bias[:, None, None] + residual).relu(), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(a, every[0]) for a in every)
    x[0, 2, 0, 5], x[-1, 1, -1, 15] = float("inf"), float("nan")
    mine, theirs = ours.conv_transpose2d(x, w, **options, backend="cpu"), F.conv_transpose2d(x, w, **options)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert len(taken) >= 5
    assert all(taken)


# op, input, weight, options: all nine regions, some without a tap, a stride, phases, one dimension, three
REGIONS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "nine": ("conv2d", (2, 3, 13, 11), (5, 3, 3, 3), {"padding": 4, "dilation": 4}),
    "beyond": ("conv2d", (1, 3, 5, 4), (2, 3, 3, 3), {"padding": (9, 7), "dilation": (6, 3)}),
    "stride": ("conv2d", (1, 3, 13, 17), (5, 3, 3, 3), {"padding": 5, "dilation": 5, "stride": 2}),
    "phases": ("conv_transpose2d", (1, 3, 6, 7), (3, 5, 3, 3), {"padding": 5, "dilation": 5, "stride": 2, "output_padding": 1}),
    "1d": ("conv1d", (2, 3, 29), (5, 3, 5), {"padding": 16, "dilation": 8}),
    "depth": ("conv3d", (2, 3, 4, 9, 8), (5, 3, 3, 3, 3), {"padding": (3, 1, 1), "stride": (1, 2, 1)}),
    "3d": ("conv3d", (1, 3, 4, 5, 6), (2, 3, 2, 3, 2), {"padding": (3, 4, 5), "dilation": (3, 4, 5)}),
}  # fmt: skip


@pytest.mark.parametrize("problem", REGIONS)
def test_positions_that_meet_fewer_taps(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself, with the taps that it meets; forward, gradients, a residual."""
    for least in ("_LEAST_IN_REGIONS", "_LEAST_IN_PLANE"):
        monkeypatch.setattr(host, least, 1)
    monkeypatch.setattr(host, "_MOST_OF_PRODUCTS", 1.0)
    host._plan.cache_clear()
    found: list[Any] = []
    regions = host._regions

    def counting(*args: Any) -> Any:
        found.append(regions(*args))
        return found[-1]

    monkeypatch.setattr(host, "_regions", counting)
    op, x_shape, w_shape, options = REGIONS[problem]
    x, w = randn(*x_shape), randn(*w_shape, seed=1)
    agree(op, x, w, randn(w_shape["transpose" in op], seed=2), **options)
    plain = getattr(F, op)(x, w, **options)
    mine = getattr(ours, op)(x, w, **options, residual=plain, activation="relu", backend="cpu")
    torch.testing.assert_close(mine, (2 * plain).relu(), rtol=1e-4, atol=1e-4)
    assert any(len(parts) > 1 for parts in found)
    host._plan.cache_clear()


# input, weight, options: both phases of a row, uneven and short rows, several bands, phases without a tap, margins cut off
BETWEEN: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "odd": ((2, 5, 13, 19), (5, 1, 3, 3), {"padding": 1}),
    "even": ((1, 3, 6, 17), (3, 1, 5, 5), {"padding": 2, "output_padding": 1}),
    "bands": ((1, 2, 70, 90), (2, 1, 7, 7), {"padding": 3, "output_padding": (1, 0)}),
    "short": ((1, 3, 5, 3), (3, 1, 1, 1), {"output_padding": 1}), "uneven": ((1, 3, 6, 17), (3, 1, 3, 4), {"padding": (0, 5)}),
    "rows apart": ((2, 2, 3, 9), (2, 1, 2, 7), {"padding": (0, 6), "stride": (4, 2), "output_padding": 1}),
}  # fmt: skip


@pytest.mark.parametrize("problem", BETWEEN)
def test_depthwise_between(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depthwise, transposed, rows twice as long: the error rule, with and without a bias, by any number of threads."""
    x_shape, w_shape, options = BETWEEN[problem]
    taken = counted(monkeypatch, "_run_between")
    options = {"stride": 2, **options, "groups": x_shape[1]}
    x, w = randn(*x_shape), randn(*w_shape, seed=1)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        agree("conv_transpose2d", x, w, randn(x_shape[1], seed=2), **options)
        agree("conv_transpose2d", x, w.transpose(2, 3).contiguous().transpose(2, 3), None, **options)
    assert len(taken) >= 4
    assert all(taken)


# input, weight, groups, options: several bands of rows, of columns, slices of channels, parts of outputs, a margin on one side
# only, steps that taps jump, dilation, uneven filters
PADDED: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, dict[str, Any]]] = {
    "even": ((2, 12, 9, 7), (16, 3, 3, 3), 4, {"padding": 1}), "wide": ((1, 64, 7, 9), (64, 32, 3, 3), 2, {"padding": (2, 0)}),
    "bands": ((1, 8, 400, 70), (8, 4, 5, 2), 2, {"padding": (0, 3), "dilation": (1, 3)}),
    "one row": ((3, 6, 1, 21), (12, 2, 1, 4), 3, {"dilation": (1, 2)}),
    "stride": ((2, 35, 13, 15), (268, 35, 7, 7), 1, {"stride": 2, "padding": 1}),
    "stem": ((1, 3, 61, 49), (68, 3, 7, 7), 1, {"stride": (2, 3), "padding": 3}),
    "gaps": ((1, 4, 31, 3700), (64, 4, 5, 5), 1, {"stride": (3, 6), "dilation": (4, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("problem", PADDED)
def test_from_padded_planes(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error rule; epilogues; Inf and NaN; the same bits by any number of threads."""
    x_shape, w_shape, groups, options = PADDED[problem]
    taken = counted(monkeypatch, "_run_direct")
    x, w, bias = randn(*x_shape), randn(*w_shape, seed=1), randn(w_shape[0], seed=2)
    agree("conv2d", x, w, bias, groups=groups, **options)
    plain = F.conv2d(x, w, groups=groups, **options)
    residual, every = randn(*plain.shape, seed=3), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with fastnn.backend("cpu"):
            every.append(ours.conv2d(x, w, bias, groups=groups, **options, residual=residual, activation="relu"))
    torch.testing.assert_close(every[0], (plain + bias[:, None, None] + residual).relu(), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(a, every[0]) for a in every)
    x[0, 1, 0, 5], x[-1, -1, -1, -1] = float("inf"), float("nan")
    mine, theirs = ours.conv2d(x, w, groups=groups, **options, backend="cpu"), F.conv2d(x, w, groups=groups, **options)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert taken.count(True) >= 5


# op, input, weight, groups, options: few channels and many, blocks of outputs and taps that are not filled, bands of rows and
# columns, steps that taps jump, one dimension, more inputs than outputs
GROUPED: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int, dict[str, Any]]] = {
    "resnext": ("conv2d", (2, 32, 13, 14), (32, 8, 3, 3), 4, {"padding": 1}),
    "outputs": ("conv2d", (1, 12, 19, 9), (18, 4, 3, 3), 3, {"padding": (0, 2)}),
    "dilation": ("conv2d", (3, 8, 21, 40), (8, 4, 5, 2), 2, {"padding": (4, 3), "dilation": (2, 3)}),
    "row": ("conv1d", (2, 24, 3001), (16, 12, 5), 2, {"padding": 1}),
    "long filters": ("conv1d", (2, 8, 205), (16, 4, 40), 2, {"padding": 7}),
    "many outputs": ("conv2d", (1, 64, 16, 15), (640, 32, 3, 3), 2, {"padding": 1}),
    "segments": ("conv2d", (1, 8, 3, 9001), (8, 4, 2, 3), 2, {}),
    "bands": ("conv2d", (1, 64, 90, 70), (64, 32, 3, 3), 2, {"padding": 1}),
    "transposed": ("conv_transpose2d", (2, 16, 17, 11), (16, 8, 3, 3), 4, {"padding": 1}),
    "transposed, gaps": ("conv_transpose2d", (1, 16, 12, 20), (16, 4, 2, 3), 2, {"dilation": (4, 1)}),
}  # fmt: skip


def test_a_turned_weight_is_kept_by_its_groups() -> None:
    packed.clear()
    x, w = randn(1, 32, 14, 14), randn(32, 16, 3, 3, seed=1)
    for groups in (4, 4, 4, 2, 2, 2):
        mine = ours.conv_transpose2d(x, w, groups=groups, padding=1, backend="cpu")
        torch.testing.assert_close(mine, F.conv_transpose2d(x, w, groups=groups, padding=1), rtol=1e-4, atol=1e-3)
    packed.clear()


@pytest.mark.parametrize("problem", GROUPED)
def test_gradients_of_groups(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both gradients in ways of their own: the error rule, the same bits by any number of threads, values that are not finite."""
    op, x_shape, w_shape, groups, options = GROUPED[problem]
    inputs, weights = (counted(monkeypatch, way) for way in ("_run_direct", "_run_grouped_weight"))
    x, w = randn(*x_shape), randn(*w_shape, seed=1)
    agree(op, x, w, None, groups=groups, **options)
    assert inputs.count(True) >= 2 or problem in ("outputs", "bands", "many outputs")  # no multiple of four; by Winograd
    assert weights == [True]

    def gradients(space: Any, x: Tensor, grad: Tensor | None, **more: Any) -> tuple[Tensor, ...]:
        tensors = [t.detach().requires_grad_() for t in (x, w)]
        y = getattr(space, op)(*tensors, groups=groups, **options, **more)
        return torch.autograd.grad(y, tensors, randn(*y.shape, seed=3) if grad is None else grad)

    every = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        every.append(gradients(ours, x, None, backend="cpu"))
    assert all(torch.equal(a, b) for other in every for a, b in zip(every[0], other, strict=True))
    weights.clear()
    x[0, 1, ..., 0], x[-1, -1, ..., -1] = float("inf"), float("nan")
    mine, theirs = gradients(ours, x, None, backend="cpu"), gradients(F, x, None)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2, equal_nan=True)
    assert weights == [False]


# what serves, input, weight, options: rows that one vector, several, or more than half of one hold, with overlaps and without,
# fewer rows than fit at once, margins on one side, strides, two filters a channel, transposed ones, planes without distance from
# row to row, of one and three dimensions, of few and many vectors
DEPTHWISE: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "14": ("rows", (2, 5, 14, 14), (5, 1, 3, 3), {"padding": 1}), "28": ("rows", (1, 3, 28, 28), (3, 1, 5, 5), {"padding": 2}),
    "valid": ("rows", (2, 3, 11, 39), (3, 1, 7, 7), {}), "uneven": ("rows", (1, 3, 12, 21), (3, 1, 5, 5), {"padding": (3, 0)}),
    "stride": ("rows", (2, 3, 31, 45), (3, 1, 3, 3), {"padding": 1, "stride": 2}),
    "stride, even": ("rows", (1, 2, 36, 36), (2, 1, 5, 5), {"padding": 2, "stride": 2}),
    "two filters": ("rows", (2, 3, 9, 17), (6, 1, 3, 3), {"padding": 2}),
    "transposed": ("rows", (2, 3, 13, 15), (3, 1, 5, 5), {"padding": 2}),
    "7": ("flat", (2, 5, 7, 7), (5, 1, 3, 3), {"padding": 1}), "one row": ("flat", (3, 3, 37), (3, 1, 5), {"padding": 2}),
    "gaps": ("flat", (1, 3, 17, 18), (3, 1, 3, 5), {"padding": (5, 4), "dilation": (3, 2)}),
    "volume": ("flat", (2, 3, 5, 4, 6), (6, 1, 3, 3, 3), {"padding": (0, 1, 1)}),
    "transposed, flat": ("flat", (2, 4, 9, 5), (4, 1, 4, 3), {"padding": (1, 1)}),
}  # fmt: skip


@pytest.mark.skipif(simd().name not in ("avx512", "avx2"), reason="needs masked loads")
@pytest.mark.parametrize("problem", DEPTHWISE)
def test_depthwise_straight_from_the_image(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error rule; epilogues; Inf and NaN; the same bits by any number of threads; nothing written beyond a plane."""
    way, x_shape, w_shape, options = DEPTHWISE[problem]
    served = {name: counted(monkeypatch, f"_run_{name}") for name in ("rows", "flat")}
    options = {**options, "groups": x_shape[1]}
    op = f"conv_transpose{len(x_shape) - 2}d" if "transposed" in problem else f"conv{len(x_shape) - 2}d"
    x, w, bias = randn(*x_shape), randn(*w_shape, seed=1), randn(w_shape[0], seed=2)
    agree(op, x, w, bias, **options)
    agree(op, x, w, **options)
    plain = getattr(F, op)(x, w, bias, **options)
    more: dict[str, Any] = {"activation": "relu6"}
    if "transpose" not in op:
        more["residual"] = randn(*plain.shape, seed=3)
    every = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        every.append(getattr(ours, op)(x, w, bias, **options, **more, backend="cpu"))
    torch.testing.assert_close(every[0], F.relu6(plain + more.get("residual", 0)), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, every[0]) for a in every)
    x.view(-1)[3], x.view(-1)[-1] = float("inf"), float("nan")
    mine, theirs = getattr(ours, op)(x, w, **options, backend="cpu"), getattr(F, op)(x, w, **options)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    if simd().name == "avx2" and x_shape[-1] == w_shape[-1] + 4 == 7:
        way = "rows"  # seven fill more than half of a vector
    assert sum(served[way]) >= 6  # not the gradients of strided ones


# input, weight, options: channels that fill vectors and do not, several blocks of them; rows that overlap; margins; strides
CHANNELS_LAST: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "7": ("conv2d", (2, 37, 7, 7), (37, 1, 3, 3), {"padding": 1}),
    "even": ("conv2d", (1, 32, 6, 8), (32, 1, 3, 3), {"padding": 1}),
    "wide": ("conv2d", (1, 24, 9, 33), (24, 1, 5, 5), {"padding": 2}), "valid": ("conv2d", (2, 5, 11, 12), (5, 1, 7, 7), {}),
    "blocks": ("conv2d", (1, 200, 5, 5), (200, 1, 5, 5), {"padding": (2, 3)}),
    "stride": ("conv2d", (2, 19, 11, 13), (19, 1, 3, 3), {"padding": 1, "stride": 2}),
    "stride, wide": ("conv2d", (1, 17, 14, 16), (17, 1, 5, 5), {"padding": 2, "stride": 2}),
    "transposed": ("conv_transpose2d", (2, 18, 6, 5), (18, 1, 5, 5), {"padding": 2}),
}  # fmt: skip


@pytest.mark.parametrize("problem", CHANNELS_LAST)
def test_depthwise_with_channels_last(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error rule; epilogues; Inf and NaN; the same bits by any number of threads."""
    op, x_shape, w_shape, options = CHANNELS_LAST[problem]
    served = counted(monkeypatch, "_run_last")
    options = {**options, "groups": x_shape[1]}
    x, w, bias = FORMATS["last"](randn(*x_shape)), randn(*w_shape, seed=1), randn(w_shape[0], seed=2)
    agree(op, x, w, bias, **options)
    plain = getattr(F, op)(x, w, bias, **options)
    more: dict[str, Any] = {"activation": "relu6"}
    if op == "conv2d":
        more["residual"] = FORMATS["last"](randn(*plain.shape, seed=3))
    every = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        every.append(getattr(ours, op)(x, w, bias, **options, **more, backend="cpu"))
    torch.testing.assert_close(every[0], F.relu6(plain + more.get("residual", 0)), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, every[0]) for a in every)
    x[0, 1, 0, 0], x[-1, -1, -1, -1] = float("inf"), float("nan")
    mine, theirs = getattr(ours, op)(x, w, **options, backend="cpu"), getattr(F, op)(x, w, **options)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert sum(served) >= 5  # not the gradients of strided ones


# input, weight, options: of several blocks of sequences, bands of positions, parts of outputs and slices of channels, the last of
# them smaller; padding that all, some or none of the positions meet; strides, gaps
SEQUENCES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "same": ((33, 6, 16), (24, 6, 33), {"padding": 16}), "short": ((16, 20, 3), (16, 20, 40), {"padding": 31}),
    "blocks": ((101, 3, 9), (8, 3, 32), {"padding": 14}), "valid": ((17, 5, 200), (8, 5, 41), {}),
    "slices": ((48, 61, 70), (24, 61, 32), {"padding": (16,)}), "parts": ((16, 3, 12), (264, 3, 32), {"padding": 15}),
    "stride": ((20, 3, 50), (8, 3, 64), {"padding": 31, "stride": 4}),
    "gaps": ((16, 2, 40), (8, 2, 33), {"padding": 30, "dilation": 2}),
    "steps and gaps": ((18, 3, 61), (16, 3, 35), {"padding": 40, "dilation": 3, "stride": 2}),
    "few taps": ((16, 4, 8), (8, 4, 17), {"padding": 8}), "columns": ((19, 4, 20, 1), (8, 4, 36, 1), {"padding": (17, 0)}),
}  # fmt: skip


@pytest.mark.parametrize("problem", SEQUENCES)
def test_many_short_sequences(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error rule; epilogues; Inf and NaN; the same bits by any number of threads; weights kept, and new ones."""
    x_shape, w_shape, options = SEQUENCES[problem]
    served = counted(monkeypatch, "_run_batched")
    op = f"conv{len(x_shape) - 2}d"
    x, w, bias = randn(*x_shape), randn(*w_shape, seed=1), randn(w_shape[0], seed=2)
    agree(op, x, w, bias, **options)
    plain = getattr(F, op)(x, w, bias, **options)
    residual, every = randn(*plain.shape, seed=3), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        every.append(getattr(ours, op)(x, w, bias, **options, residual=residual, activation="gelu", backend="cpu"))
    torch.testing.assert_close(every[0], F.gelu(plain + residual), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(a, every[0]) for a in every)
    w.mul_(2)
    twice = getattr(ours, op)(x, w, **options, backend="cpu")
    torch.testing.assert_close(twice, getattr(F, op)(x, w, **options), rtol=1e-4, atol=1e-3)
    x.view(-1)[2], x.view(-1)[-1] = float("inf"), float("nan")
    mine, theirs = getattr(ours, op)(x, w, **options, backend="cpu"), getattr(F, op)(x, w, **options)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert served
    assert all(served)


ERRORS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("kernel", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(4, 3, 7, 7)), r"\(7, 7\).*\(5, 5\)"),
    ("channels", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(4, 2, 3, 3)), r"must have 2 channels.*got 3"),
    ("stride", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(4, 3, 3, 3), stride=0), r"stride must be at least 1, got \(0, 0\)"),
    ("padding", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(4, 3, 3, 3), padding=-1), r"padding must be at least 0, got \(-1"),
    ("dilation", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(4, 3, 3, 3), dilation=0), r"dilation must be at least 1"),
    ("rank", lambda s: s.conv2d(randn(5, 5), randn(4, 3, 3, 3)), r"\(5, 5\)"),
    ("one dimension", lambda s: s.conv1d(randn(1, 3, 5), randn(4, 3)), r"\(4, 3\)"),
    ("weight's rank", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(4, 3, 3)), r"\(4, 3, 3\)"),
    ("list", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(4, 3, 3, 3), stride=(1, 2, 3)), r"stride.*2 values.*\(1, 2, 3\)"),
    ("groups", lambda s: s.conv2d(randn(1, 4, 5, 5), randn(3, 2, 3, 3), groups=2), r"multiple of groups, 2"),
    ("no groups", lambda s: s.conv2d(randn(1, 4, 5, 5), randn(3, 2, 3, 3), groups=0), r"groups must be at least 1, got 0"),
    ("bias", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(4, 3, 3, 3), randn(3)), r"\(4,\).*got \(3,\)"),
    ("dtype", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(4, 3, 3, 3).double()), r"float32, got torch.float64"),
    ("empty", lambda s: s.conv2d(randn(1, 3, 0, 5), randn(4, 3, 3, 3)), r"\(0, 5\)"),
    ("no outputs", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(0, 3, 3, 3)), r"weight \(0, 3, 3, 3\)"),
    ("same and a stride", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(4, 3, 3, 3), stride=2, padding="same"), r"\(2, 2\)"),
    ("transposed, padding's name", lambda s: s.conv_transpose1d(randn(1, 3, 5), randn(3, 4, 3), padding="same"), r"int.*'same'"),
    ("a bool", lambda s: s.conv1d(randn(1, 3, 5), randn(4, 3, 3), dilation=True), r"dilation must be int.*True"),
    ("groups' type", lambda s: s.conv1d(randn(1, 3, 5), randn(4, 3, 3), groups=1.0), r"groups must be int.*1\.0"),
    ("padding's name", lambda s: s.conv1d(randn(1, 3, 5), randn(4, 3, 3), padding="full"), r"'full'"),
    ("no tensor", lambda s: s.conv2d([1.0], randn(4, 3, 3, 3)), r"Tensor, not list"),
    ("no int", lambda s: s.conv2d(randn(1, 3, 5, 5), randn(4, 3, 3, 3), stride=1.5), r"stride must be int.*1\.5"),
    ("output_padding", lambda s: s.conv_transpose2d(randn(1, 3, 5, 5), randn(3, 4, 3, 3), output_padding=1), r"got \(1, 1\)"),
    ("nothing left", lambda s: s.conv_transpose2d(randn(1, 3, 1, 1), randn(3, 4, 3, 3), padding=2), r"of size -1"),
]


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize(("call", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors(call: Callable[[Any], Any], message: str, rules: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastnn.kernels.cpu.engine.overhead.RULES", rules)
    with pytest.raises(Exception) as theirs:  # torch's own type is the question
        call(F)
    with pytest.raises(type(theirs.value), match=message):
        call(ours)


def test_an_output_of_size_0_is_torchs() -> None:
    """Of a transposed convolution: padding may leave nothing."""
    x, w, bias = (randn(*shape).requires_grad_() for shape in ((2, 3, 1, 5), (3, 4, 2, 3), (4,)))
    found = ours.conv_transpose2d(x, w, bias, padding=1, activation="relu")
    assert found.shape == F.conv_transpose2d(x, w, bias, padding=1).shape == (2, 4, 0, 5)
    for grad, t in zip(torch.autograd.grad(found.sum(), (x, w, bias)), (x, w, bias), strict=True):
        assert torch.equal(grad, torch.zeros_like(t))


def test_integers_and_numbers_that_torch_takes() -> None:
    """NumPy's integers, tensors of one; complex numbers, which torch serves."""
    x, w, two = randn(1, 4, 7, 7), randn(4, 2, 3, 3, seed=1), np.int64(2)
    for options in ({"stride": two, "groups": two}, {"stride": (np.int32(1), two), "padding": torch.tensor(1), "groups": 2}):
        torch.testing.assert_close(ours.conv2d(x, w, **options), F.conv2d(x, w, **options), rtol=1e-4, atol=1e-5)
    z, v = torch.complex(x, x.flip(3)), torch.complex(w, -w)
    for op in ("conv2d", "conv_transpose2d"):
        torch.testing.assert_close(getattr(ours, op)(z, v, groups=2), getattr(F, op)(z, v, groups=2))


def test_unknown_activation_and_residual_of_another_shape() -> None:
    x, w = randn(1, 3, 5, 5), randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match="activation got 'softmax'"):
        ours.conv2d(x, w, activation="softmax")
    with pytest.raises(RuntimeError, match=r"residual must have shape \(1, 4, 3, 3\).*got \(1, 4, 5, 5\)"):
        ours.conv2d(x, w, residual=randn(1, 4, 5, 5))


def test_replace_serves_a_network() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, stride=2), nn.Conv2d(8, 16, 1),
                        nn.ConvTranspose2d(16, 4, 2, stride=2)).eval()  # fmt: skip
    x = randn(2, 3, 11, 11)
    with torch.no_grad():
        expected = net(x)
        fastnn.replace(net)
        with fastnn.trace() as calls:
            torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert [c.op for c in calls] == ["conv", "activation", "conv", "conv", "conv"]


def test_rules_leave_to_torch_what_it_does_faster(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    """By shape alone, never with an epilogue, and not when a backend was named; bad arguments meet our own messages."""
    monkeypatch.setattr("fastnn.kernels.cpu.engine.overhead.RULES", True)
    small, w = randn(1, 3, 9, 9), randn(4, 3, 1, 1)
    big, deep = randn(1, 64, 40, 40), randn(64, 1, 3, 3)
    ours.conv2d(small, w)
    ours.conv2d(small, w, activation="relu")
    ours.conv2d(small, w, backend="cpu")
    ours.conv2d(small, randn(4, 3, 3, 3))
    ours.conv2d(big, deep, groups=64)
    ours.conv_transpose2d(big[..., :20].contiguous(), deep, groups=64, stride=3)
    ours.conv2d(FORMATS["last"](big), FORMATS["last"](randn(64, 64, 5, 5)))
    ours.conv2d(FORMATS["last"](big), FORMATS["last"](randn(64, 64, 3, 3)))
    ours.conv2d(FORMATS["last"](big), FORMATS["last"](randn(160, 64, 3, 3)))
    ours.conv2d(FORMATS["last"](randn(1, 5, 9, 9)), FORMATS["last"](randn(160, 5, 3, 3)))
    ours.conv2d(small.double(), w.double())
    served = ["torch", "cpu", "cpu", "cpu", "cpu", "torch", "torch", "cpu", "cpu", "torch", "cpu"]
    assert [c.backend for c in calls] == served
    assert "this small" in calls[0].reason
    with pytest.raises(RuntimeError, match="must have 2 channels"):
        ours.conv2d(small, randn(4, 2, 3, 3))
