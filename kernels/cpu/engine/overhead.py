"""Where a call costs more than it saves: sizes below which torch serves, whose calls are shorter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import threads

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


def torch_is_shorter(t: Tensor, forward: int, training: int, size: int | None = None) -> str | None:
    """A reason to leave a call on t to torch if its ``size``, by default t's elements, is less; a gradient to come costs two
    calls. (In a forked child torch might hang.)"""
    least = training if t.requires_grad and torch.is_grad_enabled() else forward
    if RULES and (t.numel() if size is None else size) < least and not threads.forked():
        return "for so few elements torch's own call takes less time than ours"
    return None
