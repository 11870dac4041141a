"""Explicit SIMD vectors inside Numba functions.

An ``Elem`` says how elements lie in memory (float32, float64, bfloat16, float16, int32, int64) and which vector computes with
them; kernels are written once for an ``Elem`` that they close over::

    v = load(F, address)                    # one vector; half types are widened to float32
    store(F, address, fma(v, 2.0, bias))    # and rounded to nearest even on the way back

Addresses are plain int64 byte addresses: a kernel sees no arrays, so it can neither allocate nor raise. Python scalars mix
with vectors by being spread over the lanes. Nothing here is fast-math: NaN, Inf and signed zeros behave as in IEEE 754.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from copy import copy
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils, typed_passes, types, untyped_passes
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import PassManager
from numba.core.datamodel import PrimitiveModel, register_default
from numba.core.imputils import lower_builtin, lower_cast, lower_constant, lower_getattr_generic
from numba.core.types.misc import unliteral
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global, signature
from numba.core.typing.typeof import typeof_impl
from numba.extending import intrinsic

from .host import simd


class Pipeline(CompilerBase):
    """Numba's passes less those for closures, generators, exceptions, literals and array expressions, which no kernel has."""

    def define_pipelines(self) -> list[PassManager]:
        passes = PassManager("kernel")
        for each in (
            untyped_passes.TranslateByteCode, untyped_passes.FixupArgs, untyped_passes.IRProcessing,
            untyped_passes.RewriteSemanticConstants, untyped_passes.DeadBranchPrune, untyped_passes.ReconstructSSA,
            typed_passes.NopythonTypeInference, typed_passes.PreLowerStripPhis, typed_passes.IRLegalization,
            typed_passes.AnnotateTypes, typed_passes.NativeLowering, typed_passes.NoPythonBackend,
        ):  # fmt: skip
            passes.add_pass(each, each._name)
        passes.finalize()
        return [passes]


def _helper(**options: Any) -> Callable[..., Any]:
    """A decorator for what kernels are composed of: C semantics for division, no Python objects, and compiled once for all
    integers. Numba would compile a helper anew for each literal that it is called with.
    """
    def decorate(function: Callable[..., Any]) -> Any:
        helper = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=Pipeline,
                      **options)(function)
        template = helper.get_call_template
        helper.get_call_template = lambda args, kws: template(
            tuple(map(unliteral, args)), {name: unliteral(t) for name, t in kws.items()})
        return helper
    return decorate


#: A helper that is always inlined.
inline = _helper(forceinline=True)
#: A helper that is too long to be copied into each caller.
outline = _helper()

i1, i8, i16, i32, i64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
f16, f32, f64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


# Types ---------------------------------------------------------------------------------------------------------------


class Static:
    """A Python object that Numba functions may close over and pass to intrinsics as a compile-time constant."""


class StaticType(types.Dummy):
    """The Numba type of one ``Static`` object."""

    def __init__(self, value: Static) -> None:
        self.value = value
        super().__init__(f"Static({value!r})")

    @property
    def key(self) -> tuple[str, int]:
        return self.name, id(self.value)


typeof_impl.register(Static)(lambda value, c: StaticType(value))
register_default(StaticType)(type("StaticModel", (PrimitiveModel,), {
    "__init__": lambda self, dmm, fe_type: PrimitiveModel.__init__(self, dmm, fe_type, ir.IntType(8).as_pointer())}))


@lower_constant(StaticType)
def _static_constant(context: Any, builder: ir.IRBuilder, ty: Any, value: Any) -> Any:
    return context.get_dummy_value()


@infer_getattr
class _StaticAttributes(AttributeTemplate):
    """Integer attributes of a Static object are int64 constants in a kernel: ``elem.size``, ``elem.lanes``."""

    key = StaticType

    def generic_resolve(self, ty: StaticType, attr: str) -> Any:
        return types.int64 if isinstance(getattr(ty.value, attr, None), int) else None


@lower_getattr_generic(StaticType)
def _static_attribute(context: Any, builder: ir.IRBuilder, ty: StaticType, value: Any, attr: str) -> Any:
    return i64(getattr(ty.value, attr))


