"""Softmax and losses."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from .. import backends
from ..ops import softmax as _softmax
from ._arguments import any_requires_grad


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


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), without the array of all logits, in either direction.

    input (N, in_features) or (in_features), linear_weight (C, in_features), linear_bias (C), target: class indices (int64) of
    shape (N) or (); weight (C) → a scalar, or with reduction="none" one loss a row. Extra memory: the logits of a chunk of
    rows, and, where gradients are wanted, that of linear_weight, made in the forward (Hsu et al. 2024, "Liger Kernel",
    section 3.2). torch (from 2.13 on) has the same function, whose ``options`` mean nothing here. Class probabilities and
    losses of several dimensions hold all logits.
    Raises RuntimeError for shapes and dtypes that do not fit, IndexError for a class index outside [0, C) that is not
    ignore_index (-100 unless given), ValueError for an unknown reduction.
    """
    gradients = torch.is_grad_enabled() and any_requires_grad(input, linear_weight, linear_bias)
    loss = _softmax.linear_cross_entropy.call(
        input, linear_weight, linear_bias, target, weight, -100 if ignore_index is None else ignore_index, reduction,
        label_smoothing, gradients and reduction != "none", backend,
    )  # fmt: skip
    return loss.float() if torch.is_autocast_enabled(loss.device.type) and loss.itemsize == 2 else loss


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
