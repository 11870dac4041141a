"""Recurrent layers: speech, language models, translation, voices, and single steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastnn._numerics import TORCH, Scale, results

from . import Case, random, traffic

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}


def _of_the_largest(run: Callable[..., Tensor]) -> Scale:
    """A state is made of all that went before: errors are counted at the largest number."""

    def scale(inputs: Any, grad: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(t.abs().max().expand(t.shape) for t in results(partial(run, TORCH), inputs, grad))

    return scale


def layers(
    mode: str, model: str, steps: int, batch: int, inputs: int, units: int, number: int = 1, directions: int = 1,
    kind: str = "forward", lengths: tuple[int, ...] = (), backend: str | None = None, **extra: Any,
) -> Case:  # fmt: skip
    """Layers over a batch of sequences; ``lengths``: a packed batch of so long ones; ``backend``: ours, where torch's is the
    automatic choice."""
    grad, wide = kind == "train", GATES[mode] * units
    shapes = [
        shape
        for layer in range(number)
        for _ in range(directions)
        for shape in ((wide, directions * units if layer else inputs), (wide, units), (wide,), (wide,))
    ]
    sizes = [sum(n > t for n in lengths) for t in range(max(lengths, default=0))]
    rows = (sum(sizes), inputs) if lengths else (steps, batch, inputs)
    states = 2 if mode == "lstm" else 1

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        state = torch.zeros(number * directions, batch, units, dtype=dtype)
        weights = (random(*s, seed=n, scale=units**-0.5, grad=grad)(dtype) for n, s in enumerate(shapes))
        return random(*rows, seed=99)(dtype), *(state.clone() for _ in range(states)), *weights

    def run(F: Any, x: Tensor, *rest: Tensor, ours: bool = False) -> Tensor:
        hx: Any = tuple(rest[:2]) if states == 2 else rest[0]
        options = (list(rest[states:]), True, number, 0.0, grad, directions == 2)
        if not lengths:
            return getattr(F, mode)(x, hx, *options, False, **({"backend": backend} if ours and backend else {}))[0]
        if ours:
            return getattr(F, mode)(x, hx, *options, batch_sizes=torch.tensor(sizes))[0]
        return getattr(F, mode)(x, torch.tensor(sizes), hx, *options)[0]

    reads = sum(torch.Size(s).numel() for s in [rows, *[(number * directions, batch, units)] * states, *shapes])
    writes = (sum(sizes) or steps * batch) * directions * units
    products = [s[0] * s[1] for s in shapes if len(s) == 2]
    # Training multiplies with each matrix twice more, with the first layer's for the input once: its gradient is not wanted.
    multiplied = 3 * sum(products) - sum(products[: 2 * directions : 2]) if grad else sum(products)
    size = f"{number}x{directions}_T{steps}_B{batch}_I{inputs}_H{units}"
    return Case(
        "rnn",
        f"{mode}/{model}/{size}",
        make,
        theirs=run,
        ours=partial(run, ours=True),
        parameters=tuple(range(1 + states, 1 + states + len(shapes))),
        flops=2 * multiplied * (sum(sizes) or steps * batch),
        passes=traffic(kind, reads, writes, sum(torch.Size(s).numel() for s in shapes)),
        mode=kind,
        scale=_of_the_largest(run),
        moved=partial(_flattened, mode, inputs, units, number, directions),
        **extra,
    )


def _flattened(mode: str, inputs: int, units: int, number: int, directions: int, given: tuple[Any, ...]) -> None:
    """Makes the weights parts of one buffer, as torch's own layers do: cuDNN would else copy them in every call."""
    weights = [t for t in given if t.is_floating_point()][-4 * number * directions :]
    kind = torch.backends.cudnn.rnn.get_cudnn_mode(mode.upper())
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(weights, 4, inputs, kind, units, 0, number, True, directions == 2)


