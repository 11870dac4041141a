"""A GPU's place taken by a driver that does nothing: Triton compiles for sm_90 and launches by its own launcher, into the void.

What a call costs in Python before the GPU has anything to do can be measured so, and what is launched can be looked at, on any
machine with a C compiler. Tensors of the CPU count as the GPU's. All of it is for a process of its own: nothing is put back.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DRIVER = """
#include "cuda.h"
#include <string.h>
static int thing[64];
int refused;  /* what cuLaunchKernel answers */
int launches, expected[16];  /* parameters to be noted of each launch */
struct { long long grid, block, shared, function, stream, words[128]; } seen[16];
static CUresult note(int grid, int block, int shared, CUfunction f, CUstream s, void **parameters) {
    int k = launches++ % 16;
    seen[k].grid = grid;
    seen[k].block = block;
    seen[k].shared = shared;
    seen[k].function = (long long)f;
    seen[k].stream = (long long)s;
    for (int i = 0; i < expected[k]; i++) memcpy(&seen[k].words[i], parameters[i], 8);
    return refused;
}
#define NOTHING(name, ...) CUresult name(__VA_ARGS__) { return 0; }
#define GIVES(name, type, value, ...) CUresult name(type *found, ##__VA_ARGS__) { *found = (type)(value); return 0; }
NOTHING(cuInit, unsigned a)
NOTHING(cuCtxSetCurrent, CUcontext a)
NOTHING(cuModuleUnload, CUmodule a)
NOTHING(cuFuncSetAttribute, CUfunction a, CUfunction_attribute b, int c)
NOTHING(cuFuncSetCacheConfig, CUfunction a, CUfunc_cache b)
NOTHING(cuCtxSetLimit, CUlimit a, size_t b)
GIVES(cuCtxGetLimit, size_t, 0, CUlimit a)
GIVES(cuDriverGetVersion, int, 13000)
GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDeviceGet, CUdevice, 0, int a)
GIVES(cuCtxGetCurrent, CUcontext, thing)
GIVES(cuDevicePrimaryCtxRetain, CUcontext, thing, CUdevice a)
GIVES(cuModuleLoadData, CUmodule, thing, const void *a)
GIVES(cuModuleGetFunction, CUfunction, thing, CUmodule a, const char *b)
CUresult cuGetErrorString(CUresult a, const char **found) { *found = "nothing"; return 0; }
CUresult cuFuncGetAttribute(int *found, CUfunction_attribute which, CUfunction f) {
    *found = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return 0;
}
CUresult cuDeviceGetAttribute(int *found, CUdevice_attribute which, CUdevice d) {
    *found = which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
        : which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? 233472
        : which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132
        : which == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32
        : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
    return 0;
}
CUresult cuPointerGetAttribute(void *found, CUpointer_attribute which, CUdeviceptr p) {
    *(CUdeviceptr *)found = p;
    return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
    return note(c->gridDimX, c->blockDimX, c->sharedMemBytes, f, c->hStream, parameters), 0;
}
CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned block, unsigned v, unsigned w, unsigned shared,
                        CUstream s, void **parameters, void **extra) {
    if (y * z * v * w != 1 || extra) return 1;
    return note(x, block, shared, f, s, parameters);
}
"""


def _driver(folder: Path) -> ctypes.CDLL:
    """It is loaded under the name by which Triton then finds it."""
    import triton

    source = folder / "driver.c"
    source.write_text(_DRIVER)
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        raise RuntimeError("a stand-in for a GPU's driver needs a C compiler (gcc)")
    made = folder / "libcuda.so.1"
    options = ["-O2", "-w", "-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{made.name}"]
    subprocess.run([compiler, *options, "-o", str(made), str(source)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)


class Driver:
    """What Triton asks of a GPU's driver"""

    def __init__(self) -> None:
        from triton.backends.nvidia import driver

        self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def begin() -> ctypes.CDLL:
    """From now on this process has a GPU, as it were; its driver says what it saw: ``launches``, ``expected``, ``seen``."""
    found = _driver(Path(tempfile.mkdtemp(prefix="fastnn-driver-")))
    from triton.runtime import driver

    driver.set_active(Driver())
    from fastnn import backends
    from fastnn.kernels.gpu.engine import launch, replay
    from fastnn.ops import _operator

    launch.chip = lambda device: launch.Chip("sm_90", 227 << 10, 132)
    replay.empty_on_gpu = replay._empty_on_cpu
    backends._DEVICE["gpu"] = "cpu"
    backends._backend_of = lambda args: "gpu"
    here = _operator._CALL.replace("{first}.is_cuda", "{first}.is_cpu").replace("== current_device()", "== -1")
    _operator._CALL = here.replace("and {all_on_cpu}", "and False")
    for op in _operators():
        op.call = op._write_call(op.allocate is _operator._by_shape)
    for name in [n for n in sys.modules if n.startswith("fastnn.functional")]:  # they hold the calls that were
        importlib.reload(sys.modules[name])
    return found


def _operators() -> Iterator[Any]:
    from fastnn.ops._operator import Operator

    for name in [n for n in sys.modules if n.startswith("fastnn.ops.")]:
        yield from (op for op in vars(sys.modules[name]).values() if isinstance(op, Operator))


@contextmanager
def forgetful() -> Iterator[None]:
    """Inside, no call is remembered: each goes the way of a first one."""
    from fastnn.ops._operator import Operator

    before, Operator._comes_again = Operator._comes_again, lambda self, kind: False  # type: ignore[method-assign]
    for op in _operators():
        op.forget()
    try:
        yield
    finally:
        Operator._comes_again = before  # type: ignore[method-assign]
