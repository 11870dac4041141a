"""CUDA C through CuPy: one ``Source`` a .cu file; its kernels are compiled at their first launch and kept by device.

Every kernel takes one structure of 64-bit words by value (an ``array('q')`` here) and a grid and a block of one dimension.
A launch is a driver's call on torch's current stream: it can be captured in a CUDA graph. CuPy keeps what NVRTC compiled on
disk, by source, expression and architecture; headers are pasted into the source, so that no module is older than they are.

Tests put another ``launcher`` in place that runs the same sources on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from array import array
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import replay

FOLDER = Path(__file__).resolve().parents[1]
OPTIONS = ("-std=c++17",)
STATIC = 48 << 10  # bytes of shared memory that a block may have without asking for more


class Limits(NamedTuple):
    """What a device has."""

    multiprocessors: int
    shared: int  # bytes of shared memory that one block may ask for
    matrix: bool = True  # whether 16-bit numbers are multiplied as sm_80 does it


class Launcher(Protocol):
    """Who compiles and runs kernels. ``function`` may be slow, it is asked once; ``launch`` is what a call costs; ``handle`` is
    the driver's name of a function, None where there is no driver."""

    def refusal(self) -> str | None: ...
    def limits(self, device: torch.device) -> Limits: ...
    def handle(self, function: Any) -> int | None: ...
    def function(self, source: Source, expression: str, device: torch.device) -> Any: ...
    def resident(self, function: Any, device: torch.device, block: int, shared: int) -> int: ...
    def launch(self, function: Any, device: torch.device, grid: int, block: int, shared: int, args: array[int],
               cooperative: bool) -> None: ...  # fmt: skip


class CuPy:
    """NVIDIA GPUs. CuPy is imported by the first launch; its launches are its bindings of the driver's own functions."""

    def __init__(self) -> None:
        self._bound = threading.local()
        self._resident: dict[tuple[int, int, int], int] = {}

    @cache  # noqa: B019  # one object, for good
    def refusal(self) -> str | None:
        if torch.version.hip is not None:
            return "kernels in CUDA C need an NVIDIA GPU"
        if importlib.util.find_spec("cupy") is None:
            return "kernels in CUDA C need CuPy: pip install cupy-cuda13x, or cupy-cuda12x, as torch.version.cuda says"
        try:  # CuPy for another CUDA, without its headers or with nowhere to keep kernels would fail at every call
            _somewhere_to_keep_kernels()
            self._compiled(_TRIAL, "trial<0>", torch.device("cuda", torch.cuda.current_device()))
        except Exception as error:  # CuPy has a dozen types for what can be missing
            fits = f"cupy-cuda{(torch.version.cuda or '13').split('.')[0]}x[ctk]"
            return (
                f"CuPy is installed but compiles no kernel ({type(error).__name__}: {str(error)[:300]}): it has to fit torch's "
                f"CUDA, pip install '{fits}', and to write to its cache, CUPY_CACHE_DIR=FOLDER"
            )
        return None

    @cache  # noqa: B019
    def limits(self, device: torch.device) -> Limits:
        has = torch.cuda.get_device_properties(device)
        return Limits(has.multi_processor_count, getattr(has, "shared_memory_per_block_optin", STATIC), has.major >= 8)

    def function(self, source: Source, expression: str, device: torch.device) -> Any:
        try:
            return self._compiled(source, expression, device)
        except Exception as error:
            raise RuntimeError(
                f"fastnn: {source.name}.cu could not be compiled and loaded for {device} ({type(error).__name__}: "
                f"{str(error)[:500]}). Check that CuPy fits the driver (python -m fastnn info), or use backend='torch'."
            ) from error

    def _compiled(self, source: Source, expression: str, device: torch.device) -> Any:
        """CuPy's kernel object of an expression such as ``forward<float, 4>``, on a device."""
        import cupy

        with cupy.cuda.Device(device.index):
            module = cupy.RawModule(code=source.text, options=OPTIONS, name_expressions=[expression])
            found = module.get_function(expression)
            most = self.limits(device).shared
            if most > STATIC:
                found.max_dynamic_shared_size_bytes = most
            return found.kernel.ptr, found, module  # the last two keep the first alive

    def handle(self, function: Any) -> int | None:
        return int(function[0])

    def resident(self, function: Any, device: torch.device, block: int, shared: int) -> int:
        """How many blocks can be on the device at the same time."""
        from cupy_backends.cuda.api import driver

        key = (function[0], block, shared)
        if key not in self._resident:
            with torch.cuda.device(device.index):
                self._bind(device)
                each = driver.occupancyMaxActiveBlocksPerMultiprocessor(*key)
            self._resident[key] = each * self.limits(device).multiprocessors
        return self._resident[key]

    def launch(self, function: Any, device: torch.device, grid: int, block: int, shared: int, args: array[int],
               cooperative: bool) -> None:  # fmt: skip
        from cupy_backends.cuda.api import driver

        index = device.index
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self.launch(function, device, grid, block, shared, args, cooperative)
        self._bind(device)
        stream = torch._C._cuda_getCurrentRawStream(index)
        pointers = array("q", [args.buffer_info()[0]])
        where = (function[0], grid, 1, 1, block, 1, 1, shared, stream, pointers.buffer_info()[0])
        if cooperative:
            driver.launchCooperativeKernel(*where)
        else:
            driver.launchKernel(*where, 0)
        return None

    def _bind(self, device: torch.device) -> None:
        """torch's context, in this thread: one of autograd's threads may have none yet."""
        if getattr(self._bound, "device", None) != device.index:
            from cupy.cuda import runtime

            runtime.setDevice(device.index)
            self._bound.device = device.index


