"""The activations' names and numbers, for host code: importing this imports no compiler."""

from __future__ import annotations

#: Number of each activation's parameters: leaky_relu (slope), elu (alpha), hardtanh (min, max), softplus (beta,
#: threshold).
PARAMETERS: dict[str, int] = {
    "relu": 0, "leaky_relu": 1, "relu6": 0, "elu": 1, "gelu": 0, "gelu_tanh": 0, "silu": 0, "mish": 0, "sigmoid": 0,
    "tanh": 0, "hardswish": 0, "hardsigmoid": 0, "hardtanh": 2, "softplus": 2,
}
#: The number by which a kernel that serves several activations tells them apart; 0 is none of them.
CODES: dict[str, int] = {name: code for code, name in enumerate(PARAMETERS, start=1)}
