"""Which kernel serves a call, and why not: the registry, the user's choice of a backend, and the trace of calls.

A backend is named by the `backend=` argument of a function, else by ``with fastnn.backend(name):``, else by the
environment variable ``FASTNN_BACKEND`` (read at import), else ``"auto"``: the first kernel that accepts, else torch.
"""

import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

NAMES = ("auto", "cpu", "gpu", "torch", "reference")
FLOAT32_PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
_DEVICE = {"cpu": "cpu", "gpu": "cuda"}  # backend: the torch device type that its kernels work on

_INSTALL = {  # module that a kernel needs: what to do where it is missing
    "numba": "Numba is missing: `pip install numba`",
    "llvmlite": "llvmlite is missing: `pip install numba`, which brings it",
    "triton": "Triton is missing: `pip install triton`, in the version that your torch asks for",
    "cupy": "CuPy is missing: `pip install cupy-cuda13x`, or -cuda12x for a driver of CUDA 12",
}

# (out, *args): writes the result into out, a tensor or a tuple of them; returns the way that it took, if it has several
Kernel = Callable[..., str | None]
Predicate = Callable[..., str | None]  # (op, *args): None if the kernel serves the call, else the reason why not
Rule = Callable[..., str | None]  # (*args): why torch is faster for this call, by measurement; None if it is not
Entry = tuple[Kernel | None, Predicate | None, Rule | None]  # without a predicate: it serves all that the operator lets through


class Op(Protocol):
    name: str
    family: str
    torch: Callable[..., Any]
    explain: Callable[..., None] | None
    public: Callable[..., str] | None


@dataclass
class Call:
    """One traced call: the op, its tensors and other arguments, who served it, in which of several ways, and, if not the first
    choice, why."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    options: tuple[Any, ...]
    backend: str
    kernel: str
    reason: str
    way: str = ""

    def __str__(self) -> str:
        shapes = ", ".join("×".join(map(str, shape)) or "scalar" for shape in self.shapes)
        dtypes = "/".join(sorted({str(dtype).removeprefix("torch.") for dtype in self.dtypes}))
        options = "".join(f", {option}" for option in self.options)
        how = (f" ({self.way})" if self.way else "") + (f": {self.reason}" if self.reason else "")
        return f"{self.op}({shapes}; {dtypes}{options}) → {self.kernel}{how}"


_environment = os.environ.get("FASTNN_BACKEND") or None
_choice: ContextVar[str | None] = ContextVar("fastnn_backend", default=_environment)
traces: list[list[Call]] = []
_latest = threading.local()  # call: the thread's last one that was traced
tables: dict[str, dict[str, Entry]] = {"cpu": {}, "gpu": {}}  # backend: op: what serves it
float32_precision: str | None = None  # what set_float32_precision was told
_precision = getattr(torch._C, "_get_fp32_precision_getter", None)  # torch before 2.9 has one flag for each
context = _choice.get  # the backend that `with backend(…)` or the environment names


def validate(name: str) -> str:
    if name not in NAMES:
        source = "the environment's FASTNN_BACKEND" if name == _environment else "backend"
        raise ValueError(f"{source}: got {name!r}, allowed are {', '.join(map(repr, NAMES))}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside ``with fastnn.backend(name):`` calls are served by this backend, in this thread or task.

    Raises ValueError for an unknown name; the calls inside raise RuntimeError where the backend is not installed
    or has no kernel for them.
    """
    token = _choice.set(validate(name))
    try:
        yield
    finally:
        _choice.reset(token)


def set_float32_precision(name: str | None) -> None:
    """How GPU kernels multiply float32 numbers, in all threads and backwards, as torch.set_float32_matmul_precision does.

    "ieee": as they are; "tf32": rounded to 11 bits; "tf32x3": in two such terms (22 bits, NVIDIA only) and "bf16x3", "bf16x6":
    in two or three of bfloat16 (16 and 24 bits), of whose products the largest 3 or 6 are summed. None, the default: "ieee",
    or "tf32" where torch's own setting asks. Raises ValueError for another name.
    """
    global float32_precision
    if name is not None and name not in FLOAT32_PRECISIONS:
        raise ValueError(f"set_float32_precision(): got {name!r}, allowed are None, {', '.join(map(repr, FLOAT32_PRECISIONS))}")
    float32_precision = name


