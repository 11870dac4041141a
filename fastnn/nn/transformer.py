"""Multi-head attention, the layers of transformers, and gated feed-forward layers.

In torch's layers a residual is added where the next normalisation, or the product before it, reads its input anyway. A part that
was changed (another class, hooks, a forward of its own) is called as the module that it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

from .. import functional as F
from ..functional._multihead import attend
from ._epilogue import may_add
from .activation import GELU, Dropout, ReLU, SiLU
from .matmul import Linear
from .norm import LayerNorm

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NAMES: dict[Any, str] = {
    torch_functional.relu: "relu", torch.relu: "relu", F.relu: "relu", torch_functional.gelu: "gelu", F.gelu: "gelu",
    torch_functional.silu: "silu", F.silu: "silu",
}  # fmt: skip


def _plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the module is exactly of these classes, and nothing else happens when it is called."""
    return type(module) in kinds and "forward" not in module.__dict__ and not any(getattr(module, name) for name in _HOOKS)


def _fused_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name by which linear() knows an activation; None: it is called on its own."""
    if not isinstance(activation, nn.Module):
        return _NAMES.get(activation)
    if _plain(activation, nn.GELU, GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return "relu" if _plain(activation, nn.ReLU, ReLU) else "silu" if _plain(activation, nn.SiLU, SiLU) else None


def _linear(layer: Any, part: Any, x: Tensor, activation: Any = None, residual: Tensor | None = None) -> Tensor:
    """activation(part(x)), or part(x) + residual"""
    name = _fused_name(activation) if activation is not None else None
    if _plain(part, nn.Linear, Linear):
        inside = may_add(residual, x, part.weight, (*x.shape[:-1], part.out_features))
        more: dict[str, Any] = {"activation": name, "residual": residual if inside else None}
        x = F.linear(x, part.weight, part.bias, **more, backend=layer.backend)
        if residual is not None and not inside:
            x = x + residual
        return x if name is not None or activation is None else activation(x)
    x = part(x)
    x = x if residual is None else x + residual
    return x if activation is None else activation(x)


def _norm(layer: Any, part: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """part(x + residual), and the sum"""
    if _plain(part, nn.LayerNorm, LayerNorm) and x.dtype == residual.dtype:
        found: tuple[Tensor, Tensor] = F.layer_norm(
            x, part.normalized_shape, part.weight, part.bias, part.eps, residual=residual, return_sum=True, backend=layer.backend
        )
        return found
    total = x + residual
    return part(total), total


def _switch_children(module: nn.Module) -> None:
    """torch's constructors make torch's modules."""
    from . import REPLACEMENTS

    for child in module.modules():
        if type(child) in REPLACEMENTS:
            child.__class__ = REPLACEMENTS[type(child)]


@contextmanager
def _with_numbers(size: int, heads: int) -> Iterator[None]:
    """What torch's constructors raise for heads that do not divide, and the numbers."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{error}, got {size} and {heads}") from None


class MultiheadAttention(nn.MultiheadAttention):
    backend: str | None = None

    def __init__(self, embed_dim: int, num_heads: int, *args: Any, **kwargs: Any) -> None:
        with _with_numbers(embed_dim, num_heads):
            super().__init__(embed_dim, num_heads, *args, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        packed = (self.in_proj_weight,)
        weights = packed if self._qkv_same_embed_dim else (None, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return attend(
            query, key, value, self.num_heads, weights, self.in_proj_bias, (self.bias_k, self.bias_v), self.add_zero_attn,
            self.dropout if self.training else 0.0, self.out_proj.weight, self.out_proj.bias, key_padding_mask, need_weights,
            attn_mask, average_attn_weights, is_causal, self.batch_first, self.backend,
        )  # fmt: skip


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    backend: str | None = None

    def __init__(self, d_model: int, nhead: int, *args: Any, **kwargs: Any) -> None:
        with _with_numbers(d_model, nhead):
            super().__init__(d_model, nhead, *args, **kwargs)
        _switch_children(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        h = self.norm1(src) if self.norm_first else src
        h = self._sa_block(h, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            return _feed_forward(self, *_norm(self, self.norm2, h, src), self.dropout2)
        x = _norm(self, self.norm1, h, src)[0]
        return _norm(self, self.norm2, _feed_forward(self, x, None, self.dropout2), x)[0]


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    backend: str | None = None

    def __init__(self, d_model: int, nhead: int, *args: Any, **kwargs: Any) -> None:
        with _with_numbers(d_model, nhead):
            super().__init__(d_model, nhead, *args, **kwargs)
        _switch_children(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        from_memory = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        h = self.norm1(tgt) if self.norm_first else tgt
        h = self._sa_block(h, tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        if self.norm_first:
            h, x = _norm(self, self.norm2, h, tgt)
            return _feed_forward(self, *_norm(self, self.norm3, self._mha_block(h, *from_memory), x), self.dropout3)
        x = _norm(self, self.norm1, h, tgt)[0]
        x = _norm(self, self.norm2, self._mha_block(x, *from_memory), x)[0]
        return _norm(self, self.norm3, _feed_forward(self, x, None, self.dropout3), x)[0]


def _feed_forward(layer: Any, x: Tensor, residual: Tensor | None, dropout: nn.Module) -> Tensor:
    """dropout(linear2(dropout(activation(linear1(x))))) + residual"""
    h = layer.dropout(_linear(layer, layer.linear1, x, layer.activation))
    if residual is None:
        return dropout(_linear(layer, layer.linear2, h))
    if _plain(dropout, nn.Dropout, Dropout) and not (dropout.training and dropout.p):
        return _linear(layer, layer.linear2, h, residual=residual)
    return residual + dropout(_linear(layer, layer.linear2, h))


class TransformerEncoder(nn.TransformerEncoder):
    """Nothing becomes a nested tensor: unlike torch's fast path, positions that are padding get values of their own, not 0."""

    backend: str | None = None

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        causal = _is_causal(mask) if is_causal is None else is_causal
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(nn.TransformerDecoder):
    backend: str | None = None


class Transformer(nn.Transformer):
    backend: str | None = None

    def __init__(self, d_model: int = 512, nhead: int = 8, *args: Any, **kwargs: Any) -> None:
        with _with_numbers(d_model, nhead):
            super().__init__(d_model, nhead, *args, **kwargs)
        _switch_children(self)


def _is_causal(mask: Tensor | None) -> bool:
    """Whether a mask hides just the keys after a query."""
    if mask is None or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    hidden = mask if mask.dtype == torch.bool else mask == float("-inf")
    causal = torch.ones_like(hidden).triu_(1)
    return bool((hidden == causal).all()) and (mask.dtype == torch.bool or not bool(mask.masked_select(~causal).any()))


class _Gated(nn.Module):
    """activation(x W + b) · (x V + c), times a third matrix: Shazeer 2020 (arXiv:2002.05202), equation 6.

    forward(input (…, d_model)) → (…, d_model). W and V are one parameter of 2 · dim_feedforward rows.
    """

    backend: str | None = None
    activation: str

    def __init__(self, d_model: int, dim_feedforward: int, bias: bool = False, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.linear1 = Linear(d_model, 2 * dim_feedforward, bias, device, dtype)
        self.linear2 = Linear(dim_feedforward, d_model, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        gate, value = self.linear1(input).chunk(2, -1)
        return self.linear2(getattr(F, self.activation)(gate, backend=self.backend) * value)


class SwiGLU(_Gated):
    __doc__ = _Gated.__doc__
    activation = "silu"


class GeGLU(_Gated):
    __doc__ = _Gated.__doc__
    activation = "gelu"
