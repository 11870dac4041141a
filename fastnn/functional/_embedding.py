"""Rows of a table by their numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..ops import embedding as _embedding


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """weight[input]: input of any shape, integers below weight's rows; weight (rows, size) → (*input.shape, size).

    Row padding_idx gets no gradient; with scale_grad_by_freq a row's is divided by how often it was taken. max_norm: rows that
    are taken are first scaled down to that norm, in place, by torch. sparse=True is torch's: there is no kernel for gradients
    that are sparse. IndexError for a number out of range, AssertionError for such a padding_idx, RuntimeError for dtypes.
    """
    if padding_idx is None:
        padding_idx = -1
    elif not -weight.shape[0] <= padding_idx < weight.shape[0]:
        raise AssertionError(
            f"embedding(): Padding_idx must be within num_embeddings, [{-weight.shape[0]}, {weight.shape[0]}), got {padding_idx}"
        )
    else:
        padding_idx %= max(1, weight.shape[0])
    if sparse:
        backends.torch_serves("embedding", (input, weight), backend, "sparse gradients are torch's")
        pad = None if padding_idx < 0 else padding_idx
        return F.embedding(input, weight, pad, max_norm, norm_type, scale_grad_by_freq, True)
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(weight, input.contiguous(), max_norm, norm_type)
    return _embedding.embedding.call(weight, input, padding_idx, scale_grad_by_freq, backend)
