"""Recurrent layers: one direction of one layer over a whole sequence, and its backward through time. A cell is one step.

Rows, not steps, are what the op sees: (T·B, I), or the data of a PackedSequence with its batch sizes.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import is_grad_enabled
from torch._C._dynamo.guards import TensorGuards
from torch.compiler import is_dynamo_compiling

from fastnn import backends
from fastnn.backends import context, traces
from fastnn.kernels.reference import rnn as reference

from ._operator import Operator, asks_directly, empty_matrix, usual
from .activation import only_torch

MODES = tuple(reference.GATES)
Options = tuple[str, bool, int]
_KERNELS = (None, "auto", "cpu")  # backends that are these kernels


def _need(argument: str, t: Tensor | None, shape: tuple[int, ...], input: Tensor) -> None:
    if t is None or tuple(t.shape) != shape:
        raise RuntimeError(
            f"recurrent(): {argument} must have shape {shape}, got {None if t is None else tuple(t.shape)}"
        )
    if t.dtype != input.dtype:
        raise RuntimeError(f"recurrent(): {argument} must have input's dtype {input.dtype}, got {t.dtype}")
    if t.device != input.device:
        raise RuntimeError(f"recurrent(): {argument} must be on input's device {input.device}, got {t.device}")


def _check(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    mode: str,
    reverse: bool,
    keep: bool,
) -> str | None:
    """None, or why only torch can serve the call."""
    if mode not in reference.GATES:
        raise ValueError(f"recurrent(): mode got {mode!r}, allowed are {', '.join(MODES)}")
    if input.dim() != 2 or hx.dim() != 2 or w_ih.dim() != 2 or w_hh.dim() != 2:
        raise RuntimeError(
            "recurrent(): input, hx, w_ih and w_hh must be matrices, got shapes "
            + ", ".join(str(tuple(t.shape)) for t in (input, hx, w_ih, w_hh))
        )
    gates = reference.GATES[mode]
    batch, out = hx.shape
    units = w_hh.shape[0] // gates
    _need("w_ih", w_ih, (gates * units, input.shape[1]), input)
    _need("w_hh", w_hh, (gates * units, out), input)
    _need("hx", hx, (batch, out), input)
    if (b_ih is None) != (b_hh is None):
        raise RuntimeError("recurrent(): b_ih and b_hh must both be given, or neither")
    if b_ih is not None:
        _need("b_ih", b_ih, (gates * units,), input)
        _need("b_hh", b_hh, (gates * units,), input)
    if mode == "lstm":
        _need("cx", cx, (batch, units), input)
    elif cx is not None or w_hr is not None:
        raise RuntimeError(f"recurrent(): cx and w_hr are for mode 'lstm', got them for {mode!r}")
    if w_hr is not None:
        _need("w_hr", w_hr, (out, units), input)
    elif units != out:
        raise RuntimeError(f"recurrent(): hx must have as many columns as there are units, {units}, got {out}")
    if batch_sizes is None and input.shape[0] and (batch == 0 or input.shape[0] % batch):
        raise RuntimeError(f"recurrent(): input's rows must be a multiple of hx's {batch}, got {input.shape[0]}")
    if batch_sizes is not None and (batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu):
        raise RuntimeError(
            "recurrent(): batch_sizes must be a vector of int64 on the CPU, got "
            f"{tuple(batch_sizes.shape)}, {batch_sizes.dtype}, {batch_sizes.device}"
        )
    return only_torch(input.dtype)


def _inspect(input: Tensor, hx: Tensor, *rest: Any) -> None:
    sizes = rest[6]
    if sizes is None:
        return
    values = sizes.tolist()
    if not values or values[0] != hx.shape[0] or values[-1] < 1 or any(a < b for a, b in pairwise(values)):
        raise RuntimeError(
            f"recurrent(): batch_sizes must start with the batch {hx.shape[0]}, never grow and stay positive, "
            f"got {values if len(values) < 20 else [*values[:20], '…']}"
        )
    if sum(values) != input.shape[0]:
        raise RuntimeError(f"recurrent(): batch_sizes must sum to input's rows {input.shape[0]}, got {sum(values)}")


def _allocate(plan: None, input: Tensor, hx: Tensor, cx: Tensor | None, w_ih: Tensor, w_hh: Tensor, *rest: Any) -> Any:
    mode, keep = rest[4], rest[6]
    if not keep and asks_directly(input):  # the same, sooner
        dtype, (batch, out) = input.dtype, hx.shape
        cells = (0,) if cx is None else (batch, cx.shape[1])
        nothing = torch.float64 if dtype is torch.float64 else torch.float32
        return (
            empty_matrix((input.shape[0], out), (out, 1), dtype),
            empty_matrix((batch, out), (out, 1), dtype),
            empty_matrix(cells, (*cells[1:], 1), dtype),
            empty_matrix((0,), (1,), nothing),
        )
    shape = (input.shape[0], reference.KEPT[mode] * (w_hh.shape[0] // reference.GATES[mode])) if keep else (0,)
    return (
        input.new_empty(input.shape[0], hx.shape[1]),
        input.new_empty(hx.shape),
        input.new_empty((0,) if cx is None else cx.shape),
        input.new_empty(shape, dtype=torch.promote_types(input.dtype, torch.float32)),
    )


def _extra(*args: Any) -> Tensor:
    reserve = reference.recurrent(*args)[3]
    return reserve.to(torch.promote_types(reserve.dtype, torch.float32))


def _save(ctx: Any, args: Any, out: tuple[Tensor, ...]) -> None:
    ctx.rest = args[9:11]  # mode, reverse
    ctx.save_for_backward(*args[:8], out[0], out[3], args[8])


def _gradients(ctx: Any, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor) -> tuple[Tensor | None, ...]:
    *given, y, reserve, batch_sizes = ctx.saved_tensors
    needs = [t is not None and n for t, n in zip(given, ctx.needs_input_grad, strict=False)]
    found = recurrent_backward.call(
        grad_y, grad_h, grad_c, *given, y, reserve, batch_sizes, *ctx.rest, needs, ctx.backend
    )
    return *(g if n else None for g, n in zip(found, needs, strict=True)), None, None, None, None


recurrent: Operator = Operator(
    "recurrent(Tensor input, Tensor hx, Tensor? cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr,"
    " Tensor? batch_sizes, str mode, bool reverse, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    "rnn",
    check=_check,
    inspect=_inspect,
    allocate=_allocate,
    torch=lambda *args: reference.recurrent(*args)[:3],
    extra=_extra,
    visible=3,
    save=_save,
    backward=_gradients,
    autocast="lower",
)
"""One direction of one layer: every state, the last state, the last cell (empty but for an LSTM).

