"""Convolutions on the GPU, or in Triton's interpreter, against the plain maths in float64: what the CPU's tests have as
problems."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")

from fastnn.kernels.gpu import conv as kernels
from fastnn.kernels.gpu.engine import launch
from fastnn.kernels.gpu.engine.launch import Chip
from fastnn.kernels.reference import conv as plain
from fastnn.ops import conv as ops
from gpu import DEVICE, HERE, run, watched
from rule import LAYOUTS, randn
from test_conv import FORMATS
from test_gpu_glue import far

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

# input, weight, stride, padding, dilation, groups; transposed: output_padding
PROBLEMS: dict[str, tuple[Any, ...]] = {
    "3x3": ((2, 5, 9, 7), (11, 5, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "deep": ((1, 37, 5, 6), (9, 37, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stride 3, uneven": ((2, 3, 11, 13), (6, 3, 4, 3), (3, 4), (2, 1), (1, 1), 1),
    "dilation, beyond the image": ((1, 17, 7, 5), (6, 17, 3, 3), (1, 1), (4, 5), (2, 4), 1),
    "1x1": ((1, 37, 4, 5), (33, 37, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "groups": ((1, 40, 5, 4), (6, 20, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise, stride 2": ((2, 11, 9, 7), (11, 1, 5, 5), (2, 2), (2, 2), (1, 1), 11),
    "depthwise, two filters": ((1, 5, 6, 7), (10, 1, 3, 3), (1, 1), (2, 2), (2, 2), 5),
    "depthwise, vectors": ((1, 24, 6, 7), (24, 1, 3, 3), (1, 2), (1, 0), (1, 1), 24),
    "1d": ((2, 3, 60), (13, 3, 10), (5,), (3,), (1,), 1),
    "3d": ((1, 3, 4, 5, 6), (6, 3, 3, 2, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1), 1),
}  # fmt: skip
TRANSPOSED: dict[str, tuple[Any, ...]] = {
    "stride 2": ((2, 5, 4, 5), (5, 9, 4, 4), (2, 2), (1, 1), (1, 1), 1, (0, 0)),
    "deep, gaps": ((1, 17, 3, 4), (17, 9, 2, 1), (3, 3), (0, 0), (1, 1), 1, (2, 1)),
    "dilation": ((1, 3, 5, 4), (3, 4, 3, 3), (4, 2), (1, 0), (3, 2), 1, (2, 1)),
    "groups": ((1, 6, 5, 4), (6, 5, 3, 3), (2, 1), (0, 0), (1, 1), 3, (0, 0)),
    "depthwise": ((1, 11, 5, 4), (11, 1, 3, 3), (2, 2), (1, 1), (1, 1), 11, (0, 0)),
    "1d": ((2, 3, 17), (3, 5, 4), (3,), (0,), (1,), 1, (0,)),
    "3d": ((1, 3, 2, 3, 2), (3, 5, 3, 2, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), 1, (0, 0, 0)),
}  # fmt: skip


def close(mine: Tensor, exact: Any, *tensors: Tensor) -> None:
    """Within a few roundings of the sum of magnitudes, and of the result itself"""
    wide = [t.double().cpu() for t in tensors]
    wanted, size = exact(*wide), exact(*(t.abs() for t in wide))
    assert mine.shape == wanted.shape
    eps = torch.finfo(mine.dtype).eps if mine.dtype != torch.float32 else 0.0
    few = 8 * torch.finfo(torch.float32).eps * size + eps * wanted.abs()
    worst = (mine.double().cpu() - wanted).abs() - few - 1e-30
    assert bool((worst <= 0).all()), f"{float(worst.max())} too far off"


def problem(name: str, transposed: bool, form: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Any]]:
    x, w, stride, padding, dilation, groups, *more = (TRANSPOSED if transposed else PROBLEMS)[name]
    lie = FORMATS[form] if len(x) > 3 else FORMATS["first"]
    input, weight = (lie(randn(*shape, dtype=dtype, seed=n)).to(DEVICE) for n, shape in enumerate((x, w)))

    return input, weight, [stride, padding, dilation, transposed, more[0] if more else [0] * len(stride), groups]


def check(x: Tensor, w: Tensor, options: list[Any]) -> Tensor:
    """The convolution and the gradient of its weight. (That of its input is a convolution too, transposed if this one is not.)"""
    y = run(ops.conv, x, w, None, None, *options, None)
    assert y.dtype == x.dtype
    close(y, lambda x, w: plain.conv(x, w, None, None, *options, None), x, w)
    stride, padding, dilation, transposed, _, groups = options
    if not transposed or not any(options[4]):
        g = torch.empty_like(y).copy_(randn(*y.shape, seed=5, dtype=x.dtype))
        pair = (x, g) if transposed else (g, x)
        args = list(w.shape[2:]), stride, padding, dilation, groups
        dw = run(ops.conv_weight, *pair, *args)
        assert dw.dtype == w.dtype
        close(dw, lambda g, x: plain.conv_weight(g, x, *args), *pair)
    return y


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name: str) -> None:
    check(*problem(name, False, "last" if name in ("1x1", "groups", "3d", "depthwise, vectors") else "first", torch.float32))


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_problems(name: str) -> None:
    check(*problem(name, True, "last" if name in ("deep, gaps", "depthwise") else "first", torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["3x3", "deep", "depthwise, stride 2"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    check(*problem(name, False, "last", dtype))


@pytest.mark.parametrize(("name", "transposed"), [("3x3", False), ("depthwise", True), ("groups", False)])
def test_epilogue(name: str, transposed: bool) -> None:
    x, w, options = problem(name, transposed, "first", torch.float32)
    plainly = run(ops.conv, x, w, None, None, *options, None)
    bias, residual = randn(plainly.shape[1], seed=7).to(DEVICE), FORMATS["last"](randn(*plainly.shape, seed=8)).to(DEVICE)
    for b, r, act in ((bias, None, None), (None, residual, "relu"), (bias, residual, "silu")):
        found = run(ops.conv, x, w, b, r, *options, act)
        z = plainly.double() + (0 if b is None else b.double().reshape(-1,
                                                                       *[1] * (x.dim() - 2))) + (0 if r is None else r.double())
        torch.testing.assert_close(found.double(), torch.relu(z) if act == "relu" else z * torch.sigmoid(z) if act else z,
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_biases_that_are_not_contiguous(plain: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PLAIN", plain)
    x, w, options = problem("stride 2" if transposed else "3x3", transposed, "first", torch.float32)
    o = w.shape[1] if transposed else w.shape[0]
    for b in (randn(2 * o, seed=7).to(DEVICE)[::2], randn(1, seed=7).to(DEVICE).expand(o)):
        expected = run(ops.conv, x, w, b.contiguous(), None, *options, None)
        torch.testing.assert_close(run(ops.conv, x, w, b, None, *options, None), expected, rtol=0, atol=0)


@pytest.mark.parametrize("width", [16, 18, 8])
def test_planes_of_a_single_row(width: int) -> None:
    """Cut out of wider ones: a size of 1 has no stride by which gaps could be seen."""
    one = [1, 1, 1]
    x = randn(1, 3, 2, 1, width).to(DEVICE)[..., :8]
    check(x, randn(4, 3, 1, 1, 7, seed=1).to(DEVICE), [one, [0, 0, 0], one, False, [0, 0, 0], 1])


def test_layouts() -> None:
    """The values do not depend on where they lie."""
    x, w, options = problem("3x3", False, "first", torch.float32)
    y = run(ops.conv, x, w, None, None, *options, None)
    g = randn(*y.shape, seed=5).to(DEVICE)
    args = [3, 3], *options[:3], 1
    dw = run(ops.conv_weight, g, x, *args)
    for lay in LAYOUTS.values():
        torch.testing.assert_close(run(ops.conv, lay(x), lay(w), None, None, *options, None), y, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(run(ops.conv_weight, lay(g), lay(x), *args), dw, rtol=1e-5, atol=1e-5)
    one = x[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(run(ops.conv, one, w, None, None, *options, None)[2], y[0])


@pytest.fixture
def copy_engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As on a chip that reads boxes by descriptors"""
    if not HERE:
        monkeypatch.setattr(launch, "chip", lambda device: Chip("sm_90", 227 << 10, 3))
        small = (kernels.Tile(64, 64, 32, 4, 2),)
        monkeypatch.setattr(kernels, "_tiles", lambda tiles, t: small)
    return watched(monkeypatch, lambda kernel, options: options.get("BOXES"))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("shape", "kernel", "window", "transposed"),
    [
        ((2, 24, 9, 13), (3, 3), ([1, 1], [1, 1], [1, 1]), False),
        ((3, 16, 8, 8), (3, 3), ([1, 1], [1, 1], [1, 1]), False),
        ((3, 40, 5, 6), (2, 3), ([1, 1], [3, 0], [2, 1]), False),
        ((1, 17, 40), (10,), ([1], [4], [1]), False),
        ((2, 16, 3, 4, 5), (2, 3, 2), ([1, 1, 1], [1, 0, 1], [1, 1, 2]), False),
        ((2, 33, 5, 7), (3, 4), ([2, 3], [1, 1], [1, 1]), True),
        ((1, 16, 9, 4), (3, 3), ([1, 1], [0, 2], [2, 1]), True),
        ((1, 24, 5, 5), (3, 3), ([4, 2], [1, 0], [3, 2]), True),
    ],
)
def test_boxes(shape: tuple[int, ...], kernel: tuple[int, ...], window: tuple[Any, ...], transposed: bool, form: str,
               copy_engine: list[Any]) -> None:  # fmt: skip
    """Tiles that stick out, taps beside the image, phases; channels and outputs that 16 bytes do not divide"""
    o = 70 if form == "first" else 16
    place = FORMATS[form if len(shape) > 3 else "first"]
    x = place(randn(*shape, dtype=torch.bfloat16)).to(DEVICE)
    w = place(randn(*((shape[1], o) if transposed else (o, shape[1])), *kernel, dtype=torch.bfloat16, seed=1)).to(DEVICE)
    check(x, w, [*window, transposed, [0] * len(kernel), 1])
    has = launch.chip(torch.device(DEVICE)).descriptors
    found = {b for b in copy_engine if b is not None}
    assert found == ({has, False} if transposed and max(window[0]) > 1 else {has})


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_few_channels(stride: int, copy_engine: list[Any]) -> None:
    """Windows of a row as channels: where the copy engine can have their strides, and where it cannot"""
    for form, dtype in (("first", torch.bfloat16), ("last", torch.float32)):
        x = FORMATS[form](randn(2, 3, 6, 13, dtype=dtype)).to(DEVICE)
        w = randn(7, 3, 4, 7, dtype=dtype, seed=1).to(DEVICE)
        check(x, w, [[1, stride], [2, 3], [2, 1], False, [0, 0], 1])
    assert HERE or (True in copy_engine) == (stride == 2)


