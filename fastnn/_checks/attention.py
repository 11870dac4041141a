"""Checks of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .._numerics import TORCH, attention_scale
from ..kernels.reference import attention as plain
from ..kv_cache import KVCache
from .data import Check, all_of, equal, images, normal, one_hot, special_rows, subnormal, tame_special_rows


def checks() -> Iterator[Check]:
    def attention(name: str, *makers: Callable[[torch.dtype], Any], lse: bool = False, **options: Any) -> Check:
        def theirs(F: Any, *inputs: Any) -> Tensor:
            return F.scaled_dot_product_attention(*inputs, **options)

        def ours(F: Any, *inputs: Any) -> Tensor:
            own = {"return_lse": True} if lse and F is not TORCH else {}
            out = F.scaled_dot_product_attention(*inputs, **options, **own)
            return out[0] if own else out

        names = ("query", "key", "value", "attn_mask")[: len(makers)]
        return Check("attention", f"attention, {name}", all_of(*makers), theirs, ours, names, attention_scale(**options))

    def three(*shape: int, scale: float = 1.0, long: int = 0, mean: float = 0.0) -> list[Callable[[torch.dtype], Tensor]]:
        keys = (*shape[:-2], long or shape[-2], shape[-1])
        return [normal(*shape, seed=1, scale=scale, mean=mean), normal(*keys, seed=2, scale=scale), normal(*keys, seed=3)]

    def hidden(dtype: torch.dtype) -> Tensor:
        """-Inf for a third of the keys, and for all keys of two rows"""
        mask = torch.randn(37, 61, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        mask = mask.masked_fill(mask > 0.4, -math.inf)
        mask[[3, 36]] = -math.inf
        return mask.to(dtype).requires_grad_()

    def more(name: str, options: dict[str, Any], slopes: Tensor | None = None, mask: Tensor | None = None, **own: Any) -> Check:
        """What torch has as a mask, or else beside the plain maths in torch's functions; ``options`` are the plain maths' own"""

        def theirs(F: Any, *inputs: Tensor) -> Tensor:
            o = plain.Options(scale=inputs[0].shape[-1] ** -0.5, **options)
            if slopes is None and o.softcap == o.dropout == 0:
                lengths = inputs[0].shape[-2], inputs[1].shape[-2]
                seen = plain.distances(*lengths, None, None, o, inputs[0].device)[1] if mask is None else mask
                alike: Tensor = F.scaled_dot_product_attention(*inputs, seen)
                return alike
            wide = [t.float() if t.itemsize == 2 else t for t in inputs]
            return plain.attention(*wide, mask, slopes, None, None, *o)[0].to(inputs[0].dtype)

        def ours(F: Any, *inputs: Tensor) -> Tensor:
            out: Tensor = F.scaled_dot_product_attention(*inputs, **own)
            return out

        scale = attention_scale(slopes=slopes, **options)
        counted = scale if mask is None else lambda inputs, grad: scale([*inputs, mask], grad)
        names = ("query", "key", "value")
        return Check("attention", f"attention, {name}", all_of(*three(1, 2, 83, 16, long=151)), theirs, ours, names, counted)

    yield attention("2×3×37×61×24", *three(2, 3, 37, 24, long=61))
    yield attention("causal", *three(1, 2, 131, 33), lse=True, is_causal=True)
    yield attention("grouped heads", *three(1, 4, 37, 16)[:1], *three(1, 2, 61, 16)[1:], enable_gqa=True)
    yield attention("one query", *three(1, 2, 1, 64, long=1031))
    yield attention("long rows", *three(1, 1, 5, 16, long=9001))
    yield attention("large logits", *three(1, 2, 37, 16, scale=12.0))
    yield attention("large means", *three(1, 2, 37, 16, mean=50.0))
    yield attention("boolean mask", *three(1, 2, 37, 16, long=61), lambda dtype: torch.isfinite(hidden(dtype)).detach())
    yield attention("-Inf in the mask", *three(1, 2, 37, 16, long=61), hidden)
    for name, shape in (("full", (2, 2, 37, 61)), ("of heads", (2, 37, 61)), ("of rows", (37, 1)), ("of keys", (2, 1, 1, 61))):
        yield attention(f"gradient of a bias, {name}", *three(2, 2, 37, 16, long=61), normal(*shape, seed=9))
    sharp = images(one_hot(37, 37, 60.0), 1, 1, 37, 37)  # each query meets a key alone
    yield attention("one-hot rows", sharp, sharp, normal(1, 1, 37, 37, seed=3))
    yield attention("cancellation", *three(1, 2, 37, 16)[:2], _cancelling_values)
    yield attention("all equal", *[equal(1, 2, 37, 16)] * 3)
    # AVX512-BF16 multiplies subnormal numbers as zeros, torch's kernel for products of that CPU too, but not its one for this.
    tiny = [subnormal(1, 2, 37, 16, seed=n) for n in range(3)]
    yield attention("subnormal", *tiny[:2], lambda dtype: (normal(1, 2, 37, 16) if _in_pairs(dtype) else tiny[2])(dtype))
    yield more("window", {"left": 11, "right": 5}, window=(11, 5))
    yield more("window, bottom right", {"left": 20, "right": 0, "bottom_right": True}, window=(20, 0), align="bottom-right")
    yield more("window, global prefix", {"left": 9, "right": 4, "prefix": 5}, window=(9, 4), global_prefix=5)
    yield more("softcap", {"softcap": 3.0}, softcap=3.0)
    slopes = torch.tensor([0.25, 0.0625])
    yield more("ALiBi", {"right": 0}, slopes, is_causal=True, alibi_slopes=slopes)
    yield more("dropout", {"dropout": 0.1, "seed": 7}, dropout_p=0.1, seed=7)
    ends = torch.tensor([0, 17, 17, 83]), torch.tensor([0, 30, 41, 151])
    which = [torch.searchsorted(end, torch.arange(int(end[-1])), right=True) for end in ends]
    together = which[0].unsqueeze(1) == which[1]
    yield more("variable lengths", {}, None, together, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])
    lists = [normal(2, heads, 83, 16, seed=n, grad=False) for n, heads in ((1, 4), (2, 2), (3, 2))]
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True}
    yield Check(
        "attention", "attention, prefill and decode", all_of(*lists),
        lambda F, *inputs: F.scaled_dot_product_attention(*inputs, **options), _decoded, scale=attention_scale(**options),
    )  # fmt: skip
    special = special_rows(24)
    yield attention(
        "special values", lambda dtype: special(dtype).detach()[None, None].requires_grad_(), *three(1, 1, 37, 24)[1:], lse=True,
    )  # fmt: skip
    each = images(tame_special_rows(37 * 24), 29, 1, 37, 24)  # one in each of a batch: every query meets it
    query, key, value = three(29, 1, 37, 24)
    yield attention("special values of keys", query, each, value)
    yield attention("special values of values", query, key, each)


def _in_pairs(dtype: torch.dtype) -> bool:
    """Whether the CPU's kernel multiplies pairs of bfloat16"""
    if dtype is not torch.bfloat16 or find_spec("llvmlite") is None:
        return False
    from ..kernels.cpu.engine.host import simd

    return simd().bf16_dot


def _decoded(F: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same causal attention in steps, over a cache"""
    cache = KVCache(2, 2, 83, 16, dtype=query.dtype)
    parts = []
    for q, k, v in zip(*(t.split([77, 1, 1, 4], 2) for t in (query, key, value)), strict=True):
        keys, values = cache.append(k, v)
        parts.append(F.scaled_dot_product_attention(q, keys, values, is_causal=True, align="bottom-right", enable_gqa=True))
    return torch.cat(parts, 2)


def _cancelling_values(dtype: torch.dtype) -> Tensor:
    """Large values of alternating signs, key by key: what is left is small beside the terms."""
    values = normal(1, 2, 37, 16, seed=3)(dtype).detach()
    values[..., ::2, :] += 1000
    values[..., 1::2, :] -= 1000
    return values.requires_grad_()