class Vector(types.Type):
    """The Numba type of a vector in registers."""

    def __init__(self, elem: types.Type, lanes: int) -> None:
        self.elem, self.lanes = elem, lanes
        super().__init__(f"{elem}x{lanes}")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_LLVM[self.elem], self.lanes)


_LLVM = {types.float32: f32, types.float64: f64, types.int32: i32, types.int64: i64, types.boolean: i1}


@register_default(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


class BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite does not have"""

    null, intrinsic_name = "0.0", "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def format_constant(self, value: float) -> str:
        return str(value)


BFloat._create_instance()


class Elem(Static):
    """How an element lies in memory, and the vector that computes with it.

    Attributes:
        name: torch's name of the dtype.
        size: bytes an element.
        lanes: elements a vector.
        vector: Numba type of the vector that is computed with (float32 for the half types).
        flushed: what is subnormal may be stored as 0.
    """

    flushed = False

    def __init__(self, name: str, memory: ir.Type, size: int, compute: Any) -> None:
        self.name, self.memory, self.size = name, memory, size
        self.lanes = simd().width // (compute.bitwidth // 8)
        self.vector = Vector(compute, self.lanes)
        self.bytes = size * self.lanes

    def __repr__(self) -> str:
        return f"{self.name}/{self.lanes}"


FLOAT32 = Elem("float32", f32, 4, types.float32)
FLOAT64 = Elem("float64", f64, 8, types.float64)
BFLOAT16 = Elem("bfloat16", i16, 2, types.float32)
FLOAT16 = Elem("float16", f16, 2, types.float32)
INT32 = Elem("int32", i32, 4, types.int32)
UINT16 = Elem("uint16", i16, 2, types.int32)  # zero-extended on load
INT64 = Elem("int64", i64, 8, types.int64)
BYTES = {4: Elem("uint8", i8, 1, types.int32), 8: Elem("uint8", i8, 1, types.int64)}  # by the size that they widen to
WORDS = {4: INT32, 8: Elem("uint32", i32, 4, types.int64)}  # the same
ELEMS = {e.name: e for e in (FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT32, UINT16, INT64)}


def compute_elem(elem: Elem) -> Elem:
    """The element type that ``elem`` is computed in: itself, or float32 for the half types."""
    return FLOAT32 if elem in (FLOAT16, BFLOAT16) else elem


def wide(elem: Elem, vectors: int) -> Elem:
    """``elem`` with several vectors as one. Each operation on it becomes that many independent ones next to each other, which
    hides the latency of long chains (a polynomial, say) better than out-of-order execution alone."""
    result = copy(elem)
    result.lanes, result.bytes = elem.lanes * vectors, elem.bytes * vectors
    result.vector = Vector(elem.vector.elem, result.lanes)
    return result


def flushed(elem: Elem) -> Elem:
    """``elem`` for results that may be 0 where they are subnormal: AVX512-BF16 rounds these in one instruction, not eight."""
    result = copy(elem)
    result.flushed = True
    return result


# LLVM helpers --------------------------------------------------------------------------------------------------------


def _mangle(t: ir.Type) -> str:
    if isinstance(t, ir.VectorType):
        return f"v{t.count}{_mangle(t.element)}"
    return {"float": "f32", "double": "f64", "half": "f16"}.get(str(t), str(t))


def llvm_call(builder: ir.IRBuilder, name: str, result: ir.Type, args: list[Any], overload: str | None = None) -> Any:
    """Call LLVM's own ``name`` on vectors, declared by name (``declare_intrinsic`` refuses vector types)."""
    full = f"{name}.{overload if overload is not None else _mangle(result)}" if overload != "" else name
    fnty = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, full), args)


