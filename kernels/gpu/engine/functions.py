"""exp and its kin, the activations and the random numbers, for float32 blocks inside any kernel.

The hardware's exp2 takes x·log₂e rounded, which costs |x| ulp: `exp` adds what the rounding left. The other functions are made
of it without cancellation. Their polynomials are those of the CPU engine's vecmath, which says where they come from. An
activation is chosen by its name, a constant: no kernel holds the code of more than one.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950216293335)
LN2 = tl.constexpr(0.693147182464599609375)
LN2_LOW = tl.constexpr(-1.904654299957768e-09)


@triton.jit
def wide(n):
    """A scalar, or a constant, as an int64: sizes and strides that are 1 reach a kernel as constants."""
    return tl.zeros((), tl.int64) + n


@triton.jit
def exp(x):
    """exp(x) to about 2 ulp. Subnormal results are 0."""
    y = x * LOG2_E
    low = tl.fma(y, -LN2_LOW, tl.fma(y, -LN2, x))
    e = tl.exp2(y)
    return tl.where(tl.abs(x) < 88.7228, tl.fma(e, low, e), e)  # beyond, e is 0 or Inf, and NaN where x is


@triton.jit
def _expm1_small(x):
    """exp(x) - 1 for |x| ≤ ln2 / 2"""
    p = tl.fma(x, 0.001383566646836698, 0.008367124013602734)
    p = tl.fma(x, p, 0.04166775569319725)
    p = tl.fma(x, p, 0.16666539013385773)
    p = tl.fma(x, p, 0.4999999701976776)
    return tl.fma(x * x, p, x)


@triton.jit
def expm1(x):
    """exp(x) - 1; beyond the polynomial there is no cancellation to speak of"""
    return tl.where(tl.abs(x) < 0.34, _expm1_small(x), exp(x) - 1.0)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 ≤ x ≤ 1 or NaN: 2 atanh(s) with s = x / (2 + x)"""
    s = x / (2.0 + x)
    z = s * s
    p = tl.fma(z, 0.2800999581813812, 0.28002530336380005)
    p = tl.fma(z, p, 0.4002145528793335)
    p = tl.fma(z, p, 0.666664183139801)
    return x - s * (x - z * p)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), by exp(-|x|), which cannot overflow"""
    e = exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def sigmoid_slope(x):
    e = exp(-tl.abs(x))
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def tanh(x):
    """tanh(x), from expm1(-2 |x|); NaN stays"""
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x < 0.0, -t, t) + 0.0 * tl.where(x == x, 0.0, x)


@triton.jit
def tanh_slope(x):
    e = exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def normal_cdf(x):
    """erfc(-x / √2) / 2 = 2^(a P(a)) / 2 below 0, a = -x: no cancellation there"""
    a = tl.minimum(tl.abs(x), 14.4)
    p = tl.fma(a, -6.304059940731577e-09, 2.8505624527497275e-07)
    p = tl.fma(a, p, -5.042630164098227e-06)
    p = tl.fma(a, p, 4.403325146995485e-05)
    p = tl.fma(a, p, -0.00017680910241324455)
    p = tl.fma(a, p, -0.00019368433277122676)
    p = tl.fma(a, p, 0.007159232161939144)
    p = tl.fma(a, p, -0.05256817117333412)
    p = tl.fma(a, p, -0.45918500423431396)
    p = tl.fma(a, p, -1.1511075496673584)
    below = 0.5 * tl.exp2(a * p)
    return tl.where(x < 0.0, below, 1.0 - below) + 0.0 * tl.where(x == x, 0.0, x)


@triton.jit
def clamp(x, low, high):
    """x between the bounds; NaN stays"""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


# Activations. p0 and p1 are scalars, unused where the activation has no parameters. At ±Inf and NaN as torch has it, but for gelu
# at -Inf and its gradient there, which are 0 instead of NaN.


@triton.jit
def activation(x, NAME: tl.constexpr, p0, p1):
    """f(x) for float32 x; x itself where NAME is None"""
    if NAME is None:
        y = x
    elif NAME == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif NAME == "leaky_relu":
        y = tl.where(x > 0.0, x, x * p0)
    elif NAME == "relu6":
        y = clamp(x, 0.0, 6.0)
    elif NAME == "hardtanh":
        y = clamp(x, p0, p1)
    elif NAME == "elu":
        y = tl.where(x > 0.0, x, p0 * expm1(x))
    elif NAME == "gelu":
        y = tl.where(x < -15.0, 0.0, x * normal_cdf(x))
    elif NAME == "gelu_tanh":
        y = tl.where(x < -30.0, 0.0, x * sigmoid(x * tl.fma(x * x, 0.07135481282553484, 1.5957691216057308)))
    elif NAME == "silu":
        y = x * sigmoid(x)
    elif NAME == "mish":
        e = exp(tl.where(x > 43.0, 43.0, x))
        n = e * (e + 2.0)  # tanh(log(1 + e)) = n / (n + 2)
        y = x * (n / (n + 2.0))
    elif NAME == "sigmoid":
        y = sigmoid(x)
    elif NAME == "tanh":
        y = tanh(x)
    elif NAME == "hardsigmoid":
        y = clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif NAME == "hardswish":
        y = x * (clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0))
    else:
        tl.static_assert(NAME == "softplus", "an unknown activation")
        z = x * p0
        y = tl.where(z > p1, x, (tl.where(z < 0.0, 0.0, z) + log1p_unit(exp(-tl.abs(z)))) / p0)
    return y


@triton.jit
def activation_backward(g, x, NAME: tl.constexpr, p0, p1):
    """g f'(x)"""
    if NAME == "relu":
        d = tl.where(x <= 0.0, 0.0, g)
    elif NAME == "leaky_relu":
        d = tl.where(x > 0.0, g, g * p0)
    elif NAME == "relu6":
        d = tl.where((x > 0.0) & (x < 6.0), g, 0.0)
    elif NAME == "hardtanh":
        d = tl.where((x > p0) & (x < p1), g, 0.0)
    elif NAME == "elu":
        d = tl.where(x > 0.0, g, g * p0 * exp(x))
    elif NAME == "gelu":
        density = exp(-0.5 * x * x) * 0.3989422804014327
        d = g * tl.where(tl.abs(x) > 15.0, tl.where(x < 0.0, 0.0, 1.0), tl.fma(x, density, normal_cdf(x)))
    elif NAME == "gelu_tanh":
        inner = x * tl.fma(x * x, 0.07135481282553484, 1.5957691216057308)
        slope = x * sigmoid_slope(inner) * tl.fma(x * x, 0.2140644384766045, 1.5957691216057308)
        d = g * tl.where(tl.abs(x) > 30.0, tl.where(x < 0.0, 0.0, 1.0), sigmoid(inner) + slope)
    elif NAME == "silu":
        d = g * tl.fma(x, sigmoid_slope(x), sigmoid(x))
    elif NAME == "mish":
        e = exp(tl.where(x > 43.0, 43.0, x))
        n = e * (e + 2.0)
        r = 1.0 / (n + 2.0)
        d = g * tl.fma(x, 4.0 * (e * (1.0 + e)) * (r * r), n * r)
    elif NAME == "sigmoid":
        d = g * sigmoid_slope(x)
    elif NAME == "tanh":
        d = g * tanh_slope(x)
    elif NAME == "hardsigmoid":
        d = tl.where((x > -3.0) & (x < 3.0), g * (1.0 / 6.0), 0.0)
    elif NAME == "hardswish":
        d = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, g, g * tl.fma(x, 1.0 / 3.0, 0.5)))
    else:
        tl.static_assert(NAME == "softplus", "an unknown activation")
        z = x * p0
        d = tl.where(z > p1, g, g * sigmoid(z))
    return d


# Random numbers: a hash of (seed, index) and nothing else, Wellons' "lowbias32", so that CPU and GPU drop the same elements.


@triton.jit
def mix(h):
    """A hash of 32 bits, for uint32 blocks (nullprogram.com/blog/2018/07/31)"""
    h = (h ^ (h >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    h = (h ^ (h >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def random_bits(index, seed_low, seed_key):
    """32 random bits for each int64 index. `seed_low`: the seed's low 32 bits; `seed_key`: mix(its high ones + 0x9E3779B9)."""
    return random_bits_near(index.to(tl.uint32), index >> 32, seed_low, seed_key)


@triton.jit
def random_bits_near(low, high, seed_low, seed_key):
    """The same of an index in two halves: where the high one is the same for all, it is hashed once."""
    key = mix(seed_low.to(tl.uint32) ^ mix(high.to(tl.uint32)))
    return mix(mix(low + key) ^ seed_key.to(tl.uint32))
