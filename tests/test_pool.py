"""Pooling on the CPU against float64 and beside torch: values, indices, gradients, layouts, errors."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastnn
import fastnn.functional as f
from fastnn.ops import pool as ops
from rule import check, randn

pytestmark = pytest.mark.usefixtures("poison", "threads")
INF, NAN = float("inf"), float("nan")
HALVES = (torch.bfloat16, torch.float16)

#: Rows shorter than a vector, of several, and of several and a rest; planes of one pixel; one channel; no batch
SHAPES = {
    1: [(2, 3, 17), (3, 70), (1, 1, 131)],
    2: [(2, 3, 7, 9), (1, 37, 6, 5), (2, 2, 4, 75), (3, 9, 11)],
    3: [(2, 3, 5, 6, 19), (2, 4, 7, 9)],
}
#: kernel, stride, padding, dilation, ceil_mode: overlapping, apart, with gaps, past the end
WINDOWS: list[tuple[Any, ...]] = [
    (2, 2, 0, 1, False), (3, 2, 1, 1, False), (3, 1, 1, 1, False), (2, 1, 0, 2, True), (3, 3, 1, 1, True),
    (2, 3, 1, 1, True), (3, 2, 1, 2, True), (4, 5, 2, 1, False),
]  # fmt: skip


def fits(shape: tuple[int, ...], dims: int, window: tuple[Any, ...]) -> bool:
    kernel, _, padding, dilation, _ = window
    return all(n + 2 * padding >= dilation * (kernel - 1) + 1 for n in shape[-dims:])


CASES = [(dims, shape, window) for dims in (1, 2, 3) for shape in SHAPES[dims] for window in WINDOWS if fits(shape, dims, window)]


def inside(t: Tensor, dims: int) -> Tensor:
    for d in range(-dims, 0):
        t = t.narrow(d, 1, t.shape[d] - 3)
    return t


def channels_last(t: Tensor, dims: int) -> Tensor:
    return t.movedim(-dims - 1, -1).contiguous().movedim(-1, -dims - 1)


LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "contiguous": lambda t, dims: t.contiguous(),
    "channels_last": channels_last,
    "rotated": lambda t, dims: t.mT.contiguous().mT,
    "stepped": lambda t, dims: t.new_full((*t.shape[:-1], 2 * t.shape[-1]), NAN)[..., ::2].copy_(t),
    "sliced": lambda t, dims: inside(F.pad(t, [1, 2] * dims, value=NAN), dims),
    "channels_last_sliced": lambda t, dims: channels_last(F.pad(t, [0, 0] * dims + [2, 3], value=NAN), dims).narrow(
        -dims - 1, 2, t.shape[-dims - 1]
    ),
}


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, seed: int = 7) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of x for a gradient of the output that is neither constant nor symmetric"""
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, randn(*y.shape, dtype=y.dtype, seed=seed))[0]


def agree(function: Callable[[Any, Tensor], Tensor], x: Tensor, scale: float = 1.0) -> None:
    """Value and gradient of function(namespace, x) are torch's; nothing else than our kernels has served"""
    with fastnn.backend("cpu"):
        ours = gradient(lambda x: function(f, x), x)
    theirs = gradient(lambda x: function(F, x), x)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * scale, equal_nan=True)


@pytest.mark.parametrize(("dims", "shape", "window"), CASES)
def test_max_pool(dims: int, shape: tuple[int, ...], window: tuple[Any, ...]) -> None:
    name = f"max_pool{dims}d"
    x = randn(*shape)
    for layout in ("contiguous", "channels_last"):
        lying = LAYOUTS[layout](x, dims)
        agree(lambda space, x: getattr(space, name)(x, *window), lying)
        ours = getattr(f, name)(lying, *window, return_indices=True, backend="cpu")
        theirs = getattr(F, name)(lying, *window, return_indices=True)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[1].dtype == torch.int64


