"""Batch and group normalisation in the networks for images and sound that they come from, in both memory formats; layer and
root-mean-square normalisation of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Case

SHAPES = {
    "resnet50_stem": (8, 64, 112, 112),
    "resnet50_56": (8, 256, 56, 56),
    "resnet50_28": (8, 512, 28, 28),
    "resnet50_7": (8, 2048, 7, 7),
    "pointnet": (16, 256, 1024),
    "mlp": (4096, 512),
}


def _inputs(shape: tuple[int, ...], last: bool, grad: bool) -> Callable[[torch.dtype], tuple[Any, ...]]:
    """The images, and for each channel mean, variance, weight and bias"""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        generator, channels = torch.Generator().manual_seed(1), shape[1]
        x = torch.randn(shape, generator=generator).to(dtype)
        if last and x.dim() > 2:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        mean, var, weight, bias = (torch.rand(channels, generator=generator).add_(0.5).to(dtype) for _ in range(4))
        return x.requires_grad_(grad), mean, var, weight.requires_grad_(grad), bias.requires_grad_(grad)

    return make


def _batch_norm(training: bool) -> Callable[..., Tensor]:
    def run(F: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moments = (None, None) if training else (mean, var)
        return F.batch_norm(x, *moments, weight, bias, training)

    return run


def _group_norm(F: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, 32, weight, bias)


def _instance_norm(F: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, None, None, weight, bias)


def _scale(inputs: Any, grad: Tensor | None) -> tuple[Tensor, ...]:
    """Differences and sums over a channel cancel: counted at 8, and in gradients at the pixels of a channel, where a
    parameter's is their sum."""
    x = inputs[0]
    one = torch.ones((), dtype=torch.float64, device=x.device)
    if grad is None:
        return ((8 * one).expand(x.shape),)
    each = (one * x.numel() / x.shape[1]).expand(x.shape[1])
    return (8 * one).expand(x.shape), each, each


def norm(kind: str, model: str, last: bool, mode: str = "forward", **extra: Any) -> Case:
    shape = SHAPES[model]
    n, train = torch.Size(shape).numel(), mode == "train"
    passes = ((n, n), (2 * n, n)) if train else ((n, n),)  # the moments may be taken of what the cache holds
    name, theirs = {
        "eval": ("batch_norm_eval", _batch_norm(False)),
        "batch": ("batch_norm", _batch_norm(True)),
        "group": ("group_norm", _group_norm),
        "instance": ("instance_norm", _instance_norm),
    }[kind]
    return Case(
        "norm",
        f"{name}/{model}{'_nhwc' if last else ''}/{'x'.join(map(str, shape))}",
        _inputs(shape, last, train),
        theirs=theirs,
        parameters=(1, 2, 3, 4),
        passes=passes,
        mode=mode,
        scale=_scale,
        **extra,
    )


