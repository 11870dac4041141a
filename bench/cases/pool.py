"""Pooling in the networks for images, sound and video that it comes from, in both memory formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn._numerics import TORCH, Scale, results

from . import Case

#: name: (shape, pooling)
LAYERS: dict[str, tuple[tuple[int, ...], Callable[[Any, Tensor], Tensor]]] = {
    "max_resnet50": ((8, 64, 112, 112), lambda F, x: F.max_pool2d(x, 3, 2, 1)),
    "max_vgg16": ((4, 64, 224, 224), lambda F, x: F.max_pool2d(x, 2)),
    "max_vgg16_deep": ((8, 512, 28, 28), lambda F, x: F.max_pool2d(x, 2)),
    "max_inception": ((8, 192, 28, 28), lambda F, x: F.max_pool2d(x, 3, 1, 1)),
    "max_yolo_spp": ((8, 256, 20, 20), lambda F, x: F.max_pool2d(x, 5, 1, 2)),
    "max_r3d": ((2, 64, 16, 56, 56), lambda F, x: F.max_pool3d(x, 2)),
    "max_crepe": ((32, 1024, 256), lambda F, x: F.max_pool1d(x, 2)),
    "avg_densenet": ((8, 256, 56, 56), lambda F, x: F.avg_pool2d(x, 2)),
    "avg_inception": ((8, 192, 35, 35), lambda F, x: F.avg_pool2d(x, 3, 1, 1)),
    "avg_global_resnet50": ((8, 2048, 7, 7), lambda F, x: F.adaptive_avg_pool2d(x, 1)),
    "avg_adaptive_vgg16": ((8, 512, 14, 14), lambda F, x: F.adaptive_avg_pool2d(x, 7)),
    "avg_i3d": ((8, 1024, 8, 7, 7), lambda F, x: F.avg_pool3d(x, (2, 7, 7), 1)),
    "max_segnet": ((4, 64, 112, 112), lambda F, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), (2, 2))),  # both ways
    # those that a GPU is asked for
    "max_resnet50_b64": ((64, 64, 112, 112), lambda F, x: F.max_pool2d(x, 3, 2, 1)),
    "max_vgg16_b32": ((32, 64, 224, 224), lambda F, x: F.max_pool2d(x, 2)),
    "avg_densenet_b64": ((64, 256, 56, 56), lambda F, x: F.avg_pool2d(x, 2)),
}
_CPU = [name for name, (shape, _) in LAYERS.items() if not name.endswith(("_b32", "_b64"))]


def _random(shape: tuple[int, ...], last: bool, grad: bool) -> Callable[[torch.dtype], tuple[Tensor]]:
    def make(dtype: torch.dtype) -> tuple[Tensor]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        if last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        return (x.requires_grad_(grad),)

    return make


def layer(name: str, last: bool, mode: str = "forward", **extra: Any) -> Case:
    shape, theirs = LAYERS[name]
    n = torch.Size(shape).numel()
    out = theirs(torch.nn.functional, torch.empty(shape, device="meta")).numel()
    kind, model = name.split("_", 1)
    # A gradient is read and one is written; where the maxima are may be told in a byte each, which does not count.
    passes = {"forward": ((n, out),), "backward": ((out, n),), "train": ((n, out), (out, n))}[mode]
    return Case(
        "pool",
        f"{kind}_pool/{model}{'_nhwc' if last else ''}/{'x'.join(map(str, shape))}",
        _random(shape, last, mode != "forward"),
        theirs=theirs,
        passes=passes,
        mode=mode,
        scale=_scale(theirs, kind),
        **extra,
    )


def _scale(theirs: Callable[[Any, Tensor], Tensor], kind: str) -> Scale:
    """A mean may cancel: its errors are counted at 1, the size of its terms. So may the gradients of windows that have a maximum
    in common: counted at the sum of their magnitudes."""

    def scale(inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
        if kind == "max" and grad is not None:
            return results(lambda x: theirs(TORCH, x), inputs, grad.abs())
        like = theirs(TORCH, inputs[0]) if grad is None else inputs[0]
        return (torch.full_like(like, 0.0 if kind == "max" else 1.0, dtype=torch.float64),)

    return scale


_NCHW, _NHWC = {"torch": 10.0, "best": 1.3, "limit": 0.8}, {"best": 1.0}

CASES = [
    *(layer(name, False, goals=_NCHW, quick=name == "max_resnet50") for name in _CPU),
    *(layer(name, True, goals=_NHWC) for name in _CPU),
    *(layer(name, last, "train", goals={"best": 1.0}) for name in _CPU for last in (False, True)),
    *(layer(name, last, "backward", goals={"best": 1.0}) for name in _CPU if "max" in name for last in (False, True)),
]

# What `make gpu` measures
_GPU: dict[str, Any] = {"devices": ("cuda",), "quick": True, "dtypes": (torch.float32, torch.bfloat16)}
CASES += [
    layer("max_resnet50_b64", False, goals={"torch": 4.0, "limit": 0.7}, **_GPU),
    layer("max_resnet50_b64", True, goals={"torch": 4.0, "limit": 0.7}, **_GPU),
    layer("max_resnet50_b64", False, "train", goals={"torch": 1.0}, **_GPU),
    layer("max_vgg16_b32", False, goals={"torch": 4.0, "limit": 0.7}, **_GPU),
    layer("avg_densenet_b64", False, goals={"torch": 1.0, "limit": 0.7}, **_GPU),
]