input (N, I): T·B rows, or a PackedSequence's data with its ``batch_sizes``; hx (B, H) or with a projection (B, P); cx (B, H);
w_ih (G·H, I), w_hh (G·H, H or P), b_ih and b_hh (G·H), w_hr (P, H), G and the gates' order as torch has them → (N, H or P),
(B, H or P), (B, H). ``reverse``: from the last step to the first. ``keep``: the gates are kept for the backward, 5 (LSTM) or
4 (GRU) numbers a unit and row; else the backward runs the forward once more.
"""


# The short way. A cell's step is a few microseconds of work, and so is a single step of layers: what they are called with is the
# same again, call for call. So a call that went the usual way prepares the next: the same weights with tensors of the same
# kind (types, dtypes, shapes, strides, modes: one look at all of them, in C++) go straight to what the kernels have ready.


# By the first weight's id: the options; how many tensors, and whether they are of the same kind; whether gradients have to be
# off; the function of input, states and parameters that serves the call; a reference that forgets all this with the weight.
_ready: dict[int, tuple[Options, int, Callable[..., bool], bool, Callable[..., Any], weakref.ref[Tensor]]] = {}


def again(options: Options, x: Tensor, states: Sequence[Tensor], params: Sequence[Any], backend: str | None) -> Any:
    """What layers or a cell return, if the call is like the one that was prepared; else None.

    options: mode, whether it is a cell, directions; x: (T, B, I), or a cell's (B, I); states and params as torch has them.
    """
    if is_dynamo_compiling() or (found := _ready.get(id(params[0]))) is None:
        return None
    known, count, same, without_grad, run, _ = found
    if (
        known == options
        and count == 1 + len(states) + len(params)
        and same(x, *states, *params)
        and not (without_grad and is_grad_enabled())
        and not traces
        and forward_ad._current_level < 0
        and (backend or context()) in _KERNELS
    ):
        return run(x, states, params)
    return None


def prepare(options: Options, x: Tensor, states: Sequence[Tensor], params: Sequence[Any]) -> None:
    """Note how calls like this one, which has just been served, can be served sooner."""
    tensors = (x, *states, *params)
    if not usual(tensors) or len(set(map(id, tensors))) < len(tensors):  # TensorGuards takes no tensor twice
        return
    make = getattr((backends.tables["cpu"].get("recurrent") or (None,))[0], "prepare", None)
    needs = any(t.requires_grad for t in tensors)
    if make is None or (needs and is_grad_enabled()):
        return
    run = make(*options, x, states, params)
    if run is None:
        return
    sizes: Any = [list(t.shape) for t in tensors]
    if x.dim() == 3:
        sizes[0][0] = None  # any number of steps
    strides: Any = [list(t.stride()) for t in tensors]
    same = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    key = id(params[0])
    forget = weakref.ref(params[0], lambda _: _ready.pop(key, None))
    _ready[key] = options, len(tensors), same, needs, run, forget


def _check_backward(
    grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, input: Tensor, hx: Tensor, cx: Tensor | None, w_ih: Tensor,
    w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None, y: Tensor, reserve: Tensor,
    batch_sizes: Tensor | None, mode: str, reverse: bool, needs: Sequence[bool],
) -> str | None:  # fmt: skip
    reason = _check(input, hx, cx, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, mode, reverse, True)
    _need("y", y, (input.shape[0], hx.shape[1]), input)
    _need("grad_y", grad_y, tuple(y.shape), input)
    _need("grad_h", grad_h, tuple(hx.shape), input)
    _need("grad_c", grad_c, (0,) if cx is None else tuple(cx.shape), input)
    whole = (input.shape[0], reference.KEPT[mode] * (w_hh.shape[0] // reference.GATES[mode]))
    if reserve.numel() and tuple(reserve.shape) != whole:
        raise RuntimeError(f"recurrent_backward(): reserve must have shape {whole} or be empty, got {tuple(reserve.shape)}")
    if len(needs) != 8:
        raise RuntimeError(f"recurrent_backward(): needs must have 8 entries, got {len(needs)}")
    return reason


def _allocate_backward(plan: None, *args: Any) -> tuple[Tensor, ...]:
    given, needs = args[3:11], args[16]
    return tuple(
        args[3].new_empty(t.shape if t is not None and needed else (0,)) for t, needed in zip(given, needs, strict=True)
    )


recurrent_backward: Operator = Operator(
    "recurrent_backward(Tensor grad_y, Tensor grad_h, Tensor grad_c, Tensor input, Tensor hx, Tensor? cx, Tensor w_ih,"
    " Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor y, Tensor reserve, Tensor? batch_sizes, str mode,"
    " bool reverse, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "rnn",
    check=_check_backward,
    inspect=lambda *args: _inspect(*args[3:11], args[13]),
    allocate=_allocate_backward,
    torch=reference.recurrent_backward,
)


# All layers and directions at once, where a kernel runs them side by side: on a GPU.


def _stack_sizes(input: Tensor, hx: Tensor, mode: str, layers: int, bidirectional: bool, bias: bool) -> tuple[int, int]:
    """(numbers in the weights, in what is kept)"""
    directions, units = 2 if bidirectional else 1, hx.shape[2]
    columns = [input.shape[1], *[directions * units] * (layers - 1)]
    each = sum(c + units + (2 if bias else 0) for c in columns) * directions
    kept = (layers - 1) * directions * units + layers * directions * reference.KEPT[mode] * units
    return reference.GATES[mode] * units * each, input.shape[0] * kept


def _check_stack(
    input: Tensor, hx: Tensor, cx: Tensor | None, weights: Tensor, batch_sizes: Tensor | None, mode: str, layers: int,
    bidirectional: bool, bias: bool, keep: bool,
) -> str | None:  # fmt: skip
    jobs = layers * (2 if bidirectional else 1)
    if input.dim() != 2 or hx.dim() != 3 or hx.shape[0] != jobs:
        raise RuntimeError(
            f"recurrent_stack(): input must be a matrix and hx ({jobs}, B, H), got {tuple(input.shape)} and {tuple(hx.shape)}"
        )
    _need("hx", hx, tuple(hx.shape), input)
    if mode == "lstm":
        _need("cx", cx, tuple(hx.shape), input)
    _need("weights", weights, (_stack_sizes(input, hx, mode, layers, bidirectional, bias)[0],), input)
    if batch_sizes is None and (hx.shape[1] == 0 or input.shape[0] % hx.shape[1]):
        raise RuntimeError(f"recurrent_stack(): input's rows must be a multiple of hx's {hx.shape[1]}, got {input.shape[0]}")
    return only_torch(input.dtype)


def _inspect_stack(input: Tensor, hx: Tensor, cx: Tensor | None, weights: Tensor, batch_sizes: Tensor | None, *rest: Any) -> None:
    _inspect(input, hx[0], *[None] * 6, batch_sizes)


def _allocate_stack(plan: None, input: Tensor, hx: Tensor, cx: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    mode, layers, bidirectional, bias, keep = rest[2:]
    kept = _stack_sizes(input, hx, mode, layers, bidirectional, bias)[1] if keep else 0
    return (
        input.new_empty(input.shape[0], (2 if bidirectional else 1) * hx.shape[2]),
        input.new_empty(hx.shape),
        input.new_empty((0,) if cx is None else cx.shape),
        input.new_empty((kept,), dtype=torch.promote_types(input.dtype, torch.float32)),
    )


def _stack_extra(*args: Any) -> Tensor:
    reserve = reference.recurrent_stack(*args)[3]
    return reserve.to(torch.promote_types(reserve.dtype, torch.float32))


def _save_stack(ctx: Any, args: Any, out: tuple[Tensor, ...]) -> None:
    ctx.rest = args[5:9]
    ctx.save_for_backward(*args[:4], out[0], out[3], args[4])


def _stack_gradients(ctx: Any, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor) -> tuple[Tensor | None, ...]:
    *given, y, reserve, batch_sizes = ctx.saved_tensors
    needs = [t is not None and n for t, n in zip(given, ctx.needs_input_grad, strict=False)]
    found = recurrent_stack_backward.call(
        grad_y, grad_h, grad_c, *given, y, reserve, batch_sizes, *ctx.rest, needs, ctx.backend
    )
    return *(g if n else None for g, n in zip(found, needs, strict=True)), *[None] * 6


_STACK = "Tensor? batch_sizes, str mode, int layers, bool bidirectional, bool bias"

recurrent_stack: Operator = Operator(
    f"recurrent_stack(Tensor input, Tensor hx, Tensor? cx, Tensor weights, {_STACK}, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "rnn",
    check=_check_stack,
    inspect=_inspect_stack,
    allocate=_allocate_stack,
    torch=lambda *args: reference.recurrent_stack(*args)[:3],
    extra=_stack_extra,
    visible=3,
    save=_save_stack,
    backward=_stack_gradients,
    autocast="lower",
)
"""Layers in one or two directions: input (N, I), hx and cx (L·D, B, H), weights: all of them in one vector, for each layer and
direction w_ih, w_hh and with ``bias`` b_ih, b_hh → (N, D·H), (L·D, B, H), (L·D, B, H). The rest as in ``recurrent``."""

recurrent_stack_backward: Operator = Operator(
    "recurrent_stack_backward(Tensor grad_y, Tensor grad_h, Tensor grad_c, Tensor input, Tensor hx, Tensor? cx, Tensor weights,"
    f" Tensor y, Tensor reserve, {_STACK}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    "rnn",
    check=lambda *args: _check_stack(*(*args[3:7], *args[9:14], True)),
    allocate=lambda plan, *args: tuple(
        args[3].new_empty(t.shape if t is not None and needed else (0,)) for t, needed in zip(args[3:7], args[14], strict=True)
    ),
    torch=reference.recurrent_stack_backward,
)


def flat_weights(input: Tensor, params: Sequence[Tensor], mode: str, units: int, layers: int, directions: int) -> Tensor:
    """What recurrent_stack takes for torch's parameters. Raises RuntimeError where one has not the shape, dtype or device."""
    count, wide = len(params) // (layers * directions), reference.GATES[mode] * units
    for k in range(layers * directions):
        columns = input.shape[1] if k < directions else directions * units
        shapes = ((wide, columns), (wide, units), (wide,), (wide,))
        for name, p, shape in zip(("w_ih", "w_hh", "b_ih", "b_hh"), params[k * count : (k + 1) * count], shapes, strict=False):
            _need(f"{name} of layer {k // directions}", p, shape, input)
    return torch.cat([p.reshape(-1) for p in params])


