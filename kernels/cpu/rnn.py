"""Recurrent layers on the CPU: where their operands lie, and how the units are cut among threads. One call, one direction of
one layer; a cell is a layer with one step. What happens in the two kernels is told in ``rnn_code``.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from operator import call
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _get_deterministic_algorithms

from .engine import packed, threads
from .engine.build import Kernel, made_by
from .engine.host import simd
from .engine.workspace import workspace
from .matmul import matmul

empty = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]  # half of what torch.empty takes

MODES = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}
_GATES = (4, 3, 1, 1)
_KEPT = (5, 4, 0, 0)  # numbers a unit that the backward needs besides the output
_ROUNDING = {torch.bfloat16: 1, torch.float16: 2}
_VECS = 3  # of a panel, as rnn_code's
_CHUNK = 64  # rows whose input product is made ahead of the steps
_FEW = 32 << 10  # bytes of a scan below which a second thread costs more than it brings
_NEAR = 256 << 10  # bytes of a layer's weights that stay near a core; layers of more are not run side by side …
_CHAINED = 1 << 20  # … nor of more multiplications a step: two threads share those without loss
_MOST = 4 << 20  # bytes between such layers
_SERIAL = 1 << 16  # multiplications of a step below which a second thread costs more than it brings


def _kernel(kind: str, name: str, signature: str) -> Kernel:
    return Kernel(f"{kind}_{name}", signature, made_by("rnn_code", kind, name))


_NAMES = {torch.float32: "float32", torch.float64: "float64"}
_FORWARD = {d: _kernel("recurrent", name, "i" * 15 + ">i") for d, name in _NAMES.items()}
_BACKWARD = {d: _kernel("recurrent_backward", name, "i" * 31) for d, name in _NAMES.items()}


def _wide(t: Any) -> Any:
    """16-bit numbers in float32: what the kernels compute with."""
    return t.float() if t is not None and t.itemsize == 2 else t


def _steps(rows: int, batch: int, batch_sizes: Tensor | None) -> tuple[int, Tensor | None]:
    """(steps, where each starts, if they differ)"""
    if batch_sizes is None:
        return rows // batch, None
    starts = torch.zeros(len(batch_sizes) + 1, dtype=torch.int64)
    torch.cumsum(batch_sizes, 0, out=starts[1:])
    return len(batch_sizes), starts


@cache
def _cut(units: int, size: int, nt: int) -> tuple[int, int]:
    """(panels of the units, bytes of one row of their vectors)"""
    vectors = -(-units * size // simd().width)
    return min(vectors, -(-max(1, -(-vectors // _VECS)) // nt) * nt), vectors * simd().width


def _places(*sizes: int) -> list[int]:
    """Where so many bytes each begin in one piece of memory, and where the last ends"""
    ends = list(accumulate(-(-size // 64) * 64 for size in sizes))
    return [0, *ends]


def _counters(nt: int) -> int:
    """Bytes of what threads count on: the barriers, and twice each thread's panels, a cache line each"""
    return 64 * (1 + 2 * nt)


class Plan(NamedTuple):
    """How a layer of some shape is cut and where its parts lie in scratch memory."""

    threads: int
    cuts: tuple[int, int, int]  # panels of w_ih, w_hh, w_hr
    sizes: tuple[int, int, int]  # bytes of their packings
    places: list[int]  # packings (3), state, hidden, sums, xs, bias, counter, end


@lru_cache(1024)
def _plan(mode: int, size: int, batch: int, inputs: int, units: int, out: int, projected: bool, nt: int) -> Plan:
    gates, slots = _GATES[mode], 4 if mode < 2 else 1
    (cut, width), (cut_p, width_p) = _cut(units, size, nt), _cut(out, size, nt) if projected else (0, 0)
    sizes = (width * gates * inputs, width * gates * out, width_p * units)
    places = _places(*sizes, 2 * batch * out * size, batch * units * size if projected else 0, width_p * batch,
                     width * slots * max(batch, _CHUNK), width * slots, _counters(nt))
    few = batch * gates * units * (inputs + out) < _SERIAL
    return Plan(1 if few else nt, (cut, cut, cut_p), sizes, places)


