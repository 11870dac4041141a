"""Pooling on the GPU against the reference and torch. Without a GPU the same kernels and host code run on the shim."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_shim import needs_compiler, shim
from fastnn.kernels.gpu import pool as gpu
from fastnn.kernels.reference import pool as reference
from fastnn.ops import pool as ops
from gpu import DEVICE, HERE, run
from rule import randn

pytestmark = [pytest.mark.gpu] if HERE else [pytest.mark.gpu, needs_compiler]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def launched() -> Iterator[list[str]]:
    """The kernels that the test launches, where they run on the shim"""
    if HERE:
        yield []
    else:
        with shim() as device:
            yield device.launched


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def stepped(t: Tensor) -> Tensor:
    return t.new_full((*t.shape[:-1], 2 * t.shape[-1]), NAN)[..., ::2].copy_(t)


def unaligned(t: Tensor) -> Tensor:
    return t.new_full((t.numel() + 1,), NAN)[1:].view(t.shape).copy_(t)


#: size, stride, padding, dilation, ceil_mode: those with kernels of their own, then overlapping, apart, with gaps, past the end
WINDOWS: list[tuple[Any, ...]] = [
    (2, 2, 0, 1, False), (3, 2, 1, 1, False), (3, 1, 1, 1, False), (3, 2, 1, 1, True), (2, 1, 0, 2, True), (4, 5, 2, 1, False),
    (3, 3, 1, 2, True), (3, 3, 0, 1, True), (5, 1, 2, 1, False),
]  # fmt: skip
#: rows of whole vectors; outputs that have and have not; a rest; one channel; vectors of channels; one and three dimensions
SHAPES = [(2, 3, 8, 16), (1, 2, 7, 12), (2, 3, 6, 9), (1, 1, 5, 8), (2, 8, 9, 7), (2, 3, 17), (1, 8, 16), (1, 8, 5, 6, 8)]


def spread(window: tuple[Any, ...], dims: int) -> tuple[Any, ...]:
    return (False, *([v] * dims for v in window[:4]), window[4])


def both(
    shape: tuple[int, ...],
    window: tuple[Any, ...],
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Maxima with and without indices, means, and their gradients are the reference's."""
    x = layout(randn(*shape, dtype=dtype))
    wide = x.double()
    exact, at = reference.max_pool_with_indices(wide, *window)
    grad = layout(randn(*exact.shape, dtype=dtype, seed=3)) if exact.numel() else exact.to(dtype)
    on = [t.to(DEVICE) for t in (x, grad)]
    close: dict[str, Any] = {"rtol": torch.finfo(dtype).eps, "atol": 1e-3} if dtype.itemsize == 2 else {}
    same: dict[str, Any] = {"rtol": 0, "atol": 0, "equal_nan": True}
    y, index = (t.cpu() for t in run(ops.max_pool_with_indices, on[0], *window))
    torch.testing.assert_close(y.double(), exact, **same)
    assert torch.equal(index, at)
    torch.testing.assert_close(run(ops.max_pool, on[0], *window, False)[0].cpu().double(), exact, **same)
    y, codes = run(ops.max_pool, on[0], *window, True)
    torch.testing.assert_close(y.cpu().double(), exact, **same)
    expected = reference.max_pool(wide, *window, True)[1]
    assert torch.equal(codes.cpu(), expected)
    dx = run(ops.max_pool_backward, on[1], codes, on[0], *window).cpu()
    expected = reference.max_pool_backward(grad.double(), expected, wide, *window).to(dtype)
    torch.testing.assert_close(dx, expected, **close, equal_nan=True)
    adaptive, size, stride, padding, dilation, ceil_mode = window
    if dilation and dilation[0] != 1:
        return
    for include, divisor in ((True, 0), (False, 0), (True, 3)) if not adaptive else ((True, 0),):
        more = (adaptive, size, stride, padding, ceil_mode, include, divisor)
        expected = reference.avg_pool(wide, *more)
        torch.testing.assert_close(run(ops.avg_pool, on[0], *more).cpu(), expected.to(dtype), **close, equal_nan=True)
        dx = run(ops.avg_pool_backward, on[1], on[0], *more).cpu()
        torch.testing.assert_close(dx, reference.avg_pool_backward(grad.double(), wide, *more).to(dtype), **close, equal_nan=True)


@pytest.mark.parametrize("layout", [contiguous, channels_last, stepped, unaligned])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows(shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]) -> None:
    dims = len(shape) - 2
    for window in WINDOWS:
        if all(n + 2 * window[2] >= window[3] * (window[0] - 1) + 1 for n in shape[2:]):
            both(shape, spread(window, dims), layout)


