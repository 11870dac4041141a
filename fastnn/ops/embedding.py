"""Rows of a table by their numbers, with the backward."""

from typing import Any

import torch
from torch import Tensor

from ._operator import Operator
from .activation import aten, only_torch


def _check_indices(op: str, indices: Tensor) -> None:
    if indices.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{op}(): indices must have dtype torch.int64 or torch.int32, got {indices.dtype}")


def _check(weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> str | None:
    if weight.dim() != 2:
        raise RuntimeError(f"embedding(): 'weight' must be 2-D, (rows, size), got shape {tuple(weight.shape)}")
    _check_indices("embedding", indices)
    return only_torch(weight.dtype)


def _explain(weight: Tensor, indices: Tensor, *rest: Any) -> None:
    """What torch's error for a number out of range does not say: which"""
    wrong = indices[(indices < 0) | (indices >= weight.shape[0])]
    if wrong.numel():
        raise IndexError(f"embedding(): index out of range: got {int(wrong[0])}, allowed are 0 to {weight.shape[0] - 1}")


def _check_backward(grad: Tensor, indices: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool) -> str | None:
    _check_indices("embedding_backward", indices)
    if grad.dim() == 0 or grad.shape[:-1] != indices.shape:
        raise RuntimeError(
            f"embedding_backward(): grad must have shape {(*indices.shape, 'size')}, got {tuple(grad.shape)}"
        )
    return only_torch(grad.dtype)


def _save(ctx: Any, args: Any, out: Tensor) -> None:
    weight, indices, *ctx.rest = args
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(indices)


embedding: Operator = Operator(
    "embedding(Tensor weight, Tensor indices, int padding_idx, bool scale_grad_by_freq) -> Tensor",
    "embedding",
    check=_check,
    explain=_explain,
    allocate=lambda plan, weight, indices, *_: weight.new_empty((*indices.shape, weight.shape[1])),
    torch=torch.embedding,
    save=_save,
    backward=lambda ctx, grad: (
        embedding_backward.call(grad, *ctx.saved_tensors, ctx.rows, *ctx.rest, ctx.backend),
        None,
        None,
        None,
    ),
)

embedding_backward: Operator = Operator(
    "embedding_backward(Tensor grad, Tensor indices, SymInt rows, int padding_idx, bool scale_grad_by_freq) -> Tensor",
    "embedding",
    check=_check_backward,
    allocate=lambda plan, grad, indices, rows, *_: grad.new_empty((rows, grad.shape[-1])),
    torch=aten.embedding_dense_backward,
)
