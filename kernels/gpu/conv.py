"""Convolutions on the GPU: an implicit im2col. What the products read has its channels next to each other: other tensors are
packed first, weights and images alike, which costs a pass over them and gives whole vectors and tensor maps.

Everything is three-dimensional here: a missing dimension has size 1. A transposed convolution, which is also the gradient of the
input, falls into *phases*: outputs that are alike modulo the strides meet the same taps, so nothing is multiplied by zeros (Shi
et al. 2016, "Is the deconvolution layer the same as a convolutional layer?"). Either way output x of a dimension meets in tap
a what lies at x · move + base + a · delta. Where move is 1 a tile of positions can be a *box*, of images by depth by height by
width: what a tap meets is a box as well, which a copy engine (TMA) reads with zeros beyond the image. Depthwise convolutions are
sums of products without a matrix instruction.

``conv_columns`` is the plain path, with an explicit im2col or col2im. A tuner may find it faster; otherwise it is taken only
where PLAIN says so, and for filters of size 1, whose columns are the image itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnn import backends

from ..layout import like, three
from . import conv_code as code
from . import conv_columns
from .engine import launch, tune
from .engine.launch import power_of_two
from .matmul import precision


class Tile(NamedTuple):
    """A program's positions (or outputs), its outputs (or channels), the depth of a step, and what Triton is told."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


