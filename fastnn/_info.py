"""What a bug report needs to know of a machine; also the header of every benchmark result."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: What each optional package brings.
EXTRAS = {
    "numba": "the CPU kernels; without it torch serves everything",
    "triton": "the GPU kernels written in Triton",
    "cupy": "the GPU kernels written in CUDA C",
    "rich": "tables and progress bars of python -m fastnn",
    "matplotlib": "python -m fastnn bench --plot",
    "threadpoolctl": "NumPy as a peer of the benchmark at any number of threads",
}
_DISTRIBUTIONS = {"cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}


def installed(package: str) -> str | None:
    """The version of a package, found without importing it; None if it is not installed."""
    for name in _DISTRIBUTIONS.get(package, (package,)):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _affinity() -> list[int] | None:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _memory() -> int | None:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def machine() -> dict[str, Any]:
    """CPU, caches and memory of this machine, as far as the system tells."""
    import torch

    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "os": platform.platform(),
        "cores": os.cpu_count(),
        "affinity": _affinity(),
        "memory": _memory(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if installed("llvmlite"):
        import llvmlite.binding as llvm

        has = llvm.get_host_cpu_features()
        facts["cpu_llvm"] = llvm.get_host_cpu_name()
        facts["features"] = sorted(name for name, there in has.items() if there)
    if installed("numba"):
        from .kernels.cpu.engine import host

        caches = host.caches()
        facts["caches"] = {"l1": caches.l1, "l2": caches.l2, "l3": caches.l3}
        facts["simd"] = {"name": host.simd().name, "bytes": host.simd().width}
    return facts


def versions() -> dict[str, str | None]:
    """Versions of Python and of every package that matters; None for what is not installed."""
    import torch

    from . import __version__

    found: dict[str, str | None] = {"fastnn": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {name: installed(name) for name in ("numpy", "numba", "llvmlite", *(e for e in EXTRAS if e != "numba"))}
