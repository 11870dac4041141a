"""Whom we are compared with. A peer is a plug-in: a name, a predicate that says why not, a way to prepare a case."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnn._numerics import TORCH

from .cases import Case, Inputs

OURS = "fastnn"


@dataclass(frozen=True)
class Job:
    """A case on given inputs: what a provider must do."""

    case: Case
    inputs: Inputs
    grad: Tensor | None
    threads: int

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, threads: int) -> Job:
        """The case's own inputs, and a gradient of its output where its mode needs one."""
        inputs, grad = case.make(dtype), None
        if case.mode != "forward":
            with torch.no_grad():
                out = case.theirs(TORCH, *inputs)
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(99)).to(dtype)
        return cls(case, inputs, grad, threads)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.inputs if isinstance(t, Tensor) and t.requires_grad]


#: Does the work and returns its results: the output, or the gradients of the inputs that require one.
Work = Callable[[], tuple[Tensor, ...]]


def as_work(job: Job, function: Callable[..., Tensor]) -> Work:
    """The zero-argument call of a mode: forward, backward of a forward done here and now, or both."""
    inputs, leaves, grad = job.inputs, job.leaves, job.grad
    if job.case.mode == "forward":
        return lambda: (function(*inputs),)
    if job.case.mode == "train":
        return lambda: torch.autograd.grad(function(*inputs), leaves, grad)
    out = function(*inputs)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


class Peer:
    """A provider of results."""

    name = ""
    #: Where the version is said.
    version = ""

    def missing(self, case: Case, dtype: torch.dtype, threads: int) -> str | None:
        """Why this peer cannot do the case, in a sentence; None if it can."""
        raise NotImplementedError

    def prepare(self, job: Job) -> Work:
        """The work, ready to be called again and again."""
        raise NotImplementedError

    def settings(self, threads: int) -> AbstractContextManager[Any]:
        """What must hold while its work is prepared and called."""
        return nullcontext()


class Fastnn(Peer):
    name = OURS

    def __init__(self) -> None:
        import fastnn

        self.version = getattr(fastnn, "__version__", "")

    def missing(self, case: Case, dtype: torch.dtype, threads: int) -> str | None:
        return None

    def prepare(self, job: Job) -> Work:
        import fastnn.functional as functional

        run = job.case.ours or job.case.theirs
        return as_work(job, lambda *inputs: run(functional, *inputs))


class TorchEager(Peer):
    name, version = "torch", torch.__version__

    def missing(self, case: Case, dtype: torch.dtype, threads: int) -> str | None:
        return None

    def prepare(self, job: Job) -> Work:
        return as_work(job, lambda *inputs: job.case.theirs(TORCH, *inputs))


class TorchCompile(Peer):
    name, version = "torch.compile", torch.__version__

    def missing(self, case: Case, dtype: torch.dtype, threads: int) -> str | None:
        if not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
            return "torch.compile needs a C++ compiler, and none was found"
        return None

    def prepare(self, job: Job) -> Work:
        torch._dynamo.reset()  # else the eighth case would silently fall back to eager
        run = job.case.theirs
        compiled = torch.compile(lambda *inputs: run(TORCH, *inputs), fullgraph=True, dynamic=False)
        return as_work(job, compiled)

    @contextmanager
    def settings(self, threads: int) -> Iterator[None]:
        import torch._functorch.config as functorch
        import torch._inductor.config as inductor

        # A donated buffer could be used by one backward only, and we call the same one again and again.
        with functorch.patch(donated_buffer=False), inductor.patch({"cpp.threads": threads}):
            yield


class NumPy(Peer):
    name = "numpy"

    def __init__(self) -> None:
        import numpy

        self.version = numpy.__version__

    def missing(self, case: Case, dtype: torch.dtype, threads: int) -> str | None:
        if case.numpy is None:
            return "NumPy does not have this operation"
        if case.mode != "forward":
            return "NumPy has no gradients"
        if dtype not in (torch.float32, torch.float64):
            return f"NumPy has no fast {str(dtype).removeprefix('torch.')} product"
        if not _has_threadpoolctl() and threads != os.cpu_count():
            return "threadpoolctl is needed to set the number of NumPy's threads: pip install threadpoolctl"
        return None

    def prepare(self, job: Job) -> Work:
        run = job.case.numpy
        assert run is not None
        arrays = [t.detach().numpy() for t in job.inputs]
        return lambda: (run(*arrays),)

    def settings(self, threads: int) -> AbstractContextManager[Any]:
        if not _has_threadpoolctl():
            return nullcontext()
        from threadpoolctl import threadpool_limits

        limits: AbstractContextManager[Any] = threadpool_limits(limits=threads, user_api="blas")
        return limits


def _has_threadpoolctl() -> bool:
    from importlib.util import find_spec

    return find_spec("threadpoolctl") is not None


#: Every provider, ours first.
PEERS: tuple[type[Peer], ...] = (Fastnn, TorchEager, TorchCompile, NumPy)
