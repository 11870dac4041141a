"""Multi-head attention: projections, heads and masks around scaled_dot_product_attention (Vaswani et al. 2017, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ._activation import dropout
from ._attention import scaled_dot_product_attention
from ._matmul import linear, matmul
from ._softmax import softmax


def _check_mask(name: str, mask: Tensor | None, shapes: list[tuple[int, ...]]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"multi_head_attention_forward(): {name} must be Tensor, not {type(mask).__name__}")
    if tuple(mask.shape) not in shapes:
        allowed = " or ".join(map(str, shapes))
        same_kind = len(shapes) > 1 and mask.dim() in (2, 3)  # torch's error for these, and for all others
        raise (RuntimeError if same_kind else AssertionError)(
            f"multi_head_attention_forward(): {name} must have shape {allowed}, got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(
            f"multi_head_attention_forward(): only bool and floating types of {name} are supported, got {mask.dtype}"
        )


def _merged(one: Tensor | None, other: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one: of booleans (True: not attended to) if both are, else added to the scores."""
    if one is None or other is None:
        return one if other is None else other
    if one.dtype == other.dtype == torch.bool:
        return one | other
    return _additive(one, dtype) + _additive(other, dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _projections(
    query: Tensor, key: Tensor, value: Tensor, weights: tuple[Tensor | None, ...], bias: Tensor | None, backend: str | None
) -> tuple[Tensor, ...]:
    """query, key and value times their weights: one product for those that are the same tensor"""
    packed, *separate = weights
    biases = bias.chunk(3) if bias is not None else (None, None, None)
    if packed is None:
        pairs = zip((query, key, value), separate, biases, strict=True)
        return tuple(linear(t, w, b, backend=backend) for t, w, b in pairs if w is not None)
    size = packed.shape[0] // 3
    if key is value:
        if query is key:
            return linear(query, packed, bias, backend=backend).chunk(3, -1)
        both = linear(key, packed[size:], None if bias is None else bias[size:], backend=backend)
        return linear(query, packed[:size], biases[0], backend=backend), *both.chunk(2, -1)
    return tuple(
        linear(t, w, b, backend=backend) for t, w, b in zip((query, key, value), packed.chunk(3), biases, strict=True)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    weights: tuple[Tensor | None, ...],
    bias: Tensor | None,
    extra: tuple[Tensor | None, Tensor | None],
    zero: bool,
    dropout_p: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average: bool,
    is_causal: bool,
    batch_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """(B, L, E) if ``batch_first``, else (L, B, E). weights: packed, or None and those of query, key and value; extra: bias_k and
    bias_v; zero: add_zero_attn."""
    op = "multi_head_attention_forward"
    if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
        raise AssertionError(
            f"{op}(): query, key and value must all be 2-D (unbatched) or all 3-D, got {query.dim()}-D, {key.dim()}-D and "
            f"{value.dim()}-D"
        )
    alone = query.dim() == 2
    if alone:
        alike = key is query, value is key
        where = 0 if batch_first else 1
        query = query.unsqueeze(where)
        key = query if alike[0] else key.unsqueeze(where)
        value = key if alike[1] else value.unsqueeze(where)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    (batch, length), (sources, keys) = (t.shape[:2] if batch_first else (t.shape[1], t.shape[0]) for t in (query, key))
    size = out_weight.shape[1]
    if query.shape[2] != size:
        raise AssertionError(f"{op}(): query must have {size} features, got shape {tuple(query.shape)}")
    if key.shape[:2] != value.shape[:2] or (weights[0] is not None and key.shape != value.shape) or sources != batch:
        raise (AssertionError if sources == batch else RuntimeError)(
            f"{op}(): key and value must have as many positions, and query's batch size {batch}, got shapes "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    each = size // heads
    if each * heads != size:
        raise AssertionError(f"{op}(): embed_dim {size} is not divisible by num_heads {heads}")
    if is_causal and attn_mask is None:
        raise RuntimeError(f"{op}(): Need attn_mask if specifying the is_causal hint")
    _check_mask("attn_mask", attn_mask, [(length, keys), (batch * heads, length, keys)])
    _check_mask("key_padding_mask", key_padding_mask, [(batch, keys)])

    pads = None if key_padding_mask is None else key_padding_mask.view(batch, 1, 1, keys)
    learned = pads is not None and attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
    if is_causal and not (learned or need_weights or extra[0] is not None or zero):
        mask = pads
    else:
        is_causal = False
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(batch, heads, length, keys)
        mask = _merged(attn_mask, pads, query.dtype)

    q, k, v = _projections(query, key, value, weights, bias, backend)
    along = 1 if batch_first else 0
    for one, added in enumerate((extra, (zero, zero))):
        if added[0] is not None and added[0] is not False:
            shape = (batch, 1, size) if batch_first else (1, batch, size)
            tails = (k.new_zeros(shape),) * 2 if one else tuple(t.expand(shape) for t in extra if t is not None)
            k, v = torch.cat([k, tails[0]], along), torch.cat([v, tails[1]], along)
            mask = None if mask is None else F.pad(mask, (0, 1))
    order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
    q, k, v = (t.unflatten(-1, (heads, each)).permute(order) for t in (q, k, v))

    attention = None
    if need_weights:
        scores = matmul(q * each**-0.5, k.mT, backend=backend)
        blind = None  # rows that see nothing: 0, as where the weights are not asked for
        if mask is not None:
            blind = (mask if mask.dtype == torch.bool else mask == float("-inf")).all(-1, keepdim=True)
            mask = mask.masked_fill(blind, 0)
            scores = scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
        attention = softmax(scores, -1, backend=backend)
        attention = attention if blind is None else attention.masked_fill(blind, 0)
        if dropout_p > 0:
            attention = dropout(attention, dropout_p, True, backend=backend)
        out = matmul(attention, v, backend=backend)
        attention = attention.mean(1) if average else attention
    else:
        keep = mask.logical_not() if mask is not None and mask.dtype == torch.bool else mask  # True: attended to
        window = (None, 0) if is_causal else None  # which may stand beside a mask
        out = scaled_dot_product_attention(q, k, v, keep, dropout_p, window=window, backend=backend)
    out = linear(out.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2), out_weight, out_bias, backend=backend)
    if alone:
        out = out.squeeze(0 if batch_first else 1)
        attention = None if attention is None else attention.squeeze(0)
    return out, attention


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2) as torch.nn.MultiheadAttention computes it.

    query (L, B, E), key (S, B, kdim), value (S, B, vdim), or without B → output (L, B, E), and, with need_weights, the weights
    (B, L, S), or (B, H, L, S) if they are not averaged. Masks are boolean (True: not attended to) or added to the scores:
    attn_mask (L, S) or (B·H, L, S), key_padding_mask (B, S). static_k and static_v are torch's.

    RuntimeError for masks, AssertionError for queries, keys and values whose shapes do not match.
    """
    if static_k is not None or static_v is not None:
        backends.torch_serves("multi_head_attention_forward", (query, key, value), backend, "static keys and values are torch's")
        return F.multi_head_attention_forward(
            query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
            dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights, attn_mask,
            use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights,
            is_causal,
        )  # fmt: skip
    if query.shape[-1] != embed_dim_to_check:
        raise AssertionError(
            f"multi_head_attention_forward(): was expecting embedding dimension of {embed_dim_to_check}, but got "
            f"{query.shape[-1]}"
        )
    separate = (None, q_proj_weight, k_proj_weight, v_proj_weight)
    return attend(
        query, key, value, num_heads, separate if use_separate_proj_weight else (in_proj_weight,), in_proj_bias,
        (bias_k, bias_v), add_zero_attn, dropout_p if training else 0.0, out_proj_weight, out_proj_bias, key_padding_mask,
        need_weights, attn_mask, average_attn_weights, is_causal, False, backend,
    )  # fmt: skip
