"""exp, log, tanh, erf and their kin on SIMD vectors of float32 and float64.

Largest errors measured (tests/test_vecmath.py) in ulp, float32 / float64; all are right at ±0, ±Inf, NaN, and where the result
overflows or is subnormal:

    exp 1.0 / 0.9     expm1 1.4 / 1.3     log 0.9 / 0.9     log1p on [0, 1] 1.1 / 1.2     tanh 1.7 / 1.6     sigmoid 1.4 / 1.4     erf 1.5 / 1.4

Sources. Argument reduction by a multiple of ln 2 in two parts: Cody & Waite, "Software Manual for the Elementary Functions",
1980, chapter 6; with an FMA the first part may have all its bits. log: the form of fdlibm's e_log.c (Sun Microsystems, 1993). erf:
-log(erfc(a)) / a is so smooth that one polynomial serves the whole range, and expm1 turns it into erf without cancellation.

Polynomials are minimax under the weight that makes it the relative error of the result: Remez exchange on a Chebyshev grid
of 600 to 1500 points in 50-digit arithmetic (mpmath), float32 coefficients rounded one after the other, lowest first, each time
with the rest fitted again. Each carries its own error as a comment.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .host import simd
from .simd import (
    Static, Vector, absolute, copysign, fma, from_bits, inline, llvm_call, maximum_fast, minimum_fast, select, to_bits,
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
    def codegen(context, builder, sig, args):
        return _spread(v, constant.value.values[v.elem])
    return v(constant, v), codegen


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
LOG2_E = Constant(1.4426950216293335, 1.4426950408889634)
LN2_HIGH = Constant(0.6931471824645996, 0.6931471805599453)
LN2_LOW = Constant(-1.904654323148236e-09, 2.3190468138462996e-17)
EXP_MOST = Constant(89.0, 710.0)  # exp is Inf there, and 0 at the other end
EXP_LEAST = Constant(-104.0, -746.0)
MANTISSA = Constant(23, 52)

# (exp(r) - 1 - r) / r² on |r| ≤ ln2 / 2; relative error of exp and expm1 2^-26.1, 2^-54.7
EXP_TAIL = Constant(
    [0.4999999701976776, 0.16666539013385773, 0.04166775569319725, 0.008367124013602734, 0.001383566646836698],
    [0.5000000000000006, 0.16666666666666588, 0.04166666666657676, 0.008333333333389545, 0.001388888893156485,
     0.0001984126971902671, 2.4801505273864752e-05, 2.755740752026926e-06, 2.7626037848537863e-07, 2.5053783347755578e-08])
EXP = Constant(*([1.0, 1.0, *EXP_TAIL.values[t]] for t in (types.float32, types.float64)))

# (2 atanh(s) / s - 2) / s² of s² on [0, 1/9]; relative error of the logarithm 2^-27.7, 2^-58.8
LOG_TAIL = Constant(
    [0.666664183139801, 0.4002145528793335, 0.28002530336380005, 0.2800999581813812],
    [0.6666666666666631, 0.40000000000156305, 0.2857142854795775, 0.22222223964177332, 0.18181744089895638,
     0.15386557036272558, 0.1330100362152378, 0.12105907912165298, 0.08340634421063874, 0.1701802215832462])

# -log(erfc(a)) / a; relative error of erf 2^-24.2 (mostly the rounding of the first coefficient), 2^-56.0. The weight also keeps
# erfc's relative error below 2^-24.2 / sqrt(erfc) on [0, 10.1], below 2^-56 / erfc^0.7 on [0, 6].
ERFC_LOG = Constant(
    [1.128379225730896, 0.6366158127784729, 0.10281362384557724, -0.019281134009361267, 5.121322101331316e-05,
     0.0014903334667906165, -0.0005608740611933172, 0.00010788709914777428, -1.0939506864815485e-05, 4.520012453212985e-07],
    [1.1283791670955126, 0.6366197723676, 0.10277260330175132, -0.019128447004588888, -0.0002091946952120139,
     0.0016962063405408468, -0.0005901250507782214, 2.587571024688448e-05, 6.45027232897606e-05, -2.9752984990999875e-05,
     3.464613218021083e-06, 2.748058760792124e-06, -1.6381610249127774e-06, 2.3904367242987555e-07, 2.1051337250894562e-07,
     -1.862552633721173e-07, 8.753303289373857e-08, -2.9585864908479762e-08, 7.742544700382767e-09, -1.6064354088695933e-09,
     2.6516605318024807e-10, -3.450834003024393e-11, 3.468816824965379e-12, -2.5998228796271635e-13, 1.367719023513454e-14,
     -4.50448385349048e-16, 6.985068051913172e-18])
ERF_ONE = Constant(4.0, 6.0)  # erf rounds to 1 from there on


# Scaling by powers of two -----------------------------------------------------------------------------------------------

if simd().name == "avx512":
    @intrinsic
    def scale(typingctx, v, n):
        """scale(v, n) -> v · 2^n for whole n (a float vector), rounded once where the result is subnormal"""
        def codegen(context, builder, sig, args):
            bits = ir.IntType(v.lanes)
            kind = "ps" if v.elem is types.float32 else "pd"
            current_rounding = ir.IntType(32)(4)
            return llvm_call(builder, f"llvm.x86.avx512.mask.scalef.{kind}.512", v.llvm,
                             [args[0], args[1], args[0], bits((1 << v.lanes) - 1), current_rounding], "")
        return v(v, n), codegen
else:
    @inline
    def power_of_two(i, v):
        """2^i for an integer vector i in the range of normal numbers"""
        return from_bits((i << of_int(MANTISSA, i)) + to_bits(of(ONE, v)))

    @inline
    def scale(v, n):
        """scale(v, n) -> v · 2^n for whole n (a float vector), rounded once where the result is subnormal"""
        i = to_bits(n + of(MAGIC, v)) - to_bits(of(MAGIC, v))
        half = i >> 1  # in two steps, as 2^n itself may be out of range
        return v * power_of_two(half, v) * power_of_two(i - half, v)


@inline
def _reduce(v):
    """v = n ln 2 + r with |r| ≤ ln2 / 2: (n, r)"""
    n = fma(v, of(LOG2_E, v), of(MAGIC, v)) - of(MAGIC, v)
    r = fma(n, -of(LN2_HIGH, v), v)
    return n, fma(n, -of(LN2_LOW, v), r)


# The functions ----------------------------------------------------------------------------------------------------------


@inline
def exp_between(v):
    """exp for EXP_LEAST ≤ v ≤ EXP_MOST (or NaN): what callers whose argument is bounded need"""
    n, r = _reduce(v)
    return scale(polynomial(EXP, r), n)


@inline
def exp_negative(v):
    """exp for v ≤ 0 or NaN"""
    return exp_between(maximum_fast(of(EXP_LEAST, v), v))


@inline
def exp(v):
    """exp(v)"""
    return exp_negative(minimum_fast(of(EXP_MOST, v), v))


@inline
def _expm1_between(v):
    """exp(v) - 1 where 2^n is a finite normal number"""
    n, r = _reduce(v)
    power = scale(of(ONE, v), n)
    return fma(power, fma(r * r, polynomial(EXP_TAIL, r), r), power - 1.0)
