"""Pooling on the CPU: how images lie, and which kernel takes them.

Images of one, two or three dimensions are seen as three. Where channels lie next to each other (the output then does
so too) the kernels "across" serve, else those "along" rows; an input that lies in neither way is first copied.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Sizes, image, windows
from ..reference.pool import largest_window
from .engine import threads
from .engine.build import Kernel, made_by
from .engine.host import simd
from .engine.workspace import workspace
from .pool_slots import OWN, ROW_ENTRY, ROWS

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SERIAL = 32 << 10  # bytes below which a second thread costs more than it brings
_FAR = 2**30 - 1  # argmax kernels count the pixels of an image in 32 bits


@cache
def _kernel(kind: str, signature: str, dtype: torch.dtype, *options: int) -> Callable[..., None]:
    name = "_".join([kind, _NAMES[dtype], *(str(o) for o in options)])
    return Kernel(name, signature, made_by("pool_code", kind, _NAMES[dtype], *options)).load()


def _across(out: Tensor, like: Tensor, dims: int) -> bool:
    """Whether the channels of an output lie next to each other. An output of single pixels lies as the input does."""
    c = -dims - 1
    return out.shape[c] > 1 and out.stride(c) == 1 and (not out.is_contiguous() or like.stride(c) == 1)


def _lying(t: Tensor, dims: int, across: bool) -> Tensor:
    """t, or a copy whose channels, or else the pixels of a row, lie next to each other"""
    d = -dims - 1 if across else -1
    if t.stride(d) == 1 or t.shape[d] == 1:
        return t
    if not across:
        return t.contiguous()
    return t.movedim(-dims - 1, -1).contiguous().movedim(-1, -dims - 1)


class _Plan(NamedTuple):
    """What a kernel has to know about a call; see pool_slots."""

    threads: int
    geometry: array[int]
    address: int  # the geometry's
    scratch: int  # bytes


@lru_cache(1024)
def _plan(kind: str, across: bool, item: int, count: int, dims: int, x_size: Sizes, x_step: Sizes, y_size: Sizes, y_step: Sizes,
          adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, divisor: int, include_pad: bool) -> _Plan:
    """kind: forward, backward (of either), argmax (forward, with codes or indices)"""
    n, c, *sizes = image(x_size, dims, 1)
    outs = image(y_size, dims, 1)[2:]
    x_steps, y_steps = ([item * step for step in image(steps, dims, 0)] for steps in (x_step, y_step))
    adaptive, k, s, p, d = windows(adaptive, sizes, outs, size, stride, padding, dilation)
    if adaptive:
        k = [*map(largest_window, sizes, outs)]
    one = outs == [1, 1, 1] and not any(p) and (adaptive or (k == sizes and set(d) == {1}))
    dense = all(x_steps[2 + i] == x_steps[3 + i] * sizes[i + 1] or sizes[i] == 1 for i in (0, 1))
    whole = one and dense and not across and kind in ("forward", "backward") and x_steps[4] == item
    if whole:  # one row of all pixels
        k = sizes = [1, 1, prod(sizes)]
        s = [1, 1, 1]
    volume, pixels = prod(sizes), prod(outs)
    threads = 1 if max(volume, pixels) * n * c * item < _SERIAL else count
    compute = max(item, 4)
    lanes = simd().width // compute
    # A few vectors more than the last window needs: kernels read whole ones.
    line = (outs[2] + lanes) * s[2] + k[2] * d[2] + sizes[2] + 4 * lanes
    room = ((ROWS if kind == "forward" else 2) * line + 2 * (outs[2] + lanes)) * compute + OWN
    back = kind == "backward"
    if kind == "forward" and not across:
        room += ROW_ENTRY * outs[0] * outs[1]
    block = c
    if n * (volume if back else pixels) < 4 * threads:
        block = -(-c // threads // 16) * 16
    if back and across:  # the windows that cover a row, and those that cover a pixel
        deep, high, wide = (min(o, o // a + 2 if adaptive else (each - 1) * gap // step + 1)
                            for o, a, each, gap, step in zip(outs, sizes, k, d, s, strict=True))
        room += 16 * outs[2] + 24 * deep * high * (1 + wide)
    elif back:  # three tables; the half types' sums of a plane, in the compute type
        room += 8 * prod(k) + 8 * outs[2] + 16 * outs[0] * outs[1] + (volume * compute if item == 2 else 0)
    room = -(-room // 128) * 128
    geometry = array("q", [n, c, *sizes, *outs, *k, *s, *p, *d, adaptive, *x_steps, *y_steps, divisor, include_pad, whole,
                           block, room])
    return _Plan(threads, geometry, geometry.buffer_info()[0], room * threads)


def _run(kernel: Callable[..., None], kind: str, across: bool, x: Tensor, y: Tensor, addresses: Sequence[int], adaptive: bool,
         size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, divisor: int = 0, include_pad: bool = True) -> None:
    plan = _plan(kind, across, x.itemsize, threads.count(), len(size), x.shape, x.stride(), y.shape, y.stride(), adaptive,
                 tuple(size), tuple(stride), tuple(padding), tuple(dilation), divisor, include_pad)
    kernel(plan.threads, *addresses, plan.address, workspace(plan.scratch))


def _prepared(out: Tensor, tensors: Sequence[Tensor], dims: int) -> tuple[bool, list[Tensor]]:
    across = _across(out, tensors[0], dims)
    return across, [_lying(t, dims, across) for t in tensors]


def max_pool(out: tuple[Tensor, Tensor], input: Tensor, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes,
             dilation: Sizes, ceil_mode: bool, keep: bool) -> None:
    """out = (each window's maximum, if they are kept their codes)"""
    if keep:
        _argmax(*out, input, out[1].itemsize, adaptive, size, stride, padding, dilation)
    else:
        _forward(out[0], input, False, adaptive, size, stride, padding, dilation)


def _forward(out: Tensor, input: Tensor, average: bool, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes,
             dilation: Sizes, divisor: int = 0, include_pad: bool = True) -> None:
    if not out.numel():
        return
    across, (x,) = _prepared(out, (input,), len(size))
    kernel = _kernel("pool_across" if across else "pool_along", "iiiii", out.dtype, average)
    _run(kernel, "forward", across, x, out, (x.data_ptr(), out.data_ptr()), adaptive, size, stride, padding, dilation, divisor,
         include_pad)


def max_pool_with_indices(out: tuple[Tensor, Tensor], input: Tensor, adaptive: bool, size: Sizes, stride: Sizes,
                          padding: Sizes, dilation: Sizes, ceil_mode: bool) -> None:
    """out = (each window's maximum, its index in the plane)"""
    _argmax(*out, input, 0, adaptive, size, stride, padding, dilation)


def _argmax(y: Tensor, where: Tensor, input: Tensor, code_size: int, adaptive: bool, size: Sizes, stride: Sizes,
            padding: Sizes, dilation: Sizes) -> None:
    if not y.numel():
        return
    across, (x,) = _prepared(y, (input,), len(size))
    kernel = _kernel("argmax_across" if across else "argmax_along", "iiiiii", y.dtype, code_size)
    addresses = (x.data_ptr(), y.data_ptr(), where.data_ptr())
    _run(kernel, "argmax", across, x, y, addresses, adaptive, size, stride, padding, dilation)


def max_pool_backward(out: Tensor, grad: Tensor, codes: Tensor, input: Tensor, adaptive: bool, size: Sizes, stride: Sizes,
                      padding: Sizes, dilation: Sizes, ceil_mode: bool) -> None:
    """out = the gradient of input, from that of the output"""
    _backward(out, grad, codes, adaptive, size, stride, padding, dilation)


def _backward(out: Tensor, grad: Tensor, codes: Tensor | None, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes,
              dilation: Sizes, divisor: int = 0, include_pad: bool = True) -> None:
    if not grad.numel():
        out.zero_()
        return
    across, (y,) = _prepared(out, (grad,), len(size))
    if codes is not None:  # one after the other, as the pixels or channels of the result
        codes = codes.movedim(-len(size) - 1, -1).contiguous() if across else codes.contiguous()
    kind = "backward_across" if across else "average_backward_along" if codes is None else "max_backward_along"
    options = () if codes is None and not across else (0 if codes is None else codes.itemsize,)
    kernel = _kernel(kind, "iiiiii", out.dtype, *options)
    _run(kernel, "backward", across, out, y, (y.data_ptr(), out.data_ptr(), 0 if codes is None else codes.data_ptr()), adaptive,
         size, stride, padding, dilation, divisor, include_pad)


def avg_pool(out: Tensor, input: Tensor, adaptive: bool, size: Sizes, stride: Sizes, padding: Sizes, ceil_mode: bool,
             count_include_pad: bool, divisor: int) -> None:
    """out = each window's mean"""
    _forward(out, input, True, adaptive, size, stride, padding, (), divisor, count_include_pad)


def avg_pool_backward(out: Tensor, grad: Tensor, input: Tensor, adaptive: bool, size: Sizes, stride: Sizes,
                      padding: Sizes, ceil_mode: bool, count_include_pad: bool, divisor: int) -> None:
    """out = the gradient of input, from that of the output"""
    _backward(out, grad, None, adaptive, size, stride, padding, (), divisor, count_include_pad)


def _unpool(backward: bool, small: Tensor, large: Tensor, indices: Tensor, dims: int) -> None:
    bad = array("q", [0, 0])
    m, n, c = prod(large.shape[-dims:]), prod(small.shape[-dims:]), small.shape[-dims - 1]
    batch = small.shape[0] if small.dim() == dims + 2 else 1
    slots: list[int] = []
    views = [t.flatten(-dims) for t in (indices, small, large)]  # copies where pixels have no one stride; kept alive here
    for t in views:
        slots += [t.data_ptr(), *(t.itemsize * s for s in (t.stride(0) if batch > 1 else 0, t.stride(-2), t.stride(-1)))]
    kernel = _kernel("unpool", "i" * 18, small.dtype, backward)
    kernel(1 if n * batch * c * small.itemsize < _SERIAL else threads.count(), batch, c, n, m, *slots, bad.buffer_info()[0])
    if bad[0]:
        raise RuntimeError(f"max_unpool{dims}d(): Found an invalid max index: {bad[1]} (output volumes are of size "
                           f"{'x'.join(map(str, large.shape[-dims:]))})")


def max_unpool(out: Tensor, input: Tensor, indices: Tensor, output_size: Sizes) -> None:
    """out = 0, and each of input's pixels where its index says. Raises RuntimeError for an index that is outside."""
    out.zero_()
    if input.numel():
        _unpool(False, input, out, indices, len(output_size))


def max_unpool_backward(out: Tensor, grad: Tensor, indices: Tensor, output_size: Sizes) -> None:
    """out = what grad has where the indices say"""
    if out.numel():
        _unpool(True, out, grad, indices, len(output_size))


def supports(op: str, *args: Any) -> str | None:
    """None if a kernel serves the call, else the reason why not."""
    if op.startswith("max_pool"):
        input, _adaptive, size = args[2:5] if op == "max_pool_backward" else args[:3]
        if input.numel() > _FAR and prod(input.shape[-len(size):]) > _FAR:
            return f"images of {tuple(input.shape[-len(size):])} have more pixels than 31 bits can count"
    return None


KERNELS: dict[str, Callable[..., None]] = {
    "max_pool": max_pool, "max_pool_with_indices": max_pool_with_indices, "max_pool_backward": max_pool_backward,
    "avg_pool": avg_pool, "avg_pool_backward": avg_pool_backward,
    "max_unpool": max_unpool, "max_unpool_backward": max_unpool_backward,
}
