"""Depthwise convolutions on the CPU straight from the image, all in float32."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .conv_common import _ARRANGE, _SERIAL, _SMALL_WEIGHT, _even, _keep, _kernel, _three, _up
from .conv_fields import BETWEEN, FLAT, LAST, ROWS
from .engine import threads
from .engine.activation_codes import CODES
from .engine.host import caches, simd
from .engine.workspace import workspace
from .matmul import _format

_FLAT = _kernel("conv_depthwise_flat_code", "flat", torch.float32, "i" * 8)
_LAST = _kernel("conv_depthwise_last_code", "last", torch.float32, "i" * 8)
_ROWS = _kernel("conv_depthwise_rows_code", "rows", torch.float32, "i" * 8)
_BETWEEN = _kernel("conv_depthwise_transposed_code", "between", torch.float32, "i" * 8)


# Depthwise, in planes whose rows keep their length -----------------------------------------------------------------------

_MOST_MASKS = 32 << 10  # bytes; more would take the first cache from the image
_CHEAP = (0, CODES["relu"], CODES["relu6"])


class Flat(NamedTuple):
    """A problem for the kernel ``flat``."""

    fields: array[int]
    tables: tuple[array[int], array[int], Tensor]
    threads: int


@lru_cache(1024)
def _flat(nt: int, x_shape: tuple[int, ...], x_stride: tuple[int, ...], w_shape: tuple[int, ...], y_shape: tuple[int, ...],
          y_stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], transposed: bool) -> Flat | None:
    """None where masks would take too much memory, or a plane does not fill a vector."""
    f = _format(torch.float32)
    (d, h, w), (od, oh, ow) = _three(x_shape[2:], 1), _three(y_shape[2:], 1)
    channels, n = y_shape[1], od * oh * ow
    taps = [[(p - i * g if transposed else i * g - p) for i in range(k)]
            for k, p, g in zip(_three(w_shape[2:], 1), _three(padding, 0), _three(dilation, 1), strict=True)]
    vectors = -(-n // f.lanes)
    groups = -(-vectors // 4)
    if n < f.lanes or groups * 4 * math.prod(map(len, taps)) * _mask_bytes(f.lanes) > _MOST_MASKS:
        return None
    # The last vectors overlap the ones before.
    first = [min(v * f.lanes, n - f.lanes) for g in range(groups) for v in range(4 * g, 4 * g + 4)]
    if groups > 1:
        first[-4:] = [n - v * f.lanes for v in (4, 3, 2, 1)]
    at = torch.tensor(first)[:, None] + torch.arange(f.lanes)
    z, r, c = at // (oh * ow), at // ow % oh, at % ow
    within = [_within(z + a, d) & _within(r + b, h) & _within(c + e, w) for a, b, e in product(*taps)]
    masks = _masks(torch.stack(within).unflatten(1, (groups, 4)).transpose(0, 1))
    shifts = array("q", [f.size * ((a * h + b) * w + e) for a, b, e in product(*taps)])
    places = array("q", [f.size * i for i in first])
    values = {
        "images": x_shape[0], "channels": channels, "outputs": channels // x_shape[1], "xn": x_stride[0] * f.size,
        "xc": x_stride[1] * f.size, "yn": y_stride[0] * f.size, "yc": y_stride[1] * f.size, "w_step": len(shifts) * f.size,
        "taps": len(shifts), "shifts": shifts.buffer_info()[0], "groups": groups, "places": places.buffer_info()[0],
        "masks": masks.data_ptr()}
    return Flat(array("q", [values[name] for name in FLAT]), (shifts, places, masks),
                1 if 8 * x_shape[0] * channels * n * len(shifts) < _SERIAL else nt)


def _within(at: Tensor, size: int) -> Tensor:
    return (at >= 0) & (at < size)


def _mask_bytes(lanes: int) -> int:
    """As ``simd.mask_bytes`` in compiled code, for float32."""
    return lanes // 8 if simd().name == "avx512" else lanes * 4


def _masks(met: Tensor) -> Tensor:
    """Masks (…, lane) as the kernels read them."""
    if _mask_bytes(met.shape[-1]) == 4 * met.shape[-1]:
        return -met.int().contiguous()
    return (met.unflatten(-1, (-1, 8)).int() << torch.arange(8, dtype=torch.int32)).sum(-1).byte().contiguous()


def _run_flat(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
              padding: Sequence[int], dilation: Sequence[int], transposed: bool, groups: int, act: int) -> bool:
    """A depthwise convolution in float32 of dense planes, of stride 1, all but whose first dimension keep their size. False where
    this is not so.
    """
    if (x.dtype != torch.float32 or groups == 1 or groups != x.shape[1] or max(stride) > 1 or act not in _CHEAP
            or simd().name not in ("avx512", "avx2") or x.shape[3:] != out.shape[3:] or not weight.is_contiguous()
            or (transposed and out.shape[1] != groups)):
        return False
    if not (x.stride(-1) == 1 and out.stride(-1) == 1 and _even(x.stride()[:1:-1], x.shape[:1:-1])
            and _even(out.stride()[:1:-1], out.shape[:1:-1])):
        return False
    p = _flat(threads.count(), x.shape, x.stride(), weight.shape, out.shape, out.stride(), tuple(padding), tuple(dilation),
              transposed)
    if p is None:
        return False
    _FLAT.run(p.threads, p.fields.buffer_info()[0], x.data_ptr(), weight.data_ptr(), out.data_ptr(),
              0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(), act)
    return True


# Depthwise, in planes, four rows at once --------------------------------------------------------------------------------

_ROW_FILTERS = ((3, 1), (5, 1), (7, 1), (3, 2), (5, 2))  # sizes and strides, of both dimensions, that the kernel is made for


class Rows(NamedTuple):
    """A problem for the kernel ``rows``."""

    fields: array[int]
    tables: tuple[array[int], Tensor]
    threads: int


@lru_cache(1024)
def _rows(nt: int, x_shape: tuple[int, ...], x_stride: tuple[int, ...], size: int, y_shape: tuple[int, ...],
          y_stride: tuple[int, ...], stride: int, padding: tuple[int, ...], transposed: bool) -> Rows:
    f = _format(torch.float32)
    (n, inputs, h, w), (_, channels, oh, ow) = x_shape, y_shape
    ph, pw = (size - 1 - p if transposed else p for p in padding)
    first = [max(0, min(i, ow - f.lanes)) for i in range(0, ow, f.lanes)]
    columns = array("q", [4 * v for i in first for v in (i * stride - pw, i)])
    starts = range(size) if stride == 1 else [j + k for j in range(0, size, 2) for k in (0, f.lanes)]
    at = stride * torch.tensor(first)[:, None, None] - pw + torch.tensor(list(starts))[:, None] + torch.arange(f.lanes)
    masks = _masks(_within(at, w))
    taps = size * size
    values = {
        "images": n, "channels": channels, "outputs": channels // inputs, "h": h, "oh": oh, "ow": ow, "ph": ph,
        "xn": 4 * x_stride[0], "xc": 4 * x_stride[1], "xh": 4 * x_stride[2], "yn": 4 * y_stride[0], "yc": 4 * y_stride[1],
        "yh": 4 * y_stride[2], "w_step": 4 * taps, "w_first": 4 * (taps - 1) if transposed else 0,
        "w_row": -4 * size if transposed else 4 * size, "w_tap": -4 if transposed else 4, "size": size, "stride": stride,
        "blocks": len(first), "columns": columns.buffer_info()[0], "masks": masks.data_ptr()}
    return Rows(array("q", [values[name] for name in ROWS]), (columns, masks),
                1 if 8 * n * channels * oh * ow * taps < _SERIAL else nt)


def _run_rows(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
              padding: Sequence[int], dilation: Sequence[int], transposed: bool, groups: int, act: int) -> bool:
    """A depthwise convolution in float32 of planes with a common filter and stride, of rows that fill more than half of a vector.
    False where this is not so.
    """
    if (x.dtype != torch.float32 or x.dim() != 4 or groups == 1 or groups != x.shape[1] or act not in _CHEAP
            or simd().name not in ("avx512", "avx2") or not weight.is_contiguous() or max(dilation) > 1):
        return False
    (size, other), (oh, ow) = weight.shape[2:], out.shape[2:]
    if (size != other or stride[0] != stride[1] or (size, stride[0]) not in _ROW_FILTERS or oh < 4
            or 2 * ow <= _format(x.dtype).lanes or x.stride(3) != 1 or out.stride(3) != 1
            or (transposed and (stride[0] > 1 or out.shape[1] != groups))):
        return False
    p = _rows(threads.count(), x.shape, x.stride(), size, out.shape, out.stride(), stride[0], tuple(padding), transposed)
    _ROWS.run(p.threads, p.fields.buffer_info()[0], x.data_ptr(), weight.data_ptr(), out.data_ptr(),
              0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(), act)
    return True


# Depthwise, channels last -----------------------------------------------------------------------------------------------

_AS_FAST = range(9, 32)  # rows of outputs in which 3 × 3 filters are as fast, or faster, position by position (Zen 4)


@lru_cache(1024)
def _last(nt: int, x_shape: tuple[int, ...], x_stride: tuple[int, ...], size: int, y_shape: tuple[int, ...],
          y_stride: tuple[int, ...], stride: int, padding: tuple[int, ...],
          transposed: bool) -> tuple[array[int], array[int], int]:
    """The fields, the offsets by which the weight is arranged, the number of threads."""
    (n, channels, h, w), (_, _, oh, ow) = x_shape, y_shape
    ph, pw = (size - 1 - p if transposed else p for p in padding)
    lanes = _format(torch.float32).lanes
    block = channels if channels <= 160 else 64  # so much of what a few positions meet stays in the first cache
    values = {
        "images": n, "channels": channels, "h": h, "w": w, "oh": oh, "ow": ow, "ph": ph, "pw": pw, "xn": 4 * x_stride[0],
        "xh": 4 * x_stride[2], "xw": 4 * x_stride[3], "yn": 4 * y_stride[0], "yh": 4 * y_stride[2], "yw": 4 * y_stride[3],
        "size": size, "stride": stride, "block": block,
        "part": channels if n * oh >= 16 * nt else _up(-(-channels // 2), lanes)}
    offsets = array("q", [4 * i for i in range(size * size)])
    if transposed:
        offsets.reverse()
    serial = 8 * n * channels * oh * ow * size * size < _SERIAL
    return array("q", [values[name] for name in LAST]), offsets, 1 if serial else nt


def _run_last(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
              padding: Sequence[int], dilation: Sequence[int], transposed: bool, groups: int, act: int) -> bool:
    """A depthwise convolution in float32, channels last, with a common filter and stride. False where this is not so."""
    if (x.dtype != torch.float32 or x.dim() != 4 or not groups == x.shape[1] == out.shape[1] or groups == 1 or act not in _CHEAP
            or not weight.is_contiguous() or max(dilation) > 1):
        return False
    (size, other), (oh, ow) = weight.shape[2:], out.shape[2:]
    if (size != other or stride[0] != stride[1] or (size, stride[0]) not in _ROW_FILTERS or oh < 2 or ow < 4
            or (transposed and stride[0] > 1) or (size == 3 and stride[0] == 1 and ow in _AS_FAST)):
        return False
    fields, offsets, nt = _last(threads.count(), x.shape, x.stride(), size, out.shape, out.stride(), stride[0], tuple(padding),
                                transposed)
    lanes = _format(x.dtype).lanes
    panels, taps = -(-groups // lanes), size * size

    def arrange(address: int) -> int:
        _ARRANGE[x.dtype].run(1, 1, groups, 1, taps, panels, weight.data_ptr(), 0, 4 * taps, 4, offsets.buffer_info()[0], address)
        return 0
    need = 4 * panels * lanes * taps
    keep = _keep(weight, need, arrange, ("last", transposed)) if weight.numel() >= _SMALL_WEIGHT else None
    at = keep.address if keep else workspace(need)
    if keep is None:
        arrange(at)
    _LAST.run(nt, fields.buffer_info()[0], x.data_ptr(), at, out.data_ptr(), 0 if bias is None else bias.data_ptr(),
              0 if residual is None else residual.data_ptr(), act)
    return True


# Depthwise, transposed, stride 2, in planes -----------------------------------------------------------------------------


class Between(NamedTuple):
    """A problem for the kernel ``between``."""

    fields: array[int]
    table: array[int]
    scratch: int
    threads: int


@lru_cache(1024)
def _between(nt: int, x_shape: tuple[int, ...], x_stride: tuple[int, ...], w_stride: tuple[int, ...], kernel: tuple[int, ...],
             y_shape: tuple[int, ...], y_stride: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> Between:
    f = _format(torch.float32)
    (n, channels, h, w), (_, _, oh, ow) = x_shape, y_shape
    # For each remainder of a row or column of the output: (its distance in the input, the tap)
    rows, columns = ([[((r + p - i) // s, i) for i in range(k) if (r + p - i) % s == 0] for r in range(s)]
                     for k, s, p in zip(kernel, stride, padding, strict=True))
    (low, high), (left, right) = ((min(d), max(d)) for d in ([delta for part in parts for delta, _ in part]
                                                             for parts in (rows, columns)))
    left = max(0, -left)
    pitch = _up(left + max(w, -(-ow // 2) + max(0, right)) + 2 * f.lanes, f.lanes)
    high_rows = -(-oh // stride[0])
    band = min(high_rows, max(8, caches().l1 // 2 // (pitch * f.size) - (high - low)))
    table = array("q")
    for part in rows:
        taps = [[((a - low) * pitch + b + left) * f.size for a, _ in part for b, _ in column] for column in columns]
        at = [[i * w_stride[2] + j * w_stride[3] for _, i in part for _, j in column] for column in columns]
        table.extend([len(taps[0]), len(taps[1])])
        for offset, place in zip(taps[0] + taps[1], at[0] + at[1], strict=True):
            table.extend([offset, place * f.size])
    values = {
        "images": n, "channels": channels, "h": h, "w": w, "oh": oh, "ow": ow, "xn": x_stride[0] * f.size,
        "xc": x_stride[1] * f.size, "xh": x_stride[2] * f.size, "yn": y_stride[0] * f.size, "yc": y_stride[1] * f.size,
        "yh": y_stride[2] * f.size, "wc": w_stride[0] * f.size, "sh": stride[0], "table": table.buffer_info()[0], "low": low,
        "more": high - low, "left": left, "band": band, "pitch": pitch}
    return Between(array("q", [values[name] for name in BETWEEN]), table,
                   _up((band + high - low + 5) * pitch * f.size + 256, 4096),
                   1 if 8 * n * channels * h * w * math.prod(kernel) < _SERIAL else nt)


def _run_between(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int], groups: int, act: int) -> bool:
    """A depthwise transposed convolution of planes in float32 whose rows are twice as long. False where this is not so."""
    if (x.dtype != torch.float32 or x.dim() != 4 or not groups == x.shape[1] == out.shape[1] or groups == 1 or stride[1] != 2
            or max(dilation) > 1 or residual is not None or act or out.stride(3) != 1 or x.stride(3) != 1):
        return False
    p = _between(threads.count(), x.shape, x.stride(), weight.stride(), tuple(weight.shape[2:]), out.shape, out.stride(),
                 tuple(stride), tuple(padding))
    ws = workspace(p.threads * p.scratch)
    _BETWEEN.run(p.threads, p.fields.buffer_info()[0], x.data_ptr(), weight.data_ptr(), out.data_ptr(),
                 0 if bias is None else bias.data_ptr(), ws, p.scratch)
    return True
