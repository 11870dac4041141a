"""Normalisation and embedding on the GPU, or in Triton's interpreter, against float64, beside torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")

from fastnn.kernels.gpu import embedding
from fastnn.kernels.gpu import norm as kernels
from fastnn.ops import embedding as tables
from fastnn.ops import norm as ops
from gpu import DEVICE, check, filled, run, watched
from rule import LAYOUTS, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of NaN and Inf, where it is the interpreter
]
HALF = (torch.float32, torch.bfloat16)


def _sizes(*tensors: Tensor | None) -> float:
    """No number that goes into a result is larger."""
    return float(torch.stack([t.abs().max() for t in tensors if t is not None]).prod())


def forward_scale(x: Tensor, w: Tensor | None, b: Tensor | None, stats: tuple[int, ...]) -> list[Tensor]:
    """An output is as exact as weight, bias and the distance from the mean are large; a mean as x, a variance as its square."""
    most = 6 * (1 if w is None else float(w.abs().max())) + (0 if b is None else float(b.abs().max()))
    return [filled(x.shape, most), filled(stats, 2 * max(1.0, float(x.abs().max())) ** 2)]


def rows_of(op: Any, dtype: torch.dtype, shape: tuple[int, ...], dims: int, layout: str = "contiguous") -> None:
    centred = "layer" in op.name
    own = list(shape[-dims:])
    w, b = randn(*own, dtype=dtype, seed=1), randn(*own, dtype=dtype, seed=2)
    x = LAYOUTS[layout](randn(*shape, dtype=dtype, scale=2.0) + (3.0 if centred else 0.0))
    r, g, more = (randn(*shape, dtype=dtype, seed=s) for s in (3, 4, 5))
    rows = list(shape[: len(shape) - dims])
    whole = [2 if centred else 1, *rows]

    def scale(x: Tensor, *rest: Any) -> list[Any]:
        most, _ = forward_scale(x, rest[-4], rest[-3], ())
        stats = filled(whole, float(x.abs().max()))
        return [most, stats] if len(rest) == 4 else [most, (x + rest[0]).abs(), stats]

    added = ops.add_layer_norm if centred else ops.add_rms_norm
    backward = ops.layer_norm_backward if centred else ops.rms_norm_backward
    for weight, bias in ((w, b), (None, None)):
        _, stats = check(op, x, weight, bias, own, 1e-5, scale=scale)
        check(added, x, r, weight, bias, own, 1e-5, scale=scale)
        for extra in (None, more):
            check(backward, g, x, weight, stats, extra, own, 1e-5, scale=backward_scale)


def backward_scale(
    g: Tensor, x: Tensor, w: Tensor | None, stats: Tensor, more: Tensor | None, shape: Any, eps: float
) -> list[Tensor]:
    rstd = float(stats[-1].max())
    most = _sizes(g, w) * rstd * 4 + (0 if more is None else float(more.abs().max()))
    rows = x.numel() // int(torch.tensor(shape).prod())
    sums = filled((2, *shape), float(g.abs().max()) * 4 * rows**0.5)
    return [filled(x.shape, most), sums]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("op", [ops.layer_norm, ops.rms_norm], ids=lambda op: op.name)
def test_rows(op: Any, dtype: torch.dtype) -> None:
    for shape, dims in (((5, 37), 1), ((9, 3, 4, 5), 2), ((3, 1100), 1), ((5, 1000), 1), ((3, 200), 1), ((2, 8), 1), ((1, 1), 1)):
        rows_of(op, dtype, shape, dims)


@pytest.mark.parametrize("layout", ["rotated", "stepped", "sliced"])
def test_rows_in_any_layout(layout: str) -> None:
    rows_of(ops.layer_norm, torch.float32, (6, 4, 20), 1, layout)


@pytest.mark.parametrize("op", [ops.layer_norm, ops.rms_norm], ids=lambda op: op.name)
def test_long_rows_are_taken_in_steps(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_WHOLE", 256)
    monkeypatch.setattr(kernels, "_BLOCK", 128)
    for shape in ((6, 300), (21, 304)):
        rows_of(op, torch.float32, shape, 1)


@pytest.mark.parametrize("n", [40000, 50257])
def test_rows_longer_than_a_program_keeps(n: int) -> None:
    rows_of(ops.layer_norm, torch.bfloat16, (3, n), 1)


def test_a_large_mean_leaves_the_variance() -> None:
    x = randn(5, 300) + 1000.0
    check(ops.layer_norm, x, None, None, [300], 1e-5, scale=lambda x, *_: [filled(x.shape, 2000.0), None])
    y = randn(4, 3, 100) + 1000.0
    check(ops.batch_norm, y, None, None, None, None, 1e-5, scale=lambda x, *_: [filled(x.shape, 4.0), None])


SHAPES = [(7, 5), (3, 6, 4, 5)]


def lie(x: Tensor, layout: str) -> Tensor:
    if layout != "channels_last":
        return LAYOUTS[layout](x)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sums_scale(shape: tuple[int, ...], g: Tensor, count: float) -> Tensor:
    return filled(shape, float(g.abs().max()) * 4 * count**0.5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm(shape: tuple[int, ...], layout: str) -> None:
    channels, count = shape[1], torch.Size(shape).numel() // shape[1]
    for dtype in HALF if layout == "contiguous" else (torch.float32,):
        w, b = randn(channels, dtype=dtype, seed=1), randn(channels, dtype=dtype, seed=2)
        mean, var = randn(channels, dtype=dtype, seed=3), randn(channels, dtype=dtype, seed=4).abs() + 0.5
        x, g = lie(randn(*shape, dtype=dtype, scale=2.0), layout), lie(randn(*shape, dtype=dtype, seed=5), layout)
        for weight, bias, given in ((w, b, ()), (None, None, ()), (w, b, (mean, var))):
            rest = given or (None, None)
            _, stats = check(ops.batch_norm, x, weight, bias, *rest, 1e-5,
                             scale=lambda x, w, b, *_: forward_scale(x, w, b, (2, channels)))  # fmt: skip

            def scale(g: Tensor, x: Tensor, w: Tensor | None, stats: Tensor, *_: Any) -> list[Tensor]:
                most = _sizes(g, w) * float((stats[1] + 1e-5).rsqrt().max()) * 6
                return [filled(x.shape, most), sums_scale((2, channels), g, count)]

            check(ops.batch_norm_backward, g, x, weight, stats, not given, 1e-5, scale=scale)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rotated"])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_group_norm(groups: int, layout: str) -> None:
    for dtype, shape in ((torch.float32, (3, 6, 4, 5)), (torch.bfloat16, (2, 6, 70)), (torch.float32, (2, 6))):
        if len(shape) == 2 and groups == 6:
            continue  # a single number has no variance
        w, b = randn(6, dtype=dtype, seed=1), randn(6, dtype=dtype, seed=2)
        x, g = lie(randn(*shape, dtype=dtype, scale=2.0), layout), lie(randn(*shape, dtype=dtype, seed=5), layout)
        for weight, bias in ((w, b), (None, None)):
            _, stats = check(ops.group_norm, x, weight, bias, groups, 1e-5,
                             scale=lambda x, w, b, *_: forward_scale(x, w, b, (2, x.shape[0], groups)))  # fmt: skip

            def scale(g: Tensor, x: Tensor, w: Tensor | None, stats: Tensor, *_: Any) -> list[Tensor]:
                most = _sizes(g, w) * float((stats[1] + 1e-5).rsqrt().max()) * 6
                return [filled(x.shape, most), sums_scale((2, x.shape[1]), g, x.numel())]

            check(ops.group_norm_backward, g, x, weight, stats, groups, 1e-5, scale=scale)


@pytest.mark.parametrize("far", [0.0, 300.0])
def test_few_lines_are_cut_into_parts(far: float) -> None:
    """The stand-in chip has 3 processors: 4 channels of 16400 numbers become five parts each, of two blocks but the last. Far:
    the first numbers of each part, whose mean the others are compared with, are like no other."""
    x, g = randn(2, 4, 8200, scale=3.0) + 2.0, randn(2, 4, 8200, seed=1)
    x[0, :, :1900] += far
    x[1, :, :1000] += far
    _, stats = check(ops.batch_norm, x, None, None, None, None, 1e-5, scale=lambda x, *_: [filled(x.shape, 4.0 + far / 30), None])
    check(ops.batch_norm_backward, g, x, None, stats, True, 1e-5,
          scale=lambda g, x, *_: [filled(x.shape, 4.0), sums_scale((4,), g, 16400).expand(2, 4)])  # fmt: skip


@pytest.mark.parametrize("side", [7, 14, 16])
@pytest.mark.parametrize("groups", [0, 4])
def test_images_of_any_size(groups: int, side: int) -> None:
    """Of pixels that are a multiple of nothing, of 4 and of 8"""
    x, g = randn(3, 8, side, side) + 5.0, randn(3, 8, side, side, seed=1)
    w, b = randn(8, seed=2), randn(8, seed=3)
    stats_of = (3, groups) if groups else (8,)
    given = (groups,) if groups else (None, None)
    forward, backward = (ops.group_norm, ops.group_norm_backward) if groups else (ops.batch_norm, ops.batch_norm_backward)
    _, stats = check(forward, x, w, b, *given, 1e-5, scale=lambda x, w, b, *_: forward_scale(x, w, b, (2, *stats_of)))
    check(backward, g, x, w, stats, groups or True, 1e-5,
          scale=lambda g, x, w, *_: [filled(x.shape, _sizes(g, w) * 6), sums_scale((2, 8), g, x.numel())])  # fmt: skip


# Embedding


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 4), ()], ids=str)
def test_embedding(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for width in (1, 37, 1100):
        indices = torch.randint(9, shape, generator=generator)
        for table in (randn(9, width, dtype=dtype), LAYOUTS["transposed"](randn(9, width, dtype=dtype))):
            check(tables.embedding, table, indices, -1, False)
        g = randn(*shape, width, dtype=dtype, seed=2)
        for padding, by_frequency in ((-1, False), (2, False), (2, True)):
            check(tables.embedding_backward, g, indices.to(torch.int32), 9, padding, by_frequency,
                  scale=lambda g, *_, w=width: [filled((9, w), float(g.abs().max()) * 2)])  # fmt: skip


@pytest.mark.parametrize("padding", [-1, 3])
def test_a_frequent_row_is_summed_in_chunks(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_CHUNK", 8)
    launched = watched(monkeypatch, lambda kernel, options: kernel.__name__)
    indices = torch.tensor([3] * 50 + [0, 5] * 9 + [4] * 8 + [3] * 13 + [6])
    indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(1))]
    for by_frequency in (False, True):
        check(tables.embedding_backward, randn(len(indices), 37), indices, 8, padding, by_frequency,
              scale=lambda g, *_: [filled((8, 37), float(g.abs().max()) * 8)])  # fmt: skip
    assert "scatter_chunks" in launched


def test_the_padding_row_has_no_gradient_and_wrong_indices_give_nan() -> None:
    indices = torch.tensor([0, 2, 2, 5], device=DEVICE)
    grad = run(tables.embedding_backward, torch.ones(4, 3, device=DEVICE), indices, 4, 2, False)
    assert torch.equal(grad.cpu(), torch.tensor([[1.0] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3]))
    rows = run(tables.embedding, torch.ones(4, 3, device=DEVICE), torch.tensor([3, -1, 4], device=DEVICE), -1, False)
    assert rows[0].isfinite().all()
    assert rows[1:].isnan().all()
