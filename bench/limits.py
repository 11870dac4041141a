"""What this machine can do at most: multiply-adds a second, and bytes read, written or copied a second.

The loops are LLVM text, compiled by llvmlite for the host with its widest vectors; they share no code with the
kernels that they judge. Each is started on torch's own OpenMP pool where there is one (a start costs a microsecond),
else on Python threads, so a limit includes the same start-up that every provider pays.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from fastnn.kernels.cpu.engine import host

from . import timing

#: Vector loads a step of the memory loops.
STEP = 8
#: Memory is not measured with more bytes than this: no cache holds them, so the speed stays what it is.
_LARGE = 256 << 20
#: The bytes that a header's limits of memory are said for, and what is measured by the number of arrays that are copied.
_USUAL, _KINDS = 64 << 20, ("read", "copy", "two into one")
_ATTEMPTS = 5


def _features() -> dict[str, bool]:
    import llvmlite.binding as llvm

    return dict(llvm.get_host_cpu_features())


@cache
def vector_bytes() -> int:
    """Width of the host's widest vectors in bytes."""
    has = _features()
    return 64 if has.get("avx512f") else 32 if has.get("avx2") else 16


def has_bf16_dot() -> bool:
    """True where the CPU multiplies pairs of bfloat16 into float32 (avx512_bf16)."""
    return bool(_features().get("avx512bf16"))


# The loops. Every function takes one block of int64: [next part, parts, steps a part, three addresses, times that a
# part is gone through]; a thread takes parts until none is left, so it does not matter how many threads the runtime
# really starts.

_FRAME = """
define void @{name}(ptr %d) {{
entry:
  %p1 = getelementptr i64, ptr %d, i64 1
  %parts = load i64, ptr %p1
  %p2 = getelementptr i64, ptr %d, i64 2
  %steps = load i64, ptr %p2
  %p3 = getelementptr i64, ptr %d, i64 3
  %a = load ptr, ptr %p3
  %p4 = getelementptr i64, ptr %d, i64 4
  %b = load ptr, ptr %p4
  %p5 = getelementptr i64, ptr %d, i64 5
  %out = load ptr, ptr %p5
  %p6 = getelementptr i64, ptr %d, i64 6
  %times = load i64, ptr %p6
  br label %next
next:
  %part = atomicrmw add ptr %d, i64 1 monotonic
  %more = icmp slt i64 %part, %parts
  br i1 %more, label %start, label %done
start:
  %time = phi i64 [ 0, %next ], [ %time1, %finish ]
{start}
  br label %loop
loop:
  %i = phi i64 [ 0, %start ], [ %i1, %loop ]
{loop}
  %i1 = add i64 %i, 1
  %again = icmp slt i64 %i1, %steps
  br i1 %again, label %loop, label %finish
finish:
{finish}
  %time1 = add i64 %time, 1
  %onceMore = icmp slt i64 %time1, %times
  br i1 %onceMore, label %start, label %next
done:
  ret void
}}
"""


