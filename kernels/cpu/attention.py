"""Attention on the CPU: how a call is cut into blocks of queries and keys, and where everything lies.

Extra memory is linear in the lengths: packed keys and values of some heads, a block's scores a thread; backward: the gradient
of the queries in the compute type, and a copy of a mask's gradient for each chain of heads that add to it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from ..reference.attention import Options
from .activation import _mix
from .attention_fields import BOOLEAN, COMPUTE, FIELDS, SAME, TABLE
from .engine import threads
from .engine.build import Kernel
from .engine.host import caches, simd
from .engine.workspace import workspace

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_BLOCK_Q, _BLOCK_K = 48, 512  # rows and keys of a block of scores
_READ_K = 128  # keys of a block that are read where they lie
_BACK_Q, _BACK_K = 96, 128  # of the backward, whose block needs ten arrays
_FEW = 8  # rows of queries that read keys and values where they lie: packing them would cost more
_SERIAL = 1 << 16  # products below which a second thread costs more than it brings
_WAVE = 8 << 20  # bytes of packed keys and values at a time: what L3 may hold


@cache
def _kernel(kind: str, signature: str, dtype: torch.dtype) -> Callable[..., None]:
    def make() -> Callable[..., Any]:
        from . import attention_code

        return getattr(attention_code, kind)(_NAMES[dtype])
    return Kernel(f"{kind}_{_NAMES[dtype]}", signature, make).load()


def _heads(t: Tensor) -> Tensor:
    """With a dimension of heads."""
    return t if t.dim() > 2 else t.unsqueeze(0)


def _steps(t: Tensor | None) -> tuple[int, int, int]:
    """Byte strides of the last three dimensions; 0 where there is one element only, or no tensor."""
    if t is None:
        return 0, 0, 0
    sizes, strides = (1, 1, *t.shape)[-3:], (0, 0, *t.stride())[-3:]
    a, b, c = (0 if size == 1 else step * t.itemsize for size, step in zip(sizes, strides))
    return a, b, c


def _starts(t: Tensor | None, batch: torch.Size, last: int = 3) -> list[int]:
    """The byte offset of each batch item, broadcast to ``batch``; ``last``: dimensions that are not the batch's."""
    if t is None:
        return [0] * batch.numel()
    own = t.dim() - last
    sizes, strides = t.shape[:max(own, 0)], t.stride()[:max(own, 0)]
    steps = [0] * (len(batch) - len(sizes)) + [0 if n == 1 else s * t.itemsize for n, s in zip(sizes, strides)]
    return [sum(i * s for i, s in zip(index, steps)) for index in product(*map(range, batch))]


def _unit(t: Tensor, exact: bool = False) -> Tensor:
    """The tensor, or a copy, with elements next to each other along its last dimension; unless ``exact`` they may all be alike,
    and the copy is of what is distinct in expanded dimensions."""
    if t.stride(-1) == 1 or t.shape[-1] == 1 or (t.stride(-1) == 0 and not exact):
        return t
    if exact:
        return t.contiguous()
    return t[tuple(slice(0, 1 if step == 0 else size) for size, step in zip(t.shape, t.stride()))].contiguous()


