"""A launch that comes again, as one call of machine code into NVIDIA's driver.

Triton's and CuPy's launchers look at each argument of each launch, 1 to 2 µs. Of a launch that comes again only addresses and
the stream differ. So all of it is written down once, as words; ``again`` copies them to its stack, puts the addresses in their
places and calls ``cuLaunchKernel``. It is written in LLVM's own language, which llvmlite, that Numba needs, compiles.

Not here: clusters, cooperative launches, and chips whose driver is not NVIDIA's. Those go to their launcher every time.
"""

from __future__ import annotations

import ctypes
import re
import sys
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

# Words of a launch before its values: function, grid, block, bytes of shared memory, how many values and parameters, and
# where cuLaunchKernel is.
_HEAD = 7
#: How a kernel of Triton's declares parameters that it takes as of some type.
_DECLARED = {"i1": "u8", "i32": "u32", "u32": "u32", "i64": "u64", "u64": "u64", "fp32": "f32", "fp64": "f64"}


class Launch(NamedTuple):
    """What stays the same. The words: ``_HEAD``, the values, and which of these are addresses."""

    words: array[int]
    addresses: list[Tensor]  # whose go where the last words say, in their order
    scratch: int  # bytes of memory whose address comes behind them; 0: there is none

    @property
    def where(self) -> int:
        return self.words.buffer_info()[0]


def of_triton(compiled: Any, programs: int, args: Sequence[Any]) -> Launch | None:
    """A launch of Triton's, all arguments in their order; None if it is none of this kind."""
    has, declared = compiled.metadata, _declared(compiled)
    special = ("launch_cooperative_grid", "launch_pdl", "profile_scratch_size")  # not all of Triton's versions have them
    if declared is None or again() is None or has.num_ctas != 1 or any(getattr(has, name, 0) for name in special):
        return None
    given = [(kind, value) for kind, value in zip(compiled.src.signature.values(), args, strict=True) if kind != "constexpr"]
    expected = ["u64" if kind[0] == "*" else _DECLARED.get(kind) for kind, _ in given]
    if [*expected, "u64", "u64"] != declared:
        return None  # the last two are memory of Triton's: what a kernel needs, and what a profiler wants
    values = [value if isinstance(value, Tensor) else _bits(kind, value) for kind, value in given] + [0, 0]
    place = programs, 32 * has.num_warps, has.shared
    return _launch(compiled.function, *place, values, len(values), has.global_scratch_size * programs)


def of_words(function: int, grid: int, block: int, shared: int, words: Sequence[int | Tensor]) -> Launch | None:
    """A launch of CUDA C's, whose one parameter is a structure of these words."""
    return None if again() is None else _launch(function, grid, block, shared, words, 1, 0)


def _launch(function: int, grid: int, block: int, shared: int, values: Sequence[int | Tensor], parameters: int,
            scratch: int) -> Launch:  # fmt: skip
    """values: a parameter each, or all of them one; of the last but one is the scratch memory"""
    slots = [n for n, v in enumerate(values) if isinstance(v, Tensor) and v.numel()]
    # Nobody reads where a tensor has no numbers; some look whether it is 0.
    fixed = [(0 if v.numel() else v.data_ptr() and 1) if isinstance(v, Tensor) else int(v) for v in values]
    start = ctypes.cast(_library().cuLaunchKernel, ctypes.c_void_p).value or 0
    words = [function, grid, block, shared, len(values), parameters, start, *fixed, *slots, *[len(values) - 2] * (scratch > 0)]
    addresses = [v for v in values if isinstance(v, Tensor) and v.numel()]
    return Launch(array("q", [w - (1 << 64) if w >= 1 << 63 else w for w in words]), addresses, scratch)


def _bits(kind: str, value: Any) -> int:
    """A number as a parameter's word; what is too large for float32 is infinite there"""
    if kind in ("fp32", "fp64"):
        return int.from_bytes(bytes(ctypes.c_float(value) if kind == "fp32" else ctypes.c_double(value)), sys.byteorder)
    return int(value) & (1 << 64) - 1


