"""Recurrent layers on NVIDIA GPUs: how they are cut among launches and blocks, and what is left to matrix products. What happens
in the kernels is told in ``rnn.cu``; what a step costs in docs/gpu-rnn.md.

The input's product of a launch's first layer is one matrix product beforehand, the weights' gradients are products afterwards.
A layer that does not fit on the chip, or finds no CuPy, goes step by step (``rnn_steps.py``) where the GPU's kernels were asked
for by name; else torch's library serves it, which is taken to be faster at that: nobody has measured it yet. Layers of 16 bits
have a forward of their own (``rnn_half.py``) where that is taken to be faster; else they are widened, and results rounded once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnn.kernels.cpu.engine import overhead
from fastnn.kernels.reference.rnn import GATES, KEPT, unpack

from .engine import cuda

KINDS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat_t", torch.float16: "half_t"}
WARPS = {1: 12, 2: 12, 4: 12, 8: 8}  # of a block at most, by the columns over 128 that a warp's registers hold; Most in rnn.cu
SPLIT = 4  # and where shared memory holds the rest of the columns
ROWS, FULL, FEW, JOBS = 4, 8, 2, 12  # as in rnn.cu
APART = 32  # ints between counters
STEP, SIMT = 40_000, 25_800  # cycles of a step by itself, two launches from Python; operations a cycle of its product in float32
WAITS = 2400  # cycles of a step, about: for L2, and from a block's last store to the others' sight of it


def _instances() -> list[str]:
    """All kernels that a call may ask for."""
    found = [
        _instance(name, kind, kv, stacked, more)
        for name in ("forward", "backward")
        for kind in ("LSTM", "GRU", "RNN")
        for kv in WARPS
        for stacked in (False, True)[: min(kv, 2)]
        for more in (False, True)[: 1 + (kv == SPLIT)]
    ]
    return found + [f"scan<{name}>" for name in TYPES.values()]


def _instance(name: str, kind: str, kv: int, stacked: bool, more: bool) -> str:
    return f"{name}<{kind}, {kv}{', true' if stacked else ', false' if more else ''}{', true' if more else ''}>"


SOURCE = cuda.Source("rnn", _instances)


class Cut(NamedTuple):
    """How the jobs of a launch lie on the device."""

    work: int  # of a scheduler in a step, about, in multiplications of a row with 128 columns: 17 instructions
    kv: int  # 128 · kv columns are in a warp's registers, half of them for the layer below where there is one
    warps: int  # of a block
    blocks: int  # of a job and group
    groups: int  # of the batch
    share: int  # rows of a group
    parts: int  # warps that share the columns of a backward
    staged: int  # rows of the batch in shared memory at once
    shared: int  # bytes
    more: int = 0  # 128 · more columns of weights are in shared memory


def _held(back: bool, stacked: bool, depth: int) -> Iterator[tuple[int, int, int]]:
    """kv, more and parts: where so many times 128 columns of weights may be"""
    for kv in WARPS:
        if kv > stacked and (back or depth <= kv // (1 + stacked)):
            yield kv, 0, -(-depth // (kv // (1 + stacked)))
    for parts in range(1, WARPS[SPLIT] + 1 if back else 2):
        more = -(-depth // parts) - SPLIT // (1 + stacked)
        if more > 0:
            yield SPLIT, more, parts


@lru_cache(1024)
def cut(kind: str, back: bool, has: cuda.Limits, jobs: int, batch: int, units: int, stacked: bool) -> Cut | str:
    """The cut with the least work, or why there is none; stacked: the jobs are layers on layers."""
    if jobs > min(JOBS, has.multiprocessors):
        return f"{jobs} layers and directions are more than run side by side here ({min(JOBS, has.multiprocessors)})"
    found = []
    rows = -(-units // ROWS) if back or kind == "RNN" else units  # quadruples of columns, or warps
    held = 3 if kind == "GRU" and not back else ROWS  # of a matrix
    for kv, more, parts in _held(back, stacked, -(-units * (GATES.get(kind.lower(), 1) if back else 1) // 128)):
        columns = kv + more * (1 + stacked)  # over 128, of all of a warp's weights
        for groups in range(1, -(-batch // ROWS) + 1):
            each = -(-rows // max(has.multiprocessors // (jobs * groups), 1))
            warps = parts * max(each, -(-4 // parts))  # at least four: one for each scheduler
            blocks, share = -(-rows // (warps // parts)), -(-batch // groups)
            if warps > WARPS[kv] or jobs * groups * blocks > has.multiprocessors:
                break
            width = 128 * columns * parts // (1 + stacked if back else 1)  # of a row in shared memory; beside it stay there:
            own = (parts + 2) * ROWS * (warps // parts) if back else warps
            weights = 128 * warps * held * more * (1 + stacked)
            room = max(has.shared // 4 - weights - own * share, 0) // width
            staged = share if share <= room else room // FULL * FULL or room
            if staged > 0:
                # Products (weights from shared memory are read as rows of the batch are), the sums' way over the lanes to new
                # states, which a warp alone is no faster at than two, and staging, which waits for L2.
                turns, rounds = -(-warps // 4), -(-share // staged)
                passes = max(-(-max(share - FEW, 1) // FULL), rounds)
                tails = 16 * passes + 8 * (share > FULL * passes)
                work = turns * (share * columns + passes * ROWS * (columns - kv)) + max(turns, 2) * tails
                work += share * columns // 2 + 40 * (rounds - 1)
                shared = 4 * (weights + staged * width + own * share)
                found.append(Cut(work, kv, warps, blocks, groups, share, parts, staged, shared, more))
    if found:
        return min(found, key=lambda how: (how.work, how.more, how))
    what = f"{jobs} × {units} units" + f" with a batch of {batch}"
    return f"the weights of {what} do not fit in {has.multiprocessors} multiprocessors"


@lru_cache(1024)
def plan(mode: str, back: bool, has: cuda.Limits, layers: int, directions: int, batch: int, units: int) -> tuple[int, Cut] | str:
    """How many jobs each launch has, and their cut, of those that fit the one that takes least; or why a single one does not fit.

    Layers of one direction run one step behind each other. A layer above both directions needs the last step of either, so that
    each layer has launches of its own.
    """
    sizes = dict.fromkeys(-(-layers // n) for n in range(1, layers + 1)) if directions == 1 else (2, 1)
    cuts = [(n, cut(KINDS[mode], back, has, n, batch, units, directions == 1 and n > 1)) for n in sizes]
    found = [(n, how) for n, how in cuts if isinstance(how, Cut)]
    return min(found, key=lambda each: cycles(each[0], each[1], layers * directions)) if found else str(cuts[-1][1])


def cycles(at_once: int, how: Cut, jobs: int) -> int:
    """Of a step of all jobs, about: launches one after the other, and in each what a step waits for"""
    return -(-jobs // at_once) * (17 * how.work + WAITS)


class Job(NamedTuple):
    """One direction of one layer, in the order of Job in rnn.cu. 0: there is none."""

    below: Tensor | int = 0
    w_ih: Tensor | int = 0
    w_hh: Tensor | int = 0
    b_ih: Tensor | int = 0
    b_hh: Tensor | int = 0
    gates_in: Tensor | int = 0
    h0: Tensor | int = 0
    c0: Tensor | int = 0
    y: Tensor | int = 0
    h_n: Tensor | int = 0
    c_n: Tensor | int = 0
    kept: Tensor | int = 0
    done: Tensor | int = 0
    wait: Tensor | int = 0
    reverse: int = 0
    y_stride: int = 0
    y_at: int = 0
    grad_y: Tensor | int = 0
    grad_h: Tensor | int = 0
    grad_c: Tensor | int = 0
    gates_x: Tensor | int = 0
    gates_h: Tensor | int = 0
    d_below: Tensor | int = 0
    d_h0: Tensor | int = 0
    d_c0: Tensor | int = 0
    grad_stride: int = 0
    grad_at: int = 0
    above: Tensor | int = 0


def or_0(t: Tensor | None) -> Tensor | int:
    return 0 if t is None else t


class Stack(NamedTuple):
    """What a call is about: layers in directions, over rows that are steps one after the other."""

    mode: str
    rows: int
    batch: int
    units: int
    layers: int
    directions: int
    reversed: tuple[bool, ...]  # of each direction
    batch_sizes: Tensor | None
    kind: torch.dtype  # of the caller's numbers


Parameters = Sequence[Tensor | None]  # w_ih, w_hh, b_ih, b_hh of one job


def launch_jobs(source: cuda.Source, expression: str, s: Stack, device: torch.device, how: Cut, jobs: Sequence[Job],
                vectors: bool) -> None:  # fmt: skip
    """vectors: whether 16 bytes may be read at once"""
    steps = s.rows // s.batch if s.batch_sizes is None else len(s.batch_sizes)
    starts: Tensor | int = 0
    if s.batch_sizes is not None:
        starts = torch.cat([s.batch_sizes.new_zeros(1), s.batch_sizes.cumsum(0)]).to(device)
    words = [starts, steps, s.batch, s.units, int(s.mode == "rnn_relu"), how.blocks, how.groups, how.share, how.staged, how.parts,
             int(vectors), how.more]  # fmt: skip
    for job in jobs:
        words += job
    words += [0] * (len(Job._fields) * (JOBS - len(jobs)))
    grid, block = len(jobs) * how.groups * how.blocks, 32 * how.warps
    if grid > source.resident(expression, device, block, how.shared):
        raise RuntimeError(f"recurrent(): {grid} blocks of {expression} do not fit on {device} at once; use backend='torch'")
    source.launch(expression, device, grid, block, words, how.shared, cooperative=True)


def _launch(name: str, s: Stack, device: torch.device, how: Cut, stacked: bool, jobs: Sequence[Job]) -> None:
    launch_jobs(SOURCE, _instance(name, KINDS[s.mode], how.kv, stacked, how.more > 0), s, device, how, jobs, s.units % 4 == 0)


def counters(device: torch.device, jobs: int, how: Cut) -> Tensor:
    return torch.zeros(jobs, how.groups * APART, dtype=torch.int32, device=device)


def joint_bias(s: Stack, p: Parameters) -> Tensor | None:
    """What is added to the input's product: both biases, but that of the GRU's state's part of n; in float32"""
    _, _, b_ih, b_hh = p
    if b_ih is None or b_hh is None:
        return None
    bias = b_ih.float() + b_hh.float()
    if s.mode == "gru":
        bias[2 * s.units :] = b_ih[2 * s.units :]
    return bias


