"""Rows of a table by their numbers, as plain maths: what the fast kernels must equal. Differentiable any number of times."""

import torch
from torch import Tensor


def embedding(weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """weight[indices]; gradients of rows numbered padding_idx go nowhere, others are divided by how often a row was taken."""
    rows = weight[indices]
    if padding_idx >= 0:
        is_padding = (indices == padding_idx).unsqueeze(-1)
        rows = torch.where(is_padding, rows.detach(), rows)
    if scale_grad_by_freq:
        share = 1 / torch.bincount(indices.flatten(), minlength=weight.shape[0]).to(weight.dtype)[indices].unsqueeze(-1)
        rows = rows * share + (rows * (1 - share)).detach()
    return rows


def embedding_backward(grad: Tensor, indices: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """The sum of grad's rows for each row of the table"""
    indices, grad = indices.flatten(), grad.reshape(indices.numel(), grad.shape[-1])
    if scale_grad_by_freq:
        grad = grad / torch.bincount(indices, minlength=rows).to(grad.dtype)[indices].unsqueeze(-1)
    if padding_idx >= 0:
        grad = grad.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    return grad.new_zeros(rows, grad.shape[-1]).index_add(0, indices, grad)