def cell(mode: str, batch: int, units: int, **extra: Any) -> Case:
    """One step of a cell, as a stream or a decoder makes it."""
    wide, states = GATES[mode] * units, 2 if mode == "lstm" else 1
    shapes = ((wide, units), (wide, units), (wide,), (wide,))

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        others = (random(*s, seed=n, scale=units**-0.5)(dtype) for n, s in enumerate(shapes))
        return *(random(batch, units, seed=90 + n)(dtype) for n in range(1 + states)), *others

    def run(F: Any, x: Tensor, *rest: Tensor) -> Tensor:
        out = getattr(F, f"{mode}_cell")(x, rest[:2] if states == 2 else rest[0], *rest[states:])
        return out[0] if states == 2 else out

    return Case(
        "rnn", f"{mode}_cell/step/B{batch}_H{units}", make, theirs=run, parameters=tuple(range(1 + states, 5 + states)),
        flops=4 * batch * units * wide, passes=((2 * wide * (units + 1) + (1 + states) * batch * units, batch * units),),
        scale=_of_the_largest(run), **extra,
    )  # fmt: skip


def changing_lengths(mode: str, lengths: tuple[int, ...], batch: int, inputs: int, units: int, **extra: Any) -> Case:
    """Call after call with another number of steps, for which torch's own library makes itself ready anew."""
    wide, states = GATES[mode] * units, 2 if mode == "lstm" else 1
    shapes = ((wide, inputs), (wide, units), (wide,), (wide,))

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        state = torch.zeros(1, batch, units, dtype=dtype)
        weights = (random(*s, seed=n, scale=units**-0.5)(dtype) for n, s in enumerate(shapes))
        return *(random(n, batch, inputs, seed=n)(dtype) for n in lengths), *(state.clone() for _ in range(states)), *weights

    def run(F: Any, *given: Tensor) -> Tensor:
        xs, hx, weights = given[: len(lengths)], given[len(lengths) : -4], list(given[-4:])
        initial: Any = hx if states == 2 else hx[0]
        return torch.cat([getattr(F, mode)(x, initial, weights, True, 1, 0.0, False, False, False)[0] for x in xs])

    steps, first = sum(lengths), len(lengths) + states
    return Case(
        "rnn", f"{mode}/changing_lengths/{len(lengths)}_B{batch}_I{inputs}_H{units}", make, theirs=run,
        parameters=tuple(range(first, first + 4)), flops=2 * steps * batch * wide * (inputs + units),
        passes=((steps * batch * inputs + wide * (inputs + units + 2), steps * batch * units),),
        scale=_of_the_largest(run), moved=partial(_flattened, mode, inputs, units, 1, 1), **extra,
    )  # fmt: skip