def _input_product(s: Stack, input: Tensor, p: Parameters) -> Tensor:
    """The input's part of all gates of all steps, with the biases, but that of the GRU's state's part of n."""
    w_ih, bias = p[0], joint_bias(s, p)
    assert w_ih is not None
    return input @ w_ih.t() if bias is None else torch.addmm(bias, input, w_ih.t())


def forward(s: Stack, input: Tensor, hx: Tensor, cx: Tensor | None, params: Sequence[Parameters], ys: Sequence[Tensor],
            h_n: Tensor, c_n: Tensor | None, kept: Tensor | None) -> None:
    """All layers. hx, cx, h_n, c_n (L·D, B, H); ys (L, rows, D·H); kept (L·D, rows, 5·H or 4·H); all float32 and dense."""
    found = _planned(s, input.device, False)
    if isinstance(found, str):
        _forward_steps(s, input, hx, cx, params, ys, h_n, c_n, kept)
        return
    at_once, how = found
    if hx.data_ptr() % 16:  # what the kernels read 16 bytes at a time; all else here is theirs
        hx = hx.clone()
    done = counters(input.device, len(params), how)
    for start in range(0, len(params), at_once):
        jobs = []
        for k, p in enumerate(params[start : start + at_once], start):
            layer = k // s.directions
            job = Job(w_ih=or_0(p[0]), w_hh=or_0(p[1]), b_ih=or_0(p[2]), b_hh=or_0(p[3]), h0=hx[k],
                      c0=0 if cx is None else cx[k], y=ys[layer], h_n=h_n[k], c_n=0 if c_n is None else c_n[k],
                      kept=0 if kept is None else kept[k], done=done[k], reverse=int(s.reversed[k % s.directions]),
                      y_stride=s.directions * s.units, y_at=k % s.directions * s.units)  # fmt: skip
            if s.directions == 1 and k > start:
                jobs.append(job._replace(below=ys[layer - 1], wait=done[k - 1]))
            else:
                jobs.append(job._replace(gates_in=_input_product(s, ys[layer - 1] if layer else input, p)))
        _launch("forward", s, input.device, how, s.directions == 1 and at_once > 1, jobs)