def _declared(compiled: Any) -> list[str] | None:
    """The types of a kernel's parameters, as its code has them"""
    text = getattr(compiled, "asm", {}).get("ptx")
    header = re.search(r"\.entry \w+\((.*?)\)", text, re.S) if text else None
    return re.findall(r"\.param \.(\w+)", header[1]) if header else None


@cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@cache
def again() -> Callable[..., int] | None:
    """again(words, stream, *addresses): 0, or the driver's error; None where there is no such driver."""
    from fastnn.kernels.cpu.engine import build

    try:
        _library().cuLaunchKernel  # noqa: B018
        return build.load("fastnn_launch_again", _code())
    except (OSError, AttributeError, RuntimeError, ValueError):  # no such driver; nothing may be compiled here
        return None


def _code() -> bytes:
    """``again``, by Python's protocol of a function with positional arguments"""
    from llvmlite import binding, ir

    from fastnn.kernels.cpu.engine import build

    i64, word, byte = ir.IntType(64), ir.IntType(64).as_pointer(), ir.IntType(8).as_pointer()
    module, machine = ir.Module("launch"), build.target_machine()
    module.triple, module.data_layout = machine.triple, str(machine.target_data)

    def python(symbol: str, result: ir.Type, *args: ir.Type) -> ir.Function:
        return ir.Function(module, ir.FunctionType(result, args), f"fastnn_{symbol}")

    number, occurred = python("PyLong_AsLongLong", i64, byte), python("PyErr_Occurred", byte)
    entry = ir.Function(module, ir.FunctionType(byte, [byte, byte.as_pointer(), i64]), "fastnn_launch_again")
    b = ir.IRBuilder(entry.append_basic_block())

    def argument(n: ir.Value) -> ir.Value:
        return b.call(number, [b.load(b.gep(entry.args[1], [n]))])

    def loop(count: ir.Value, body: Callable[[ir.Value], None]) -> None:
        head, inside, behind = (b.append_basic_block() for _ in range(3))
        before = b.block
        b.branch(head)
        b.position_at_end(head)
        n = b.phi(i64)
        n.add_incoming(i64(0), before)
        b.cbranch(b.icmp_signed("<", n, count), inside, behind)
        b.position_at_end(inside)
        body(n)
        n.add_incoming(b.add(n, i64(1)), b.block)
        b.branch(head)
        b.position_at_end(behind)

    words, stream = b.inttoptr(argument(i64(0)), word), b.inttoptr(argument(i64(1)), byte)
    function, grid, block, shared, count, parameters, start = (b.load(b.gep(words, [i64(n)])) for n in range(_HEAD))
    given = b.gep(words, [i64(_HEAD)])
    slots = b.gep(given, [count])
    values, where = b.alloca(i64, count), b.alloca(byte, parameters)
    loop(count, lambda n: b.store(b.load(b.gep(given, [n])), b.gep(values, [n])))
    loop(parameters, lambda n: b.store(b.bitcast(b.gep(values, [n]), byte), b.gep(where, [n])))
    loop(b.sub(entry.args[2], i64(2)),
         lambda n: b.store(argument(b.add(n, i64(2))), b.gep(values, [b.load(b.gep(slots, [n]))])))  # fmt: skip
    with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(b.call(occurred, []), i64), i64(0)), likely=False):
        b.ret(ir.Constant(byte, None))
    i32 = ir.IntType(32)
    takes = [byte, *[i32] * 7, byte, byte.as_pointer(), byte]
    launch = b.inttoptr(start, ir.FunctionType(i32, takes).as_pointer())
    state = b.call(python("PyEval_SaveThread", byte), [])
    g, t, s = (b.trunc(v, i32) for v in (grid, block, shared))
    result = b.call(launch, [b.inttoptr(function, byte), g, i32(1), i32(1), t, i32(1), i32(1), s, stream, where,
                             ir.Constant(byte, None)])  # fmt: skip
    b.call(python("PyEval_RestoreThread", ir.VoidType(), byte), [state])
    b.ret(b.call(python("PyLong_FromLongLong", byte, i64), [b.sext(result, i64)]))
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(parsed, builder)
    return machine.emit_object(parsed)
