"""Matrix products as plain maths: what the fast kernels must equal. Differentiable any number of times."""

import torch
from torch import Tensor

from fastnn.kernels.reference.activation import activation as _activation


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """Sum over the shared dimension of all products, with torch.matmul's rules for vectors and batches."""
    a = input.unsqueeze(0) if input.dim() == 1 else input
    b = other.unsqueeze(1) if other.dim() == 1 else other
    product = torch.einsum("...mk,...kn->...mn", a, b)
    if input.dim() == 1:
        product = product.squeeze(-2)
    return product.squeeze(-1) if other.dim() == 1 else product


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    if alpha == 0 and mat1.dim() == 2:  # torch then ignores the product, and with beta 0 input, NaN and Inf included
        return (beta * input if beta != 0 else torch.zeros_like(input)).expand(mat1.shape[0], mat2.shape[1]).clone()
    product = alpha * matmul(mat1, mat2)
    return product + beta * input if beta != 0 else product  # with beta 0 torch ignores input, NaN included


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    z = matmul(input, weight.mT)
    if bias is not None:
        z = z + bias
    if residual is not None:
        z = z + residual
    return z if activation is None else _activation(z, activation)
