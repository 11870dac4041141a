"""Pooling: each function of torch's three is the general one with the number of dimensions filled in.

An output is channels_last where the input is, in three dimensions too. lp_pool is our average between torch's powers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import pool as _pool
from ._arguments import Ints, ints


def _autocast_3d(input: Tensor, dims: int) -> Tensor:
    """torch's autocast pools in float32 in three dimensions, and leaves the dtype in fewer."""
    lower = dims == 3 and isinstance(input, Tensor) and input.dtype in (torch.bfloat16, torch.float16)
    return input.float() if lower and torch.is_autocast_enabled("cpu") else input


def _maximum(input: Tensor, *rest: Any) -> Any:
    """rest: the window, return_indices, backend. Where each maximum is, is kept where a gradient will ask for it."""
    *window, return_indices, backend = rest
    if return_indices:
        return _pool.max_pool_with_indices.call(input, *window, backend)
    keep = isinstance(input, Tensor) and input.requires_grad and torch.is_grad_enabled()
    return _pool.max_pool.call(input, *window, keep, backend)


def _max(name: str, dims: int) -> Callable[..., Any]:
    def max_pool(
        input: Tensor,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Ints = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
        *,
        backend: str | None = None,
    ) -> Any:
        """The maximum of each window; with return_indices also where it is, counted through the image.

        input (N, C, …) or (C, …). A NaN in a window is its maximum. RuntimeError for a window that does not fit, a
        padding over half the window, a stride that is not positive.
        """
        size = ints(name, "kernel_size", kernel_size, dims)
        window = (
            size,
            size if stride is None or stride == () or stride == [] else ints(name, "stride", stride, dims),
            ints(name, "padding", padding, dims),
            ints(name, "dilation", dilation, dims),
            ceil_mode,
        )
        return _maximum(_autocast_3d(input, dims), False, *window, return_indices, backend)

    return _named(max_pool, name)