def multiply_add(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a · b + c for sums of products: fused where the CPU can. ``fma`` is always fused, if need be by a slow library call."""
    return llvm_call(builder, "llvm.fmuladd" if simd().name == "portable" else "llvm.fma", c.type, [a, b, c])


def splat(builder: ir.IRBuilder, scalar: Any, lanes: int) -> Any:
    vt = ir.VectorType(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(vt, ir.Undefined), scalar, i32(0))
    return builder.shuffle_vector(one, ir.Constant(vt, ir.Undefined), ir.Constant(ir.VectorType(i32, lanes), [0] * lanes))


def lane_mask(builder: ir.IRBuilder, n: Any, lanes: int) -> Any:
    """The mask of the first ``n`` lanes (n: int64, or a mask already)."""
    if isinstance(n.type, ir.VectorType):
        return n
    index = ir.Constant(ir.VectorType(i32, lanes), list(range(lanes)))
    return builder.icmp_signed("<", index, splat(builder, builder.trunc(n, i32), lanes))


def _pointer(builder: ir.IRBuilder, address: Any, t: ir.Type) -> Any:
    return builder.inttoptr(address, t.as_pointer())


def _widen_half_bits(builder: ir.IRBuilder, raw: Any, lanes: int) -> Any:
    """float16 to float32 by integer arithmetic: exponent and mantissa move 13 bits up, a product makes up for the bias."""
    vt, vf = ir.VectorType(i32, lanes), ir.VectorType(f32, lanes)
    wide = builder.zext(builder.bitcast(raw, ir.VectorType(i16, lanes)), vt)
    sign = builder.shl(builder.and_(wide, ir.Constant(vt, [0x8000] * lanes)), ir.Constant(vt, [16] * lanes))
    rest = builder.shl(builder.and_(wide, ir.Constant(vt, [0x7FFF] * lanes)), ir.Constant(vt, [13] * lanes))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(rest, vf), ir.Constant(vf, [2.0**112] * lanes)), vt)
    special = builder.icmp_unsigned(">=", rest, ir.Constant(vt, [0x7C00 << 13] * lanes))  # infinite or NaN
    value = builder.select(special, builder.or_(rest, ir.Constant(vt, [0x7F800000] * lanes)), scaled)
    return builder.bitcast(builder.or_(value, sign), vf)


def _narrow_half_bits(builder: ir.IRBuilder, value: Any, lanes: int) -> Any:
    """float32 to float16 by integer arithmetic, to nearest even; the addition of 0.5 rounds what becomes subnormal."""
    vt, vf = ir.VectorType(i32, lanes), ir.VectorType(f32, lanes)

    def const(x: int) -> Any:
        return ir.Constant(vt, [x] * lanes)

    bits = builder.bitcast(value, vt)
    size = builder.and_(bits, const(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, const(13)), const(1))
    normal = builder.lshr(builder.add(builder.sub(size, const((112 << 23) - 0xFFF)), odd), const(13))
    shifted = builder.fadd(builder.bitcast(size, vf), ir.Constant(vf, [0.5] * lanes))
    subnormal = builder.sub(builder.bitcast(shifted, vt), const(0x3F000000))
    half = builder.select(builder.icmp_unsigned("<", size, const(113 << 23)), subnormal, normal)
    nan = builder.icmp_unsigned(">", size, const(0x7F800000))
    special = builder.select(nan, const(0x7E00), const(0x7C00))
    half = builder.select(builder.icmp_unsigned(">=", size, const(143 << 23)), special, half)
    half = builder.or_(half, builder.lshr(builder.and_(bits, const(-(2**31))), const(16)))
    return builder.bitcast(builder.trunc(half, ir.VectorType(i16, lanes)), ir.VectorType(f16, lanes))


def widen(builder: ir.IRBuilder, elem: Elem, raw: Any) -> Any:
    """Memory lanes to compute lanes."""
    if elem.name == "float16" and simd().name == "portable":  # LLVM would call a library that is not there
        return _widen_half_bits(builder, raw, elem.lanes)
    if elem.name == "float16":
        return builder.fpext(raw, ir.VectorType(f32, elem.lanes))
    if elem.name == "bfloat16":
        wide = builder.zext(raw, ir.VectorType(i32, elem.lanes))
        sixteen = ir.Constant(wide.type, [16] * elem.lanes)
        return builder.bitcast(builder.shl(wide, sixteen), ir.VectorType(f32, elem.lanes))
    return builder.zext(raw, elem.vector.llvm) if elem.name.startswith("uint") else raw


def narrow(builder: ir.IRBuilder, elem: Elem, value: Any) -> Any:
    """Compute lanes to memory lanes, rounding to nearest even; a NaN stays a NaN."""
    if elem.name == "float16" and simd().name == "portable":
        return _narrow_half_bits(builder, value, elem.lanes)
    if elem.name == "float16":
        return builder.fptrunc(value, ir.VectorType(f16, elem.lanes))
    if elem.name == "bfloat16" and elem.flushed and simd().bf16_dot:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(BFloat(), elem.lanes)), ir.VectorType(i16, elem.lanes))
    if elem.name == "bfloat16":
        n = elem.lanes
        vt = ir.VectorType(i32, n)
        bits = builder.bitcast(value, vt)
        odd = builder.and_(builder.lshr(bits, ir.Constant(vt, [16] * n)), ir.Constant(vt, [1] * n))
        rounded = builder.add(builder.add(bits, odd), ir.Constant(vt, [0x7FFF] * n))
        quiet = builder.or_(bits, ir.Constant(vt, [0x400000] * n))
        rounded = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        return builder.trunc(builder.lshr(rounded, ir.Constant(vt, [16] * n)), ir.VectorType(i16, n))
    return builder.trunc(value, ir.VectorType(elem.memory, elem.lanes)) if elem.name.startswith("uint") else value


def load_vector(builder: ir.IRBuilder, elem: Elem, address: Any, n: Any = None) -> Any:
    """One vector from ``address``; with ``n``, its first n lanes, the others zero and their memory untouched."""
    vt = ir.VectorType(elem.memory, elem.lanes)
    pointer = _pointer(builder, address, vt)
    if n is None:
        raw = builder.load(pointer)
        raw.align = elem.size
    else:
        raw = llvm_call(builder, "llvm.masked.load", vt, [pointer, i32(elem.size), lane_mask(builder, n, elem.lanes),
                                                           ir.Constant(vt, None)], _mangle(vt) + ".p0")
    return widen(builder, elem, raw)


def store_vector(builder: ir.IRBuilder, elem: Elem, address: Any, value: Any, n: Any = None, stream: bool = False) -> None:
    vt = ir.VectorType(elem.memory, elem.lanes)
    pointer = _pointer(builder, address, vt)
    raw = narrow(builder, elem, value)
    if n is None:
        st = builder.store(raw, pointer)
        st.align = min(elem.bytes, simd().width) if stream else elem.size
        if stream:
            st.set_metadata("nontemporal", builder.module.add_metadata([i32(1)]))
    else:
        llvm_call(builder, "llvm.masked.store", ir.VoidType(),
                  [raw, pointer, i32(elem.size), lane_mask(builder, n, elem.lanes)], _mangle(vt) + ".p0")


def _scalar_to(context: Any, builder: ir.IRBuilder, value: Any, ty: types.Type, vec: Vector) -> Any:
    """A Numba scalar, cast to the element type and spread over the lanes."""
    return splat(builder, context.cast(builder, value, ty, vec.elem), vec.lanes)


def _operands(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> tuple[Vector, list[Any]]:
    vec = next(t for t in sig.args if isinstance(t, Vector) and t.elem is not types.boolean)
    return vec, [a if isinstance(t, Vector) else _scalar_to(context, builder, a, t, vec)
                 for t, a in zip(sig.args, args, strict=True)]


def _is_scalar(t: types.Type) -> bool:
    return isinstance(t, (types.Integer, types.Float, types.IntegerLiteral))


# Memory --------------------------------------------------------------------------------------------------------------


@intrinsic
def load(typingctx, elem, address):
    """load(elem, address) -> vector"""
    e = elem.value

    def codegen(context, builder, sig, args):
        return load_vector(builder, e, args[1])
    return e.vector(elem, types.int64), codegen


@intrinsic
def load_n(typingctx, elem, address, n):
    """load_n(elem, address, n) -> vector of the first n lanes; the others are zero and not read."""
    e = elem.value

    def codegen(context, builder, sig, args):
        return load_vector(builder, e, args[1], args[2])
    return e.vector(elem, types.int64, types.int64), codegen


def mask_bytes(elem: Elem) -> int:
    """The size in memory of a mask for ``load_where``: a bit a lane where there are mask registers, else all of its bits."""
    return elem.lanes // 8 if simd().name == "avx512" else elem.bytes


def mask_from(builder: ir.IRBuilder, elem: Elem, address: Any) -> Any:
    """The mask that lies in memory."""
    if mask_bytes(elem) < elem.bytes:
        bits = builder.load(_pointer(builder, address, ir.IntType(elem.lanes)))
        return builder.bitcast(bits, ir.VectorType(ir.IntType(1), elem.lanes))
    signs = ir.VectorType(ir.IntType(8 * elem.size), elem.lanes)
    lanes = builder.load(_pointer(builder, address, signs))
    lanes.align = elem.size
    return builder.icmp_signed("<", lanes, ir.Constant(signs, None))


@intrinsic
def load_where(typingctx, elem, address, mask):
    """load_where(elem, address, mask) -> vector of the lanes that the mask in memory has; the others are zero and not read."""
    e = elem.value

    def codegen(context, builder, sig, args):
        return load_vector(builder, e, args[1], mask_from(builder, e, args[2]))
    return e.vector(elem, types.int64, types.int64), codegen


@intrinsic
def load_steps(typingctx, elem, address, step):
    """load_steps(elem, address, step) -> vector of elements ``step`` bytes apart; not of the half types"""
    e = elem.value

    def codegen(context, builder, sig, args):
        value = ir.Constant(e.vector.llvm, ir.Undefined)
        place = args[1]
        for k in range(e.lanes):
            value = builder.insert_element(value, builder.load(_pointer(builder, place, e.memory)), i32(k))
            place = builder.add(place, args[2])
        return value
    return e.vector(elem, types.int64, types.int64), codegen


@intrinsic
def store(typingctx, elem, address, value):
    """store(elem, address, vector)"""
    e = elem.value

    def codegen(context, builder, sig, args):
        store_vector(builder, e, args[1], args[2])
        return context.get_dummy_value()
    return types.none(elem, types.int64, e.vector), codegen


@intrinsic
def store_n(typingctx, elem, address, value, n):
    """store_n(elem, address, vector, n): the first n lanes only."""
    e = elem.value

    def codegen(context, builder, sig, args):
        store_vector(builder, e, args[1], args[2], args[3])
        return context.get_dummy_value()
    return types.none(elem, types.int64, e.vector, types.int64), codegen


@intrinsic
def stream(typingctx, elem, address, value):
    """stream(elem, address, vector): a store past the caches, aligned to a register's width. ``streamed`` ends them."""
    e = elem.value

    def codegen(context, builder, sig, args):
        store_vector(builder, e, args[1], args[2], stream=True)
        return context.get_dummy_value()
    return types.none(elem, types.int64, e.vector), codegen


@intrinsic
def streamed(typingctx):
    """streamed(): what was stored past the caches is there for other threads before anything that follows"""
    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()
    return types.none(), codegen


@intrinsic
def load_scalar(typingctx, elem, address):
    """load_scalar(elem, address) -> one element in the compute type"""
    e = elem.value

    def codegen(context, builder, sig, args):
        value = builder.load(_pointer(builder, args[1], e.memory))
        if e.name == "float16":
            return builder.extract_element(widen(builder, e, splat(builder, value, e.lanes)), i32(0))
        if e.name == "bfloat16":
            return builder.bitcast(builder.shl(builder.zext(value, i32), i32(16)), f32)
        return builder.zext(value, _LLVM[e.vector.elem]) if e.name.startswith("uint") else value
    return e.vector.elem(elem, types.int64), codegen


def record(count: int) -> Any:
    """record(n)(address) -> a tuple of the n int64 there: arguments that the host wrote once for many calls"""
    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, sig, args):
            first = _pointer(builder, args[0], i64)
            values = [builder.load(builder.gep(first, [i64(k)])) for k in range(count)]
            return cgutils.pack_array(builder, values, i64)
        return types.containers.UniTuple(types.int64, count)(types.int64), codegen
    return read


