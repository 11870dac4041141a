"""Convolutions on the CPU: which kernel serves a call, and how a problem is described to it.

Everything is three-dimensional here: a missing dimension has size 1. A convolution of any stride is one problem; a transposed
one falls into as many *phases* as the product of its strides, each a convolution of stride 1 with some of the taps, so that
nothing is multiplied by the zeros between (Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?").

More ways, for float32: filters of 3 × 3 taps, of several planes of these, and of one row by Winograd's algorithm where its errors
obey the rule and it is faster, filters of one tap as a plain product, transposed ones of long rows as a product for all taps and
a sum, small groups and large filters from padded planes, large filters over many short sequences with sequences side by side in a
vector, depthwise ones straight from the image. Which one is taken depends on shapes and strides alone, so a call has the same
bits each time; only an image with an Inf or NaN is computed anew where Winograd's way met it. ``fastnn.trace()`` names the way.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conv_common import _ARRANGE, _NAMES, _SERIAL, _SMALL_WEIGHT, _cut, _even, _keep, _kernel, _three, _up
from .conv_depthwise import _run_between, _run_flat, _run_last, _run_rows
from .conv_fields import FIELDS
from .conv_planes import _run_batched, _run_direct, _run_grouped_weight, _run_product, _run_scatter
from .conv_winograd import _run_phases, _run_winograd, _winograd_tile
from .engine import overhead, packed, threads
from .engine.activation_codes import CODES
from .engine.host import caches
from .engine.workspace import workspace
from .matmul import _format

_RUN, _MEETING, _OUT = 48, 32, 24  # as in conv_code
_FEW, _SHORT = 16, 8  # channels below which, positions of a row from which on a block is packed at once, not panel by panel
PLANES, PIXELS, WEIGHTS, WEIGHTS_LAST = range(4)

_CONVOLUTION = {d: _kernel("conv_code", "convolution", d, "i" * 11 + "ff") for d in _NAMES}
_DEPTHWISE = {d: _kernel("conv_depthwise_code", "depthwise", d, "i" * 11 + "ff") for d in _NAMES}
_DEPTHWISE_WEIGHT = {d: _kernel("conv_depthwise_weight_code", "depthwise_weight", d, "i" * 8) for d in _NAMES}
_GROUPED = {d: _kernel("conv_grouped_code", "grouped", d, "i" * 10 + "ff") for d in _NAMES}


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
    if kind == PLANES and not depthwise and (max(dil) > 1 or (out_size[0] > 1 and math.prod(out_size[1:]) >= _LEAST_IN_PLANE)):
        apart = max(dil) > 1 and channels * outputs >= _LEAST_IN_REGIONS  # along rows and columns too, not along the depth alone
        regions = [[part for whole in axis for part in _regions(*whole, 1 if transposed else s, n, s if transposed else 1)]
                   if apart or i == 0 else axis for i, (axis, s, n) in enumerate(zip(axes, step, in_size, strict=True))]
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
# Positions that meet fewer taps are problems of their own, where that leaves so much to do: of planes with so many positions
# those that meet fewer of the filter's planes, dilated with so many channels times outputs all of them. The weight is arranged
# for each problem, which new weights at each call must repay too.
_LEAST_IN_PLANE, _LEAST_IN_REGIONS, _MOST_OF_PRODUCTS = 256, 1 << 12, 0.75


def _regions(first: int, positions: int, taps: list[tuple[int, int]], move: int, size: int, apart: int) -> list[_Along]:
    """Stretches of positions, each with the taps that meet the input's ``size`` elements; outputs lie ``apart``."""
    within = [(max(0, -(delta // move)), (size - 1 - delta) // move + 1) for delta, _ in taps]
    ends = sorted({0, positions, *(n for pair in within for n in pair if 0 < n < positions)})
    return [(first + a * apart, b - a, [(delta + a * move, i) for (delta, i), (low, high) in zip(taps, within, strict=True)
                                        if low <= a and b <= high]) for a, b in pairwise(ends)]


def _products(axis: Sequence[_Along]) -> int:
    return sum(n * len(taps) for _, n, taps in axis)


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
    if groups > 1 and last and (x.shape[1] < 32 * groups or not _winograd_tile(
            x, weight, last, stride, padding, dilation, transposed, groups)):
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
