# ruff: noqa: E402
"""Compiles Triton kernels for chips that are not here, and says what each would use. Run as a script, in a process of its own:
Triton must not be in its interpreter, and an error inside LLVM ends the process.

The builds of ``gpu_builds`` are calls of operators on tensors without memory. The host code runs as it would on the chip, with
its table of configurations; what it would launch is compiled instead. A line of JSON is printed for each kernel and chip.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from fastnn import backends
from fastnn.kernels.gpu import conv
from fastnn.kernels.gpu.engine import cuda, launch
from fastnn.kernels.gpu.engine.launch import Chip
from gpu_builds import BUILDS, Build

CHIPS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Chip("sm_80", 163 << 10, 108)),
    "sm_90": (GPUTarget("cuda", 90, 32), Chip("sm_90", 227 << 10, 132)),
    "sm_100": (GPUTarget("cuda", 100, 32), Chip("sm_100", 227 << 10, 148)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Chip("gfx942", 64 << 10, 304)),
}
MATRIX = {"sm_80": r"mma\.sync", "sm_90": r"wgmma|mma\.sync", "sm_100": r"tcgen05|mma\.sync", "gfx942": "v_mfma"}
BEST = {**MATRIX, "sm_90": "wgmma", "sm_100": r"tcgen05\.mma"}
_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


def source(kernel: JITFunction, values: dict[str, Any]) -> ASTSource:
    """What the launcher would compile for these arguments, by its rules: 1 and None are constants, multiples of 16 are known."""
    signature, constants, known = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[name], constants[(at,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[name] = "fp32"
        if special and (isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)):
            known[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=known)


def _tool(name: str, *arguments: str | Path) -> str:
    """What one of NVIDIA's tools says"""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    done = subprocess.run([path, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def serialized(compiled: Any) -> bool:
    """Whether each of Hopper's asynchronous products waits for the one before: ptxas may decide so, and tells if it is asked."""
    code = compiled.asm.get("ptx", "")
    if "wgmma" not in code:
        return False
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(code)
        file.flush()
        return "are serialized" in _tool("ptxas", "-arch=sm_90a", "-v", file.name, "-o", os.devnull)


def used(compiled: Any) -> dict[str, int]:
    """Registers, bytes of local memory (spills) and of shared memory."""
    if "amdgcn" in compiled.asm:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
        spills = 4 * int(found["vgpr_spill_count"])
        return {"registers": int(found["vgpr_count"]), "spills": spills, "shared": compiled.metadata.shared}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", file.name)))
    spills = int(found["STACK"]) + int(found["LOCAL"])
    return {"registers": int(found["REG"]), "spills": spills, "shared": compiled.metadata.shared}


def launches(build: Build, chip: Chip) -> list[tuple[JITFunction, dict[str, Any], dict[str, Any]]]:
    """The kernels that the call would launch on this chip: each with its arguments and its options."""
    found = []

    def record(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
        names = [p.name for p in kernel.params]
        values = dict(zip(names, args)) | {name: options.pop(name) for name in list(options) if name in names}
        for parameter in kernel.params:
            values.setdefault(parameter.name, parameter.default if parameter.has_default else None)
        found.append((kernel, values, options))

    launch.run, launch.chip, backends.float32_precision = record, lambda device: chip, build.float32
    conv.PLAIN = build.plain
    torch.use_deterministic_algorithms(build.deterministic)
    cuda.refusal = lambda: "kernels in CUDA C are compiled elsewhere"
    op, args = build.call()
    kernel, supports, _ = backends.load("gpu", op)
    assert kernel is not None, supports and supports(op.name, *args)
    assert supports is None or supports(op.name, *args) is None, supports(op.name, *args)
    kernel(op.allocate(op.check(*args), *args), *args)  # no `inspect`: there are no values
    return found


def facts(compiled: Any, chip: str) -> dict[str, Any]:
    """What a kernel uses, and whether matrix instructions are in its code."""
    code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    found = {key: bool(re.search(by[chip], code)) for key, by in (("matrix", MATRIX), ("best", BEST))}
    copied = bool(re.search(r"cp\.(reduce\.)?async\.bulk\.tensor", code))
    return {**used(compiled), **found, "copied": copied, "serialized": serialized(compiled)}


def main() -> None:
    families = sys.argv[1:]  # by hand: only these
    known: dict[tuple[str, str, str], dict[str, Any]] = {}  # what several builds launch is compiled once
    for build in BUILDS:
        if families and build.family not in families:
            continue
        for name in build.chips:
            target, chip = CHIPS[name]
            for kernel, values, options in launches(build, chip):
                if build.only and kernel.__name__ not in build.only:
                    continue
                made = source(kernel, values)
                key = name, made.hash(), str(sorted(options.items()))
                if key not in known:
                    known[key] = facts(triton.compile(made, target=target, options=options), name)
                line = {"build": build.name, "family": build.family, "chip": name, "kernel": kernel.__name__}
                print(json.dumps(line | {"limit": chip.shared} | known[key]), flush=True)


if __name__ == "__main__":
    main()