def gpu_refusal(input: Tensor, hx: Tensor, mode: str, layers: int, directions: int, named: str) -> str | None:
    """Why the GPU's kernels do not take such layers, or, where nobody named them, leave them to torch; None if they do."""
    _, supports, rule = backends.tables["gpu"].get("recurrent_stack") or backends.load("gpu", recurrent_stack)
    args = input, hx, None, None, None, mode, layers, directions == 2
    reason = supports("recurrent_stack", *args) if supports else None
    return rule(*args) if reason is None and rule is not None and named == "auto" else reason


# The pooling of a QRNN


def _check_scan(f: Tensor, u: Tensor, c0: Tensor, reverse: bool) -> str | None:
    if f.dim() < 1 or u.shape != f.shape or c0.shape != f.shape[1:]:
        raise RuntimeError(
            "scan(): f and u must have one shape (T, …), and c0 the same without T, got "
            f"{tuple(f.shape)}, {tuple(u.shape)} and {tuple(c0.shape)}"
        )
    if not f.dtype == u.dtype == c0.dtype:
        raise RuntimeError(f"scan(): u and c0 must have f's dtype {f.dtype}, got {u.dtype} and {c0.dtype}")
    return only_torch(f.dtype)


def _save_scan(ctx: Any, args: Any, out: Tensor) -> None:
    f, _, c0, ctx.reverse = args
    ctx.save_for_backward(f, c0, out)


def _scan_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient is a scan, too, from the other end: g_t = grad_t + f_{t+1} g_{t+1}."""
    f, c0, c = ctx.saved_tensors
    first = slice(0, 1) if not ctx.reverse else slice(-1, None)
    last = f.new_zeros(1, *f.shape[1:])
    if ctx.reverse:
        after, before = torch.cat([last, f[:-1]]), torch.cat([c[1:], c0.unsqueeze(0)])
    else:
        after, before = torch.cat([f[1:], last]), torch.cat([c0.unsqueeze(0), c[:-1]])
    g = scan.call(after, grad, torch.zeros_like(c0), not ctx.reverse, ctx.backend)
    return g * before, g, (f[first] * g[first]).squeeze(0), None


scan: Operator = Operator(
    "scan(Tensor f, Tensor u, Tensor c0, bool reverse) -> Tensor",
    "rnn",
    check=_check_scan,
    allocate=lambda plan, f, u, c0, reverse: f.new_empty(f.shape),
    torch=reference.scan,
    save=_save_scan,
    backward=_scan_backward,
    autocast="lower",
)
"""c_t = f_t · c_{t-1} + u_t from c0 on (``reverse``: from the last to the first): f, u (T, …), c0 (…) → (T, …)."""