@contextmanager
def trace() -> Iterator[list[Call]]:
    """``with fastnn.trace() as calls:`` lists every call made inside, in all threads: op, shapes, kernel, reason."""
    calls: list[Call] = []
    traces.append(calls)
    try:
        yield calls
    finally:
        traces[:] = [other for other in traces if other is not calls]


def record(op: str, args: Sequence[Any], backend: str, kernel: str, reason: str) -> None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    shapes, dtypes = tuple(tuple(t.shape) for t in tensors), tuple(t.dtype for t in tensors)
    options = tuple(a for a in args if not isinstance(a, Tensor) and a is not None and a != ())
    call = _latest.call = Call(op, shapes, dtypes, options, backend, kernel, reason)
    for calls in list(traces):
        calls.append(call)


def took(way: str) -> None:
    """Note the way in which a kernel served the thread's last call."""
    call = getattr(_latest, "call", None)  # None where a trace began in another thread after the kernel was chosen
    if call is not None:
        call.way = way


def select(op: Op, args: tuple[Any, ...], backend: str | None = None) -> Kernel | None:
    """The kernel for this call, or None where torch's own implementation serves it.

    Raises RuntimeError if a backend was named that is not installed or refuses the call.
    """
    named = validate(backend or context() or "auto")
    kernel: Kernel | None = None
    reason: str | None = None
    serving = named
    if named == "torch":
        reason = "backend 'torch' was named"
    elif named == "reference":
        kernel = partial(_write_reference, op)
    else:
        serving = _backend_of(args) if named == "auto" else named
        kernel, reason = _offer(serving, op, args)
        if reason is None and named == "auto":
            rule = tables[serving][op.name][2]
            reason = rule(*args) if rule is not None else None
        if reason is not None:
            if named != "auto":
                raise RuntimeError(_cannot(op, args, named, reason))
            kernel = None
    _latest.call = None
    if traces:
        record(op.name, args, "torch" if kernel is None else serving, _label(op, kernel), reason or "")
    return kernel


def tf32(kind: str) -> bool:
    """Whether torch's own setting lets float32 products ("matmul") or convolutions ("conv") round their operands to tf32."""
    if _precision is not None:
        return bool(_precision("cuda", kind) == "tf32")
    return torch.backends.cuda.matmul.allow_tf32 if kind == "matmul" else torch.backends.cudnn.allow_tf32


def settings() -> Any:
    """What GPU kernels look at beside their arguments where they multiply float32 numbers"""
    return float32_precision, tf32("matmul"), tf32("conv")


#: Whether a call on some tensors is the same, or None; and a function that does it again. Without the first it looks itself, and
#: returns None if it is not the same.
Replay = tuple[Callable[..., bool] | None, Callable[..., Any]]


def record_call(run: Callable[..., Any], args: Sequence[Any], count: int, alike: Callable[..., bool], now: Any,
                separate: bool) -> tuple[Any, Replay | None]:  # fmt: skip
    """The result of run(*args) on a GPU, and how it is done again with the first ``count`` arguments, tensors or None.

    alike: whether those that there are, each once, are alike in all but their memory; now: the ``settings`` that matter, if any;
    separate: whether the caller looks first whether it fits.
    """
    from fastnn.kernels.gpu.engine import replay

    return replay.record(run, args, count, alike, now, separate)


def torch_serves(op: Op | str, args: Sequence[Any], backend: str | None, reason: str) -> None:
    """Note that only torch's own implementation can serve this call; an error if another backend was named. op: its name where
    torch has no other way to compute it than its own function of that name."""
    compiling = torch.compiler.is_dynamo_compiling()  # which can read neither context nor trace
    named = backend if compiling else backend or context()
    if named not in (None, "auto", "torch") and validate(named):
        raise RuntimeError(_cannot(op, args, named, reason))
    if not compiling and traces:
        name, label = (op, f"torch {op}") if isinstance(op, str) else (op.name, _label(op, None))
        record(name, args, "torch", label, reason)


def record_reference(op: Op, args: Sequence[Any], reason: str) -> None:
    if traces:
        record(op.name, args, "reference", f"fastnn.kernels.reference.{op.family}.{op.name}", reason)