def _columns(s: Stack, k: int) -> slice:
    """A job's own in its layer's output"""
    at = k % s.directions * s.units
    return slice(at, at + s.units)


def _forward_steps(s: Stack, input: Tensor, hx: Tensor, cx: Tensor | None, params: Sequence[Parameters], ys: Sequence[Tensor],
                   h_n: Tensor, c_n: Tensor | None, kept: Tensor | None) -> None:
    """The same, one job after the other, step by step"""
    from . import rnn_steps

    h_n.copy_(hx)
    if cx is not None and c_n is not None:
        c_n.copy_(cx)
    for k, p in enumerate(params):
        layer, reverse = k // s.directions, s.reversed[k % s.directions]
        x = _input_product(s, ys[layer - 1] if layer else input, p)
        bias = p[3][2 * s.units :] if s.mode == "gru" and p[3] is not None else None
        assert p[1] is not None
        rnn_steps.forward(s.mode, x, p[1], bias, s.batch_sizes, reverse, ys[layer][:, _columns(s, k)], h_n[k],
                          None if c_n is None or cx is None else c_n[k], None if kept is None else kept[k])  # fmt: skip


def _backward_steps(s: Stack, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor | None, hx: Tensor, cx: Tensor | None,
                    params: Sequence[Parameters], ys: Sequence[Tensor], kept: Tensor | None, gates_x: Tensor, gates_h: Tensor,
                    d_hx: Tensor, d_cx: Tensor | None) -> None:
    """gates_x, gates_h, d_hx and d_cx of all jobs, from the last layer to the first"""
    from . import rnn_steps

    d_hx.copy_(grad_h)
    if d_cx is not None and grad_c is not None:
        d_cx.copy_(grad_c)
    for layer in reversed(range(s.layers)):
        jobs = range(layer * s.directions, (layer + 1) * s.directions)
        for k in jobs:
            w_hh, reverse, y = params[k][1], s.reversed[k % s.directions], ys[layer][:, _columns(s, k)]
            cell = _before(s, cx[k], kept[k][:, 4 * s.units :], reverse) if cx is not None and kept is not None else None
            assert w_hh is not None
            rnn_steps.backward(s.mode, grad_y[:, _columns(s, k)], w_hh, s.batch_sizes, reverse, y,
                               None if kept is None else kept[k], _before(s, hx[k], y, reverse), cell, gates_x[k], gates_h[k],
                               d_hx[k], None if d_cx is None else d_cx[k])  # fmt: skip
        if layer:
            grad_y = _through(gates_x, params, jobs, s.kind)