class Job(NamedTuple):
    """One direction of one layer, as the forward kernel reads it, in this order: sizes, bytes, addresses."""

    mode: int
    rounding: int = 0
    batch: int = 1
    reverse: int = 0
    inputs: int = 0
    units: int = 0
    out: int = 0
    cut: int = 0  # panels of the units, and of what a projection makes
    cut_p: int = 0
    fresh: int = 0  # bits: which weights are packed for this call only
    chunk: int = _CHUNK
    x_row: int = 0
    w_ih: int = 0
    wi_n: int = 0
    wi_k: int = 0
    w_hh: int = 0
    wh_n: int = 0
    wh_k: int = 0
    w_hr: int = 0
    wp_n: int = 0
    wp_k: int = 0
    b_ih: int = 0
    b_hh: int = 0
    pi: int = 0  # packings
    ph: int = 0
    pp: int = 0
    y_row: int = 0
    h_at: int = 0  # of hx and h_n, cx and c_n, and y: where this job's part begins
    c_at: int = 0
    y_at: int = 0
    state: int = 0  # in scratch memory
    hidden: int = 0
    sums: int = 0
    xs: int = 0
    bias: int = 0
    counter: int = 0


def _words(job: Job, kept: Sequence[packed.Packing | None] = (None,) * 3) -> array[int]:
    """A job's record: itself, and by what the kernel sees that a packed weight is still what it was."""
    checks = (0,) * (4 * (3 - len(kept)))
    return array("q", (*job, *(n for k in kept for n in ((0,) * 4 if k is None else (*k.sampled, k.sample))), *checks))


def _keep(which: int, mode: int, weight: Tensor, plan: Plan, units: int, depth: int) -> packed.Packing | None:
    """The kept panels of a weight that has been seen before, unchanged. ``which``: 0, 1, 2 for w_ih, w_hh, w_hr."""
    if weight.is_inference() or not weight.is_contiguous():
        return None
    cut = plan.cuts[which]

    def pack(address: int) -> int:
        w = _wide(weight)
        inputs, u, out = ((depth, units, 0), (0, units, depth), (0, depth, units))[which]
        address_and_strides = [w.data_ptr(), w.stride(0) * w.itemsize, w.stride(1) * w.itemsize]
        names = (("w_ih", "wi_n", "wi_k", "pi"), ("w_hh", "wh_n", "wh_k", "ph"), ("w_hr", "wp_n", "wp_k", "pp"))[which]
        job = _words(Job(mode, inputs=inputs, units=u, out=out, cut=cut, cut_p=cut if which == 2 else 0, fresh=1 << which)
                     ._replace(**dict(zip(names, (*address_and_strides, address), strict=True))))
        _FORWARD[w.dtype].run(plan.threads, 1, job.buffer_info()[0], *[0] * 9, workspace(_counters(plan.threads)), 0, 0)
        return cut
    entry = packed.get(weight, plan.sizes[which], pack, _KINDS[mode][which])
    return entry if entry is not None and entry.cut == cut else None


_KINDS = [[f"rnn{which}.{mode}" for which in range(3)] for mode in range(4)]


def recurrent(out: Sequence[Tensor], input: Tensor, hx: Tensor, cx: Tensor | None, w_ih: Tensor, w_hh: Tensor,
              b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None, batch_sizes: Tensor | None, mode: str,
              reverse: bool, keep: bool) -> None:
    """out = (the states of all rows, the last state, the last cell, what the backward needs); see ops/rnn.py for the shapes."""
    y, h_n, c_n, reserve = out
    rounding = _ROUNDING.get(input.dtype, 0)
    if rounding:
        tensors = [_wide(t) for t in (input, hx, cx, w_ih, w_hh, b_ih, b_hh, w_hr)]
        results = [_wide(t) for t in (y, h_n, c_n)]
        _run(rounding, (w_ih, w_hh, w_hr), results, reserve, tensors, batch_sizes, MODES[mode], reverse, keep)
        for to, value in zip((y, h_n, c_n), results, strict=True):
            to.copy_(value)
    else:
        _run(0, (w_ih, w_hh, w_hr), (y, h_n, c_n), reserve, (input, hx, cx, w_ih, w_hh, b_ih, b_hh, w_hr), batch_sizes,
             MODES[mode], reverse, keep)