_CPU_SHAPES = list(SHAPES)
SHAPES["style_128"] = (4, 128, 64, 64)
SHAPES["resnet50_b64"] = (64, 256, 56, 56)
ROWS = {"bert_base": (4096, 768), "gpt2": (1024, 768), "minilm": (2048, 384), "llama": (512, 4096), "bert_base_one": (128, 768)}
_CPU_ROWS = list(ROWS)
ROWS |= {"llama_batch": (8192, 4096), "long_rows": (64, 1 << 19)}
_LENGTHS = (256, 1000, 16384, 65536)  # besides those of the two
ROWS |= {f"rows_of_{n}": ((1 << 25) // n, n) for n in _LENGTHS}


def rows(name: str, model: str, mode: str = "forward", added: bool = False, dtypes: Any = (torch.float32,), **extra: Any) -> Case:
    """layer_norm or rms_norm; ``added``: of the sum with a residual, which is the second result: what the next one is added to"""
    n, size = shape = ROWS[model]

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(1)
        x, other = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        parameters = [torch.rand(size, generator=generator).add_(0.5).to(dtype) for _ in range(2 if name == "layer_norm" else 1)]
        return tuple(t.requires_grad_(mode == "train") for t in (x, *((other,) if added else ()), *parameters))

    def run(F: Any, x: Tensor, *rest: Tensor) -> Any:
        if not added:
            return normal(F, x, *rest)
        total = x + rest[0]
        return normal(F, total, *rest[1:]), total

    def normal(F: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        if name == "rms_norm" and torch.onnx.is_in_onnx_export():  # the exporter has no word for it; ONNX Runtime finds it again
            return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps) * parameters[0]
        return getattr(F, name)(x, (size,), *parameters)

    def fused(F: Any, x: Tensor, *rest: Tensor) -> Any:
        return getattr(F, name)(x, (size,), *rest[1:], residual=rest[0], return_sum=True)

    def scale(inputs: Any, grad: Tensor | None) -> tuple[Tensor, ...]:
        """As in ``_scale``: a parameter's gradient is a sum over rows"""
        wanted = inputs if grad is not None else inputs[: 2 if added else 1]
        return tuple(torch.full_like(t, 8.0 if t.dim() > 1 else n, dtype=torch.float64) for t in wanted)

    count, first = n * size * (2 if added else 1), 2 if added else 1
    passes = ((count, count), (2 * count, count)) if mode == "train" else ((count, count),)
    return Case(
        "norm",
        f"{'add_' if added else ''}{name}/{model}/{n}x{size}",
        make,
        theirs=run,
        ours=fused if added else None,
        parameters=tuple(range(first, first + (2 if name == "layer_norm" else 1))),
        passes=passes,
        mode=mode,
        dtypes=dtypes,
        scale=scale,
        **extra,
    )


_IMAGES = [(model, last) for model in _CPU_SHAPES for last in (False, True) if len(SHAPES[model]) > 2 or not last]

CASES = [
    *(rows("layer_norm", m, goals={"best": 3.5, "limit": 0.8}, quick=m == "bert_base") for m in _CPU_ROWS),
    *(rows("layer_norm", m, "train", goals={"best": 2.5}) for m in _CPU_ROWS),
    *(rows("rms_norm", m, goals={"limit": 0.8}) for m in ("bert_base", "llama")),
    *(rows("rms_norm", m, "train", goals={"torch": 2.5}) for m in ("bert_base", "llama")),
    *(rows(name, "bert_base", added=True, goals={"best": 1.0}) for name in ("layer_norm", "rms_norm")),
    rows("layer_norm", "bert_base", dtypes=(torch.bfloat16,), goals={"torch": 1.0}),
    *(norm("eval", *which, goals={"limit": 0.85}) for which in _IMAGES),
    *(norm("batch", *which, goals={"best": 2.5}) for which in _IMAGES),
    *(norm("batch", *which, "train", goals={"best": 2.5}) for which in _IMAGES),
    *(norm("group", *which, goals={"best": 1.0}) for which in _IMAGES),
    *(norm("group", *which, "train", goals={"best": 1.0}) for which in _IMAGES),
    *(norm("instance", "style_128", last, mode, goals={"best": 1.0}) for mode in ("forward", "train") for last in (False, True)),
]

# What `make gpu` measures
_GPU: dict[str, Any] = {"devices": ("cuda",), "quick": True, "dtypes": (torch.float32, torch.bfloat16)}
CASES += [
    rows("layer_norm", "llama_batch", goals={"limit": 0.8}, **_GPU),
    rows("rms_norm", "llama_batch", "train", goals={"limit": 0.8}, **_GPU),
    rows("layer_norm", "long_rows", goals={"limit": 0.8, "torch": 10.0}, **_GPU),
    norm("batch", "resnet50_b64", False, "train", goals={"limit": 0.8}, **_GPU),
    norm("group", "resnet50_b64", False, goals={"limit": 0.8}, **_GPU),
    rows("layer_norm", "llama_batch", added=True, goals={"limit": 0.8}, **_GPU),
]

# What `make gpu GPU=--long` measures besides
_LONG = _GPU | {"quick": False, "goals": {"limit": 0.9}}
CASES += [
    *(rows("layer_norm", f"rows_of_{n}", mode, **_LONG) for n in _LENGTHS for mode in ("forward", "train")),
    rows("layer_norm", "llama_batch", "train", **_LONG),
    rows("rms_norm", "llama_batch", **_LONG),
    norm("batch", "resnet50_b64", True, "train", **_LONG),
]
