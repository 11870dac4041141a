"""Pooling on NVIDIA GPUs: which kernel takes a call, and what it has to know. What happens in them is told in ``pool.cu``."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Sizes, image, windows
from .engine import cuda

TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat_t", torch.float16: "half_t"}
WIDE = ((2, 2, 0), (3, 2, 1), (3, 1, 1))  # window, stride and padding, alike in all dimensions: kernels that make 16 bytes
WINDOWS = (*WIDE, (3, 3, 0), (5, 1, 2))  # those with kernels that make one number
WHATS = ("MAX", "ARGMAX", "AVERAGE")
_LARGE = 64  # pixels of a window from which lanes share it; where windows do not overlap, neighbours are far apart from _APART
_APART = 16
_BLOCK = 256  # threads
_FULL = 2560  # threads for each multiprocessor, about two full ones: with fewer, strips are cut shorter
_FAR = 2**31 - 1  # kernels count the pixels of an image in 32 bits


def _width(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def _instances() -> list[str]:
    """All kernels that a call may ask for."""
    found = []
    for dtype, name in TYPES.items():
        v, dims = _width(dtype), ("2", "1", "3")
        shapes = [(1, "false", *window, dim) for window, dim in product(WINDOWS, dims)]
        if dtype is not torch.float64:
            shapes += [(v, along, *window, dim) for along, window, dim in product(("false", "true"), WIDE, dims)]
        shapes += [(1, "false", 0, 0, 0, "2"), (v, "false", 0, 0, 0, "2")]
        for v, along, k, s, p, dim in shapes:
            more = "" if dim == "2" else f", {dim}"
            found += [f"forward<{name}, {v}, {along}, {k}, {s}, {p}, {what}{more}>" for what in WHATS]
            found += [f"backward<{name}, {v}, {along}, {k}, {s}, {p}, {avg}{more}>" for avg in ("false", "true")]
        found += [f"reduce<{name}, {what}{more}>" for what, more in product(WHATS, ("", f", {_width(dtype)}"))]
    return found + [f"unpool<{name}, {back}>" for name in _MOVED.values() for back in ("false", "true")]


_MOVED = {2: "unsigned short", 4: "unsigned", 8: "i64"}
SOURCE = cuda.Source("pool", _instances)


def _largest(pixels: int, outs: int) -> int:
    """At most so many pixels has a window of an adaptive pooling in one dimension."""
    return pixels // outs if pixels % outs == 0 else -(-pixels // outs) + 1


def _digit(size: int, far: bool) -> tuple[int, int, int]:
    """What a kernel divides numbers below 2**31 by: size, then a factor and a shift, 31 places apart. far: they may be larger."""
    shift = (size - 1).bit_length()
    return size, 0 if far else -(-(1 << 31 + shift) // size), shift


class _Plan(NamedTuple):
    expression: str
    blocks: int  # of _BLOCK threads
    words: list[int]  # Pool in pool.cu, without the addresses
    shared: int = 0


@lru_cache(1024)
def _plan(name: str, what: str, device: torch.device, dtype: torch.dtype, aligned: bool, dims: int, x_size: Sizes, x_step: Sizes,
          y_size: Sizes, y_step: Sizes, z_step: Sizes, indexed: bool, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes,
          dilation: Sizes, divisor: int, include_pad: bool) -> _Plan:
    """name: forward or backward; x: the image, y: the windows' side, z: where codes and indices lie; in elements."""
    n, c, *sizes = image(x_size, dims, 1)
    outs = image(y_size, dims, 1)[2:]
    x, y, z = (image(step, dims, 0) for step in (x_step, y_step, z_step))
    adaptive, k, s, p, d = windows(adaptive, sizes, outs, size, stride, padding, dilation)
    if adaptive:  # codes count in the largest window
        k = [_largest(a, o) for a, o in zip(sizes, outs, strict=True)]
    forward = name == "forward"
    wide = prod(k) > 256
    v = _width(dtype)
    channels = x[1] == 1 and c > 1
    # Perhaps more threads than factors serve.
    far = n * c * max(prod(a + q for a, q in zip(sizes, p, strict=True)), prod(outs)) > _FAR
    window, known = _known(k, s, p) if d == [1, 1, 1] and not (adaptive or far or wide) else ((0, 0, 0), 2)
    if known == 1 and outs[:2] == [1, 1] and not channels and not indexed:  # planes of one row are seen as rows of one plane
        (c, sizes[1], outs[1]), (x[1], x[3]), (y[1], y[3]), (z[1], z[3]) = (1, c, c), (0, x[1]), (0, y[1]), (0, z[1])
    # The image's rows, or pixels, begin at whole vectors.
    narrow = window[0] > 0 and (dtype is torch.float64 or window not in WIDE)
    whole = aligned and not narrow and all(a % v == 0 for a in (x[0], *x[2:4]))
    across = channels and whole and c % v == 0 and x[4] % v == 0 and y[1] == z[1] == 1
    across = across and all(a % v == 0 for t in (y, z) for a in (t[0], *t[2:]))
    along = not channels and whole and window[0] > 0 and x[4] == 1 and sizes[2] % v == 0 and x[1] % v == 0
    if along and forward:
        along = y[4] == z[4] == 1 and (outs[2] % v != 0 or all(a % v == 0 for t in (y, z) for a in t[:4]))
    if not (across or along):
        v = 1
    groups = c // v if across else c
    full = cuda.limits(device).multiprocessors * _FULL
    lanes = side = 1
    if forward and not window[0]:
        lanes, side = _together(n * groups * prod(outs), prod(k), s[2] >= k[2], groups if channels else 0, full)
    # What a thread's number counts: V outputs or pixels, or of a known window's pixels all those that begin with the same one.
    each = list(outs if forward else sizes)
    if window[0] and not forward:
        each[1:] = [-(-(a + q) // t) for a, q, t in zip(sizes[1:], p[1:], s[1:], strict=True)]
    if along:
        each[2] = -(-(outs if forward else sizes)[2] // v)
    strip = 1
    if window[0]:  # as long as the device stays full, longer where rows are shared
        most = 4 * max(1, window[0] - window[1])
        strip = max(1, min(most, n * groups * prod(each) // full))
    digits = [groups, each[0], -(-each[1] // strip), each[2]]
    threads = n * prod(digits)
    more = f", {known}" if window[0] and known != 2 else ""
    expression = f"{name}<{TYPES[dtype]}, {v}, {'true' if along else 'false'}, {', '.join(map(str, window))}, {what}{more}>"
    if lanes > 1:
        expression = f"reduce<{TYPES[dtype]}, {what}{f', {v}' if v > 1 else ''}>"
    words = [threads, channels, c, *sizes, *outs, *k, *s, *p, *d, adaptive, *x, *y, *z]
    words += [word for digit in digits for word in _digit(digit, far)]
    words += [strip, wide, divisor, include_pad, lanes, side]
    shared = _BLOCK // 32 * side * v * 16 if lanes * side > 32 else 0
    return _Plan(expression, -(-threads * lanes // _BLOCK), words, shared)


def _together(outs: int, pixels: int, apart: bool, groups: int, full: int) -> tuple[int, int]:
    """(lanes that share a window, for how many next to each other at once); (1, 1): each window is a thread's.

    groups: of channels that lie next to each other, whose threads read side by side: they only need help if they are too few.
    0: pixels do, and so do windows that overlap.
    """
    if groups:
        if outs >= full or pixels < _APART:
            return 1, 1
        side = gcd(groups, 8)
        return (_BLOCK if 32 // side * outs < full and pixels >= _BLOCK else 32) // side, side
    if pixels < (_APART if apart else _LARGE):
        return 1, 1
    few = 32 * outs < full and pixels >= 8 * _BLOCK
    return _BLOCK if few else min(32, 1 << (pixels // 16).bit_length()), 1


def _known(k: Sizes, s: Sizes, p: Sizes) -> tuple[tuple[int, int, int], int]:
    """A window that has kernels of its own, or (0, 0, 0); and the number of dimensions in which it is more than a pixel."""
    each = list(zip(k, s, p, strict=True))
    if each[2] in WINDOWS:
        if each[1] == each[2]:
            return each[2], 2 if each[0] == (1, 1, 0) else 3
        if each[0] == each[1] == (1, 1, 0):
            return each[2], 1
    return (0, 0, 0), 2


def _run(name: str, what: str, x: Tensor, y: Tensor, index: Tensor | None, codes: Tensor | None, adaptive: bool, size: Sizes,
         stride: Sizes, padding: Sizes, dilation: Sizes, divisor: int = 0, include_pad: bool = True) -> None:
    z = index if index is not None else codes if codes is not None else y
    aligned = (x.data_ptr() | y.data_ptr() | z.data_ptr()) % 16 == 0
    plan = _plan(
        name,
        what,
        x.device,
        x.dtype,
        aligned,
        len(size),
        x.shape,
        x.stride(),
        y.shape,
        y.stride(),
        z.stride(),
        index is not None,
        adaptive,
        tuple(size),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        divisor,
        include_pad,
    )
    tensors = [x, y, 0 if index is None else index, 0 if codes is None else codes]
    SOURCE.launch(plan.expression, x.device, plan.blocks, _BLOCK, [*tensors, *plan.words], plan.shared)


def max_pool(
    out: tuple[Tensor, Tensor],
    input: Tensor,
    adaptive: bool,
    size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
    keep: bool,
) -> None:
    """out = (each window's maximum, if they are kept their codes)"""
    y, codes = out
    if y.numel():
        _run("forward", "ARGMAX" if keep else "MAX", input, y, None, codes if keep else None, adaptive, size, stride, padding,
             dilation)  # fmt: skip


def max_pool_with_indices(
    out: tuple[Tensor, Tensor],
    input: Tensor,
    adaptive: bool,
    size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
) -> None:
    """out = (each window's maximum, its index in the plane)"""
    if out[0].numel():
        _run("forward", "ARGMAX", input, *out, None, adaptive, size, stride, padding, dilation)


def max_pool_backward(
    out: Tensor,
    grad: Tensor,
    codes: Tensor,
    input: Tensor,
    adaptive: bool,
    size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
) -> None:
    """out = the gradient of input, from that of the output: each pixel asks whose maximum it was"""
    if not grad.numel():
        out.zero_()
        return
    grad, codes = _lying_as(grad, out, len(size)), _lying_as(codes, out, len(size))
    _run("backward", "false", out, grad, None, codes, adaptive, size, stride, padding, dilation)


def _lying_as(grad: Tensor, image: Tensor, dims: int) -> Tensor:
    """grad, or a copy with channels or pixels next to each other, as the image has them"""
    c = -dims - 1
    if image.stride(c) == 1 and image.shape[c] > 1:
        return grad.movedim(c, -1).contiguous().movedim(-1, c)
    return grad.contiguous()


def avg_pool(
    out: Tensor,
    input: Tensor,
    adaptive: bool,
    size: Sizes,
    stride: Sizes,
    padding: Sizes,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
) -> None:
    """out = each window's mean"""
    if out.numel():
        _run("forward", "AVERAGE", input, out, None, None, adaptive, size, stride, padding, (), divisor, count_include_pad)


def avg_pool_backward(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    adaptive: bool,
    size: Sizes,
    stride: Sizes,
    padding: Sizes,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
) -> None:
    """out = the gradient of input, from that of the output"""
    if not grad.numel():
        out.zero_()
        return
    _run("backward", "true", out, _lying_as(grad, out, len(size)), None, None, adaptive, size, stride, padding, (), divisor,
         count_include_pad)  # fmt: skip


def _unpool(back: bool, small: Tensor, large: Tensor, indices: Tensor, dims: int) -> None:
    batch = small.shape[0] if small.dim() == dims + 2 else 1
    views = [t.flatten(-dims) for t in (small, large, indices)]  # copies where pixels have no one stride; kept alive here
    c, pixels = views[0].shape[-2:]
    total = batch * c * pixels
    steps = [s for t in views for s in (t.stride(0) if t.dim() == 3 else 0, t.stride(-2), t.stride(-1))]
    words: list[int | Tensor] = [*views, total, c, pixels, views[1].shape[-1], *steps]
    expression = f"unpool<{_MOVED[small.itemsize]}, {'true' if back else 'false'}>"
    SOURCE.threads(expression, small.device, total, words)


def max_unpool(out: Tensor, input: Tensor, indices: Tensor, output_size: Sizes) -> None:
    """out = 0, and each of input's pixels where its index says. An index that is outside ends the kernel with an error."""
    out.zero_()
    if input.numel():
        _unpool(False, input, out, indices, len(output_size))


def max_unpool_backward(out: Tensor, grad: Tensor, indices: Tensor, output_size: Sizes) -> None:
    """out = what grad has where the indices say"""
    if out.numel():
        _unpool(True, out, grad, indices, len(output_size))


def supports(op: str, *args: Any) -> str | None:
    """None if a kernel serves the call, else the reason why not."""
    refused = cuda.refusal()
    if refused is not None:
        return refused
    if op == "max_unpool" and torch.are_deterministic_algorithms_enabled():
        return "where indices repeat, the last one to write wins, which differs from run to run"
    for t in args[:2]:
        if isinstance(t, Tensor) and t.numel() > _FAR and prod(t.shape[2:]) > _FAR:
            return f"images of {tuple(t.shape[2:])} have more pixels than 31 bits can count"
    return None


KERNELS: dict[str, Callable[..., None]] = {
    "max_pool": max_pool, "max_pool_with_indices": max_pool_with_indices, "max_pool_backward": max_pool_backward,
    "avg_pool": avg_pool, "avg_pool_backward": avg_pool_backward,
    "max_unpool": max_unpool, "max_unpool_backward": max_unpool_backward,
}  # fmt: skip
