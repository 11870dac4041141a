"""What the kernels need to know of the machine: the instruction set, the vector width, the caches.

``FASTNN_SIMD`` (``avx512``, ``avx2``, ``neon``, ``portable``) forces an instruction set below the host's own; the width
decides how the kernels are written, the features what LLVM may use for them.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Simd:
    """An instruction set: its name, vector width in bytes, vector registers, and LLVM's CPU and feature strings."""

    name: str
    width: int
    registers: int
    cpu: str
    features: str
    bf16_dot: bool


@dataclass(frozen=True)
class Caches:
    """Data cache sizes in bytes, as one core sees them."""

    l1: int
    l2: int
    l3: int


def _allowed() -> list[str]:
    """The instruction sets that this host can run, best first."""
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return ["neon", "portable"]
    if machine not in ("x86_64", "amd64"):
        return ["portable"]
    import llvmlite.binding as llvm

    has = llvm.get_host_cpu_features()
    sets = []
    if all(has.get(f) for f in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")):
        sets.append("avx512")
    if has.get("avx2") and has.get("fma") and has.get("f16c"):
        sets.append("avx2")
    return [*sets, "portable"]


@cache
def simd() -> Simd:
    """The instruction set that kernels are built for.

    Raises:
        ValueError: ``FASTNN_SIMD`` names a set that this host cannot run.
    """
    import llvmlite.binding as llvm

    allowed = _allowed()
    name = os.environ.get("FASTNN_SIMD") or allowed[0]
    if name not in allowed:
        raise ValueError(f"FASTNN_SIMD is {name!r}, but this host allows only: {', '.join(allowed)}")
    host = llvm.get_host_cpu_name()
    features = llvm.get_host_cpu_features()
    if name == "avx512":
        # LLVM prefers 256-bit vectors on many CPUs that have 512-bit ones; we write the width out ourselves.
        flags = features.flatten() + ",-prefer-256-bit"
        return Simd(name, 64, 32, host, flags, bool(features.get("avx512bf16")))
    if name == "avx2":
        return Simd(name, 32, 16, "x86-64-v3", "+avx2,+fma,+f16c", False)
    if name == "neon":
        return Simd(name, 16, 32, host, features.flatten(), False)
    return Simd(name, 16, 16, "", "", False)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # not Linux, or a container that hides it: the caller has a default
        return ""


@cache
def caches() -> Caches:
    """Data cache sizes of core 0, from sysfs where it exists, else sizes that most CPUs of today exceed."""
    sizes = {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (_read(index / f) for f in ("type", "level", "size"))
        if kind in ("Data", "Unified") and level in ("1", "2", "3") and size[:-1].isdigit():
            sizes[int(level)] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
    return Caches(sizes[1], sizes[2], sizes[3])
