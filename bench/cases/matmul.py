"""Products: square, linear layers of real models, attention scores, matrix–vector, tiny."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastnn
from fastnn._numerics import sum_of_magnitudes

from . import Case, random, together, traffic

# (in, out) of linear layers, after the models that have them.
LAYERS = {
    "bert_attention": (768, 768),
    "bert_up": (768, 3072),
    "bert_down": (3072, 768),
    "llama_projection": (4096, 4096),
    "llama_kv": (4096, 1024),
    "gpt2_qkv": (768, 2304),
    "vit_b_up": (768, 3072),
    "mnist_hidden": (784, 512),
    "mnist_output": (512, 10),
}
_BERT_AND_LLAMA = ("bert_attention", "bert_up", "bert_down", "llama_projection")


def _numpy_product(a: Any, b: Any) -> Any:
    """a @ b; like every provider's, an output of a megabyte and more comes from torch's allocator."""
    import numpy as np

    batch = a.shape[:-2]
    shape = (*batch, a.shape[-2], *b.shape[len(batch) + 1 :]) if a.ndim > 1 else b.shape[1:]
    size = int(np.prod(shape)) * a.itemsize
    if size < 1 << 20:
        return np.matmul(a, b)
    return np.matmul(a, b, out=torch.empty(shape, dtype=torch.from_numpy(a).dtype).numpy())


def _numpy_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    y = _numpy_product(x, weight.T)
    if bias is not None:
        y += bias
    return y


def square(n: int, **extra: Any) -> Case:
    return Case(
        "matmul",
        f"square/{n}",
        together(random(n, n, seed=1), random(n, n, seed=2)),
        theirs=lambda F, a, b: F.matmul(a, b),
        numpy=_numpy_product,
        flops=2 * n**3,
        passes=((2 * n * n, n * n),),
        scale=sum_of_magnitudes(lambda F, a, b: F.matmul(a, b)),
        **extra,
    )


def in_terms(n: int, precision: str, **extra: Any) -> Case:
    """Of float32 numbers, which ours multiplies in terms of fewer bits."""

    def ours(F: Any, a: Tensor, b: Tensor) -> Tensor:
        fastnn.set_float32_precision(precision)
        try:
            return F.matmul(a, b)
        finally:
            fastnn.set_float32_precision(None)

    return square(n, **extra).on(name=f"square_{precision}/{n}", ours=ours, dtypes=(torch.float32,))


def linear(
    layer: str, m: int, activation: str | None = None, group: str = "linear", mode: str = "forward", **extra: Any
) -> Case:
    """y = act(x Wᵀ + b) of a named layer with m rows."""
    k, n = LAYERS[layer]
    grad, inputs = mode != "forward", m * k + n * k + n

    def plain(F: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w, b)

    def with_gelu(F: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.gelu(F.linear(x, w, b))

    def fused(F: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w, b, activation="gelu")

    return Case(
        "matmul",
        f"{group}/{layer}/{m}",
        together(
            random(m, k, seed=1, grad=grad),
            random(n, k, seed=2, scale=k**-0.5, grad=grad),
            random(n, seed=3, scale=0.1, grad=grad),
        ),
        theirs=with_gelu if activation else plain,
        ours=fused if activation else None,
        numpy=None if activation else _numpy_linear,
        parameters=(1, 2),
        flops=2 * m * n * k * {"forward": 1, "backward": 2, "train": 3}[mode],
        passes=traffic(mode, inputs, m * n, inputs),
        mode=mode,
        scale=sum_of_magnitudes(plain),
        **extra,
    )


def bmm(name: str, batch: int, m: int, k: int, n: int, transposed: bool = False, **extra: Any) -> Case:
    """Batched products of attention: scores q kᵀ (k transposed by a view) or the context p v."""

    def run(F: Any, a: Tensor, b: Tensor) -> Tensor:
        return F.bmm(a, b.transpose(1, 2) if transposed else b)

    def with_numpy(a: Any, b: Any) -> Any:
        return _numpy_product(a, b.transpose(0, 2, 1) if transposed else b)

    b_shape = (batch, n, k) if transposed else (batch, k, n)
    return Case(
        "matmul",
        f"bmm/{name}/{batch}x{m}x{k}x{n}",
        together(random(batch, m, k, seed=1), random(*b_shape, seed=2)),
        theirs=run,
        numpy=with_numpy,
        flops=2 * batch * m * n * k,
        passes=((batch * (m * k + n * k), batch * m * n),),
        scale=sum_of_magnitudes(run),
        **extra,
    )


def vector(name: str, n: int, k: int, **extra: Any) -> Case:
    """Matrix times vector."""
    return Case(
        "matmul",
        f"mv/{name}/{n}x{k}",
        together(random(n, k, seed=1), random(k, seed=2)),
        theirs=lambda F, a, x: F.mv(a, x),
        numpy=_numpy_product,
        passes=((n * k + k, n),),
        scale=sum_of_magnitudes(lambda F, a, x: F.mv(a, x)),
        **extra,
    )


def row(name: str, k: int, n: int, **extra: Any) -> Case:
    """A linear layer on one row: what a model does for each token that it generates."""

    def run(F: Any, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    return Case(
        "matmul",
        f"mv/linear_{name}/1x{k}x{n}",
        together(random(1, k, seed=1), random(n, k, seed=2, scale=k**-0.5)),
        theirs=run,
        numpy=_numpy_linear,
        parameters=(1,),
        passes=((n * k + k, n),),
        scale=sum_of_magnitudes(run),
        **extra,
    )


def small(n: int, **extra: Any) -> Case:
    return square(n, **extra).on(name=f"small/{n}", goals={"numpy": 1.0, "torch": 2.0})


def call_overhead() -> Case:
    """An 8×8 linear layer: only the cost of the call."""

    def run(F: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w, b)

    return Case(
        "matmul",
        "call/linear/8x8",
        together(random(8, 8, seed=1), random(8, 8, seed=2), random(8, seed=3)),
        theirs=run,
        numpy=_numpy_linear,
        parameters=(1, 2),
        scale=sum_of_magnitudes(run),
        goals={"torch": 1 / 1.5},
    )


_SQUARE = {"limit": 0.9, "best": 1.03}
_FUSED = {"best": 1.0, "mean": 1.25}
_VECTOR = {"limit": 0.9}
_BFLOAT16 = {"torch": 1.0, "float32": 1.7}

CASES = [
    square(512, goals=_SQUARE),
    square(1024, goals=_SQUARE, quick=True),
    square(2048, goals=_SQUARE),
    square(4096, goals=_SQUARE),
    square(1024, goals=_BFLOAT16, dtypes=(torch.bfloat16,)),
    square(2048, goals=_BFLOAT16, dtypes=(torch.bfloat16,)),
    *(
        linear(
            layer,
            m,
            "gelu",
            "linear_gelu",
            goals=_FUSED | ({"limit": 0.9} if m >= 32 else {}),
            quick=(layer, m) == ("bert_up", 128),
        )
        for layer in _BERT_AND_LLAMA
        for m in (8, 32, 128, 512)
    ),
    *(
        linear(layer, m, goals={"best": 1.0})
        for layer in _BERT_AND_LLAMA
        for m in (32, 128)
    ),
    linear("llama_kv", 32, goals={"best": 1.0}),
    linear("gpt2_qkv", 1024, goals={"best": 1.0}),
    linear("vit_b_up", 3152, "gelu", "mlp", goals={"best": 1.0}),  # 16 images of 197 tokens
    *(linear(layer, 64, goals={"best": 1.0}) for layer in ("mnist_hidden", "mnist_output")),
    vector("square", 4096, 4096, goals=_VECTOR),
    row("llama_projection", 4096, 4096, goals=_VECTOR),
    row("gpt2_up", 768, 3072, goals=_VECTOR),
    row("gpt2_vocabulary", 768, 50257, goals=_VECTOR),
    *(small(n) for n in (8, 16, 32, 48, 64, 96, 128)),
    bmm("bert_scores", 96, 128, 64, 128, transposed=True, goals={"best": 1.2}),
    bmm("bert_context", 96, 128, 128, 64, goals={"best": 1.2}),
    bmm("vit_b_scores", 96, 197, 64, 197, transposed=True, goals={"best": 1.2}),
    bmm("vit_b_context", 96, 197, 197, 64, goals={"best": 1.2}),
    bmm("gpt2_scores", 12, 1024, 64, 1024, transposed=True, goals={"best": 1.2}),
    bmm("gpt2_context", 12, 1024, 1024, 64, goals={"best": 1.2}),
    bmm("llama_scores", 32, 512, 128, 512, transposed=True, goals={"best": 1.2}),
    bmm("minilm_scores", 768, 32, 32, 32, transposed=True, goals={"best": 1.2}),
    *(
        linear(
            layer,
            m,
            None,
            "linear_train",
            mode="train",
            goals={"best": 1.1},
            quick=(layer, m) == ("bert_up", 128),
        )
        for layer in ("bert_attention", "bert_up", "bert_down")
        for m in (128, 512)
    ),
    linear("mnist_hidden", 64, None, "linear_train", mode="train", goals={"best": 1.1}),
    linear("bert_up", 128, None, "linear_backward", mode="backward", goals={"best": 1.1}),
    call_overhead(),
]

# What `make gpu` measures
_GPU: dict[str, Any] = {"devices": ("cuda",), "quick": True, "dtypes": (torch.bfloat16,)}
CASES += [
    square(8192, goals={"torch": 0.9}, **_GPU),
    linear("llama_projection", 4096, "gelu", "linear_gelu", goals={"torch": 1.1}, **_GPU),
    linear("bert_up", 4096, "gelu", "linear_gelu", goals={"torch": 1.1}, **_GPU),
    square(6144, goals={"torch": 0.9}, **_GPU | {"dtypes": (torch.float32,)}),
    linear("bert_up", 4096, None, "linear_train", mode="train", goals={"torch": 1.0}, **_GPU),
    row("llama_projection", 4096, 4096, goals={"limit": 0.8}, **_GPU),
    bmm("gpt2_scores", 96, 1024, 64, 1024, transposed=True, goals={"torch": 1.0}, **_GPU),
]

# What `make gpu GPU=--long` measures besides: large, narrow and odd sizes; float32 in terms
_LONG = _GPU | {"quick": False}
CASES += [
    square(4096, goals={"torch": 1.0}, **_LONG),
    square(4097, goals={"torch": 1.15}, **_LONG),
    *(linear("llama_projection", m, goals={"torch": 1.15}, **_LONG) for m in (16, 64, 256)),
    linear("llama_kv", 4096, "gelu", "linear_gelu", goals={"torch": 1.15}, **_LONG),
    *(in_terms(4096, how, goals={"torch": 2.0}, **_LONG) for how in ("tf32x3", "bf16x3", "bf16x6")),
]