class Call:
    """What forward and backward have in common: fields, table and the tensors that they point to."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None,
                 offsets_q: Tensor | None, offsets_k: Tensor | None, o: Options) -> None:
        self.query, self.key, self.value = q, k, v = _heads(query), _heads(key), _heads(value)
        compute = torch.promote_types(q.dtype, torch.float32)
        self.mask = mask = None if mask is None else _unit(mask if mask.dim() else mask.unsqueeze(0))
        self.slopes = slopes = None if slopes is None else slopes.to(compute)
        batch, (heads, lq, d), (kv_heads, lk, dv) = q.shape[:-3], q.shape[-3:], v.shape[-3:]
        self.batch, self.size = batch, compute.itemsize
        sequences = batch.numel() if offsets_q is None else len(offsets_q) - 1
        f: dict[str, int] = dict.fromkeys(FIELDS, 0)
        f |= {"heads": heads, "group": heads // kv_heads, "pairs": sequences * kv_heads, "d": d, "dv": dv, "row_h": lq,
              "rows": batch.numel() * heads * lq, "left": o.left, "right": o.right, "bottom": int(o.bottom_right),
              "prefix": o.prefix, "drop_h": lq * lk, "drop_l": lk,
              "plain": int(mask is None and slopes is None and o.softcap == 0 and o.scale > 0)}
        for name, t in (("q", q), ("k", k), ("v", v)):
            f[name + "h"], f[name + "l"], f[name + "d"] = _steps(t)
            f[name + "d"] = f[name + "d"] or t.itemsize
        f["mh"], f["mq"], f["mk"] = _steps(mask)
        f["ah"] = 0 if slopes is None or slopes.shape[-1:] in ((), (1,)) else slopes.stride(-1) * self.size
        if mask is not None:
            f["mask_kind"] = BOOLEAN if mask.dtype == torch.bool else SAME if mask.dtype == q.dtype else COMPUTE
        if o.dropout:
            f |= {"drop": round(o.dropout * 2**32), "key0": o.seed & 0xFFFFFFFF,
                  "key1": _mix(((o.seed >> 32 & 0xFFFFFFFF) + 0x9E3779B9) & 0xFFFFFFFF)}
        self.f, self.table = f, dict.fromkeys(TABLE, [0] * sequences)
        self.table |= {"mask": _starts(mask, batch), "slope": _starts(slopes, batch, 1)}
        if offsets_q is None or offsets_k is None:
            self.lq, self.lk, rows = [lq] * sequences, [lk] * sequences, range(0, f["rows"], max(1, heads * lq))
            self.first_q = self.first_k = [0] * sequences
            self.table |= {"row": list(rows), "drop": [row * lk for row in rows]} if f["rows"] else {}
        else:
            starts_q, starts_k = offsets_q.tolist(), offsets_k.tolist()
            self.lq = [b - a for a, b in pairwise(starts_q)]
            self.lk = [b - a for a, b in pairwise(starts_k)]
            self.first_q, self.first_k = starts_q[:-1], starts_k[:-1]
            self.table["row"] = self.first_q
            self.table["drop"] = [a * lk + b for a, b in zip(self.first_q, self.first_k)]
            for name in ("mask", "slope"):
                self.table[name] *= sequences
            self.table["mask"] = [start + a * f["mq"] + b * f["mk"]
                                  for start, a, b in zip(self.table["mask"], self.first_q, self.first_k)]
        self.table |= {"lq": self.lq, "lk": self.lk, "q": self.starts(q, self.first_q),
                       "k": self.starts(k, self.first_k), "v": self.starts(v, self.first_k)}
        self.longest_q, self.longest_k = max(self.lq, default=0), max(self.lk, default=0)
        self.nt = 1 if f["rows"] * lk * (d + dv) < _SERIAL else threads.count()

    def starts(self, t: Tensor, first: list[int]) -> list[int]:
        """Where each sequence begins in t, in bytes"""
        starts, step = _starts(t, self.batch), t.stride(-2) * t.itemsize
        return [a + b * step for a, b in zip(starts * (len(first) // max(1, len(starts))), first)]

    def memory(self) -> tuple[array[int], array[int]]:
        """Fields and table as the kernels read them"""
        return array("q", self.f.values()), array("q", [n for row in zip(*self.table.values()) for n in row])

    def addresses(self) -> list[int]:
        return [0 if t is None else t.data_ptr() for t in (self.query, self.key, self.value, self.mask, self.slopes)]


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _attend(out: Tensor, lse: Tensor | None, stats: Tensor, query: Tensor, key: Tensor, value: Tensor,
            mask: Tensor | None, slopes: Tensor | None, offsets_q: Tensor | None, offsets_k: Tensor | None,
            *options: Any) -> None:
    o = Options(*options)
    if not out.numel() or not key.shape[-2]:
        out.zero_()
        stats[0].fill_(-torch.inf)
        stats[1].zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    key, value = _shared(key, value)
    c = Call(query, key, value, mask, slopes, offsets_q, offsets_k, o)
    f, size, to = c.f, c.size, _heads(out)
    f["oh"], f["ol"], _ = _steps(to)
    c.table["o"] = c.starts(to, c.first_q)
    lanes = simd().width // size
    rows = f["group"] * c.longest_q
    unit = key.itemsize
    direct = rows <= _FEW and all(f[n] == unit for n in ("qd", "kd", "vd"))
    few = c.longest_q < _BLOCK_Q
    f["bq"] = c.longest_q if few else _BLOCK_Q
    f["bh"] = min(f["group"], max(1, _BLOCK_Q // c.longest_q)) if few else 1
    f["pos_blocks"], f["head_blocks"] = -(-c.longest_q // f["bq"]), -(-f["group"] // f["bh"])
    f["bk"], f["direct"] = _READ_K if direct else _BLOCK_K, int(direct)
    panel = 2 * lanes
    f["pack_k"] = _up(c.longest_k, panel) * f["d"] * size
    f["pack_v"] = c.longest_k * size
    f["pack"] = f["pack_k"] + f["pack_v"] * _up(f["dv"], panel)
    f["chunks"] = -(-c.longest_k // 128)
    alone = not direct and f["pack"] <= caches().l2 // 4 and (f["pairs"] >= 4 * c.nt or f["pairs"] % c.nt == 0)
    f["wave"] = 0 if alone else f["pairs"] if direct else min(f["pairs"], max(2 * c.nt, _WAVE // f["pack"]))
    blocks = (f["wave"] or f["pairs"]) * f["pos_blocks"] * f["head_blocks"]
    f["splits"] = 1 if alone or blocks >= 2 * c.nt or c.nt == 1 else max(1, min(-(-2 * c.nt // blocks), c.longest_k // 256))
    block_rows = _up(f["bq"] * f["bh"], 12)
    o_row = _up(f["dv"], lanes) * size
    f["own"] = _up(block_rows * (72 + _up(f["d"], lanes) * size + (f["bk"] * size + 64) + o_row), 4096)
    f["part"] = block_rows * (64 + o_row)
    packed = 0 if direct else _up((f["wave"] or c.nt) * f["pack"], 4096)
    scratch = c.nt * f["own"]
    room = workspace(packed + scratch + (blocks * f["splits"] * f["part"] if f["splits"] > 1 else 0))
    fields, table = c.memory()
    kernel = _kernel("attention", "i" * 14 + "fff", query.dtype)
    kernel(c.nt, fields.buffer_info()[0], table.buffer_info()[0], *c.addresses(), out.data_ptr(),
           0 if lse is None else lse.data_ptr(), stats.data_ptr(), room, room + packed, room + packed + scratch,
           o.scale, o.softcap, 1.0 / (1.0 - o.dropout))


def _shared(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """One head, where key and value are one that was expanded to many."""
    if key.dim() > 2 and value.dim() > 2 and key.shape[-3] > 1 and key.stride(-3) == 0 == value.stride(-3):
        return key[..., :1, :, :], value[..., :1, :, :]
    return key, value


def attention(out: tuple[Tensor, Tensor], *args: Any) -> None:
    """(softmax(query keyᵀ · scale + …) value, each row's log-sum-exp in two parts)"""
    _attend(out[0], None, out[1], *args)


def attention_lse(out: tuple[Tensor, Tensor, Tensor], *args: Any) -> None:
    """The same, with the log-sum-exp as a number between the two"""
    _attend(*out, *args)


def _chains(c: Call, bias: bool) -> tuple[array[int], int, int]:
    """(where each chain begins, and the pairs of all, one chain after the other; the number of chains; copies of the mask's
    gradient). Pairs that add to the same elements of it are in one chain, or, where that would leave threads without work,
    in chains that have a copy each.
    """
    heads = c.f["heads"] // c.f["group"]
    pairs = list(range(c.f["pairs"]))
    starts, copies = [*pairs, len(pairs)], 1
    if bias:
        step = c.f["bias_h"] * c.f["group"]
        places = [c.table["bias"][pair // heads] + pair % heads * step for pair in pairs]
        pairs.sort(key=places.__getitem__)  # stable
        starts = [i for i, pair in enumerate(pairs) if i == 0 or places[pair] != places[pairs[i - 1]]] + [len(pairs)]
        if len(starts) <= min(c.nt, len(pairs)):
            copies = min(c.nt, len(pairs))
            starts = [len(pairs) * i // copies for i in range(copies + 1)]
    return array("q", [*(len(starts) + start for start in starts), *pairs]), len(starts) - 1, copies


def attention_backward(out: tuple[Tensor, Tensor, Tensor, Tensor], grad: Tensor, query: Tensor, key: Tensor, value: Tensor,
                       mask: Tensor | None, slopes: Tensor | None, offsets_q: Tensor | None, offsets_k: Tensor | None,
                       output: Tensor, stats: Tensor, grad_lse: Tensor | None, needs_mask: bool, *options: Any) -> None:
    """The gradients of query, key, value and, if it is needed, of an additive mask"""
    o = Options(*options)
    if not grad.numel() or not key.shape[-2]:
        for t in out:
            t.zero_()
        return
    c = Call(query, key, value, mask, slopes, offsets_q, offsets_k, o)
    f, size, nt = c.f, c.size, c.nt
    dq, dk, dv = (_heads(t) for t in out[:3])
    grad, output = _unit(_heads(grad), True), _unit(_heads(output), True)
    for name, t, first in (("g", grad, c.first_q), ("o", output, c.first_q), ("x", dq, c.first_q), ("y", dk, c.first_k),
                           ("z", dv, c.first_k)):
        f[name + "h"], f[name + "l"] = t.stride(-3) * t.itemsize, t.stride(-2) * t.itemsize
        c.table[{"x": "dq", "y": "dk", "z": "dv"}.get(name, name)] = c.starts(t, first)
    bias, direct, compute = None, False, stats.dtype
    if needs_mask and mask is not None:
        f["plain"] = 0
        shape = (1,) * (2 - mask.dim()) + tuple(mask.shape)
        f["bias_h"], f["bias_q"], f["bias_k"] = _steps(one := torch.empty(shape, dtype=compute))
        c.table["bias"] = _starts(one, c.batch)
        if offsets_q is not None:
            c.table["bias"] = [c.table["bias"][0] + a * f["bias_q"] + b * f["bias_k"] for a, b in zip(c.first_q, c.first_k)]
        chains, number, copies = _chains(c, True)
        f["bias_chain"] = one.numel() * size if copies > 1 else 0
        direct = copies == 1 and out[3].dtype == compute and out[3].is_contiguous()
        bias = out[3].zero_() if direct else torch.zeros(copies, *shape, dtype=compute)
    else:
        chains, number, _ = _chains(c, False)
    lanes = simd().width // size
    panel = 2 * lanes
    q_row, g_row = _up(f["d"], panel) * size, _up(f["dv"], panel) * size
    heads = [_up(n, 12) * q_row for n in c.lq]
    c.table["dq_h"] = heads
    c.table["dq_row"] = [sum(heads[:i]) * f["heads"] for i in range(len(heads))] if offsets_q is not None else [
        i * heads[0] * f["heads"] for i in range(len(heads))]
    f["dq_part"] = sum(heads) * f["heads"]
    f["bq"], f["bk"] = min(_BACK_Q, _up(c.longest_q, 12)), _BACK_K
    alone = bias is not None and f["bias_k"] == 0  # all keys add to one element
    f["parts"] = 1 if nt == 1 or number >= 2 * nt or alone else max(1, min(-(-2 * nt // number), c.longest_k // _BACK_K))
    rows, keys = _up(f["bq"], 12), _up(f["bk"], 12)
    own = rows * (72 + q_row + g_row + 2 * (f["bk"] * size + 64))
    own += _up(f["bk"], panel) * (f["d"] + f["dv"]) * size + f["bk"] * q_row + keys * (q_row + g_row)
    f["own"] = _up(own, 4096)
    delta = torch.empty(stats.shape[1:], dtype=compute)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    sums = _up(f["parts"] * f["dq_part"], 4096)
    room = workspace(sums + nt * f["own"])
    fields, table = c.memory()
    kernel = _kernel("attention_backward", "i" * 22 + "fff", query.dtype)
    kernel(nt, fields.buffer_info()[0], table.buffer_info()[0], len(c.lq), chains.buffer_info()[0], number, *c.addresses(),
           output.data_ptr(), stats.data_ptr(), grad.data_ptr(), 0 if grad_lse is None else grad_lse.data_ptr(),
           dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), 0 if bias is None else bias.data_ptr(), delta.data_ptr(),
           room, room + sums, o.scale, o.softcap, 1.0 / (1.0 - o.dropout))
    if bias is not None and not direct:
        out[3].copy_(bias.sum(0).reshape(out[3].shape))


KERNELS: dict[str, Callable[..., None]] = {
    "attention": attention, "attention_lse": attention_lse, "attention_backward": attention_backward,
}