@pytest.mark.parametrize("layout", [contiguous, channels_last, stepped])
@pytest.mark.parametrize("name", ["_FULL", "_FAR"])
def test_strips_and_far_threads(name: str, layout: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips as long as they get, with a rest; and numbers of threads that factors cannot divide"""
    monkeypatch.setattr(gpu, name, 1 if name == "_FULL" else 160)
    gpu._plan.cache_clear()
    try:
        for shape in ((1, 4, 19, 8), (2, 8, 5, 16), (1, 4, 5, 4, 8), (2, 13, 24)):
            for window in (*WINDOWS[:3], *WINDOWS[-2:]):
                both(shape, spread(window, len(shape) - 2), layout)
    finally:
        gpu._plan.cache_clear()


def test_factors_divide() -> None:
    """Numbers of 31 bits, as the kernels do it: by the factor, then 31 and the shift's places down"""
    for size in (1, 2, 3, 7, 28, 55, 641, 65537, 2**30 - 1, 2**30 + 1, 2**31 - 1):
        digit, factor, shift = gpu._digit(size, False)
        assert digit == size
        assert factor < 2**32
        for number in (0, 1, size - 1, size, 2**31 // size * size - 1, 2**31 // size * size, 2**31 - 1):
            if number < 2**31:
                assert number * factor >> 31 >> shift == number // size


def test_windows_of_one_pixel_in_a_dimension() -> None:
    """Windows along rows only, in planes only, and pixels of depth that are windows of their own"""
    for shape in ((2, 4, 6, 8), (1, 3, 3, 6, 7)):
        for k, s, p in gpu.WINDOWS:
            for flat in range(1, len(shape) - 2):
                size, stride, padding = ([m] * flat + [v] * (len(shape) - 2 - flat) for m, v in ((1, k), (1, s), (0, p)))
                for layout in (contiguous, channels_last):
                    both(shape, (False, size, stride, padding, [1] * (len(shape) - 2), True), layout)
    both((1, 4, 5, 6, 8), (False, [2, 3, 3], [1, 2, 2], [1, 1, 1], [1, 1, 1], False), contiguous)
    both((1, 4, 40, 6, 8), (False, [30, 3, 3], [1, 2, 2], [1, 1, 1], [1, 1, 1], False), contiguous)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("size", [1, 2, 3, 11])
def test_adaptive(size: int, layout: Callable[[Tensor], Tensor]) -> None:
    """Windows that divide the image, that overlap, that are smaller than a pixel, so large that a warp works on each"""
    for shape in ((2, 3, 17), (2, 4, 8, 9), (1, 2, 5, 4, 3), (1, 3, 21, 35)):
        both(shape, (True, [size] * (len(shape) - 2), [], [], [], False), layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_dtypes(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    shapes = [(2, 3, 7, 9)]
    if dtype is torch.bfloat16 or HERE:  # vectors of eight
        shapes += [(1, 8, 6, 16), (1, 16, 7, 24)]
    for shape in shapes:
        both(shape, spread(WINDOWS[1], 2), layout, dtype)
        both(shape, spread((2, 1, 0, 1, False), 2), layout, dtype)
    both((2, 7, 21, 13), (True, [1, 1], [], [], [], False), layout, dtype)  # a run that begins anywhere, with a rest


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_nan_inf_and_ties(layout: Callable[[Tensor], Tensor]) -> None:
    """The first of equal maxima, the last NaN, -Inf where there is nothing else"""
    values = torch.tensor([NAN, INF, -INF, -INF, -0.0, 0.0, 1.0, 1.0, -2.0, -3.0])
    generator = torch.Generator().manual_seed(5)
    for shape in ((2, 3, 9, 32), (2, 4, 6, 7), (1, 2, 4, 5, 8)):
        for some in (values, values[1:], values[2:4], values[4:6]):
            x = layout(some[torch.randint(len(some), shape, generator=generator)])
            dims = len(shape) - 2
            for many in (*(spread(window, dims) for window in WINDOWS[:5]), (True, [1] * dims, [], [], [], False)):
                wanted = reference.max_pool_with_indices(x, *many)
                found = run(ops.max_pool_with_indices, x.to(DEVICE), *many)
                torch.testing.assert_close(tuple(t.cpu() for t in found), wanted, rtol=0, atol=0, equal_nan=True)
                y = run(ops.max_pool, x.to(DEVICE), *many, False)[0].cpu()
                torch.testing.assert_close(y, wanted[0], rtol=0, atol=0, equal_nan=True)


def test_against_torch() -> None:
    """The reference is ours: torch's own results, once for each kind."""
    x = randn(2, 3, 9, 16)
    y, index = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    found = run(ops.max_pool_with_indices, x.to(DEVICE), False, [3, 3], [2, 2], [1, 1], [1, 1], False)
    assert torch.equal(found[0].cpu(), y)
    assert torch.equal(found[1].cpu(), index)
    args = (False, [3, 3], [2, 2], [1, 1], True, False, 0)
    torch.testing.assert_close(run(ops.avg_pool, x.to(DEVICE), *args).cpu(), F.avg_pool2d(x, 3, 2, 1, True, False))


def test_large_windows() -> None:
    """Codes of 32 bits; one output of a whole image, and its gradient"""
    both((1, 2, 40, 36), spread((19, 7, 3, 1, False), 2), contiguous)
    both((1, 4, 40, 36), spread((19, 7, 3, 1, False), 2), channels_last)
    both((2, 3, 40, 36), (True, [1, 1], [], [], [], False), contiguous)
    both((1, 3, 40, 36), (True, [2, 1], [], [], [], False), contiguous)
    both((1, 3, 41, 35), (True, [2, 2], [], [], [], False), contiguous)
    both((1, 3, 6, 41, 35), (True, [1, 1, 1], [], [], [], False), contiguous)
    both((1, 3, 6, 41, 35), (True, [2, 1, 1], [], [], [], False), contiguous)
    for c in (3, 4, 8, 32):  # 1, 2 and 8 vectors next to each other; parts of a warp, and a block
        both((2, c, 40, 36), (True, [1, 1], [], [], [], False), channels_last)
        both((2, c, 7, 5), (True, [1, 1], [], [], [], False), channels_last)
    both((1, 3, 24, 35), (False, [5, 5], [6, 7], [2, 1], [2, 1], False), stepped)
    both((1, 2, 7, 4, 6), (False, [3, 4, 6], [3, 4, 6], [0, 0, 0], [2, 1, 1], False), contiguous)
    both((1, 3, 24, 35), (False, [5, 35], [6, 35], [2, 0], [2, 1], False), contiguous)


def test_the_kernels_that_were_meant(launched: list[str]) -> None:
    """Vectors where rows or channels allow them, and strips of several rows."""
    if HERE:
        pytest.skip("the launches are seen on the shim only")
    x = randn(2, 8, 33, 160)
    run(ops.max_pool, x, *spread(WINDOWS[1], 2), False)
    run(ops.max_pool, channels_last(x), *spread(WINDOWS[1], 2), False)
    run(ops.max_pool, unaligned(x), *spread(WINDOWS[1], 2), False)
    run(ops.avg_pool, x, True, [1, 1], [], [], False, True, 0)
    assert launched == ["forward<float, 4, true, 3, 2, 1, MAX>", "forward<float, 4, false, 3, 2, 1, MAX>",
                        "forward<float, 1, false, 3, 2, 1, MAX>", "reduce<float, AVERAGE>"]  # fmt: skip
    plan = gpu._plan("forward", "MAX", x.device, x.dtype, True, 2, x.shape, x.stride(), (2, 8, 33, 160), x.stride(), x.stride(),
                     False, False, (3, 3), (1, 1), (1, 1), (1, 1), 0, True)  # fmt: skip
    assert plan.words[-6] > 1, "a strip of one row"


def test_no_batch_and_empty() -> None:
    x = randn(3, 8, 12)
    y = run(ops.max_pool, x.to(DEVICE), *spread(WINDOWS[0], 2), False)[0].cpu()
    assert torch.equal(y, F.max_pool2d(x, 2))
    assert run(ops.max_pool, x[None][:0].to(DEVICE), *spread(WINDOWS[0], 2), False)[0].shape == (0, 3, 4, 6)
    dx = run(ops.avg_pool_backward, x[:, :0, :3].to(DEVICE), x.to(DEVICE), True, [0, 3], [], [], False, True, 0)
    assert not dx.cpu().any()


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unpool(dims: int, layout: Callable[[Tensor], Tensor]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = layout(randn(2, 3, *[6] * dims, dtype=dtype))
        y, index = reference.max_pool_with_indices(x, *spread((2, 2, 0, 1, False), dims))
        y, index, grad = layout(y), layout(index), layout(randn(*x.shape, dtype=dtype, seed=5))
        size = [6] * dims
        out = run(ops.max_unpool, y.to(DEVICE), index.to(DEVICE), size).cpu()
        assert torch.equal(out, reference.max_unpool(y, index, size))
        back = run(ops.max_unpool_backward, grad.to(DEVICE), index.to(DEVICE), size).cpu()
        assert torch.equal(back, reference.max_unpool_backward(grad, index, size))


def test_refusals() -> None:
    x, index = torch.ones(1, 1, 2), torch.zeros(1, 1, 2, dtype=torch.int64)
    torch.use_deterministic_algorithms(True)
    try:
        assert "differs from run to run" in str(gpu.supports("max_unpool", x, index, [4]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert gpu.supports("max_unpool", x, index, [4]) is None
    if not HERE:
        with pytest.raises(RuntimeError, match="__trap"):
            run(ops.max_unpool, x, index + 4, [4])
