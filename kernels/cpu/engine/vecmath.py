"""exp, log, tanh, erf and their kin on SIMD vectors of float32 and float64.

Largest errors measured (tests/test_vecmath.py) in ulp, float32 / float64; all are right at ±0, ±Inf, NaN, and where the
result overflows or is subnormal:

    exp 0.9 / 0.9    expm1 1.5 / 1.8      log 0.9 / 0.8    log1p on [0, 1] 1.3 / 1.1
    tanh 1.6 / 1.7   sigmoid 1.5 / 1.3    erf 1.9 / 1.3

Sources. Argument reduction by a multiple of ln 2 in two parts: Cody & Waite, "Software Manual for the Elementary
Functions", 1980, chapter 6; with an FMA the first part may have all its bits. log: the form of fdlibm's e_log.c (Sun
Microsystems, 1993). erf: -log(erfc(a)) / a is so smooth that one polynomial serves the whole range, and expm1 turns it
into erf without cancellation.

Polynomials are minimax under the weight that makes it the relative error of the result: Remez exchange on a Chebyshev
grid of 600 to 1500 points in 50-digit arithmetic (mpmath), float32 coefficients rounded one after the other, lowest
first, each time with the rest fitted again. Each carries its own error as a comment.
"""

from __future__ import annotations

from math import inf, nan
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .host import simd
from .simd import (
    Static,
    Vector,
    absolute,
    copysign,
    fma,
    from_bits,
    inline,
    llvm_call,
    maximum_fast,
    minimum_fast,
    select,
    to_bits,
    to_float,
)


class Constant(Static):
    """Numbers that differ between float32 and float64: a scalar each, or a polynomial's coefficients, lowest first."""

    def __init__(self, float32: Any, float64: Any) -> None:
        self.values = {types.float32: float32, types.float64: float64}


def _spread(vec: Vector, value: float) -> ir.Constant:
    return ir.Constant(vec.llvm, [value] * vec.lanes)


@intrinsic
def of(typingctx, constant, v):
    """of(constant, v) -> the constant of v's type in every lane"""
    kind = {types.int32: types.float32, types.int64: types.float64}.get(v.elem, v.elem)

    def codegen(context, builder, sig, args):
        return _spread(v, constant.value.values[kind])
    return v(constant, v), codegen


@intrinsic
def is_double(typingctx, v):
    """is_double(v) -> whether v is a float64 vector; known to the compiler, so the other branch costs nothing"""
    def codegen(context, builder, sig, args):
        return ir.IntType(1)(v.elem is types.float64)
    return types.boolean(v), codegen


@intrinsic
def polynomial(typingctx, coefficients, v):
    """polynomial(coefficients, v), by Horner's rule"""
    def codegen(context, builder, sig, args):
        *rest, top = (_spread(v, c) for c in coefficients.value.values[v.elem])
        for c in reversed(rest):
            top = llvm_call(builder, "llvm.fma", v.llvm, [top, args[1], c])
        return top
    return v(coefficients, v), codegen


# A float this large has no fraction bits left: adding it rounds to an integer, which then stands in the lowest bits.
MAGIC = Constant(1.5 * 2.0**23, 1.5 * 2.0**52)
MAGIC_BIASED = Constant(1.5 * 2.0**23 + 2 * 127, 1.5 * 2.0**52 + 2 * 1023)
LOG2_E = Constant(1.4426950216293335, 1.4426950408889634)
LN2_HIGH = Constant(0.6931471824645996, 0.6931471805599453)
LN2_LOW = Constant(-1.904654323148236e-09, 2.3190468138462996e-17)
EXP_MOST = Constant(89.0, 710.0)  # exp is Inf there, and 0 at the other end
EXP_LEAST = Constant(-104.0, -746.0)
ONE = Constant(1.0, 1.0)
SQRT_HALF = Constant(0.7071067690849304, 0.7071067811865476)
INFINITY, NAN = Constant(inf, inf), Constant(nan, nan)
TANH_ONE = Constant(20.0, 40.0)  # tanh(x) rounds to 1 where 2x is that large
MANTISSA = Constant(23, 52)  # bits of the fraction
MANTISSA_MASK = Constant((1 << 23) - 1, (1 << 52) - 1)
LEAST_NORMAL = Constant(2.0**-126, 2.0**-1022)
LIFT, LIFTED = Constant(2.0**24, 2.0**54), Constant(24.0, 54.0)  # makes subnormal numbers normal; its exponent

# (exp(r) - 1 - r) / r² on |r| ≤ ln2 / 2; relative error of exp and expm1 2^-26.1, 2^-54.7
EXP_TAIL = Constant(
    [0.4999999701976776, 0.16666539013385773, 0.04166775569319725, 0.008367124013602734, 0.001383566646836698],
    [0.5000000000000006, 0.16666666666666588, 0.04166666666657676, 0.008333333333389545, 0.001388888893156485,
     0.0001984126971902671, 2.4801505273864752e-05, 2.755740752026926e-06, 2.7626037848537863e-07,
     2.5053783347755578e-08])
