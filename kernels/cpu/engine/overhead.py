"""Where a call costs more than it saves: sizes below which torch serves, whose calls are shorter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RULES = True


@contextmanager
def no_rules() -> Iterator[None]:
    """Inside, no call is left to torch for being small: for those who want the kernels themselves."""
    global RULES
    before, RULES = RULES, False
    try:
        yield
    finally:
        RULES = before


def torch_is_shorter(t: Tensor, forward: int, training: int) -> str | None:
    """A reason to leave a call on t to torch if it has fewer elements than that; a gradient to come costs two calls."""
    if RULES and t.numel() < (training if t.requires_grad and torch.is_grad_enabled() else forward):
        return "for so few elements torch's own call takes less time than ours"
    return None
