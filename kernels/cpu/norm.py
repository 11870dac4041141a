"""Normalisation on the CPU: how channels and pixels, or rows, lie, and which kernel takes them.

Batch and group normalisation: where the pixels of a channel lie next to each other the kernels "along" serve, where the channels
of a pixel do those "across" (see norm_code); another input is first copied. Layer and root-mean-square normalisation: rows (see
norm_rows_code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from math import isqrt, prod

import torch
from torch import Tensor

from .engine import threads
from .engine.build import Kernel, made_by
from .engine.host import caches, simd
from .engine.overhead import torch_is_shorter
from .engine.workspace import workspace

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SERIAL = 32 << 10  # bytes below which a second thread costs more than it brings
_KEPT = 0.5  # of L3: larger results of rows, of which the next reader would find little there, are stored past the caches


@cache
def _kernel(kind: str, integers: int, dtype: torch.dtype, module: str = "norm_code") -> Callable[..., None]:
    return Kernel(f"{kind}_{_NAMES[dtype]}", "i" * integers + "f", made_by(module, kind, _NAMES[dtype])).load()


def _across(out: Tensor, like: Tensor) -> bool:
    """Whether the channels of an output lie next to each other. An output of single pixels lies as the input does."""
    return out.dim() == 2 or (out.shape[1] > 1 and out.stride(1) == 1 and (not out.is_contiguous() or like.stride(1) == 1))


@lru_cache(4096)
def _lie(shape: Sequence[int], stride: Sequence[int], across: bool) -> tuple[int, int] | None:
    """The distances of images, and of pixels (``across``) or channels; None where channels, or pixels, are not neighbours, or
    pixels not evenly apart"""
    step = count = 1
    for n, s in zip(shape[:1:-1], stride[:1:-1], strict=True):
        if n > 1:
            if count > 1 and s != step * count:
                return None
            step, count = (s if count == 1 else step), count * n
    if across:
        return (stride[0], step) if shape[1] == 1 or stride[1] == 1 else None
    return (stride[0], stride[1]) if count == 1 or step == 1 else None


def _compute(input: Tensor) -> torch.dtype:
    return torch.float32 if input.itemsize == 2 else input.dtype


def _parameter(t: Tensor | None, input: Tensor) -> Tensor | None:
    """In the compute type, dense"""
    if t is None:
        return None
    compute = _compute(input)
    return t if t.dtype is compute and t.is_contiguous() else t.to(compute).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _run(tensors: list[Tensor], groups: int, given: Sequence[Tensor] | bool, weight: Tensor | None, bias: Tensor | None,
         stats: Tensor, sums: Tensor | None, eps: float) -> None:
    """tensors: input, [the output's gradient,] the result. groups: of an image; 0: the batch's channels are normalised. given:
    the moments, or in the backward whether they were."""
    x, out = tensors[0], tensors[-1]
    (n, channels), size = x.shape[:2], x.itemsize
    pixels = x.numel() // (n * channels)
    count = 1 if x.numel() * size < _SERIAL else threads.count()
    across = _across(out, x)
    addresses, outer, inner, alive = [], [], [], []  # copies have to live until the kernel has run, parameters too
    for t in tensors:
        lie = _lie(t.shape, t.stride(), across)
        if lie is None:
            t = t.movedim(1, -1).contiguous().movedim(-1, 1) if across else t.contiguous()
            lie = _lie(t.shape, t.stride(), across)
            assert lie is not None
        alive.append(t)
        addresses.append(t.data_ptr())
        outer.append(lie[0] * size)
        inner.append(lie[1] * size)
    parameters = [_parameter(t, x) for t in ((weight, bias) if sums is None else (weight,))]
    moments = [_parameter(t, x) for t in given] if not isinstance(given, bool) else None
    places = [_address(t) for t in parameters]
    statistics = [stats.data_ptr(), stats.data_ptr() + stats.stride(0) * 8]
    known = [int(bool(given))] if sums is not None else [0, 0] if moments is None else [_address(t) for t in moments]
    last = [] if sums is None else [sums.data_ptr()]
    past = _past(x.numel() * size, addresses[-1], outer[-1] | inner[-1] | (0 if across else pixels * size))
    if across:
        images, rows = n, pixels
        if not groups and (rows == 1 or all(o == rows * i for o, i in zip(outer, inner, strict=True))):
            images, rows, inner = 1, n * rows, outer if rows == 1 else inner
        parts = 1 if images >= 2 * count else count
        lines = 3 if sums is None else 4
        room = 2 * images * parts * channels * 8 + lines * (images + count) * channels * max(4, size)
        ints = [count, images, rows, channels, groups, parts]
        for three in zip(addresses, outer, inner, strict=True):
            ints += three
        ints += [*places, *statistics, *known, *last, past, workspace(room)]
    else:
        each = channels // groups if groups else 1
        # Batch normalisation with moments that are known goes image by image, as memory lies.
        units = (n, groups, each) if groups else (n, channels, 1) if given else (1, channels, n)
        ints = [count, *units, pixels]
        for address, image, channel in zip(addresses, outer, inner, strict=True):
            ints += [address, image, channel * each, channel if groups else image]
        ints += [*places, each, 1 if groups else 0, *statistics, groups, *known]
        ints += [*last, past] if sums is not None else [workspace(3 * channels * max(4, size)) if given else 0, past]
    kind = f"norm{'' if sums is None else '_backward'}_{'across' if across else 'along'}"
    _kernel(kind, len(ints), x.dtype)(*ints, eps)


def batch_norm(out: tuple[Tensor, Tensor], input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
               var: Tensor | None, eps: float) -> None:
    """out = (the normalised input, the mean and variance that it was normalised by)"""
    y, stats = out
    given = False if mean is None or var is None else (mean, var)
    _run([input, y], 0, given, weight, bias, stats, None, eps)


def batch_norm_backward(out: tuple[Tensor, Tensor], grad: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor,
                        training: bool, eps: float) -> None:
    """out = (the gradient of input, those of bias and weight)"""
    result, sums = out
    images = not training and not _across(result, input)  # then there are sums of each
    each = sums.new_empty((2, *input.shape[:2])) if images else sums
    _run([input, grad, result], 0, not training, weight, None, stats, each, eps)
    if images:
        sums.copy_(each.sum(1))


_LONG_VECTORS = 2048  # elements of a group from which on its sums have to be taken in parts


def _vectors(tensors: list[Tensor], groups: int, parameters: list[Tensor], stats: list[Tensor], eps: float) -> bool:
    """Group normalisation of (N, C), channels next to each other. stats: in the backward sums too. False where it is another."""
    x = tensors[0]
    (n, channels), size = x.shape[:2], x.itemsize
    each = channels // groups
    if x.numel() != n * channels or each >= _LONG_VECTORS or any(t.stride(1) != 1 for t in tensors):
        return False
    count = 1 if x.numel() * size < _SERIAL else threads.count()
    ints = [count, n, groups, each]
    for t in tensors:
        ints += [t.data_ptr(), t.stride(0) * size]
    ints += [*map(_address, parameters), stats[0].data_ptr(), stats[0].data_ptr() + stats[0].stride(0) * 8,
             *map(_address, stats[1:])]
    if stats[1:]:
        ints.append(workspace(count * 2 * channels * (8 + max(4, size))))
    _kernel("vectors_backward" if stats[1:] else "vectors", len(ints), x.dtype, "norm_vectors_code")(*ints, eps)
    return True


def group_norm(out: tuple[Tensor, Tensor], input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int,
               eps: float) -> None:
    """out = (the normalised input, each group's mean and variance)"""
    y, stats = out
    if _vectors([input, y], groups, [_filled(weight, 1.0, input.shape[1], input), _filled(bias, 0.0, input.shape[1], input)],
                [stats], eps):
        return
    _run([input, y], groups, False, weight, bias, stats, None, eps)


def group_norm_backward(out: tuple[Tensor, Tensor], grad: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor,
                        groups: int, eps: float) -> None:
    """out = (the gradient of input, those of bias and weight)"""
    result, sums = out
    if _vectors([input, grad, result], groups, [_filled(weight, 1.0, input.shape[1], input)], [stats, sums], eps):
        return
    each = sums.new_empty((2, *input.shape[:2]))
    _run([input, grad, result], groups, False, weight, None, stats, each, eps)
    sums.copy_(each.sum(1))


# Rows


@cache
def _rows_kernel(kind: str, signature: str, dtype: torch.dtype, *options: bool) -> Callable[..., None]:
    name = "_".join(["norm", kind, _NAMES[dtype], *map(str, options)])
    return Kernel(name, signature, made_by("norm_rows_code", kind, _NAMES[dtype], *options)).load()


def _lay(t: Tensor, n: int) -> tuple[Tensor, int, int]:
    """t, or a copy of it, as rows of n elements next to each other: the address of the first, and the bytes to the next"""
    if not t.is_contiguous():
        t = t.reshape(-1, n)
        if t.stride(1) == 1 or n == 1:
            return t, t.data_ptr(), t.stride(0) * t.itemsize
        t = t.contiguous()
    return t, t.data_ptr(), n * t.itemsize


def _past(size: int, address: int, step: int) -> bool:
    """Whether rows of a result of so many bytes are stored past the caches, which they can be if they are aligned"""
    return size > _KEPT * max(caches().l3, caches().l2) and (address | step) % simd().width == 0


def _filled(t: Tensor | None, usual: float, n: int, input: Tensor) -> Tensor:
    """``usual`` where there is none"""
    found = _parameter(t, input)
    return input.new_full((n,), usual, dtype=_compute(input)) if found is None else found


def _rows(centred: bool, out: tuple[Tensor, ...], input: Tensor, residual: Tensor | None, weight: Tensor | None,
          bias: Tensor | None, shape: Sequence[int], eps: float) -> None:
    """out: the normalised rows, [the sum,] the statistics"""
    n = shape[0] if len(shape) == 1 else prod(shape)
    _x, *x_rows = _lay(input, n)  # the tensors have to live until the kernel has run
    y, *y_rows = _lay(out[0], n)
    _r, *r_rows = (None, 0, 0) if residual is None else _lay(residual, n)
    _, *s_rows = (None, 0, 0) if residual is None else _lay(out[1], n)
    weight, bias = _filled(weight, 1.0, n, input), _filled(bias, 0.0, n, input)
    size = y.numel()
    count = 1 if size * y.itemsize < _SERIAL else threads.count()
    _rows_kernel("rows", "i" * 15 + "f", y.dtype, centred, residual is not None)(
        count, size // n, n, *x_rows, *r_rows, *s_rows, *y_rows, weight.data_ptr(), bias.data_ptr(), out[-1].data_ptr(),
        _past(size * y.itemsize, *y_rows), eps)


def _norm_rows(centred: bool, out: tuple[Tensor, Tensor], input: Tensor, weight: Tensor | None, bias: Tensor | None,
               shape: Sequence[int], eps: float) -> None:
    """out = (the normalised rows, each row's (mean and) 1 / deviation)"""
    _rows(centred, out, input, None, weight, bias, shape, eps)


def _norm_rows_backward(centred: bool, out: tuple[Tensor, Tensor], grad: Tensor, input: Tensor, weight: Tensor | None,
                        stats: Tensor, more: Tensor | None, shape: Sequence[int], eps: float) -> None:
    """out = (the gradient of input, those of weight and bias)"""
    n = shape[0] if len(shape) == 1 else prod(shape)
    _g, *g_rows = _lay(grad, n)  # the tensors have to live until the kernel has run
    _x, *x_rows = _lay(input, n)
    _m, *m_rows = (None, 0, 0) if more is None else _lay(more, n)
    y, *y_rows = _lay(out[0], n)
    weight, stats = _filled(weight, 1.0, n, input), stats.contiguous()
    size = y.numel()
    count = 1 if size * y.itemsize < _SERIAL else threads.count()
    _rows_kernel("rows_backward", "i" * 17, y.dtype, centred)(
        count, size // n, n, *g_rows, *x_rows, *m_rows, *y_rows, weight.data_ptr(), stats.data_ptr(), out[1].data_ptr(),
        workspace(4 * n * count * weight.itemsize), max(32, isqrt(size // n // count)), _past(size * y.itemsize, *y_rows))


KERNELS: dict[str, Callable[..., None]] = {
    "batch_norm": batch_norm, "batch_norm_backward": batch_norm_backward,
    "group_norm": group_norm, "group_norm_backward": group_norm_backward,
}
for _name, _centred in (("layer_norm", True), ("rms_norm", False)):
    KERNELS[_name], KERNELS[f"add_{_name}"] = partial(_norm_rows, _centred), partial(_rows, _centred)
    KERNELS[f"{_name}_backward"] = partial(_norm_rows_backward, _centred)


#: When the automatic choice is torch, by measurement: op → (*args) → the reason, or None.
TORCH_IS_FASTER = {"layer_norm": lambda input, *_: torch_is_shorter(input, 192 << 10, 192 << 10)}
