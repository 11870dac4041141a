"""From a Python function to machine code that is called from Python, kept on disk.

``Kernel`` compiles a function of int64 and float64 arguments with Numba, hands the result to LLVM for the chosen instruction
set, and keeps the object file. A later process loads that file through llvmlite alone: Numba is not even imported.

The cache is code, so it is trusted only if nobody else could have written it: the folder and the files belong to the
user and only the user can write there; each file starts with the digest of the rest. The key of a file covers every source
file of the CPU kernels, the compiler's versions and the instruction set, so a change anywhere rebuilds.

Environment: ``FASTNN_CACHE_DIR`` (default: ``fastnn`` in ``XDG_CACHE_HOME``, or in ``~/.cache``); an empty value keeps nothing
on disk.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import itertools
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import llvmlite.binding as llvm

from . import threads
from .host import simd

_MAGIC = b"fastnn-kernel-1\n"
# Asked at import: where Numba is missing, that is when the caller is told, and nothing has begun.
_COMPILER = version("numba"), version("llvmlite")
_lock = threading.RLock()


def _new_lock() -> None:
    """In a forked child: the thread that held the old one is not there to let it go."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


@cache
def _unusable(where: Path, why: str) -> None:
    """Say so, once: every kernel asks for the folder."""
    warnings.warn(f"fastnn: the kernel cache {where} cannot be used ({why}); kernels are built in memory. "
                  "Set FASTNN_CACHE_DIR to a folder that can be written.", stacklevel=3)