Tiles = dict[tuple[str, str], tuple[Tile, ...]]
#: For each kind of arithmetic the tiles of a chip. Which of them a call gets depends on how many programs there are.
_TILES: Tiles = {
    ("half", "sm_90"): (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 4, 4), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 4)),
    ("half", "sm_80"): (Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 4, 4), Tile(64, 64, 32, 4, 4)),
    ("half", "gfx"): (Tile(128, 128, 32, 8, 2), Tile(64, 64, 64, 4, 2)),
    ("tf32", "sm_90"): (Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 4, 4), Tile(64, 64, 32, 4, 4)),
    ("tf32", "sm_80"): (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    ("tf32", "gfx"): (Tile(64, 64, 32, 4, 2),),
    ("ieee", "sm_90"): (Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
    ("ieee", "sm_80"): (Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
    ("ieee", "gfx"): (Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
}
_WEIGHT_TILES: Tiles = {
    ("half", "sm_90"): (Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    ("half", "sm_80"): (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    ("half", "gfx"): (Tile(128, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
    ("tf32", "sm_90"): (Tile(64, 128, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
    ("tf32", "sm_80"): (Tile(64, 64, 32, 4, 3),),
    ("tf32", "gfx"): (Tile(64, 64, 32, 4, 2),),
    ("ieee", "sm_90"): (Tile(32, 32, 16, 4, 2),),
    ("ieee", "sm_80"): (Tile(32, 32, 16, 4, 2),),
    ("ieee", "gfx"): (Tile(32, 32, 16, 4, 2),),
}
_COLUMNS = Tile(0, 0, 0, 0, 0)  # stands for the plain path
PLAIN = False
_FEW = 16  # channels below which a step takes several taps
_PARTS = 64  # parts of a sum over positions at most
_UNROLLED = 7  # taps of a row of a depthwise convolution at most that are written out
_SMALL = 1 << 30  # positions below which their numbers have 32 bits


def _kind(t: Tensor) -> str:
    return "half" if t.itemsize == 2 else "ieee" if precision(t, backends.tf32("conv")) == "ieee" else "tf32"


def _tiles(tiles: Tiles, t: Tensor) -> tuple[Tile, ...]:
    chip = launch.chip(t.device)
    if chip is launch.STAND_IN:
        return (Tile(32, 32, 32, 4, 1),)
    return tiles[_kind(t), "sm_90" if chip.nvidia >= 90 else "sm_80" if chip.nvidia else "gfx"]


def _fitting(tiles: Sequence[Tile], m: int, n: int) -> list[Tile]:
    """Those of which there is a whole one, or the last of them, cut down to what the matrix instruction takes"""
    most = power_of_two(m, 16), power_of_two(n, 16)
    few = [t for t in tiles if t.m <= most[0] and t.n <= most[1]]
    return few or [tiles[-1]._replace(m=min(tiles[-1].m, most[0]), n=min(tiles[-1].n, most[1]))]


def _cheapest(few: Sequence[Tile], count: Callable[[Tile], int], processors: int) -> Tile:
    """The one of the least time, as whole rounds of all processors; a small tile reads more for each product."""
    return min(few, key=lambda t: -(-count(t) // processors) * (t.m * t.n + 32 * (t.m + t.n)))


def _strides(t: Tensor, unit: int = 1, but: int | None = None) -> list[int]:
    """Of the batch, the channels and three dimensions: in units, but for one dimension. Where the size is 1, any will do: 16."""
    steps = [(s if n > 1 else 16) // (1 if d == but else unit) for d, (n, s) in enumerate(zip(t.shape, t.stride()))]
    return [*steps[:2], *three(steps[2:], 16 // unit)]


def _unit(t: Tensor, dim: int, *more: int) -> int:
    """How many numbers that lie next to each other along a dimension can be written at once, of a 16 bytes' at most"""
    steps = [s for d, (n, s) in enumerate(zip(t.shape, t.stride())) if n > 1 and d != dim]
    return math.gcd(16 // t.itemsize, t.shape[dim], *steps, *more) if t.stride(dim) == 1 else 1


def _far(*tensors: Tensor) -> bool:
    """Whether 32 bits do not reach all that may be multiplied, taps beside the image too"""
    return any(sum(n * abs(s) for n, s in zip(t.shape, t.stride())) >= _SMALL for t in tensors)


def _packed(t: Tensor, room: int, unit: int, dense: bool = False) -> Tensor:
    """With room for so many channels next to each other, and all else a multiple of unit apart. dense: nor may there be gaps."""
    steps = _strides(t)
    apart = all(s > 0 and s % unit == 0 for d, s in enumerate(steps) if d != 1)
    lies = t.stride(1) == 1 and apart and t.data_ptr() % 16 == 0
    if t.shape[1] == room and lies and (not dense or t.movedim(1, -1).is_contiguous()):
        return t
    return _copied(t, room, t.shape[-1], 0)


def _copied(t: Tensor, room: int, width: int, edge: int) -> Tensor:
    """With room for so many channels next to each other and rows of this width, which begin behind an edge; zeros around"""
    out = t.new_empty(t.shape[0], *t.shape[2:-1], width, room)
    size, steps, held = three(out.shape[1:-1], 1), _strides(t), t.shape[-1]
    longer = [(n, step) for n, step in zip(size, steps[2:]) if n > 1]  # dimensions of size 1 have no step of their own
    if width == held and all(step == n * inner for (_, step), (n, inner) in pairwise(longer)):
        held = math.prod(size)  # planes without gaps
        size, steps = [1, 1, held], [*steps[:2], 0, 0, longer[-1][1] if longer else 16]
    wide = power_of_two(room, 1, max(64, 2048 // power_of_two(math.prod(size))))
    high = power_of_two(math.prod(size), 1, 4096 // wide)
    programs = t.shape[0] * -(-math.prod(size) // high) * -(-room // wide)
    launch.run(code.pack, programs, t.device, out, t, t.shape[1], room, *size, held, edge, *steps, C=wide, P=high, num_warps=4)
    return out.movedim(-1, 1)


def _fuses(c: int, groups: int, kernel: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether a row of the filter meets few channels that can lie next to each other"""
    return groups == 1 and c < _FEW <= c * kernel[-1] and dilation[-1] == 1 and not PLAIN


def _fused(input: Tensor, k: int, stride: int, padding: int, width: int) -> tuple[Tensor, int]:
    """The windows of each row as the channels of one position, which overlap in memory; and the room that a pixel has

    A convolution of few channels is one of k times as many, with filters of width 1.
    """
    whole, c = 16 // input.itemsize, input.shape[1]
    room = next((r for r in range(c, 2 * c + 2) if stride * r % whole == 0), power_of_two(c))
    step = whole // math.gcd(room, whole)
    x = _copied(input, room, -(-(input.shape[-1] + 2 * padding) // step) * step, padding)
    shape, steps = list(x.shape), list(x.stride())
    shape[1], shape[-1], steps[-1] = k * room, width, stride * room
    return x.as_strided(shape, steps), room


@lru_cache(1024)
def _box(m: int, *size: int) -> tuple[int, ...]:
    """m positions as a box, so that few boxes cover all images; the widest of those"""
    boxes = [(m >> a + b + c, 1 << a, 1 << b, 1 << c) for a in range(9) for b in range(9) for c in range(9) if m >> a + b + c]
    return min(boxes, key=lambda box: (_boxes(box, size), [-n for n in reversed(box)]))


def _boxes(box: Sequence[int], size: Sequence[int]) -> int:
    return math.prod(-(-n // b) for n, b in zip(size, box))


def conv(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
         padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
         activation: str | None) -> None:  # fmt: skip
    """activation(convolution(input, weight) + bias + residual)"""
    if not out.numel():
        return
    bias = None if bias is None else bias.contiguous()
    c, o = input.shape[1] // groups, out.shape[1] // groups
    last = out.stride(1) == 1
    alone = math.prod(weight.shape[2:]) == math.prod(stride) == groups == 1 and not any(padding)
    if alone and c > 1 and (last or bias is None or residual is None):
        window = conv_columns.Window(weight.shape[2:], stride, padding, dilation)
        conv_columns.conv(out, input, weight.transpose(0, 1) if transposed else weight, bias, residual, window, False, activation)
        return
    fused = not transposed and (c > 1 or o > 4) and _fuses(c, groups, weight.shape[2:], dilation)
    if fused:
        input, room = _fused(input, weight.shape[-1], stride[-1], padding[-1], out.shape[-1])
        whole = 16 // input.itemsize
        rows = weight.new_zeros(o, *weight.shape[2:-1], 1, -(-input.shape[1] // whole) * whole)
        rows[..., : input.shape[1]].unflatten(-1, (-1, room))[..., :c].copy_(weight.movedim(1, -1).unsqueeze(-3))
        weight, stride, padding = rows.movedim(-1, 1), [*stride[:-1], 1], [*padding[:-1], 0]
    _conv(out, input, weight, bias, residual, stride, padding, dilation, transposed, groups, activation, fused)


def _conv(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
          padding: Sequence[int], dilation: Sequence[int], transposed: bool, groups: int, activation: str | None,
          fused: bool) -> None:  # fmt: skip
    """fused: the channels are those of several pixels"""
    s, p, d = three(stride, 1), three(padding, 0), three(dilation, 1)
    c, o = input.shape[1] // groups, out.shape[1] // groups
    kernel, size = three(weight.shape[2:], 1), three(out.shape[2:], 1)
    window = conv_columns.Window(weight.shape[2:], stride, padding, dilation)
    both = bias is not None and residual is not None
    last = out.stride(1) == 1
    if residual is not None and _strides(residual) != _strides(out):
        residual = like(out, residual)
    chip = launch.chip(out.device)
    phases = math.prod(s) if transposed else 1
    each = [out.shape[0], *(-(-n // step) if transposed else n for n, step in zip(size, s))]  # images and positions of a phase
    positions = math.prod(each)
    common = [math.gcd(a, b) for a, b in zip(s, d)]
    inverse = [pow(b // g, -1, a // g) if a > g else 0 for a, b, g in zip(s, d, common)]
    numbers = (*three(input.shape[2:], 1), *size, *kernel, *s, *p, *d, *common, *inverse)
    wide = positions >= _SMALL
    how = precision(input, backends.tf32("conv"))
    if c == 1 and o <= 4:
        _depthwise(out, input, weight, bias, residual, numbers, each, phases, last, wide, transposed, activation)
        return
    w = weight
    if transposed:  # outputs first
        w = w.transpose(0, 1) if groups == 1 else w.unflatten(0, (groups, c)).transpose(1, 2).flatten(0, 1)
    flat = c < _FEW
    unit, whole, room = 1, 16 // input.itemsize, c
    w_steps = _strides(w)
    if not flat:
        room = -(-c // whole) * whole if groups == 1 else c
        c = c if fused else room
        unit = math.gcd(c, whole, *_strides(input)[4:] if fused else [])
        w_steps = [math.prod(kernel) * room // unit, 1, *(math.prod(kernel[d:]) * room // unit for d in (1, 2, 3))]
    dense = 1 if last else out.dim() - 1
    y_unit = _unit(out, dense, o) if last else _unit(out, dense)
    boxes = chip.descriptors and groups == 1 and not flat and _kind(input) != "ieee" and (transposed or math.prod(s) == 1)
    boxes = boxes and not (fused and _strides(input)[4] % whole)
    if boxes:
        launch.allow_descriptors()
    few = [t._replace(k=t.k if flat else power_of_two(c, 16, t.k)) for t in _fitting(_tiles(_TILES, input), positions, o)]

    def counts(tile: Tile) -> tuple[int, int]:
        """Tiles in all, and those of a phase above each other"""
        tall = _boxes(_box(tile.m, *each), each) if boxes else -(-positions // tile.m)
        return -(-o // tile.n) * phases * tall * groups, tall

    def run(tile: Tile, out: Tensor) -> None:
        if tile is _COLUMNS:
            conv_columns.conv(out, input, weight, bias, residual, window, transposed, activation)
            return
        tiles, tall = counts(tile)
        a, b = (input, w) if flat else (_packed(input, c * groups, unit), _packed(w, room, unit, dense=True))
        held = (tile.stages - 1) * (tile.m + tile.n) * tile.k * input.itemsize + 128 * tile.m  # and where the sums change hands
        resident = max(1, min(4, chip.shared // held))
        launch.run(
            code.convolution, min(tiles, chip.processors * resident) if boxes else tiles, out.device, out, a, b, bias, residual,
            tiles, tall, out.shape[0], groups, c // unit, o // y_unit if last else o, *three(input.shape[2:], 1), *size[:2],
            size[2] if last else size[2] // y_unit, *numbers[6:], *_strides(a, unit, 1), *w_steps, *_strides(out, y_unit, dense),
            ACT=activation, TRANSPOSED=transposed, FLAT=flat, LAST=last, PRECISION=how, WIDE=wide, UNIT=unit, Y_UNIT=y_unit,
            BOXES=boxes, **dict(zip(("B", "B0", "B1", "B2"), _box(tile.m, *each) if boxes else (1, 1, 1, 1))), M=tile.m, N=tile.n,
            K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    tile = _cheapest(few, lambda t: counts(t)[0], chip.processors)
    if (PLAIN or tune.ON) and not fused and conv_columns.refuses(out, input, window.kernel, groups, transposed, both) is None:
        few.append(_COLUMNS)
        tile = _COLUMNS if PLAIN else tile
    if tune.ON:
        options = (input.dtype, how, transposed, flat, activation, weight.shape[2:], stride, dilation, last)
        sizes = positions, o, c, groups
        tile = tune.choose("convolution", chip, options, sizes, tile, few, lambda t: run(t, torch.empty_like(out)))
    run(tile, out)


def _depthwise(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, numbers: Sequence[int],
               each: Sequence[int], phases: int, last: bool, wide: bool, transposed: bool, activation: str | None) -> None:
    """numbers: sizes and the rest, as the kernel has them; each: images and positions of a phase"""
    wide = wide or _far(out, input, weight)
    o, kernel = out.shape[1], numbers[6:9]
    w = weight.reshape(o, -1)
    last = last and input.stride(1) == 1
    if last:
        w = w.t().contiguous().t()
    unit = math.gcd(_unit(out, 1), _unit(input, 1)) if last and input.shape[1] == o else 1
    steps = [w.stride(1) * math.prod(kernel[d:]) // unit for d in (1, 2, 3)]
    m, n = (64, power_of_two(o, 1, 64)) if last else (256, power_of_two(o, 1, 8))
    programs = -(-o // n) * phases * -(-math.prod(each) // m)
    launch.run(
        code.depthwise, programs, out.device, out, input, w, bias, residual, out.shape[0], o // unit, *numbers,
        *_strides(input, unit, 1), w.stride(0), *steps, *_strides(out, unit, 1), EACH=o // input.shape[1],
        ROW=kernel[2] if phases == 1 and kernel[2] <= _UNROLLED else 0, ACT=activation, TRANSPOSED=transposed, WIDE=wide,
        UNIT=unit, M=m, N=n, num_warps=4,
    )  # fmt: skip


def conv_weight(out: Tensor, grad: Tensor, input: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
                padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:  # fmt: skip
    """The gradient of the weight: parts of the sum over positions, added up in their order"""
    if not out.numel():
        return
    if not grad.numel():
        out.zero_()
        return
    c, o = input.shape[1] // groups, grad.shape[1] // groups
    if not (c > 1 or o > 4) or not _fuses(c, groups, kernel_size, dilation):
        _conv_weight(out, grad, input, kernel_size, stride, padding, dilation, groups, False)
        return
    x, room = _fused(input, kernel_size[-1], stride[-1], padding[-1], grad.shape[-1])
    rows = out.new_empty(o, x.shape[1], *kernel_size[:-1], 1)
    _conv_weight(rows, grad, x, rows.shape[2:], [*stride[:-1], 1], [*padding[:-1], 0], dilation, 1, True)
    out.copy_(rows.unflatten(1, (-1, room))[:, :, :c].squeeze(-1).movedim(1, -1))


def _conv_weight(out: Tensor, grad: Tensor, input: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int], groups: int, fused: bool) -> None:  # fmt: skip
    """fused: the channels are those of several pixels"""
    kernel, size, s = three(kernel_size, 1), three(grad.shape[2:], 1), three(stride, 1)
    c, o, taps = input.shape[1] // groups, grad.shape[1] // groups, math.prod(kernel)
    each = [grad.shape[0], *size]
    positions = math.prod(each)
    how = precision(input, backends.tf32("conv"))
    chip = launch.chip(out.device)
    window = conv_columns.Window(kernel_size, stride, padding, dilation)
    numbers = (*three(input.shape[2:], 1), *size, *kernel, *s, *three(padding, 0), *three(dilation, 1))
    wide = positions >= _SMALL

    def parts(tiles: int, steps: int) -> tuple[int, int]:
        """How many parts there are for each tile, and the steps of one"""
        few = max(1, min(_PARTS, 2 * chip.processors // tiles, steps // 4))
        chunk = -(-steps // few)
        return -(-steps // chunk), chunk

    if c == 1 and o <= 4:
        wide = wide or _far(grad, input)
        o *= groups
        last = grad.stride(1) == input.stride(1) == 1
        unit = math.gcd(_unit(grad, 1), _unit(input, 1)) if last and o == groups else 1
        m, k = (64, 32) if last else (8, 256)
        m, k = power_of_two(o, 1, m), power_of_two(positions, 16, k)
        tiles, steps = -(-o // m) * taps, -(-positions // k)
        count, chunk = parts(tiles, steps)
        sums = torch.empty(count, o, taps, dtype=torch.float32, device=out.device)
        launch.run(
            code.depthwise_weight_gradient, tiles * count, out.device, sums, grad, input, steps, chunk, grad.shape[0], o // unit,
            *numbers, *_strides(grad, unit, 1), *_strides(input, unit, 1), EACH=o // groups, WIDE=wide, UNIT=unit, M=m, K=k,
            num_warps=4,
        )  # fmt: skip
        out.copy_((sums[0] if count == 1 else sums.sum(0)).view(out.shape))
        return

    flat = c < _FEW
    whole = 16 // grad.itemsize
    g_room = -(-o // whole) * whole if groups == 1 else o
    room = -(-c // whole) * whole if groups == 1 and not flat and not fused else c
    g_unit, unit = math.gcd(g_room, whole), 1 if flat else math.gcd(room, whole, *_strides(input)[4:] if fused else [])
    boxes = chip.descriptors and not flat and _kind(input) != "ieee" and math.prod(s) == 1 and g_unit == whole
    boxes = boxes and (unit == whole or (fused and _strides(input)[4] % whole == 0))
    if boxes:
        launch.allow_descriptors()
    few = _fitting(_tiles(_WEIGHT_TILES, input), g_room, room * taps if flat else room)

    def run(tile: Tile) -> Tensor:
        """The sum's parts: outputs, taps and channels, with the room that the packed tensors have"""
        if tile is _COLUMNS:
            return conv_columns.conv_weight(grad, input, window).view(1, o, c, taps).mT
        tiles = -(-g_room // tile.m) * groups * (-(-c * taps // tile.n) if flat else -(-room // tile.n) * taps)
        steps = _boxes(_box(tile.k, *each), each) if boxes else -(-positions // tile.k)
        count, chunk = parts(tiles, steps)
        g, x = _packed(grad, g_room * groups, g_unit), input if flat else _packed(input, room * groups, unit)
        sums = torch.empty(count, g_room * groups, taps, room, dtype=torch.float32, device=out.device)
        launch.run(
            code.weight_gradient, tiles * count, out.device, sums, g, x, steps, chunk, grad.shape[0], groups, room // unit,
            g_room // g_unit, *numbers, *_strides(g, g_unit, 1), *_strides(x, unit, 1), FLAT=flat, PRECISION=how, WIDE=wide,
            UNIT=unit, G_UNIT=g_unit, BOXES=boxes,
            **dict(zip(("B", "B0", "B1", "B2"), _box(tile.k, *each) if boxes else (1, 1, 1, 1))), M=tile.m, N=tile.n, K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return sums

    tile = few[0]
    if (PLAIN or tune.ON) and not fused and conv_columns.refuses(grad, input, kernel_size, groups, False, False) is None:
        few.append(_COLUMNS)
        tile = _COLUMNS if PLAIN else tile
    if tune.ON:
        options = (input.dtype, how, kernel, stride, dilation, input.stride(1) == 1, grad.stride(1) == 1)
        tile = tune.choose("weight_gradient", chip, options, (positions, o, c, groups), tile, few, run)
    sums = run(tile)
    total = (sums[0] if len(sums) == 1 else sums.sum(0))[: out.shape[0], :, :c]
    out.copy_(total.unflatten(1, tuple(kernel_size)).movedim(-1, 1))


def supports(op: str, *args: Any) -> str | None:
    """Why not, in a sentence"""
    return launch.refuses(*(a for a in args[:4] if isinstance(a, Tensor)))


KERNELS: dict[str, Callable[..., None]] = {"conv": conv, "conv_weight": conv_weight}
