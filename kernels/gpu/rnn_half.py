"""Recurrent layers of 16-bit numbers on NVIDIA GPUs, forward, by the matrix units: how a layer is cut. The kernels: rnn_half.cu.

A layer is a launch, both of its directions in one; the input's products are matrix products beforehand, with sums in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import matmul
from .engine import cuda
from .rnn import KINDS, TYPES, Cut, Job, Parameters, Stack, counters, joint_bias, launch_jobs, or_0

TILE, GROUP, EIGHT, PAD = 16, 32, 8, 32  # as in rnn_half.cu
WARPS = 8  # of a block at most
GROUPS = (2, 8, 12)  # of 32 columns that a warp may hold


def _instance(kind: str, groups: int, dtype: torch.dtype) -> str:
    return f"forward<{TYPES[dtype]}, {kind}, {groups}>"


def _instances() -> list[str]:
    """All kernels that a call may ask for."""
    halves = (torch.float16, torch.bfloat16)
    return [_instance(kind, n, dtype) for kind in dict.fromkeys(KINDS.values()) for n in GROUPS for dtype in halves]


SOURCE = cuda.Source("rnn_half", _instances)


def _cuts(mode: str, has: cuda.Limits, jobs: int, batch: int, units: int) -> Iterator[Cut]:
    """All that fit, with the work of each about as ``rnn.cut`` counts it"""
    each = TILE if KINDS[mode] == "RNN" else 4  # units of a tile
    for held in GROUPS:
        parts = -(-units // (GROUP * held))
        width = parts * held * GROUP + PAD
        for tiles in range(1, WARPS // parts + 1):
            blocks, warps = -(-units // (each * tiles)), tiles * parts
            for groups in range(1, -(-batch // EIGHT) + 1):
                if jobs * groups * blocks > has.multiprocessors:
                    break
                share = -(-batch // groups)
                own = (2 * warps * 128 if parts > 1 else 0) + (tiles * 4 * share if mode == "lstm" else 0)  # floats
                room = (has.shared - 4 * own) // (2 * width)
                staged = min(-(-share // EIGHT), room // EIGHT) * EIGHT
                if staged > 0:
                    # Cycles of a scheduler: products, sums to states, shares of sums; of the processor: reads of shared memory
                    # and of L2; and of the counter, to which each block adds.
                    passes, turns = -(-share // EIGHT), -(-warps // 4)
                    each_pass = turns * 8 * held + warps * 4 * held + -(-tiles // 4) * 250 + 120 * (parts > 1)
                    cycles = passes * each_pass + share * units // 16
                    shared = 2 * staged * width + 4 * own
                    yield Cut((cycles + 4 * blocks) // 17, held, warps, blocks, groups, share, parts, staged, shared)


@lru_cache(1024)
def cut(mode: str, has: cuda.Limits, jobs: int, batch: int, units: int) -> Cut | str:
    """The cut with the least work, or why there is none."""
    if not has.matrix:
        return "16-bit numbers need the matrix units of sm_80 or later"
    what = f"the weights of {jobs} × {units} units do not fit in {has.multiprocessors} multiprocessors"
    return min(_cuts(mode, has, jobs, batch, units), default=what)


def plan(mode: str, has: cuda.Limits, directions: int, batch: int, units: int) -> tuple[int, Cut] | str:
    """How many directions a launch has, and the cut; or why there is none."""
    how: Cut | str = ""
    for jobs in range(directions, 0, -1):
        how = cut(mode, has, jobs, batch, units)
        if isinstance(how, Cut):
            return jobs, how
    return str(how)


def _input_product(s: Stack, input: Tensor, p: Parameters) -> Tensor:
    """The input's part of all gates of all steps, with the biases, but that of the GRU's state's part of n; in float32."""
    w_ih, bias = p[0], joint_bias(s, p)
    assert w_ih is not None
    out = torch.empty(input.shape[0], w_ih.shape[0], dtype=torch.float32, device=input.device)
    matmul.multiply(out, input, w_ih.t(), matmul.Epilogue(bias))
    return out


def forward(s: Stack, input: Tensor, hx: Tensor, cx: Tensor | None, params: Sequence[Parameters], ys: Sequence[Tensor],
            h_n: Tensor, c_n: Tensor | None, kept: Tensor | None, at_once: int, how: Cut) -> None:  # fmt: skip
    """As ``rnn.forward``, of 16-bit numbers: cx, c_n and kept are float32."""
    done = counters(input.device, len(params), how)
    if hx.data_ptr() % 16:
        hx = hx.clone()
    expression = _instance(KINDS[s.mode], how.kv, input.dtype)
    for start in range(0, len(params), at_once):
        jobs = []
        for k, p in enumerate(params[start : start + at_once], start):
            layer = k // s.directions
            b_hh = p[3].float() if p[3] is not None and s.mode == "gru" else None
            jobs.append(
                Job(w_hh=or_0(p[1]), b_hh=or_0(b_hh), gates_in=_input_product(s, ys[layer - 1] if layer else input, p), h0=hx[k],
                    c0=0 if cx is None else cx[k], y=ys[layer], h_n=h_n[k], c_n=0 if c_n is None else c_n[k],
                    kept=0 if kept is None else kept[k], done=done[k], reverse=int(s.reversed[k % s.directions]),
                    y_stride=s.directions * s.units, y_at=k % s.directions * s.units)
            )  # fmt: skip
        launch_jobs(SOURCE, expression, s, input.device, how, jobs, s.units % 8 == 0)
