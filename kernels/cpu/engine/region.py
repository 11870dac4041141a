"""The compiler's side of ``threads``: ``parallel`` and what threads of a region use to wait for each other."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import inline
from .threads import LAUNCHER

_i32, _i64 = ir.IntType(32), ir.IntType(64)
_pointer = ir.IntType(8).as_pointer()
_void = ir.VoidType()
SPINS = 20000  # looks at a barrier before a thread gives its core away: about half a millisecond


def _extern(module: ir.Module, name: str, result: Any, *args: Any) -> Any:
    return cgutils.get_or_insert_function(module, ir.FunctionType(result, args), "fastnn_" + name)


@intrinsic
def parallel(typingctx, n, body, args):
    """parallel(n, body, args): run body(thread, threads, *args) on up to n threads. args is a tuple of scalars."""
    argument_types = tuple(getattr(t, "literal_type", t) for t in args)
    full = (types.int64, types.int64, *argument_types)
    typingctx.resolve_function_type(body, full, {})  # compiles it
    compiled = body.dispatcher.overloads[full]

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, values: Any) -> Any:
        module = builder.module
        items = cgutils.unpack_tuple(builder, values[2], len(argument_types))
        struct = ir.LiteralStructType([v.type for v in items])
        data = cgutils.alloca_once(builder, struct)
        for k, v in enumerate(items):
            builder.store(v, builder.gep(data, [_i32(0), _i32(k)]))
        raw = builder.bitcast(data, _pointer)

        # The region's body as a C function of (data, thread, threads) …
        bodies = ir.FunctionType(_void, [_pointer, _i64, _i64])
        outlined = ir.Function(module, bodies, module.get_unique_name("fastnn_region"))
        outlined.linkage = "internal"
        inside = ir.IRBuilder(outlined.append_basic_block())
        view = inside.bitcast(outlined.args[0], struct.as_pointer())
        unpacked = [inside.load(inside.gep(view, [_i32(0), _i32(k)])) for k in range(len(items))]
        context.add_linking_libs([compiled.library])
        function = context.declare_function(module, compiled.fndesc)
        context.call_conv.call_function(inside, function, types.none, full, [outlined.args[1], outlined.args[2], *unpacked])
        inside.ret_void()

        # … launched by whoever owns the threads.
        with builder.if_else(builder.icmp_signed("<=", values[0], _i64(1))) as (serial, threaded):
            with serial:
                builder.call(outlined, [raw, _i64(0), _i64(1)])
            with threaded:
                if LAUNCHER == "gomp":
                    adapter = ir.Function(module, ir.FunctionType(_void, [_pointer]), module.get_unique_name("fastnn_adapter"))
                    adapter.linkage = "internal"
                    ab = ir.IRBuilder(adapter.append_basic_block())
                    thread = ab.call(_extern(module, "omp_get_thread_num", _i32), [])
                    team = ab.call(_extern(module, "omp_get_num_threads", _i32), [])
                    ab.call(outlined, [adapter.args[0], ab.sext(thread, _i64), ab.sext(team, _i64)])
                    ab.ret_void()
                    launch = _extern(module, "GOMP_parallel", _void, _pointer, _pointer, _i32, _i32)
                    builder.call(launch, [builder.bitcast(adapter, _pointer), raw, builder.trunc(values[0], _i32), _i32(0)])
                else:
                    launch = _extern(module, "python_parallel", _void, _pointer, _pointer, _i64)
                    builder.call(launch, [builder.bitcast(outlined, _pointer), raw, values[0]])
        return context.get_dummy_value()

    return types.none(types.int64, body, args), codegen


@intrinsic
def atomic_add(typingctx, address, value):
    """atomic_add(address, value) -> the int64 that was there; sequentially consistent"""
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _i64.as_pointer()), args[1], "seq_cst")
    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx, address):
    """atomic_load(address) -> int64, acquire"""
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _i64.as_pointer()), "acquire", 8)
    return types.int64(types.int64), codegen


@intrinsic
def relax(typingctx):
    """relax(): what a loop that waits does each time, so that the core's other thread may work"""
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        if platform.machine().lower() in ("x86_64", "amd64"):
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(_void, []), "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()
    return types.none(), codegen


@intrinsic
def give_way(typingctx):
    """give_way(): let the operating system run something else on this core"""
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        builder.call(_extern(builder.module, "give_way", _i32), [])
        return context.get_dummy_value()
    return types.none(), codegen


@inline
def barrier(counter, threads, number):
    """barrier(address, threads, number): wait until all of a region's ``threads`` have come to their barrier of this number,
    counted from 1. The int64 at ``address`` is 0 before the region; ``threads`` is the region's true number, or it never ends.

    A thread whose partner has lost its core gives its own away, for else it would spin for the rest of its time slice.
    """
    if threads > 1:
        atomic_add(counter, 1)
        spins = 0
        while atomic_load(counter) < threads * number:
            spins += 1
            if spins < SPINS:
                relax()
            else:
                give_way()