@pytest.mark.parametrize("channels", [3, 24])
def test_what_is_not_met_may_be_infinite(channels: int, copy_engine: list[Any]) -> None:
    """Zeros around a box or behind a window are not multiplied by what lies there."""
    x, w = randn(2, channels, 7, 7, dtype=torch.bfloat16), randn(5, channels, 3, 6, dtype=torch.bfloat16, seed=1)
    g = randn(2, 5, 5, 2, dtype=torch.bfloat16, seed=2)
    x[0, :, 6, 6] = x[1, :, 0, 2] = float("inf")
    window = [1, 1], [0, 0], [1, 1]
    y = run(ops.conv, x.to(DEVICE), w.to(DEVICE), None, None, *window, False, [0, 0], 1, None)
    dw = run(ops.conv_weight, g.to(DEVICE), x.to(DEVICE), [3, 6], *window, 1)
    assert torch.equal(y.isfinite().cpu(), torch.conv2d(x.double(), w.double()).isfinite())
    assert torch.equal(dw.isfinite().cpu(), plain.conv_weight(g.double(), x.double(), [3, 6], *window, 1).isfinite())


@pytest.mark.skipif(HERE, reason="a GPU's memory is not for the asking")
def test_images_far_apart() -> None:
    """2³⁰ elements from one to the next: packed, and where nothing is packed"""
    x, w = randn(3, 24, 9, dtype=torch.bfloat16), randn(5, 24, 3, dtype=torch.bfloat16, seed=1)
    window, away = ([1], [1], [1]), far(x)
    for weight, groups in ((w, 1), (w.view(24, 1, 15)[..., :3], 24)):
        y = run(ops.conv, x, weight, None, None, *window, False, [0], groups, None)
        assert torch.equal(run(ops.conv, away, weight, None, None, *window, False, [0], groups, None), y)
    dw = run(ops.conv_weight, y, x, [3], *window, 24)
    assert torch.equal(run(ops.conv_weight, y, away, [3], *window, 24), dw)


