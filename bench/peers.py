"""Whom we are compared with. A peer is a plug-in: a name, a predicate that says why not, a way to prepare a case."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fastnn._numerics import TORCH, all_of

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
    def of(cls, case: Case, dtype: torch.dtype, threads: int, device: str = "cpu") -> Job:
        """The case's own inputs on the device, and a gradient of its output where its mode needs one."""
        inputs, grad = case.make(dtype), None
        if device != "cpu":
            inputs = tuple(
                t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in inputs
            )
            if case.moved:
                case.moved(inputs)
        if case.mode != "forward":
            with torch.no_grad():
                out = case.theirs(TORCH, *inputs)
            # It lies as the output does, as the backward of a next layer in the same format leaves it.
            grad = torch.empty_like(out).copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(99)))
        return cls(case, inputs, grad, threads)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.inputs if isinstance(t, Tensor) and t.requires_grad]


#: Does the work and returns its results: the output or outputs, or the gradients of the inputs that require one.
Work = Callable[[], tuple[Tensor, ...]]


def as_work(job: Job, function: Callable[..., Any]) -> Work:
    """The zero-argument call of a mode: forward, backward of a forward done here and now, or both."""
    inputs, leaves, grad = job.inputs, job.leaves, job.grad
    if job.case.mode == "forward":
        return lambda: all_of(function(*inputs))
    if job.case.mode == "train":
        return lambda: torch.autograd.grad(function(*inputs), leaves, grad)
    out = function(*inputs)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


class Peer:
    """A provider of results."""

    name = ""
    #: Where the version is said.
    version = ""
    #: Whether getting ready takes so long that a quick run leaves it out.
    slow = False
    #: Where it works.
    devices: tuple[str, ...] = ("cpu",)
    #: The families that it has something of its own for; empty: all.
    families: tuple[str, ...] = ()

    def takes_part(self, case: Case, device: str) -> bool:
        """Whether there is any sense in asking it for the case."""
        return device in self.devices and (not self.families or case.family in self.families)

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
    devices: tuple[str, ...] = ("cpu", "cuda")

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
    devices: tuple[str, ...] = ("cpu", "cuda")

    def missing(self, case: Case, dtype: torch.dtype, threads: int) -> str | None:
        return None

    def prepare(self, job: Job) -> Work:
        return as_work(job, lambda *inputs: job.case.theirs(TORCH, *inputs))


class SDPA(TorchEager):
    """torch's attention by one of the backends that it chooses from on a GPU, and no other."""

    devices: tuple[str, ...] = ("cuda",)
    families = ("attention",)
    backend = ""

    def prepare(self, job: Job) -> Work:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = getattr(SDPBackend, self.backend)
        with sdpa_kernel(backend):
            work = super().prepare(job)

        def alone() -> tuple[Tensor, ...]:
            with sdpa_kernel(backend):
                return work()

        return alone


class FlashSDPA(SDPA):
    name, backend = "sdpa.flash", "FLASH_ATTENTION"


class CuDNNSDPA(SDPA):
    name, backend = "sdpa.cudnn", "CUDNN_ATTENTION"


class EfficientSDPA(SDPA):
    name, backend = "sdpa.efficient", "EFFICIENT_ATTENTION"


class MathSDPA(SDPA):
    name, backend = "sdpa.math", "MATH"


class TorchCompile(Peer):
    name, version = "torch.compile", torch.__version__
    devices: tuple[str, ...] = ("cpu", "cuda")

    def missing(self, case: Case, dtype: torch.dtype, threads: int) -> str | None:
        if not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
            return "torch.compile needs a C++ compiler, and none was found"
        return None

    def prepare(self, job: Job) -> Work:
        run = job.case.theirs
        return as_work(job, _compiled(lambda *inputs: run(TORCH, *inputs)))

    @contextmanager
    def settings(self, threads: int) -> Iterator[None]:
        import torch._functorch.config as functorch
        import torch._inductor.config as inductor

        # A donated buffer could be used by one backward only, and we call the same one again and again.
        with functorch.patch(donated_buffer=False), inductor.patch({"cpp.threads": threads}):
            yield


class MaxAutotune(TorchCompile):
    """torch.compile's search for the fastest product, with frozen weights: without those, it has no choice on a CPU."""

    name = "max-autotune"
    slow = True
    devices: tuple[str, ...] = ("cpu",)

    def missing(self, case: Case, dtype: torch.dtype, threads: int) -> str | None:
        if case.family == "models" and case.mode == "forward":
            return "left out of whole models: it tries kernels for every layer, which takes long"
        if case.mode != "forward" or not case.parameters:
            return "on a CPU, max-autotune has a choice only in inference and for products with constant weights"
        return super().missing(case, dtype, threads)

    def prepare(self, job: Job) -> Work:
        import torch._inductor.config as inductor

        with_weights = _WithWeights(job)
        compiled = _compiled(with_weights, mode="max-autotune")
        with inductor.patch(freezing=True), redirect_stderr(StringIO()):  # where it lists all that it tries
            compiled(*with_weights.others)  # compiles here, where freezing is on
        return lambda: all_of(compiled(*with_weights.others))