@intrinsic
def store_scalar(typingctx, elem, address, value):
    """store_scalar(elem, address, x): one element, rounded to the memory type"""
    e = elem.value

    def codegen(context, builder, sig, args):
        raw = args[2]
        if e.size == 2:
            raw = builder.extract_element(narrow(builder, e, splat(builder, raw, e.lanes)), i32(0))
        elif e.name.startswith("uint"):
            raw = builder.trunc(raw, e.memory)
        builder.store(raw, _pointer(builder, args[1], e.memory))
        return context.get_dummy_value()
    return types.none(elem, types.int64, e.vector.elem), codegen


@intrinsic
def spread(typingctx, elem, scalar):
    """spread(elem, x) -> vector with x in every lane"""
    e = elem.value

    def codegen(context, builder, sig, args):
        return _scalar_to(context, builder, args[1], sig.args[1], e.vector)
    return e.vector(elem, scalar), codegen


@intrinsic
def round_to(typingctx, elem, v):
    """round_to(elem, vector) -> the values that a store as ``elem`` and a load would give"""
    e = elem.value

    def codegen(context, builder, sig, args):
        return widen(builder, e, narrow(builder, e, args[1]))
    return e.vector(elem, v), codegen


@intrinsic
def prefetch(typingctx, address):
    """prefetch(address): bring the cache line in, to read"""
    def codegen(context, builder, sig, args):
        llvm_call(builder, "llvm.prefetch", ir.VoidType(),
                  [_pointer(builder, args[0], i8), i32(0), i32(3), i32(1)], "p0")
        return context.get_dummy_value()
    return types.none(types.int64), codegen


