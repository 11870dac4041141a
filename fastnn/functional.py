"""torch.nn.functional's and torch's names, signatures, defaults and errors, served by fastnn's kernels.

Every function also takes, by keyword, `backend` ("auto", "cpu", "gpu", "torch" or "reference": see fastnn.backend).
Floating dtypes (float32, float64, bfloat16, float16) on dense tensors have kernels; whatever else torch accepts is
served by torch, and `fastnn.trace()` says why. Errors are of torch's types: RuntimeError for shapes and dtypes that do
not match, IndexError for a dimension or class out of range, ValueError for an unknown name, TypeError for a non-tensor.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import _reduction

from . import backends
from .ops import activation as _activation
from .ops import conv as _conv
from .ops import matmul as _matmul
from .ops import norm as _norm
from .ops import pool as _pool
from .ops import rnn as _rnn
from .ops import softmax as _softmax
from .ops._operator import FLOATING, PLAIN

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "addmm",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "baddbmm",
    "batch_norm",
    "bmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cross_entropy",
    "dropout",
    "elu",
    "gelu",
    "glu",
    "group_norm",
    "gru",
    "gru_cell",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "instance_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "lstm",
    "lstm_cell",
    "matmul",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
    "mish",
    "mm",
    "mse_loss",
    "mv",
    "nll_loss",
    "prelu",
    "qrnn",
    "relu",
    "relu6",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]  # fmt: skip

_matmul_call, _linear_call, _activation_call = _matmul.matmul.call, _matmul.linear.call, _activation.activation.call


# Matrix products


def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Matrix product of two tensors, by torch.matmul's rules for vectors, batches and broadcasting.

    input (…, M, K) or (K), other (…, K, N) or (K), of one dtype → (…, M, N). `out` may overlap an input.
    """
    if out is not None:
        return _matmul.matmul.into(out, input, other, backend=backend)
    return _matmul_call(input, other, backend)


def mm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """input (M, K) @ mat2 (K, N) → (M, N)."""
    if type(input) not in PLAIN or type(mat2) not in PLAIN or input.dim() != 2 or mat2.dim() != 2:
        _need_dims("mm", input=(input, 2), mat2=(mat2, 2))
    return matmul(input, mat2, out=out, backend=backend)


def bmm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """input (B, M, K) @ mat2 (B, K, N) → (B, M, N); the batch is not broadcast."""
    _need_dims("bmm", input=(input, 3), mat2=(mat2, 3))
    if input.shape[0] != mat2.shape[0]:
        raise RuntimeError(f"bmm(): mat2 must have input's batch size {input.shape[0]}, got shape {tuple(mat2.shape)}")
    return matmul(input, mat2, out=out, backend=backend)