def _run(rounding: int, keys: Sequence[Any], results: Sequence[Any], reserve: Tensor, tensors: Sequence[Any],
         batch_sizes: Tensor | None, mode: int, reverse: bool, training: bool) -> None:
    """The forward in float32 or float64; ``keys``: the weights as the caller has them, by which packings are kept."""
    x, hx, cx, w_ih, w_hh, b_ih, b_hh, w_hr = tensors
    y, h_n, c_n = results
    rows, inputs = x.shape
    batch, out = hx.shape
    if rows == 0 or batch == 0:
        return
    dtype = x.dtype
    size, (gate_units, _) = dtype.itemsize, w_hh.shape
    units = gate_units // _GATES[mode]
    steps, table = _steps(rows, batch, batch_sizes)
    x_row, x_col = x.stride()
    if x_col != 1 and inputs > 1:
        x, x_row = x.contiguous(), inputs
    hx = hx.contiguous()
    if cx is not None:
        cx = cx.contiguous()
    if b_ih is not None:
        b_ih, b_hh = b_ih.contiguous(), b_hh.contiguous()
    plan = _plan(mode, size, batch, inputs, units, out, w_hr is not None, threads.count())
    kept: list[packed.Packing | None] = [None] * 3
    if not training:  # else the weights will have changed when they are seen again
        kept[:2] = _keep(0, mode, keys[0], plan, units, inputs), _keep(1, mode, keys[1], plan, units, out)
    fresh = (kept[0] is None) + 2 * (kept[1] is None)
    w_p, wp_n, wp_k = 0, 0, 0
    if w_hr is not None:
        kept[2] = None if training else _keep(2, mode, keys[2], plan, out, units)
        fresh += 4 * (kept[2] is None)
        w_p, wp_n, wp_k = w_hr.data_ptr(), w_hr.stride(0) * size, w_hr.stride(1) * size
    room = workspace(plan.places[-1])
    (wi_n, wi_k), (wh_n, wh_k) = w_ih.stride(), w_hh.stride()
    job = _words(Job._make((
        mode, rounding, batch, reverse, inputs, units, out, plan.cuts[0], plan.cuts[2], fresh, _CHUNK, x_row * size,
        w_ih.data_ptr(), wi_n * size, wi_k * size, w_hh.data_ptr(), wh_n * size, wh_k * size, w_p, wp_n, wp_k,
        0 if b_ih is None else b_ih.data_ptr(), 0 if b_hh is None else b_hh.data_ptr(),
        *(room + place if k is None else k.address for k, place in zip(kept, plan.places, strict=False)), out * size, 0, 0, 0,
        *plan.places[3:-1])))
    _FORWARD[dtype].run(
        plan.threads, 1, job.buffer_info()[0], steps, 0 if table is None else table.data_ptr(), x.data_ptr(), hx.data_ptr(),
        0 if cx is None else cx.data_ptr(), y.data_ptr(), h_n.data_ptr(), c_n.data_ptr(),
        reserve.data_ptr() if reserve.numel() else 0, room, 0, 0)


_address, _version = Tensor.data_ptr, Tensor._version.__get__  # type: ignore[attr-defined]


