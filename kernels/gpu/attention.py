"""Attention on the GPU: which rows and keys a program takes, and how many share a row's keys. The kernels: attention_code.

Extra memory is linear in the lengths: some numbers a row in the backward, and float32 sums for the gradients of queries that
programs add to; for few queries what each share of the keys came to; and for the gradient of a mask that all rows or all keys
share, that of each head. (A mask with a gradient that some of several batch dimensions share, and others do not, is the
exception: each head has a copy.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import dropout_keys
from ..reference.attention import Options
from . import attention_code as code
from .engine import launch, tune
from .engine.launch import power_of_two, signed
from .matmul import precision

_LOG2_E = 1.4426950408889634
_FEW = 64  # rows of queries that share keys, up to which one program takes them all
_SHARE = 256  # the fewest keys that are worth a program


class Blocks(NamedTuple):
    """Rows and keys of a program, its warps, and how many blocks of the loop are loaded ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


class Table(NamedTuple):
    """By the larger head size, up to 64, 128 and 256. Found by compiling: no more is spilled than the tests allow."""

    ampere: tuple[Blocks, ...]  # numbers of 16 bits, by chip; also what Hopper has if a logit is much more than its product
    hopper: tuple[Blocks, ...]  # where products read shared memory, 64 rows at a time
    blackwell: tuple[Blocks, ...]
    amd: tuple[Blocks, ...]
    terms: tuple[Blocks, ...]  # of 32 on Hopper, as tf32 or in terms of 16 bits, up to 64 and 128
    wide: tuple[Blocks, ...]  # of 32, as they are and on all others


_FORWARD = Table(
    ampere=(Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2)),
    hopper=(Blocks(128, 128, 8, 2), Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2)),
    blackwell=(Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2)),
    amd=(Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2)),
    terms=(Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 1)),
    wide=(Blocks(32, 32, 8, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
)
_QUERIES = Table(
    ampere=(Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 1)),
    hopper=(Blocks(128, 32, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2)),
    blackwell=(Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 1)),
    amd=(Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 1)),
    terms=(Blocks(128, 32, 8, 1), Blocks(128, 32, 8, 1)),
    wide=(Blocks(32, 32, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
)
_KEYS = Table(
    ampere=(Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2), Blocks(32, 32, 8, 1)),
    hopper=(Blocks(64, 128, 8, 2), Blocks(64, 128, 8, 2), Blocks(32, 32, 8, 1)),
    blackwell=(Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 1), Blocks(32, 32, 8, 1)),
    amd=(Blocks(32, 64, 4, 1), Blocks(32, 32, 4, 1), Blocks(16, 32, 4, 1)),
    terms=(Blocks(32, 64, 8, 1), Blocks(32, 32, 8, 1)),
    wide=(Blocks(32, 32, 8, 1), Blocks(32, 16, 8, 1), Blocks(16, 16, 8, 1)),
)


def _four(t: Tensor, batch: torch.Size, dims: int = 3) -> Tensor:
    """With one batch dimension before the last ``dims``; copied only where the batch's own do not merge."""
    t = t if t.dim() >= dims else t.reshape(*[1] * (dims - t.dim()), *t.shape)
    return t.expand(*batch, *t.shape[-dims:]).reshape(batch.numel(), *t.shape[-dims:])


def _is_near(t: Tensor) -> bool:
    """Whether any 256 rows of heads lie within what 31 bits count."""
    return 256 * (abs(t.stride(-2)) + abs(t.stride(-1))) < 2**31


def _rising(offsets: Tensor | None, length: int) -> Tensor | None:
    """Offsets as they have to be, from 0 to the length, whatever they are: nobody looked at them."""
    if offsets is None or len(offsets) < 2:
        return offsets
    found = offsets.clamp(0, length)
    found[0], found[-1] = 0, length
    return found.cummax(0).values


def order_matters() -> bool:
    return torch.are_deterministic_algorithms_enabled()