launcher: Launcher = CuPy()


def _somewhere_to_keep_kernels() -> None:
    """CuPy makes its folder as it is imported, and raises where it cannot: ours then has room for it."""
    from fastnn.kernels.cpu.engine.build import cache_dir

    folder, ours = os.path.expanduser("~/.cupy/kernel_cache"), cache_dir()
    if ours is None or "CUPY_CACHE_DIR" in os.environ:
        return
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK):
        os.environ["CUPY_CACHE_DIR"] = str(ours / "cupy")


class Source:
    """A .cu file next to the family's host side, and the launches of its kernels."""

    def __init__(self, name: str, instances: Callable[[], list[str]]) -> None:
        self.name = name
        self.instances = instances  # every expression that the host side may ask for: what is checked ahead of time
        self._functions: dict[tuple[Launcher, str, torch.device], Any] = {}

    @cached_property
    def text(self) -> str:
        def pasted(path: Path) -> str:
            return re.sub(r'^#include "(.*)"$', lambda m: pasted(FOLDER / "engine" / m[1]), path.read_text(), flags=re.M)

        return pasted(FOLDER / f"{self.name}.cu").replace("#pragma once", "")

    def _function(self, expression: str, device: torch.device) -> Any:
        key = (launcher, expression, device)
        found = self._functions.get(key)
        if found is None:
            found = self._functions[key] = launcher.function(self, expression, device)
        return found

    def launch(self, expression: str, device: torch.device, grid: int, block: int, words: Sequence[int | Tensor],
               shared: int = 0, cooperative: bool = False) -> None:  # fmt: skip
        """Run a kernel on torch's current stream of a device. words: of its structure; tensors stand for their addresses.

        ``cooperative``: all blocks at once, or an error.
        """
        where = (self._function(expression, device), device, grid, block, shared)
        tape = replay.tape()
        if tape is not None:
            tape.launched_words(launcher.launch, where, words, cooperative, launcher.handle(where[0]))
        args = array("q", [w if isinstance(w, int) else w.data_ptr() for w in words])
        launcher.launch(*where, args, cooperative)

    def resident(self, expression: str, device: torch.device, block: int, shared: int) -> int:
        """The largest grid of a cooperative launch."""
        return launcher.resident(self._function(expression, device), device, block, shared)

    def threads(self, expression: str, device: torch.device, count: int, words: Sequence[int | Tensor], block: int = 256) -> None:
        """Launch so many threads; those beyond the count have to see it themselves."""
        self.launch(expression, device, -(-count // block), block, words)


_TRIAL = Source("trial", lambda: ["trial<0>"])
_TRIAL.__dict__["text"] = "template <int N> __global__ void trial() {}"


def refusal() -> str | None:
    """Why no kernel in CUDA C can run here; None if they can."""
    return launcher.refusal()


def limits(device: torch.device) -> Limits:
    return launcher.limits(device)