def _average(name: str, dims: int) -> Callable[..., Tensor]:
    def average(
        input: Tensor,
        kernel_size: Ints,
        stride: Ints | None,
        padding: Ints,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor: int | None,
        backend: str | None,
    ) -> Tensor:
        size = ints(name, "kernel_size", kernel_size, dims)
        steps = size if stride is None or stride == () or stride == [] else ints(name, "stride", stride, dims)
        if divisor == 0:
            raise RuntimeError(f"{name}(): divisor_override must not be zero, got 0")
        pads = ints(name, "padding", padding, dims)
        input = _autocast_3d(input, dims)
        return _pool.avg_pool.call(input, False, size, steps, pads, ceil_mode, count_include_pad, divisor or 0, backend)

    def avg_pool1d(
        input: Tensor,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Ints = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """The mean of each window. input (N, C, L) or (C, L). Errors as max_pool1d."""
        return average(input, kernel_size, stride, padding, ceil_mode, count_include_pad, None, backend)

    def avg_pool(
        input: Tensor,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Ints = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """The mean of each window, or its sum over divisor_override. input (N, C, …) or (C, …). Errors as max_pool."""
        return average(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, backend)

    return _named(avg_pool1d if dims == 1 else avg_pool, name)


def _adaptive_sizes(name: str, input: Tensor, output_size: Any, dims: int) -> list[int]:
    """None stands for the input's size, which torch allows in two and three dimensions."""
    if isinstance(output_size, (tuple, list)) and len(output_size) == dims > 1 and isinstance(input, Tensor):
        if len(output_size) >= input.dim():
            raise ValueError(f"{name}(): input must have at least {dims + 1} dimensions, got {tuple(input.shape)}")
        output_size = [n if o is None else o for o, n in zip(output_size, input.shape[-dims:], strict=True)]
    if isinstance(output_size, (tuple, list)) and len(output_size) != dims:
        raise RuntimeError(f"{name}(): output_size must have {dims} numbers, got {len(output_size)}: {output_size}")
    return ints(name, "output_size", output_size, dims)


def _adaptive_max(name: str, dims: int) -> Callable[..., Any]:
    def adaptive_max_pool(
        input: Tensor, output_size: Any, return_indices: bool = False, *, backend: str | None = None
    ) -> Any:
        """The maxima of windows that divide the input, (N, C, …) or (C, …), evenly; with return_indices also where."""
        size = _adaptive_sizes(name, input, output_size, dims)
        return _maximum(_autocast_3d(input, dims), True, size, [], [], [], False, return_indices, backend)

    return _named(adaptive_max_pool, name)


def _adaptive_average(name: str, dims: int) -> Callable[..., Tensor]:
    def adaptive_avg_pool(input: Tensor, output_size: Any, *, backend: str | None = None) -> Tensor:
        """The means of windows that divide the input, (N, C, …) or (C, …), evenly."""
        size = _adaptive_sizes(name, input, output_size, dims)
        return _pool.avg_pool.call(_autocast_3d(input, dims), True, size, [], [], False, True, 0, backend)

    return _named(adaptive_avg_pool, name)


def _power_average(name: str, dims: int) -> Callable[..., Tensor]:
    maximum = (max_pool1d, max_pool2d, max_pool3d)[dims - 1]
    average = (avg_pool1d, avg_pool2d, avg_pool3d)[dims - 1]

    def lp_pool(
        input: Tensor,
        norm_type: float,
        kernel_size: Ints,
        stride: Ints | None = None,
        ceil_mode: bool = False,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """(Σ x^norm_type)^(1 / norm_type) over each window; the largest or smallest magnitude for ±inf."""
        if norm_type == float("inf"):
            return maximum(input.abs(), kernel_size, stride, 0, 1, ceil_mode, backend=backend)
        if norm_type == -float("inf"):
            return -maximum(-input.abs(), kernel_size, stride, 0, 1, ceil_mode, backend=backend)
        mean = average(input.pow(norm_type), kernel_size, stride, 0, ceil_mode, backend=backend)
        count = 1
        for k in ints(name, "kernel_size", kernel_size, dims):
            count *= k
        return (torch.sign(mean) * F.relu(torch.abs(mean))).mul(count).pow(1.0 / norm_type)

    return _named(lp_pool, name)


def _unpooled(
    name: str, input: Tensor, size: list[int], steps: list[int], pads: list[int], wanted: Sequence[int] | None
) -> list[int]:
    """The spatial size of max_unpool's output; torch's own function for it cannot be traced by torch.compile."""
    dims = len(size)
    usual = [(n - 1) * s - 2 * p + k for n, s, p, k in zip(input.shape[-dims:], steps, pads, size, strict=True)]
    found = usual if wanted is None else list(wanted)[2:] if len(wanted) == dims + 2 else list(wanted)
    if len(found) != dims:
        raise ValueError(f"{name}(): output_size must have {dims} or {dims + 2} numbers, got {len(found)}: {found}")
    for d, (n, default, step) in enumerate(zip(found, usual, steps, strict=True)):
        if n < 0 or (wanted is not None and not default - step < n < default + step):
            raise ValueError(
                f"{name}(): output_size got {found}, dimension {d} must be between {default - step} and {default + step}"
            )
    return found


def _unpool(name: str, dims: int) -> Callable[..., Tensor]:
    def max_unpool(
        input: Tensor,
        indices: Tensor,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Ints = 0,
        output_size: Sequence[int] | None = None,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """Each of input's pixels where the index says, among zeros: what max_pool with return_indices took apart.

        RuntimeError for an index outside the output, ValueError for an output_size that no such pooling has.
        """
        size = ints(name, "kernel_size", kernel_size, dims)
        steps = size if stride is None else ints(name, "stride", stride, dims)
        pads = ints(name, "padding", padding, dims)
        if dims == 3 and min(steps) <= 0:  # torch looks at it in three dimensions only
            raise RuntimeError(f"{name}(): strides should be greater than zero, but got stride={tuple(steps)}")
        if input.dim() in (dims + 1, dims + 2):
            wanted = _unpooled(name, input, size, steps, pads, output_size)
        else:
            wanted = [0] * dims  # the op says what is wrong
        return _pool.max_unpool.call(input, indices, list(wanted), backend)

    return _named(max_unpool, name)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    return function


def _each(make: Callable[[str, int], Callable[..., Any]], kind: str) -> list[Callable[..., Any]]:
    return [make(f"{kind}{dims}d", dims) for dims in (1, 2, 3)]


max_pool1d, max_pool2d, max_pool3d = _each(_max, "max_pool")
avg_pool1d, avg_pool2d, avg_pool3d = _each(_average, "avg_pool")
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = _each(_adaptive_max, "adaptive_max_pool")
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = _each(_adaptive_average, "adaptive_avg_pool")
lp_pool1d, lp_pool2d, lp_pool3d = _each(_power_average, "lp_pool")
max_unpool1d, max_unpool2d, max_unpool3d = _each(_unpool, "max_unpool")