def chosen(backend: str | None) -> str:
    """The backend that argument, context and environment name."""
    return validate(backend or context() or "auto")


def forget() -> None:
    """Look the kernel modules up again at their next call."""
    for table in tables.values():
        table.clear()


def _cannot(op: Op | str, args: Sequence[Any], named: str | None, reason: str) -> str:
    name = op if isinstance(op, str) else op.name if op.public is None else op.public(*args)
    return f"{name}(): backend={named!r} cannot serve this call: {reason}. Use backend='auto' to let torch serve it."


def _backend_of(args: tuple[Any, ...]) -> str:
    """The backend that the first tensor's device asks for."""
    return "gpu" if next(a for a in args if isinstance(a, Tensor)).is_cuda else "cpu"


def _offer(backend: str, op: Op, args: tuple[Any, ...]) -> tuple[Kernel | None, str | None]:
    for a in args:
        if isinstance(a, Tensor):
            if a.device.type != _DEVICE[backend]:
                no_gpu = f"; {without_gpu()}" if backend == "gpu" and not torch.cuda.is_available() else ""
                return None, f"no {backend} kernel takes a tensor on device {str(a.device)!r}{no_gpu}"
            if not dense(a):
                return None, "a sparse, packed or lazily negated tensor has no memory that a kernel could read"
    kernel, supports, _ = tables[backend].get(op.name) or load(backend, op)
    return kernel, None if supports is None else supports(op.name, *args)


def without_gpu() -> str:
    """Why torch has no GPU here and what to do, in a sentence."""
    if not (torch.version.cuda or torch.version.hip):
        return "this torch is its CPU build: install one for your GPU (https://pytorch.org/get-started)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # too old a driver, or none, in torch's own words
        return str(error).splitlines()[0]
    return "torch finds no GPU: nvidia-smi shows whether the driver does"


def dense(t: Tensor) -> bool:
    """Whether shape, strides and address say where the tensor's values are."""
    return t.layout is torch.strided and not t.is_neg() and not t.is_conj() and not t._is_zerotensor()


def load(backend: str, op: Op) -> Entry:
    """Import the family's kernel module; note its kernel for the op, its predicate, and its rule that leaves calls to torch."""
    module = f"fastnn.kernels.{backend}.{op.family}"
    try:
        kernels = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        install = _INSTALL.get((missing.name or "").split(".")[0])
        reason = f"the {backend} kernels for {op.family} are not installed ({install or missing})"
        if backend == "cpu":
            warnings.warn(f"fastnn: {reason}; torch serves instead", RuntimeWarning, stacklevel=4)
        found: Entry = (None, lambda op, *args: reason, None)
    else:
        kernel = kernels.KERNELS.get(op.name)
        none = f"there is no {backend} kernel for {op.name}"
        supports = getattr(kernels, "supports", None) if kernel is not None else lambda op, *args: none
        found = (kernel, supports, getattr(kernels, "TORCH_IS_FASTER", {}).get(op.name))
    tables[backend][op.name] = found
    return found


def reference(op: Op) -> Callable[..., Any]:
    """The op as plain, differentiable PyTorch maths."""
    return getattr(importlib.import_module(f"fastnn.kernels.reference.{op.family}"), op.name)


def _write_reference(op: Op, out: Tensor | tuple[Tensor, ...], *args: Any) -> None:
    """Computed in float32 where the numbers have 16 bits: rounded once, as the kernels and torch's own do."""
    wide = (a.float() if isinstance(a, Tensor) and a.is_floating_point() and a.itemsize == 2 else a for a in args)
    if op.explain is not None:
        op.explain(*args)
    with torch.no_grad():
        result = reference(op)(*wide)
    for target, value in zip(out, result, strict=True) if isinstance(out, tuple) else [(out, result)]:
        target.copy_(value)


def _label(op: Op, kernel: Kernel | None) -> str:
    plain = str(getattr(op.torch, "__module__", "")).startswith("fastnn.kernels.reference")  # where torch has no such op
    if kernel is None and not plain:
        return f"torch {op.name}"
    if kernel is None or isinstance(kernel, partial):
        return f"fastnn.kernels.reference.{op.family}.{op.name}"
    return f"{kernel.__module__}.{getattr(kernel, '__qualname__', op.name)}"
