"""Convolutions of real models, in PyTorch's default format unless the name says channels_last."""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from fastnn._numerics import sum_of_magnitudes

from . import Case, random, together, traffic


def conv(
    name: str,
    shape: tuple[int, ...],
    outputs: int,
    kernel: int | tuple[int, ...],
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    transposed: bool = False,
    last: bool = False,
    mode: str = "forward",
    **extra: Any,
) -> Case:
    """input of that shape (N, C, *size) ⋆ weight + bias; in mode "train" with the gradients of all three, or these alone."""
    dims = len(shape) - 2
    kernels = (kernel,) * dims if isinstance(kernel, int) else kernel
    channels = shape[1]
    weight = (channels, outputs // groups, *kernels) if transposed else (outputs, channels // groups, *kernels)
    op = f"conv_transpose{dims}d" if transposed else f"conv{dims}d"
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}

    def run(F: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return getattr(F, op)(x, w, b, **options)

    def place(make: Any) -> Any:
        if not last:
            return make
        form = torch.channels_last if dims == 2 else torch.channels_last_3d
        return lambda dtype: make(dtype).detach().to(memory_format=form).requires_grad_(grad)

    grad = mode != "forward"
    sums = math.prod(weight[1:]) if not transposed else channels // groups * math.prod(kernels) / stride**dims
    out = getattr(torch.nn.functional, op)(
        torch.empty(shape, device="meta"), torch.empty(weight, device="meta"), **options
    ).numel()
    inputs = math.prod(shape) + math.prod(weight) + outputs
    products = math.prod(shape) * math.prod(weight[1:]) if transposed else out * math.prod(weight[1:])
    return Case(
        "conv",
        f"{name}/{'x'.join(map(str, shape))}{'/channels_last' if last else ''}",
        together(
            place(random(*shape, seed=1, grad=grad)),
            place(random(*weight, seed=2, scale=float(max(sums, 1)) ** -0.5, grad=grad)),
            random(outputs, seed=3, scale=0.1, grad=grad),
        ),
        theirs=run,
        parameters=(1, 2),
        flops=2 * products * {"forward": 1, "train": 3, "backward": 2}[mode],
        passes=traffic(mode, inputs, out, inputs),
        mode=mode,
        scale=sum_of_magnitudes(run),
        **extra,
    )


def changing(name: str, channels: int, shortest: int, outputs: int, kernel: int) -> Case:
    """A convolution of sequences whose length is another one at every call, for more calls than oneDNN keeps primitives (1024).

    What is compared is where all of them agree. Each is cut out of a longer one, by a copy that everyone's time includes.
    """
    many, alike = 1201, 32
    lengths = cycle(shortest + i * 509 % many for i in range(many))

    def run(F: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            raise NotImplementedError("a session is exported for one shape")
        return F.conv1d(x[..., : next(lengths)].contiguous(), w, b)

    def start(F: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv1d(x[..., :shortest], w, b)[..., :alike]

    mean = shortest + many // 2
    out = outputs * (mean - kernel + 1)
    return Case(
        "conv",
        f"changing/{name}",
        together(
            random(1, channels, shortest + many, seed=1),
            random(outputs, channels, kernel, seed=2, scale=(channels * kernel) ** -0.5),
            random(outputs, seed=3, scale=0.1),
        ),
        theirs=run,
        judge=lambda y, *_: y[..., :alike],
        parameters=(1, 2),
        flops=2 * out * channels * kernel,
        passes=((channels * (shortest + many + outputs * kernel) + outputs, 0),),  # the output's size varies
        scale=sum_of_magnitudes(start),
        goals={"best": 1.5},
        devices=("cpu",),  # cuDNN would try its kernels anew for every length
    )


# ResNet-50's distinct layers: (channels, size, outputs, kernel, stride)
RESNET50 = {
    "3x3": [(64, 56, 64, 3, 1), (128, 28, 128, 3, 1), (256, 14, 256, 3, 1), (512, 7, 512, 3, 1)],
    "3x3_stride": [(128, 56, 128, 3, 2), (256, 28, 256, 3, 2), (512, 14, 512, 3, 2)],
    "1x1": [
        (64, 56, 64, 1, 1), (64, 56, 256, 1, 1), (256, 56, 64, 1, 1), (256, 56, 128, 1, 1), (128, 28, 512, 1, 1),
        (512, 28, 128, 1, 1), (512, 28, 256, 1, 1), (256, 14, 1024, 1, 1), (1024, 14, 256, 1, 1), (1024, 14, 512, 1, 1),
        (512, 7, 2048, 1, 1), (2048, 7, 512, 1, 1),
    ],
    "1x1_stride": [(256, 56, 512, 1, 2), (512, 28, 1024, 1, 2), (1024, 14, 2048, 1, 2)],
    "stem": [(3, 224, 64, 7, 2)],
}  # fmt: skip
_GOALS = {"3x3": {"best": 1.25}, "1x1": {"limit": 0.92}}


def resnet(kind: str, batch: int, c: int, size: int, o: int, k: int, s: int, **extra: Any) -> Case:
    name = f"{kind}/resnet50_{c}_{o}"
    goals = _GOALS.get(kind, {"best": 1.0})
    return conv(name, (batch, c, size, size), o, k, stride=s, padding=k // 2, goals=goals, **extra)


CASES = [
    *(
        resnet(kind, batch, *layer, quick=batch == 1 and layer == (64, 56, 64, 3, 1))
        for batch in (1, 8)
        for kind, layers in RESNET50.items()
        for layer in layers
    ),
    *(resnet(kind, 1, *layer, last=True) for kind in ("3x3", "3x3_stride", "stem") for layer in RESNET50[kind]),
    *(resnet("1x1", 1, *RESNET50["1x1"][n], last=True) for n in (1, 2, 8, 10)),
    *(
        conv(f"1x1/mobilenetv2_{c}_{o}", (1, c, size, size), o, 1, goals=_GOALS["1x1"])
        for c, o, size in ((24, 144, 56), (144, 24, 56), (320, 1280, 7))
    ),
    *(
        conv(f"3x3/vgg16_{c}_{o}", (1, c, size, size), o, 3, padding=1, goals={"best": 1.25})
        for c, o, size in ((3, 64, 224), (64, 128, 112), (128, 256, 56), (256, 512, 28), (512, 512, 14))
    ),
    *(
        conv(f"depthwise/{name}", (1, c, size, size), c, k, stride=s, padding=k // 2, groups=c, last=last,
             goals={"best": 1.5, "torch": 3.0})
        for name, c, size, k, s in (
            ("mobilenetv2_32", 32, 112, 3, 1), ("mobilenetv2_96", 96, 112, 3, 2), ("mobilenetv2_144", 144, 56, 3, 1),
            ("mobilenetv2_384", 384, 14, 3, 1), ("mobilenetv2_960", 960, 7, 3, 1), ("efficientnet_672", 672, 14, 5, 1),
            ("convnext_192", 192, 28, 7, 1),
        )
        for last in (False, True)
    ),
    *(
        conv(f"grouped/resnext50_{c}", (1, c, size, size), c, 3, padding=1, groups=32, last=last, goals={"best": 1.5})
        for c, size in ((128, 56), (256, 28), (512, 14), (1024, 7))
        for last in (False, True)
    ),
    *(
        conv(f"dilated/deeplab_{d}", (1, 512, 33, 33), 256, 3, padding=d, dilation=d, goals={"best": 1.5})
        for d in (2, 6, 12)
    ),
    *(
        conv(f"transposed/{name}", shape, o, k, stride=2, padding=p, transposed=True, goals={"best": 2.0})
        for name, shape, o, k, p in (
            ("unet_1024", (1, 1024, 16, 16), 512, 2, 0), ("unet_128", (1, 128, 128, 128), 64, 2, 0),
            ("dcgan_512", (8, 512, 4, 4), 256, 4, 1), ("dcgan_256", (8, 256, 8, 8), 128, 4, 1),
            ("dcgan_64", (8, 64, 32, 32), 3, 4, 1),
        )
    ),
    *(
        conv(f"conv3d/r3d18_{c}", (1, c, t, size, size), c, 3, padding=1, last=last, goals={"best": 4.0})
        for c, t, size in ((64, 8, 28), (128, 4, 28), (256, 2, 14))
        for last in (False, True)
    ),
    conv("conv3d/r3d18_stem", (1, 3, 8, 56, 56), 64, (3, 7, 7), padding=3, goals={"best": 4.0}),
    *(
        conv(f"conv1d/wav2vec2_{c}_{k}", (1, c, length), 512, k, stride=s, goals={"best": 1.2})
        for c, length, k, s in ((1, 32000, 10, 5), (512, 6399, 3, 2), (512, 3199, 2, 2))
    ),
    *(
        conv(f"conv1d/crepe_{c}_{o}", (16, c, length), o, k, stride=s, goals={"best": 1.2})
        for c, o, length, k, s in ((1, 1024, 1532, 512, 4), (1024, 128, 191, 64, 1), (128, 128, 127, 64, 1))
    ),
    *(
        conv(f"train/{name}", shape, o, k, stride=s, padding=k // 2, groups=g, mode="train", goals={"best": goal})
        for name, shape, o, k, s, g, goal in (
            ("resnet50_3x3_64", (8, 64, 56, 56), 64, 3, 1, 1, 1.0), ("resnet50_3x3_256", (8, 256, 14, 14), 256, 3, 1, 1, 1.0),
            ("resnet50_1x1_256", (8, 256, 56, 56), 64, 1, 1, 1, 1.0), ("resnet50_3x3_128s2", (8, 128, 56, 56), 128, 3, 2, 1, 1.0),
            ("mobilenetv2_144", (8, 144, 56, 56), 144, 3, 1, 144, 1.0), ("r3d18_64", (1, 64, 8, 28, 28), 64, 3, 1, 1, 2.0),
            ("crepe_128", (16, 128, 127), 128, 63, 1, 1, 1.0),
        )
    ),
    *(
        conv(f"gradients/{name}", shape, o, k, stride=s, padding=p, dilation=d, groups=g, last=last, mode="backward",
             goals={"best": goal})
        for name, shape, o, k, s, p, d, g, goal, forms in (
            ("resnet50_3x3_64", (8, 64, 56, 56), 64, 3, 1, 1, 1, 1, 1.0, (False, True)),
            ("resnet50_1x1_256", (8, 256, 56, 56), 64, 1, 1, 0, 1, 1, 1.0, (False, True)),
            ("resnet50_stem", (1, 3, 224, 224), 64, 7, 2, 3, 1, 1, 1.0, (False,)),
            ("resnet50_3x3_128s2", (8, 128, 56, 56), 128, 3, 2, 1, 1, 1, 1.0, (False,)),
            ("deeplab_2", (1, 512, 33, 33), 256, 3, 1, 2, 2, 1, 1.0, (False,)),
            ("resnext50_256", (1, 256, 28, 28), 256, 3, 1, 1, 1, 32, 1.0, (False,)),
            ("mobilenetv2_144", (8, 144, 56, 56), 144, 3, 1, 1, 1, 144, 1.0, (False, True)),
            ("mobilenetv2_96s2", (1, 96, 112, 112), 96, 3, 2, 1, 1, 96, 1.0, (False, True)),
            ("mobilenetv2_960", (8, 960, 7, 7), 960, 3, 1, 1, 1, 960, 1.0, (False, True)),
            ("efficientnet_672", (1, 672, 14, 14), 672, 5, 1, 2, 1, 672, 1.0, (False, True)),
            ("convnext_192", (1, 192, 28, 28), 192, 7, 1, 3, 1, 192, 1.0, (False, True)),
            ("wav2vec2_512", (1, 512, 3199), 512, 3, 2, 0, 1, 1, 1.0, (False,)),
            ("r3d18_64", (1, 64, 8, 28, 28), 64, 3, 1, 1, 1, 1, 2.0, (False,)),
        )
        for last in forms
    ),
    conv("gradients/unet_128", (1, 128, 64, 64), 64, 2, stride=2, transposed=True, mode="backward", goals={"best": 2.0}),
    changing("wav2vec2_512", 512, 512, 512, 3),
    changing("crepe_128", 128, 127, 128, 64),
    changing("vits_192", 192, 64, 192, 5),
    changing("hifigan_32", 32, 512, 32, 3),
    conv("train/dcgan_256", (8, 256, 8, 8), 128, 4, stride=2, padding=1, transposed=True, mode="train", goals={"best": 2.0}),
]  # fmt: skip

# What `make gpu` measures
_GPU: dict[str, Any] = {"devices": ("cuda",), "quick": True, "dtypes": (torch.bfloat16,)}
CASES += [
    conv("3x3/resnet50_64_64", (32, 64, 56, 56), 64, 3, padding=1, goals={"torch": 1.5}, **_GPU),
    conv("3x3/resnet50_64_64", (32, 64, 56, 56), 64, 3, padding=1, last=True, goals={"best": 1.0}, **_GPU),
    conv("1x1/resnet50_256_64", (32, 256, 56, 56), 64, 1, goals={"torch": 1.5}, **_GPU),
    conv("3x3/resnet50_256_256", (32, 256, 14, 14), 256, 3, padding=1, mode="train", goals={"torch": 1.5}, **_GPU),
    conv("stem/resnet50_3_64", (32, 3, 224, 224), 64, 7, stride=2, padding=3, goals={"torch": 1.5}, **_GPU),
    conv("depthwise/mobilenetv2_144", (32, 144, 56, 56), 144, 3, padding=1, groups=144, goals={"torch": 1.5}, **_GPU),
]

# What `make gpu GPU=--long` measures besides
_LONG = _GPU | {"quick": False}
CASES += [
    conv("3x3/resnet50_128_128", (32, 128, 28, 28), 128, 3, padding=1, goals={"torch": 2.0}, **_LONG),
    conv("3x3/resnet50_128_128", (32, 128, 28, 28), 128, 3, padding=1, last=True, goals={"best": 1.1}, **_LONG),
    conv("3x3/resnet50_256_256", (32, 256, 14, 14), 256, 3, padding=1, last=True, mode="train", goals={"best": 1.0}, **_LONG),
    conv("3x3/resnet50_stride", (32, 128, 56, 56), 128, 3, stride=2, padding=1, last=True, goals={"best": 1.0}, **_LONG),
]
