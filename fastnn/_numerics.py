"""The error rule that verify, bench and the tests share.

Errors are counted in ulp: units in the last place that the output's dtype has at the reference value. For a sum of
products
the place is that of the sum of magnitudes (the reference run on absolute values): with cancellation the result itself
can be arbitrarily smaller than what any order of summation could resolve. In a forward, 16-bit types are summed in
float32, so there the magnitudes count with float32's precision; a backward starts from what the forward rounded to 16
bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

#: torch's functions and torch.nn.functional's under one roof; where both have a name, the latter's.
TORCH: Any = SimpleNamespace(
    **{
        name: value
        for module in (torch, torch.nn.functional)
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_")
    }
)


def _careful_matmul(a: Tensor, b: Tensor) -> Tensor:
    """torch.matmul with every product in memory and summed by cascade: more exact than any BLAS, and slow."""
    left = a.unsqueeze(0) if a.dim() == 1 else a
    right = b.unsqueeze(1) if b.dim() == 1 else b
    out = (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)
    out = out.squeeze(-2) if a.dim() == 1 else out
    return out.squeeze(-1) if b.dim() == 1 else out


def _careful_addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    return beta * c + alpha * _careful_matmul(a, b)


def _careful_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _careful_matmul(x, weight.mT)
    return y if bias is None else y + bias


def _careful_log_softmax(x: Tensor, dim: int) -> Tensor:
    below = x - x.detach().amax(dim, keepdim=True)
    return below - torch.log(torch.exp(below).sum(dim, keepdim=True))


def _careful_softmax(x: Tensor, dim: int) -> Tensor:
    """torch.softmax in float64 is itself wrong by up to 7 ulp: it sums in vectors, one term after the other."""
    e = torch.exp(x - x.detach().amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


def _careful_cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    from .kernels.reference import softmax as plain

    return plain.cross_entropy(x, target, weight, **options)[0]


def _careful_convolution(dims: int, transposed: bool) -> Callable[..., Tensor]:
    from .kernels.reference import conv as plain

    def product(c: Tensor, w: Tensor) -> Tensor:
        return (c.unsqueeze(2) * w.unsqueeze(3)).sum((3, 5))

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        numbers = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0} | options
        lists = {k: [v] * dims if isinstance(v, int) else list(v) for k, v in numbers.items() if k != "groups"}
        groups, more = options.get("groups", 1), lists.pop("output_padding")
        return plain.conv(
            x, weight, bias, None, *lists.values(), transposed, more, groups, None, product
        )

    return convolve


def _careful_avg_pool2d(
    x: Tensor, size: int, stride: int | None = None, padding: int = 0, count_include_pad: bool = True
) -> Tensor:
    """torch's own adds the pixels of a window one after the other."""
    from .kernels.reference import pool as plain

    return plain.avg_pool(x, False, [size] * 2, [stride or size] * 2, [padding] * 2, False, count_include_pad, 0)


