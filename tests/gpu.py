"""Calls of the GPU kernels. On a GPU they are called through the operators, as a user's are. Without one, Triton's run in its
interpreter and those in CUDA C on a shim, both on CPU tensors and below the operator: kernels and host code are the same.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnn import backends
from fastnn._numerics import error, widen
from fastnn.ops._operator import Operator
from rule import FLOOR

HERE = torch.cuda.is_available()
DEVICE = "cuda" if HERE else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(op: Operator, *args: Any) -> Any:
    """All that the GPU kernel of this operator writes, extra outputs included, for tensors on DEVICE.

    Raises RuntimeError with the kernel's reason where it refuses the call.
    """
    if HERE:
        return op.execute(*args, backend="gpu")
    _mend_interpreter()
    kernel, supports, _ = backends.load("gpu", op)
    reason = None if supports is None else supports(op.name, *args)
    if kernel is None or reason is not None:
        raise RuntimeError(f"{op.name}(): {reason}")
    return op._launch(kernel, op.check(*args), args)


def record(call: Callable[..., Any], args: Sequence[Any], count: int) -> tuple[Any, Callable[..., Any] | None]:
    """A call's result, and a function that does the same again with other tensors, whatever they are like; or None"""
    from fastnn.kernels.gpu.engine import replay

    result, found = replay.record(call, args, count, lambda *tensors: True, None, False)
    return result, None if found is None else found[1]


def check(op: Operator, *args: Any, scale: Callable[..., Any] | None = None, exact: Callable[..., Any] | None = None,
          floor: float = 0.0) -> Any:
    """The kernel by the error rule: at most twice torch's own error in this dtype and a floor, both against float64.

    Tensors are given on the CPU. ``scale(*args)`` gives for each output the magnitude at which an ulp is counted, or None;
    ``exact`` is better maths than the reference; ``floor`` adds ulp. Returns the kernel's outputs, on the CPU.
    """
    there = [lying_alike(a, DEVICE) if isinstance(a, Tensor) and HERE else a for a in args]
    before = [a.clone() if isinstance(a, Tensor) else a for a in there]
    mine = _tuple(run(op, *there))
    for now, then in zip(there, before, strict=True):
        if isinstance(now, Tensor):
            torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True, msg="an input was changed")
    mine = tuple(t.cpu() for t in mine)
    theirs = _tuple(op._all_by_torch(args))
    truth = _tuple((exact or backends.reference(op))(*(widen(a) for a in args)))
    sizes = scale(*(widen(a) for a in args)) if scale else [None] * len(truth)
    for a, b, t, s in zip(mine, theirs, truth, sizes, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        narrow = a if a.dtype != torch.float64 else a.float()  # statistics: computed in float32
        # GPUs take subnormal numbers of float32 for 0.
        flushed = 0.0 if narrow.dtype == torch.float16 else 2.0**-126 / torch.finfo(narrow.dtype).eps
        s = torch.full_like(t, flushed) if s is None else s.clamp(min=flushed)
        our, their = error(narrow, t, s, b), error(b.to(narrow.dtype), t, s)
        assert our.specials <= their.specials, f"{our.specials} special values lost, torch loses {their.specials}"
        assert our.worst <= 2 * their.worst + FLOOR[narrow.dtype] + floor, f"{our.worst:.3g} ulp, torch's own {their.worst:.3g}"
    return mine if len(mine) > 1 else mine[0]


def lying_alike(t: Tensor, device: str) -> Tensor:
    """The same numbers on a device, with the same strides, gaps and offset: ``to`` would lay them next to each other."""
    room = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    return torch.empty_like(room, device=device).copy_(room).as_strided(t.shape, t.stride(), t.storage_offset())


def end_if_the_gpu_is_lost() -> None:
    """After a test: a kernel that wrote where it may not takes the process's GPU along, and each test after it would fail.

    Its process ends here, so that the failure is this test's: xdist begins another one, pytest alone says where it stopped.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as problem:
        reason = f"the GPU is lost to this process: {str(problem).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(reason, returncode=3)
        print(reason, file=sys.stderr, flush=True)
        os._exit(3)


def watched(monkeypatch: pytest.MonkeyPatch, what: Callable[[Any, dict[str, Any]], Any]) -> list[Any]:
    """what(kernel, options) of each launch to come"""
    from fastnn.kernels.gpu.engine import launch

    seen: list[Any] = []
    right = launch.run

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        seen.append(what(kernel, options))
        right(kernel, *args, **options)

    monkeypatch.setattr(launch, "run", run)
    return seen


def filled(shape: Sequence[int], value: float) -> Tensor:
    """A scale that is the same everywhere."""
    return torch.full(tuple(shape), value, dtype=torch.float64)


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _mend_interpreter() -> None:
    """Triton's interpreter keeps bfloat16 as its bits: it cuts float32 off instead of rounding it, loses its subnormal numbers,
    and multiplies the bits as whole numbers in tl.dot. Its fma rounds twice.
    """
    if find_spec("triton") is None:  # which kernels in CUDA C do without
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, InterpreterOptions, TensorHandle, interpreter_builder

    # Its products are NumPy's whatever they are asked to be made of; it does not know all the names.
    interpreter_builder.options = InterpreterOptions(
        allowed_dot_input_precisions=("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")
    )

    right = InterpreterBuilder.create_dot
    if getattr(right, "mended", False):
        return

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return right(self, a, b, *rest)

    plain = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, value: Any, to: Any) -> Any:
        pair = value.dtype.scalar, to.scalar
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(value.data).view(np.uint32)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            return TensorHandle(np.where(np.isnan(value.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)
        return plain(self, value, to)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def create_descriptor_reduce(self: Any, kind: Any, box: Any, value: Any, offsets: Any) -> None:
        """What the copy engine adds to memory; of such sums only that one is used."""
        assert kind.name == "ADD"
        pointers, inside = box.materialize_pointers(offsets)
        zeros = TensorHandle(np.zeros_like(value.data), value.dtype)
        before = self.create_masked_load(pointers, inside, zeros, None, None, False)
        self.create_masked_store(pointers, TensorHandle(before.data + value.data, value.dtype), inside, None, None)

    create_dot.mended = True  # type: ignore[attr-defined]
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce
