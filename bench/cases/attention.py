"""Attention of the models that its shapes come from: whole sequences, training, and the next token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnn._numerics import attention_scale

from . import Case, random, together, traffic

# batch, heads, heads of keys, queries, keys, size
SHAPES = {
    "bert_base": (1, 12, 12, 512, 512, 64),
    "bert_base_b8": (8, 12, 12, 128, 128, 64),
    "gpt2": (1, 12, 12, 1024, 1024, 64),
    "gpt2_2k": (1, 12, 12, 2048, 2048, 64),
    "llama_gqa": (1, 32, 8, 512, 512, 128),
    "vit_b": (8, 12, 12, 197, 197, 64),
    "t5_base": (4, 12, 12, 512, 512, 64),
    "whisper_cross": (1, 8, 8, 224, 1500, 64),
    "long_4k": (1, 8, 8, 4096, 4096, 64),
    "long_16k": (1, 4, 4, 16384, 16384, 64),
    "window_8k": (1, 8, 8, 8192, 8192, 64),
}
SHAPES |= {f"llama_{n // 1024}k": (8192 // n, 16, 16, n, n, 128) for n in (1024, 4096, 8192)}
SHAPES |= {"llama_16k": (1, 8, 8, 16384, 16384, 128), "mistral_64k": (1, 4, 4, 65536, 65536, 128)}
SHAPES |= {"llama_decode": (8, 32, 8, 1, 8192, 128), "gpt2_b4": (4, 12, 12, 1024, 1024, 64)}
DECODE = {f"decode_{keys}": (1, 32, 8, 1, keys, 128) for keys in (128, 1024, 4096, 8192)}
SHAPES |= DECODE


def _kept(shape: tuple[int, ...], causal: bool, window: int) -> int:
    """Scores that are not masked"""
    queries, keys = shape[3:5]
    if window:
        return sum(min(i, window) + 1 for i in range(queries))
    return queries * (queries + 1) // 2 if causal else queries * keys


def _areas(model: str, window: int) -> float:
    """All scores over those of a window"""
    shape = SHAPES[model]
    return math.prod(shape[3:5]) / _kept(shape, True, window)


def _window_mask(n: int, window: int) -> Tensor:
    place = torch.arange(n, dtype=torch.int32)
    distance = place.unsqueeze(1) - place
    return (distance >= 0) & (distance <= window)


def attention(kind: str, model: str, mode: str = "forward", *, causal: bool = False, bias: tuple[int, ...] | None = None,
              padded: bool = False, window: int = 0,
              goals: dict[str, float] | None = None, **extra: Any) -> Case:
    """bias: the shape of an additive mask, learned in training; padded: a boolean mask of keys; window: keys before the query."""
    shape = SHAPES[model]
    b, h, hk, lq, lk, d = shape
    train = mode == "train"
    makers: list[Any] = [random(b, h, lq, d, seed=1, grad=train), random(b, hk, lk, d, seed=2, grad=train),
                         random(b, hk, lk, d, seed=3, grad=train)]
    if bias is not None:
        makers.append(random(*bias, seed=4, grad=train))
    if padded:
        makers.append(lambda dtype: (torch.arange(lk) < lk - 20).expand(b, 1, 1, lk))
    if window:  # for peers a mask, made beforehand and of the kind that torch is faster with
        makers.append(lambda dtype: torch.zeros(lk, lk, dtype=dtype).masked_fill_(~_window_mask(lk, window), -math.inf))
    options: dict[str, Any] = {"is_causal": causal, "enable_gqa": h != hk}

    def theirs(F: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if h != hk and torch.onnx.is_in_onnx_export():  # the exporter has no word for grouped heads
            k, v = (t.unsqueeze(2).expand(b, hk, h // hk, lk, d).reshape(b, h, lk, d) for t in (k, v))
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    def ours(F: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, window=(window, 0))
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    inputs = 2 * b * hk * lk * d + b * h * lq * d + math.prod(bias or (0,))
    products = (7 if train else 2) * 2 * b * h * d * _kept(shape, causal, window)
    return Case(
        "attention",
        f"{kind}/{model}/{'x'.join(map(str, shape))}",
        together(*makers),
        theirs=theirs,
        ours=ours,
        flops=0 if lq == 1 else products,
        passes=traffic(mode, inputs, b * h * lq * d, inputs),
        mode=mode,
        scale=attention_scale(**options),
        goals=goals or {"best": 1.0},
        **extra,
    )


def sliding(model: str, window: int, chunk: int = 4096, **extra: Any) -> Case:
    """A window of a sequence so long that all of its scores would not fit: torch's are calls for a chunk of queries each."""
    b, h, _, n, _, d = shape = SHAPES[model]

    def in_chunks(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        parts = []
        for i in range(0, n, chunk):
            keys = slice(max(0, i - window), i + chunk)
            parts.append(attend(q[:, :, i : i + chunk], k[:, :, keys], v[:, :, keys], mask if i else mask[:, window:]))
        return torch.cat(parts, 2)

    def theirs(F: Any, *inputs: Tensor) -> Tensor:
        return in_chunks(F.scaled_dot_product_attention, *inputs)

    def scale(inputs: Any, grad: Tensor | None) -> tuple[Tensor, ...]:
        """Outputs are averages of values, which may cancel."""
        q, k, v, mask = inputs
        return (in_chunks(torch.nn.functional.scaled_dot_product_attention, q, k, v.abs(), mask),)

    def ours(F: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, window=(window, 0))

    size = b * h * n * d
    return Case(
        "attention",
        f"attention_window/{model}/{'x'.join(map(str, shape))}",
        together(*(random(b, h, n, d, seed=i) for i in (1, 2, 3)), lambda dtype: _window_mask(chunk + window, window)[window:]),
        theirs=theirs,
        ours=ours,
        flops=4 * b * h * d * _kept(shape, True, window),
        passes=((3 * size, size),),
        scale=scale,
        **extra,
    )


def dropped(model: str, p: float = 0.1, **extra: Any) -> Case:
    """A training step with dropout, whose output and gradients are random: they must point where those without dropout do."""
    shape = SHAPES[model]
    b, h, _, lq, lk, d = shape

    def step(F: Any, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, *, rate: float = p) -> Tensor:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            out = F.scaled_dot_product_attention(*leaves, dropout_p=rate)
            return torch.stack([out.detach(), *torch.autograd.grad(out, leaves, upstream)])

    def judge(found: Tensor, *inputs: Tensor) -> Tensor:
        whole = step(torch.nn.functional, *(t.double() for t in inputs), rate=0.0)
        alike = torch.nn.functional.cosine_similarity(found.double().flatten(1), whole.flatten(1))
        dropped = (found[0].double() - whole[0]).norm() / whole[0].norm()  # √(p / (1 - p)) of many weights: 0.33
        fits = bool((alike > 0.85).all()) and 0.2 < float(dropped) < 0.5
        return whole if fits else torch.full_like(whole, torch.nan)

    return Case(
        "attention",
        f"attention_dropout_train/{model}/{'x'.join(map(str, shape))}",
        together(*(random(b, h, n, d, seed=1 + i) for i, n in enumerate((lq, lk, lk, lq)))),
        theirs=step,
        judge=judge,
        flops=7 * 2 * b * h * lq * lk * d,
        passes=((2 * b * h * (lq + lk) * d, 2 * b * h * (lq + lk) * d),),  # each input and each result once
        **extra,
    )


_LOWER = (torch.bfloat16,)
_LOWER_GOALS = {"torch": 1.0, "float32": 1.5}

CASES = [
    attention("attention", "bert_base", goals={"limit": 0.8}),
    attention("attention", "bert_base_b8", goals={"best": 1.25}),
    attention("attention_padded", "bert_base_b8", padded=True, goals={"best": 1.25}),
    *(attention("attention", model) for model in ("vit_b", "whisper_cross", "long_4k")),
    attention("attention_causal", "bert_base", causal=True, goals={"torch": 2.0}, quick=True),
    *(attention("attention_causal", model, causal=True) for model in ("gpt2", "llama_gqa", "long_4k", "long_16k")),
    attention("attention_causal", "gpt2_2k", causal=True, goals={"limit": 0.75}),
    attention("attention_bias", "t5_base", bias=(1, 12, 512, 512)),
    attention("attention_window", "window_8k", window=256, goals={"torch": _areas("window_8k", 256) * 0.8}),
    attention("attention_train", "bert_base", "train", goals={"torch": 1.5}),
    attention("attention_train", "gpt2", "train", causal=True),
    attention("attention_bias_train", "t5_base", "train", bias=(1, 12, 512, 512), goals={"best": 2.0}),
    attention("attention_bias_train", "bert_base", "train", bias=(512, 512), goals={"best": 2.0}),
    dropped("bert_base", goals={"torch": 3.0}),
    *(attention("decode", model, goals={"limit": 0.85}) for model in DECODE),
    # bfloat16, beside torch's own
    attention("attention", "bert_base", dtypes=_LOWER, goals=_LOWER_GOALS),
    attention("attention", "bert_base_b8", dtypes=_LOWER, goals=_LOWER_GOALS),
    attention("attention_causal", "bert_base", causal=True, dtypes=_LOWER, goals=_LOWER_GOALS),
    attention("attention_train", "bert_base", "train", dtypes=_LOWER, goals=_LOWER_GOALS),
    attention("decode", "decode_4096", dtypes=_LOWER, goals=_LOWER_GOALS),
]

# What `make gpu` measures; the goals are 450 TFLOP/s forward and 350 backward, of the 790 that a product reaches on an H200
_GPU: dict[str, Any] = {"devices": ("cuda",), "quick": True, "dtypes": _LOWER}
CASES += [
    attention("attention_causal", "llama_4k", causal=True, goals={"limit": 0.57, "best": 1.0}, **_GPU),
    attention("attention_train", "llama_4k", "train", causal=True, goals={"limit": 0.47, "best": 1.0}, **_GPU),
    attention("decode", "llama_decode", goals={"limit": 0.8}, **_GPU),
    attention("attention", "llama_8k", goals={"limit": 0.57, "best": 1.0}, **_GPU),
    attention("attention_causal", "llama_1k", causal=True, goals={"limit": 0.57, "best": 1.0}, **_GPU),
    attention("attention_causal", "gpt2_b4", causal=True, goals={"best": 1.0}, **_GPU | {"dtypes": (torch.float32,)}),
]

# What `make gpu GPU=--long` measures besides: 600 TFLOP/s and 480 are the goals, of 790, and 350 of a window
_LONG = _GPU | {"quick": False}
CASES += [
    *(attention("attention", f"llama_{n}k", goals={"limit": 0.76, "best": 1.0}, **_LONG) for n in (1, 4, 16)),
    attention("attention_causal", "llama_16k", causal=True, goals={"limit": 0.76, "best": 1.0}, **_LONG),
    attention("attention_full_train", "llama_4k", "train", goals={"limit": 0.61, "best": 1.0}, **_LONG),
    sliding("mistral_64k", 1024, goals={"limit": 0.44}, **_LONG),
    attention("decode", "decode_8192", goals={"limit": 0.9}, **_LONG),
]