@pytest.mark.parametrize(("dims", "shape", "window"), [c for c in CASES if c[2][3] == 1])
def test_avg_pool(dims: int, shape: tuple[int, ...], window: tuple[Any, ...]) -> None:
    kernel, stride, padding, _, ceil_mode = window
    x = randn(*shape)
    for layout, include, divisor in [("contiguous", True, None), ("contiguous", False, None), ("channels_last", True, 3),
                                     ("channels_last", False, None), ("channels_last", True, None), ("contiguous", True, -2)]:
        more = (divisor,) if dims > 1 else ()
        agree(
            lambda s, x: getattr(s, f"avg_pool{dims}d")(x, kernel, stride, padding, ceil_mode, include, *more),  # noqa: B023
            LAYOUTS[layout](x, dims),
        )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 23])
@pytest.mark.parametrize(("dims", "shape"), [(dims, shape) for dims in (1, 2, 3) for shape in SHAPES[dims]])
def test_adaptive(dims: int, shape: tuple[int, ...], size: int) -> None:
    """Windows that divide the input, that overlap, that are smaller than a pixel"""
    if dims == 3 and size == 23:
        size = 7
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](randn(*shape), dims)
        agree(lambda space, x: getattr(space, f"adaptive_max_pool{dims}d")(x, size), x)
        agree(lambda space, x: getattr(space, f"adaptive_avg_pool{dims}d")(x, size), x)
        ours = getattr(f, f"adaptive_max_pool{dims}d")(x, size, return_indices=True, backend="cpu")
        theirs = getattr(F, f"adaptive_max_pool{dims}d")(x, size, return_indices=True)
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dims", "shape"), [(1, (2, 3, 17)), (2, (2, 5, 9, 11)), (3, (2, 3, 5, 4, 9))])
def test_layouts(layout: str, dims: int, shape: tuple[int, ...]) -> None:
    """Any strides, of the input and of the gradient; the output and the gradient have the input's memory format."""
    x = LAYOUTS[layout](randn(*shape), dims)
    windows = (("max_pool", (3, 2, 1)), ("avg_pool", (3, 2, 1)), ("adaptive_avg_pool", (2,)), ("avg_pool", (shape[2:],)))
    for name, window in windows:
        function, theirs = getattr(f, f"{name}{dims}d"), getattr(F, f"{name}{dims}d")
        leaf = x.detach().requires_grad_()
        y = function(leaf, *window, backend="cpu")
        expected = theirs(leaf, *window)
        torch.testing.assert_close(y, expected)
        if dims < 3:
            assert y.stride() == expected.stride()
        elif layout.startswith("channels_last"):
            assert y.stride(1) == 1
        grad = LAYOUTS[layout](randn(*y.shape, seed=3), dims)
        (mine,), (other,) = torch.autograd.grad(y, leaf, grad), torch.autograd.grad(expected, leaf, grad)
        torch.testing.assert_close(mine, other)
        if layout in ("contiguous", "channels_last"):
            assert (mine.stride(1) == 1) == (layout == "channels_last")