class Stack:
    """Layers, or a cell, whose weights are packed, made ready for inputs and states of one kind: a call is a look at each weight,
    an allocation a result and a kernel call a layer. ``ready`` is False where the usual way has to be gone.
    """

    def __init__(self, mode: int, cell: bool, directions: int, x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor]):
        self.ready, self.cell, self.dtype, self.threads = False, cell, x.dtype, threads.count()
        size, (batch, inputs), units = x.itemsize, x.shape[-2:], states[0].shape[-1]
        each = len(params) // (1 if cell else states[0].shape[0])  # of a layer and direction
        weights = [p for k in range(0, len(params), each) for p in params[k : k + 2]]
        found = [packed.find(w, _KINDS[mode][k % 2]) for k, w in enumerate(weights)]
        self.kept = [weakref.ref(k) for k in found if k is not None]  # the store may drop them
        self.versions, self.addresses = list(map(_version, params)), list(map(_address, params))
        self.directions, self.room, self.run = directions, 0, _FORWARD[x.dtype].load()
        x_row, layers = x.stride(-2 if cell or batch > 1 else 0), len(found) // 2 // directions
        work = batch * _GATES[mode] * units * (units + min(inputs, directions * units))  # of the least step
        # Directions run side by side, a thread for each; where one thread would do for a step, if there are enough steps. So do
        # small layers, each some steps behind the one below it.
        small = work < _CHAINED and _GATES[mode] * units * (units + max(inputs, units)) * size <= _NEAR
        together = self.threads if directions == 1 < self.threads <= layers and small else 1
        self.enough, self.between = max(-(-_SERIAL // work), 16 * (together > 1)), together - 1
        self.jobs, each_threads = array("q"), []  # the records, layer by layer
        for layer in range(layers):
            if layer % together == 0:
                end = 0  # in scratch memory
            for d in range(directions):
                k = layer * directions + d
                plan = _plan(mode, size, batch, inputs, units, units, False, self.threads)
                kept, at = found[2 * k : 2 * k + 2], k * batch * units * size
                biases = self.addresses[k * each + 2 : (k + 1) * each] or (0, 0)
                if not all(p is not None and p.cut == plan.cuts[0] for p in kept):
                    return
                self.jobs += _words(Job._make((
                    mode, 0, batch, d, inputs, units, units, plan.cuts[0], 0, 0, _CHUNK, x_row * size, *(0,) * 9, *biases,
                    *(p.address for p in kept if p is not None), 0, directions * units * size, at, at, d * units * size,
                    *(end + place for place in plan.places[3:-1]))), kept)
                end += plan.places[-1]
            self.room = max(self.room, end)
            each_threads.append(plan.threads)
            inputs = x_row = directions * units
        first, record = self.jobs.buffer_info()[0], len(self.jobs) * 8 // layers
        # Threads, jobs, whether these are layers, and where their records are; for few steps and for many
        self.few = [(nt, directions, False, first + n * record) for n, nt in enumerate(each_threads)]
        side = min(self.threads, directions)
        whole = layers // together * together if together > 1 else 0
        self.many = [(self.threads, together, True, first + n * record) for n in range(0, whole, together)]
        self.many += [(max(nt, side), jobs, False, at) for nt, jobs, _, at in self.few[whole:]]
        self.shape, self.batch, self.width = tuple(states[0].shape), batch, directions * units
        self.strides = states[0].stride()
        self.ready = True

    def __call__(self, x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor]) -> Any:
        """The output of the layers and their last states, or the cell's state or states; None: go the usual way."""
        kept = list(map(call, self.kept))  # and so their memory stays
        if (None in kept or list(map(_address, params)) != self.addresses or list(map(_version, params)) != self.versions
                or threads.count() != self.threads):
            return None
        new, shape, strides, dtype = _filled if _get_deterministic_algorithms() else empty, self.shape, self.strides, self.dtype
        room = workspace(self.room)
        first, h, c, c_n = new(shape, strides, dtype), states[0].data_ptr(), 0, 0
        h_n = first.data_ptr()
        last: Any = first
        if len(states) == 2:
            second = new(shape, strides, dtype)
            c, c_n, last = states[1].data_ptr(), second.data_ptr(), (first, second)
        if self.cell:
            nt, _, _, words = self.few[0]
            return None if self.run(nt, 1, words, 1, 0, x.data_ptr(), h, c, h_n, h_n, c_n, 0, room, 0, 0) else last
        steps, width = x.shape[0], self.width
        if not steps:
            return None
        layer = steps * self.batch * width * x.itemsize
        many = steps >= self.enough and self.between * layer <= _MOST
        if many and self.between:
            room = workspace(self.room + self.between * layer)
        for nt, jobs, chained, words in self.many if many else self.few:
            y = new((steps, self.batch, width), (self.batch * width, width, 1), dtype)
            between = room + self.room if chained else 0
            if self.run(nt, jobs, words, steps, 0, x.data_ptr(), h, c, y.data_ptr(), h_n, c_n, 0, room, between, layer):
                return None
            x = y
        return (x, *last) if c else (x, last)


def _filled(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """With deterministic algorithms, torch's own functions fill what they allocate."""
    return torch.empty(shape, dtype=dtype)


def prepare(mode: str, cell: bool, directions: int, x: Tensor, states: Sequence[Tensor],
            params: Sequence[Tensor]) -> Stack | None:
    """A stack for calls like this one; None where there is none: for 16-bit numbers, projections, rows that are not next to
    each other, weights that are not kept."""
    batch = x.shape[-2]
    rows = x.dim() == 2 or batch == 1 or x.stride(0) == batch * x.stride(1)
    each = len(params) // (1 if cell else states[0].shape[0])
    if (x.dtype not in _FORWARD or not x.numel() or not rows or (x.stride(-1) != 1 and x.shape[-1] > 1) or each not in (2, 4)
            or not all(t.is_contiguous() for t in (*states, *params)) or any(p.is_inference() for p in params)):
        return None
    stack = Stack(MODES[mode], cell, directions, x, states, params)
    return stack if stack.ready else None


recurrent.prepare = prepare  # type: ignore[attr-defined]


def _before(hx: Tensor, y: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """The state that each row's step started from."""
    batch = hx.shape[0]
    if batch_sizes is None:
        return torch.cat([y[batch:], hx] if reverse else [hx, y[:-batch]])
    sizes, n = batch_sizes, y.shape[0]
    step = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    starts = torch.cumsum(sizes, 0) - sizes
    row = torch.arange(n) - starts[step]
    near = step + (1 if reverse else -1)
    inside = (near >= 0) & (near < len(sizes))
    near = near.clamp(0, len(sizes) - 1)
    inside &= row < sizes[near]
    return torch.cat([y, hx]).index_select(0, torch.where(inside, starts[near] + row, n + row))


def _product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left right; out may have 16 bits, and any strides"""
    whole = out if out.dtype == left.dtype and out.is_contiguous() else left.new_empty(out.shape)
    matmul(whole, left, right)
    if whole is not out:
        out.copy_(whole)


def recurrent_backward(out: Sequence[Tensor], grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, input: Tensor, hx: Tensor,
                       cx: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
                       w_hr: Tensor | None, y: Tensor, reserve: Tensor, batch_sizes: Tensor | None, mode: str, reverse: bool,
                       needs: Sequence[bool]) -> None:
    """out = the gradients of input, hx, cx, w_ih, w_hh, b_ih, b_hh, w_hr; those that ``needs`` leaves out are empty."""
    d_input, d_hx, d_cx, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr = out
    if input.shape[0] == 0:
        for t in out:
            t.zero_()
        return
    if not reserve.numel() and _KEPT[MODES[mode]]:  # the gates were not kept: they are made again
        units = w_hh.shape[0] // _GATES[MODES[mode]]
        wide = torch.promote_types(input.dtype, torch.float32)
        reserve = input.new_empty(input.shape[0], _KEPT[MODES[mode]] * units, dtype=wide)
        again = (torch.empty_like(y), torch.empty_like(hx), hx.new_empty(0) if cx is None else torch.empty_like(cx), reserve)
        recurrent(again, input, hx, cx, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, mode, reverse, True)
    x, h0, c0, wi, wh, wr, y, grad_y, grad_h, grad_c = (
        _wide(t) for t in (input, hx, cx, w_ih, w_hh, w_hr, y, grad_y, grad_h, grad_c))
    gates_x, gates_h, dh, dc, d_out, hidden = _steps_back(grad_y, grad_h, grad_c, h0, c0, wh, wr, y, reserve, batch_sizes,
                                                          MODES[mode], reverse)
    if needs[0]:
        _product(d_input, gates_x, wi)
    if needs[1]:
        d_hx.copy_(dh)
    if needs[2]:
        d_cx.copy_(dc)
    if needs[3]:
        _product(d_w_ih, gates_x.t(), x)
    if needs[4]:
        _product(d_w_hh, gates_h.t(), _before(h0, y, batch_sizes, reverse))
    if needs[5]:
        d_b_ih.copy_(gates_x.sum(0))
    if needs[6]:
        d_b_hh.copy_(d_b_ih if gates_h is gates_x and needs[5] else gates_h.sum(0))
    if needs[7]:
        _product(d_w_hr, d_out.t(), hidden)


def _steps_back(grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, hx: Tensor, cx: Tensor | None, w_hh: Tensor, w_hr: Tensor | None,
                y: Tensor, reserve: Tensor, batch_sizes: Tensor | None, mode: int, reverse: bool) -> tuple[Tensor, ...]:
    """The gradients of the gates on the input's side and on the state's, of both first states, and for a projection of
    what it makes and what it is made of."""
    dtype, size, gates = y.dtype, y.itemsize, _GATES[mode]
    (rows, n_out), batch = y.shape, hx.shape[0]
    units = w_hh.shape[0] // gates
    steps, table = _steps(rows, batch, batch_sizes)
    grad_y, hx, y = grad_y.contiguous(), hx.contiguous(), y.contiguous()
    dh = grad_h.clone(memory_format=torch.contiguous_format)
    dc = grad_c.clone(memory_format=torch.contiguous_format)
    if cx is not None:
        cx = cx.contiguous()
    gates_h = y.new_empty(rows, gates * units)
    gates_x = torch.empty_like(gates_h) if mode == 1 else gates_h
    d_out, hidden = (y.new_empty(rows, n) if w_hr is not None else y.new_empty(0) for n in (n_out, units))
    nt = 1 if batch * gates * units * n_out < _SERIAL else threads.count()
    cut, width = _cut(units, size, nt)
    cut_p, width_p = (0, width) if w_hr is None else _cut(n_out, size, nt)
    places = _places(width_p * gates * units, width * n_out if cut_p else 0, max(width, width_p) * batch, _counters(nt))
    room = workspace(places[-1])
    _BACKWARD[dtype].run(
        nt, mode, steps, batch, 0 if table is None else table.data_ptr(), int(reverse), units, n_out, cut, cut_p,
        hx.data_ptr(), 0 if cx is None else cx.data_ptr(), w_hh.data_ptr(), w_hh.stride(1) * size, w_hh.stride(0) * size,
        *((w_hr.data_ptr(), w_hr.stride(1) * size, w_hr.stride(0) * size) if w_hr is not None else (0, 0, 0)),
        *(room + place for place in places[:2]), y.data_ptr(), reserve.data_ptr(), grad_y.data_ptr(), dh.data_ptr(),
        dc.data_ptr(), gates_x.data_ptr(), gates_h.data_ptr(), d_out.data_ptr(), hidden.data_ptr(),
        *(room + place for place in places[2:-1]))
    return gates_x, gates_h, dh, dc, d_out, hidden


_SCAN = {d: _kernel("scan", str(d).removeprefix("torch."), "i" * 10) for d in (*_NAMES, *_ROUNDING)}


def scan(out: Tensor, f: Tensor, u: Tensor, c0: Tensor, reverse: bool) -> None:
    """out_t = f_t · out_{t-1} + u_t, the first from c0"""
    if not out.numel():
        return
    steps, n = out.shape[0], c0.numel()
    f, u, c0 = f.contiguous(), u.contiguous(), c0.contiguous()
    step = n * out.itemsize
    last, stride = (steps - 1) * step if reverse else 0, -step if reverse else step
    _SCAN[out.dtype].run(1 if out.nbytes < _FEW else threads.count(), steps, n, f.data_ptr() + last, stride,
                         u.data_ptr() + last, stride, c0.data_ptr(), out.data_ptr() + last, stride)


KERNELS: dict[str, Callable[..., None]] = {
    "recurrent": recurrent, "recurrent_backward": recurrent_backward, "scan": scan,
}
