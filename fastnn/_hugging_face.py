"""The attention of Hugging Face's transformers, which is a function and no module: switched by its own interface, where a model's
config names the function. That name is never saved with a config, so what a model writes loads anywhere; but another model made
from the same config in this process is switched too. What asks for "sdpa" by that name, as continuous batching does, needs
``restore`` first."""

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from . import functional

_OURS = "fastnn"  # and fastnn_cpu, …: with a backend that was named
# Code that asks whether the name is sdpa's, or has a registry of its own, would do something else for another name
_ASKS = re.compile(
    r"""[!=]= ["']sdpa["']|\bin\s*[\[({][^\])}]*["']sdpa["']|, ["']sdpa["']\)|["']sdpa["']:|AttentionInterface\(\)"""
)


class _Name(str):
    """The function's name in a config. Where a config comes from a pickle, the function may not be registered yet."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _registered, (str(self),)


def _registered(name: str) -> _Name:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if name not in ALL_ATTENTION_FUNCTIONS:  # models that are compiled already go on with what is there
        AttentionInterface.register(name, partial(attention, backend=name[len(_OURS) + 1 :] or None))
    AttentionMaskInterface.register(name, sdpa_mask)
    return _Name(name)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (batch, heads, Lq, size), key and value (batch, their heads, Lk, size) → (batch, Lq, heads,
    size), and no weights. As its own function for "sdpa" does it, but heads of keys are not repeated, nor is a bias added to a
    causal mask."""
    if kwargs.get("output_attentions") or kwargs.get("cache") is not None:  # it warns; it knows the paged cache
        theirs = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS["sdpa"]
        more = {"is_causal": is_causal, "position_bias": position_bias, "softcap": softcap, **kwargs}
        return theirs(module, query, key, value, attention_mask, dropout, scaling, **more)
    length = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = length > 1 and attention_mask is None and bool(is_causal)
    if causal and key.shape[2] > length:  # a cache that is longer than what it holds
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
    options: dict[str, Any] = {"is_causal": causal}
    if position_bias is not None:
        if attention_mask is None:
            attention_mask, options = position_bias, {"window": (None, 0) if causal else None}
        elif attention_mask.dtype == torch.bool:
            attention_mask = torch.where(attention_mask, position_bias, torch.finfo(query.dtype).min)
        else:
            attention_mask = position_bias + attention_mask
    if softcap is not None:
        options["softcap"] = softcap
    out: Tensor = functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=key.shape[1] != query.shape[1], backend=backend,
        **options,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


@cache
def _source_asks(module: str) -> bool:
    try:
        return _ASKS.search(inspect.getsource(sys.modules[module])) is not None
    except (OSError, TypeError, KeyError):
        return True  # nobody knows


def _models(model: nn.Module) -> Iterator[tuple[str, Any, list[nn.Module]]]:
    """(name, the outermost PreTrainedModel of a config, all modules that read this config)"""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    readers: dict[int, list[nn.Module]] = {}
    first: list[tuple[str, Any]] = []
    for name, module in model.named_modules() if base else ():
        config = module.__dict__.get("config")
        if config is not None:
            if isinstance(module, base) and not any(config is other.config for _, other in first):
                first.append((name, module))
            readers.setdefault(id(config), []).append(module)
    for name, module in first:
        yield name, module, readers[id(module.config)]


def _uses_interface(kind: Any) -> bool:
    """Whether the model's code finds its attention by the interface."""
    ask = getattr(kind, "_can_set_attn_implementation", None)
    try:
        return ask is not None and bool(ask())
    except (AttributeError, KeyError, OSError, TypeError):  # some versions read the source, and a notebook's class has no file
        return False


def _sdpa_is_theirs() -> bool:
    """Whether "sdpa" is transformers' own function, and not one that the user has put in its place."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def _is_ours(name: str | None) -> bool:
    return name is not None and name.split("_")[0] == _OURS


def switch(model: nn.Module, backend: str | None) -> Iterator[tuple[str, str, str, bool]]:
    """Switch the attention of every PreTrainedModel in it: (its name, its class, what was done or why not, whether it was)."""
    ours = _OURS if backend is None else f"{_OURS}_{backend}"
    for name, module, readers in _models(model):
        kind, now, why = type(module), getattr(module.config, "_attn_implementation", None), None
        if _is_ours(now):
            if backend is not None:
                module.config._attn_implementation_internal = _registered(ours)
            yield name, kind.__name__, "its attention: already fastnn's", True
            continue
        if now != "sdpa":
            if not getattr(kind, "_supports_sdpa", False) or now is None:
                continue  # a model without attention, or with its own code for it
            why = f"its attention was chosen to be {now!r}" + (", which also returns the weights" if now == "eager" else "")
        elif "transformers.masking_utils" not in sys.modules:
            why = "its attention: this version of transformers has no interface for it"
        elif not _uses_interface(kind):
            why = "its attention does not use transformers' interface"
        elif not _sdpa_is_theirs():
            why = "its attention: 'sdpa' is registered as another function"
        elif any(_source_asks(type(m).__module__) for m in readers if not type(m).__module__.startswith(("torch.", "fastnn."))):
            why = "its attention: the model's code treats 'sdpa' by its name"
        if why is None:
            module.config._attn_implementation_internal = _registered(ours)
        yield name, kind.__name__, why or "its attention, by transformers' interface", why is None


def restore(model: nn.Module) -> None:
    """Back to torch's, which transformers calls \"sdpa\"."""
    for _, module, _ in _models(model):
        if _is_ours(getattr(module.config, "_attn_implementation", None)):
            module.config._attn_implementation_internal = "sdpa"
