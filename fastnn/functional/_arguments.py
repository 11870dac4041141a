"""What several families ask of their arguments."""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack

Ints = int | Sequence[int]


def any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(getattr(t, "requires_grad", False) for t in tensors)  # what is no tensor is refused where it is used


def is_traced() -> bool:
    """Whether the call is written down to be made again, or made without values: a random seed drawn now would not do."""
    return (
        torch.compiler.is_compiling()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack() > 0
    )


def integer(value: Any) -> Any:
    """`value` as torch takes it for an int: NumPy's integers and tensors of one integer too, but no bool. Raises TypeError."""
    if isinstance(value, bool):
        raise TypeError("a bool is no int")
    return value if type(value) is int or isinstance(value, torch.SymInt) else index(value)


def ints(op: str, name: str, value: Any, dims: int) -> list[int]:
    """`value` for each dimension: an int for all, or a sequence of one or of as many as there are dimensions."""
    if type(value) is int:
        return [value] * dims
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    try:
        values = [integer(v) for v in values]
    except TypeError:
        raise TypeError(f"{op}(): {name} must be int or a tuple of {dims} ints, got {value!r}") from None
    if len(values) not in (1, dims):
        raise RuntimeError(
            f"{op}(): expected {name} to be a single integer value or {dims} values, got {len(values)}: {tuple(values)}"
        )
    return values if len(values) == dims else values * dims
