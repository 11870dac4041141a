"""Matrix products on the GPU, or in Triton's interpreter, against float64, beside torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")

import fastnn
from fastnn.kernels.gpu import matmul as kernels
from fastnn.kernels.gpu.engine import launch
from fastnn.kernels.gpu.engine.launch import Chip
from fastnn.ops import matmul as ops
from gpu import DEVICE, DTYPES, HERE, check, run, watched
from rule import LAYOUTS, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of NaN and Inf, where it is the interpreter
]


def terms(a: Tensor, b: Tensor) -> list[Tensor]:
    """A sum is as exact as its terms are large."""
    return [torch.matmul(a.abs(), b.abs())]


def linear_terms(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, act: Any) -> list[Tensor]:
    return [x.abs() @ w.abs().mT + (0 if bias is None else bias.abs()) + (0 if residual is None else residual.abs())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 5, 65), (31, 67, 47), (5, 130, 3)], ids=str)
def test_sizes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    check(ops.matmul, randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1), scale=terms)


def test_many_tiles_are_gone_through_in_groups() -> None:
    """More rows of tiles than a group has, and more tiles than the stand-in chip runs programs."""
    check(ops.matmul, randn(300, 20), randn(20, 70, seed=1), scale=terms)


def test_a_sum_of_nothing_is_zero() -> None:
    assert torch.equal(run(ops.matmul, torch.ones(3, 0, device=DEVICE), torch.ones(0, 5, device=DEVICE)).cpu(), torch.zeros(3, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """Also operands that the copy engine cannot read, and columns."""
    a, b = randn(37, 48), randn(48, 40, seed=1)
    check(ops.matmul, LAYOUTS[layout](a), b, scale=terms)
    check(ops.matmul, a, LAYOUTS[layout](b), scale=terms)
    check(ops.matmul, a[:1].expand(37, 48), b[:, :1].expand(48, 40), scale=terms)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        *(((4,), (4,)), ((4,), (4, 5)), ((3, 4), (4,)), ((3, 5, 4), (4, 6)), ((2, 1, 3, 4), (5, 4, 6))),
        ((2, 3, 1, 5, 4), (2, 1, 2, 4, 3)),
    ],
    ids=str,
)
def test_batches_and_vectors(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    check(ops.matmul, randn(*left), randn(*right, seed=1), scale=terms)
    if len(left) > 1 and len(right) > 1:
        check(ops.matmul, randn(*left).mT.contiguous().mT, randn(*right, seed=1).mT.contiguous().mT, scale=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", [None, "relu", "gelu"])
def test_linear_epilogue(act: str | None, dtype: torch.dtype) -> None:
    """torch's own 16-bit chain rounds before each step; only where there is none of them is it a yardstick."""
    for shape in ((35, 19), (2, 3, 19), (19,)):
        x, w = randn(*shape, dtype=dtype), randn(41, 19, dtype=dtype, seed=1)
        bias, residual = randn(41, dtype=dtype, seed=2), randn(*shape[:-1], 41, dtype=dtype, seed=3)
        check(ops.linear, x, w, bias, None, act, scale=linear_terms)
        check(ops.linear, x, w, None, LAYOUTS["stepped"](residual) if len(shape) > 1 else residual, act, scale=linear_terms)


@pytest.mark.parametrize("shape", [(40,), (1, 1), (33, 1), (33, 40)], ids=str)
def test_addmm(shape: tuple[int, ...]) -> None:
    for alpha, beta in ((1.0, 1.0), (0.5, -2.0), (2.0, 0.0)):
        c = randn(*shape) if beta else torch.full(shape, float("nan"))
        check(
            ops.addmm, c, randn(33, 21), randn(21, 40, seed=1), beta, alpha,
            scale=lambda c, a, b, beta, alpha: [abs(alpha) * (a.abs() @ b.abs()) + (abs(beta) * c.abs() if beta else 0)],
        )  # fmt: skip
    batch = randn(3, 5, 7), randn(3, 7, 9, seed=1)
    check(ops.addmm, randn(3, 1, 9), *batch, 1.0, 1.0, scale=lambda c, a, b, *_: [c.abs() + a.abs() @ b.abs()])


def test_a_long_sum_is_cut_and_added_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = watched(monkeypatch, lambda kernel, options: kernel.__name__)
    x, w, bias, residual = randn(5, 1500), randn(9, 1500, seed=1), randn(9, seed=2), randn(5, 9, seed=3)
    first = check(ops.linear, x, w, bias, residual, "silu", scale=linear_terms)
    assert launched[:1] == ["product"]
    assert HERE or launched == ["product", "add_parts"]  # how few tiles are few depends on the GPU
    there = [t.to(DEVICE) for t in (x, w, bias, residual)]
    assert torch.equal(run(ops.linear, *there, "silu").cpu(), first)