EXP = Constant(*([1.0, 1.0, *EXP_TAIL.values[t]] for t in (types.float32, types.float64)))

# (2 atanh(s) / s - 2) / s² of s² on [0, 1/9]; relative error of the logarithm 2^-27.7, 2^-58.8
LOG_TAIL = Constant(
    [0.666664183139801, 0.4002145528793335, 0.28002530336380005, 0.2800999581813812],
    [0.6666666666666631, 0.40000000000156305, 0.2857142854795775, 0.22222223964177332, 0.18181744089895638,
     0.15386557036272558, 0.1330100362152378, 0.12105907912165298, 0.08340634421063874, 0.1701802215832462])

# -log(erfc(a)) = a (slope + a P(a)), slope = 2/√π, on [0, 4] and [0, 6]; relative error of erf 2^-27.7, 2^-56.6.
ERFC_SLOPE = Constant(1.128379225730896, 1.1283791670955126)
ERFC_SLOPE_LOW = Constant(-5.8635382771399236e-08, 1.533545961316588e-17)
ERFC_LOG = Constant(
    [0.636619508266449, 0.10277687758207321, -0.019149981439113617, -0.0001655004743952304,
     0.0016716925892978907, -0.0006352197960950434, 0.00011828215792775154, -9.327718544227537e-06],
    [0.6366197723675834, 0.10277260330179208, -0.01912844700528099, -0.00020919468849474332,
     0.001696206298732188, -0.0005901248713755462, 2.587515267279935e-05, 6.450402354477642e-05,
     -2.975532033662207e-05, 3.4679079361322725e-06, 2.7443526868998523e-06, -1.6347996003625928e-06,
     2.3656494464274068e-07, 2.120078753895483e-07, -1.8699449477038687e-07, 8.783333262436093e-08,
     -2.9685930720961675e-08, 7.769791786402773e-09, -1.6124565144520492e-09, 2.6623431055683885e-10,
     -3.465807057645159e-11, 3.4850016165590794e-12, -2.612822767741162e-13, 1.3750176787648279e-14,
     -4.530023009499448e-16, 7.026959690756329e-18])
ERF_ONE = Constant(4.0, 6.0)  # erf rounds to 1 from there on
# 2^r on |r| ≤ ½; relative error 2^-26.3, 2^-55.0
EXP2 = Constant(
    [1.0, 0.6931471824645996, 0.24022594094276428, 0.055503662675619125, 0.009625445120036602,
     0.001338792615570128, 0.00013332477828953415],
    [1.0, 0.6931471805599453, 0.2402265069591013, 0.055504108664820084, 0.00961812910759412,
     0.0013333558146774618, 0.00015403530457112552, 1.5252733493148487e-05, 1.321543528199796e-06,
     1.017819955824649e-07, 7.073783308863434e-09, 4.434773812251116e-10])
# The same for what is rounded to bfloat16, relative error 2^-18.4; float64 has no such use
EXP2_SHORT = Constant([1.0, 0.6931241750717163, 0.24024099111557007, 0.055906426161527634, 0.009582852944731712],
                      EXP2.values[types.float64])
# log2(2 Φ(-x)) / x, Φ the normal distribution's integral, on [0, 14.4] and [0, 8.5]; relative error of Φ(-x) 2^-23.9 /
# Φ^0.6 and at most 0.3, 2^-54.8 / Φ^0.7
NORMAL_LOG2 = Constant(
    [-1.1511075496673584, -0.45918500423431396, -0.05256817117333412, 0.007159232161939144,
     -0.00019368433277122676, -0.00017680910241324455, 4.403325146995485e-05, -5.042630164098227e-06,
     2.8505624527497275e-07, -6.304059940731577e-09],
    [-1.1511040990721613, -0.4592240942633606, -0.05242119332729959, 0.006899128893205944,
     5.335203294865182e-05, -0.0003058889342693246, 7.525229333745073e-05, -2.335384403200569e-06,
     -4.109124475520932e-06, 1.337127953272506e-06, -1.0633403172868262e-07, -6.512953902077208e-08,
     2.8103138391061537e-08, -3.710294055304919e-09, -1.252873771606583e-09, 9.035810050586334e-10,
     -3.074997053713753e-10, 7.376693285575335e-11, -1.3601752536871273e-11, 1.9813732125389957e-12,
     -2.2916869007983216e-13, 2.08734622543279e-14, -1.467561596169223e-15, 7.690473517731463e-17,
     -2.8284256683209456e-18, 6.512410145326526e-20, -7.061110540973194e-22])