def mv(input: Tensor, vec: Tensor, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """input (M, K) @ vec (K) → (M)."""
    _need_dims("mv", input=(input, 2), vec=(vec, 1))
    if torch.is_autocast_enabled("cpu"):  # torch's autocast leaves mv alone on the CPU
        with torch.autocast("cpu", enabled=False):
            return matmul(input, vec, out=out, backend=backend)
    return matmul(input, vec, out=out, backend=backend)


def addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """beta·input + alpha·(mat1 @ mat2): mat1 (M, K), mat2 (K, N), input expandable to (M, N) → (M, N)."""
    _need_dims("addmm", mat1=(mat1, 2), mat2=(mat2, 2))
    return _add_product("addmm", input, mat1, mat2, beta, alpha, out, backend)


def baddbmm(
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """beta·input + alpha·(batch1 @ batch2): (B, M, K), (B, K, N), input expandable to (B, M, N) → (B, M, N)."""
    _need_dims("baddbmm", batch1=(batch1, 3), batch2=(batch2, 3))
    return _add_product("baddbmm", input, batch1, batch2, beta, alpha, out, backend)


def _add_product(
    op: str,
    input: Tensor,
    left: Tensor,
    right: Tensor,
    beta: float,
    alpha: float,
    out: Tensor | None,
    backend: str | None,
) -> Tensor:
    if isinstance(beta, complex) or isinstance(alpha, complex) or input.dtype not in FLOATING:
        backends.torch_serves(op, (input, left, right), backend, f"dtype {input.dtype} has no fastnn kernel")
        return getattr(torch, op)(input, left, right, beta=beta, alpha=alpha, out=out)
    if out is not None:
        return _matmul.addmm.into(out, input, left, right, beta, alpha, backend=backend)
    return _matmul.addmm(input, left, right, beta, alpha, backend=backend)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(input @ weightᵀ + bias + residual).

    input (…, in_features), weight (out_features, in_features), bias (out_features) → (…, out_features).
    residual has the output's shape; activation is "relu", "relu6", "gelu", "gelu_tanh", "silu", "mish", "sigmoid",
    "tanh", "hardswish", "hardsigmoid" or None (ValueError otherwise). Both are part of the product's last step, except
    where gradients are needed: then the activation is a step of its own, because its backward needs its input.
    """
    if activation is not None and torch.is_grad_enabled() and _any_requires_grad(input, weight, bias, residual):
        if activation not in _activation.PARAMETERLESS:
            _matmul.linear.check(input, weight, bias, residual, activation)
        z = _linear_call(input, weight, bias, residual, None, backend)
        return _activation_call(z, activation, (), backend)
    return _linear_call(input, weight, bias, residual, activation, backend)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _need_dims(op: str, **tensors: tuple[Tensor, int]) -> None:
    for name, (tensor, dims) in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(tensor).__name__}")
        if tensor.dim() != dims:
            kind = ("", "a vector", "a matrix", "a batch of matrices (3 dimensions)")[dims]
            raise RuntimeError(f"{op}(): {name} must be {kind}, got shape {tuple(tensor.shape)}")


# Convolutions

Ints = int | Sequence[int]


def _ints(op: str, name: str, value: Ints, dims: int) -> list[int]:
    if isinstance(value, int):
        return [value] * dims
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, (int, torch.SymInt)) for v in value):
        raise TypeError(f"{op}(): {name} must be int or a tuple of {dims} ints, got {value!r}")
    if len(value) not in (1, dims):
        raise RuntimeError(f"{op}(): expected {name} to be a single integer value or {dims} values, got {tuple(value)}")
    return list(value) if len(value) == dims else list(value) * dims


def _convolve(
    op: str,
    dims: int,
    transposed: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    output_padding: Ints,
    groups: int,
    activation: str | None,
    residual: Tensor | None,
    backend: str | None,
) -> Tensor:
    for name, t in (("input", input), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(t).__name__}")
    if input.dim() == dims + 1:  # unbatched
        more = None if residual is None else residual.unsqueeze(0)
        return _convolve(op, dims, transposed, input.unsqueeze(0), weight, bias, stride, padding, dilation, output_padding,
                         groups, activation, more, backend).squeeze(0)
    strides, dilations = _ints(op, "stride", stride, dims), _ints(op, "dilation", dilation, dims)
    if isinstance(padding, str):
        input, paddings = _padded(op, dims, input, weight, strides, padding, dilations)
    else:
        paddings = _ints(op, "padding", padding, dims)
    fixed = (strides, paddings, dilations, transposed, _ints(op, "output_padding", output_padding, dims), groups)
    if activation is not None and torch.is_grad_enabled() and _any_requires_grad(input, weight, bias, residual):
        if activation not in _activation.PARAMETERLESS:
            _conv.conv.check(input, weight, bias, residual, *fixed, activation)
        z = _conv.conv.call(input, weight, bias, residual, *fixed, None, backend)
        return _activation_call(z, activation, (), backend)
    return _conv.conv.call(input, weight, bias, residual, *fixed, activation, backend)


def _padded(
    op: str, dims: int, input: Tensor, weight: Tensor, stride: list[int], padding: str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """The padding that a name stands for; where it is uneven, the input with the odd zero at its far edge."""
    if padding not in ("same", "valid"):
        raise RuntimeError(f"{op}(): Invalid padding string: {padding!r}, allowed are 'same' and 'valid'")
    if padding == "valid" or weight.dim() != dims + 2:
        return input, [0] * dims
    if any(s != 1 for s in stride):
        raise RuntimeError(f"{op}(): padding='same' is not supported for strided convolutions, got stride {tuple(stride)}")
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
    if any(t % 2 for t in total):
        input = F.pad(input, [n for t in reversed(total) for n in (0, t % 2)])
    return input, [t // 2 for t in total]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(input ⋆ weight + bias + residual): cross-correlation along the last dimension.

    input (N, C, L) or (C, L), weight (out_channels, C / groups, kernel), bias (out_channels) → (N, out_channels, L_out).
    padding is a number or "same" or "valid"; activation and residual (of the output's shape) are as in linear.
    Raises RuntimeError for shapes that do not fit, a kernel larger than the padded input, or numbers out of range.
    """
    return _convolve("conv1d", 1, False, input, weight, bias, stride, padding, dilation, 0, groups, activation, residual,
                     backend)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The gradient of conv1d in its input, as a layer. Dumoulin & Visin 2016, chapter 4.

    input (N, C, L) or (C, L), weight (C, out_channels / groups, kernel) → (N, out_channels, L_out), where L_out is
    (L - 1)·stride - 2·padding + dilation·(kernel - 1) + output_padding + 1. Extras and errors are as in conv1d.
    """
    return _convolve("conv_transpose1d", 1, True, input, weight, bias, stride, padding, dilation, output_padding, groups,
                     activation, residual, backend)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """As conv1d, over the last two dimensions: input (N, C, H, W) or (C, H, W), weight (out_channels, C / groups, kH, kW).

    A channels_last input or weight gives a channels_last output, as in torch.
    """
    return _convolve("conv2d", 2, False, input, weight, bias, stride, padding, dilation, 0, groups, activation, residual,
                     backend)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """As conv_transpose1d, over the last two dimensions; memory formats as conv2d."""
    return _convolve("conv_transpose2d", 2, True, input, weight, bias, stride, padding, dilation, output_padding, groups,
                     activation, residual, backend)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """As conv2d, over the last three dimensions: weight (out_channels, C / groups, kD, kH, kW)."""
    return _convolve("conv3d", 3, False, input, weight, bias, stride, padding, dilation, 0, groups, activation, residual,
                     backend)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """As conv_transpose1d, over the last three dimensions."""
    return _convolve("conv_transpose3d", 3, True, input, weight, bias, stride, padding, dilation, output_padding, groups,
                     activation, residual, backend)


# Activations


def _inplace(by_torch: Callable[..., Tensor], input: Tensor, params: tuple[float, ...], backend: str | None) -> Tensor:
    reason = "inplace=True changes the input, which fastnn's kernels never do"
    backends.torch_serves(by_torch.__name__, (input,), backend, reason)
    return by_torch(input, *params, inplace=True)


def relu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """max(input, 0), elementwise."""
    if inplace:
        return _inplace(F.relu, input, (), backend)
    return _activation_call(input, "relu", (), backend)


def leaky_relu(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False, *, backend: str | None = None
) -> Tensor:
    """input where positive, else negative_slope·input."""
    if inplace:
        return _inplace(F.leaky_relu, input, (negative_slope,), backend)
    return _activation_call(input, "leaky_relu", (negative_slope,), backend)


def relu6(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """input clamped to [0, 6]."""
    if inplace:
        return _inplace(F.relu6, input, (), backend)
    return _activation_call(input, "relu6", (), backend)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """input where positive, else alpha·(exp(input) - 1). Clevert et al. 2015."""
    if inplace:
        return _inplace(F.elu, input, (alpha,), backend)
    return _activation_call(input, "elu", (alpha,), backend)


def gelu(input: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """input·Φ(input), or with approximate="tanh" the tanh form. Hendrycks & Gimpel 2016, section 2."""
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"gelu(): approximate argument must be either none or tanh, got {approximate!r}")
    return _activation_call(input, "gelu" if approximate == "none" else "gelu_tanh", (), backend)


def silu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """input·sigmoid(input)."""
    if inplace:
        return _inplace(F.silu, input, (), backend)
    return _activation_call(input, "silu", (), backend)


def mish(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """input·tanh(softplus(input)). Misra 2019."""
    if inplace:
        return _inplace(F.mish, input, (), backend)
    return _activation_call(input, "mish", (), backend)


def sigmoid(input: Tensor, *, backend: str | None = None) -> Tensor:
    """1 / (1 + exp(-input))."""
    return _activation_call(input, "sigmoid", (), backend)


def tanh(input: Tensor, *, backend: str | None = None) -> Tensor:
    """Hyperbolic tangent."""
    return _activation_call(input, "tanh", (), backend)


def hardswish(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """input·relu6(input + 3) / 6. Howard et al. 2019 (MobileNetV3), section 5.2."""
    if inplace:
        return _inplace(F.hardswish, input, (), backend)
    return _activation_call(input, "hardswish", (), backend)


def hardsigmoid(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """relu6(input + 3) / 6."""
    if inplace:
        return _inplace(F.hardsigmoid, input, (), backend)
    return _activation_call(input, "hardsigmoid", (), backend)


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False, *, backend: str | None = None
) -> Tensor:
    """input clamped to [min_val, max_val]. ValueError if min_val is greater than max_val."""
    if min_val > max_val:
        raise ValueError(f"hardtanh(): min_val cannot be greater than max_val, got {min_val} and {max_val}")
    if inplace:
        return _inplace(F.hardtanh, input, (min_val, max_val), backend)
    return _activation_call(input, "hardtanh", (min_val, max_val), backend)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20, *, backend: str | None = None) -> Tensor:
    """log(1 + exp(beta·input)) / beta, and input itself where beta·input exceeds threshold."""
    return _activation_call(input, "softplus", (beta, threshold), backend)


def prelu(input: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """input where positive, else weight·input: weight has 1 element or one a channel (dimension 1). He et al. 2015."""
    return _activation.prelu.call(input, weight, backend)


def glu(input: Tensor, dim: int = -1, *, backend: str | None = None) -> Tensor:
    """a·sigmoid(b), where a and b are the halves of input along dim. Dauphin et al. 2016."""
    return _activation.glu.call(input, dim, backend)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Zero each element with probability p and scale the rest by 1/(1-p); the input itself if not training.

    Whether element i is kept is a function of (seed, i) only, and the backward repeats it. Without a seed one is drawn
    from torch's default generator, so torch.manual_seed repeats the run (torch's own dropout draws other elements).
    """
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout(): p is a probability and has to be between 0 and 1, but got {p}")
    if not training:
        return F.dropout(input, p, False, inplace)
    if inplace:
        return _torch_dropout(
            input, p, inplace, seed, backend, "inplace=True changes the input, which no kernel here does"
        )
    if seed is None:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return _torch_dropout(input, p, inplace, seed, backend, "a traced call cannot draw a new seed each time")
        if backends.chosen(backend) == "torch" or input.dtype not in FLOATING:
            return _torch_dropout(input, p, inplace, seed, backend, "torch was named, or has the only kernel")
        seed = int(torch.randint(2**63 - 1, ()))
    return _activation.dropout.call(input, p, seed, backend)


def _torch_dropout(
    input: Tensor, p: float, inplace: bool, seed: int | None, backend: str | None, reason: str
) -> Tensor:
    if seed is not None:
        raise RuntimeError(f"dropout(): seed={seed} cannot be honoured: {reason}. Leave out seed or inplace.")
    backends.torch_serves("dropout", (input,), backend, reason)
    return F.dropout(input, p, True, inplace)


# Softmax and losses


def _implicit_dim(name: str, input: Tensor, stacklevel: int) -> int:
    """torch's deprecated choice of a dimension."""
    warnings.warn(
        f"Implicit dimension choice for {name} has been deprecated. Change the call to include dim=X as an argument.",
        stacklevel=stacklevel,
    )
    return 0 if input.dim() in (0, 1, 3) else 1


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """exp(input) / Σ exp(input) along dim, computed in dtype if given. IndexError if dim is out of range."""
    if dim is None:
        dim = _implicit_dim("softmax", input, _stacklevel)
    return _softmax.softmax.call(input if dtype is None else input.to(dtype), dim, backend)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """log(softmax(input)) along dim, computed in dtype if given. IndexError if dim is out of range."""
    if dim is None:
        dim = _implicit_dim("log_softmax", input, _stacklevel)
    return _softmax.log_softmax.call(input if dtype is None else input.to(dtype), dim, backend)


def _reduction_name(op: str, size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    _softmax.check_reduction(op, reduction)
    return reduction


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy between unnormalised logits and a target, without storing the probabilities.

    input (C), (N, C) or (N, C, d1, …); target: class indices (int64) of shape (), (N) or (N, d1, …), or class
    probabilities of input's shape; weight (C). → a scalar, or with reduction="none" one loss a row.
    Raises IndexError for a class index outside [0, C) that is not ignore_index.
    """
    reduction = _reduction_name("cross_entropy", size_average, reduce, reduction)
    return _softmax.cross_entropy.call(input, target, weight, ignore_index, reduction, label_smoothing, backend)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """Negative log-likelihood of log-probabilities: shapes and errors as cross_entropy, class indices only."""
    reduction = _reduction_name("nll_loss", size_average, reduce, reduction)
    return _softmax.nll_loss.call(input, target, weight, ignore_index, reduction, backend)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Mean (or sum, or each) of (input - target)², broadcast, with torch's warning if the shapes differ."""
    reduction = _reduction_name("mse_loss", size_average, reduce, reduction)
    if weight is not None:
        backends.torch_serves("mse_loss", (input, target, weight), backend, "a weight has no fastnn kernel")
        by_torch: Callable[..., Tensor] = F.mse_loss  # whose stub lacks the weight
        return by_torch(input, target, reduction=reduction, weight=weight)
    if target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. Please ensure they have the same size.",
            stacklevel=2,
        )
        input, target = torch.broadcast_tensors(input, target)
    return _softmax.mse_loss.call(input, target, reduction, backend)


# Recurrent layers: the arguments of torch.lstm, torch.gru, … and of torch.lstm_cell, …

_recurrent = _rnn.recurrent.call


def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LSTM layers, by torch.lstm's rules: output, last states and last cells.

    input (T, B, I), or (B, T, I) if batch_first, or with ``batch_sizes`` a PackedSequence's data (N, I); hx: states
    (L·D, B, H) and cells (L·D, B, H), with a projection (L·D, B, P) and (L·D, B, H), of L layers in D directions;
    params: for each layer and direction w_ih, w_hh, b_ih, b_hh, w_hr, as far as they exist.
    ``recompute``: for the backward only outputs are kept, and each layer's gates are made again when its turn comes: a
    third more time, and 5·T·B·H numbers in all instead of a layer.
    Raises RuntimeError for shapes, dtypes or devices that do not match, and for no steps.
    """
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return _layers("lstm", input, hx[0], hx[1], params, *options, batch_sizes, recompute, backend)


def gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """GRU layers, by torch.gru's rules: output and last states. Arguments as lstm's, without cells and projection."""
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return _layers("gru", input, hx, None, params, *options, batch_sizes, recompute, backend)[:2]


def rnn_tanh(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman layers with tanh, by torch.rnn_tanh's rules: output and last states. Arguments as gru's."""
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return _layers("rnn_tanh", input, hx, None, params, *options, batch_sizes, recompute, backend)[:2]


def rnn_relu(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman layers with relu, by torch.rnn_relu's rules: output and last states. Arguments as gru's."""
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return _layers("rnn_relu", input, hx, None, params, *options, batch_sizes, recompute, backend)[:2]


def _only_torch(op: str, input: Tensor, backend: str | None) -> str | None:
    """Why torch serves a recurrent layer whole, rather than step by step as plain maths"""
    if input.dtype not in FLOATING:
        return f"dtype {input.dtype} has no fastnn kernel"
    if not (input.is_cpu or is_dynamo_compiling()):
        return f"there is no kernel for {op} on device {str(input.device)!r}"
    if op != "lstm" and torch.is_autocast_enabled("cpu"):
        return f"what autocast does inside {op} is torch's"
    named = backend if is_dynamo_compiling() else backend or backends.context()
    return "backend 'torch' was named" if named == "torch" else None


def _layers(
    mode: str,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    recompute: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    reason = _only_torch(mode, input, backend)
    if reason is not None:
        backends.torch_serves(mode, (input, hx), backend, reason)
        initial = hx if cx is None else (hx, cx)
        options = (params, has_biases, num_layers, dropout, train, bidirectional)
        by_torch = getattr(_VF, mode)
        if batch_sizes is not None:
            return by_torch(input, batch_sizes, initial, *options)
        return by_torch(input, initial, *options, batch_first)
    if batch_sizes is not None:
        rows = input
    elif input.dim() != 3:
        raise RuntimeError(f"{mode}(): input must have 3 dimensions, got shape {tuple(input.shape)}")
    else:
        steps, batch, size = (input := input.transpose(0, 1) if batch_first else input).shape
        if steps == 0:
            raise RuntimeError(f"{mode}(): Expected sequence length to be larger than 0 in RNN, got {tuple(input.shape)}")
        rows = input.reshape(steps * batch, size)
    directions = 2 if bidirectional else 1
    count = len(params) // (num_layers * directions)
    least = 4 if has_biases else 2
    most = least + 1 if mode == "lstm" else least
    if len(params) != count * num_layers * directions or not least <= count <= most:
        raise RuntimeError(
            f"{mode}(): params must have {least} tensors for each of {num_layers} layers and {directions} directions"
            f"{', or one more for a projection' if most > least else ''}, got {len(params)}"
        )
    for name, state in (("hx", hx), ("cx", cx)):
        if state is not None and (state.dim() != 3 or state.shape[0] != num_layers * directions):
            raise RuntimeError(
                f"{mode}(): {name} must have 3 dimensions, the first {num_layers * directions}, got {tuple(state.shape)}"
            )
    keep = not recompute and torch.is_grad_enabled() and _any_requires_grad(input, hx, cx, *params)
    states, cells = hx.unbind(0), cx.unbind(0) if cx is not None else ()
    last: list[Tensor] = []
    last_cells: list[Tensor] = []
    for layer in range(num_layers):
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            w_ih, w_hh, *rest = params[k * count : (k + 1) * count]
            y, h_n, c_n = _recurrent(
                rows,
                states[k],
                cells[k] if cells else None,
                w_ih,
                w_hh,
                *(rest[:2] if has_biases else (None, None)),
                rest[-1] if count > least else None,
                batch_sizes,
                mode,
                k % directions == 1,
                keep,
                backend,
            )
            outputs.append(y)
            last.append(h_n)
            last_cells.append(c_n)
        rows = outputs[0] if directions == 1 else torch.cat(outputs, 1)
        if train and dropout > 0 and layer < num_layers - 1:  # torch's own, so that a seed gives torch's own mask
            rows = F.dropout(rows, dropout, True)
    if batch_sizes is None:
        rows = rows.view(steps, batch, rows.shape[1])
        rows = rows.transpose(0, 1) if batch_first else rows
    if len(last) == 1:
        return rows, last[0].unsqueeze(0), last_cells[0].unsqueeze(0)
    return rows, torch.stack(last), torch.stack(last_cells) if cells else last_cells[0]


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: input (B, I), hx = (state, cell), each (B, H) → (state, cell)."""
    state, cell = hx
    reason = _only_torch("lstm_cell", input, backend)
    if reason is not None:
        backends.torch_serves("lstm_cell", (input, state, cell), backend, reason)
        return _VF.lstm_cell(input, (state, cell), w_ih, w_hh, b_ih, b_hh)
    keep = torch.is_grad_enabled() and _any_requires_grad(input, state, cell, w_ih, w_hh, b_ih, b_hh)
    out = _recurrent(input, state, cell, w_ih, w_hh, b_ih, b_hh, None, None, "lstm", False, keep, backend)
    return out[1], out[2]


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of a GRU: input (B, I), hx (B, H) → (B, H)."""
    return _cell("gru", input, hx, w_ih, w_hh, b_ih, b_hh, backend)


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of an Elman network with tanh: input (B, I), hx (B, H) → (B, H)."""
    return _cell("rnn_tanh", input, hx, w_ih, w_hh, b_ih, b_hh, backend)


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of an Elman network with relu: input (B, I), hx (B, H) → (B, H)."""
    return _cell("rnn_relu", input, hx, w_ih, w_hh, b_ih, b_hh, backend)


def _cell(
    mode: str,
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    backend: str | None,
) -> Tensor:
    reason = _only_torch(f"{mode}_cell", input, backend)
    if reason is not None:
        backends.torch_serves(f"{mode}_cell", (input, hx), backend, reason)
        return getattr(_VF, f"{mode}_cell")(input, hx, w_ih, w_hh, b_ih, b_hh)
    keep = torch.is_grad_enabled() and _any_requires_grad(input, hx, w_ih, w_hh, b_ih, b_hh)
    return _recurrent(input, hx, None, w_ih, w_hh, b_ih, b_hh, None, None, mode, False, keep, backend)[1]
# Pooling: each function of torch's three is the general one with the number of dimensions filled in. An output is
# channels_last where the input is, in three dimensions too. lp_pool is our average between torch's powers.

_Sizes = int | Sequence[int]


def _sizes(op: str, name: str, value: Any, dims: int) -> list[int]:
    """`value` for each dimension: an int for all, or a sequence."""
    if type(value) is int:
        return [value] * dims
    values = list(value) if isinstance(value, (tuple, list, torch.Size)) else [value] * dims
    if not all(isinstance(v, (int, torch.SymInt)) for v in values):
        raise TypeError(f"{op}(): argument '{name}' must be an int or a tuple of ints, got {value!r}")
    if len(values) == 1:
        values *= dims
    if len(values) != dims:
        raise RuntimeError(f"{op}(): {name} must be an int or a tuple of {dims} ints, got {len(values)}: {tuple(values)}")
    return values


def _autocast_3d(input: Tensor, dims: int) -> Tensor:
    """torch's autocast pools in float32 in three dimensions, and leaves the dtype in fewer."""
    lower = dims == 3 and isinstance(input, Tensor) and input.dtype in (torch.bfloat16, torch.float16)
    return input.float() if lower and torch.is_autocast_enabled("cpu") else input


def _max(name: str, dims: int) -> Callable[..., Any]:
    def max_pool(
        input: Tensor,
        kernel_size: _Sizes,
        stride: _Sizes | None = None,
        padding: _Sizes = 0,
        dilation: _Sizes = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
        *,
        backend: str | None = None,
    ) -> Any:
        """The maximum of each window; with return_indices also where it is, counted through the image.

        input (N, C, …) or (C, …). A NaN in a window is its maximum. RuntimeError for a window that does not fit, a
        padding over half the window, a stride that is not positive.
        """
        size = _sizes(name, "kernel_size", kernel_size, dims)
        window = (
            size,
            size if stride is None or stride == () or stride == [] else _sizes(name, "stride", stride, dims),
            _sizes(name, "padding", padding, dims),
            _sizes(name, "dilation", dilation, dims),
            ceil_mode,
        )
        op = _pool.max_pool_with_indices if return_indices else _pool.max_pool
        return op.call(_autocast_3d(input, dims), False, *window, backend)

    return _named(max_pool, name)


def _average(name: str, dims: int) -> Callable[..., Tensor]:
    def average(
        input: Tensor,
        kernel_size: _Sizes,
        stride: _Sizes | None,
        padding: _Sizes,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor: int | None,
        backend: str | None,
    ) -> Tensor:
        size = _sizes(name, "kernel_size", kernel_size, dims)
        steps = size if stride is None or stride == () or stride == [] else _sizes(name, "stride", stride, dims)
        if divisor == 0:
            raise RuntimeError(f"{name}(): divisor_override must not be zero, got 0")
        pads = _sizes(name, "padding", padding, dims)
        input = _autocast_3d(input, dims)
        return _pool.avg_pool.call(input, False, size, steps, pads, ceil_mode, count_include_pad, divisor or 0, backend)

    def avg_pool1d(
        input: Tensor,
        kernel_size: _Sizes,
        stride: _Sizes | None = None,
        padding: _Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """The mean of each window. input (N, C, L) or (C, L). Errors as max_pool1d."""
        return average(input, kernel_size, stride, padding, ceil_mode, count_include_pad, None, backend)

    def avg_pool(
        input: Tensor,
        kernel_size: _Sizes,
        stride: _Sizes | None = None,
        padding: _Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """The mean of each window, or its sum over divisor_override. input (N, C, …) or (C, …). Errors as max_pool."""
        return average(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, backend)

    return _named(avg_pool1d if dims == 1 else avg_pool, name)


def _adaptive_sizes(name: str, input: Tensor, output_size: Any, dims: int) -> list[int]:
    """None stands for the input's size, which torch allows in two and three dimensions."""
    if isinstance(output_size, (tuple, list)) and len(output_size) == dims > 1 and isinstance(input, Tensor):
        if len(output_size) >= input.dim():
            raise ValueError(f"{name}(): input must have at least {dims + 1} dimensions, got {tuple(input.shape)}")
        output_size = [n if o is None else o for o, n in zip(output_size, input.shape[-dims:], strict=True)]
    if isinstance(output_size, (tuple, list)) and len(output_size) != dims:
        raise RuntimeError(f"{name}(): output_size must have {dims} numbers, got {len(output_size)}: {output_size}")
    return _sizes(name, "output_size", output_size, dims)


def _adaptive_max(name: str, dims: int) -> Callable[..., Any]:
    def adaptive_max_pool(
        input: Tensor, output_size: Any, return_indices: bool = False, *, backend: str | None = None
    ) -> Any:
        """The maxima of windows that divide the input, (N, C, …) or (C, …), evenly; with return_indices also where."""
        size = _adaptive_sizes(name, input, output_size, dims)
        op = _pool.max_pool_with_indices if return_indices else _pool.max_pool
        return op.call(_autocast_3d(input, dims), True, size, [], [], [], False, backend)

    return _named(adaptive_max_pool, name)


def _adaptive_average(name: str, dims: int) -> Callable[..., Tensor]:
    def adaptive_avg_pool(input: Tensor, output_size: Any, *, backend: str | None = None) -> Tensor:
        """The means of windows that divide the input, (N, C, …) or (C, …), evenly."""
        size = _adaptive_sizes(name, input, output_size, dims)
        return _pool.avg_pool.call(_autocast_3d(input, dims), True, size, [], [], False, True, 0, backend)

    return _named(adaptive_avg_pool, name)


def _power_average(name: str, dims: int) -> Callable[..., Tensor]:
    maximum = (max_pool1d, max_pool2d, max_pool3d)[dims - 1]
    average = (avg_pool1d, avg_pool2d, avg_pool3d)[dims - 1]

    def lp_pool(
        input: Tensor,
        norm_type: float,
        kernel_size: _Sizes,
        stride: _Sizes | None = None,
        ceil_mode: bool = False,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """(Σ x^norm_type)^(1 / norm_type) over each window; the largest or smallest magnitude for ±inf."""
        if norm_type == float("inf"):
            return maximum(input.abs(), kernel_size, stride, 0, 1, ceil_mode, backend=backend)
        if norm_type == -float("inf"):
            return -maximum(-input.abs(), kernel_size, stride, 0, 1, ceil_mode, backend=backend)
        mean = average(input.pow(norm_type), kernel_size, stride, 0, ceil_mode, backend=backend)
        count = 1
        for k in _sizes(name, "kernel_size", kernel_size, dims):
            count *= k
        return (torch.sign(mean) * F.relu(torch.abs(mean))).mul(count).pow(1.0 / norm_type)

    return _named(lp_pool, name)


def _unpooled(
    name: str, input: Tensor, size: list[int], steps: list[int], pads: list[int], wanted: Sequence[int] | None
) -> list[int]:
    """The spatial size of max_unpool's output; torch's own function for it cannot be traced by torch.compile."""
    dims = len(size)
    usual = [(n - 1) * s - 2 * p + k for n, s, p, k in zip(input.shape[-dims:], steps, pads, size, strict=True)]
    found = usual if wanted is None else list(wanted)[2:] if len(wanted) == dims + 2 else list(wanted)
    if len(found) != dims:
        raise ValueError(f"{name}(): output_size must have {dims} or {dims + 2} numbers, got {len(found)}: {found}")
    for d, (n, default, step) in enumerate(zip(found, usual, steps, strict=True)):
        if n < 0 or (wanted is not None and not default - step < n < default + step):
            raise ValueError(
                f"{name}(): output_size got {found}, dimension {d} must be between {default - step} and {default + step}"
            )
    return found


def _unpool(name: str, dims: int) -> Callable[..., Tensor]:
    def max_unpool(
        input: Tensor,
        indices: Tensor,
        kernel_size: _Sizes,
        stride: _Sizes | None = None,
        padding: _Sizes = 0,
        output_size: Sequence[int] | None = None,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """Each of input's pixels where the index says, among zeros: what max_pool with return_indices took apart.

        RuntimeError for an index outside the output, ValueError for an output_size that no such pooling has.
        """
        size = _sizes(name, "kernel_size", kernel_size, dims)
        steps = size if stride is None else _sizes(name, "stride", stride, dims)
        pads = _sizes(name, "padding", padding, dims)
        if input.dim() in (dims + 1, dims + 2):
            wanted = _unpooled(name, input, size, steps, pads, output_size)
        else:
            wanted = [0] * dims  # the op says what is wrong
        return _pool.max_unpool.call(input, indices, list(wanted), backend)

    return _named(max_unpool, name)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    return function


def _each(make: Callable[[str, int], Callable[..., Any]], kind: str) -> list[Callable[..., Any]]:
    return [make(f"{kind}{dims}d", dims) for dims in (1, 2, 3)]


max_pool1d, max_pool2d, max_pool3d = _each(_max, "max_pool")
avg_pool1d, avg_pool2d, avg_pool3d = _each(_average, "avg_pool")
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = _each(_adaptive_max, "adaptive_max_pool")
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = _each(_adaptive_average, "adaptive_avg_pool")
lp_pool1d, lp_pool2d, lp_pool3d = _each(_power_average, "lp_pool")
max_unpool1d, max_unpool2d, max_unpool3d = _each(_unpool, "max_unpool")


# Normalisation


def _update(running: Tensor, value: Tensor, momentum: float) -> None:
    running.mul_(1 - momentum).add_(value.to(running.dtype), alpha=momentum)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """input (N, C, …), normalised a channel: by the batch's moments in training, else by the running ones.

    Running statistics that are given are updated in training, with the unbiased variance. ValueError where a channel
    has a single value in training, or eps is not positive; RuntimeError for parameters of another size.
    """
    if training:
        if isinstance(input, Tensor) and input.dim() > 1 and input.numel() == input.shape[1]:
            raise ValueError(
                f"batch_norm(): Expected more than 1 value per channel when training, got input size {tuple(input.shape)}"
            )
        if eps <= 0:
            raise ValueError(f"batch_norm(): eps must be positive during training, but got {eps}")
    elif eps < 0:
        raise ValueError(f"batch_norm(): eps must be non-negative, but got {eps}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm(): running_mean and running_var must either both be None or neither be None")
    if not training and running_mean is None:
        raise RuntimeError("batch_norm(): running_mean must be defined in evaluation mode, got None")
    if not training:
        return _norm.batch_norm.call(input, weight, bias, running_mean, running_var, eps, backend)[0]
    out, stats = _norm.batch_norm.call(input, weight, bias, None, None, eps, backend)
    if running_mean is not None and running_var is not None:
        channels = (input.shape[1],)
        if running_mean.shape != channels or running_var.shape != channels:
            raise RuntimeError(
                f"batch_norm(): running_mean and running_var should contain {channels[0]} elements, not "
                f"{running_mean.numel()} and {running_var.numel()}"
            )
        if input.numel():
            count = input.numel() // channels[0]
            with torch.no_grad():
                _update(running_mean, stats[0], momentum)
                _update(running_var, stats[1] * (count / (count - 1)), momentum)
    return out


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """input (N, C, …), each image's channels normalised in num_groups groups; weight and bias (C).

    RuntimeError where num_groups does not divide C, ValueError where a group has a single value in a single image.
    """
    if isinstance(input, Tensor) and input.dim() > 1 and num_groups > 0 and input.numel() == num_groups:
        raise ValueError(
            "group_norm(): Expected more than 1 value per channel when training, got input size "
            f"{tuple(input.shape)} and num_groups={num_groups}"
        )
    return _norm.group_norm.call(input, weight, bias, num_groups, eps, backend)[0]


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """input (N, C, …), each image's channel normalised by itself, or with use_input_stats=False by the running moments.

    Running statistics that are given take the mean over the batch of each image's. ValueError where an image has a
    single pixel, RuntimeError for parameters of another size.
    """
    named = backend if is_dynamo_compiling() else backend or backends.context()
    if named == "torch":  # whose group_norm is not its instance_norm: less exact for large means
        backends.torch_serves("instance_norm", (input,), backend, "backend 'torch' was named")
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise RuntimeError(
                "instance_norm(): Expected running_mean and running_var to be defined when use_input_stats is false"
            )
        return _norm.batch_norm.call(input, weight, bias, running_mean, running_var, eps, backend)[0]
    if isinstance(input, Tensor) and input.dim() > 1 and input.shape[2:].numel() == 1:
        raise ValueError(
            f"instance_norm(): Expected more than 1 spatial element when training, got input size {tuple(input.shape)}"
        )
    channels = input.shape[1] if isinstance(input, Tensor) and input.dim() > 1 else 1
    out, stats = _norm.group_norm.call(input, weight, bias, channels, eps, backend)
    for running in (running_mean, running_var):
        if running is not None and running.shape != (channels,):
            raise RuntimeError(
                f"instance_norm(): running_mean and running_var should contain {channels} elements, not {running.numel()}"
            )
    if input.numel():
        count = input.shape[2:].numel()
        with torch.no_grad():
            if running_mean is not None:
                _update(running_mean, stats[0].mean(0), momentum)
            if running_var is not None:
                _update(running_var, stats[1].mean(0) * (count / (count - 1)), momentum)
    return out


def qrnn(
    input: Tensor,
    hx: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    window: int = 2,
    pooling: str = "fo",
    zoneout: float = 0.0,
    train: bool = False,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One direction of a quasi-recurrent layer (Bradbury et al. 2016): output and last cell.

    input (T, B, I), hx (B, H); weight (G·H, window·I), bias (G·H), of the candidate and the gates f, o, i in this order, as
    many as ``pooling`` has: "f", "fo", "ifo". A step sees itself and the window - 1 before it (``reverse``: after it), the
    oldest first. ``zoneout``: the chance that a unit keeps its cell at a step, in training (section 2.2); else nothing.
    → (T, B, H), (B, H). Raises RuntimeError for shapes that do not match, ValueError for an unknown pooling.
    """
    if pooling not in ("f", "fo", "ifo"):
        raise ValueError(f"qrnn(): pooling got {pooling!r}, allowed are 'f', 'fo', 'ifo'")
    if input.dim() != 3 or hx.dim() != 2 or input.shape[1] != hx.shape[0] or window < 1:
        raise RuntimeError(
            f"qrnn(): input must be (T, B, I), hx (B, H) and window 1 or more, got {tuple(input.shape)}, {tuple(hx.shape)} "
            f"and {window}"
        )
    gates, units = 1 + len(pooling), hx.shape[1]
    if weight.shape != (gates * units, window * input.shape[2]):
        raise RuntimeError(
            f"qrnn(): weight must have shape {(gates * units, window * input.shape[2])}, got {tuple(weight.shape)}"
        )
    steps = input.shape[0]
    if window > 1:
        padded = F.pad(input, (0, 0, 0, 0, 0, window - 1) if reverse else (0, 0, 0, 0, window - 1, 0))
        views = [padded[k : k + steps] for k in range(window)]
        input = torch.cat(views[::-1] if reverse else views, 2)
    z, f, *others = linear(input, weight, bias, backend=backend).chunk(gates, 2)
    z, f = tanh(z, backend=backend), sigmoid(f, backend=backend)
    if train and zoneout > 0:
        f = 1 - (1 - f) * torch.empty_like(f).bernoulli_(1 - zoneout)
    if pooling == "ifo":
        u = sigmoid(others[1], backend=backend) * z
    else:
        u = (1 - f) * z
    c = _rnn.scan(f, u, hx, reverse, backend=backend)
    return c if pooling == "f" else sigmoid(others[0], backend=backend) * c, c[0 if reverse else -1]
