"""Attention on the CPU: how a call is cut into blocks of queries and keys, and where everything lies.

Extra memory is linear in the lengths: packed keys and values of some heads, a block's scores a thread; backward: the gradient
of the queries in the compute type, and a copy of a mask's gradient for each chain of heads that add to it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate, chain, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..layout import dropout_keys
from .attention_fields import BOOLEAN, COMPUTE, FIELDS, SAME, TABLE
from .engine import threads
from .engine.build import Kernel, made_by
from .engine.host import caches, simd
from .engine.overhead import torch_is_shorter
from .engine.workspace import workspace

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_BLOCK_Q, _BLOCK_K = 120, 512  # rows (of whole tiles) and keys of a block of scores
_WINDOW_Q = 48  # rows, where a window moves on with them
_READ_K = 64  # keys of a block that are read where they lie
_BACK_Q, _BACK_K = 96, 128  # of the backward, whose block needs ten arrays
_FEW = 8  # rows of queries that read keys and values where they lie: packing them would cost more
_SERIAL = 1 << 18  # products below which a second thread costs more than it brings
_WAVE = 8 << 20  # bytes of packed keys and values at a time: what L3 may hold
_MANY = 64  # in plans, numbers of keys that go one by one as they are decoded are rounded up to multiples of this
_KEY0, _KEY1, _LK = FIELDS.index("key0"), FIELDS.index("key1"), TABLE.index("lk")


@cache
def _kernel(kind: str, signature: str, dtype: torch.dtype, *flags: str) -> Callable[..., None]:
    name = "_".join((kind, _NAMES[dtype], *flags))
    return Kernel(name, signature, made_by("attention_code", kind, _NAMES[dtype], *flags)).load()


def _flags(dtype: torch.dtype, mask: Tensor | None, slopes: Tensor | None, dropout: float, softcap: float) -> tuple[str, ...]:
    """"pairs" where products multiply pairs of bfloat16: if the CPU does, and torch too would round the weights: it keeps them in
    float32 for dropout and for a learned bias, as we do for what it has no word for."""
    learned = mask is not None and mask.requires_grad
    rounded = dtype is torch.bfloat16 and not (learned or slopes is not None or dropout or softcap)
    return ("pairs",) if rounded and simd().bf16_dot else ()


# A plan: all that follows from where the tensors lie and what the options are, made once for calls that are alike. ------------

Lie = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides in elements


def _lie(t: Tensor) -> Lie:
    return t.shape, t.stride(), t.dtype


class Layout:
    """A tensor of at least ``dims`` dimensions, its strides in bytes and 0 where there is one element only."""

    def __init__(self, lie: Lie, dims: int = 3) -> None:
        shape, strides, self.dtype = lie
        self.size = self.dtype.itemsize
        more = max(0, dims - len(shape))
        self.shape = (1,) * more + tuple(shape)
        self.steps = (0,) * more + tuple(0 if n == 1 else s * self.size for n, s in zip(shape, strides))

    def starts(self, batch: Sequence[int], last: int = 3) -> list[int]:
        """The byte offset of each batch item, broadcast to ``batch``; ``last``: dimensions that are not the batch's."""
        own = max(0, len(self.shape) - last)
        starts = [0]
        for size, step in zip(batch, (0,) * (len(batch) - own) + self.steps[:own]):
            starts = [start + i * step for start in starts for i in range(size)]
        return starts


def _unit(t: Tensor, exact: bool = False) -> Tensor:
    """The tensor, or a copy, with elements next to each other along its last dimension; unless ``exact`` they may all be alike,
    and the copy is of what is distinct in expanded dimensions."""
    step = t.stride()[-1:]
    if step == (1,) or t.shape[-1:] == (1,) or (step == (0,) and not exact):
        return t
    if exact:
        return t.contiguous()
    return _distinct(t).contiguous()


def _distinct(t: Tensor) -> Tensor:
    """What an expanded tensor was expanded from"""
    return t[tuple(slice(0, 1 if step == 0 else size) for size, step in zip(t.shape, t.stride()))]


