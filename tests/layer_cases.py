"""Calls that fastnn.functional and torch take alike, as data: every test of the layers runs over them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn.functional


@dataclass(frozen=True)
class Case:
    """`name(*tensors, **options)`: differentiable tensors of these shapes, each of another scale."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    theirs: Callable[..., Tensor] | None = None

    def __str__(self) -> str:
        shapes = "-".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        options = "-".join(f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in self.options.items())
        return f"{self.name}-{shapes}" + (f"-{options}" if options else "")

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = [
            (torch.randn(shape, generator=generator, dtype=torch.float64) * (0.5 + i) + 0.1 * i).to(dtype)
            for i, shape in enumerate(self.shapes)
        ]
        return [t.requires_grad_(grad) for t in made]

    def ours(self, *tensors: Tensor, **more: Any) -> Tensor:
        options = _in(tensors[0].dtype, self.options)
        if "normalized_shape" in options:  # comes second
            tensors = (tensors[0], options.pop("normalized_shape"), *tensors[1:])
        return getattr(fastnn.functional, self.name)(*tensors, **options, **more)

    def torch(self, *tensors: Tensor) -> Tensor:
        options = _in(tensors[0].dtype, self.options)
        return (self.theirs or getattr(F, self.name, None) or getattr(torch, self.name))(*tensors, **options)


