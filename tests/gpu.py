"""Calls of the GPU kernels. On a GPU they are called through the operators, as a user's are. Without one, Triton's run in its
interpreter and those in CUDA C on a shim, both on CPU tensors and below the operator: the kernels and their host code are the same.
"""

from typing import Any

import torch

from fastnn import backends
from fastnn.ops._operator import Operator

HERE = torch.cuda.is_available()
DEVICE = "cuda" if HERE else "cpu"


def run(op: Operator, *args: Any) -> Any:
    """All that the GPU kernel of this operator writes, extra outputs included, for tensors on DEVICE.

    Raises RuntimeError with the kernel's reason where it refuses the call.
    """
    if HERE:
        return op.execute(*args, backend="gpu")
    kernel, supports, _ = backends.load("gpu", op)
    reason = None if supports is None else supports(op.name, *args)
    if kernel is None or reason is not None:
        raise RuntimeError(f"{op.name}(): {reason}")
    return op._launch(kernel, op.check(*args), args)