def _fma_text(dtype: torch.dtype) -> tuple[str, int]:
    """A loop of independent multiply-adds on accumulators that stay in registers; also its operations a step."""
    width = vector_bytes()
    chains = 24 if width == 64 else 12  # two pipes of latency 4 or 5 need ten; the register file has 32 or 16
    if dtype == torch.bfloat16:
        acc, arg, flops = "<16 x float>", "<32 x bfloat>", 64
        call = "@llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> {c}, <32 x bfloat> %x, <32 x bfloat> %y)"
        declare = "declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)"
    else:
        scalar, size = ("double", 8) if dtype == torch.float64 else ("float", 4)
        lanes = width // size
        acc = arg = f"<{lanes} x {scalar}>"
        flops = 2 * lanes
        # Without an FMA instruction llvm.fma is a call of the C library: the limit is then multiply and add.
        fused = _features().get("fma") or platform.machine().lower() in ("arm64", "aarch64")
        name = f"@llvm.{'fma' if fused else 'fmuladd'}.v{lanes}f{size * 8}"
        call = f"{name}({acc} %x, {acc} %y, {acc} {{c}})"
        declare = f"declare {acc} {name}({acc}, {acc}, {acc})"
    start = [f"  %x = load {arg}, ptr %a, align 8", f"  %y = load {arg}, ptr %b, align 8"]
    loop, body, finish = [], [], []
    for n in range(chains):
        start += [f"  %s{n}p = getelementptr {acc}, ptr %a, i64 {n + 1}", f"  %s{n} = load {acc}, ptr %s{n}p, align 8"]
        loop.append(f"  %c{n} = phi {acc} [ %s{n}, %start ], [ %r{n}, %loop ]")
        body.append(f"  %r{n} = call {acc} " + call.format(c=f"%c{n}"))
        # Every accumulator is stored, to the part's own place, so none is dead.
        finish += [
            f"  %o{n}i = mul i64 %part, {chains}",
            f"  %o{n}j = add i64 %o{n}i, {n}",
            f"  %o{n}p = getelementptr {acc}, ptr %out, i64 %o{n}j",
            f"  store {acc} %r{n}, ptr %o{n}p, align 8",
        ]
    text = declare + _FRAME.format(
        name="fma", start="\n".join(start), loop="\n".join(loop + body), finish="\n".join(finish)
    )
    return text, flops * chains


def _memory_text(sources: int, store: str, streams: int) -> str:
    """Reads one or two arrays; writes their xor (``store``: "plain" or "stream", past the caches) or keeps only a
    checksum. With none, writes the first vector of the first array everywhere.

    A part is cut in ``streams`` that are walked side by side, since some memories serve several streams faster than
    one.
    """
    lanes = vector_bytes() // 4
    vec, step = f"<{lanes} x i32>", STEP // streams
    start = [
        f"  %stream = mul i64 %steps, {step * vector_bytes()}",
        f"  %size = mul i64 %stream, {streams}",
        "  %begin = mul i64 %part, %size",
        f"  %first = load {vec}, ptr %a, align {vector_bytes()}",
    ]
    phis, body, finish = [], [], []
    end = ""
    for s in range(streams):
        start += [f"  %f{s} = mul i64 %stream, {s}", f"  %o{s} = add i64 %begin, %f{s}"]
        body += [f"  %k{s} = mul i64 %i, {step * vector_bytes()}", f"  %q{s} = add i64 %o{s}, %k{s}"]
        for u in range(step):
            n = s * step + u
            value = f"%va{n}" if sources else "%first"
            body.append(f"  %w{n} = add i64 %q{s}, {u * vector_bytes()}")
            for array in "ab"[:sources]:
                body += [
                    f"  %p{array}{n} = getelementptr i8, ptr %{array}, i64 %w{n}",
                    f"  %v{array}{n} = load {vec}, ptr %p{array}{n}, align {vector_bytes()}",
                ]
            if sources == 2:
                body.append(f"  %x{n} = xor {vec} %va{n}, %vb{n}")
                value = f"%x{n}"
            if store:
                hint = ", !nontemporal !0" if store == "stream" else ""
                body += [
                    f"  %po{n} = getelementptr i8, ptr %out, i64 %w{n}",
                    f"  store {vec} {value}, ptr %po{n}, align {vector_bytes()}{hint}",
                ]
            else:
                phis.append(f"  %c{n} = phi {vec} [ zeroinitializer, %start ], [ %r{n}, %loop ]")
                body.append(f"  %r{n} = xor {vec} %c{n}, {value}")
    if not store:
        for n in range(1, STEP):
            finish.append(f"  %t{n} = xor {vec} {f'%t{n - 1}' if n > 1 else '%r0'}, %r{n}")
        finish += [f"  %ti = getelementptr {vec}, ptr %out, i64 %part", f"  store {vec} %t{STEP - 1}, ptr %ti, align 4"]
    if store == "stream":
        end = "\n!0 = !{i32 1}\n"
    return (
        _FRAME.format(name="memory", start="\n".join(start), loop="\n".join(phis + body), finish="\n".join(finish))
        + end
    )