# Arithmetic ----------------------------------------------------------------------------------------------------------

_FLOAT_OPS = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
_INT_OPS = {operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.and_: "and_", operator.or_: "or_",
            operator.xor: "xor", operator.lshift: "shl", operator.rshift: "ashr"}
_COMPARE = {operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!="}
_MASK_OPS = {operator.and_: "and_", operator.or_: "or_", operator.xor: "xor"}


def _register_binary(op: Callable[..., Any]) -> None:
    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            vectors = [t for t in args if isinstance(t, Vector)]
            if len(args) != 2 or not vectors or not all(isinstance(t, Vector) or _is_scalar(t) for t in args):
                return None
            v = vectors[0]
            if any(t != v for t in vectors):
                return None
            if op in _COMPARE and v.elem is not types.boolean:
                return signature(Vector(types.boolean, v.lanes), *args)
            known = (_MASK_OPS if v.elem is types.boolean else _INT_OPS if isinstance(v.elem, types.Integer) else _FLOAT_OPS)
            return signature(v, *args) if op in known else None

    infer_global(op)(Template)

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        if all(isinstance(t, Vector) and t.elem is types.boolean for t in sig.args):
            return getattr(builder, _MASK_OPS[op])(*args)
        vec, (a, b) = _operands(context, builder, sig, args)
        floats = isinstance(vec.elem, types.Float)
        if op in _COMPARE:
            if not floats:
                return builder.icmp_signed(_COMPARE[op], a, b)
            return (builder.fcmp_unordered if op is operator.ne else builder.fcmp_ordered)(_COMPARE[op], a, b)
        return getattr(builder, (_FLOAT_OPS if floats else _INT_OPS)[op])(a, b)

    for pair in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(op, *pair)(lower)


for _op in {*_FLOAT_OPS, *_INT_OPS, *_COMPARE}:
    _register_binary(_op)


@infer_global(operator.neg)
class _Neg(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        return signature(args[0], args[0]) if isinstance(args[0], Vector) else None


@lower_builtin(operator.neg, Vector)
def _neg(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return builder.fneg(args[0]) if isinstance(sig.args[0].elem, types.Float) else builder.neg(args[0])


def _elementwise(name: str, arity: int, emit: Callable[..., Any], doc: str) -> Any:
    """An intrinsic on float vectors (scalars are spread) whose result has the operands' type."""
    def body(typingctx: Any, *operands: Any) -> Any:
        vec = next(t for t in operands if isinstance(t, Vector))

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            v, values = _operands(context, builder, sig, args)
            return emit(builder, v, *values)
        return vec(*operands), codegen

    def one(typingctx, a):
        return body(typingctx, a)

    def two(typingctx, a, b):
        return body(typingctx, a, b)

    def three(typingctx, a, b, c):
        return body(typingctx, a, b, c)

    fn: Any = (one, two, three)[arity - 1]
    fn.__name__, fn.__doc__ = name, doc
    return intrinsic(fn)


def _llvm(name: str) -> Callable[..., Any]:
    return lambda builder, vec, *args: llvm_call(builder, name, vec.llvm, list(args))


fma = _elementwise("fma", 3, _llvm("llvm.fma"), "fma(a, b, c) -> a * b + c, rounded once")
sqrt = _elementwise("sqrt", 1, _llvm("llvm.sqrt"), "square root")
absolute = _elementwise("absolute", 1, _llvm("llvm.fabs"), "|a|")
copysign = _elementwise("copysign", 2, _llvm("llvm.copysign"), "|a| with b's sign")
nearest = _elementwise("nearest", 1, _llvm("llvm.rint"), "the nearest integer, ties to even, as a float")
# x86's own min and max: the second operand where either is a NaN or both are zeros. One instruction.
minimum_fast = _elementwise("minimum_fast", 2, lambda b, v, x, y: b.select(b.fcmp_ordered("<", x, y), x, y),
                            "min(a, b); b where either is NaN")
maximum_fast = _elementwise("maximum_fast", 2, lambda b, v, x, y: b.select(b.fcmp_ordered(">", x, y), x, y),
                            "max(a, b); b where either is NaN")


@intrinsic
def select(typingctx, mask, a, b):
    """select(mask, a, b): a where the mask is set, else b; one of them may be a scalar"""
    vec = a if isinstance(a, Vector) else b

    def codegen(context, builder, sig, args):
        _, (x, y) = _operands(context, builder, signature(vec, *sig.args[1:]), args[1:])
        return builder.select(args[0], x, y)
    return vec(mask, a, b), codegen


@intrinsic
def first_lanes(typingctx, elem, n):
    """first_lanes(elem, n) -> mask of the first n lanes"""
    e = elem.value

    def codegen(context, builder, sig, args):
        return lane_mask(builder, args[1], e.lanes)
    return Vector(types.boolean, e.lanes)(elem, types.int64), codegen


@intrinsic
def any_lane(typingctx, mask):
    """any_lane(mask) -> bool"""
    def codegen(context, builder, sig, args):
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], ir.IntType(mask.lanes)), ir.IntType(mask.lanes)(0))
    return types.boolean(mask), codegen