def _careful_normal(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """torch multiplies x by 1 / deviation before it takes the mean away, and adds squares up that way in channels_last."""
    below = x - x.mean(dims, keepdim=True)
    below = below - below.mean(dims, keepdim=True)
    return below * torch.rsqrt(below.square().mean(dims, keepdim=True) + eps)


def _careful_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's own adds up a row's exponentials one after the other."""
    from .kernels.reference import attention as plain

    factor = query.shape[-1] ** -0.5 if scale is None else scale
    options = plain.Options(scale=factor, right=0 if is_causal else -1)
    return plain.attention(query, key, value, mask, None, None, None, *options)[0]


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [-1, *[1] * (x.dim() - 2)]
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _careful_batch_norm(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Any = None, bias: Any = None, training: bool = False
) -> Tensor:
    if mean is None or var is None:
        return _affine(_careful_normal(x, [d for d in range(x.dim()) if d != 1], 1e-5), weight, bias)
    return _affine(_affine(_affine(x, None, -mean), torch.rsqrt(var + 1e-5), None), weight, bias)


def _careful_group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None) -> Tensor:
    return _affine(_careful_normal(x.reshape(x.shape[0], groups, -1), [2], 1e-5).reshape(x.shape), weight, bias)


def _careful_instance_norm(x: Tensor, mean: None, var: None, weight: Any = None, bias: Any = None) -> Tensor:
    return _careful_group_norm(x, x.shape[1], weight, bias)


def _careful_layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor) -> Tensor:
    return _careful_normal(x, list(range(x.dim() - len(shape), x.dim())), 1e-5) * weight + bias


#: The same with functions that can judge float64 ones; products and convolutions of small tensors only.
CAREFUL: Any = SimpleNamespace(
    **vars(TORCH)
    | {
        "matmul": _careful_matmul,
        "mm": _careful_matmul,
        "bmm": _careful_matmul,
        "mv": _careful_matmul,
        "addmm": _careful_addmm,
        "baddbmm": _careful_addmm,
        "linear": _careful_linear,
        "softmax": _careful_softmax,
        "log_softmax": _careful_log_softmax,
        "cross_entropy": _careful_cross_entropy,
        "scaled_dot_product_attention": _careful_attention,
        "avg_pool2d": _careful_avg_pool2d,
        "batch_norm": _careful_batch_norm,
        "group_norm": _careful_group_norm,
        "instance_norm": _careful_instance_norm,
        "layer_norm": _careful_layer_norm,
    }
    | {f"conv{d}d": _careful_convolution(d, False) for d in (1, 2, 3)}
    | {f"conv_transpose{d}d": _careful_convolution(d, True) for d in (1, 2, 3)}
)
#: The magnitudes at which the errors of results are counted: scale(float64 inputs, float64 gradient of the output or
#: None).
Scale = Callable[[Sequence[Any], Tensor | None], tuple[Tensor, ...]]

#: An error of so many ulp is allowed whatever PyTorch's own error is; half of it in the 16-bit types, which are rounded
#: once at the end of float32 arithmetic.
FLOOR = 4.0
_BLOCK = 1 << 22


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of ``dtype`` at float64 ``values`` (subnormal numbers included)."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(
        values.abs().clamp(info.tiny, info.max)
    )  # magnitude = mantissa · 2^exponent, mantissa ≥ 0.5
    return torch.exp2((exponent - 1).double()) * info.eps


@dataclass
class Error:
    """How far a result is from its reference: the largest and the root-mean-square error in ulp, and mismatched
    specials.

    ``specials`` counts the places where one side is NaN or infinite and the other is not the same, or a forward's
    −0 became +0.
    """

    worst: float = 0.0
    square_sum: float = 0.0
    count: int = 0
    specials: int = 0

    @property
    def rms(self) -> float:
        return (self.square_sum / self.count) ** 0.5 if self.count else 0.0

    def __add__(self, other: Error) -> Error:
        return Error(
            max(self.worst, other.worst),
            self.square_sum + other.square_sum,
            self.count + other.count,
            self.specials + other.specials,
        )

    def within(self, yardstick: Error, dtype: torch.dtype) -> bool:
        """The rule: at most twice the yardstick's (PyTorch's) largest error plus a floor, no more specials lost."""
        floor = FLOOR / 2 if dtype.itemsize == 2 else FLOOR
        return self.specials <= yardstick.specials and self.worst <= 2 * yardstick.worst + floor


def error(
    result: Tensor,
    reference: Tensor,
    scale: Tensor | None = None,
    yardstick: Tensor | None = None,
    forward: bool = False,
) -> Error:
    """The error of ``result`` against a float64 ``reference`` of the same shape, in ulp of ``result``'s dtype.

    Args:
        scale: magnitudes (float64, same shape) at which the ulp is taken where they exceed the reference.
        yardstick: PyTorch's own result; where it is NaN or infinite and the reference is not (an overflow on the way,
            say), the same value is accepted of us.
        forward: whether the result is a forward's.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != reference.shape:
        raise ValueError(f"result has shape {tuple(result.shape)}, the reference {tuple(reference.shape)}")
    total = Error()
    fineness = (
        torch.finfo(torch.float32).eps / torch.finfo(result.dtype).eps
        if forward and result.dtype.itemsize == 2
        else 1.0
    )
    flat = [None if t is None else t.detach().reshape(-1).split(_BLOCK) for t in (result, reference, scale, yardstick)]
    for n, out in enumerate(flat[0] or ()):
        ref, size, other = (None if t is None else t[n] for t in flat[1:])
        assert ref is not None
        at = ref.abs() if size is None else torch.maximum(ref.abs(), size * fineness)
        distance = (out.double() - ref).abs_().div_(ulp(at, out.dtype))
        lost = _lost_signs(out, ref, at, other) if forward else 0  # where a slope is 0, its sign is nobody's concern
        if not (out.isfinite().all() and ref.isfinite().all()):
            rounded = ref.to(out.dtype)
            same = (out == rounded) | (out.isnan() & rounded.isnan())
            if other is not None:
                same |= (out == other) | (out.isnan() & other.isnan())
            finite = out.isfinite() & rounded.isfinite()
            distance, lost = distance[finite], lost + int((~finite & ~same).sum())
        worst = float(distance.max()) if distance.numel() else 0.0
        total += Error(worst, float(distance.dot(distance)), distance.numel(), lost)
    return total