_libraries: list[object] = []  # compiled code lives as long as its library


def _triple() -> str:
    import llvmlite.binding as llvm

    return str(llvm.get_process_triple())


def _machine() -> object:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # LLVM would split 512-bit vectors in two on many CPUs without this.
    features = llvm.get_host_cpu_features().flatten() + (",-prefer-256-bit" if vector_bytes() == 64 else "")
    return llvm.Target.from_triple(_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=2
    )


def assembly(text: str) -> str:
    """The machine code of a loop, to be read."""
    import llvmlite.binding as llvm

    machine = _machine()
    return str(machine.emit_assembly(llvm.parse_assembly(text)))  # type: ignore[attr-defined]


@cache
def _jit() -> Any:
    import llvmlite.binding as llvm

    return llvm.create_lljit_compiler(_machine(), use_jit_link=True)


def _compile(text: str, name: str) -> int:
    import llvmlite.binding as llvm

    library = llvm.JITLibraryBuilder().add_ir(text).export_symbol(name).link(_jit(), f"{name}_{len(_libraries)}")
    _libraries.append(library)
    return int(library[name])


@cache
def _fma(dtype: torch.dtype) -> tuple[int, int]:
    text, flops = _fma_text(dtype)
    return _compile(text, "fma"), flops


@cache
def _memory(sources: int, store: str, streams: int) -> int:
    return _compile(_memory_text(sources, store, streams), "memory")


# Starting them on several threads -------------------------------------------------------------------------------------


@cache
def _gomp() -> Callable[[int, int, int], None] | None:
    """``GOMP_parallel`` of the libgomp that torch has loaded; None where torch has another runtime."""
    if sys.platform != "linux":
        return None
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    if not paths:
        return None
    parallel = ctypes.CDLL(
        min(paths, key=lambda path: ("torch" not in path, path))
    ).GOMP_parallel  # torch's own copy first
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return lambda function, data, threads: parallel(function, data, threads, 0)


def launch(function: int, data: ctypes.Array[ctypes.c_int64], threads: int) -> None:
    """Run ``function(data)`` on so many threads; ``data[0]`` counts the parts that have been taken."""
    data[0] = 0
    address = ctypes.addressof(data)
    gomp = _gomp()
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    if threads == 1:
        call(address)
    elif gomp is not None:
        gomp(function, address, threads)
    else:
        crew = [threading.Thread(target=call, args=(address,)) for _ in range(threads - 1)]
        for member in crew:
            member.start()
        call(address)
        for member in crew:
            member.join()


def _quick_fifth(samples: list[float]) -> float:
    """The time that one call in five beats."""
    return sorted(samples)[len(samples) // 5]


def _repeat(call: Callable[[], object], seconds: float, least: int = 5) -> list[float]:
    """Times of repeated calls, after the stopwatch's pause (pools that spin) and two discarded ones."""
    timing.pause()
    call()
    call()
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < stop:
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return samples


# The limits -----------------------------------------------------------------------------------------------------------


def fma_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type whose arithmetic limits a product in ``dtype``: bfloat16 has instructions of its own on some CPUs."""
    if dtype == torch.bfloat16 and has_bf16_dot():
        return torch.bfloat16
    return torch.float64 if dtype == torch.float64 else torch.float32


def fma(dtype: torch.dtype, threads: int, seconds: float = 0.1) -> float:
    """Floating-point operations a second (a multiply-add counts as two) on so many threads."""
    function, flops = _fma(fma_dtype(dtype))
    source = torch.full((64 * 64,), 1e-3, dtype=fma_dtype(dtype))
    sink = torch.empty(64 * 64 * threads, dtype=torch.float64)
    steps = 200_000
    data = _data(threads, steps, source, source, sink)
    return threads * steps * flops / min(_repeat(lambda: launch(function, data, threads), seconds))


def _buffer(size: int) -> torch.Tensor:
    """Memory whose address suits every vector."""
    room = torch.empty(size + 64, dtype=torch.uint8)
    return room[-room.data_ptr() % 64 :][:size]


def new_pages(size: int) -> torch.Tensor:
    """Memory that the system gives, and clears when it is first touched."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}  # as malloc's
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=torch.uint8)