class Call:
    """What forward and backward have in common: tensors with one batch dimension, and the kernels' arguments."""

    def __init__(self, o: Options, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None,
                 offsets_q: Tensor | None, offsets_k: Tensor | None) -> None:
        self.batch = batch = query.shape[:-3]
        self.query, self.key, self.value = q, k, v = [_four(t, batch) for t in (query, key, value)]
        self.items, self.heads, self.lq, self.d = q.shape
        self.lk, self.dv = v.shape[-2:]
        self.group = self.heads // k.shape[1]
        self.rows = self.items * self.heads * self.lq
        self.mask = mask
        kind: int = code.LEFT.value * (o.left >= 0) | code.RIGHT.value * (o.right >= 0) | code.PREFIX.value * (o.prefix > 0)
        if o.left < 0 and o.right < 0:
            kind &= ~code.PREFIX.value  # all see all
        if mask is not None:
            kind |= code.BOOLEAN.value if mask.dtype == torch.bool else code.ADDITIVE.value
            self.mask = _four(mask, batch).expand(self.items, self.heads, self.lq, self.lk)
            if mask.dtype == torch.bool:
                self.mask = self.mask.view(torch.uint8)
        if slopes is not None:
            kind |= code.SLOPES.value
            slopes = slopes.float()
            slopes = slopes.expand(*batch, self.heads).reshape(self.items, self.heads)
        self.slopes, self.offsets = slopes, (_rising(offsets_q, self.lq), _rising(offsets_k, self.lk))
        if offsets_q is not None:
            kind |= code.VARLEN.value
        if o.dropout:
            kind |= code.DROPOUT.value
        if o.softcap:
            kind |= code.SOFTCAP.value
        elif slopes is None and not kind & code.ADDITIVE.value and o.scale > 0:
            kind |= code.LINEAR.value
        self.bd, self.bv = power_of_two(self.d, 16), power_of_two(self.dv, 16)
        kind |= code.EVEN_D.value * (self.bd == self.d) | code.EVEN_V.value * (self.bv == self.dv)
        kind |= code.NEAR.value * all(_is_near(t) for t in (q, k, v))
        self.kind = kind
        self.precision = precision(q)
        inner = o.scale / o.softcap if o.softcap else 1.0
        self.outer = outer = (o.softcap or o.scale) * _LOG2_E
        least = min(round(o.dropout * 2**32), 2**32 - 1)
        left, right, prefix = (min(n, self.lq + self.lk) for n in (o.left, o.right, o.prefix))  # positions are 32 bits
        self.numbers = (self.lq, self.lk, self.rows, self.d, self.dv, inner, outer, int(o.bottom_right), left, right, prefix,
                        *(signed(n) for n in (*dropout_keys(o.seed), least)), 1.0 / (1.0 - o.dropout))
        self.steps = (*q.stride(), *k.stride(), *v.stride())
        self.more_steps = (*(self.mask.stride() if self.mask is not None else (0, 0, 0, 0)),
                           *(slopes.stride() if slopes is not None else (0, 0)))

    def blocks(self, table: Table) -> Blocks:
        size, chip = max(self.bd, self.bv), launch.chip(self.query.device)
        which = 0 if size <= 64 else 1 if size <= 128 else 2
        if chip is launch.STAND_IN:  # few programs cost the interpreter least
            return Blocks(32, 64, 4, 1)
        hopper = 90 <= chip.nvidia < 100 and (not self.heavy or (self.single and table is not _FORWARD))
        if self.query.itemsize == 4:
            few = which == 0 or (which == 1 and self.precision in ("tf32", "bf16x3"))  # three terms each take more room
            few = few and not self.heavy and hopper and self.precision != "ieee"
            found, hopper = table.terms[which] if few else table.wide[which], False
        elif not chip.nvidia:
            found = table.amd[which]
        elif chip.nvidia >= 100:
            found = table.blackwell[which]
        else:
            large = table is _FORWARD and which == 2 and self.kind & (code.LEFT.value | code.BOOLEAN.value)
            found = table.hopper[which] if hopper and not large else table.ampere[which]
            if hopper and which < 2:  # what else a block needs registers for
                kind, whole = self.kind, code.EVEN_D.value | code.EVEN_V.value
                odd = kind & (code.LEFT.value | code.BOOLEAN.value)
                if table is _FORWARD and odd:
                    found = found._replace(keys=64)
                odd |= kind & (code.PREFIX.value | code.VARLEN.value) | ((kind & whole) ^ whole)
                if table is _KEYS and ((which and self.heavy) if kind & code.SUMMED.value else self.heavy or (which and odd)):
                    found = found._replace(rows=32)
        if self.heavy and chip.nvidia and not hopper:
            found = found._replace(warps=8, stages=1 if table is _KEYS else min(found.stages, 2))
        return found

    @property
    def heavy(self) -> bool:
        """Whether a logit needs registers for more than its product"""
        return not self.kind & code.LINEAR.value or bool(self.kind & code.DROPOUT.value)

    @property
    def single(self) -> bool:
        """Whether it is one thing that a logit needs more registers for"""
        one = self.kind & (code.DROPOUT.value | code.SLOPES.value | code.ADDITIVE.value)
        more = code.SOFTCAP.value | code.LEFT.value | code.PREFIX.value | code.VARLEN.value
        return one & (one - 1) == 0 and not self.kind & more

    @property
    def hopper(self) -> bool:
        """Whether products are of 16-bit numbers and asynchronous"""
        return 90 <= launch.chip(self.query.device).nvidia < 100 and self.query.itemsize == 2

    def behind(self, rows: int) -> bool:
        """Whether the forward's products with values are worth a block's delay: all of it fits into registers."""
        return self.hopper and rows >= 64 and max(self.bd, self.bv) <= 128 and not self.kind & code.PREFIX.value

    @property
    def terms(self) -> bool:
        """Whether matrix units subtract a row's numbers in the backward: nothing is done to a product before"""
        return self.hopper and not self.heavy and self.outer > 1e-30  # else what is subtracted, over it, may overflow

    @property
    def summed(self) -> bool:
        """Whether the gradients of queries are added up in memory, as programs come: not where the order matters"""
        return self.hopper and max(self.bd, self.bv) <= 128 and not order_matters()

    def tuned(self, kernel: str, table: Table, kind: int, run: Callable[[Blocks], object]) -> Blocks:
        """The table's blocks, or the best of them and their kin: with other warps, or loaded less or further ahead."""
        block = self.blocks(table)
        if not tune.ON:
            return block
        few = [block, block._replace(warps=12 - block.warps)]
        few += [block._replace(stages=n) for n in (1, 2, 3) if n != block.stages]
        few += [block._replace(rows=block.rows // 2)] if block.rows > 16 else []
        few += [block._replace(keys=block.keys // 2)] if block.keys > 16 else []
        sizes = (self.items * self.heads, self.group, self.lq, self.lk, self.d, self.dv)
        options = self.query.dtype, self.precision, kind
        return tune.choose(kernel, launch.chip(self.query.device), options, sizes, block, few, run)

    def constants(self, block: Blocks) -> dict[str, Any]:
        return {"PRECISION": self.precision, "BD": self.bd, "BV": self.bv, "num_warps": block.warps, "num_stages": block.stages}

    def tasks(self, which: int, unit: int, length: int) -> tuple[Tensor | None, int]:
        """(a list of (sequence, block) pairs, or None without offsets; how many): blocks of ``unit`` queries (0) or keys (1).

        As many as there may be at most, for how many there are is known to the GPU alone: those too many lie beyond their
        sequence.
        """
        offsets = self.offsets[which]
        if offsets is None:
            return None, -(-length // unit)
        sequences = len(offsets) - 1
        if sequences == 0:
            return None, 0
        number = length // unit + sequences
        ends = ((offsets[1:] - offsets[:-1] + unit - 1) // unit).cumsum(0)
        index = torch.arange(number, device=offsets.device)
        sequence = torch.searchsorted(ends, index, right=True).clamp_(max=sequences - 1)
        begins = torch.nn.functional.pad(ends, (1, 0))[sequence]
        return torch.stack([sequence, index - begins], 1).int(), number


def _attend(out: Tensor, lse: Tensor | None, stats: Tensor, *args: Any) -> None:
    c = Call(Options(*args[7:]), *args[:7])
    if not out.numel() or not c.lk or (c.offsets[0] is not None and len(c.offsets[0]) < 2):
        out.zero_()
        stats[0].fill_(-torch.inf)
        stats[1].zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    kind = c.kind | (code.LSE.value if lse is not None else 0)

    def other(block: Blocks) -> None:
        _forward(c, torch.empty_like(out), lse if lse is None else torch.empty_like(lse), torch.empty_like(stats), kind, block)

    _forward(c, out, lse, stats, kind, c.tuned("attention", _FORWARD, kind, other))


def _forward(c: Call, out: Tensor, lse: Tensor | None, stats: Tensor, kind: int, table: Blocks) -> None:
    to = _four(out, c.batch)
    length, heads, splits = c.lq, c.heads, 1
    packed = c.group * c.lq
    if c.offsets[0] is None and packed <= _FEW:
        kind |= code.PACK.value
        length, heads = packed, heads // c.group
        ahead = 3 if max(c.bd, c.bv) <= 64 else table.stages
        table = table._replace(rows=min(table.rows, power_of_two(packed, 16)), keys=min(table.keys, 64), warps=4, stages=ahead)
    if c.offsets[0] is None:
        programs = c.items * heads * -(-length // table.rows)
        splits = max(1, min(2 * launch.chip(out.device).processors // programs, c.lk // _SHARE))
    kind |= code.BEHIND.value * c.behind(table.rows)
    tasks, blocks = c.tasks(0, table.rows, length)
    part = part_stats = None
    if splits > 1:
        kind |= code.SPLIT.value
        part = out.new_empty(splits, c.rows, c.bv, dtype=torch.float32)
        part_stats = out.new_empty(splits, 2, c.rows, dtype=torch.float32)
    programs = c.items * heads * blocks * splits
    launch.run(code.forward, programs, out.device, c.query, c.key, c.value, c.mask, c.slopes, to, lse, stats, part, part_stats,
               tasks, *c.offsets, *c.steps, *to.stride()[:3], *c.more_steps, c.heads, c.group, blocks, *c.numbers, splits,
               KIND=kind, BM=table.rows, BN=table.keys, **c.constants(table))
    if splits > 1:
        launch.run(code.join, c.rows, out.device, part, part_stats, to, lse, stats, *to.stride()[:3], c.heads, c.lq, c.rows, c.dv,
                   c.numbers[-1], splits, KIND=kind, SPLITS=power_of_two(splits), BV=c.bv, num_warps=1)


def attention(out: tuple[Tensor, Tensor], *args: Any) -> None:
    """(softmax(query keyᵀ · scale + …) value, each row's log-sum-exp in two parts)"""
    _attend(out[0], None, out[1], *args)


def attention_lse(out: tuple[Tensor, Tensor, Tensor], *args: Any) -> None:
    """The same, with the log-sum-exp as a number between the two"""
    _attend(*out, *args)


def attention_backward(out: tuple[Tensor, Tensor, Tensor, Tensor], grad: Tensor, *args: Any) -> None:
    """The gradients of query, key, value and, if it is needed, of an additive mask"""
    output, stats, grad_lse, needs_mask = args[7:11]
    o = Options(*args[11:])
    c = Call(o, *args[:7])
    if not grad.numel() or not c.lk or (c.offsets[0] is not None and len(c.offsets[0]) < 2):
        for t in out:
            t.zero_()
        return
    device = grad.device
    grad, output = _four(grad, c.batch), _four(output, c.batch)
    dq = _four(out[0], c.batch)
    # Keys and values that batch items share have a gradient each, which are then added up.
    dk, dv = _for_each(out[1], c.key), _for_each(out[2], c.value)
    c.kind |= code.TERMS.value * c.terms | code.SUMMED.value * c.summed
    sums = stats.new_empty(c.items * c.heads, c.lq, c.bd) if c.summed else None
    numbers = stats.new_empty(c.rows, 32, dtype=torch.bfloat16) if c.terms else stats.new_empty(3, c.rows)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    if not _is_near(grad):
        c.kind &= ~code.NEAR.value
    kind = c.kind | (code.LSE.value if grad_lse is not None else 0)

    def queries(block: Blocks) -> None:
        tasks, blocks = c.tasks(0, block.rows, c.lq)
        launch.run(code.backward_queries, c.items * c.heads * blocks, device, c.query, c.key, c.value, c.mask, c.slopes, output,
                   grad, grad_lse, stats, numbers, dq, tasks, *c.offsets, *c.steps, *output.stride(), *grad.stride(),
                   *dq.stride()[:3], *c.more_steps, c.heads, c.group, blocks, *c.numbers, o.scale, KIND=kind, BM=block.rows,
                   BN=block.keys, **c.constants(block))

    def keys(block: Blocks) -> None:
        tasks, blocks = c.tasks(1, block.keys, c.lk)
        launch.run(code.backward_keys, c.items * (c.heads // c.group) * blocks, device, c.query, c.key, c.value, c.mask, c.slopes,
                   grad, numbers, sums, dk, dv, tasks, *c.offsets, *c.steps, *grad.stride(), *dk.stride()[:3], *dv.stride()[:3],
                   *c.more_steps, c.heads, c.group, blocks, *c.numbers, o.scale, KIND=c.kind, BM=block.rows, BN=block.keys,
                   **c.constants(block))

    if sums is None:
        queries(c.tuned("attention backward, queries", _QUERIES, kind, queries))
        keys(c.tuned("attention backward, keys", _KEYS, c.kind, keys))
    else:
        launch.allow_descriptors()
        table = c.tuned("attention backward", _KEYS, c.kind, keys)  # before the zeros, since it adds to the sums
        launch.run(code.backward_rows, -(-c.rows // 16), device, output, grad, grad_lse, stats, numbers, sums, *output.stride(),
                   *grad.stride(), c.heads, c.lq, c.rows, c.dv, c.outer, KIND=kind, BM=16, BD=c.bd, BV=c.bv, num_warps=4)
        keys(table)
        torch.mul(sums[..., : c.d].view(dq.shape), o.scale, out=dq)
    for t, each in ((out[1], dk), (out[2], dv)):
        if each.data_ptr() != t.data_ptr():
            t.copy_(each.reshape(*c.batch, *each.shape[1:]).sum_to_size((1,) * (3 - t.dim()) + tuple(t.shape)).reshape(t.shape))
    if needs_mask:
        _mask_gradient(c, out[3], args[3], grad, numbers)


def _for_each(t: Tensor, full: Tensor) -> Tensor:
    """The output, with one batch dimension; or room for a gradient of each batch item, where they share it."""
    return _four(t, t.shape[:-3]) if t.shape[:-3].numel() == full.shape[0] else full.new_empty(full.shape)


def _mask_gradient(c: Call, out: Tensor, mask: Tensor, grad: Tensor, numbers: Tensor) -> None:
    """Each element has a program that adds up what batch items and heads do to it; where all queries or all keys share it, each
    head has an element of its own first."""
    shape = (1,) * (len(c.batch) + 3 - mask.dim()) + tuple(mask.shape)
    items, (heads, lq, lk) = shape[:-3], shape[-3:]
    all_q, all_k = lq == 1 < c.lq, lk == 1 < c.lk
    block = c.blocks(_QUERIES)
    sequences = 1 if c.offsets[0] is None else len(c.offsets[0]) - 1
    one_batch = torch.Size(items) in (c.batch, torch.Size([1] * len(items)))
    own = all_q or all_k or not one_batch
    nb, nh = (1, 1) if own else (c.items if items != tuple(c.batch) else 1, c.heads if heads == 1 else 1)
    if own:
        dm = numbers.new_zeros(max(c.items, sequences if all_q and all_k else 1), c.heads, lq, lk)
    else:
        dm = out.zero_() if c.offsets[0] is not None else out
        dm = dm.view(-1, heads, lq, lk)
    strides = dm.stride()
    if c.offsets[0] is not None and not (all_q and all_k):
        strides = (0, *strides[1:])
    if all_q and c.offsets[0] is not None:
        index = torch.arange(sequences, device=out.device, dtype=torch.int32)
        tasks: Tensor | None = torch.stack([index, torch.zeros_like(index)], 1)
        blocks = sequences
    else:
        tasks, blocks = (None, 1) if all_q else c.tasks(0, block.rows, c.lq)
    k_blocks = 1 if all_k else -(-c.lk // block.keys)
    launch.run(code.backward_mask, c.items // nb * (c.heads // nh) * blocks * k_blocks, out.device, c.query, c.key, c.value,
               c.mask, c.slopes, grad, numbers, dm, tasks, *c.offsets, *c.steps, *grad.stride(), *strides, *c.more_steps,
               c.heads,
               c.group, blocks, *c.numbers, nb, nh, k_blocks, ALL_Q=all_q, ALL_K=all_k, KIND=c.kind, BM=block.rows, BN=block.keys,
               **c.constants(block))
    if own:
        dm = dm.sum(0, keepdim=True) if len(dm) > c.items else dm
        out.copy_(dm.reshape(*c.batch, *dm.shape[1:]).sum_to_size(shape).reshape(out.shape))


def supports(op: str, *args: Any) -> str | None:
    """Why not, in a sentence"""
    query, key, value, mask, slopes, *offsets = args[op == "attention_backward":][:7]
    reason = launch.refuses(query, key, value, mask, slopes, *offsets)
    if reason is None and max(query.shape[-1], value.shape[-1]) > 256:
        reason = f"heads of up to 256 numbers, not {max(query.shape[-1], value.shape[-1])}, fit into a program's memory"
    return reason


KERNELS: dict[str, Callable[..., None]] = {
    "attention": attention, "attention_lse": attention_lse, "attention_backward": attention_backward,
}
