"""Attention by torch, until fastnn.functional has its own: the one import that changes then."""

import torch.nn.functional as F
from torch import Tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)