def _block(threads: int, size: int) -> tuple[int, int]:
    """Steps a part and bytes that are really walked, for ``size`` bytes cut in a part a thread."""
    steps = max(1, size // threads // (STEP * vector_bytes()))
    return steps, steps * threads * STEP * vector_bytes()


def _data(
    parts: int, steps: int, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, times: int = 1
) -> ctypes.Array[ctypes.c_int64]:
    """The block that a loop takes."""
    return (ctypes.c_int64 * 7)(0, parts, steps, a.data_ptr(), b.data_ptr(), out.data_ptr(), times)


def read(size: int, threads: int, seconds: float = 0.05, times: int = 1) -> float:
    """Bytes a second when all threads read ``size`` bytes again and again; the best of several access patterns.

    With ``times`` so often in one call, each thread its own part: in small caches the start-up would else be the measure.
    """
    steps, walked = _block(threads, size)
    source, sink = _buffer(walked), _buffer(4096 * threads)
    source.fill_(1)
    data = _data(threads, steps, source, source, sink, times)
    functions = [_memory(1, "", streams) for streams in (1, 2, 4, 8)]
    return max(times * walked / _quick_fifth(_repeat(partial(launch, f, data, threads), seconds)) for f in functions)


def copy(
    size: int, threads: int, sources: int = 1, fresh: Callable[[int], torch.Tensor] | None = _buffer, seconds: float = 0.05,
    times: int = 1,
) -> float:
    """Bytes a second, reads and writes together, when ``size`` bytes are written from one or two arrays of that size.

    Without a source they are written only; ``times`` as in ``read``. With ``fresh`` each call allocates its output: by
    ``torch.empty``, as an operator that returns a new tensor must, or by ``new_pages``; the best of plain and streaming stores,
    and of ``torch.clone``.
    """
    steps, walked = _block(threads, size)
    inputs = [_buffer(walked if sources else 64).fill_(1) for _ in range(sources or 1)]
    old = _buffer(walked)
    data = _data(threads, steps, inputs[0], inputs[-1], old, times)
    rates = []
    for store in ("plain", "stream"):
        for streams in (1, 4):
            function = _memory(sources, store, streams)

            def call(function: int = function) -> object:
                out = fresh(walked) if fresh else old
                data[5] = out.data_ptr()
                launch(function, data, threads)
                return out

            rates.append(times * walked * (sources + 1) / _quick_fifth(_repeat(call, seconds)))
    if fresh is _buffer and sources == 1:
        rates.append(walked * 2 / _quick_fifth(_repeat(inputs[0].clone, seconds)))
    return max(rates)


def memory_size() -> int:
    """Bytes that no cache holds."""
    return min(max(4 * host.caches().l3, _USUAL), _LARGE)


def bandwidths(threads: int, seconds: float = 0.02) -> dict[str, dict[str, float]]:
    """Bytes a second that all threads read, write and copy (reads and writes together) in each cache and in memory.

    In L1 and L2 each thread has half of its core's; in L3 they share a half; in memory it is four times L3.
    """
    caches = host.caches()
    sizes = {"l1": threads * caches.l1 // 2, "l2": threads * caches.l2 // 2, "l3": caches.l3 // 2}
    sizes["memory"] = memory_size()
    found: dict[str, dict[str, float]] = {"read": {}, "write": {}, "copy": {}}
    for level, size in sizes.items():
        if not size:
            continue
        times = max(1, (16 << 20) // size)
        for _ in range(2):  # the better one: a moment's neighbour would else be taken for the cache
            rates = {
                "read": read(size, threads, seconds, times),
                "write": copy(size, threads, 0, None, seconds, times),
                "copy": copy(size // 2, threads, 1, None, seconds, times),
            }
            for what, rate in rates.items():
                found[what][level] = max(rate, found[what].get(level, 0.0))
    return found


class Limits:
    """The limits of one run and number of threads: measured when first asked for, the best measurement kept."""

    def __init__(self, threads: int, seconds: float = 0.05) -> None:
        self.threads, self.seconds = threads, seconds
        self._fma: dict[torch.dtype, float] = {}
        self._memory: dict[tuple[int, int], float] = {}

    def fma(self, dtype: torch.dtype) -> float:
        """Operations a second."""
        kind = fma_dtype(dtype)
        if kind not in self._fma:
            self.refresh_fma(dtype)
        return self._fma[kind]

    def refresh_fma(self, dtype: torch.dtype) -> float:
        """Measure again; returns this measurement: lower if the clock has slowed or a neighbour is at work."""
        rate = fma(dtype, self.threads, self.seconds)
        kind = fma_dtype(dtype)
        self._fma[kind] = max(rate, self._fma.get(kind, 0.0))
        return rate

    def describe(self) -> dict[str, Any]:
        """What a header says of the limits, in GFLOP/s and GB/s."""
        one = Limits(1)
        kinds = [torch.float32, torch.float64] + ([torch.bfloat16] if has_bf16_dot() else [])
        for kind in kinds:
            self.fma(kind)
            for _ in range(_ATTEMPTS):  # a core that was somebody else's for a moment would be half of the limit
                if self.fma(kind) >= 0.9 * self.threads * one.fma(kind):
                    break
                self.refresh_fma(kind)
        self.memory(_USUAL, 0)
        self.memory(_USUAL, _USUAL)
        return {
            "fma_gflops_one_core": one.known()["fma_gflops"],
            "bandwidth_gbs": {
                what: {level: rate / 1e9 for level, rate in rates.items()}
                for what, rates in bandwidths(self.threads).items()
            },
            "copy_gbs_64MiB_same_output": copy(_USUAL, self.threads, fresh=None) / 1e9,
            "copy_gbs_64MiB_new_pages": copy(_USUAL, self.threads, fresh=new_pages) / 1e9,
            **self.known(),
        }

    def known(self) -> dict[str, Any]:
        """The best of each limit so far, in GFLOP/s and GB/s, by the header's names."""
        moved = sorted(self._memory.items())
        found = {
            # What is read or copied beyond that comes from the same memory.
            name: max((rate for (size, kind), rate in moved if kind == sources and size >= _USUAL), default=0.0)
            for sources, name in enumerate(("read_gbs_64MiB", "copy_gbs_64MiB_new_output"))
        }
        return {
            "fma_gflops": {str(kind).removeprefix("torch."): rate / 1e9 for kind, rate in self._fma.items()},
            "memory_gbs": {f"{_KINDS[sources]} {size / 2**20:.3g} MiB": rate / 1e9 for (size, sources), rate in moved},
            **{name: rate / 1e9 for name, rate in found.items() if rate},
        }

    def memory(self, reads: int, writes: int, again: bool = False, cold: bool = False) -> float:
        """Seconds that moving so many bytes takes at least, each read or written once; with ``again``, measured anew.

        With ``cold`` by the speed of memory, also where a cache would hold so many.
        Where next to nothing is written, the measure is reading; else a copy (of one array, or of two into one).
        """
        total = reads + writes
        if writes * 8 < reads:
            key = _round(total), 0
        else:
            key = _round(writes), 2 if reads > 1.5 * writes else 1
        if cold:
            key = max(key[0], memory_size()), key[1]
        if again or key not in self._memory:
            size, sources = min(key[0], _LARGE), key[1]
            rate = (
                copy(size, self.threads, sources, seconds=self.seconds)
                if sources
                else read(size, self.threads, self.seconds)
            )
            self._memory[key] = max(rate, self._memory.get(key, 0.0))
        return total / self._memory[key]


def _round(size: int) -> int:
    """``size`` to three binary digits, upwards, so that like cases share a measurement."""
    step = 1 << max(0, size.bit_length() - 3)
    return -(-size // step) * step
