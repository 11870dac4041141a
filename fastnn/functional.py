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
from torch import Tensor
from torch.nn import _reduction

from . import backends
from .ops import activation as _activation
from .ops import matmul as _matmul
from .ops import norm as _norm
from .ops import pool as _pool
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
    "cross_entropy",
    "dropout",
    "elu",
    "gelu",
    "glu",
    "group_norm",
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
    "relu",
    "relu6",
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


# Pooling: each function of torch's three is the general one with the number of dimensions filled in. An output is
# channels_last where the input is, in three dimensions too. lp_pool is our average between torch's powers.

_Sizes = int | Sequence[int]
_unpool_output_size: Callable[..., Sequence[int]] = getattr(F, "_unpool_output_size")  # noqa: B009  # torch has no stub


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
            wanted = _unpool_output_size(input, size, steps, pads, output_size)
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
