"""Kernels in CUDA C on the CPU: their sources compiled by g++ with ``shim.h``, and a launcher that runs them on CPU tensors.

The host side of the kernels is the same as on a GPU, and so is every line of the sources but inline PTX.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fastnn.kernels.gpu.engine import cuda

HEADER = Path(__file__).with_name("shim.h")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="the shim for CUDA C needs a C++ compiler (g++)")


def kernels_of(source: cuda.Source) -> list[str]:
    """The kernels that are tested: of types that differ in how a number is read and written only, fewer shapes."""
    few = re.compile(
        r".*<(bfloat_t, \d, \w+, (0, 0, 0|3, 2, 1)|(half_t|double), 1,|\w+, (MAX|ARGMAX|AVERAGE)>|\w+, (LSTM|GRU|RNN), \d+>)"
    )
    return [e for e in source.instances() if not re.search(r"_t,|double,", e) or few.match(e)]


def _library(source: cuda.Source) -> ctypes.CDLL:
    """One shared library of the tested kernels of a source, kept by what it was made of."""
    entries = "".join(
        f'extern "C" int k{n}(const void* args, unsigned grid, unsigned block, unsigned shared, int mode, char* message) {{\n'
        f"  return shim::run([](const void* a) {{ shim::call({e}, a); }}, args, grid, block, shared, mode, message); }}\n"
        for n, e in enumerate(kernels_of(source))
    )
    call = (
        "namespace shim { template <typename A> void call(void (*kernel)(A), const void* args) { kernel(*(const A*)args); } }\n"
    )
    text = HEADER.read_text() + source.text + call + entries
    folder = Path(os.environ.get("FASTNN_CACHE_DIR") or tempfile.gettempdir()) / "cuda_shim"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{source.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as room:
            made = Path(room, "made.so")
            done = subprocess.run(
                [str(COMPILER), "-x", "c++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-o", str(made), "-"],
                input=text, text=True, capture_output=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[:4000]
            made.replace(path)
    return ctypes.CDLL(str(path))


class Shim:
    """A device of a few multiprocessors; cooperative launches have one block on each."""

    def __init__(self, multiprocessors: int = 3, shared: int = 96 << 10, matrix: bool = True) -> None:
        self.has = cuda.Limits(multiprocessors, shared, matrix)
        self.launched: list[str] = []
        self._fibers: set[str] = set()

    def refusal(self) -> str | None:
        return None

    def limits(self, device: torch.device) -> cuda.Limits:
        return self.has

    def function(self, source: cuda.Source, expression: str, device: torch.device) -> Any:
        if source.name not in _libraries:
            _libraries[source.name] = _library(source)
        return getattr(_libraries[source.name], f"k{kernels_of(source).index(expression)}"), expression

    def handle(self, function: Any) -> None:
        return None

    def resident(self, function: Any, device: torch.device, block: int, shared: int) -> int:
        return self.has.multiprocessors

    def launch(self, function: Any, device: torch.device, grid: int, block: int, shared: int, args: array[int],
               cooperative: bool) -> None:  # fmt: skip
        entry, expression = function
        self.launched.append(expression)
        assert 0 < grid < 2**31
        assert 0 < block <= 1024
        assert shared <= self.has.shared
        assert not cooperative or grid <= self.has.multiprocessors
        message = ctypes.create_string_buffer(256)
        mode = 2 if cooperative else int(expression in self._fibers)
        where = (ctypes.c_void_p(args.buffer_info()[0]), grid, block, shared)
        rc = entry(*where, mode, message)
        if rc == 2:  # the kernel has barriers
            self._fibers.add(expression)
            rc = entry(*where, 1, message)
        if rc:
            raise RuntimeError(f"{expression}: {message.value.decode()}")


_libraries: dict[str, ctypes.CDLL] = {}


@contextmanager
def shim(**has: Any) -> Iterator[Shim]:
    """Inside, kernels in CUDA C run on the CPU."""
    before, cuda.launcher = cuda.launcher, Shim(**has)
    try:
        yield cuda.launcher
    finally:
        cuda.launcher = before
