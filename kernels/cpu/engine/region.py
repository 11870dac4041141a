"""The compiler's side of ``threads``: parallel regions, and what threads of a region use to wait for each other."""

from __future__ import annotations

import platform
from collections.abc import Callable
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


def _compile(typingctx: Any, body: Any, args: Any) -> tuple[Any, tuple[Any, ...]]:
    """Body, for two int64 and the args, and those types."""
    full = (types.int64, types.int64, *(getattr(t, "literal_type", t) for t in args))
    typingctx.resolve_function_type(body, full, {})  # compiles it
    return body.dispatcher.overloads[full], full


def _launch(context: Any, builder: ir.IRBuilder, n: Any, items: list[Any], region: Callable[..., None]) -> None:
    """Run region(builder, thread, threads, items) on up to n threads, with the items as they are now."""
    module = builder.module
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
    region(inside, outlined.args[1], outlined.args[2], unpacked)
    inside.ret_void()

    # … launched by whoever owns the threads.
    with builder.if_else(builder.icmp_signed("<=", n, _i64(1))) as (serial, threaded):
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
                builder.call(launch, [builder.bitcast(adapter, _pointer), raw, builder.trunc(n, _i32), _i32(0)])
            else:
                launch = _extern(module, "python_parallel", _void, _pointer, _pointer, _i64)
                builder.call(launch, [builder.bitcast(outlined, _pointer), raw, n])


@intrinsic
def parallel(typingctx, n, body, args):
    """parallel(n, body, args): run body(thread, threads, *args) on up to n threads. args is a tuple of scalars."""
    compiled, full = _compile(typingctx, body, args)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, values: Any) -> Any:
        def region(inside: ir.IRBuilder, thread: Any, threads: Any, items: list[Any]) -> None:
            function = context.declare_function(inside.module, compiled.fndesc)
            context.call_conv.call_function(inside, function, types.none, full, [thread, threads, *items])

        context.add_linking_libs([compiled.library])
        _launch(context, builder, values[0], cgutils.unpack_tuple(builder, values[2], len(args)), region)
        return context.get_dummy_value()

    return types.none(types.int64, body, args), codegen


@intrinsic
def parallel_tasks(typingctx, n, tasks, body, args):
    """parallel_tasks(n, tasks, body, args): run body(thread, task, *args) for every task, each on whichever of up to n
    threads is free next: a core that is slower, or busy with something else, holds nobody up.
    """
    compiled, full = _compile(typingctx, body, args)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, values: Any) -> Any:
        def region(inside: ir.IRBuilder, thread: Any, threads: Any, items: list[Any]) -> None:
            function = context.declare_function(inside.module, compiled.fndesc)
            taken, total, *rest = items
            loop, run, done = (inside.append_basic_block(name) for name in ("take", "run", "done"))
            inside.branch(loop)
            inside.position_at_end(loop)
            task = inside.atomic_rmw("add", taken, _i64(1), "monotonic")
            inside.cbranch(inside.icmp_signed("<", task, total), run, done)
            inside.position_at_end(run)
            context.call_conv.call_function(inside, function, types.none, full, [thread, task, *rest])
            inside.branch(loop)
            inside.position_at_end(done)

        context.add_linking_libs([compiled.library])
        taken = cgutils.alloca_once(builder, _i64)
        builder.store(_i64(0), taken)
        items = cgutils.unpack_tuple(builder, values[3], len(args))
        _launch(context, builder, values[0], [taken, values[1], *items], region)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, body, args), codegen


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
    """
    if threads > 1:
        arrive(counter)
        wait_for(counter, threads * number)


@inline
def arrive(counter):
    """Count one more: what this thread has stored is there for whoever has waited for it"""
    atomic_add(counter, 1)


@inline
def wait_for(counter, value):
    """Wait until the int64 at ``counter`` is as large. A thread that waits for one that has lost its core gives its own away, for
    else it would spin for the rest of its time slice."""
    spins = 0
    while atomic_load(counter) < value:
        spins += 1
        if spins < SPINS:
            relax()
        else:
            give_way()
