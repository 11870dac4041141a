"""Winograd's convolutions on the CPU: which problems they serve, and how these are described to the kernel.

The rules are of two kinds: where errors were measured to be within the error rule, and where the way was measured to be faster.

Environment: ``FASTNN_WINOGRAD``, 0 to do without (default 1).
"""

from __future__ import annotations

import ctypes
import math
import os
from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .conv_common import _cut, _keep, _three, _up
from .conv_fields import WINOGRAD
from .conv_planes import _LEAST_SEQUENCES, _LEAST_TAPS, _met
from .engine import overhead, threads
from .engine.build import Kernel, made_by
from .engine.workspace import workspace
from .matmul import _format

# By a tile of outputs, and where they are not 3 or 3 × 3, the taps of a filter
_TILES = ("1x4", "2x4", "3x4", "2x2_of_4")
_WINOGRAD = {t: Kernel(f"winograd_{t}", "i" * 11 + "ff", made_by("conv_winograd_code", "winograd", t)) for t in _TILES}
_WINOGRAD_WEIGHT = {t: Kernel(f"winograd_weight_{t}", "i" * 16, made_by("conv_winograd_code", "winograd_weight", t))
                    for t in _TILES}


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
    # Neighbouring planes of the output share what they need of the input; each thread is to get as many of them.
    band = -(-od // _up(-(-od // 4), nt)) if od >= 2 * nt else _cut(od, 4)
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
    rows = _up(block, f.rows)  # that the register tile works on
    place = _spread(_up(rows, f.lanes) * slots * channels * f.unit)
    m_place = _spread(rows * band * row)
    m_group = places * m_place if stretch < planes else 0  # sums wait in memory for the planes to come
    at_segments = _up(8 * (block + f.lanes), 64)
    at_zeros = _up(at_segments + 120 * (block + 1), 64)
    at_lines = at_zeros + _up(max(width, channels + f.lanes) * f.unit, 64)
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
    high, wide = range(3 if down > 1 else 1), range(3)
    if phase:
        high, wide = (range(3 - r, -1, -2) for r in phase)  # every second tap, from the last on
    taps = [(i * w_stride[-2] + j * w_stride[-1]) * (-f.size if transposed and not phase else f.size)
            for i in high for j in wide]
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