def _in(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """Floating tensors among the options follow the inputs' dtype."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}


def _fused(name: str | None) -> Callable[..., Tensor]:
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, **_: Any) -> Tensor:
        z = F.linear(input, weight, bias)
        if residual is not None:
            z = z + residual
        if name is None:
            return z
        return F.gelu(z, approximate="tanh") if name == "gelu_tanh" else getattr(F, name)(z)

    return linear


def _convolved(name: str) -> Callable[..., Tensor]:
    def conv(input: Tensor, weight: Tensor, bias: Tensor, padding: int = 0, **_: Any) -> Tensor:
        return getattr(F, name)(F.conv2d(input, weight, bias, padding=padding))

    return conv


def _losses() -> list[Case]:
    indices = torch.tensor([3, 0, 4, 3])
    ignoring = torch.tensor([3, -100, 4, 3])
    grid = torch.tensor([[1, 4], [0, -100], [2, 2]])
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])
    probabilities = torch.softmax(torch.linspace(-2, 3, 20).reshape(4, 5).cos(), 1)
    cases = []
    for reduction in ("mean", "sum", "none"):
        cases += [
            Case("cross_entropy", ((4, 5),), {"target": indices, "reduction": reduction}),
            Case("cross_entropy", ((4, 5),), {"target": ignoring, "weight": weight, "reduction": reduction}),
            Case(
                "cross_entropy",
                ((3, 5, 2),),
                {"target": grid, "weight": weight, "reduction": reduction, "label_smoothing": 0.2},
            ),
            Case("cross_entropy", ((4, 5),), {"target": probabilities, "weight": weight, "reduction": reduction}),
            Case("nll_loss", ((3, 5, 2),), {"target": grid, "weight": weight, "reduction": reduction}),
            Case("nll_loss", ((4, 5),), {"target": ignoring, "reduction": reduction}),
            Case("mse_loss", ((4, 3), (4, 3)), {"reduction": reduction}),
        ]
    cases += [
        Case("cross_entropy", ((5,),), {"target": torch.tensor(2)}),
        Case("cross_entropy", ((4, 5),), {"target": indices, "ignore_index": 3}),
        Case("cross_entropy", ((4, 5),), {"target": probabilities, "label_smoothing": 0.1}),
        Case("nll_loss", ((5,),), {"target": torch.tensor(2)}),
    ]
    return cases


MATMUL = [
    Case("matmul", ((5, 7), (7, 3))),
    Case("matmul", ((7,), (7,))),
    Case("matmul", ((7,), (7, 3))),
    Case("matmul", ((5, 7), (7,))),
    Case("matmul", ((3, 5, 7), (7, 4))),
    Case("matmul", ((3, 5, 7), (7,))),
    Case("matmul", ((5, 7), (3, 7, 4))),
    Case("matmul", ((7,), (3, 7, 4))),
    Case("matmul", ((2, 1, 5, 7), (3, 7, 4))),
    Case("matmul", ((2, 3, 5, 7), (2, 3, 7, 4))),
    Case("mm", ((5, 7), (7, 3))),
    Case("bmm", ((3, 5, 7), (3, 7, 4))),
    Case("mv", ((5, 7), (7,))),
    Case("addmm", ((5, 3), (5, 7), (7, 3))),
    Case("addmm", ((3,), (5, 7), (7, 3)), {"beta": 0.5, "alpha": -2.0}),
    Case("addmm", ((5, 1), (5, 7), (7, 3)), {"beta": 0}),
    Case("baddbmm", ((5, 4), (3, 5, 7), (3, 7, 4)), {"beta": 2, "alpha": 0.5}),
    Case("linear", ((5, 7), (3, 7))),
    Case("linear", ((5, 7), (3, 7), (3,))),
    Case("linear", ((7,), (3, 7), (3,))),
    Case("linear", ((2, 5, 7), (3, 7), (3,))),
]
ACTIVATION = [
    *(
        Case(name, ((4, 9),))
        for name in [
            "relu",
            "leaky_relu",
            "relu6",
            "elu",
            "gelu",
            "silu",
            "mish",
            "sigmoid",
            "tanh",
            "hardswish",
            "hardsigmoid",
            "hardtanh",
            "softplus",
        ]
    ),
    Case("leaky_relu", ((3, 5, 2),), {"negative_slope": -0.2}),
    Case("elu", ((3, 5, 2),), {"alpha": 1.7}),
    Case("gelu", ((3, 5, 2),), {"approximate": "tanh"}),
    Case("hardtanh", ((3, 5, 2),), {"min_val": -0.3, "max_val": 0.6}),
    Case("softplus", ((3, 5, 2),), {"beta": 2.5, "threshold": 1.5}),
    Case("prelu", ((4, 3), (1,))),
    Case("prelu", ((2, 3, 5), (3,))),
    Case("glu", ((4, 6),)),
    Case("glu", ((4, 6, 3),), {"dim": -2}),
    Case("glu", ((4, 6, 3),), {"dim": 0}),
]
SOFTMAX = [
    *(Case(name, ((4, 5, 3),), {"dim": dim}) for name in ("softmax", "log_softmax") for dim in (0, 1, 2, -1)),
    Case("softmax", ((7,),), {"dim": 0}),
    Case("log_softmax", ((4, 5),), {"dim": -1, "dtype": torch.float64}),
    Case("mse_loss", ((), ())),
    *_losses(),
]


def _wide_average(name: str) -> Callable[..., Tensor]:
    """torch averages no 16-bit numbers in three dimensions (but for autocast, which makes them float32)."""

    def average(input: Tensor, *args: Any, **options: Any) -> Tensor:
        narrow = input.itemsize == 2 and not torch.is_autocast_enabled("cpu")
        out: Tensor = getattr(F, name)(input.float() if narrow else input, *args, **options)
        return out.to(input.dtype) if narrow else out

    return average


_PIXELS = {1: (2, 3, 9), 2: (2, 3, 5, 7), 3: (2, 3, 4, 5, 6)}
_PAIRS = torch.tensor([1, 2, 5, 7])
POOL = [
    *(Case(f"max_pool{d}d", (_PIXELS[d],), {"kernel_size": 3, "stride": 2, "padding": 1}) for d in (1, 2, 3)),
    *(
        Case(f"avg_pool{d}d", (_PIXELS[d],), {"kernel_size": 3, "stride": 2, "padding": 1}, _wide_average(f"avg_pool{d}d"))
        for d in (1, 2, 3)
    ),
    *(Case(f"adaptive_max_pool{d}d", (_PIXELS[d],), {"output_size": 3}) for d in (1, 2, 3)),
    *(
        Case(f"adaptive_avg_pool{d}d", (_PIXELS[d],), {"output_size": 3}, _wide_average(f"adaptive_avg_pool{d}d"))
        for d in (1, 2, 3)
    ),
    *(
        Case(f"lp_pool{d}d", (_PIXELS[d],), {"norm_type": 2.0, "kernel_size": 2}, _wide_average(f"lp_pool{d}d"))
        for d in (1, 2, 3)
    ),
    Case("max_unpool1d", ((2, 3, 4),), {"indices": _PAIRS.expand(2, 3, 4), "kernel_size": 2}),
    Case("max_unpool2d", ((2, 3, 2, 2),), {"indices": _PAIRS.reshape(2, 2).expand(2, 3, 2, 2), "kernel_size": 2}),
    Case("max_unpool3d", ((2, 3, 1, 2, 2),), {"indices": _PAIRS.reshape(2, 2).expand(2, 3, 1, 2, 2), "kernel_size": 2}),
    Case("max_pool2d", ((3, 7, 5),), {"kernel_size": (2, 3), "dilation": 2, "ceil_mode": True}),
    Case("avg_pool2d", ((2, 3, 7, 5),), {"kernel_size": 3, "ceil_mode": True, "divisor_override": 5}),
    Case("adaptive_avg_pool2d", ((2, 3, 5, 7),), {"output_size": (None, 1)}),
]


def _rows(name: str) -> Callable[..., Tensor]:
    """The shape comes second in torch's signature, and by keyword in a case's options"""

    def norm(input: Tensor, *parameters: Tensor, normalized_shape: Any, **options: Any) -> Tensor:
        out: Tensor = getattr(F, name)(input, normalized_shape, *parameters, **options)
        return out

    return norm


NORM = [
    Case("batch_norm", ((4, 3, 5),), {"running_mean": None, "running_var": None, "training": True}),
    Case(
        "batch_norm",
        ((4, 3, 2, 5),),
        {"running_mean": torch.tensor([0.5, -1.0, 2.0]), "running_var": torch.tensor([0.5, 1.0, 2.0])},
    ),
    Case("group_norm", ((3, 4, 5),), {"num_groups": 2}),
    Case("instance_norm", ((3, 4, 5, 2),)),
    Case("layer_norm", ((4, 3, 5), (5,), (5,)), {"normalized_shape": (5,)}, _rows("layer_norm")),
    Case("layer_norm", ((4, 3, 5), (3, 5)), {"normalized_shape": (3, 5), "eps": 0.1}, _rows("layer_norm")),
    Case("rms_norm", ((4, 3, 5), (5,)), {"normalized_shape": (5,)}, _rows("rms_norm")),
    Case("rms_norm", ((3, 4, 2),), {"normalized_shape": (4, 2), "eps": 0.1}, _rows("rms_norm")),
]
CONV = [
    Case("conv1d", ((2, 3, 11), (5, 3, 3), (5,)), {"stride": 2, "padding": 1}),
    Case("conv1d", ((4, 9), (6, 2, 3), (6,)), {"groups": 2, "padding": "same"}),
    Case("conv2d", ((2, 3, 7, 6), (4, 3, 3, 3), (4,)), {"padding": 1}),
    Case("conv2d", ((2, 3, 8, 7), (4, 3, 3, 2)), {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2)}),
    Case("conv2d", ((2, 4, 6, 5), (4, 1, 3, 3), (4,)), {"groups": 4, "stride": 2, "padding": 1}),
    Case("conv2d", ((2, 5, 4, 3), (7, 5, 1, 1), (7,))),
    Case("conv3d", ((2, 2, 4, 5, 3), (3, 2, 2, 3, 1), (3,)), {"stride": (1, 2, 1), "padding": (1, 0, 0)}),
    Case("conv_transpose1d", ((2, 3, 5), (3, 4, 3), (4,)), {"dilation": 2, "output_padding": 1}),
    Case("conv_transpose2d", ((2, 4, 3, 4), (4, 2, 3, 3), (4,)), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}),
    Case("conv_transpose3d", ((1, 2, 2, 3, 2), (2, 3, 2, 2, 3)), {"stride": (2, 1, 1)}),
]
_SEEN = torch.arange(30).reshape(5, 6) % 4 > 0
ATTENTION = [
    Case("scaled_dot_product_attention", ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7))),
    Case("scaled_dot_product_attention", ((5, 4), (6, 4), (6, 4)), {"is_causal": True, "scale": 0.3}),
    Case("scaled_dot_product_attention", ((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 3)), {"attn_mask": _SEEN, "enable_gqa": True}),
    Case("scaled_dot_product_attention", ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4), (3, 1, 6))),
]
CASES = [*MATMUL, *ACTIVATION, *SOFTMAX, *CONV, *POOL, *NORM, *ATTENTION]

# what torch has no single call for
FUSED = [
    *(
        Case("linear", ((5, 7), (3, 7), (3,)), {"activation": name}, _fused(name))
        for name in (
            "relu",
            "relu6",
            "gelu",
            "gelu_tanh",
            "silu",
            "mish",
            "sigmoid",
            "tanh",
            "hardswish",
            "hardsigmoid",
        )
    ),
    Case("conv2d", ((2, 3, 5, 6), (4, 3, 3, 3), (4,)), {"padding": 1, "activation": "relu"}, _convolved("relu")),
    Case("conv2d", ((2, 3, 5, 6), (4, 3, 3, 3), (4,)), {"padding": 1, "activation": "silu"}, _convolved("silu")),
]