@pytest.mark.parametrize(("a_rows", "b_rows"), [(True, True), (True, False), (False, True), (False, False)])
def test_descriptors(a_rows: bool, b_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a chip with a copy engine, on rows and on columns; tiles that stick out are filled with zeros."""
    if not HERE:
        monkeypatch.setattr(launch, "chip", lambda device: Chip("sm_90", 227 << 10, 3))
        monkeypatch.setattr(kernels, "_tiles", lambda kind, chip: [kernels.Tile(32, 32, 32, 4, 2)])
    seen = watched(monkeypatch, lambda kernel, options: options["DESCRIPTORS"])
    heads = randn(2, 40, 3, 72, seed=2, dtype=torch.bfloat16).transpose(1, 2)  # as attention has them
    for a, b in (
        (randn(40, 72, dtype=torch.bfloat16), randn(72, 56, dtype=torch.bfloat16, seed=1)),
        (randn(40, 72, dtype=torch.float16), randn(72, 56, dtype=torch.float16, seed=1)),
        (heads, randn(2, 3, 72, 56, dtype=torch.bfloat16, seed=1)),
        (heads, randn(1, 3, 72, 56, dtype=torch.bfloat16, seed=1)),  # one for both: the copy engine cannot
    ):
        a, b = a if a_rows else a.mT.contiguous().mT, b if b_rows else b.mT.contiguous().mT
        check(ops.matmul, a, b, scale=terms)
    has = launch.chip(torch.device(DEVICE)).descriptors
    assert seen == [has, has, has, False]


def test_float32_is_tf32_only_where_torch_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch, lambda kernel, options: options["PRECISION"])
    before = torch.get_float32_matmul_precision()
    x = torch.ones(4, 4, device=DEVICE)
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            run(ops.matmul, x, x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee", "tf32", "ieee"]


def test_float32_is_in_terms_where_the_user_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch's setting, and for float32 alone."""
    seen = watched(monkeypatch, lambda kernel, options: options["PRECISION"])
    x = torch.ones(4, 4, device=DEVICE)
    try:
        for name in ("tf32x3", "bf16x6", None):
            fastnn.set_float32_precision(name)
            for t in (x, x.half()):
                run(ops.matmul, t, t)
    finally:
        fastnn.set_float32_precision(None)
    assert seen == ["tf32x3", "ieee", "bf16x6", "ieee", "ieee", "ieee"]
    with pytest.raises(ValueError, match=r"'tf32x4'.*'tf32x3'"):
        fastnn.set_float32_precision("tf32x4")


def test_nan_and_inf_go_through() -> None:
    a = torch.eye(5, device=DEVICE)
    b = torch.tensor([[float("nan"), float("inf"), -1.0, 2.0, 0.0]], device=DEVICE).expand(5, 5)
    torch.testing.assert_close(run(ops.matmul, a, b), a @ b, equal_nan=True)


def test_the_tile_fills_the_chip() -> None:
    """One wave of the largest tile, smaller ones where there are few, a long sum in parts"""
    chip = Chip("sm_90", 227 << 10, 132)
    for shape, tile, parts in (
        ((2048, 2048, 2048), (128, 256), 1), ((8192, 8192, 8192), (128, 256), 1), ((1024, 1024, 1024), (64, 128), 1),
        ((512, 512, 65536), (128, 128), 8), ((1, 4096, 4096), (16, 256), 8),
    ):  # fmt: skip
        best, cut = kernels._few("half", chip, 1, *shape)[0]
        assert ((best.m, best.n), cut) == (tile, parts), shape


@pytest.mark.parametrize("chip", [Chip("sm_80", 163 << 10, 108), Chip("sm_90", 227 << 10, 132), Chip("gfx942", 64 << 10, 304)])
def test_the_table_serves_every_shape(chip: Chip) -> None:
    for kind in ("half", "tf32", "ieee"):
        for m, n, k in ((1, 1, 1), (8, 4096, 4096), (4096, 4096, 4096), (100000, 17, 3), (16, 16, 1 << 20)):
            tile, parts = kernels._few(kind, chip, 1, m, n, k)[0]
            assert tile.m >= 16
            assert tile.n >= 16
            assert 1 <= parts <= max(1, k // 512)
            size = 2 if kind == "half" else 4
            assert (tile.m + tile.n) * tile.k * size * max(1, tile.stages - (chip.nvidia == 0)) <= chip.shared
