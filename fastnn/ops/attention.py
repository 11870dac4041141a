"""Scaled dot-product attention, with and without its log-sum-exp, and its backward.

Batch dimensions broadcast. Keys and values may have fewer heads (dimension -3) than queries, each shared by as many heads
of the queries in a row. Each row's log-sum-exp is kept for the backward, in two parts, and no array of all scores.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.kernels.reference import attention as reference
from fastnn.kernels.reference.attention import Options

from ._operator import FLOATING, Operator, asks_directly, empty_matrix
from .activation import only_torch

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? slopes, Tensor? offsets_q, Tensor? offsets_k"
_OPTIONS = (
    "float dropout_p, int seed, float scale, int left, int right, bool bottom_right, int prefix, float softcap"
)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    offsets_q: Tensor | None,
    offsets_k: Tensor | None,
    *options: Any,
) -> str | None:
    a, b, dtype = query.shape, key.shape, query.dtype
    if (  # the usual call, where there is nothing more to say
        mask is slopes is offsets_q is offsets_k is None
        and dtype is key.dtype is value.dtype
        and dtype in FLOATING
        and len(a) == 4
        and a[:2] == b[:2]
        and b[:3] == value.shape[:3]
        and a[3] == b[3] != 0
        and options == (0.0, options[1], options[2], -1, options[4], False, 0, 0.0)
        and options[4] in (-1, 0)
    ):
        return None
    name, o = "scaled_dot_product_attention", Options(*options)
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if min(map(len, shapes)) < 2:
        raise RuntimeError(f"{name}(): Expected query, key, and value to all be at least 2 dimensional, got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            f"{name}(): Expected query, key, and value to have the same dtype, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(f"{name}(): query and key must have heads of one size, got {shapes[0]} and {shapes[1]}")
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(f"{name}(): key and value must have one length, got {shapes[1]} and {shapes[2]}")
    if not 0 <= o.dropout < 1:
        raise RuntimeError(f"{name}(): dropout probability has to be in [0, 1), got {o.dropout}")
    for word, number in (("left", o.left), ("right", o.right)):
        if number < -1:
            raise ValueError(f"{name}(): window's {word} side must be -1 (all keys) or more, got {number}")
    if o.prefix < 0 or not o.softcap >= 0:
        raise ValueError(f"{name}(): global_prefix and softcap must not be negative, got {o.prefix} and {o.softcap}")
    _check_batch(name, query, key, value)
    scores = (*query.shape[:-1], key.shape[-2])
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise RuntimeError(
                f"{name}(): Expected attn_mask dtype to be bool or float or to match query dtype, got {mask.dtype} and "
                f"{query.dtype}"
            )
        if mask.dim() > len(scores) or any(m not in (1, s) for m, s in zip(mask.shape[::-1], scores[::-1])):
            raise RuntimeError(f"{name}(): attn_mask must broadcast to {scores}, got {tuple(mask.shape)}")
    if slopes is not None and any(m not in (1, s) for m, s in zip(slopes.shape[::-1], query.shape[-3::-1])):
        raise RuntimeError(
            f"{name}(): alibi_slopes must broadcast to {tuple(query.shape[:-2])}, got {tuple(slopes.shape)}"
        )
    if slopes is not None and not slopes.is_floating_point():
        raise RuntimeError(f"{name}(): alibi_slopes must be of a floating dtype, got {slopes.dtype}")
    _check_offsets(name, query, key, offsets_q, offsets_k)
    if query.shape[-1] == 0:
        return "heads of size 0 have no fastnn kernel"
    return only_torch(query.dtype)


def _check_batch(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Batch dimensions are the query's own (the functional expands it); heads of keys divide those of queries."""
    batch, heads = query.shape[:-3], query.shape[-3] if query.dim() > 2 else 1
    for word, t in (("key", key), ("value", value)):
        own = t.shape[-3] if t.dim() > 2 else 1
        if t.dim() > query.dim() or (heads % own if own else heads):
            raise RuntimeError(
                f"{name}(): Number of heads in key and value must divide the number of heads in query: query "
                f"{tuple(query.shape)}, {word} {tuple(t.shape)}"
            )
        if any(m not in (1, s) for m, s in zip(t.shape[-4::-1], batch[::-1])):
            raise RuntimeError(
                f"{name}(): the batch dimensions of {word} {tuple(t.shape)} do not broadcast to query's {tuple(batch)}"
            )
    if (key.shape[-3] if key.dim() > 2 else 1) != (value.shape[-3] if value.dim() > 2 else 1):
        raise RuntimeError(
            f"{name}(): key and value must have as many heads as each other, got {tuple(key.shape)} and "
            f"{tuple(value.shape)}"
        )