def qrnn(steps: int, batch: int, units: int, kind: str = "forward", **extra: Any) -> Case:
    """A quasi-recurrent layer, fo-pooling, window 2; torch's way is a product and a loop over the steps."""
    grad = kind == "train"
    shapes = ((steps, batch, units), (batch, units), (3 * units, 2 * units), (3 * units,))
    sizes = [torch.Size(s).numel() for s in shapes]

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        scales = (1.0, 0.0, (2 * units) ** -0.5, 0.1)
        return tuple(random(*s, seed=n, scale=scale, grad=grad and n >= 2)(dtype)
                     for n, (s, scale) in enumerate(zip(shapes, scales, strict=True)))  # fmt: skip

    def theirs(F: Any, x: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        windows = torch.cat([F.pad(x[:-1], (0, 0, 0, 0, 1, 0)), x], 2)
        z, f, o = F.linear(windows, weight, bias).chunk(3, 2)
        f, z, cells = torch.sigmoid(f), torch.tanh(z), []
        for t in range(steps):
            c = torch.lerp(z[t], c, f[t])
            cells.append(c)
        return torch.sigmoid(o) * torch.stack(cells)

    return Case(
        "rnn", f"qrnn/wikitext/T{steps}_B{batch}_H{units}", make, theirs=theirs, ours=lambda F, *given: F.qrnn(*given)[0],
        parameters=(2, 3), flops=12 * steps * batch * units * units * (2 if grad else 1),  # nobody wants the input's gradient
        passes=traffic(kind, sum(sizes), steps * batch * units, sum(sizes[2:])), mode=kind,
        scale=_of_the_largest(theirs), **extra,
    )  # fmt: skip


_LENGTHS = tuple(sorted((5 + 37 * n % 96 for n in range(32)), reverse=True))

CASES = [
    layers("lstm", "usual", 50, 32, 128, 256, goals={"best": 1.1}, quick=True),
    layers("gru", "usual", 50, 32, 128, 256, goals={"best": 1.7, "torch": 2.2}),
    layers("rnn_tanh", "usual", 50, 32, 128, 256, goals={"best": 2.0}),
    layers("lstm", "usual", 50, 32, 128, 256, kind="train", goals={"best": 1.15}),
    layers("gru", "usual", 50, 32, 128, 256, kind="train", goals={"best": 2.0}),
    layers("rnn_tanh", "usual", 50, 32, 128, 256, kind="train", goals={"best": 2.0}),
    layers("lstm", "one_sequence", 100, 1, 256, 512, goals={"best": 1.5}),
    layers("lstm", "seq2seq_encoder", 40, 16, 256, 256, 2, 2, goals={"best": 1.3}),
    layers("gru", "seq2seq_encoder", 40, 16, 256, 256, 2, 2, goals={"best": 1.3}),
    layers("lstm", "seq2seq_encoder", 40, 16, 256, 256, 2, 2, kind="train", goals={"best": 1.15}),
    layers("lstm", "deepspeech", 150, 8, 512, 512, 1, 2, goals={"best": 1.3}),
    layers("lstm", "language_model", 35, 20, 650, 650, 2, goals={"best": 1.1}),
    layers("lstm", "language_model", 35, 20, 650, 650, 2, kind="train", goals={"best": 1.15}),
    layers("lstm", "resemblyzer", 160, 4, 40, 256, 3, goals={"best": 1.3}),
    layers("lstm", "packed_5_to_100", 100, 32, 128, 256, lengths=_LENGTHS, goals={"best": 2.0}),
    changing_lengths("lstm", (31, 57, 44, 83, 20, 66), 8, 128, 128, goals={"best": 1.5}),
    qrnn(105, 20, 640, goals={"best": 2.0}),
    qrnn(105, 20, 640, kind="train", goals={"best": 2.0}),
    layers("lstm", "streaming", 1, 1, 256, 512, goals={"best": 1.5}),
    layers("lstm", "resemblyzer_one", 160, 1, 40, 256, 3, goals={"best": 1.3}),
    layers("gru", "tiny", 50, 1, 64, 64, 2, goals={"best": 1.5}),
    layers("lstm", "tiny", 50, 8, 32, 32, goals={"best": 1.5}),
    layers("gru", "tiny", 50, 8, 64, 64, goals={"best": 1.5}),
    *(cell(mode, 1, units, goals={"best": 6.0 if units == 64 else 2.5}) for mode in GATES for units in (64, 256)),
]

# What `make gpu` measures
_GPU: dict[str, Any] = {"devices": ("cuda",), "quick": True}
CASES += [
    layers("lstm", "deep", 512, 10, 256, 256, 6, goals={"torch": 4.0}, **_GPU),
    layers("gru", "deep", 512, 10, 256, 256, 6, goals={"torch": 4.0}, **_GPU),
    layers("lstm", "deep", 512, 10, 256, 256, 6, kind="train", goals={"torch": 4.0}, **_GPU),
    layers("lstm", "deep_both_ways", 512, 10, 256, 256, 3, 2, goals={"torch": 4.0}, **_GPU),
    layers("lstm", "wide", 128, 32, 2048, 2048, backend="gpu", goals={"torch": 1.0}, **_GPU),  # too large for the chip
    qrnn(512, 20, 640, goals={"torch": 4.0}, **_GPU),
]

# What `make gpu GPU=--long` measures besides: half precision, in which torch's library has a persistent kernel of its own
_LONG = _GPU | {"quick": False}
CASES += [
    *(layers("lstm", "half", 512, batch, units, units, goals={"torch": 1.0}, **_LONG | {"dtypes": (torch.float16,)})
      for batch, units in ((16, 256), (32, 512), (64, 1024))),
    layers("gru", "deep_both_ways", 512, 10, 256, 256, 3, 2, goals={"torch": 8.0}, **_LONG),
    layers("lstm", "large", 128, 10, 1150, 1150, goals={"torch": 1.0}, **_LONG),  # weights in shared memory too
    layers("gru", "deep", 512, 10, 256, 256, 6, kind="train", goals={"torch": 4.0}, **_LONG),
]  # fmt: skip