def _product(a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
    """a @ b of float32 numbers; in tf32 where the layers' own have 16 bits, which it does not cut"""
    if kind == torch.float32 or importlib.util.find_spec("triton") is None:
        return a @ b
    from . import matmul
    from .engine import launch

    if launch.refuses(a) is not None:
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    matmul.multiply(out, a, b, how="tf32" if launch.chip(a.device).nvidia else "bf16x3")  # of AMD's chips few have tf32
    return out


def _through(gates_x: Tensor, params: Sequence[Parameters], jobs: Sequence[int], kind: torch.dtype) -> Tensor:
    """The gradient of what a layer's jobs were given"""
    parts = [_product(gates_x[k], w, kind) for k in jobs if (w := params[k][0]) is not None]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _before(s: Stack, h0: Tensor, y: Tensor, reverse: bool) -> Tensor:
    """The state that each row's step started from."""
    if s.batch_sizes is None:
        return torch.cat([y[s.batch :], h0] if reverse else [h0, y[: -s.batch]])
    sizes = s.batch_sizes
    step = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    starts = torch.cumsum(sizes, 0) - sizes
    row = torch.arange(s.rows) - starts[step]
    near = step + (1 if reverse else -1)
    inside = (near >= 0) & (near < len(sizes))
    near = near.clamp(0, len(sizes) - 1)
    inside &= row < sizes[near]
    return torch.cat([y, h0]).index_select(0, torch.where(inside, starts[near] + row, s.rows + row).to(y.device))


def _backward_at_once(s: Stack, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor | None, hx: Tensor, cx: Tensor | None,
                      params: Sequence[Parameters], ys: Sequence[Tensor], kept: Tensor | None, gates_x: Tensor, gates_h: Tensor,
                      d_hx: Tensor, d_cx: Tensor | None, at_once: int, how: Cut) -> None:  # fmt: skip
    """gates_x, gates_h, d_hx and d_cx of all jobs, by as few launches as there is room for"""
    d, wide = s.directions, s.directions * s.units
    done = counters(hx.device, len(params), how)
    for start in reversed(range(0, len(params), at_once)):
        chunk, jobs = range(start, min(start + at_once, len(params))), []
        between = hx.new_empty(len(chunk), s.rows, wide) if d == 1 else None  # what jobs make for the layer below
        for k in chunk:
            p, at = params[k], k % d * s.units
            job = Job(w_ih=or_0(p[0]), w_hh=or_0(p[1]), h0=hx[k], c0=0 if cx is None else cx[k], y=ys[k // d],
                      kept=0 if kept is None else kept[k], done=done[k], reverse=int(s.reversed[k % d]), y_stride=wide, y_at=at,
                      grad_stride=wide, grad_at=at, grad_y=grad_y, grad_h=grad_h[k], grad_c=0 if grad_c is None else grad_c[k],
                      gates_x=gates_x[k], gates_h=gates_h[k], d_h0=d_hx[k], d_c0=0 if d_cx is None else d_cx[k])  # fmt: skip
            if between is not None and k > start:
                job = job._replace(d_below=between[k - start])
            if between is not None and k + 1 in chunk:
                job = job._replace(grad_y=between[k + 1 - start], above=done[k + 1])
            jobs.append(job)
        _launch("backward", s, hx.device, how, d == 1 and at_once > 1, jobs)
        if start and start % d == 0:
            grad_y = _through(gates_x, params, range(start, start + d), s.kind)


def backward(s: Stack, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor | None, input: Tensor, hx: Tensor, cx: Tensor | None,
             params: Sequence[Parameters], ys: Sequence[Tensor], kept: Tensor | None, needs_input: bool,
             ) -> tuple[Tensor | None, Tensor, Tensor | None, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:  # fmt: skip
    """The gradients of input, hx, cx and each job's parameters (biases too), all float32."""
    d, gates = s.directions, GATES[s.mode] * s.units
    gates_x = input.new_empty(len(params), s.rows, gates)
    gates_h = torch.empty_like(gates_x) if s.mode == "gru" else gates_x
    d_hx, d_cx = torch.empty_like(hx), None if cx is None else torch.empty_like(cx)
    given = s, grad_y, grad_h, grad_c, hx, cx, params, ys, kept, gates_x, gates_h, d_hx, d_cx
    how = _planned(s, input.device, True)
    if isinstance(how, str):
        _backward_steps(*given)
    else:
        _backward_at_once(*given, *how)
    d_input, found = None, []
    for k, p in enumerate(params):
        layer, at = k // d, k % d * s.units
        below = ys[layer - 1] if layer else input
        state = _before(s, hx[k], ys[layer][:, at : at + s.units], s.reversed[k % d])
        d_bias = gates_x[k].sum(0)
        d_ih, d_hh = _product(gates_x[k].t(), below, s.kind), _product(gates_h[k].t(), state, s.kind)
        found.append((d_ih, d_hh, d_bias, d_bias if s.mode != "gru" else gates_h[k].sum(0)))
        if needs_input and layer == 0:
            assert p[0] is not None
            part = _product(gates_x[k], p[0], s.kind)
            d_input = part if d_input is None else d_input + part
    return d_input, d_hx, d_cx, found


def _wide(t: Any) -> Any:
    """Dense, in what the kernels compute with."""
    return None if t is None else t.float().contiguous()


def _one(mode: str, input: Tensor, hx: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Stack:
    return Stack(mode, input.shape[0], hx.shape[0], hx.shape[1], 1, 1, (reverse,), batch_sizes, input.dtype)


def _half(mode: str, input: Tensor, layers: int, directions: int, batch: int, units: int) -> tuple[int, Cut] | None:
    """How 16-bit numbers are multiplied as they are; None: they are widened, as layers are that run side by side."""
    if input.itemsize != 2 or cuda.refusal() is not None or importlib.util.find_spec("triton") is None:
        return None
    from . import rnn_half

    has, jobs = cuda.limits(input.device), layers * directions
    how, wide = rnn_half.plan(mode, has, directions, batch, units), plan(mode, False, has, layers, directions, batch, units)
    if isinstance(how, str) or (not isinstance(wide, str) and cycles(*wide, jobs) < cycles(*how, jobs)):
        return None
    return how


def _half_of(s: Stack, input: Tensor) -> tuple[int, Cut] | None:
    return _half(s.mode, input, s.layers, s.directions, s.batch, s.units)


def _any_forward(s: Stack, input: Tensor, hx: Tensor, cx: Tensor | None, params: Sequence[Parameters], ys: Sequence[Tensor],
                 h_n: Tensor, c_n: Tensor | None, kept: Tensor | None) -> None:
    """``forward`` of numbers of any width, into such numbers; kept: float32"""
    how = _half_of(s, input)
    kind = torch.float32 if how is None else input.dtype
    x, h0 = (t.to(kind).contiguous() for t in (input, hx))
    params = [tuple(None if t is None else t.to(kind).contiguous() for t in p) for p in params]
    results = [*ys, h_n, *(() if c_n is None else (c_n,))]
    kinds = [*[kind] * (len(ys) + 1), torch.float32]
    mine = [t if t.dtype == own else torch.empty_like(t, dtype=own) for t, own in zip(results, kinds, strict=False)]
    given = s, x, h0, _wide(cx), params, mine[: len(ys)], mine[len(ys)], None if c_n is None else mine[-1], kept
    if how is None:
        forward(*given)
    else:
        from . import rnn_half

        rnn_half.forward(*given, *how)
    for to, value in zip(results, mine, strict=True):
        if to is not value:
            to.copy_(value)


def recurrent(out: Sequence[Tensor], input: Tensor, hx: Tensor, cx: Tensor | None, w_ih: Tensor, w_hh: Tensor,
              b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None, batch_sizes: Tensor | None, mode: str,
              reverse: bool, keep: bool) -> None:
    """out = (the states of all rows, the last state, the last cell, what the backward needs); see ops/rnn.py for the shapes."""
    if input.shape[0] == 0 or hx.shape[0] == 0:
        return
    y, h_n, c_n, kept = out
    _any_forward(_one(mode, input, hx, batch_sizes, reverse), input, hx[None], None if cx is None else cx[None],
                 [(w_ih, w_hh, b_ih, b_hh)], [y], h_n[None], None if cx is None else c_n[None],
                 kept[None] if kept.numel() else None)  # fmt: skip


def recurrent_backward(out: Sequence[Tensor], grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, input: Tensor, hx: Tensor,
                       cx: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
                       w_hr: Tensor | None, y: Tensor, reserve: Tensor, batch_sizes: Tensor | None, mode: str, reverse: bool,
                       needs: Sequence[bool]) -> None:
    """out = the gradients of input, hx, cx, w_ih, w_hh, b_ih, b_hh, w_hr; those that ``needs`` leaves out are empty."""
    if input.shape[0] == 0:
        for t in out:
            t.zero_()
        return
    s = _one(mode, input, hx, batch_sizes, reverse)
    x, h0, c0, *params = (_wide(t) for t in (input, hx, cx, w_ih, w_hh, b_ih, b_hh))
    states, kept = _wide(y), reserve
    if not reserve.numel() and KEPT[mode]:  # the gates were not kept: they are made again
        kept, states = x.new_empty(s.rows, KEPT[mode] * s.units), torch.empty_like(states)
        _any_forward(s, input, hx[None], None if cx is None else cx[None], [(w_ih, w_hh, b_ih, b_hh)], [states],
                     torch.empty_like(h0)[None], None if c0 is None else torch.empty_like(c0)[None], kept[None])  # fmt: skip
    d_x, d_hx, d_cx, [found] = backward(
        s, _wide(grad_y), _wide(grad_h)[None], _wide(grad_c)[None] if c0 is not None else None, x, h0[None],
        None if c0 is None else c0[None], [params], [states], kept[None] if kept.numel() else None, needs[0],
    )  # fmt: skip
    for to, value, needed in zip(out, (d_x, d_hx[0], None if d_cx is None else d_cx[0], *found), needs, strict=False):
        if needed and value is not None:
            to.copy_(value)


def _stacked(input: Tensor, hx: Tensor, batch_sizes: Tensor | None, mode: str, layers: int, bidirectional: bool) -> Stack:
    directions = 2 if bidirectional else 1
    reverse = (False, True)[:directions]
    return Stack(mode, input.shape[0], hx.shape[1], hx.shape[2], layers, directions, reverse, batch_sizes, input.dtype)


def _parted(s: Stack, reserve: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The outputs of the lower layers, and the gates, which the GRU and the LSTM keep."""
    wide = s.directions * s.units
    lower, kept = reserve[: (s.layers - 1) * s.rows * wide], reserve[(s.layers - 1) * s.rows * wide :]
    gates = kept.view(s.layers * s.directions, s.rows, KEPT[s.mode] * s.units) if KEPT[s.mode] else None
    return list(lower.view(s.layers - 1, s.rows, wide)), gates


def recurrent_stack(out: Sequence[Tensor], input: Tensor, hx: Tensor, cx: Tensor | None, weights: Tensor,
                    batch_sizes: Tensor | None, mode: str, layers: int, bidirectional: bool, bias: bool, keep: bool) -> None:
    """out = (the last layer's states, all last states, all last cells, what the backward needs); shapes: ops/rnn.py."""
    if input.shape[0] == 0:
        return
    s = _stacked(input, hx, batch_sizes, mode, layers, bidirectional)
    w = _wide(weights) if _half_of(s, input) is None else weights.contiguous()
    params = unpack(w, mode, input.shape[1], s.units, layers, s.directions, bias)
    y, h_n, c_n, reserve = out
    lower, kept = _parted(s, reserve) if keep else (list(w.new_empty(layers - 1, s.rows, y.shape[1])), None)
    _any_forward(s, input, hx, cx, params, [*lower, y], h_n, None if cx is None else c_n, kept)


def recurrent_stack_backward(out: Sequence[Tensor], grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, input: Tensor, hx: Tensor,
                             cx: Tensor | None, weights: Tensor, y: Tensor, reserve: Tensor, batch_sizes: Tensor | None,
                             mode: str, layers: int, bidirectional: bool, bias: bool, needs: Sequence[bool]) -> None:
    """out = the gradients of input, hx, cx and weights; those that ``needs`` leaves out are empty."""
    if input.shape[0] == 0:
        for t in out:
            t.zero_()
        return
    s = _stacked(input, hx, batch_sizes, mode, layers, bidirectional)
    x, h0, c0, w, top = (_wide(t) for t in (input, hx, cx, weights, y))
    params = unpack(w, mode, x.shape[1], s.units, layers, s.directions, bias)
    if not reserve.numel() and (layers > 1 or KEPT[mode]):  # nothing was kept: it is made again
        jobs = layers * s.directions
        reserve = x.new_empty(s.rows * ((layers - 1) * top.shape[1] + jobs * KEPT[mode] * s.units))
        lower, kept = _parted(s, reserve)
        top = torch.empty_like(top)
        c_n = None if c0 is None else torch.empty_like(c0)
        given = params if _half_of(s, input) is None else unpack(weights, mode, x.shape[1], s.units, layers, s.directions, bias)
        _any_forward(s, input, hx, cx, given, [*lower, top], torch.empty_like(h0), c_n, kept)
    lower, kept = _parted(s, reserve)
    d_c = None if c0 is None else _wide(grad_c)
    d_x, d_hx, d_cx, found = backward(s, _wide(grad_y), _wide(grad_h), d_c, x, h0, c0, params, [*lower, top], kept, needs[0])
    d_weights = torch.cat([p.reshape(-1) for job in found for p in job[: 4 if bias else 2]]) if needs[3] else None
    for to, value, needed in zip(out, (d_x, d_hx, d_cx, d_weights), needs, strict=True):
        if needed and value is not None:
            to.copy_(value)


def scan(out: Tensor, f: Tensor, u: Tensor, c0: Tensor, reverse: bool) -> None:
    """out_t = f_t · out_{t-1} + u_t, the first from c0"""
    if not out.numel():
        return
    f, u, c0 = f.contiguous(), u.contiguous(), c0.contiguous()
    words: list[int | Tensor] = [f, u, c0, out, out.shape[0], c0.numel(), reverse]
    SOURCE.threads(f"scan<{TYPES[out.dtype]}>", out.device, c0.numel(), words, 64)


def _planned(s: Stack, device: torch.device, back: bool) -> tuple[int, Cut] | str:
    reason = cuda.refusal()
    found = reason or plan(s.mode, back, cuda.limits(device), s.layers, s.directions, s.batch, s.units)
    jobs = s.layers * s.directions
    if isinstance(found, str) or importlib.util.find_spec("triton") is None:
        return found
    each = STEP + 2 * GATES[s.mode] * s.units**2 * s.batch // SIMT
    return found if cycles(*found, jobs) <= jobs * each else "step by step it takes less"


def refusal(input: Tensor, projected: bool, at_once: str | None) -> str | None:
    """Why there is no kernel for such layers; None if there is one. at_once: why one launch does not do."""
    if input.dtype == torch.float64:
        return "the recurrent kernels compute in float32"
    if projected:
        return "the recurrent kernels have no projection"
    if at_once is None:
        return None
    if importlib.util.find_spec("triton") is None:
        return f"{at_once}; step by step it would need Triton: pip install triton"
    from .engine import launch

    return launch.refuses(input)


class _Asked(NamedTuple):
    """What a call of an operator asks for."""

    input: Tensor
    projected: bool
    mode: str
    layers: int
    directions: int
    batch: int
    units: int
    keep: bool  # whether a backward follows, or this is one

    def cut(self, back: bool) -> tuple[int, Cut] | str:
        """How launches hold the layers, forward or backward; or why none does."""
        reason, batch = cuda.refusal(), max(self.batch, 1)
        if reason is not None:
            return reason
        half = None if back else _half(self.mode, self.input, self.layers, self.directions, batch, self.units)
        return half or plan(self.mode, back, cuda.limits(self.input.device), self.layers, self.directions, batch, self.units)

    def too_large(self) -> str | None:
        """Why launches cannot hold the layers, or not in the backward, if one follows."""
        found = (self.cut(back) for back in (False, True)[: 1 + self.keep])
        return next((how for how in found if isinstance(how, str)), None)


def _asked(op: str, args: Sequence[Any]) -> _Asked:
    back = op.endswith("backward")
    if op.startswith("recurrent_stack"):
        input, hx = args[3:5] if back else args[:2]
        mode, layers, bidirectional = args[10:13] if back else args[5:8]
        keep = back or (args[9] if len(args) > 9 else torch.is_grad_enabled())
        return _Asked(input, False, mode, layers, 2 if bidirectional else 1, hx.shape[1], hx.shape[2], keep)
    input, hx, _, _, w_hh, _, _, w_hr = args[3:11] if back else args[:8]
    mode = args[14] if back else args[9]
    return _Asked(input, w_hr is not None, mode, 1, 1, hx.shape[0], w_hh.shape[0] // GATES[mode], back or args[11])


def supports(op: str, *args: Any) -> str | None:
    """None if a kernel serves the call, else the reason why not."""
    if op == "scan":
        return cuda.refusal()
    asked = _asked(op, args)
    if not asked.units:
        return "layers without units have no kernel"
    return refusal(asked.input, asked.projected, asked.too_large())


def _slower(op: str, *args: Any) -> str | None:
    """Two launches a step and layer, and a batch whose multiplications fill more than a step of cuDNN's (8.9 µs and layer, by
    public measurements), are taken to be slower than torch's library. Unmeasured: a debt."""
    asked = _asked(op, args)
    if not overhead.RULES or not asked.units:
        return None
    reason = asked.too_large()
    if reason is not None:
        return f"{reason}, and step by step torch's library is taken to be faster"
    cuts = [asked.cut(back) for back in (False, True)[: 1 + asked.keep]]
    if all(isinstance(how, str) or how[1].work <= 1000 * how[0] for how in cuts):  # 17 instructions each, of 17,600 cycles
        return None
    return f"with a batch of {asked.batch} torch's library is taken to be faster"


TORCH_IS_FASTER = {
    op: partial(_slower, op)
    for op in ("recurrent", "recurrent_backward", "recurrent_stack", "recurrent_stack_backward")
}
KERNELS: dict[str, Callable[..., None]] = {
    "recurrent": recurrent, "recurrent_backward": recurrent_backward,
    "recurrent_stack": recurrent_stack, "recurrent_stack_backward": recurrent_stack_backward, "scan": scan,
}  # fmt: skip