def test_expanded_and_empty() -> None:
    for x in (randn(1, 3, 1, 9).expand(4, 3, 7, 9), randn(2, 1, 7, 1).expand(2, 5, 7, 6)):
        agree(lambda space, x: space.max_pool2d(x, 3, 2, 1), x)
        agree(lambda space, x: space.avg_pool2d(x, 3, 2, 1), x)
    for function in (lambda s, x: s.max_pool2d(x, 2), lambda s, x: s.avg_pool2d(x, 2), lambda s, x: s.adaptive_avg_pool2d(x, 3)):
        agree(function, randn(0, 3, 5, 5))
    for function in (f.adaptive_avg_pool2d, f.adaptive_max_pool2d):
        y, grad = gradient(lambda x: function(x, (0, 2), backend="cpu"), randn(2, 3, 5, 5))  # noqa: B023
        assert y.shape == (2, 3, 0, 2)
        assert not grad.any()
    assert f.adaptive_avg_pool2d(torch.ones(2, 0, 4, 4), 2, backend="cpu").shape == (2, 0, 2, 2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_inf_and_ties(layout: str) -> None:
    """The first of equal maxima, the last NaN, -Inf where there is nothing else: wherever in the vector or the row"""
    generator = torch.Generator().manual_seed(5)
    values = torch.tensor([NAN, INF, -INF, -INF, -0.0, 0.0, 1.0, 1.0, -2.0, -3.0])
    for shape in ((2, 3, 9, 35), (3, 21, 6, 7)):
        for some in (values, values[1:], values[2:4], values[4:6]):
            x = LAYOUTS[layout](some[torch.randint(len(some), shape, generator=generator)], 2)
            for window in ((2, 2), (3, 1, 1), (3, 2, 1), (3, 3, 1, 1, True), (2, 1, 0, 3), (5, 3, 2)):
                ours = f.max_pool2d(x, *window, return_indices=True, backend="cpu")
                theirs = F.max_pool2d(x, *window, return_indices=True)
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(f.max_pool2d(x, *window, backend="cpu"), theirs[0], rtol=0, atol=0, equal_nan=True)
                mine, other = (gradient(lambda x: s.max_pool2d(x, *window), x)[1] for s in (f, F))  # noqa: B023
                torch.testing.assert_close(mine, other)
            ours, theirs = (s.adaptive_max_pool2d(x, (4, 5), return_indices=True) for s in (f, F))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
            agree(lambda s, x: s.avg_pool2d(x, 3, 2, 1), x)


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(layout: str, dtype: torch.dtype) -> None:
    """Against float64, beside torch: overlapping gradients are summed before they are rounded."""
    for shape in ((2, 3, 9, 21), (2, 37, 5, 4)):
        x = LAYOUTS[layout](randn(*shape, dtype=dtype), 2).detach().requires_grad_()
        check(lambda s, x: s.max_pool2d(x, 3, 1, 1), [x])
        check(lambda s, x: s.max_pool2d(x, 2, 2), [x])
        check(lambda s, x: s.avg_pool2d(x, 3, 2, 1), [x], lambda inputs, grad: sizes(inputs, grad))
        check(lambda s, x: s.adaptive_avg_pool2d(x, 1), [x], lambda inputs, grad: sizes(inputs, grad))
        values, indices = f.max_pool2d(x.detach(), 3, 2, 1, return_indices=True, backend="cpu")
        assert torch.equal(indices, F.max_pool2d(x.detach(), 3, 2, 1, return_indices=True)[1])
        assert values.dtype == dtype


def sizes(inputs: Any, grad: Tensor | None) -> tuple[Tensor]:
    """A mean may cancel: counted at 1, which is what its terms are"""
    return (torch.ones(()).double() if grad is None else torch.ones_like(inputs[0]).double(),)


def test_long_means_are_exact() -> None:
    """Of 2^18 pixels each, in one row and in columns: sums of float32 would be off in the fourth digit."""
    x = torch.rand(1, 2, 512, 512) + 100
    exact = x.double().mean((2, 3), keepdim=True)
    for layout in ("contiguous", "channels_last"):
        y = f.adaptive_avg_pool2d(LAYOUTS[layout](x, 2), 1, backend="cpu")
        assert float((y - exact).abs().max()) < 1e-4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_max_unpool(dims: int, layout: str) -> None:
    torch.use_deterministic_algorithms(False)  # under which torch refuses; our outputs are zeroed anyway
    x = LAYOUTS[layout](randn(2, 3, *[8] * dims), dims)
    pooled, indices = getattr(F, f"max_pool{dims}d")(x, 2, return_indices=True)
    agree(lambda s, p: getattr(s, f"max_unpool{dims}d")(p, indices, 2), pooled)
    agree(lambda s, p: getattr(s, f"max_unpool{dims}d")(p, indices, 2, output_size=[9] * dims), pooled)
    for dtype in (torch.float64, *HALVES):
        mine = getattr(f, f"max_unpool{dims}d")(pooled.to(dtype), indices, 2, backend="cpu")
        assert torch.equal(mine.float(), getattr(F, f"max_unpool{dims}d")(pooled.to(dtype).float(), indices, 2))
    module, theirs = getattr(fastnn.nn, f"MaxUnpool{dims}d")(2), getattr(nn, f"MaxUnpool{dims}d")(2)
    assert torch.equal(module(pooled, indices), theirs(pooled, indices))
    for wrong in (indices + 8**dims, indices - 8**dims):
        with pytest.raises(RuntimeError, match=r"invalid max index: -?[0-9]+ .*8"):
            getattr(f, f"max_unpool{dims}d")(pooled, wrong, 2, backend="cpu")


def test_lp_pool() -> None:
    for p, shape in itertools.product((1, 2, 2.5, 3, INF, -INF), ((2, 3, 9, 7), (3, 9, 7))):
        x = randn(*shape).abs() + 0.1
        agree(lambda s, x: s.lp_pool2d(x, p, 3, 2, True), x)  # noqa: B023
    agree(lambda s, x: s.lp_pool1d(x, 2, 3), randn(2, 3, 11))


def test_same_bits_by_any_threads() -> None:
    """Forward; no gradient is added by two threads either."""
    for shape, last in itertools.product(((2, 3, 30, 40), (1, 64, 20, 20), (1, 1, 99, 99)), (False, True)):
        x = LAYOUTS["channels_last" if last else "contiguous"](randn(*shape), 2)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = [gradient(lambda x: f.max_pool2d(x, 3, 1, 1, backend="cpu"), x)]
            found.append(gradient(lambda x: f.avg_pool2d(x, 3, 1, 1, backend="cpu"), x))
            found.append(f.max_pool2d(x, 2, return_indices=True, backend="cpu"))
            results.append([t for pair in found for t in pair])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def numbers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@st.composite
def calls_of_pooling(draw: st.DrawFn) -> Any:
    dims = draw(numbers(1, 3))
    kernel = [draw(numbers(1, 4)) for _ in range(dims)]
    dilation = [draw(numbers(1, 2)) for _ in range(dims)]
    stride = [draw(numbers(1, 4)) for _ in range(dims)]
    padding = [draw(numbers(0, k // 2)) for k in kernel]
    room = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding)]
    shape = [draw(numbers(1, 2)), draw(numbers(1, 9)), *(draw(numbers(n, n + 12)) for n in room)]
    return shape, kernel, stride, padding, dilation, draw(st.booleans()), draw(st.sampled_from(["contiguous", "channels_last"]))


@given(calls_of_pooling())
def test_any_window(call: Any) -> None:
    shape, kernel, stride, padding, dilation, ceil_mode, layout = call
    dims = len(kernel)
    x = LAYOUTS[layout](randn(*shape), dims)
    try:
        expected = getattr(F, f"max_pool{dims}d")(x, kernel, stride, padding, dilation, ceil_mode, True)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            getattr(f, f"max_pool{dims}d")(x, kernel, stride, padding, dilation, ceil_mode)
        return
    if float(expected[0].min()) == -INF:
        return  # a window with nothing inside, whose index is torch's secret
    ours = getattr(f, f"max_pool{dims}d")(x, kernel, stride, padding, dilation, ceil_mode, True, backend="cpu")
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    agree(lambda s, x: getattr(s, f"max_pool{dims}d")(x, kernel, stride, padding, dilation, ceil_mode), x)
    if dims < 3 or all(n >= k for n, k in zip(shape[2:], kernel)):  # torch's avg_pool3d counts no padding there
        agree(lambda s, x: getattr(s, f"avg_pool{dims}d")(x, kernel, stride, padding, ceil_mode, False), x)


# Errors


X1, X2, X3 = torch.ones(2, 3, 9), torch.ones(2, 3, 9, 9), torch.ones(2, 3, 9, 9, 9)
WRONG: list[tuple[Callable[[Any], Any], str]] = [
    *(
        (lambda s, k=kind, x=x, a=a: getattr(s, f"{k}_pool{x.dim() - 2}d")(x, *a), message)
        for kind, x in itertools.product(("max", "avg"), (X1, X2, X3))
        for a, message in (
            ((3, 1, 2), "padding.*2.*kernel_size.*3"), ((3, 0), "stride.*0"), ((3, -1), "stride.*-1"), ((0, 1), "kernel_size.*0"),
            ((-1, 1), "kernel_size.*-1"), ((19, 1), "9.*19"), ((3, 1, -1), "padding.*-1"), (((1, 2, 3, 4),), "kernel_size.*4"),
            (("2",), "kernel_size.*'2'"), ((2.5,), "kernel_size.*2.5"),
        )
    ),
    *(
        (lambda s, k=kind, x=x: getattr(s, f"{k}_pool{x.dim() - 2}d")(x[:, :, :0], 2), "0")
        for kind, x in itertools.product(("max", "avg", "adaptive_max", "adaptive_avg"), (X1, X2, X3))
    ),
    *(
        (lambda s, k=kind, x=x: getattr(s, f"{k}_pool{x.dim() - 2}d")(x[:, :0], 2), "0")
        for kind, x in itertools.product(("max", "avg", "adaptive_max"), (X1, X2, X3))
    ),
    *(
        (lambda s, k=kind, x=x: getattr(s, f"{k}_pool{x.dim() - 2}d")(x[0, 0], 2), "[0-9]D")
        for kind, x in itertools.product(("max", "avg", "adaptive_max", "adaptive_avg"), (X1, X2, X3))
    ),
    *(
        (lambda s, k=k, p=p, d=d: s.max_pool2d(X2, k, 1, p, d), f"padding.*{p}.*kernel_size.*{k}")
        for k, p, d in ((2, 2, 4), (3, 2, 3), (3, 3, 3))
    ),
    (lambda s: s.max_pool2d(X2, 2, dilation=0), "dilation.*0"),
    (lambda s: s.max_pool2d(X3, 2), "5D"),
    (lambda s: s.avg_pool2d(X2, 2, divisor_override=0), "divisor.*0"),
    (lambda s: s.max_pool2d(X2, 2, (1, 1, 1)), "stride.*3"),
    (lambda s: s.adaptive_max_pool2d(X2, -1), "-1"),
    (lambda s: s.adaptive_avg_pool2d(X2, (3, 3, 3)), "output_size.*3"),
    (lambda s: s.adaptive_avg_pool2d(X2, (3,)), "output_size.*1"),
    (lambda s: s.adaptive_avg_pool1d(X1, None), "None"),
    (lambda s: s.max_unpool2d(X2, X2.int(), 2), "int32"),
    (lambda s: s.max_unpool2d(X2, X2[:1].long(), 2), "indices.*1, 3"),
    (lambda s: s.max_unpool2d(X2, X2.long(), 2, output_size=(30, 7)), "30"),
    (lambda s: s.max_unpool3d(X3, X3.long(), 2, 0), "stride.*0, 0, 0"),
    (lambda s: s.max_unpool1d(X1[0, 0], X1[0, 0].long(), 2), "1D"),
    (lambda s: s.max_pool2d(3, 2), "Tensor"),
    (lambda s: s.max_pool2d(X2, True), "kernel_size.*True"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_bad_input(number: int) -> None:
    """torch's error type, and a message with the numbers in it"""
    call, message = WRONG[number]
    with pytest.raises(Exception) as theirs:  # whatever torch raises
        call(F)
    with pytest.raises(theirs.type, match=message) as ours:
        call(f)
    assert ours.type is theirs.type


def test_integers_are_torchs(calls: list[Any]) -> None:
    x = torch.arange(50).reshape(1, 2, 5, 5)
    assert torch.equal(f.max_pool2d(x, 2), F.max_pool2d(x, 2))
    assert [c.backend for c in calls] == ["torch"]


def test_a_replaced_model(calls: list[Any]) -> None:
    model = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(1)).eval()
    x = randn(2, 5, 19, 17)
    expected = model(x)
    report = fastnn.replace(model)
    assert len(report.replaced) == 3
    torch.testing.assert_close(model(x), expected)
    assert [(c.op, c.backend) for c in calls] == [("max_pool", "cpu"), ("avg_pool", "cpu"), ("avg_pool", "cpu")]
    with fastnn.use():
        torch.testing.assert_close(F.max_pool2d(x, 2), f.max_pool2d(x, 2))
    assert calls[-2].op == "max_pool"


def test_a_code_outside_the_image_writes_nowhere() -> None:
    """Codes come from the forward; wrong ones must not reach other memory. Here each means the last pixel of its 3 × 3 window."""
    x, grad = randn(1, 2, 5, 5), randn(1, 2, 5, 5, seed=3)
    codes = torch.full((1, 2, 5, 5), 8, dtype=torch.uint8)
    for layout in ("contiguous", "channels_last"):
        lying = LAYOUTS[layout](x, 2)
        found = ops.max_pool_backward(grad, codes, lying, False, [3, 3], [1, 1], [1, 1], [1, 1], False, backend="cpu")
        assert torch.equal(found[..., 1:, 1:], grad[..., :4, :4])