def cache_dir() -> Path | None:
    """Where object files are kept; None when the user turned the disk cache off or, with a warning, has no home for it."""
    named = os.environ.get("FASTNN_CACHE_DIR")
    if named == "":
        return None
    where = Path(named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastnn"))
    try:
        return where.expanduser()
    except RuntimeError as error:  # no such user, or neither HOME nor an entry for this one
        _unusable(where, str(error))
        return None


@cache
def sources_digest() -> str:
    """One digest over all that machine code depends on: these sources, the compiler and the instruction set."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((simd(), threads.LAUNCHER, *_COMPILER, sys.platform)).encode())
    return digest.hexdigest()[:24]


def _private(info: os.stat_result) -> bool:
    """Whether only this user can have written the file or folder."""
    if os.name != "posix":
        return True  # the profile folder of Windows is private by its access list
    return info.st_uid == os.geteuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def _folder(where: Path | None) -> Path | None:
    """The folder to keep objects in, made private; None (with a warning) where that cannot be had."""
    if where is None:
        return None
    folder = where / sources_digest()
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        for d in (where, folder):  # not by parents=True, which heeds the mode for the last of them only
            d.mkdir(mode=0o700, exist_ok=True)
        for d in (folder, where):
            if not _private(d.stat()):
                warnings.warn(f"fastnn: the kernel cache {d} can be written by others or belongs to somebody else; it is not "
                              "used and kernels are built in memory. Set FASTNN_CACHE_DIR to a private folder.", stacklevel=2)
                return None
    except OSError as error:
        _unusable(folder, str(error.strerror))
        return None
    return folder


def _read(path: Path) -> bytes | None:
    """The object in ``path``; None if it is missing, foreign or damaged (then it is built again)."""
    try:
        with path.open("rb") as file:
            if not _private(os.fstat(file.fileno())):
                return None
            data = file.read()
    except OSError:  # not there, or not readable: both mean that it has to be built
        return None
    head, digest, code = data[: len(_MAGIC)], data[len(_MAGIC) : len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
    return code if head == _MAGIC and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Write whole or not at all: several processes may fill the cache at once."""
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        temporary.touch(mode=0o600)
        temporary.write_bytes(_MAGIC + hashlib.sha256(code).digest() + code)
        temporary.replace(path)
    except OSError as error:  # a full or read-only disk costs the next process a compilation, not this one its result
        with suppress(OSError):
            temporary.unlink()
        warnings.warn(f"fastnn: could not keep a kernel in {path.parent}: {error.strerror}", stacklevel=2)


# Compiling -----------------------------------------------------------------------------------------------------------


def target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    s = simd()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(cpu=s.cpu, features=s.features, opt=3, reloc="pic", codemodel="default")


#: What a builtin is with arguments of some types. Numba asks each of its templates, a dozen of them for NumPy, at every call.
_signatures: dict[tuple[Any, tuple[Any, ...]], Any] = {}


@contextmanager
def _resolved_once(context: Any) -> Iterator[None]:
    """Within, Numba's typing context looks an operator or intrinsic up once for each combination of argument types."""
    from numba.core.types import Function

    look_up = context.resolve_function_type

    def resolve(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if keywords or not isinstance(function, Function):
            return look_up(function, args, keywords)
        found = _signatures.get((function, args))
        if found is None:
            found = look_up(function, args, keywords)
            if found is not None:
                _signatures[function, args] = found
        return found

    context.resolve_function_type = resolve
    try:
        yield
    finally:
        del context.resolve_function_type


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within, Python does not look for garbage: a compilation makes millions of objects, which live until its end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _compile(name: str, function: Callable[[], Callable[..., Any]], signature: str) -> tuple[bytes, Callable[[], str]]:
    """The object file of a kernel and a function that gives its assembly."""
    from llvmlite import ir
    from numba.core import types
    from numba.core.codegen import AOTCodeLibrary, AOTCPUCodegen
    from numba.core.compiler import Flags, compile_extra
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    from .simd import Pipeline

    class PartLibrary(AOTCodeLibrary):
        """A helper of the kernel: linked into it and optimised there, so neither optimised nor made runnable by itself."""

        def _optimize_functions(self, module: llvm.ModuleRef) -> None:
            pass

        def _optimize_final_module(self) -> None:
            pass

        def get_pointer_to_function(self, name: str) -> int:
            return 1  # Numba asks for an address to call the helper from Python, which nobody does

    class PartCodegen(AOTCPUCodegen):
        _library_class = PartLibrary

        def set_env(self, env_name: str, env: Any) -> None:
            pass

    class WholeLibrary(AOTCodeLibrary):
        """The kernel with all its helpers. Its loops are vectors already, and it counts no references."""

        def _optimize_final_module(self) -> None:
            if self.name == name:  # and not Numba's runtime, of which kernels use nothing
                for fn in self.get_defined_functions():
                    if fn.name != name:
                        fn.linkage = "internal"
            tuning = llvm.create_pipeline_tuning_options(speed_level=2)
            tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_interleaving = False
            builder = llvm.create_pass_builder(self._codegen._tm, tuning)
            builder.getModulePassManager().run(self._final_module, builder)

    class WholeCodegen(AOTCPUCodegen):
        _library_class = WholeLibrary

    with global_compiler_lock, _resolved_once(cpu_target.typing_context), _no_collection():
        machine = target_machine()
        codegen, parts = WholeCodegen(name), PartCodegen(name + "_parts")
        codegen._tm = parts._tm = machine
        numba_context = cpu_target.target_context
        context = numba_context.subtarget(aot_mode=True)
        context._internal_codegen = codegen
        library = codegen.create_library(name)
        flags = Flags()
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        flags.error_model = "numpy"
        signature, _, returns = signature.partition(">")
        args = tuple({"i": types.int64, "f": types.float64}[c] for c in signature)
        result_type = types.int64 if returns else types.none
        numba_codegen = numba_context._internal_codegen
        numba_context._internal_codegen = parts
        try:
            result = compile_extra(cpu_target.typing_context, context, function(), args, result_type, flags, {}, library=library,
                                   pipeline_class=Pipeline)
        finally:
            numba_context._internal_codegen = numba_codegen

        # The function that Python calls: METH_FASTCALL arguments to registers, the GIL released around the kernel.
        i32, i64, f64, pointer = ir.IntType(32), ir.IntType(64), ir.DoubleType(), ir.IntType(8).as_pointer()
        module = library.create_ir_module("entry")
        inner = ir.Function(module, context.call_conv.get_function_type(result_type, args), result.fndesc.llvm_func_name)
        entry = ir.Function(module, ir.FunctionType(pointer, [pointer, pointer.as_pointer(), i64]), name)

        def extern(symbol: str, result_type: Any, *argument_types: Any) -> Any:
            return ir.Function(module, ir.FunctionType(result_type, argument_types), "fastnn_" + symbol)

        builder = ir.IRBuilder(entry.append_basic_block())
        bad_call = extern("PyErr_BadArgument", i32)
        with builder.if_then(builder.icmp_signed("!=", entry.args[2], i64(len(args))), likely=False):
            builder.call(bad_call, [])
            builder.ret(ir.Constant(pointer, None))
        as_int, as_float = extern("PyLong_AsLongLong", i64, pointer), extern("PyFloat_AsDouble", f64, pointer)
        values = []
        for k, c in enumerate(signature):
            item = builder.load(builder.gep(entry.args[1], [i64(k)]))
            values.append(builder.call(as_int if c == "i" else as_float, [item]))
        failed = builder.call(extern("PyErr_Occurred", pointer), [])
        with builder.if_then(builder.icmp_unsigned("!=", builder.ptrtoint(failed, i64), i64(0)), likely=False):
            builder.ret(ir.Constant(pointer, None))
        state = builder.call(extern("PyEval_SaveThread", pointer), [])
        _, value = context.call_conv.call_function(builder, inner, result_type, args, values)
        builder.call(extern("PyEval_RestoreThread", ir.VoidType(), pointer), [state])
        if returns:
            builder.ret(builder.call(extern("PyLong_FromLongLong", pointer, i64), [value]))
        else:
            none = ir.GlobalVariable(module, ir.IntType(8), "fastnn_none")
            builder.call(extern("Py_IncRef", ir.VoidType(), pointer), [none])
            builder.ret(none)
        library.add_ir_module(module)
        library.finalize()
        final = library._final_module
        return codegen._tm.emit_object(final), lambda: codegen._tm.emit_assembly(final)


# Loading -------------------------------------------------------------------------------------------------------------


class _MethodDef(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p)]


_METH_FASTCALL = 0x0080


@cache
def _jit() -> llvm.LLJIT:
    """The loader of objects. JITLink, not MCJIT: it puts all sections of an object into one slab of memory, where MCJIT may
    put code and constants more than the 2 GiB apart that the code can reach, and then ends the process."""
    return llvm.create_lljit_compiler(target_machine(), use_jit_link=os.name != "nt")  # which has no JITLink


@cache
def _symbols() -> dict[str, int]:
    """The addresses that compiled kernels refer to."""
    python = ("PyErr_BadArgument", "PyLong_AsLongLong", "PyLong_FromLongLong", "PyFloat_AsDouble", "PyErr_Occurred",
              "PyEval_SaveThread", "PyEval_RestoreThread", "Py_IncRef")
    found = {s: ctypes.cast(getattr(ctypes.pythonapi, s), ctypes.c_void_p).value for s in python}
    found |= threads.symbols() | {"none": id(None)}
    return {"fastnn_" + name: address for name, address in found.items() if address}


_numbers = itertools.count()  # a library's name is taken even if it could not be linked
_alive: list[Any] = []  # what is referred to by address for as long as the process lives


def load(name: str, code: bytes) -> Callable[..., Any]:
    """The function of an object file, as a builtin of Python's."""
    library = llvm.JITLibraryBuilder().add_object_img(code).export_symbol(name)
    for symbol, address in _symbols().items():
        library.import_symbol(symbol, address)
    loaded = library.link(_jit(), f"{name}_{next(_numbers)}")
    definition = _MethodDef(name.encode(), loaded[name], _METH_FASTCALL, None)
    _alive.extend((loaded, definition))
    new = ctypes.pythonapi.PyCFunction_NewEx
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return new(ctypes.addressof(definition), None, None)


class Missing(Exception):
    """A kernel is not in the cache, and who called it said that it is to be compiled elsewhere."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        super().__init__(f"{kernel.name} is not compiled")


_elsewhere = False


@contextmanager
def compiled_elsewhere() -> Iterator[None]:
    """Inside, a kernel that would have to be compiled raises Missing instead."""
    global _elsewhere
    before, _elsewhere = _elsewhere, True
    try:
        yield
    finally:
        _elsewhere = before


def _make(module: str, kind: str, *args: Any) -> Callable[..., Any]:
    return getattr(import_module(module), kind)(*args)


def made_by(module: str, kind: str, *args: Any) -> Callable[[], Callable[..., Any]]:
    """A Kernel's ``make`` that another process can be sent: it returns what ``kind(*args)`` of a module of kernels.cpu does."""
    return partial(_make, f"{__package__.rpartition('.')[0]}.{module}", kind, *args)


class Kernel:
    """A kernel that is built, or loaded from the cache, at its first call.

    Args:
        name: unique among all kernels, specialisation included.
        signature: one letter an argument: ``i`` for int64 (sizes, byte strides, addresses), ``f`` for float64. ``>i`` behind
            them: the kernel returns an int64.
        make: returns the Python function to compile; called (and Numba imported) only if the cache has no object.
    """

    registry: ClassVar[dict[str, Kernel]] = {}

    def __init__(self, name: str, signature: str, make: Callable[[], Callable[..., Any]]) -> None:
        self.name, self.signature, self.make = f"fastnn_{name}", signature, make
        self._function: Callable[..., Any] | None = None
        #: What hot paths call: the machine code itself once it is loaded.
        self.run: Callable[..., Any] = self._load_and_run
        Kernel.registry[name] = self

    def __reduce__(self) -> Any:
        """As another process gets it, to compile it there."""
        return Kernel, (self.name.removeprefix("fastnn_"), self.signature, self.make)

    def __call__(self, *args: Any) -> None:
        self.run(*args)

    def load(self) -> Callable[..., Any]:
        """Build the kernel or read it from the cache, unless it is there already; the machine code as a Python builtin."""
        with _lock:
            if self._function is None:
                path = self._path()
                code = _read(path) if path else None
                if code is None:
                    if _elsewhere:
                        raise Missing(self)
                    code = self.compile()
                self._function = self.run = load(self.name, code)
        return self._function

    def _path(self) -> Path | None:
        folder = _folder(cache_dir())
        return folder / f"{self.name}.o" if folder else None

    def compile(self) -> bytes:
        """The kernel's object file, compiled and kept in the cache."""
        code, _ = _compile(self.name, self.make, self.signature)
        path = self._path()
        if path:
            _write(path, code)
        return code

    def _load_and_run(self, *args: Any) -> Any:
        return self.load()(*args)

    def assembly(self) -> str:
        """The kernel's assembly, freshly compiled: to read what the compiler made of it."""
        return _compile(self.name, self.make, self.signature)[1]()
