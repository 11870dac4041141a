"""Convolutions of planes on the CPU in ways of their own, all in float32: products without packing by taps, transposed ones as a
product and a sum, small groups and large filters from padded planes, many short sequences side by side.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .conv_common import _ARRANGE, _SERIAL, _SMALL_WEIGHT, _cut, _keep, _kernel, _up
from .conv_fields import BATCHED, DIRECT, SCATTER
from .engine import threads
from .engine.host import caches
from .engine.workspace import workspace
from .matmul import _format, multiply

_SCATTER = _kernel("conv_transposed_code", "scatter", torch.float32, "i" * 10 + "ff")
_DIRECT = _kernel("conv_direct_code", "direct", torch.float32, "i" * 10 + "ff")
_GROUPED_WEIGHT = _kernel("conv_grouped_weight_code", "grouped_weight", torch.float32, "i" * 9)
_BATCHED = _kernel("conv_batched_code", "batched", torch.float32, "i" * 10 + "ff")


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
    part = _up(_cut(outputs, 256) if nt else outputs, 4)
    positions = max(_LEAST_POSITIONS, quarter // ((part if nt else max(part, channels * uh * uw)) * f.size))
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
    keep = _keep(weight, need, turn, ("turned", groups)) if need and weight.numel() >= _SMALL_WEIGHT else None
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
    parts = 1 if groups >= 4 * nt or groups % nt == 0 else nt  # of a group's outputs: no sum depends on it
    ws = workspace(64 + nt * p.scratch)
    _GROUPED_WEIGHT.run(nt, parts, p.fields.buffer_info()[0], x.data_ptr(), out.data_ptr(), grad.data_ptr(), ws, ws + 64,
                        p.scratch)
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