NORMAL_FIT, NORMAL_ZERO = Constant(14.4, 8.5), Constant(14.4, 38.7)  # where the fit ends; where Φ(-x) rounds to 0
EXP2_LEAST = Constant(-151.0, -1076.0)
MAGIC_EXPONENT = Constant(1.5 * 2.0**23 + 127, 1.5 * 2.0**52 + 1023)
EXP2_FLUSHED = Constant(-127.0, -1023.0)  # an exponent field of 0, which is the number 0


# Scaling by powers of two --------------------------------------------------------------------------------------------


def _shuffle(builder: ir.IRBuilder, a: Any, b: Any, first: int, lanes: int) -> Any:
    index = ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(first, first + lanes)))
    return builder.shuffle_vector(a, b, index)


def _split(builder: ir.IRBuilder, v: Any, lanes: int) -> list[Any]:
    """A wide vector's parts of so many lanes"""
    return [_shuffle(builder, v, v, first, lanes) for first in range(0, v.type.count, lanes)]


def _join(builder: ir.IRBuilder, parts: list[Any]) -> Any:
    while len(parts) > 1:
        parts = [_shuffle(builder, a, b, 0, 2 * a.type.count) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


if simd().name == "avx512":
    @intrinsic
    def scale(typingctx, v, n):
        """scale(v, n) -> v · 2^n for whole n (a float vector), rounded once where the result is subnormal"""
        lanes, kind = (16, "ps") if v.elem is types.float32 else (8, "pd")

        def codegen(context, builder, sig, args):
            full, current_rounding = ir.IntType(lanes)((1 << lanes) - 1), ir.IntType(32)(4)
            parts = [llvm_call(builder, f"llvm.x86.avx512.mask.scalef.{kind}.512", a.type,
                               [a, b, a, full, current_rounding], "")
                     for a, b in zip(*(_split(builder, x, lanes) for x in args), strict=True)]
            return _join(builder, parts)
        return v(v, n), codegen
else:
    @inline
    def scale(v, n):
        """scale(v, n) -> v · 2^n for whole n (a float vector), rounded once where the result is subnormal"""
        i = to_bits(n + of(MAGIC_BIASED, v))  # n + 2 BIAS in the lowest bits
        half = i >> 1  # in two steps, as 2^n itself may be out of range; each has one BIAS, and becomes an exponent
        return v * from_bits(half << of(MANTISSA, i)) * from_bits((i - half) << of(MANTISSA, i))


@inline
def _reduce(v):
    """v = n ln 2 + r with |r| ≤ ln2 / 2: (n, r)"""
    n = fma(v, of(LOG2_E, v), of(MAGIC, v)) - of(MAGIC, v)
    r = fma(n, -of(LN2_HIGH, v), v)
    return n, fma(n, -of(LN2_LOW, v), r)


# The functions -------------------------------------------------------------------------------------------------------


@inline
def exp_between(v):
    """exp for EXP_LEAST ≤ v ≤ EXP_MOST (or NaN): what callers whose argument is bounded need"""
    n, r = _reduce(v)
    return scale(polynomial(EXP, r), n)


@inline
def exp_below(v):
    """exp for v ≤ EXP_MOST or NaN: what callers need who never have a large argument"""
    return exp_between(maximum_fast(of(EXP_LEAST, v), v))


@inline
def exp(v):
    """exp(v)"""
    return exp_below(minimum_fast(of(EXP_MOST, v), v))


@inline
def _expm1_between(v):
    """exp(v) - 1 for EXP_LEAST ≤ v ≤ 64 (2^n has to be a number); +0 for -0"""
    n, r = _reduce(v)
    power = scale(of(ONE, v), n)
    return fma(power, fma(r * r, polynomial(EXP_TAIL, r), r), power - 1.0)


@inline
def expm1_below(v):
    """exp(v) - 1 for v ≤ 64 or NaN"""
    return copysign(_expm1_between(maximum_fast(of(EXP_LEAST, v), v)), v)


@inline
def expm1(v):
    """exp(v) - 1"""
    below = minimum_fast(64.0, v)  # above it 1 is far below exp's last bit
    return select(v > 64.0, exp(v), copysign(_expm1_between(maximum_fast(of(EXP_LEAST, v), below)), v))


@inline
def tanh(v):
    """tanh(v), from e = expm1(2 |v|)"""
    e = _expm1_between(minimum_fast(of(TANH_ONE, v), 2.0 * absolute(v)))
    d = e + 2.0
    rounding = minimum_fast(2.0, e) - (d - maximum_fast(2.0, e))
    r = 1.0 / d
    t = e * r
    missing = fma(-t, rounding, fma(-t, d, e))  # e - t (e + 2), all but exactly
    return copysign(fma(missing, r, t), v)


@inline
def sigmoid(v):
    """1 / (1 + exp(-v)), by exp(-|v|), which cannot overflow"""
    e = exp_below(-absolute(v))
    d = 1.0 + e
    above = select(v < 0.0, e, 1.0)
    r = 1.0 / d
    s = above * r
    missing = fma(-s, e - (d - 1.0), fma(-s, d, above))  # above - s (1 + e), all but exactly
    return fma(missing, r, s)


@inline
def _log1p_of(f):
    """log(1 + f) for √½ - 1 ≤ f ≤ 1: 2 atanh(s) with s = f / (2 + f)"""
    s = f / (2.0 + f)
    z = s * s
    return f, s * (f - z * polynomial(LOG_TAIL, z))


@inline
def log1p_unit(v):
    """log(1 + v) for 0 ≤ v ≤ 1 or NaN"""
    f, rest = _log1p_of(v)
    return f - rest


@inline
def log(v):
    """log(v)"""
    subnormal = v < of(LEAST_NORMAL, v)
    bits = to_bits(select(subnormal, v * of(LIFT, v), v)) - to_bits(of(SQRT_HALF, v))
    k = to_float(bits >> of(MANTISSA, bits)) - select(subnormal, of(LIFTED, v), 0.0)
    m = from_bits((bits & of(MANTISSA_MASK, bits)) + to_bits(of(SQRT_HALF, v)))  # v = 2^k m, √½ ≤ m < √2
    f, rest = _log1p_of(m - 1.0)
    result = fma(k, of(LN2_HIGH, v), f - fma(k, -of(LN2_LOW, v), rest))
    result = select(v == of(INFINITY, v), v, result)
    return select(v > 0.0, result, select(v == 0.0, -of(INFINITY, v), of(NAN, v)))


@inline
def _erfc_log(a):
    """-log(erfc(a)); the linear term is added last, with more bits than one coefficient has"""
    return fma(a, of(ERFC_SLOPE, a), a * fma(a, polynomial(ERFC_LOG, a), of(ERFC_SLOPE_LOW, a)))


@inline
def erf(v):
    """The error function, 1 - exp(-P(|v|))"""
    a = minimum_fast(of(ERF_ONE, v), absolute(v))
    return copysign(_expm1_between(-_erfc_log(a)), v)


@inline
def _exp2_between(v, shift):
    """2^(v - shift), shift whole, where the result is not too large and not far below what rounds to 0"""
    n = (v + of(MAGIC, v)) - of(MAGIC, v)
    return scale(polynomial(EXP2, v - n), n - shift)


@inline
def _fraction_and_power(v):
    """(v - n, 2^n) of the nearest whole n; 2^n is 0 where it is subnormal"""
    v = maximum_fast(of(EXP2_FLUSHED, v), v)
    shifted = v + of(MAGIC_EXPONENT, v)
    return v - (shifted - of(MAGIC_EXPONENT, v)), from_bits(to_bits(shifted) << of(MANTISSA, to_bits(shifted)))


@inline
def exp2_below(v):
    """2^v for v ≤ 127 or NaN; 0 where it is subnormal: half the work of exp_below, for weights that stand beside a 1"""
    r, power = _fraction_and_power(v)
    return polynomial(EXP2, r) * power


@inline
def exp2_below_short(v):
    """The same to 18 bits, for weights that are rounded to bfloat16"""
    r, power = _fraction_and_power(v)
    return polynomial(EXP2_SHORT, r) * power


@inline
def normal_cdf(v):
    """The normal distribution's integral from -∞ to v, erfc(-v / √2) / 2, with no cancellation for negative v.

    The relative error is a few ulp near 0 and rises where the result is too small to matter next to 1: float32 to 1e-4
    at v = -5 and 0.3 at v = -12, float64 to 1e-5 at v = -8 and 0.02 at v = -36.
    """
    a = minimum_fast(of(NORMAL_ZERO, v), absolute(v))
    near = minimum_fast(of(NORMAL_FIT, v), a)
    p = near * polynomial(NORMAL_LOG2, near)
    if is_double(v):  # past the fit go on as exp(-a² / 2) / a
        p = fma((near - a) * (near + a), 0.5 * 1.4426950408889634, p)
    below = _exp2_between(p, 1.0)
    if is_double(v):
        below = below * (of(NORMAL_FIT, v) / maximum_fast(of(NORMAL_FIT, v), a))
    return select(v < 0.0, below, 1.0 - below)


@inline
def normal_pdf(v):
    """The normal distribution's density, exp(-v² / 2) / √(2π), to a relative error of v² ulp"""
    p = maximum_fast(of(EXP2_LEAST, v), v * v * (-0.5 * 1.4426950408889634))
    return _exp2_between(p, 0.0) * 0.3989422804014327
