"""Each activation and its gradient on compute vectors: what the activation kernels and the products' epilogues share.

forward(v, p0, p1) is f(v); backward(g, v, p0, p1) is g f'(v). p0 and p1 are scalars, unused where the activation has no
parameters. At ±Inf and NaN the results are torch's, but for gelu(+Inf): that is +Inf, where torch gives NaN or Inf by
the tensor's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .activation_codes import CODES
from .simd import fma, inline, maximum, maximum_fast, minimum_fast, select
from .vecmath import (
    Constant,
    absolute,
    exp_below,
    expm1_below,
    log1p_unit,
    normal_cdf,
    normal_pdf,
    of,
    sigmoid,
    tanh,
)

# From there on mish(x) is x: exp(2 x) is still finite, and exp(-2 x) squared is 0.
MISH_LINEAR = Constant(43.0, 350.0)
GELU_LINEAR, GELU_CUBIC = 2 * 0.7978845608028654, 2 * 0.7978845608028654 * 0.044715


@inline
def none(code, v, p0, p1):
    return v


@inline
def relu(v, p0, p1):
    return maximum_fast(0.0, v)


@inline
def relu_backward(g, v, p0, p1):
    return select(v <= 0.0, 0.0, g)


@inline
def leaky_relu(v, p0, p1):
    return select(v > 0.0, v, v * p0)


@inline
def leaky_relu_backward(g, v, p0, p1):
    return select(v > 0.0, g, g * p0)


@inline
def hardtanh(v, p0, p1):
    low = maximum_fast(p0, v)
    return minimum_fast(p1, low)


@inline
def hardtanh_backward(g, v, p0, p1):
    return select((v > p0) & (v < p1), g, 0.0)


@inline
def relu6(v, p0, p1):
    return hardtanh(v, 0.0, 6.0)


@inline
def relu6_backward(g, v, p0, p1):
    return hardtanh_backward(g, v, 0.0, 6.0)


@inline
def elu(v, p0, p1):
    return select(v > 0.0, v, p0 * expm1_below(v))


@inline
def elu_backward(g, v, p0, p1):
    return select(v > 0.0, g, g * p0 * exp_below(v))


@inline
def gelu(v, p0, p1):
    return v * normal_cdf(v)


@inline
def gelu_backward(g, v, p0, p1):
    return g * fma(v, normal_pdf(v), normal_cdf(v))


@inline
def gelu_tanh(v, p0, p1):
    return v * logistic(v * fma(v * v, GELU_CUBIC, GELU_LINEAR))


@inline
def gelu_tanh_backward(g, v, p0, p1):
    square = v * v
    s, slope = logistic_and_slope(v * fma(square, GELU_CUBIC, GELU_LINEAR))
    return g * fma(v * slope, fma(square, 3.0 * GELU_CUBIC, GELU_LINEAR), s)


@inline
def logistic(v):
    """sigmoid with an ulp more of error and fewer instructions: for a factor, not for a result"""
    e = exp_below(-absolute(v))
    return select(v < 0.0, e, 1.0) / (1.0 + e)


@inline
def logistic_and_slope(v):
    """sigmoid and its derivative"""
    e = exp_below(-absolute(v))
    r = 1.0 / (1.0 + e)
    return select(v < 0.0, e, 1.0) * r, e * r * r


@inline
def silu(v, p0, p1):
    return v * logistic(v)


@inline
def silu_backward(g, v, p0, p1):
    """The slope is s (1 + v (1 - s)), which keeps its sign where it vanishes"""
    e = exp_below(-absolute(v))
    r = 1.0 / (1.0 + e)
    return g * (select(v < 0.0, e, 1.0) * r * fma(v, select(v < 0.0, 1.0, e) * r, 1.0))


@inline
def mish(v, p0, p1):
    e = exp_below(minimum_fast(of(MISH_LINEAR, v), v))
    n = e * (e + 2.0)  # tanh(log(1 + e)) = n / (n + 2)
    return v * (n / (n + 2.0))


@inline
def mish_backward(g, v, p0, p1):
    e = exp_below(minimum_fast(of(MISH_LINEAR, v), v))
    n = e * (e + 2.0)
    r = 1.0 / (n + 2.0)
    return g * fma(v, 4.0 * (e * (1.0 + e)) * (r * r), n * r)


@inline
def sigmoid_forward(v, p0, p1):
    return sigmoid(v)


@inline
def sigmoid_backward(g, v, p0, p1):
    return g * logistic_and_slope(v)[1]


@inline
def tanh_forward(v, p0, p1):
    return tanh(v)


@inline
def tanh_backward(g, v, p0, p1):
    e = exp_below(-2.0 * absolute(v))
    d = 1.0 + e
    return g * (4.0 * e / (d * d))


@inline
def hardsigmoid(v, p0, p1):
    return hardtanh(v + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@inline
def hardsigmoid_backward(g, v, p0, p1):
    return select((v > -3.0) & (v < 3.0), g * (1.0 / 6.0), 0.0)


@inline
def hardswish(v, p0, p1):
    return v * hardsigmoid(v, p0, p1)


@inline
def hardswish_backward(g, v, p0, p1):
    return select(v <= -3.0, 0.0, select(v >= 3.0, g, g * fma(v, 1.0 / 3.0, 0.5)))


@inline
def softplus(v, p0, p1):
    z = v * p0
    rounded = maximum(z, 0.0) + log1p_unit(exp_below(-absolute(z)))
    return select(z > p1, v, rounded * (1.0 / p0))


@inline
def softplus_backward(g, v, p0, p1):
    z = v * p0
    return select(z > p1, g, g * logistic(z))


_FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "relu": (relu, relu_backward), "leaky_relu": (leaky_relu, leaky_relu_backward), "relu6": (relu6, relu6_backward),
    "elu": (elu, elu_backward), "gelu": (gelu, gelu_backward), "gelu_tanh": (gelu_tanh, gelu_tanh_backward),
    "silu": (silu, silu_backward), "mish": (mish, mish_backward), "sigmoid": (sigmoid_forward, sigmoid_backward),
    "tanh": (tanh_forward, tanh_backward), "hardswish": (hardswish, hardswish_backward),
    "hardsigmoid": (hardsigmoid, hardsigmoid_backward), "hardtanh": (hardtanh, hardtanh_backward),
    "softplus": (softplus, softplus_backward),
}
#: name → (code, forward, backward)
ACTIVATIONS = {name: (code, *_FUNCTIONS[name]) for name, code in CODES.items()}


def _switch(names: list[str]) -> Callable[..., Any]:
    """apply(code, v, p0, p1): the activation among ``names`` that has this code; v itself if none has."""
    if not names:
        return none
    code, forward, _ = ACTIVATIONS[names[0]]
    others = _switch(names[1:])

    @inline
    def apply(which, v, p0, p1):
        if which == code:
            return forward(v, p0, p1)
        return others(which, v, p0, p1)
    return apply


#: apply(code, v, p0, p1): any activation, chosen as the kernel runs
apply = _switch(list(ACTIVATIONS))