def _readable(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask as the kernels know it: bool, or of the queries' dtype or the one that they are computed in"""
    mask = None if mask is None else _unit(mask)
    if mask is not None and mask.dtype == torch.float32 and query.dtype == torch.float64:
        return _distinct(mask).double()
    return mask


class Plan:
    """What forward and backward have in common: the numbers that their kernels read.

    starts: where each sequence begins among the queries and among the keys, and their ends; None: a sequence a batch item.
    """

    packed: int  # where packed operands end in the call's memory, and scratch memory begins; all that it needs
    scratch: int
    room: int
    chains: array[int]  # of the backward: see `_chains`
    number: int
    copies: int
    most_parts: int  # of a chain's keys, each for a thread

    def __init__(self, threads: int, query: Lie, key: Lie, value: Lie, mask: Lie | None, slopes: Lie | None,
                 starts: tuple[tuple[int, ...], tuple[int, ...]] | None, dropout: float, left: int, right: int, bottom: bool,
                 prefix: int, plain: bool, *, shared: bool) -> None:
        q, k, v = Layout(query), Layout(key), Layout(value)
        if shared and k.shape[-3] > 1 and k.steps[-3] == 0 == v.steps[-3]:  # one head that was expanded to many
            k.shape, v.shape = ((*t.shape[:-3], 1, *t.shape[-2:]) for t in (k, v))
        self.apart = starts is not None
        self.batch, (heads, lq, d), (kv_heads, lk, dv) = q.shape[:-3], q.shape[-3:], v.shape[-3:]
        self.size = max(4, q.size)  # of the compute type
        items = prod(self.batch)
        sequences = items if starts is None else len(starts[0]) - 1
        self.f = f = dict.fromkeys(FIELDS, 0)
        f |= {"heads": heads, "group": heads // kv_heads, "pairs": sequences * kv_heads, "d": d, "dv": dv, "row_h": lq,
              "rows": items * heads * lq, "left": left, "right": right, "bottom": int(bottom), "prefix": prefix,
              "drop": min(round(dropout * 2**32), 2**32 - 1), "drop_h": lq * lk, "drop_l": lk,
              "plain": int(plain and mask is None and slopes is None)}
        for name, t in (("q", q), ("k", k), ("v", v)):
            f[name + "h"], f[name + "l"], f[name + "d"] = t.steps[-3:]
            if t.shape[-1] == 1:
                f[name + "d"] = t.size
        self.table = table = dict.fromkeys(TABLE, [0] * sequences)
        if mask is not None:
            m = Layout(mask)
            f["mask_kind"] = BOOLEAN if m.dtype == torch.bool else SAME if m.dtype == q.dtype else COMPUTE
            f["mh"], f["mq"], f["mk"] = m.steps[-3:]
            table["mask"] = m.starts(self.batch)
        if slopes is not None:
            a = Layout(slopes, 1)
            f["ah"], table["slope"] = a.steps[-1], a.starts(self.batch, 1)
        if starts is None:
            self.lq, self.lk, rows = [lq] * sequences, [lk] * sequences, range(0, f["rows"], heads * lq)
            self.first_q = self.first_k = [0] * sequences
            table |= {"row": list(rows), "drop": [row * lk for row in rows]}
        else:
            self.lq, self.lk = ([b - a for a, b in pairwise(side)] for side in starts)
            self.first_q, self.first_k = (list(side[:-1]) for side in starts)
            table["row"] = self.first_q
            table["drop"] = [a * lk + b for a, b in zip(self.first_q, self.first_k)]
            table["slope"] = table["slope"][:1] * sequences
            table["mask"] = [table["mask"][0] + a * f["mq"] + b * f["mk"] for a, b in zip(self.first_q, self.first_k)]
        table |= {"lq": self.lq, "lk": self.lk}
        for name, t, first in (("q", q, self.first_q), ("k", k, self.first_k), ("v", v, self.first_k)):
            self.place(name, t, first)
        self.longest_q, self.longest_k = max(self.lq, default=0), max(self.lk, default=0)
        self.threads = 1 if f["rows"] * lk * (d + dv) < _SERIAL else threads

    def place(self, column: str, t: Layout, first: list[int]) -> None:
        """Where each sequence begins in t, in bytes"""
        starts, step = t.starts(self.batch), t.steps[-2]
        self.table[column] = [a + b * step for a, b in zip(starts * (len(first) // max(1, len(starts))), first)]

    def finish(self) -> None:
        """Fields and table as the kernels read them"""
        self.fields = array("q", self.f.values())
        self.rows = array("q", chain.from_iterable(zip(*self.table.values())))

    def memory(self, seed: int, keys: int) -> tuple[array[int], array[int]]:
        """The same for a seed and, if all are alike and so many, this number of keys"""
        fields, rows = self.fields, self.rows
        if self.f["drop"]:
            fields = array("q", fields)
            fields[_KEY0], fields[_KEY1] = dropout_keys(seed)
        if keys and keys != self.longest_k:
            rows = array("q", rows)
            for at in range(_LK, len(rows), len(TABLE)):
                rows[at] = keys
        return fields, rows


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _alike(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None, offsets_q: Tensor | None,
           offsets_k: Tensor | None, options: tuple[Any, ...], keys: int = 0) -> tuple[Any, ...]:
    """What calls share that share a plan, in Plan's order; if ``keys``, a plan for so many keys."""
    dropout, _, scale, left, right, bottom, prefix, softcap = options
    dtype, starts, k, v = query.dtype, None, key.shape, value.shape
    if keys:
        k, v = (*k[:-2], keys, k[-1]), (*v[:-2], keys, v[-1])  # type: ignore[assignment]
    if offsets_q is not None and offsets_k is not None:
        starts = tuple(offsets_q.tolist()), tuple(offsets_k.tolist())
    return (
        threads.count(), (query.shape, query.stride(), dtype), (k, key.stride(), dtype), (v, value.stride(), dtype),
        None if mask is None else _lie(mask), None if slopes is None else _lie(slopes), starts, dropout, left, right, bottom,
        prefix, softcap == 0 and scale > 0,
    )  # fmt: skip


@lru_cache(1024)
def _forward(*args: Any) -> Plan:
    """args: Plan's, but for ``shared``, then the output's strides and the kernel's flags"""
    *of_plan, strides, flags = args
    c = Plan(*of_plan, shared=True)
    (shape, _, dtype), value = args[1], args[3][0]
    f, size, nt, to = c.f, c.size, c.threads, Layout(((*shape[:-1], value[-1]), strides, dtype))
    f["oh"], f["ol"], _ = to.steps[-3:]
    c.place("o", to, c.first_q)
    lanes = simd().width // size
    rows = f["group"] * c.longest_q
    direct = rows <= _FEW and f["qd"] == f["kd"] == f["vd"] == to.size
    most = _WINDOW_Q if f["left"] >= 0 else _BLOCK_Q
    few = c.longest_q < most
    f["bq"] = c.longest_q if few else most
    f["bh"] = min(f["group"], max(1, most // c.longest_q)) if few else 1
    f["pos_blocks"], f["head_blocks"] = -(-c.longest_q // f["bq"]), -(-f["group"] // f["bh"])
    f["bk"], f["direct"] = _READ_K if direct else _BLOCK_K, int(direct)
    panel = 2 * lanes
    deep = 2 if flags else 1  # numbers of a row, or keys, that lie in one of the compute type's
    f["pack_k"] = _up(c.longest_k, panel) * -(-f["d"] // deep) * size
    f["pack_v"] = -(-c.longest_k // deep) * size
    f["pack"] = f["pack_k"] + f["pack_v"] * _up(f["dv"], panel)
    f["chunks"] = -(-c.longest_k // 128)
    alone = not direct and f["pack"] <= caches().l2 // 4 and (f["pairs"] >= 4 * nt or f["pairs"] % nt == 0)
    f["wave"] = 0 if alone else f["pairs"] if direct else min(f["pairs"], max(2 * nt, _WAVE // f["pack"]))
    blocks = (f["wave"] or f["pairs"]) * f["pos_blocks"] * f["head_blocks"]
    f["splits"] = 1 if alone or blocks >= 2 * nt or nt == 1 else max(1, min(-(-2 * nt // blocks), c.longest_k // 256))
    block_rows = _up(f["bq"] * f["bh"], 12)
    o_row = _up(f["dv"], lanes) * size
    f["own"] = _up(block_rows * (72 + _up(f["d"], lanes) * size + (f["bk"] * size + 64) + o_row), 4096)
    f["part"] = block_rows * (64 + o_row)
    c.packed = 0 if direct else _up((f["wave"] or nt) * f["pack"], 4096)
    c.scratch = c.packed + nt * f["own"]
    c.room = c.scratch + (blocks * f["splits"] * f["part"] if f["splits"] > 1 else 0)
    c.finish()
    return c


def _attend(out: Tensor, lse: Tensor | None, stats: Tensor, query: Tensor, key: Tensor, value: Tensor,
            mask: Tensor | None, slopes: Tensor | None, offsets_q: Tensor | None, offsets_k: Tensor | None,
            *options: Any) -> None:
    if not out.numel() or not key.shape[-2]:
        out.zero_()
        stats[0].fill_(-torch.inf)
        stats[1].zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    flags = _flags(query.dtype, mask, slopes, options[0], options[7])
    mask, slopes = _readable(mask, query), None if slopes is None else slopes.to(stats.dtype)
    keys = key.shape[-2] if mask is None is offsets_q and not options[0] else 0
    c = _forward(*_alike(query, key, value, mask, slopes, offsets_q, offsets_k, options, _up(keys, _MANY)), out.stride(), flags)
    room, (fields, table) = workspace(c.room), c.memory(options[1], keys)
    kernel = _kernel("attention", "i" * 14 + "fff", query.dtype, *flags)
    kernel(c.threads, fields.buffer_info()[0], table.buffer_info()[0], query.data_ptr(), key.data_ptr(), value.data_ptr(),
           _address(mask), _address(slopes), out.data_ptr(), _address(lse), stats.data_ptr(), room, room + c.packed,
           room + c.scratch, options[2], options[7], 1.0 / (1.0 - options[0]))


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def attention(out: tuple[Tensor, Tensor], *args: Any) -> None:
    """(softmax(query keyᵀ · scale + …) value, each row's log-sum-exp in two parts)"""
    _attend(out[0], None, out[1], *args)


def attention_lse(out: tuple[Tensor, Tensor, Tensor], *args: Any) -> None:
    """The same, with the log-sum-exp as a number between the two"""
    _attend(*out, *args)


def _chains(c: Plan, bias: bool) -> tuple[array[int], int, int]:
    """(where each chain begins, and the pairs of all, one chain after the other; the number of chains; copies of the mask's
    gradient). Pairs that add to the same elements of it are in one chain, or, where that would leave threads without work
    even if they share its keys, in chains that have a copy each.
    """
    heads = c.f["heads"] // c.f["group"]
    pairs = list(range(c.f["pairs"]))
    starts, copies = [*pairs, len(pairs)], 1
    if bias:
        step = c.f["bias_h"] * c.f["group"]
        places = [c.table["bias"][pair // heads] + pair % heads * step for pair in pairs]
        pairs.sort(key=places.__getitem__)  # stable
        starts = [i for i, pair in enumerate(pairs) if i == 0 or places[pair] != places[pairs[i - 1]]] + [len(pairs)]
        if (len(starts) - 1) * c.most_parts < c.threads and len(starts) <= len(pairs):
            copies = min(c.threads, len(pairs))
            starts = [len(pairs) * i // copies for i in range(copies + 1)]
    return array("q", [*(len(starts) + start for start in starts), *pairs]), len(starts) - 1, copies


@lru_cache(1024)
def _backward(*args: Any) -> Plan:
    """args: Plan's, but for ``shared``; then where grad, output and the gradients of query, key and value lie; the shape of the
    mask's gradient, or None"""
    *usual, grad, output, dq, dk, dv, bias = args
    c = Plan(*usual, shared=False)
    f, size, nt = c.f, c.size, c.threads
    for name, column, lie, first in (("g", "g", grad, c.first_q), ("o", "o", output, c.first_q), ("x", "dq", dq, c.first_q),
                                     ("y", "dk", dk, c.first_k), ("z", "dv", dv, c.first_k)):
        t = Layout(lie)
        f[name + "h"], f[name + "l"] = t.steps[-3:-1]
        c.place(column, t, first)
    c.copies = 1
    if bias is not None:
        f["plain"] = 0
        one = Layout((bias, torch.empty(bias, device="meta").stride(), torch.float64 if size == 8 else torch.float32))
        f["bias_h"], f["bias_q"], f["bias_k"] = one.steps[-3:]
        c.table["bias"] = one.starts(c.batch)
        if c.apart:
            c.table["bias"] = [c.table["bias"][0] + a * f["bias_q"] + b * f["bias_k"] for a, b in zip(c.first_q, c.first_k)]
    alone = bias is not None and f["bias_k"] == 0  # all keys add to one element
    c.most_parts = 1 if alone else max(1, c.longest_k // _BACK_K)
    c.chains, c.number, c.copies = _chains(c, bias is not None)
    f["bias_chain"] = prod(bias) * size if bias is not None and c.copies > 1 else 0
    panel = 2 * simd().width // size
    dq_row, dv_row = _up(f["d"], panel) * size, _up(f["dv"], panel) * size
    q_row, g_row = dq_row | 64, dv_row | 64
    c.table["dq_h"] = heads = [_up(n, 12) * dq_row for n in c.lq]
    c.table["dq_row"] = [start * f["heads"] for start in accumulate(heads[:-1], initial=0)]
    f["dq_part"] = sum(heads) * f["heads"]
    f["bq"], f["bk"] = min(_BACK_Q, _up(c.longest_q, 12)), _BACK_K
    f["parts"] = 1 if nt == 1 or c.number >= 2 * nt else min(-(-2 * nt // c.number), c.most_parts)
    rows, keys = _up(f["bq"], 12), _up(f["bk"], 12)
    own = rows * (72 + q_row + g_row + 2 * (f["bk"] * size + 64))
    own += _up(f["bk"], panel) * (f["d"] + f["dv"]) * size + f["bk"] * dq_row + keys * (q_row + g_row)
    f["own"] = _up(own, 4096)
    c.packed = _up(f["rows"] * size, 4096)  # each row's Σ grad · out lies before the sums
    c.scratch = c.packed + _up(f["parts"] * f["dq_part"], 4096)
    c.room = c.scratch + nt * f["own"]
    c.finish()
    return c


def attention_backward(out: tuple[Tensor, Tensor, Tensor, Tensor], grad: Tensor, query: Tensor, key: Tensor, value: Tensor,
                       mask: Tensor | None, slopes: Tensor | None, offsets_q: Tensor | None, offsets_k: Tensor | None,
                       output: Tensor, stats: Tensor, grad_lse: Tensor | None, needs_mask: bool, *options: Any) -> None:
    """The gradients of query, key, value and, if it is needed, of an additive mask"""
    if not grad.numel() or not key.shape[-2]:
        for t in out:
            t.zero_()
        return
    compute, shape = stats.dtype, None
    if needs_mask and mask is not None:
        shape = (1,) * (2 - mask.dim()) + tuple(mask.shape)
    mask, slopes = _readable(mask, query), None if slopes is None else slopes.to(compute)
    grad, output, dq, dk, dv = _unit(grad, True), _unit(output, True), *out[:3]
    alike = _alike(query, key, value, mask, slopes, offsets_q, offsets_k, options)
    c = _backward(*alike, _lie(grad), _lie(output), _lie(dq), _lie(dk), _lie(dv), shape)
    bias, direct = None, False
    if shape is not None:
        direct = c.copies == 1 and out[3].dtype == compute and out[3].is_contiguous()
        bias = out[3].zero_() if direct else torch.zeros(c.copies, *shape, dtype=compute)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    room, (fields, table) = workspace(c.room), c.memory(options[1], 0)
    kernel = _kernel("attention_backward", "i" * 22 + "fff", query.dtype)
    kernel(c.threads, fields.buffer_info()[0], table.buffer_info()[0], len(c.lq), c.chains.buffer_info()[0], c.number,
           query.data_ptr(), key.data_ptr(), value.data_ptr(), _address(mask), _address(slopes), output.data_ptr(),
           stats.data_ptr(), grad.data_ptr(),
           _address(grad_lse), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), _address(bias), room, room + c.packed,
           room + c.scratch, options[2], options[7], 1.0 / (1.0 - options[0]))
    if bias is not None and not direct:
        out[3].copy_(bias.sum(0).reshape(out[3].shape))


KERNELS: dict[str, Callable[..., None]] = {
    "attention": attention, "attention_lse": attention_lse, "attention_backward": attention_backward,
}

# The automatic choice, not a limit: below so many multiplications torch's call is the shorter one, and autograd's way back too.
_SHORTER = 1 << 18, 1 << 20


def _few(query: Tensor, key: Tensor, value: Tensor, mask: Any, slopes: Any, offsets_q: Any, offsets_k: Any, dropout: float,
         seed: int, scale: float, left: int, right: int, *rest: Any) -> str | None:
    """Of calls that torch's own function serves; not with masks, as rows might see nothing, nor dropout, which draws others. Of
    keys and values that differ in length it reads as many of both, and a scale of 0 or less makes NaN of what is_causal hides."""
    plain = mask is slopes is offsets_q is offsets_k is None and not dropout and left == -1 and right in (-1, 0) and not any(rest)
    if plain and key.shape[-2:-1] == value.shape[-2:-1] and scale > 0:
        size = query.numel() * key.shape[-2] * 2 if key.dim() > 1 else 0
        return torch_is_shorter(query, *_SHORTER, size=size) if size else None
    return None


#: When the automatic choice is torch, by measurement: op → (*args) → the reason, or None.
TORCH_IS_FASTER = {"attention": _few}