def _lost_signs(out: Tensor, ref: Tensor, at: Tensor, other: Tensor | None) -> int:
    """Where the reference is −0, and so is all that it is made of, and the result is +0, which PyTorch's own is not."""
    wrong = (at == 0) & ref.signbit() & (out == 0) & ~out.signbit()
    if other is not None:
        wrong &= (other != 0) | other.signbit()
    return int(wrong.sum())


# References and scales ------------------------------------------------------------------------------------------------


def widen(value: Any, absolute: bool = False) -> Any:
    """A float64 leaf of a tensor's values or magnitudes, requiring a gradient if it does; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    wide = value.detach().double()
    return (wide.abs() if absolute else wide).requires_grad_(value.requires_grad)


def all_of(found: Any) -> tuple[Any, ...]:
    """A result, or several, as a tuple."""
    return found if isinstance(found, tuple) else (found,)


def results(function: Callable[..., Any], inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
    """The output (outputs, of a tuple), or with ``grad`` the gradients of all inputs that require one."""
    if grad is None:
        with torch.no_grad():
            return all_of(function(*inputs))
    with torch.enable_grad():
        leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        return torch.autograd.grad(function(*inputs), leaves, grad)


def sum_of_magnitudes(function: Callable[..., Tensor]) -> Scale:
    """The scale of sums of products: the function (its linear part, in torch's words) of absolute values."""

    def scale(inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
        return results(
            lambda *values: function(TORCH, *values),
            [widen(v, absolute=True) for v in inputs],
            widen(grad, absolute=True),
        )

    return scale


def softmax_scale(log: bool, dim: int = -1) -> Scale:
    """For softmax and log_softmax along ``dim``.

    An exponential magnifies what its argument has lost: exp(x - max) is counted at 1 + max - x times its value.
    log_softmax is a difference, of x - max and a logarithm near or above 0; the gradients y (g - Σ g y) and g - y Σ g
    are others.
    """

    def scale(inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
        x = inputs[0].detach()
        below = x.amax(dim, keepdim=True) - x
        y = torch.softmax(x, dim) * (1 + below)
        if grad is None:
            return (1 + below if log else y,)
        g = grad.abs()
        return (g + y * g.sum(dim, keepdim=True) if log else y * (g + (g * y).sum(dim, keepdim=True)),)

    return scale


def attention_scale(is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, slopes: Tensor | None = None,
                    **options: Any) -> Scale:
    """For scaled_dot_product_attention of (query, key, value[, attn_mask]); ``options``: more of the plain maths' Options.

    A weight is an exponential, which magnifies what its argument has lost: the sum of its products' magnitudes. A weight below
    float32's smallest normal number, beside others that sum up to 1, may be 0.
    """
    from .kernels.reference import attention as plain

    def magnitudes(inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
        query, key, value, *rest = (t.detach() if isinstance(t, Tensor) else t for t in inputs)
        mask = rest[0] if rest and isinstance(rest[0], Tensor) else None
        heads = query.shape[-3] if query.dim() > 2 else 1
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        k, v = plain._grouped(key, heads), plain._grouped(value, heads)

        def weighed(first: int, last: int) -> Tensor:
            """The weights of some queries, each with what its argument may have lost"""
            q = query[..., first:last, :]
            m = mask if mask is None or mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., first:last, :]
            o = plain.Options(**{"scale": factor, "right": first if is_causal else -1} | options)
            found = plain._scores(q, key, m, slopes, None, None, o)
            weights = found.weights if found.kept is None else found.weights * (1 / (1 - o.dropout))
            lost = 1 + q.abs() @ k.abs().mT * abs(factor)
            if m is not None and m.dtype != torch.bool:
                lost = lost + m.abs().nan_to_num(0, 0, 0)
            return weights * lost + torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps

        if grad is None:  # where nothing else depends on a query's place, never all scores of a long sequence
            n = max(query.shape[-2], 1)
            step = n if options or slopes is not None else 512
            return (torch.cat([weighed(i, i + step) @ v.abs() for i in range(0, n, step)], -2),)
        weights = weighed(0, query.shape[-2])
        g = grad.abs() @ v.abs().mT
        g = weights * (g + (g * weights).sum(-1, keepdim=True))
        every = [
            (g @ k.abs() * abs(factor)).sum_to_size(query.shape),
            plain._ungrouped(g.mT @ query.abs() * abs(factor), key.shape),
            plain._ungrouped(weights.mT @ grad.abs(), value.shape),
        ]
        if mask is not None and mask.dtype != torch.bool:
            every.append(g.sum_to_size(mask.shape))
        return tuple(s for s, t in zip(every, inputs) if t.requires_grad)

    return magnitudes