def _int_vector(vec: Vector) -> Vector:
    return Vector(types.int32 if vec.elem is types.float32 else types.int64, vec.lanes)


@intrinsic
def to_bits(typingctx, v):
    """to_bits(float vector) -> integer vector of the same bits"""
    out = _int_vector(v)

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], out.llvm)
    return out(v), codegen


@intrinsic
def from_bits(typingctx, v):
    """from_bits(integer vector) -> float vector of the same bits"""
    out = Vector(types.float32 if v.elem is types.int32 else types.float64, v.lanes)

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], out.llvm)
    return out(v), codegen


@intrinsic
def to_int(typingctx, v):
    """to_int(float vector) -> integer vector, truncating; the values are in range"""
    out = _int_vector(v)

    def codegen(context, builder, sig, args):
        return builder.fptosi(args[0], out.llvm)
    return out(v), codegen


@intrinsic
def to_float(typingctx, v):
    """to_float(integer vector) -> float vector"""
    out = Vector(types.float32 if v.elem is types.int32 else types.float64, v.lanes)

    def codegen(context, builder, sig, args):
        return builder.sitofp(args[0], out.llvm)
    return out(v), codegen


@intrinsic
def shift_right_logical(typingctx, v, n):
    """shift_right_logical(integer vector, n)"""
    def codegen(context, builder, sig, args):
        _, (a, b) = _operands(context, builder, sig, args)
        return builder.lshr(a, b)
    return v(v, n), codegen


