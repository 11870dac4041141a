"""Convolutions on the CPU: which kernel serves a call, and how a problem is described to it.

Everything is three-dimensional here: a missing dimension has size 1. A convolution of any stride is one problem; a transposed
one falls into as many *phases* as the product of its strides, each a convolution of stride 1 with some of the taps, so that
nothing is multiplied by the zeros between (Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?").

More ways, for float32: 3 × 3 filters by Winograd's algorithm where its errors obey the rule and it is faster, filters of one tap
as a plain product, transposed ones of long rows as a product for all taps and a sum, small groups and large filters from padded
planes, large filters over many short sequences with sequences side by side in a vector, depthwise ones straight from the image.
Which one is taken depends on shapes and strides alone, so a call has the same bits each time; only an image with an Inf or NaN is
computed anew where Winograd's way met it.

Environment: ``FASTNN_WINOGRAD``, 0 to do without (default 1).
"""

from __future__ import annotations

import ctypes
import math
import os
from array import array
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conv_fields import BATCHED, BETWEEN, DIRECT, FIELDS, FLAT, LAST, ROWS, SCATTER, WINOGRAD
from .engine import overhead, packed, threads
from .engine.activation_codes import CODES
from .engine.build import Kernel, made_by
from .engine.host import caches, simd
from .engine.workspace import workspace
from .matmul import _format, multiply

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SERIAL = 1 << 19  # multiplications below which a second thread costs more than it brings
_SMALL_WEIGHT = 4096  # elements below which arranging anew is cheaper than looking the arranged weight up
_RUN, _MEETING, _OUT = 48, 32, 24  # as in conv_code
_FEW, _SHORT = 16, 8  # channels below which, positions of a row from which on a block is packed at once, not panel by panel
PLANES, PIXELS, WEIGHTS, WEIGHTS_LAST = range(4)


def _kernel(module: str, kind: str, dtype: torch.dtype, signature: str) -> Kernel:
    return Kernel(f"{kind}_{_NAMES[dtype]}", signature, made_by(module, kind, _NAMES[dtype]))


_CONVOLUTION = {d: _kernel("conv_code", "convolution", d, "i" * 11 + "ff") for d in _NAMES}
_DEPTHWISE = {d: _kernel("conv_depthwise_code", "depthwise", d, "i" * 11 + "ff") for d in _NAMES}
_DEPTHWISE_WEIGHT = {d: _kernel("conv_depthwise_weight_code", "depthwise_weight", d, "i" * 8) for d in _NAMES}
_GROUPED = {d: _kernel("conv_grouped_code", "grouped", d, "i" * 10 + "ff") for d in _NAMES}
# By a tile of outputs, and where they are not 3 or 3 × 3, the taps of a filter
_TILES = ("1x4", "2x4", "3x4", "2x2_of_4")
_WINOGRAD = {t: Kernel(f"winograd_{t}", "i" * 11 + "ff", made_by("conv_winograd_code", "winograd", t)) for t in _TILES}
_WINOGRAD_WEIGHT = {t: Kernel(f"winograd_weight_{t}", "i" * 16, made_by("conv_winograd_code", "winograd_weight", t))
                    for t in _TILES}
_SCATTER = _kernel("conv_transposed_code", "scatter", torch.float32, "i" * 10 + "ff")
_DIRECT = _kernel("conv_direct_code", "direct", torch.float32, "i" * 10 + "ff")
_GROUPED_WEIGHT = _kernel("conv_grouped_weight_code", "grouped_weight", torch.float32, "i" * 8)
_BATCHED = _kernel("conv_batched_code", "batched", torch.float32, "i" * 10 + "ff")
_FLAT = _kernel("conv_depthwise_flat_code", "flat", torch.float32, "i" * 8)
_LAST = _kernel("conv_depthwise_last_code", "last", torch.float32, "i" * 8)
_ROWS = _kernel("conv_depthwise_rows_code", "rows", torch.float32, "i" * 8)
_BETWEEN = _kernel("conv_depthwise_transposed_code", "between", torch.float32, "i" * 8)
_ARRANGE = {d: _kernel("conv_code", "arrange", d, "i" * 12) for d in _NAMES}


class Phase(NamedTuple):
    """One problem for the kernel: its fields, and how the weight's taps are to be arranged for it."""

    fields: array[int]
    taps: array[int]  # (d, h, w) of each, relative to a position's first element
    offsets: array[int]  # of each filter tap in the weight, in bytes
    start: int  # of the first output, in bytes
    depthwise: bool
    grouped: bool
    groups: int
    channels: int
    outputs: int
    panels: int
    arranged: int  # bytes of the arranged weight; 0: it is read where it is
    scratch: int  # bytes a thread
    threads: int