def _check_offsets(
    name: str, query: Tensor, key: Tensor, offsets_q: Tensor | None, offsets_k: Tensor | None
) -> None:
    if offsets_q is None and offsets_k is None:
        return
    if offsets_q is None or offsets_k is None or offsets_q.shape != offsets_k.shape or offsets_q.dim() != 1:
        raise RuntimeError(
            f"{name}(): cu_seqlens_q and cu_seqlens_k must be vectors of one length, got "
            f"{[None if t is None else tuple(t.shape) for t in (offsets_q, offsets_k)]}"
        )
    if offsets_q.dtype not in (torch.int32, torch.int64) or offsets_k.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(
            f"{name}(): cu_seqlens_q and cu_seqlens_k must be int32 or int64, got {offsets_q.dtype} and "
            f"{offsets_k.dtype}"
        )
    if query.shape[:-3].numel() != 1 or key.shape[:-3].numel() != 1 or len(offsets_q) == 0:
        raise RuntimeError(
            f"{name}(): with cu_seqlens query and key must be (heads, all positions, size), got {tuple(query.shape)} "
            f"and {tuple(key.shape)}"
        )


def _inspect(query: Tensor, key: Tensor, value: Tensor, mask: Any, slopes: Any, *rest: Any) -> None:
    """Offsets have to rise from 0 to the length. To look at those on a GPU would be to wait for it: its kernels mend them."""
    for word, offsets, length in (("q", rest[0], query.shape[-2]), ("k", rest[1], key.shape[-2])):
        if offsets is not None and not offsets.is_cuda:
            values = offsets.tolist()
            if values[0] != 0 or values[-1] != length or values != sorted(values):
                raise RuntimeError(
                    f"scaled_dot_product_attention(): cu_seqlens_{word} must rise from 0 to {length}, got {values}"
                )


@lru_cache(1024)
def _strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Of a new tensor: positions before heads in memory where these have them so, as a model will want them so again."""
    if len(strides) > 3 and strides[-3] < strides[-2] and shape[-3] > 1:
        *batch, heads, length, size = shape
        return torch.empty(*batch, length, heads, size, device="meta").transpose(-3, -2).stride()
    return torch.empty(shape, device="meta").stride()


def like(query: Tensor, *shape: int) -> Tensor:
    """A new tensor, with dimensions in memory in the query's order."""
    if asks_directly(query) and len(shape) == query.dim():
        return empty_matrix(shape, _strides(shape, query.stride()), query.dtype)
    if len(shape) > 3 and query.dim() == len(shape) and query.stride(-3) < query.stride(-2) and query.shape[-3] > 1:
        return query.new_empty(*shape[:-3], shape[-2], shape[-3], shape[-1]).transpose(-3, -2)
    return query.new_empty(shape)


