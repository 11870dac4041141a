"""Batch, group, instance, layer and root-mean-square normalisation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import backends
from ..ops import norm as _norm
from ..ops._operator import Operator


def _update(running: Tensor, value: Tensor, momentum: float) -> None:
    running.mul_(1 - momentum).add_(value.to(running.dtype), alpha=momentum)


def _check_running(op: str, mean: Tensor | None, var: Tensor | None) -> None:
    if (mean is None) != (var is None):
        raise ValueError(f"{op}(): running_mean and running_var must either both be None or neither be None")
    for name, running in (("running_mean", mean), ("running_var", var)):
        if getattr(running, "requires_grad", False) and torch.is_grad_enabled():
            raise RuntimeError(f"{op}(): is not differentiable with respect to {name}, which must not require a gradient")


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
        if isinstance(input, Tensor) and input.dim() > 1 and input.shape[0] * input.shape[2:].numel() == 1:
            raise ValueError(
                f"batch_norm(): Expected more than 1 value per channel when training, got input size {tuple(input.shape)}"
            )
        if eps <= 0:
            raise ValueError(f"batch_norm(): eps must be positive during training, but got {eps}")
    elif eps < 0:
        raise ValueError(f"batch_norm(): eps must be non-negative, but got {eps}")
    if not training and (running_mean is None or running_var is None):
        name = "running_mean" if running_mean is None else "running_var"
        raise RuntimeError(f"batch_norm(): {name} must be defined in evaluation mode, got None")
    _check_running("batch_norm", running_mean, running_var)
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
    _check_running("instance_norm", running_mean, running_var)
    named = backend if is_dynamo_compiling() else backend or backends.context()
    empty = isinstance(input, Tensor) and input.numel() == 0
    if named == "torch" or empty:  # torch's group_norm is not its instance_norm: less exact for large means
        reason = "an empty input has no mean" if empty else "backend 'torch' was named"
        backends.torch_serves("instance_norm", (input,), backend, reason)
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


def _rows(op: Operator, added: Operator, input: Tensor, residual: Tensor | None, return_sum: bool, backend: str | None,
          shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:  # fmt: skip
    if type(shape) is not tuple:
        if not isinstance(shape, (tuple, list)):
            raise TypeError(f"{op.name}(): argument 'normalized_shape' must be tuple of ints, not {type(shape).__name__}")
        shape = tuple(shape)
    if residual is None:
        out = op.call(input, weight, bias, shape, eps, backend)
        return (out, input) if return_sum else out
    out, total = added.call(input, residual, weight, bias, shape, eps, backend)
    return (out, total) if return_sum else out


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    return_sum: bool = False,
    backend: str | None = None,
) -> Any:
    """Each row (the dimensions of normalized_shape, the last ones) less its mean, divided by its deviation (Ba, Kiros and Hinton
    2016, arXiv:1607.06450); times weight, plus bias, both of normalized_shape.

    residual, of input's shape and dtype, is first added to input, in the same pass; with return_sum the result is (output, sum).
    RuntimeError where shapes do not match.
    """
    ops = (_norm.layer_norm, _norm.add_layer_norm)
    return _rows(*ops, input, residual, return_sum, backend, normalized_shape, weight, bias, eps)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    return_sum: bool = False,
    backend: str | None = None,
) -> Any:
    """Each row (the dimensions of normalized_shape, the last ones) divided by the root of its mean square (Zhang and Sennrich
    2019, arXiv:1910.07467); times weight, of normalized_shape. eps: by default that of the type that is computed in.

    residual and return_sum as for ``layer_norm``. RuntimeError where shapes do not match, ValueError for too few dimensions.
    """
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    ops = (_norm.rms_norm, _norm.add_rms_norm)
    return _rows(*ops, input, residual, return_sum, backend, normalized_shape, weight, None, eps)
