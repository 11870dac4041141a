"""Scaled dot-product attention in plain maths: softmax(query keyᵀ · scale + bias) value, whole matrices at once.

Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1; the bias of positions: Press et al. 2022 (ALiBi); the
backward: Dao 2023, "FlashAttention-2", section 3.2, without its blocks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .activation import random_bits


class Options(NamedTuple):
    """What an attention is told beside its tensors.

    A query at position i stands at i + shift among the keys, shift = 0, or with ``bottom_right`` the number of keys
    minus that of queries. It sees the keys from ``left`` before to ``right`` behind that place (-1: all), and the first
    ``prefix`` ones; all keys if it stands among those itself, unless ``right`` is 0: what is causal stays so. softcap 0: none.
    """

    dropout: float = 0.0
    seed: int = 0
    scale: float = 1.0
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    prefix: int = 0
    softcap: float = 0.0


def _places(n: int, offsets: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For n positions: which sequence each belongs to, its place in that, and that one's length."""
    i = torch.arange(n, device=device)
    if offsets is None:
        return torch.zeros_like(i), i, torch.full_like(i, n)
    offsets = offsets.long()
    which = torch.searchsorted(offsets, i, right=True) - 1
    return which, i - offsets[which], (offsets[1:] - offsets[:-1])[which]


def distances(lq: int, lk: int, offsets_q: Tensor | None, offsets_k: Tensor | None, o: Options,
              device: torch.device) -> tuple[Tensor, Tensor]:
    """(lq, lk): how far behind the query's place each key lies, and whether it may be seen."""
    sq, i, nq = (t.unsqueeze(1) for t in _places(lq, offsets_q, device))
    sk, j, nk = _places(lk, offsets_k, device)
    if offsets_q is None:
        nk = torch.full_like(nk, lk)
    d = j - i - ((nk - nq) if o.bottom_right else 0)
    seen = torch.ones_like(d, dtype=torch.bool)
    if o.left >= 0:
        seen &= d >= -o.left
    if o.right >= 0:
        seen &= d <= o.right
    seen |= j < o.prefix
    if o.right > 0:
        seen |= (j - d >= 0) & (j - d < o.prefix)
    return d, seen & (sq == sk)


def _grouped(t: Tensor, heads: int) -> Tensor:
    """Keys or values with each head repeated for the queries' heads that share it."""
    return t if t.dim() < 3 or t.shape[-3] in (1, heads) else t.repeat_interleave(heads // t.shape[-3], -3)


def _ungrouped(t: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of what ``_grouped`` or broadcasting repeated."""
    if len(shape) > 2 and shape[-3] not in (1, t.shape[-3]):
        t = t.unflatten(-3, (shape[-3], -1)).sum(-3)
    return t.sum_to_size(shape)


class _Scores(NamedTuple):
    weights: Tensor  # softmax, 0 in a row that sees nothing
    kept: Tensor | None  # dropout's factors
    slope: Tensor | None  # of softcap
    top: Tensor  # each row's largest logit
    total: Tensor  # Σ exp(logit - top)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, slopes: Tensor | None, offsets_q: Tensor | None,
            offsets_k: Tensor | None, o: Options) -> _Scores:
    heads = query.shape[-3] if query.dim() > 2 else 1
    s = query @ _grouped(key, heads).mT * o.scale
    slope = None
    if o.softcap:
        t = torch.tanh(s / o.softcap)
        s, slope = t * o.softcap, 1 - t * t
    d, seen = distances(query.shape[-2], key.shape[-2], offsets_q, offsets_k, o, query.device)
    if slopes is not None:
        s = s - slopes.to(s.dtype)[..., None, None] * d.abs()
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    s = s.masked_fill(~seen, -math.inf)
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -math.inf)
    e = torch.exp(s - top.masked_fill(top == -math.inf, 0.0))
    total = e.sum(-1, keepdim=True)
    weights = torch.where(total == 0, 0.0, e / torch.where(total == 0, 1.0, total))
    kept = None
    if o.dropout:
        bits = random_bits(s.numel(), o.seed, s.device).reshape(s.shape)
        kept = (bits >= round(o.dropout * 2**32)).to(s.dtype) / (1 - o.dropout)
    return _Scores(weights, kept, slope, top.squeeze(-1), total.squeeze(-1))


def attention_lse(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, slopes: Tensor | None = None,
                  offsets_q: Tensor | None = None, offsets_k: Tensor | None = None,
                  *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(out, log Σ exp(logits) of each row, and that in two parts: the largest in units of log 2, and Σ exp(logit - largest))."""
    heads = query.shape[-3] if query.dim() > 2 else 1
    s = _scores(query, key, mask, slopes, offsets_q, offsets_k, Options(*options))
    weights = s.weights if s.kept is None else s.weights * s.kept
    lse = torch.where(s.total == 0, -math.inf, s.top + torch.log(torch.where(s.total == 0, 1.0, s.total)))
    stats = torch.stack([s.top / math.log(2), s.total]).detach()
    return weights @ _grouped(value, heads), lse, stats


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, slopes: Tensor | None = None,
              offsets_q: Tensor | None = None, offsets_k: Tensor | None = None, *options: Any) -> tuple[Tensor, Tensor]:
    out, _, stats = attention_lse(query, key, value, mask, slopes, offsets_q, offsets_k, *options)
    return out, stats


def attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None,
                       offsets_q: Tensor | None, offsets_k: Tensor | None, out: Tensor | None, stats: Tensor | None,
                       grad_lse: Tensor | None, needs_mask: bool, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and, if needed, of an additive mask (else an empty tensor)."""
    o = Options(*options)
    heads = query.shape[-3] if query.dim() > 2 else 1
    s = _scores(query, key, mask, slopes, offsets_q, offsets_k, o)
    dropped = s.weights if s.kept is None else s.weights * s.kept
    g = grad @ _grouped(value, heads).mT
    if s.kept is not None:
        g = g * s.kept
    g = s.weights * (g - (g * s.weights).sum(-1, keepdim=True) + (0 if grad_lse is None else grad_lse.unsqueeze(-1)))
    # What is seen by nothing has no gradient, even where a gradient or a value is NaN or Inf.
    g = torch.where(s.weights == 0, 0.0, g)
    grad_mask = g.sum_to_size(mask.shape) if needs_mask and mask is not None else g.new_empty(0)
    if s.slope is not None:
        g = g * s.slope
    grad_query = g @ _grouped(key, heads) * o.scale
    return (grad_query.sum_to_size(query.shape), _ungrouped(g.mT @ query * o.scale, key.shape),
            _ungrouped(dropped.mT @ grad, value.shape), grad_mask)