class MaxAutotuneGPU(TorchCompile):
    """The same on a GPU, where it chooses among its own kernels and the libraries'; graphs are the stopwatch's business."""

    name = "max-autotune-no-cudagraphs"
    slow = True
    devices: tuple[str, ...] = ("cuda",)

    def prepare(self, job: Job) -> Work:
        run = job.case.theirs
        with redirect_stderr(StringIO()):
            work = as_work(job, _compiled(lambda *inputs: run(TORCH, *inputs), mode=self.name))
            work()  # compiles here
        return work


def _compiled(function: Callable[..., Tensor], mode: str | None = None) -> Callable[..., Tensor]:
    torch._dynamo.reset()  # else the eighth case would silently fall back to eager
    torch._dynamo.config.allow_rnn = True  # or it refuses LSTM, GRU and RNN by their class
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


class _WithWeights(nn.Module):
    """A case as a module: its parameters are the module's, which compilers may pack; the ``others`` are arguments."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.run, self.length = job.case.theirs, len(job.inputs)
        self.weights = nn.ParameterDict({str(n): job.inputs[n] for n in job.case.parameters}).requires_grad_(False)
        self.others = tuple(t for n, t in enumerate(job.inputs) if n not in job.case.parameters)
        self.eval()

    def forward(self, *others: Tensor) -> Any:
        rest = iter(others)
        return self.run(
            TORCH, *(self.weights[str(n)] if str(n) in self.weights else next(rest) for n in range(self.length))
        )


class OnnxRuntime(Peer):
    """Exported from the case itself; a session of its own a case, with as many threads as everyone has.

    Its threads spin after a call, as they do by default. An output of a megabyte and more is allocated by torch in each
    call, as everyone's is; smaller ones, and what is needed in between, come from its own arena, which keeps memory.
    """

    name = "onnxruntime"

    def __init__(self) -> None:
        import onnx  # noqa: F401  # which torch's exporter needs
        import onnxruntime

        self.version = onnxruntime.__version__

    def missing(self, case: Case, dtype: torch.dtype, threads: int) -> str | None:
        return None if case.mode == "forward" else "ONNX Runtime is for inference: it has no gradients here"

    def prepare(self, job: Job) -> Work:
        import onnxruntime

        module = _WithWeights(job)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job.threads
        options.log_severity_level = 4  # what it cannot do it also raises
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            # torch calls this exporter old. The new one gives the same graphs in a second a case instead of 10 ms.
            warnings.simplefilter("ignore")
            file = Path(folder) / "case.onnx"
            names = [f"input{n}" for n in range(len(module.others))]
            with patch.object(torch._C, "_jit_onnx_log", create=True):  # what it cannot export it would print as a whole
                torch.onnx.export(module, module.others, file, input_names=names, dynamo=False, opset_version=20)
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        outs = all_of(module(*module.others))
        for out in outs:
            if out.dtype not in (torch.float32, torch.float64, torch.float16):
                raise NotImplementedError(f"NumPy, through which results pass, has no {out.dtype}")
        used = {place.name for place in session.get_inputs()}  # the exporter drops what the case makes no use of
        arrays = {name: t.numpy() for name, t in zip(names, module.others, strict=True) if name in used}
        if sum(out.nbytes for out in outs) < 1 << 20:
            return lambda: tuple(session.run(None, arrays))
        binding = session.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        places = [
            (place.name, out.numpy().dtype, tuple(out.shape), out.dtype)
            for place, out in zip(session.get_outputs(), outs, strict=True)
        ]

        def work() -> tuple[Tensor, ...]:
            results = tuple(torch.empty(shape, dtype=dtype) for _, _, shape, dtype in places)
            for (name, kind, shape, _), out in zip(places, results, strict=True):
                binding.bind_output(name, "cpu", 0, kind, shape, out.data_ptr())
            session.run_with_iobinding(binding)
            return results

        return work


class NumPy(Peer):
    name = "numpy"

    def __init__(self) -> None:
        import numpy

        blas = getattr(numpy.__config__, "CONFIG", {}).get("Build Dependencies", {}).get("blas", {})
        self.version = " ".join(part for part in (numpy.__version__, blas.get("name"), blas.get("version")) if part)

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
PEERS: tuple[type[Peer], ...] = (
    Fastnn, TorchEager, FlashSDPA, CuDNNSDPA, EfficientSDPA, MathSDPA, TorchCompile, MaxAutotune, MaxAutotuneGPU,
    NumPy, OnnxRuntime,
)  # fmt: skip
