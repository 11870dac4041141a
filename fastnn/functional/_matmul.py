"""Matrix products, forward and with a fused epilogue."""

import torch
from torch import Tensor

from .. import backends
from ..ops import activation as _activation
from ..ops import matmul as _matmul
from ..ops._operator import FLOATING, PLAIN
from ._arguments import any_requires_grad

_matmul_call, _linear_call, _activation_call = _matmul.matmul.call, _matmul.linear.call, _activation.activation.call


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
        _need_factors("mm", input=(input, 2), mat2=(mat2, 2))
    try:
        return matmul(input, mat2, out=out, backend=backend)
    except RuntimeError:  # asked only now, as torch.jit.trace would keep every look at a size
        _need_factors("mm", input=(input, 2), mat2=(mat2, 2))
        raise


def bmm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """input (B, M, K) @ mat2 (B, K, N) → (B, M, N); the batch is not broadcast."""
    _need_factors("bmm", input=(input, 3), mat2=(mat2, 3))
    return matmul(input, mat2, out=out, backend=backend)


def mv(input: Tensor, vec: Tensor, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """input (M, K) @ vec (K) → (M)."""
    _need_factors("mv", input=(input, 2), vec=(vec, 1))
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
    _need_factors("addmm", mat1=(mat1, 2), mat2=(mat2, 2))
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
    _need_factors("baddbmm", batch1=(batch1, 3), batch2=(batch2, 3))
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
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}(): argument 'input' must be Tensor, not {type(input).__name__}")
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
    if activation is not None and torch.is_grad_enabled() and any_requires_grad(input, weight, bias, residual):
        if activation not in _activation.PARAMETERLESS:
            _matmul.linear.check(input, weight, bias, residual, activation)
        z = _linear_call(input, weight, bias, residual, None, backend)
        return _activation_call(z, activation, (), backend)
    return _linear_call(input, weight, bias, residual, activation, backend)


def _need_factors(op: str, **factors: tuple[Tensor, int]) -> None:
    """That the two tensors have so many dimensions and can be multiplied, in torch's names for them: matmul has its own."""
    for name, (tensor, dims) in factors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(tensor).__name__}")
        if tensor.dim() != dims:
            kind = ("", "a vector", "a matrix", "a batch of matrices (3 dimensions)")[dims]
            raise RuntimeError(f"{op}(): {name} must be {kind}, got shape {tuple(tensor.shape)}")
    (left, (a, _)), (right, (b, dims)) = factors.items()
    both = f"{tuple(a.shape)} and {tuple(b.shape)}"
    shapes = f"{op}(): shapes of {left} and {right} cannot be multiplied ({both}): {right} must have"
    inner = -2 if dims > 1 else 0
    if a.shape[-1] != b.shape[inner]:
        raise RuntimeError(f"{shapes} {a.shape[-1]} {'rows' if dims > 1 else 'elements'}, got {b.shape[inner]}")
    if dims == 3 and a.shape[0] != b.shape[0]:
        raise RuntimeError(f"{shapes} {left}'s batch size {a.shape[0]}, got {b.shape[0]}")
    if a.device != b.device:
        raise RuntimeError(f"{op}(): {right} must be on {left}'s device, {a.device}, got {b.device}")
    if a.dtype != b.dtype and not torch.is_autocast_enabled(a.device.type):
        raise RuntimeError(f"{op}(): {right} must have the same dtype as {left}, {a.dtype}, got {b.dtype}")
