"""torch.nn.functional's and torch's names, signatures, defaults and errors, served by fastnn's kernels.

Every function also takes, by keyword, `backend` ("auto", "cpu", "gpu", "torch" or "reference": see fastnn.backend).
Floating dtypes (float32, float64, bfloat16, float16) on dense tensors have kernels; whatever else torch accepts is
served by torch, and `fastnn.trace()` says why. Errors are of torch's types: RuntimeError for shapes and dtypes that do
not match, IndexError for a dimension or class out of range, ValueError for an unknown name, TypeError for a non-tensor.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from . import backends
from .ops import activation as _activation
from .ops import conv as _conv
from .ops import matmul as _matmul
from .ops import softmax as _softmax
from .ops._operator import FLOATING, PLAIN

__all__ = [
    "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "cross_entropy", "dropout", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh",
    "leaky_relu", "linear", "log_softmax", "matmul", "mish", "mm", "mse_loss", "mv", "nll_loss", "prelu", "relu",
    "relu6", "sigmoid", "silu", "softmax", "softplus", "tanh",
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