def _outputs(plan: None, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The values, and each row's log-sum-exp in two parts, in float32 at least"""
    shape, size = query.shape, value.shape[-1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if asks_directly(query):
        out, rows = (*shape[:-1], size), (2, *shape[:-1])
        return (
            empty_matrix(out, _strides(out, query.stride()), query.dtype),
            empty_matrix(rows, _strides(rows, ()), wide),
        )
    return like(query, *shape[:-1], size), query.new_empty((2, *shape[:-1]), dtype=wide)


def _widened(function: Callable[..., tuple[Tensor, ...]], *places: int | None) -> Callable[..., tuple[Tensor, ...]]:
    """The plain maths, in float32 for 16-bit tensors; each result in the dtype of the argument at that place, or as it is."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        wide = [
            a.float() if isinstance(a, Tensor) and a.is_floating_point() and a.itemsize == 2 else a for a in args
        ]
        results = function(*wide)
        return tuple(r if like is None else r.to(args[like].dtype) for r, like in zip(results, places, strict=True))

    return run


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether torch's own function computes this."""
    o = Options(*args[7:])
    causal = o.right == 0 and args[3] is None
    return args[4:7] == (None, None, None) and o == Options(seed=o.seed, scale=o.scale, right=0 if causal else -1)


_reference = _widened(reference.attention, 0, None)
_reference_lse = _widened(reference.attention_lse, 0, None, None)


def _attention_by_torch(*args: Any) -> Tensor:
    if not _is_plain(args):
        return _reference(*args)[0]
    query, key, value, mask = args[:4]
    grouped = query.dim() > 2 and key.dim() > 2 and key.shape[-3] != query.shape[-3]
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=args[11] == 0, scale=args[9], enable_gqa=grouped
    )


def _save(ctx: Any, args: Any, out: tuple[Tensor, ...]) -> None:
    ctx.options = args[7:]
    ctx.save_for_backward(*args[:7], out[0], out[-1])


def _gradients(ctx: Any, grad: Tensor, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    *grads, grad_mask = attention_backward.call(
        grad, *ctx.saved_tensors, grad_lse, needs[3], *ctx.options, ctx.backend
    )
    grads = [g if needed else None for g, needed in zip((*grads, grad_mask), needs)]
    return (*grads, *[None] * 11)


attention: Operator = Operator(
    f"attention({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    "attention",
    check=_check,
    inspect=_inspect,
    allocate=_outputs,
    torch=_attention_by_torch,
    extra=lambda *args: _reference(*args)[1],
    save=_save,
    backward=_gradients,
    autocast="lower",
)

attention_lse: Operator = Operator(
    f"attention_lse({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    "attention",
    check=_check,
    inspect=_inspect,
    allocate=lambda *args: ((found := _outputs(*args))[0], torch.empty_like(found[1][0]), found[1]),
    torch=lambda *args: _reference_lse(*args)[:2],
    extra=lambda *args: _reference_lse(*args)[2],
    save=_save,
    backward=_gradients,
    autocast="lower",
    visible=2,
)


def _check_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Any, slopes: Any, offsets_q: Any, offsets_k: Any,
    out: Tensor, stats: Tensor, grad_lse: Tensor | None, needs_mask: bool, *options: Any
) -> str | None:
    reason = _check(query, key, value, mask, slopes, offsets_q, offsets_k, *options)
    shape = (*query.shape[:-1], value.shape[-1])
    if tuple(grad.shape) != shape or grad.dtype != query.dtype:
        raise RuntimeError(
            f"attention_backward(): grad must have shape {shape} and dtype {query.dtype}, got {tuple(grad.shape)} and "
            f"{grad.dtype}"
        )
    return reason


def _backward_by_reference(*args: Any) -> tuple[Tensor, ...]:
    return _widened(reference.attention_backward, 1, 2, 3, 4 if args[11] else 1)(*args)


attention_backward: Operator = Operator(
    f"attention_backward(Tensor grad, {_TENSORS}, Tensor output, Tensor stats, Tensor? grad_lse, bool needs_mask,"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "attention",
    check=_check_backward,
    inspect=lambda grad, *args: _inspect(*args[:7]),
    allocate=lambda plan, grad, query, key, value, mask, slopes, oq, ok, out, stats, grad_lse, needs_mask, *_: (
        like(query, *query.shape),
        like(key, *key.shape),
        like(value, *value.shape),
        mask.new_empty(mask.shape) if needs_mask else query.new_empty(0),
    ),
    torch=_backward_by_reference,
)
