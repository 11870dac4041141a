"""Pooling on NVIDIA GPUs: which kernel takes a call, and what it has to know. What happens in them is told in ``pool.cu``."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Sizes, image, windows
from .engine import cuda

TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat_t", torch.float16: "half_t"}
WINDOWS = ((2, 2, 0), (3, 2, 1), (3, 1, 1))  # window, stride and padding, alike in height and width, with kernels of their own
WHATS = ("MAX", "ARGMAX", "AVERAGE")
_LARGE = 64  # pixels of a window from which a warp works on it, where the next thread's window would be far away
_FULL = 2048  # threads of a multiprocessor: with fewer, strips are cut shorter
_FAR = 2**31 - 1  # kernels count the pixels of an image in 32 bits


def _width(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def _instances() -> list[str]:
    """All kernels that a call may ask for."""
    found = []
    for dtype, name in TYPES.items():
        shapes = [(1, "false", (0, 0, 0)), (_width(dtype), "false", (0, 0, 0))]
        if dtype is not torch.float64:
            shapes += [(_width(dtype), along, window) for along, window in product(("false", "true"), WINDOWS)]
        for v, along, (k, s, p) in shapes:
            found += [f"forward<{name}, {v}, {along}, {k}, {s}, {p}, {what}>" for what in WHATS]
            found += [f"backward<{name}, {v}, {along}, {k}, {s}, {p}, {avg}>" for avg in ("false", "true")]
        found += [f"reduce<{name}, {what}>" for what in WHATS]
    return found + [f"unpool<{name}, {back}>" for name in _MOVED.values() for back in ("false", "true")]


_MOVED = {2: "unsigned short", 4: "unsigned", 8: "i64"}
SOURCE = cuda.Source("pool", _instances)


def _largest(pixels: int, outs: int) -> int:
    """At most so many pixels has a window of an adaptive pooling in one dimension."""
    return pixels // outs if pixels % outs == 0 else -(-pixels // outs) + 1


class _Plan(NamedTuple):
    expression: str
    threads: int
    words: list[int]  # Pool in pool.cu, without the addresses


@lru_cache(1024)
def _plan(name: str, what: str, device: torch.device, dtype: torch.dtype, aligned: bool, dims: int, x_size: Sizes, x_step: Sizes,
          y_size: Sizes, y_step: Sizes, z_step: Sizes, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes,
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
    square = (k[2], s[2], p[2]) if (k[1], s[1], p[1], d[1], d[2]) == (k[2], s[2], p[2], 1, 1) and not adaptive else None
    known = square in WINDOWS and dtype is not torch.float64
    whole = aligned and all(a % v == 0 for a in (*x[:1], *x[2:4]))  # the image's rows, or pixels, begin at whole vectors
    across = channels and whole and c % v == 0 and x[4] % v == 0 and y[1] == z[1] == 1
    across = across and all(a % v == 0 for a in (*y[:1], *y[2:]))
    along = not channels and whole and known and x[4] == 1 and sizes[2] % v == 0 and x[1] % v == 0
    if along and forward:
        along = outs[2] % v != 0 or (y[4] == 1 and all(a % v == 0 for a in y[:4]))
    if not (across or along):
        v = 1
    window = square if known and v > 1 else (0, 0, 0)
    height, width = (outs[1:] if forward else sizes[1:])
    count = n * (outs[0] if forward else sizes[0]) * (c // v * width if not along else c * -(-width // v))
    strip = 1
    if forward and window and window[0] > window[1]:  # rows in common: as long as the device stays full
        strip = max(1, min(8, height * count // (cuda.limits(device).multiprocessors * _FULL)))
    threads = count * -(-height // strip)
    expression = f"{name}<{TYPES[dtype]}, {v}, {'true' if along else 'false'}, {', '.join(map(str, window or ()))}, {what}>"
    if forward and v == 1 and not channels and prod(k) >= _LARGE:
        expression, threads = f"reduce<{TYPES[dtype]}, {what}>", n * c * prod(outs) * 32
    total = threads // 32 if expression.startswith("reduce") else threads
    words = [total, channels, c, *sizes, *outs, *k, *s, *p, *d, adaptive, *x, *y, *z, strip, wide, divisor, include_pad]
    return _Plan(expression, threads, words)


def _run(name: str, what: str, x: Tensor, y: Tensor, index: Tensor | None, codes: Tensor | None, adaptive: bool, size: Sizes,
         stride: Sizes, padding: Sizes, dilation: Sizes, divisor: int = 0, include_pad: bool = True) -> None:
    z = index if index is not None else codes if codes is not None else y
    aligned = (x.data_ptr() | y.data_ptr()) % 16 == 0
    plan = _plan(name, what, x.device, x.dtype, aligned, len(size), x.shape, x.stride(), y.shape, y.stride(), z.stride(),
                 adaptive, tuple(size), tuple(stride), tuple(padding), tuple(dilation), divisor, include_pad)
    tensors = [x, y, 0 if index is None else index, 0 if codes is None else codes]
    SOURCE.threads(plan.expression, x.device, plan.threads, [*tensors, *plan.words])


def max_pool(out: tuple[Tensor, Tensor], input: Tensor, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes,
             dilation: Sizes, ceil_mode: bool, keep: bool) -> None:
    """out = (each window's maximum, if they are kept their codes)"""
    y, codes = out
    if y.numel():
        _run("forward", "ARGMAX" if keep else "MAX", input, y, None, codes if keep else None, adaptive, size, stride, padding,
             dilation)  # fmt: skip


def max_pool_with_indices(out: tuple[Tensor, Tensor], input: Tensor, adaptive: bool, size: Sizes, stride: Sizes,
                          padding: Sizes, dilation: Sizes, ceil_mode: bool) -> None:
    """out = (each window's maximum, its index in the plane)"""
    if out[0].numel():
        _run("forward", "ARGMAX", input, *out, None, adaptive, size, stride, padding, dilation)


def max_pool_backward(out: Tensor, grad: Tensor, codes: Tensor, input: Tensor, adaptive: bool, size: Sizes, stride: Sizes,
                      padding: Sizes, dilation: Sizes, ceil_mode: bool) -> None:
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


def avg_pool(out: Tensor, input: Tensor, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes, ceil_mode: bool,
             count_include_pad: bool, divisor: int) -> None:
    """out = each window's mean"""
    if out.numel():
        _run("forward", "AVERAGE", input, out, None, None, adaptive, size, stride, padding, (), divisor, count_include_pad)


def avg_pool_backward(out: Tensor, grad: Tensor, input: Tensor, adaptive: bool, size: Sizes, stride: Sizes,
                      padding: Sizes, ceil_mode: bool, count_include_pad: bool, divisor: int) -> None:
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