@intrinsic
def even_lanes(typingctx, a, b):
    """even_lanes(a, b) -> lanes 0, 2, 4, … of a followed by b"""
    def codegen(context, builder, sig, args):
        index = ir.VectorType(i32, a.lanes)
        return builder.shuffle_vector(*args, ir.Constant(index, list(range(0, 2 * a.lanes, 2))))
    return a(a, b), codegen


def _interleave(half: int) -> Any:
    def fn(typingctx, a, b):
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            lanes = a.lanes
            index = [(lanes if k % 2 else 0) + (k + half * lanes) // 2 for k in range(lanes)]
            return builder.shuffle_vector(*args, ir.Constant(ir.VectorType(i32, lanes), index))
        return a(a, b), codegen
    fn.__doc__ = "interleave_low(a, b), interleave_high(a, b) -> a₀ b₀ a₁ b₁ … of the lower, of the upper half of the lanes"
    return intrinsic(fn)


interleave_low, interleave_high = _interleave(0), _interleave(1)


@intrinsic
def iota(typingctx, elem):
    """iota(elem) -> 0, 1, 2, … in the lanes of an integer element type"""
    e = elem.value

    def codegen(context, builder, sig, args):
        return ir.Constant(e.vector.llvm, list(range(e.lanes)))
    return e.vector(elem), codegen


@intrinsic
def iota_like(typingctx, v):
    """iota_like(float vector) -> 0, 1, 2, … in an integer vector of its shape"""
    out = _int_vector(v)

    def codegen(context, builder, sig, args):
        return ir.Constant(out.llvm, list(range(out.lanes)))
    return out(v), codegen


def _reduction(name: str, combine: Callable[..., Any], doc: str) -> Any:
    def fn(typingctx, v):
        def codegen(context, builder, sig, args):
            value, lanes = args[0], v.lanes
            while lanes > 1:  # halves onto halves: a fixed tree, so the same bits every time
                lanes //= 2
                low, high = (ir.Constant(ir.VectorType(i32, lanes), list(range(o, o + lanes))) for o in (0, lanes))
                undefined = ir.Constant(value.type, ir.Undefined)
                value = combine(builder, builder.shuffle_vector(value, undefined, low),
                                builder.shuffle_vector(value, undefined, high))
            return builder.extract_element(value, i32(0))
        return v.elem(v), codegen
    fn.__name__, fn.__doc__ = name, doc
    return intrinsic(fn)


@intrinsic
def fold_add(typingctx, elem, v):
    """fold_add(elem, v) -> the sum of the vectors of ``elem`` that a ``wide`` one has"""
    e = elem.value

    def codegen(context, builder, sig, args):
        index, undefined = ir.VectorType(i32, e.lanes), ir.Constant(v.llvm, ir.Undefined)
        parts = [builder.shuffle_vector(args[1], undefined, ir.Constant(index, list(range(first, first + e.lanes))))
                 for first in range(0, v.lanes, e.lanes)]
        while len(parts) > 1:
            parts = [builder.fadd(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]
    return e.vector(elem, v), codegen


reduce_add = _reduction("reduce_add", lambda b, x, y: b.fadd(x, y), "the sum of the lanes")
reduce_max = _reduction("reduce_max", lambda b, x, y: b.select(
    b.or_(b.fcmp_ordered(">", x, y), b.fcmp_unordered("uno", x, x)), x, y), "the largest lane; NaN if one is NaN")
reduce_max_fast = _reduction("reduce_max_fast", lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y),
                             "the largest lane where none is NaN, in a third of the instructions")


@intrinsic
def first_lane(typingctx, v):
    """first_lane(v) -> lane 0 as a scalar"""
    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], i32(0))
    return v.elem(v), codegen


@intrinsic
def maximum(typingctx, a, b):
    """maximum(a, b): NaN where either is NaN, as torch.maximum"""
    def codegen(context, builder, sig, args):
        _, (x, y) = _operands(context, builder, sig, args)
        return builder.select(builder.or_(builder.fcmp_ordered(">", x, y), builder.fcmp_unordered("uno", x, x)), x, y)
    return (a if isinstance(a, Vector) else b)(a, b), codegen


def transpose_vectors(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """The columns of L vectors of L lanes, by log2(L) rounds of two-input shuffles."""
    n = len(rows)
    index = ir.VectorType(i32, n)
    step = 1
    while step < n:  # exchange blocks of `step` lanes between row i and row i + step
        low = ir.Constant(index, [j if not j & step else n + j - step for j in range(n)])
        high = ir.Constant(index, [j + step if not j & step else n + j for j in range(n)])
        for i in (i for i in range(n) if not i & step):
            a, b = rows[i], rows[i + step]
            rows[i], rows[i + step] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
        step *= 2
    return rows


@lower_cast(types.Number, Vector)
def _number_to_vector(context: Any, builder: ir.IRBuilder, fromty: Any, toty: Vector, val: Any) -> Any:
    return _scalar_to(context, builder, val, fromty, toty)
