"""Attention."""

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ops import attention as _attention
from ._arguments import is_traced


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    align: str = "top-left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    global_prefix: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    seed: int | None = None,
    backend: str | None = None,
) -> Any:
    """softmax(query keyᵀ · scale + attn_mask) value, never holding all scores. Vaswani et al. 2017, section 3.2.1.

    query (…, Lq, D), key (…, Lk, D), value (…, Lk, Dv) → (…, Lq, Dv); batch dimensions broadcast. attn_mask broadcasts to
    (…, Lq, Lk): bool (True: may be seen) or added to the scores, and then differentiable. scale: 1/√D unless given.
    enable_gqa: key and value may have fewer heads (dimension -3), each shared by equally many of the query's. A row that
    sees nothing is 0 and has a zero gradient.

    align: where the query at position i stands among the keys, for is_causal, window and alibi_slopes: "top-left": at i, as
    torch has it; "bottom-right": at i + Lk - Lq, as decoding wants it. window: (left, right), how many keys before and
    behind that place are seen (None or -1: all). global_prefix: so many positions at the beginning are global (Beltagy et al.
    2020, section 3.1): all queries see their keys, whatever is_causal and window say, and their queries see all keys, but none
    behind them where none are to be seen (is_causal, or a window that ends at 0). softcap c: scores become c·tanh(scores / c),
    before masks. alibi_slopes (heads) or (batch, heads): scores lose slope · distance (Press et al. 2022); they have no
    gradient. cu_seqlens_q, cu_seqlens_k: query (heads, total, D) holds sequences
    one after the other that do not see each other; number n is at [cu_seqlens[n], cu_seqlens[n + 1]). They rise from 0 to total:
    RuntimeError if not, but on a GPU, where a call does not wait for their values, they are made to.
    return_lse: also log Σ exp(scores) of each row, (…, Lq), in float32 at least. seed: of dropout; a weight is kept as a
    function of (seed, its index in (…, Lq, Lk)), and without a seed one is drawn from torch's default generator.

    Raises TypeError for what is no tensor or no pair; RuntimeError for shapes and dtypes that do not fit, dropout_p outside
    [0, 1), both attn_mask and is_causal, and slopes that require a gradient; ValueError for an unknown align or a negative
    window, softcap or global_prefix.
    """
    if align not in ("top-left", "bottom-right"):
        raise ValueError(
            f"scaled_dot_product_attention(): align got {align!r}, allowed are 'top-left' and 'bottom-right'"
        )
    if not (attn_mask is alibi_slopes is cu_seqlens_q is cu_seqlens_k is None):
        _need_tensors(attn_mask=attn_mask, alibi_slopes=alibi_slopes, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if attn_mask is not None and is_causal:
        raise RuntimeError(
            "scaled_dot_product_attention(): Explicit attn_mask should not be set when is_causal=True, got a mask of "
            f"shape {tuple(attn_mask.shape)}"
        )
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "scaled_dot_product_attention(): alibi_slopes have no gradient: detach() them, or pass what they add as attn_mask"
        )
    left, right = (-1, -1) if window is None else _sides(window)
    if is_causal:
        right = 0 if right < 0 else min(right, 0)
    if isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor):
        shape, keys, values = query.shape, key.shape, value.shape
        if shape[:-2] != keys[:-2] or keys[:-2] != values[:-2]:
            grouped = enable_gqa and keys[:-2] == values[:-2] and shape[:-3] == keys[:-3] and len(keys) > 2
            if not (grouped and keys[-3] and shape[-3] % keys[-3] == 0):
                query, key, value = _broadcast(query, key, value, enable_gqa)
        if scale is None:
            scale = shape[-1] ** -0.5 if shape and shape[-1] else 1.0
    else:
        _need_tensors(query=query, key=key, value=value)
    if dropout_p and seed is None:
        if is_traced():
            reason = "a traced call cannot draw a new seed each time"
            backends.torch_serves("attention", (query, key, value), backend, reason)
            return _traced_dropout(
                query, key, value, attn_mask, dropout_p, scale, enable_gqa, left, right, (
                    align != "top-left" or softcap or alibi_slopes is not None or global_prefix
                    or cu_seqlens_q is not None or return_lse
                ),
            )
        seed = int(torch.randint(2**63 - 1, ()))
    op = _attention.attention_lse if return_lse else _attention.attention
    return op.call(
        query, key, value, attn_mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, dropout_p, seed or 0, scale,
        left, right, align == "bottom-right", global_prefix, softcap, backend,
    )  # fmt: skip


def _need_tensors(**given: Any) -> None:
    for name, t in given.items():
        if t is not None and not isinstance(t, Tensor):
            kind = type(t).__name__
            raise TypeError(f"scaled_dot_product_attention(): argument '{name}' must be Tensor, not {kind}")


def _sides(window: Any) -> list[int]:
    if not (isinstance(window, (tuple, list)) and len(window) == 2 and all(n is None or isinstance(n, int) for n in window)):
        raise TypeError(f"scaled_dot_product_attention(): window must be two integers, each may be None, got {window!r}")
    return [-1 if side is None else side for side in window]


def _broadcast(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Batch dimensions that agree, but for the heads of key and value where they may be grouped."""
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return query, key, value  # the check says what is wrong with them
    dims = -3 if grouped and min(query.dim(), key.dim(), value.dim()) > 2 else -2
    try:
        batch = torch.broadcast_shapes(query.shape[:dims], key.shape[:dims], value.shape[:dims])
    except RuntimeError:
        raise RuntimeError(
            "scaled_dot_product_attention(): the batch dimensions of query, key and value must broadcast"
            f"{'' if grouped else ' (or divide, with enable_gqa)'}, got {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}"
        ) from None
    if dims == -3 and key.shape[-3] != value.shape[-3]:
        heads = query.shape[-3]
        if not (key.shape[-3] and value.shape[-3]) or heads % key.shape[-3] or heads % value.shape[-3]:
            return query, key, value
        key, value = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (key, value))
    return tuple(t.expand(*batch, *t.shape[dims:]) for t in (query, key, value))  # type: ignore[return-value]


def _traced_dropout(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, scale: float | None,
                    grouped: bool, left: int, right: int, extras: Any) -> Tensor:
    causal = (left, right) == (-1, 0)
    if extras or ((left, right) != (-1, -1) and not causal):
        raise RuntimeError(
            "scaled_dot_product_attention(): dropout in a traced call needs a seed beside fastnn's own keywords"
        )
    if causal and mask is not None:  # which torch does not take both
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
        causal = False
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, p, causal, scale=scale, enable_gqa=grouped
    )