def _three(values: Sequence[int], missing: int) -> list[int]:
    return [missing] * (3 - len(values)) + list(values)


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _divide(nt: int, groups: int, rows: int, columns: int) -> tuple[int, int]:
    """How many ways to cut (rows, columns), counted in the least that a thread should get, for nt threads."""
    if groups >= 4 * nt or groups % nt == 0:
        return 1, 1
    for n in range(nt, 0, -1):
        if nt % n == 0 and (n <= columns or n == 1):
            return max(1, min(nt // n, rows)), n
    return 1, 1


@lru_cache(1024)
def _plan(kind: int, dtype: torch.dtype, nt: int, x_shape: tuple[int, ...], x_stride: tuple[int, ...], w_shape: tuple[int, ...],
          w_stride: tuple[int, ...], y_shape: tuple[int, ...], y_stride: tuple[int, ...], stride: tuple[int, ...],
          padding: tuple[int, ...], dilation: tuple[int, ...], transposed: bool, groups: int) -> list[Phase]:
    """The phases of a problem of these shapes and strides (in elements)."""
    f = _format(dtype)
    size, unit = f.size, f.unit
    in_size, out_size = _three(x_shape[2:], 1), _three(y_shape[2:], 1)
    kernel, step, dil = _three(w_shape[2:], 1), _three(stride, 1), _three(dilation, 1)
    pad = _three(padding, 0)
    xs, ys, ws = ([s * size for s in _three(t[2:], 0)] for t in (x_stride, y_stride, w_stride))
    for _ in range(2):  # a width of 1, as where a sequence is taken for an image, goes to the front: rows are to be long
        if in_size[2] == out_size[2] == kernel[2] == 1 and pad[2] == 0:
            in_size, out_size, kernel, step, dil, pad, xs, ys, ws = (
                [v[2], *v[:2]] for v in (in_size, out_size, kernel, step, dil, pad, xs, ys, ws))
    channels, outputs = x_shape[1] // groups, y_shape[1] // groups
    depthwise = _depthwise(channels, outputs, groups, kind)
    grouped = kind == PIXELS and groups > 1 and not depthwise and outputs % f.lanes == 0
    axes: list[list[_Along]] = []  # of each dimension and phase
    for n, k, s, p, d in zip(out_size, kernel, step, pad, dil, strict=True):
        if transposed:
            axes.append([(r, -(-(n - r) // s), sorted(((r + p - i * d) // s, i) for i in range(k) if (r + p - i * d) % s == 0))
                         for r in range(min(s, n))])
        else:
            axes.append([(0, n, [(i * d - p, i) for i in range(k)])])
    if kind == PLANES and not depthwise and channels * outputs >= _LEAST_IN_REGIONS and max(dil) > 1:
        regions = [[part for whole in axis for part in _regions(*whole, 1 if transposed else s, n, s if transposed else 1)]
                   for axis, s, n in zip(axes, step, in_size, strict=True)]
        if math.prod(map(_products, regions)) <= _MOST_OF_PRODUCTS * math.prod(map(_products, axes)):
            axes = regions
    phases = []
    for phase in product(*axes):
        first, positions, along = (list(v) for v in zip(*phase, strict=True))
        taps = list(product(*along))
        offsets = array("q", [sum(i * s for (_, i), s in zip(tap, ws, strict=True)) for tap in taps])
        deltas = [[delta for delta, _ in tap] for tap in taps]
        moves = [1, 1, 1] if transposed else step
        y_steps = [s * m for s, m in zip(ys, step, strict=True)] if transposed else ys
        images, whole, x_steps = x_shape[0], list(in_size), list(xs)
        xn, yn = x_stride[0] * size, y_stride[0] * size
        # A kernel of one tap sees every position alike: the dimensions become one, if memory allows.
        if not depthwise and not grouped and deltas == [[0, 0, 0]] and moves == [1, 1, 1] and positions == whole and all(
                _even(v[::-1], whole[::-1]) for v in (x_steps, y_steps)):
            flat = math.prod(whole)
            x_w, y_w = (_innermost(v, whole) for v in (x_steps, y_steps))
            if kind != PLANES and (images == 1 or (xn == flat * x_w and yn == flat * y_w)):
                flat, images = flat * images, 1
            positions = whole = [1, 1, flat]
            x_steps, y_steps = [0, 0, x_w], [0, 0, y_w]
        flat_row = images == 1 and whole == positions == [1, 1, positions[2]] and moves[2] == 1
        direct = kind == PIXELS and not depthwise and not f.half and deltas == [[0, 0, 0]] and flat_row
        # Neighbouring taps along w whose channels are neighbours in memory are one.
        span, here = 1, [delta for delta, _ in along[2]]
        if kind in (PIXELS, WEIGHTS_LAST) and here and x_steps[2] == channels * size and groups == 1 and here == list(
                range(here[0], here[0] + len(here))):
            span = len(here)
            deltas = [t for t in deltas if t[2] == here[0]]
        table = array("q", [n for delta in deltas for n in delta])
        channels_all, total = groups * outputs, images * math.prod(positions)
        depth_all = channels * len(taps)
        ops = groups * outputs * depth_all * total
        threads_used = 1 if ops * (8 if depthwise else 1) < _SERIAL else nt
        w_g, w_o, w_c = (outputs if not transposed else channels) * w_stride[0] * size, w_stride[0] * size, w_stride[1] * size
        if transposed:
            w_o, w_c = w_c, w_o
        in_place = kind == PLANES and not f.half and list(offsets) == [i * size for i in range(len(taps))] and (
            channels == 1 or w_c == len(taps) * size) and (not depthwise or w_g == outputs * w_o)
        layout = (_layout_depthwise(kind, f, channels_all, positions, deltas, moves, whole[2]) if depthwise else
                  _layout_grouped(f, outputs, len(deltas), positions[1], whole[2] * x_steps[2] * moves[1]) if grouped else
                  _layout(kind, f, threads_used, groups, channels, outputs, depth_all, total, positions[2], len(deltas)))
        if in_place or kind >= WEIGHTS:
            rows, arranged = (w_g, w_o, size), 0
        elif kind == PLANES:
            rows = (outputs * depth_all * unit, depth_all * unit, unit)
            arranged = groups * outputs * depth_all * unit
        elif depthwise:
            rows, arranged = (0, 0, 0), layout["panels"] * f.lanes * depth_all * unit
        else:
            each = _up(outputs, f.lanes) * depth_all * unit
            rows, arranged = (each, 0, 0), groups * each
        values = layout | {
            "images": images, "channels": channels, "outputs": outputs, "groups": groups, "od": positions[0], "oh": positions[1],
            "ow": positions[2], "d": whole[0], "h": whole[1], "w": whole[2], "sd": moves[0], "sh": moves[1], "sw": moves[2],
            "xn": xn, "xc": x_stride[1] * size, "xd": x_steps[0], "xh": x_steps[1], "xw": x_steps[2], "yn": yn,
            "yo": y_stride[1] * size, "yd": y_steps[0], "yh": y_steps[1], "yw": y_steps[2], "wg": rows[0], "wr": rows[1],
            "wk": rows[2], "taps": len(deltas), "tap": table.buffer_info()[0], "span": span, "direct": int(direct)}
        scratch = values.pop("scratch")
        start = sum(r * s for r, s in zip(first, ys, strict=True))
        phases.append(Phase(array("q", [values[name] for name in FIELDS]), table, offsets, start, depthwise, grouped, groups,
                            channels, outputs, values["panels"], arranged, scratch, threads_used))
    return phases


_Along = tuple[int, int, list[tuple[int, int]]]  # along a dimension: (first output, positions, taps (delta, index))
# Channels times outputs from which on positions that meet fewer taps are problems of their own, where that leaves so much to do:
# the weight is arranged for each of them, which new weights at each call must repay too.
_LEAST_IN_REGIONS, _MOST_OF_PRODUCTS = 1 << 12, 0.75


def _regions(first: int, positions: int, taps: list[tuple[int, int]], move: int, size: int, apart: int) -> list[_Along]:
    """Stretches of positions, each with the taps that meet the input's ``size`` elements; outputs lie ``apart``."""
    within = [(max(0, -(delta // move)), (size - 1 - delta) // move + 1) for delta, _ in taps]
    ends = sorted({0, positions, *(n for pair in within for n in pair if 0 < n < positions)})
    return [(first + a * apart, b - a, [(delta + a * move, i) for (delta, i), (low, high) in zip(taps, within, strict=True)
                                        if low <= a and b <= high]) for a, b in pairwise(ends)]


def _products(axis: Sequence[_Along]) -> int:
    return sum(n * len(taps) for _, n, taps in axis)


def _even(steps: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether the elements of dimensions, the innermost first, are at even distances."""
    expected = None
    for step, n in zip(steps, sizes, strict=True):
        if n > 1:
            if expected is not None and step != expected:
                return False
            expected = step * n
    return True


def _innermost(steps: Sequence[int], sizes: Sequence[int]) -> int:
    return next((step for step, n in zip(reversed(steps), reversed(sizes), strict=True) if n > 1), steps[2])


def _layout(kind: int, f: Any, nt: int, groups: int, channels: int, outputs: int, depth_all: int, total: int, row: int,
            taps: int) -> dict[str, int]:
    """Sizes of blocks, the division among threads, and where a thread's tables lie."""
    lanes, unit, l2 = f.lanes, f.unit, caches().l2
    vectors, out_vectors = -(-total // lanes), -(-outputs // lanes)

    def runs(n: int) -> int:
        return min(n, (n + row - 2) // row + 1) if n else 1

    panels = at_outs = at_meet = meet = at_bias = 0
    if kind == PLANES:
        parts, cuts = _divide(nt, groups, -(-outputs // f.rows), vectors // (2 * f.vecs))
        fit = l2 // 8 // (max(1, depth_all) * f.vecs * lanes * unit)  # panels
        few = channels < _FEW and fit >= 4 and row >= _SHORT and not f.half  # for ``shallow`` in conv_code
        width = min((min(32, fit) if few else 4) * f.vecs, max(1, -(-vectors // cuts)))
        depth = _cut(depth_all, max(64, l2 // 4 // (width * lanes * unit)))
        block = width * lanes
        sums_row = (-(-block * unit // 64) | 1) * 64 if few else block * unit
        packing = depth * sums_row
        rows = min(outputs, _up(-(-outputs // parts), f.rows) + f.rows) if depth_all > depth else f.rows
        at_outs = 4096 + runs(block) * _RUN
        at_meet = at_outs + runs(block) * _OUT
        meet = 0 if few else taps * runs(f.vecs * lanes) * _MEETING
        at_bias = _up(at_meet + (taps * runs(block) * _MEETING if few else 4 * meet), 64)
        at_sums = at_bias + (outputs * f.vecs * lanes * unit if few else 0)
    elif kind == PIXELS:
        panels = -(-out_vectors // f.vecs)
        cuts, parts = _divide(nt, groups, panels, total // 32)
        panels = min(out_vectors, _up(panels, cuts))
        width = 48
        depth = _cut(depth_all, max(64, l2 * 3 // 8 // (width * unit)))
        sums_row, packing, rows = out_vectors * lanes * unit, width * depth * unit, width
        at_sums = _up(4096 + runs(width) * _RUN, 64)
    else:
        k = depth_all
        parts, cuts = (1, 1) if groups >= 4 * nt or groups % nt == 0 else (max(1, min(nt, k // f.rows)), 1)
        sums_row = out_vectors * lanes * unit
        width = min(total, max(lanes, min(256, _up(l2 // 2 // sums_row, lanes))))
        rows = min(k, _up(-(-k // parts), f.rows) + f.rows)
        depth = min(rows, max(f.rows, l2 // 4 // (max(1, width) * unit) // f.rows * f.rows))
        packing = max(_up(width, lanes) * depth, lanes * lanes) * unit
        at_meet = _up(4096 + runs(width) * _RUN, 64)
        at_outs = at_meet + taps * runs(width) * _MEETING
        at_sums = _up(at_outs + width * sums_row + 64, 64)
    at_pack = _up(at_sums + rows * sums_row + 64, 64)
    return {"parts": parts, "cuts": cuts, "width": width, "depth": depth, "panels": panels, "at_runs": 4096, "at_outs": at_outs,
            "at_meet": at_meet, "meet": meet, "at_bias": at_bias, "at_sums": at_sums, "sums": sums_row, "at_pack": at_pack,
            "scratch": _up(at_pack + packing + 256, 4096)}


def _depthwise(channels: int, outputs: int, groups: int, kind: int) -> bool:
    """Whether each input channel has filters of its own; vectors along the channels need exactly one each."""
    return groups > 1 and channels == 1 and (outputs == 1 or kind in (PLANES, WEIGHTS))


def _layout_depthwise(kind: int, f: Any, channels: int, positions: list[int], deltas: list[list[int]],
                      moves: list[int], width: int) -> dict[str, int]:
    """As ``_layout``, for the depthwise kernels: ``depth`` is the number of rows in a band, ``width`` those copied at once."""
    vector, vectors, taps = f.lanes * f.unit, -(-channels // f.lanes), len(deltas)
    at_outs = _up(taps * 48 + moves[2] * 24 + 192, 64)
    deep, high, wide = (max(d) - min(d) + 1 for d in zip(*deltas, strict=True)) if deltas else (1, 1, 1)
    sums = _up(taps, 9) * vector
    few = depth = packing = at_sums = 0
    if kind == PIXELS:
        sums = 4 * (vectors + 1) * vector
    elif kind == WEIGHTS_LAST:
        row = ((positions[2] - 1) * moves[2] + wide) * vector
        few = max(1, min(256 // positions[2], caches().l1 // 4 // (row * moves[1])))
        at_sums = at_outs + 2 * sums
        sums = 2 * sums + (few * moves[1] + high) * max(positions[2], width) * vector
        depth = _up(max(few, min(positions[1], (caches().l2 // 4 // (row * deep) - high) // moves[1])), few)
        packing = 2 * row * deep * (depth * moves[1] + high)
    else:
        row = (positions[2] + 2 * f.lanes + wide) * f.unit * moves[2]
        fits = (caches().l2 // 8 // (row * deep) - high) // moves[1] + 1
        depth = max(8, min(positions[1], fits, 256 * f.lanes // positions[2]) // 8 * 8)
        packing = row * deep * ((depth + 6) * moves[1] + high)
        few = max(1, min(depth, caches().l1 // 4 // (row * moves[1])))
        if kind == PLANES:
            sums = (2 * taps + 8) * vector + 8 * (positions[2] + 2 * f.lanes) * f.unit
    at_pack = _up(at_outs + sums, 64)
    return dict.fromkeys(FIELDS, 0) | {"parts": 1, "cuts": 1, "depth": depth, "width": few,
                                       "panels": vectors if kind == PIXELS else 0, "at_outs": at_outs, "at_sums": at_sums,
                                       "at_pack": at_pack, "scratch": _up(at_pack + packing + 512, 4096)}


def _layout_grouped(f: Any, outputs: int, taps: int, rows: int, row: int) -> dict[str, int]:
    """As ``_layout``: ``depth`` rows of positions, whose rows of the image take half of L2, are worked on group by group."""
    at_outs = _up(taps * 48, 64)
    return dict.fromkeys(FIELDS, 0) | {"parts": 1, "cuts": 1, "panels": outputs // f.lanes, "at_outs": at_outs,
                                       "depth": max(1, min(rows, caches().l2 // 2 // max(1, row))),
                                       "scratch": _up(at_outs + 8 * f.lanes * f.unit, 4096)}


def _cut(n: int, most: int) -> int:
    """n in as few, as even stretches as can be."""
    return -(-n // -(-n // most)) if n > 0 else 1


def _run(kind: int, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
         stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool, groups: int, act: int) -> str:
    dtype = x.dtype
    nt = threads.count()
    phases = _plan(kind, dtype, nt, x.shape, x.stride(), weight.shape, weight.stride(), out.shape, out.stride(), tuple(stride),
                   tuple(padding), tuple(dilation), transposed, groups)
    need = sum(p.arranged for p in phases)
    keep = _kept(weight, kind, phases, transposed, groups) if need and weight.numel() >= _SMALL_WEIGHT else None
    scratch = max(p.threads * p.scratch for p in phases)
    ws = workspace(scratch + (0 if keep else _up(need, 4096)))
    at = ws + scratch
    if keep is not None:
        at = keep.address
    elif need:
        _arrange(weight, kind, phases, transposed, groups, at)
    x_at, y_at, w_at = x.data_ptr(), out.data_ptr(), weight.data_ptr()
    b, r = 0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr()
    for p in phases:
        kernel, which = (_GROUPED, ()) if p.grouped else (_DEPTHWISE if p.depthwise else _CONVOLUTION, (kind,))
        kernel[dtype].run(p.threads, *which, p.fields.buffer_info()[0], x_at, at if p.arranged else w_at, y_at + p.start, b,
                          r + p.start if r else 0, act, ws, p.scratch, 0.0, 0.0)
        at += p.arranged
    return "grouped" if phases[0].grouped else "depthwise" if phases[0].depthwise else "implicit im2col"


def _arrange(weight: Tensor, kind: int, phases: list[Phase], transposed: bool, groups: int, at: int) -> None:
    size = weight.itemsize
    s_o, s_c = weight.stride(0) * size, weight.stride(1) * size
    s_g = weight.shape[0] // groups * s_o
    if transposed:
        s_o, s_c = s_c, s_o
    for p in phases:
        many, outputs, step = groups, p.outputs, s_o
        if p.depthwise and p.panels:  # one panel a vector of channels, whose filters are groups
            many, outputs, step = 1, groups, s_g
        _ARRANGE[weight.dtype].run(p.threads, many, outputs, p.channels, len(p.offsets), p.panels, weight.data_ptr(), s_g, step,
                                   s_c, p.offsets.buffer_info()[0], at)
        at += p.arranged


def _kept(weight: Tensor, kind: int, phases: list[Phase], transposed: bool, groups: int) -> packed.Packing | None:
    """The kept arrangement of a weight that has been seen before, unchanged."""
    def pack(address: int) -> int:
        _arrange(weight, kind, phases, transposed, groups, address)
        return 0
    how = (kind, transposed, groups, *((p.panels, p.offsets.tobytes()) for p in phases))
    return _keep(weight, sum(p.arranged for p in phases), pack, how)


def _keep(weight: Tensor, size: int, pack: Callable[[int], int], how: Hashable) -> packed.Packing | None:
    if weight.is_inference() or not (weight.is_contiguous() or weight.movedim(1, -1).is_contiguous()):
        return None
    return packed.get(weight, size, pack, how)


# A product without packing by taps --------------------------------------------------------------------------------------

_LONG_ROWS = 128  # positions of an image from which on its planes are worth a product of their own (Zen 3)


def _run_product(last: bool, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                 stride: Sequence[int], padding: Sequence[int], transposed: bool, groups: int, act: int) -> bool:
    """A kernel of one tap in dense float32: the planes are rows of the right operand, the pixels rows of the left one, and the
    product's own kernel reads them as they are. False where this is not so.
    """
    if (x.dtype != torch.float32 or groups != 1 or math.prod(weight.shape[2:]) != 1 or max(stride) > 1 or max(padding) > 0
            or x.numel() == 0):
        return False
    w_o, w_c = (4 * weight.stride(d) for d in ((1, 0) if transposed else (0, 1)))
    n, channels, outputs = x.shape[0], x.shape[1], out.shape[1]
    positions = x.numel() // (n * channels)
    at = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    r = 0 if residual is None else residual.data_ptr()
    if last:
        if not (x.movedim(1, -1).is_contiguous() and out.movedim(1, -1).is_contiguous()):
            return False
        multiply(x.dtype, None if transposed else weight, 1, 0, n * positions, outputs, channels, at[0], 0, 4 * channels, 4,
                 at[1], 0, w_c, w_o, at[2], 0 if bias is None else bias.data_ptr(), r, 0, 4 * outputs, 4, act, 1.0, 1.0)
        return True
    if positions < _LONG_ROWS or not (x.is_contiguous() and out.is_contiguous()):
        return False
    f = _format(x.dtype)
    wide = None if bias is None else bias[:, None].repeat(1, f.vecs * f.lanes)
    multiply(x.dtype, None, n, 0, outputs, positions, channels, at[1], 0, w_o, w_c, at[0], 4 * channels * positions,
             4 * positions, 4, at[2], 0 if wide is None else wide.data_ptr(), r, 4 * outputs * positions, 4 * positions, 4, act,
             1.0, 1.0, bias_m=0 if wide is None else f.vecs * f.lanes * 4, planes=n > 1)
    return True


# Winograd's way ------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """A problem for Winograd's kernel."""

    fields: array[int]
    taps: array[int]
    planes: int
    panels: int
    groups: int
    arranged: int
    scratch: int
    threads: int


def _spread(size: int) -> int:
    """At least that many bytes: a distance at which neither 30 streams nor pages meet in one cache set."""
    return _up(size, 4096) + 64 * 5


def _tile_count(size: int, n: int, dilation: int) -> int:
    """Tiles of n outputs along a dimension: as many for each of the interleaved images as for the largest."""
    return -(-size // (n * dilation)) * dilation


_LARGE_PLACE = 384 << 10  # bytes of a transformed weight's thirtieth part (Zen 4)


@lru_cache(1024)
def _tiles(tile: str, last: bool, nt: int, x_shape: tuple[int, ...], x_stride: tuple[int, ...], kernel: tuple[int, ...],
           w_stride: tuple[int, ...], y_shape: tuple[int, ...], y_stride: tuple[int, ...], padding: tuple[int, ...],
           dilation: tuple[int, ...], transposed: bool, sets: int, phase: tuple[int, int] | None) -> Tiles:
    """The description of a problem that ``_winograd_tile`` accepts, or a phase of a transposed one of stride 2."""
    f, down, places = _format(torch.float32), int(tile[0]), {"1x4": 6, "2x4": 24, "3x4": 30, "2x2_of_4": 9}[tile]
    (n, channels, *_), outputs = x_shape, y_shape[1]
    (d, h, w), (od, oh, ow), (_, dh, dw) = _three(x_shape[2:], 1), _three(y_shape[2:], 1), _three(dilation, 1)
    xs, ys = ([f.size * s for s in (*t[:2], *_three(t[2:], 0))] for t in (x_stride, y_stride))
    pd, ph, pw = (g * (k - 1) - p if transposed else p for k, g, p in zip(
        _three(kernel, 1), (1, dh, dw), _three(padding, 0), strict=True))
    planes, shift = _three(kernel, 1)[0], 0
    if phase:
        ph, pw = (1 - r for r in phase)
    if tile == "1x4":  # three taps of a row are a plane, which meets the input further along
        d = planes = -(-kernel[-1] // 3)
        od, pd, shift, xs[2], ys[2] = 1, 0, 3 * dw, 0, 0
    channels, outputs = channels // sets, outputs // sets
    depth = planes * channels
    th, tw = _tile_count(oh, down, dh), _tile_count(ow, int(tile[2]), dw)
    total, vectors = n * th * tw, -(-outputs // f.lanes)
    band = _cut(od, 4)  # neighbouring planes of the output share what they need of the input
    if od >= 2 * nt and -(-od // band) % nt:
        band = _cut(od, -(-od // nt))
    bands = -(-od // band)
    # Few tiles, or not many of one image for a weight that comes from memory for each block: each thread transforms them all and
    # computes some of the outputs.
    least = 40 if n == 1 and vectors * f.lanes * depth * f.unit > _LARGE_PLACE else 16
    cuts = 1 if total * bands >= least * nt or sets >= 4 * nt else nt
    blocks = -(-total // max(f.lanes, (32 if cuts == 1 else 64) // band))
    if cuts == 1 and sets < 4 * nt and bands % nt:
        blocks = _up(blocks, nt)
    block = _up(_up(-(-total // blocks), f.rows), dw)
    panels = -(-vectors // f.vecs)
    groups = max(1, min(panels, _up(-(-panels // 4), cuts)))
    cuts = min(cuts, groups)
    each = places * (vectors * f.lanes * depth * f.unit + groups * 320)
    row = -(-panels // groups) * f.vecs * f.lanes * f.unit
    segments = block // tw + 2 if tw < block else 2
    width = _up(4 * block + segments * (2 * dw + f.lanes) + 2 * f.lanes, f.lanes)
    stretch = planes if tile != "1x4" else max(1, 256 // channels)
    slots = min(d, band + stretch - 1)
    place = _spread(_up(block, f.lanes) * slots * channels * f.unit)
    m_place = _spread(block * band * row)
    m_group = places * m_place if stretch < planes else 0  # sums wait in memory for the planes to come
    at_segments = _up(8 * (block + f.lanes), 64)
    at_zeros = _up(at_segments + 120 * (block + 1), 64)
    at_lines = at_zeros + _up(max(width, channels + f.lanes, w + 8 + f.lanes) * f.unit, 64)
    at_v = _up(max(at_lines + 6 * width * f.unit, f.lanes * 12 * block * f.unit, 12 * row), 4096)
    at_m = _up(at_v + places * place, 64)
    values = {
        "images": n, "channels": channels, "outputs": outputs, "d": d, "h": h, "w": w, "od": od, "oh": oh, "ow": ow, "pd": pd,
        "ph": ph, "pw": pw, "dh": dh, "dw": dw, "taps": planes, "shift": shift, "xn": xs[0], "xc": xs[1], "xd": xs[2],
        "xh": xs[3], "xw": xs[4], "yn": ys[0], "yo": ys[1], "yd": ys[2], "yh": ys[3], "yw": ys[4], "th": th, "tw": tw,
        "block": block, "band": band, "slots": slots, "stretch": stretch, "cuts": cuts, "panels": panels, "groups": groups,
        "sets": sets, "set": each, "chain": _cut(depth, 16 if depth < 128 else 32), "x_last": int(last), "y_last": int(last),
        "width": width, "place": place, "m_place": m_place, "m_group": m_group, "at_segments": at_segments,
        "at_zeros": at_zeros, "at_lines": at_lines, "at_v": at_v, "at_m": at_m}
    rows, columns = range(3 if down > 1 else 1), range(3)
    if phase:
        rows, columns = (range(3 - r, -1, -2) for r in phase)  # every second tap, from the last on
    taps = [(i * w_stride[-2] + j * w_stride[-1]) * (-f.size if transposed and not phase else f.size)
            for i in rows for j in columns]
    scratch = _up(at_m + places * m_place + (-(-groups // cuts) - 1) * m_group, 4096)
    return Tiles(array("q", [values[name] for name in WINOGRAD]), array("q", taps), planes, panels, groups, sets * each, scratch,
                 nt)


#: Whether Winograd's way is taken where it is faster. FASTNN_WINOGRAD=0 turns it off.
WINOGRAD_ALLOWED = os.environ.get("FASTNN_WINOGRAD", "1") != "0"


class Least(NamedTuple):
    """What a tile needs, that its errors be within the rule: random images of either sign and of one, the worst of 8 or 16 draws,
    as a share of what is allowed. Three rows 0.9–1.0 at 32 channels, 0.7 at 64, 1.3 at 16; two rows 0.97 at 16 (1.4 at 8); one
    row 0.7 at 32. Dilated ones, of one sign: corners, where few taps meet the image, are more. Three rows, images that it falls
    apart into of three pixels 1.7, of five by twelve 1.11, six 1.3, ten 1.07, twelve 0.8; two rows, of five and six pixels 1.0 at
    64 channels, 0.86 from 128 on, of three 1.06.
    """

    channels: int  # of a group
    dilated: int  # channels, and pixels of the images, of dilated ones
    pixels: int


_LEAST = {"1x4": Least(32, 64, 12), "2x4": Least(16, 128, 5), "3x4": Least(32, 64, 12)}
# Outputs a channel from which on it is faster (Zen 3), and up to which a smaller tile is, whose weight is less (Zen 4). The
# share of a dilated one's tiles that has to be within the image, channels first and last. A block of tiles is at least as wide as
# the dilation.
_LEAST_OUTPUTS, _FEW, _LEAST_FILLED, _MOST_DILATION = 49, 64, (0.45, 0.6), 64
# For filters of one row: outputs from which on it is faster; the share of products that are not with padding, below which many
# sequences are served faster by the way that leaves those out (Zen 4).
_LEAST_OUTPUTS_IN_ROW, _LEAST_MET = 16, 0.6
# Of the phases of a transposed one: channels, and these times the image's height or width. Errors of one sign are 1.4 of what is
# allowed at 32 channels, at 128 1.05 for images of 4 × 4, 1.0 of 8 × 8, 0.7 of 32 × 32, at 256 0.75. Positions (Zen 4).
_LEAST_CHANNELS_OF_PHASES, _LEAST_TIMES_SIZE, _LEAST_OF_PHASES = 128, 2048, 128


def _dims(x: Tensor, weight: Tensor, last: bool, padding: Sequence[int]) -> int:
    """Of the tensors: an image one pixel wide is a sequence."""
    return 3 if x.dim() == 4 and x.shape[3] == weight.shape[3] == 1 and padding[1] == 0 and not last else x.dim()


def _winograd_tile(x: Tensor, weight: Tensor, last: bool, stride: Sequence[int], padding: Sequence[int],
                   dilation: Sequence[int], transposed: bool, groups: int) -> str:
    """The tile of outputs, if Winograd's way can and is to be taken, else "": of two or three rows for filters of 3 × 3 taps, or
    of several such planes, of one for those of one row. Stride 1, enough channels, padding that keeps the size at most
    (beyond, a corner meets one tap alone, and its error is that of a whole tile), dilation's steps taken for pixels.
    """
    dims = _dims(x, weight, last, padding)
    shape, kernel, dilation = x.shape[:dims], weight.shape[2:dims], dilation[: dims - 2]
    dilated = max(dilation) > 1
    if (x.dtype != torch.float32 or shape[1] // groups < _LEAST["2x4"].channels or max(stride) > 1
            or x.stride(1 if last else dims - 1) != 1 or (dilated and (groups > 1 or dims > 4)) or not WINOGRAD_ALLOWED):
        return ""
    pads = [d * (k - 1) - p if transposed else p for p, k, d in zip(padding, kernel, dilation)]
    sizes = [n + 2 * p - d * (k - 1) for n, p, k, d in zip(shape[2:], pads, kernel, dilation, strict=True)]
    outputs = shape[0] * math.prod(sizes)
    if outputs < _LEAST_OUTPUTS and overhead.RULES:
        return ""
    if dims > 3 and kernel[-2:] == (3, 3):
        along, tiles = 2, ["2x4", "3x4"] if outputs <= _FEW else ["3x4", "2x4"]
        if (dims > 4 and not 0 <= pads[0] < kernel[0]) or (  # short rows of small groups are faster from padded planes
                groups > 1 and not last and shape[1] // groups < _LEAST["3x4"].channels and sizes[-1] < 16):
            return ""
    elif dims < 5 and kernel[-1] >= 3 and max(kernel[:-1], default=1) == 1 and max(pads[:-1], default=0) == 0:
        along, tiles = 1, ["1x4"]
        if (weight.shape[1] if transposed else weight.shape[0] // groups) < _LEAST_OUTPUTS_IN_ROW or (
                shape[0] >= _LEAST_SEQUENCES and 2 * kernel[-1] >= _LEAST_TAPS
                and _met(shape[-1], sizes[-1], kernel[-1], 1, pads[-1], dilation[-1]) < _LEAST_MET):
            return ""
    else:
        return ""
    inner = list(zip(shape[-along:], sizes[-along:], pads[-along:], kernel[-along:], dilation[-along:], strict=True))
    if not all(0 <= p <= k // 2 * d for _, _, p, k, d in inner):
        return ""
    for tile in tiles:
        least = _LEAST[tile]
        if not dilated:
            if shape[1] // groups >= least.channels:
                return tile
        elif (shape[1] >= least.dilated and max(dilation) <= _MOST_DILATION
              and all(p == 0 or n >= least.pixels * d for n, _, p, _, d in inner)):
            filled = math.prod(size / (_tile_count(size, many, d) * many)
                               for (_, size, _, _, d), many in zip(inner, (int(tile[0]), 4)[-along:], strict=True))
            if filled >= _LEAST_FILLED[last]:
                return tile
    return ""


def _run_winograd(last: bool, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                  padding: Sequence[int], dilation: Sequence[int], transposed: bool, sets: int, act: int, tile: str,
                  phase: tuple[int, int] | None = None) -> bool:
    """False where the result is not finite: then another way has to find out what it is."""
    dims = _dims(x, weight, last, padding)
    if out.stride(1 if last else dims - 1) != 1 and not phase:
        return False
    kernel, steps = tuple(weight.shape[2:dims]), [4 * s for s in weight.stride()[:dims]]
    p = _tiles(tile, last, threads.count(), x.shape[:dims], x.stride()[:dims], kernel, weight.stride()[:dims], out.shape[:dims],
               out.stride()[:dims], tuple(padding[: dims - 2]), tuple(dilation[: dims - 2]), transposed, sets, phase)

    def transform(address: int) -> int:
        (s_o, s_c), s_set, start = steps[:2], weight.shape[0] // sets * steps[0], weight.data_ptr()
        s_plane = 3 * steps[-1] if tile == "1x4" else steps[2] if len(kernel) == 3 else 0
        if transposed:  # from the last tap to the first
            s_o, s_c, s_plane = s_c, s_o, -s_plane
        if transposed and not phase:
            start += sum(s * (k - 1) for s, k in zip(steps[2:], kernel, strict=True))
        _WINOGRAD_WEIGHT[tile].run(p.threads, sets, out.shape[1] // sets, p.planes, x.shape[1] // sets, p.panels, p.groups, start,
                                   s_set, s_o, s_plane, s_c, p.taps.buffer_info()[0],
                                   kernel[-1] if tile == "1x4" else 3 * p.planes, address, p.arranged // sets)
        return 0
    keep = _keep(weight, p.arranged, transform, ("winograd", tile, phase, transposed, sets, p.groups, p.panels))
    scratch = 64 + p.threads * p.scratch
    ws = workspace(scratch + (0 if keep else p.arranged))
    if keep is None:
        transform(ws + scratch)
    _WINOGRAD[tile].run(p.threads, p.fields.buffer_info()[0], x.data_ptr(), keep.address if keep else ws + scratch,
                        out.data_ptr(), 0 if bias is None else bias.data_ptr(),
                        0 if residual is None else residual.data_ptr(), act, ws + 64, p.scratch, ws, 0.0, 0.0)
    return ctypes.c_int64.from_address(ws).value == 0


def _run_phases(last: bool, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, act: int) -> bool:
    """A transposed convolution with 4 × 4 taps that doubles an image: for every second row and column a convolution with four of
    the taps. False where this is not so, or the result is not finite.
    """
    if (x.dtype != torch.float32 or x.dim() != 4 or weight.shape[2:] != (4, 4) or list(stride) != [2, 2]
            or list(padding) != [1, 1] or max(dilation) > 1 or out.shape[2] != 2 * x.shape[2] or out.shape[3] != 2 * x.shape[3]
            or x.stride(1 if last else 3) != 1 or out.stride(1 if last else 3) != 1 or not WINOGRAD_ALLOWED):
        return False
    channels, outputs = x.shape[1] // groups, weight.shape[1]
    if (channels < _LEAST_CHANNELS_OF_PHASES or channels * min(x.shape[2:]) < _LEAST_TIMES_SIZE or outputs < _LEAST_OUTPUTS_IN_ROW
            or (x.numel() // x.shape[1] < _LEAST_OF_PHASES and overhead.RULES)):
        return False
    for a, b in product(range(2), range(2)):
        y, r = (None if t is None else t[:, :, a::2, b::2] for t in (out, residual))
        assert y is not None
        if not _run_winograd(last, y, x, weight, bias, r, padding, dilation, True, groups, act, "2x2_of_4", (a, b)):
            return False
    return True


# Transposed convolutions as a product and a sum -----------------------------------------------------------------------

# Positions of an image's row; outputs up to which taps may overlap: with more the phases' products are faster (Zen 3).
_LEAST_ROW, _MOST_OVERLAPPING = 16, 8


class Scatter(NamedTuple):
    """A problem for the kernel ``scatter``."""

    fields: array[int]
    arranged: int
    scratch: int
    threads: int


@lru_cache(1024)
def _scatter(nt: int, x_shape: tuple[int, ...], x_stride: tuple[int, ...], kernel: tuple[int, ...], y_shape: tuple[int, ...],
             y_stride: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> Scatter:
    f, l2 = _format(torch.float32), caches().l2
    (n, channels, h, w), (_, outputs, oh, ow), (kh, kw) = x_shape, y_shape, kernel
    depth, more, taps = _cut(channels, 256), (kh - 1) // stride[0], kh * kw
    bands = -(-h // max(1, l2 * 3 // 8 // (depth * f.size * w) - more))
    if n < nt:
        bands = max(bands, min(h // (4 * more + 1), -(-nt // n)))
    most = _up((-(-h // bands) + more) * w, f.lanes)
    parts = nt if n * bands < nt <= outputs else 1
    group = _cut(-(-outputs // parts), max(1, l2 // 4 // (taps * most * f.size)))
    line = _up(-(-ow // stride[1]) + 2 * f.lanes, f.lanes) * f.size
    at_strip = _up(stride[1] * line, 64)
    at_columns = _up(at_strip + (ow + 4 * f.lanes) * f.size, 64)
    at_pack = _up(at_columns + _up(group * taps, f.rows) * most * f.size + 64, 64)
    values = {
        "images": n, "channels": channels, "outputs": outputs, "h": h, "w": w, "oh": oh, "ow": ow, "kh": kh, "kw": kw,
        "sh": stride[0], "sw": stride[1], "ph": padding[0], "pw": padding[1], "xn": x_stride[0] * f.size,
        "xc": x_stride[1] * f.size, "yn": y_stride[0] * f.size, "yo": y_stride[1] * f.size, "yh": y_stride[2] * f.size,
        "bands": bands, "parts": parts, "group": group, "depth": depth, "chain": _cut(depth, 256), "line": line,
        "at_strip": at_strip, "at_columns": at_columns, "at_pack": at_pack}
    serial = n * h * w * channels * outputs * taps < _SERIAL
    return Scatter(array("q", [values[name] for name in SCATTER]), (outputs * taps + f.rows) * channels * f.size,
                   _up(at_pack + most * depth * f.size + 256, 4096), 1 if serial else nt)


def _run_scatter(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int], groups: int, act: int) -> bool:
    """A transposed convolution in float32 of images of dense planes, in which a product for all taps is worth while. False where
    this is not so.
    """
    if (x.dtype != torch.float32 or x.dim() != 4 or groups != 1 or max(stride) < 2 or max(dilation) > 1
            or x.shape[3] < _LEAST_ROW or out.stride(3) != 1 or x.stride(3) != 1 or x.stride(2) != x.shape[3]):
        return False
    (channels, outputs, kh, kw), steps = weight.shape, weight.stride()
    if steps[3] != 1 or steps[2] != kw or (outputs > _MOST_OVERLAPPING and (kh > stride[0] or kw > stride[1])):
        return False
    p = _scatter(threads.count(), x.shape, x.stride(), (kh, kw), out.shape, out.stride(), tuple(stride), tuple(padding))

    def pack(address: int) -> int:
        _ARRANGE[x.dtype].run(p.threads, outputs, kh * kw, channels, 1, 0, weight.data_ptr(), 4 * steps[1], 4, 4 * steps[0],
                              _NOWHERE.buffer_info()[0], address)
        return 0
    keep = _keep(weight, p.arranged, pack, ("scatter",)) if weight.numel() >= _SMALL_WEIGHT else None
    scratch = p.threads * p.scratch
    ws = workspace(scratch + (0 if keep else p.arranged))
    if keep is None:
        pack(ws + scratch)
    _SCATTER.run(p.threads, p.fields.buffer_info()[0], x.data_ptr(), keep.address if keep else ws + scratch, out.data_ptr(),
                 0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(), act, ws, p.scratch,
                 0.0, 0.0)
    return True


_NOWHERE = array("q", [0])  # the offset of a tap that is alone


# From padded planes -----------------------------------------------------------------------------------------------------

_MOST_IN_GROUP, _LARGE = 32, 48  # channels; taps of a filter, half as many for few outputs (Zen 3)
_FEW_OUTPUTS = 64  # up to which planes are read in place: copying a panel costs as much as four outputs' products
_LEAST_OF_GRADIENT = 6  # times the channels: positions from which on adding up a sum's lanes does not take longer than the sum
_LEAST_POSITIONS, _LEAST_PART = 96, 64  # of a task, below which padding once more costs more than a free thread brings


class Direct(NamedTuple):
    """A problem for the kernel ``direct``."""

    fields: array[int]
    table: array[int]
    scratch: int
    threads: int


@lru_cache(1024)
def _direct(nt: int, x_shape: tuple[int, ...], x_stride: tuple[int, ...], w_shape: tuple[int, ...], y_shape: tuple[int, ...],
            y_stride: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
            groups: int) -> Direct:
    """For ``grouped_weight`` nt is 0: all channels at once, and no division by the number of threads."""
    f, quarter = _format(torch.float32), caches().l2 // 4
    if len(x_shape) == 3:  # a sequence is an image of one row
        x_shape, w_shape, y_shape = ((*v[:2], 1, v[2]) for v in (x_shape, w_shape, y_shape))
        x_stride, y_stride = ((*v[:2], 0, v[2]) for v in (x_stride, y_stride))
        stride, dilation, padding = (1, *stride), (1, *dilation), (0, *padding)
    (n, _, h, w), (_, channels, *kernel), (_, outputs, oh, ow) = x_shape, w_shape, y_shape
    outputs //= groups
    rows, columns = ([i * d for i in range(k)] for k, d in zip(kernel, dilation, strict=True))  # of the taps
    (sh, sw), taps = stride, math.prod(kernel)
    uh, uw = max(i % sh for i in rows) + 1, max(i % sw for i in columns) + 1
    deep, wide = rows[-1] // sh, columns[-1] // sw

    # A task's sums and planes take a quarter of L2 each; there are to be several tasks a thread.
    part = _up(_cut(outputs, 256), 4)
    positions = max(_LEAST_POSITIONS, quarter // (part * f.size))
    seg = ow if ow + wide <= positions else _cut(ow, positions)
    band = _cut(oh, max(1, positions // (seg + wide)))

    def plane_of(rows: int, columns: int) -> int:  # bytes; an odd number of cache lines
        return (-(-((rows + deep) * columns + f.lanes) * f.size // 64) | 1) * 64

    # Channels a sum, whose order must not depend on the number of threads.
    depth = _cut(channels, max(1, min(768 // taps, quarter // (uh * uw * plane_of(band, seg + wide))))) if nt else channels

    def tasks() -> int:
        return n * groups * -(-outputs // part) * -(-oh // band) * -(-ow // seg)

    while tasks() < 3 * nt and band * (seg + wide) > _LEAST_POSITIONS:
        if band > 1:
            band = -(-band // 2)
        else:
            seg = -(-seg // 2)
    while tasks() < 2 * nt and part > _LEAST_PART:
        part = _up(-(-part // 2), 4)
    pitch = seg + wide
    plane = plane_of(band, pitch)
    sums = (-(-(band * pitch + f.lanes) * f.size // 64) | 1) * 64
    at_sums = _up(depth * uh * uw * plane + (wide + 2 * f.lanes) * f.size, 64)
    at_panel = _up(at_sums + part * sums + 64, 64)
    table = array("q", [((c * uh + i % sh) * uw + j % sw) * plane + (i // sh * pitch + j // sw) * f.size
                        for c in range(depth) for i in rows for j in columns])
    copied = part > _FEW_OUTPUTS
    values = {
        "images": n, "groups": groups, "channels": channels, "outputs": outputs, "h": h, "w": w, "oh": oh, "ow": ow, "sh": sh,
        "sw": sw, "ph": padding[0], "pw": padding[1], "uh": uh, "uw": uw, "deep": deep, "wide": wide, "xn": x_stride[0] * f.size,
        "xc": x_stride[1] * f.size, "xh": x_stride[2] * f.size, "yn": y_stride[0] * f.size, "yo": y_stride[1] * f.size,
        "yh": y_stride[2] * f.size, "taps": taps, "table": table.buffer_info()[0], "chain": _cut(depth * taps, 256),
        "slice": depth, "band": band, "bands": -(-oh // band), "seg": seg, "segs": -(-ow // seg), "part": part,
        "parts": -(-outputs // part), "copied": int(copied), "pitch": pitch, "plane": plane, "sums": sums, "at_sums": at_sums,
        "at_panel": at_panel}
    return Direct(array("q", [values[name] for name in DIRECT]), table,
                  _up(at_panel + (depth * taps * 3 * f.lanes * f.size if copied else 0) + 256, 4096),
                  1 if n * groups * outputs * channels * taps * oh * ow < _SERIAL else nt)


def _run_direct(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
                padding: Sequence[int], dilation: Sequence[int], transposed: bool, groups: int, act: int) -> bool:
    """Planes in float32, small groups of them or large filters, where packing tap by tap is dear. False where this is not so."""
    outputs, channels, taps = out.shape[1], x.shape[1] // groups, weight.shape[2:].numel()
    if transposed:
        padding = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
        if max(stride) > 1 or min(padding) < 0:
            return False
    if (x.dtype != torch.float32 or x.dim() > 4 or outputs // groups % 4 or not weight.is_contiguous() or out.stride(-1) != 1
            or x.stride(-1) != 1):
        return False
    if groups > 1:
        if max(stride) > 1 or taps == 1 or not 1 < channels <= _MOST_IN_GROUP:
            return False
    elif taps < (_LARGE if outputs > _FEW_OUTPUTS or channels == 1 else _LARGE // 2):
        return False
    p = _direct(threads.count(), x.shape, x.stride(), (outputs, channels, *weight.shape[2:]), out.shape, out.stride(),
                tuple(stride), tuple(padding), tuple(dilation), groups)

    def turn(address: int) -> int:  # inputs and outputs exchanged, and from the last tap to the first
        offsets = array("q", range(4 * (taps - 1), -4, -4))
        row = 4 * weight.stride(0)
        _ARRANGE[x.dtype].run(1, groups, outputs // groups, channels, taps, 0, weight.data_ptr(), channels * row, 4 * taps, row,
                              offsets.buffer_info()[0], address)
        return 0
    need = weight.nbytes if transposed else 0
    keep = _keep(weight, need, turn, "turned") if need and weight.numel() >= _SMALL_WEIGHT else None
    ws = workspace(p.threads * p.scratch + (0 if keep else need))
    w_at = keep.address if keep else ws + p.threads * p.scratch if need else weight.data_ptr()
    if need and keep is None:
        turn(w_at)
    _DIRECT.run(p.threads, p.fields.buffer_info()[0], x.data_ptr(), w_at, out.data_ptr(),
                0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(), act, ws, p.scratch,
                0.0, 0.0)
    return True


def _run_grouped_weight(out: Tensor, grad: Tensor, x: Tensor, stride: Sequence[int], padding: Sequence[int],
                        dilation: Sequence[int], groups: int) -> bool:
    """The gradient of the weight of small groups in planes. False where this is not so, or where a sum is not finite: then
    another way has to find out what it is.
    """
    channels, taps, positions = out.shape[1], out.shape[2:].numel(), grad.shape[2:].numel()
    if (x.dtype != torch.float32 or x.dim() > 4 or groups < 2 or not 1 < channels <= _MOST_IN_GROUP or taps == 1
            or positions < _LEAST_OF_GRADIENT * channels or not out.is_contiguous() or x.stride(-1) != 1 or grad.stride(-1) != 1):
        return False
    p = _direct(0, x.shape, x.stride(), out.shape, grad.shape, grad.stride(), tuple(stride), tuple(padding), tuple(dilation),
                groups)
    nt = 1 if grad.numel() * channels * taps < _SERIAL else threads.count()
    ws = workspace(64 + nt * p.scratch)
    _GROUPED_WEIGHT.run(nt, p.fields.buffer_info()[0], x.data_ptr(), out.data_ptr(), grad.data_ptr(), ws, ws + 64, p.scratch)
    return ctypes.c_int64.from_address(ws).value == 0


# Many short sequences ---------------------------------------------------------------------------------------------------

# Sequences; taps from which on these are served so, or from half as many on where so large a share of the products at most is not
# with padding (Zen 4).
_LEAST_SEQUENCES, _LEAST_TAPS, _MOST_MET = 16, 32, 0.85


class Batched(NamedTuple):
    """A problem for the kernel ``batched``."""

    fields: array[int]
    tables: tuple[array[int], array[int]]
    arranged: int
    scratch: int
    threads: int


@lru_cache(1024)
def _batched(nt: int, x_shape: tuple[int, ...], x_stride: tuple[int, ...], w_shape: tuple[int, ...], y_shape: tuple[int, ...],
             y_stride: tuple[int, ...], stride: int, padding: int, dilation: int) -> Batched:
    f, quarter = _format(torch.float32), caches().l2 // 4
    (n, channels, length), (outputs, _, taps), positions = x_shape[:3], w_shape[:3], y_shape[2]
    blocks = -(-n // 48)
    block = _cut(n, _up(-(-n // blocks), f.lanes))
    pitch = _up(block, f.lanes)
    residues, deep = min(stride, (taps - 1) * dilation + 1), (taps - 1) * dilation // stride
    # What a task sums up and the planes of its channels take a quarter of L2 each. Neither depends on the number of threads, as
    # the order of sums does on them.
    most = max(f.lanes, quarter // (min(outputs, 256) * pitch * f.size) // f.lanes * f.lanes)
    band = min(positions, most)
    plane = (band + deep) * pitch * f.size
    depth = min(channels, max(1, quarter // (residues * plane)) | 1)  # odd: the weight's rows do not meet in one cache set
    part = _up(_cut(outputs, 256), f.rows)
    for least, tasks in (64, 4 * nt), (f.rows, nt):
        while part > least and blocks * -(-positions // band) * -(-outputs // part) < tasks:
            part = _up(-(-part // 2), f.rows)
    at = [(t * dilation % stride, t * dilation // stride * pitch * f.size) for t in range(taps)]
    tables = tuple(array("q", [(c * residues + residue) * plane + place for residue, place in at for c in range(d)])
                   for d in (depth, channels % depth))
    sums, turned = (band * pitch * f.size | 64), _up(band, f.lanes)
    at_sums = _up(depth * residues * plane, 64)
    at_turned = _up(at_sums + part * sums, 64)
    at_panel = _up(at_turned + block * turned * f.size + 64, 64)
    values = {
        "images": n, "channels": channels, "outputs": outputs, "l": length, "ol": positions, "step": stride, "pad": padding,
        "gap": dilation, "xn": x_stride[0] * f.size, "xc": x_stride[1] * f.size, "yn": y_stride[0] * f.size,
        "yo": y_stride[1] * f.size, "taps": taps, "table": tables[0].buffer_info()[0], "last_table": tables[1].buffer_info()[0],
        "chain": 256, "slice": depth, "band": band, "bands": -(-positions // band), "part": part, "parts": -(-outputs // part),
        "block": block, "blocks": blocks, "residues": residues, "deep": deep, "pitch": pitch, "plane": plane, "sums": sums,
        "at_sums": at_sums, "turned": turned, "at_turned": at_turned, "at_panel": at_panel}
    return Batched(array("q", [values[name] for name in BATCHED]), (tables[0], tables[1]), outputs * channels * taps * f.size,
                   _up(at_panel + depth * taps * 3 * f.lanes * f.size + 256, 4096), nt)


@lru_cache(1024)
def _met(length: int, positions: int, taps: int, stride: int, padding: int, dilation: int) -> float:
    """The share of products that are not with padding."""
    met = 0
    for delta in range(-padding, taps * dilation - padding, dilation):
        met += max(0, min(positions, (length - 1 - delta) // stride + 1) - max(0, -(delta // stride)))
    return met / (positions * taps)


def _run_batched(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int], groups: int, act: int) -> bool:
    """Sequences in float32, so many that they fill vectors, and large filters. False where this is not so."""
    if (x.dtype != torch.float32 or groups != 1 or x.shape[0] < _LEAST_SEQUENCES or 2 * weight.shape[2] < _LEAST_TAPS
            or x.dim() > 4 or not weight.is_contiguous()):
        return False
    if x.dim() == 4 and not (x.shape[3] == weight.shape[3] == out.shape[3] == 1 and padding[1] == 0):
        return False
    if weight.shape[0] % _format(x.dtype).rows or x.stride(2) != 1 or out.stride(2) != 1:
        return False
    if weight.shape[2] < _LEAST_TAPS and _met(x.shape[2], out.shape[2], weight.shape[2], stride[0], padding[0],
                                              dilation[0]) > _MOST_MET:
        return False
    p = _batched(threads.count(), x.shape, x.stride(), weight.shape, out.shape, out.stride(), stride[0], padding[0], dilation[0])
    outputs, channels, taps = weight.shape[:3]
    depth = p.fields[BATCHED.index("slice")]
    offsets = array("q", [c * taps * 4 for c in range(depth)])

    def arrange(address: int) -> int:
        for c0 in range(0, channels, depth):
            _ARRANGE[x.dtype].run(p.threads, 1, outputs, taps, min(depth, channels - c0), 0, weight.data_ptr() + c0 * taps * 4, 0,
                                  channels * taps * 4, 4, offsets.buffer_info()[0], address + outputs * c0 * taps * 4)
        return 0
    keep = _keep(weight, p.arranged, arrange, ("batched", depth))
    scratch = p.threads * p.scratch
    ws = workspace(scratch + (0 if keep else p.arranged))
    if keep is None:
        arrange(ws + scratch)
    _BATCHED.run(p.threads, p.fields.buffer_info()[0], x.data_ptr(), keep.address if keep else ws + scratch, out.data_ptr(),
                 0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(), act, ws, p.scratch,
                 0.0, 0.0)
    return True


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


# The operators -------------------------------------------------------------------------------------------------------


def conv(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
         padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
         activation: str | None) -> str | None:
    """out = act(input ⋆ weight + bias + residual), or the transposed convolution. Returns the way that was taken."""
    if out.numel() == 0:
        return None
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if residual is not None and residual.stride() != out.stride():
        residual = torch.empty_like(out).copy_(residual)
    last = out.stride(1) == 1 and (input.stride(1) == 1 or input.shape[1] == 1) and out.dim() > 3 and not out.is_contiguous()
    if last and groups > 1 and input.shape[1] == groups != out.shape[1]:
        last = False  # several filters a channel: neighbours in the output are none in the input
    act = CODES[activation] if activation is not None else 0
    if _run_product(last, out, input, weight, bias, residual, stride, padding, transposed, groups, act):
        return "product"
    tile = _winograd_tile(input, weight, last, stride, padding, dilation, transposed, groups)
    if tile and _run_winograd(last, out, input, weight, bias, residual, padding, dilation, transposed, groups, act, tile):
        return f"winograd {tile}"
    if transposed and _run_phases(last, out, input, weight, bias, residual, stride, padding, dilation, groups, act):
        return "winograd by phases"
    if last and _run_last(out, input, weight, bias, residual, stride, padding, dilation, transposed, groups, act):
        return "depthwise"
    if not last and _run_rows(out, input, weight, bias, residual, stride, padding, dilation, transposed, groups, act):
        return "depthwise"
    if not last and _run_flat(out, input, weight, bias, residual, stride, padding, dilation, transposed, groups, act):
        return "depthwise"
    if transposed and not last and _run_scatter(out, input, weight, bias, residual, stride, padding, dilation, groups, act):
        return "product and sum"
    if transposed and not last and _run_between(out, input, weight, bias, residual, stride, padding, dilation, groups, act):
        return "depthwise"
    if not transposed and not last and _run_batched(out, input, weight, bias, residual, stride, padding, dilation, groups, act):
        return "sequences side by side"
    if not last and _run_direct(out, input, weight, bias, residual, stride, padding, dilation, transposed, groups, act):
        return "padded planes"
    kind = PIXELS if last else PLANES
    return _run(kind, out, input, weight, bias, residual, stride, padding, dilation, transposed, groups, act)


_SHORT_ROWS = 16  # positions up to which a row of a plane is turned into vectors of channels (Zen 3)


def conv_weight(out: Tensor, grad: Tensor, input: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
                padding: Sequence[int], dilation: Sequence[int], groups: int) -> str | None:
    """The gradient of a convolution's weight: a product over all output positions, divided by rows of it among the threads."""
    if out.numel() == 0:
        return None
    if grad.numel() == 0:
        out.zero_()
        return None
    if not _even(grad.stride()[:1:-1], grad.shape[:1:-1]):
        grad = grad.contiguous()
    if _run_grouped_weight(out, grad, input, stride, padding, dilation, groups):
        return "products of planes"
    kind, dtype = WEIGHTS if out.is_contiguous() else WEIGHTS_LAST, input.dtype
    turned = False
    if groups > 1 and input.shape[1] == groups:  # one channel each: the output does not tell
        last = input.stride(1) == 1 and out.shape[0] == groups and input.stride(-1) != 1
        turned = not last and out.shape[0] == groups and grad.shape[-1] <= _SHORT_ROWS and input.itemsize >= 4
        kind = WEIGHTS_LAST if last or turned else WEIGHTS
        if grad.stride(1 if last else -1) != 1:
            grad = grad.movedim(1, -1).contiguous().movedim(-1, 1) if last else grad.contiguous()
    (p,) = _plan(kind, dtype, threads.count(), input.shape, input.stride(), out.shape, out.stride(),
                 grad.shape, _steps(grad), tuple(stride), tuple(padding), tuple(dilation), False, groups)
    at = p.fields.buffer_info()[0], input.data_ptr(), out.data_ptr(), grad.data_ptr()
    ws = workspace(p.threads * p.scratch)
    if p.depthwise:
        _DEPTHWISE_WEIGHT[dtype].run(p.threads, 2 if turned else int(kind == WEIGHTS_LAST), *at, ws, p.scratch)
    else:
        _CONVOLUTION[dtype].run(p.threads, kind, *at, 0, 0, 0, ws, p.scratch, 0.0, 0.0)
    return "depthwise" if p.depthwise else "implicit im2col"


def _steps(grad: Tensor) -> tuple[int, ...]:
    """The strides with that of the last dimension meaningful: the distance of neighbouring positions."""
    return (*grad.stride()[:-1], _innermost([0] * (5 - grad.dim()) + list(grad.stride()[2:]), _three(grad.shape[2:], 1)))


KERNELS: dict[str, Callable[..., str | None]] = {"conv": conv, "conv_weight": conv_weight}

# The automatic choice, not a limit: float32 calls that torch (through oneDNN) was measured to serve faster, on a Zen 3 with AVX2.
# `bench conv --backend cpu` shows both sides.
_SMALL, _SMALL_PRODUCT = 1 << 22, 1 << 20  # multiplications


def _slower(dtype: torch.dtype, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
            dilation: Sequence[int], transposed: bool, groups: int) -> str | None:
    """Why torch is faster for a convolution of these operands; None if it is not. (In a forked child torch might hang.)"""
    if not overhead.RULES or dtype != torch.float32 or not 3 <= x.dim() == weight.dim() or threads.forked():
        return None
    last = x.dim() > 3 and x.stride(1) == 1 and not x.is_contiguous()
    if groups > 1 and x.shape[1] == groups and x.dim() == 4:
        if transposed and max(stride) > 1 and stride[1] != 2 and not last and x.shape[-1] < 32:
            return "depthwise, short rows and a stride: torch's gradient of the input is faster"
        return None
    positions = x.numel() // max(1, x.shape[1]) // (1 if transposed else max(1, math.prod(stride)))
    size = positions * weight.numel()
    if (size <= _SMALL_PRODUCT and max(weight.shape[2:]) == 1) or (size <= _SMALL and last):
        return "a convolution this small, of 1×1 or with channels last, takes less time in torch"
    if groups > 1 and last and not _winograd_tile(x, weight, last, stride, padding, dilation, transposed, groups):
        return "groups with channels last: oneDNN's kernel is faster"
    if (last and not transposed and weight.dim() == 4 and (weight.shape[0] <= 128 or max(dilation) > 1)
            and not _winograd_tile(x, weight, last, stride, padding, dilation, transposed, groups)):
        return "channels last and few outputs, or dilated: oneDNN's tile wastes less of its width and leaves out taps of zeros"
    return None


def _slower_conv(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
                 activation: str | None) -> str | None:
    if residual is not None or activation is not None:  # torch needs several calls
        return None
    return _slower(input.dtype, input, weight, stride, padding, dilation, transposed, groups)


#: When the automatic choice is torch, by measurement: op → (*args) → the reason, or None.
TORCH_IS_FASTER: dict[str, Callable[..., str | None]] = {"conv": _slower_conv}