def test_tiles_fill_the_chip() -> None:
    """Large ones where there are many, smaller ones where those would leave processors idle"""
    if HERE:
        pytest.skip("by the table of one chip")
    few = kernels._TILES["half", "sm_90"]
    assert kernels._cheapest(few, lambda t: 100352 // t.m * 512 // t.n, 132) == few[0]
    assert kernels._cheapest(few, lambda t: -(-1568 // t.m) * 512 // t.n, 132).m * 2 <= few[0].n
    boxes = [kernels._box(128, 32, 1, n, n) for n in (56, 28, 14, 7)]
    assert [kernels._boxes(b, (32, 1, n, n)) * 128 for b, n in zip(boxes, (56, 28, 14, 7))] == [100352, 25088, 6272, 1792]


def test_nothing_beyond_the_tensors_is_read() -> None:
    """They lie in memory full of NaN."""
    def inside(t: Tensor) -> Tensor:
        room = torch.full([n + 4 for n in t.shape], float("nan"), device=DEVICE)
        return room[tuple(slice(2, -2) for _ in t.shape)].copy_(t)

    for name, transposed in (("3x3", False), ("deep", False), ("stride 2", True), ("depthwise, stride 2", False)):
        x, w, options = problem(name, transposed, "first", torch.float32)
        check(inside(x), inside(w), options)


def test_long_sums_are_cut() -> None:
    """The weight's gradient over many positions: parts, the last of them shorter."""
    x, g = randn(1, 2, 700, seed=1).to(DEVICE), randn(1, 3, 698, seed=2).to(DEVICE)
    args = [3], [1], [0], [1], 1
    close(run(ops.conv_weight, g, x, *args), lambda g, x: plain.conv_weight(g, x, *args), g, x)


@pytest.mark.parametrize(
    ("name", "transposed", "form"),
    [("stride 3, uneven", False, "last"), ("1d", False, "first"), ("3d", False, "last"), ("stride 2", True, "first")],
)
def test_columns(name: str, transposed: bool, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain path, with everything that is added at its end"""
    x, w, options = problem(name, transposed, form, torch.float32)
    expected = run(ops.conv, x, w, None, None, *options, None)
    bias, residual = randn(expected.shape[1], seed=7).to(DEVICE), randn(*expected.shape, seed=8).to(DEVICE)
    added = [(bias, None, None), (None, residual, "silu"), (bias, residual, None)]
    epilogues = [run(ops.conv, x, w, b, r, *options, act) for b, r, act in added]
    launched = watched(monkeypatch, lambda kernel, options: kernel.__name__)
    monkeypatch.setattr(kernels, "PLAIN", True)
    check(x, w, options)
    for (b, r, act), exact in zip(added, epilogues, strict=True):
        torch.testing.assert_close(run(ops.conv, x, w, b, r, *options, act), exact, rtol=1e-5, atol=1e-5)
    assert ("convolution" in launched) == (form == "first" and not transposed)  # a bias and a residual, channels first
    assert ("col2im" in launched) == transposed
    assert "im2col" in launched  # of the weight's gradient, too
    assert kernels.conv_columns.refuses(expected, x, w.shape[2:], 2, transposed, False) == "columns are for one group"


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_of_16_bits_are_rounded_once(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PLAIN", True)
    check(*problem("stride 2" if transposed else "3x3", transposed, "last", torch.bfloat16))
    monkeypatch.setattr(kernels.conv_columns, "_MOST", 10)
    x, w, options = problem("3x3", False, "last", torch.float32)
    monkeypatch.setattr(kernels.conv_columns, "conv", lambda *args: pytest.fail("too large"))
    run(ops.conv, x, w, None, None, *options, None)


def test_empty_and_refused() -> None:
    x, w = randn(0, 3, 5, 5).to(DEVICE), randn(4, 3, 3, 3).to(DEVICE)
    options = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    assert run(ops.conv, x, w, None, None, *options, None).shape == (0, 4, 3, 3)
    dw = run(ops.conv_weight, randn(0, 4, 3, 3).to(DEVICE), x, [3, 3], *options[:3], 1)
    assert not dw.any()
    with pytest.raises(RuntimeError, match="float64"):
        run(ops.conv, x.double(), w.double(), None, None, *options, None)
