"""What NVRTC makes of CUDA C on a machine without a GPU: the wheel of the extra ``gpu-check``, called through ctypes.

``python tests/cuda_shim/nvrtc.py pool 90`` compiles every kernel of a family for an architecture and prints what each needs.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """What a compiled kernel needs."""

    registers: int
    local: int  # bytes of local memory a thread: arrays that are not in registers
    spilled: int  # bytes stored and loaded
    shared: int  # bytes of static shared memory


def library() -> Path | None:
    """libnvrtc of NVIDIA's wheel, or None where that is not installed."""
    base = Path(sysconfig.get_paths()["purelib"], "nvidia")
    found = [p for p in base.glob("*/lib/libnvrtc.so.*") if ".alt." not in p.name]
    return found[0] if found else None


def compile(text: str, arch: str, names: Sequence[str]) -> tuple[str, dict[str, Usage]]:
    """(PTX is not asked for, so: the compiler's log, and what each of the named kernels needs). AssertionError with the log."""
    path = library()
    assert path is not None
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # not on the loader's path
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    lib, program = ctypes.CDLL(str(path)), ctypes.c_void_p()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None) == 0
    for name in names:
        assert lib.nvrtcAddNameExpression(program, name.encode()) == 0
    options = [f"--gpu-architecture=sm_{arch}", "-std=c++17", "-ftz=true", "--ptxas-options=-v"]
    given = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    failed, size = lib.nvrtcCompileProgram(program, len(options), given), ctypes.c_size_t()
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, buffer)
    log = buffer.value.decode()
    assert not failed, log
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    needs = {}
    for mangled, stack, stored, loaded, registers, rest in re.findall(pattern, log, re.S):
        static = re.search(r"(\d+) bytes smem", rest)
        needs[mangled] = Usage(int(registers), int(stack), int(stored) + int(loaded), int(static[1]) if static else 0)
    found = {}
    for name in names:
        mangled = ctypes.c_char_p()
        assert lib.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(mangled)) == 0
        assert mangled.value is not None
        found[name] = needs[mangled.value.decode()]
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return log, found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    source = importlib.import_module(f"fastnn.kernels.gpu.{sys.argv[1]}").SOURCE
    for arch in sys.argv[2:] or ("80", "90", "100"):
        for name, usage in sorted(compile(source.text, arch, source.instances())[1].items(), key=lambda i: i[1]):
            print(f"sm_{arch}", name, usage)
