"""Matrix products on the CPU: which kernel serves a call, and how the work is cut.

Four kernels, written in ``matmul_code``: ``product`` (the blocked product), ``rows_dot`` and ``rows_sum`` (a matrix and a few
vectors: memory sets the pace, so the matrix is read once, in place), and ``pack`` (a weight into panels, for keeps).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .engine import overhead, packed, threads
from .engine.activation_codes import CODES
from .engine.build import Kernel, made_by
from .engine.host import caches, simd
from .engine.workspace import workspace


class Format(NamedTuple):
    """What the host has to know of the kernels of one dtype; sizes in bytes."""

    name: str
    size: int  # of an element in memory
    unit: int  # of a packed element: float32 for the half types, a pair where the CPU multiplies pairs of bfloat16
    lanes: int
    rows: int
    vecs: int
    half: bool
    pairs: bool


_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SCRATCH = 64 << 10  # a thread's room for tiles that wait for their epilogue
_TASK = 2 << 20  # multiplications that a thread takes on at once: about 40 µs
_TASKS = 32  # for each thread, at most: more would bring nothing
_SERIAL = 1 << 19  # multiplications below which a second thread costs more than it brings
_LONG = 4096  # a sum long enough to be worth dividing among threads
_REUSE = 16  # tiles of rows that read B where it lies: for more of them it is packed
_DEPTH = 512  # of a block of planes: deeper ones are narrow, and use little of a page
_SMALL_WEIGHT = 32768  # elements below which packing anew is cheaper than looking the packed weight up


@cache
def _format(dtype: torch.dtype) -> Format:
    s = simd()
    size = dtype.itemsize
    unit = max(4, size)
    return Format(_NAMES[dtype], size, unit, s.width // unit, 8 if s.registers == 32 else 4, 3, size == 2,
                  dtype is torch.bfloat16 and s.bf16_dot)


def _kernel(kind: str, dtype: torch.dtype, signature: str, *flags: str) -> Kernel:
    f = _format(dtype)
    return Kernel(f"{kind}_{f.name}", signature, made_by("matmul_code", kind, f.name, *(getattr(f, flag) for flag in flags)))


_PRODUCT = {d: _kernel("product", d, "i" * 37 + "f" * 4, "pairs") for d in _NAMES}
_ROWS_DOT = {d: _kernel("rows_dot", d, "i" * 21 + "f" * 4) for d in _NAMES}
_ROWS_SUM = {d: _kernel("rows_sum", d, "i" * 15 + "f" * 4) for d in _NAMES}
_PACK = {d: _kernel("pack_weight", d, "i" * 8, "pairs") for d in _NAMES}


@cache
def _blocks(f: Format) -> tuple[int, int]:
    """(rows of A, depth) of a block: a panel of B takes three sixteenths of L2, a block of A three eighths."""
    l2 = caches().l2
    depth = max(64, l2 * 3 // 16 // (f.vecs * f.lanes * f.unit) // 64 * 64)
    return max(f.rows, l2 * 3 // 8 // (depth * f.unit) // f.rows * f.rows), depth


def _panels(f: Format, n: int, parts: int) -> int:
    """Panels that n columns are cut into: at most ``vecs`` vectors each, their number a multiple of ``parts`` where it can be."""
    vectors = -(-n // f.lanes)
    return min(vectors, -(-max(1, -(-vectors // f.vecs)) // parts) * parts)


def _grid(f: Format, batch: int, m: int, k: int, cut: int, mc: int, nt: int, pack_a: bool,
          step: int) -> tuple[int, int]:
    """Parts that the rows and the ``cut`` panels of each product are divided into: the tasks that nt threads take.

    Many, so that a thread that is slowed down leaves more of them to the others, and a multiple of nt if they are few.
    """
    if nt == 1 or batch >= 4 * nt or batch % nt == 0:
        return 1, 1
    most = 4 if pack_a else _TASKS  # each task packs its A
    tasks = -(-min(most * nt, max(nt, m * cut * f.vecs * f.lanes * k // _TASK)) // nt) * nt
    rows = -(-m // step)
    tm = min(rows, max(-(-m // mc), -(-tasks // cut)))
    tn = next((d for d in range(1, cut + 1) if cut % d == 0 and tm * d >= tasks), cut)
    if tm * tn % nt:
        tm = min(rows, -(-tm // nt) * nt)
    return tm, tn


class Epilogue(NamedTuple):
    """act(alpha · A B + bias + beta · residual); the residual's strides are in elements and it has the output's shape."""

    bias: Tensor | None = None
    residual: Tensor | None = None
    alpha: float = 1.0
    beta: float = 1.0
    act: int = 0
    p0: float = 0.0
    p1: float = 0.0


_PLAIN = Epilogue()


def _batched(t: Tensor, batch: torch.Size) -> Tensor:
    return t.expand(*batch, *t.shape[-2:]) if t.dim() - 2 != len(batch) or t.shape[:-2] != batch else t


def _offsets(t: Tensor | None, batch: torch.Size) -> Tensor:
    """Byte offsets of the matrices of a broadcast batch."""
    offset = torch.zeros(batch, dtype=torch.int64)
    if t is not None:
        for d, size in enumerate(batch):
            steps = torch.arange(size, dtype=torch.int64) * (t.stride(d) * t.itemsize)
            offset += steps.reshape(-1, *(1,) * (len(batch) - 1 - d))
    return offset.reshape(-1)


def _multiply(out: Tensor, a: Tensor, b: Tensor, e: Epilogue = _PLAIN, weight: Tensor | None = None) -> None:
    """out[…, m, n] = epilogue(a[…, m, k] @ b[…, k, n]); batch dimensions broadcast; out is contiguous.

    ``weight`` is the tensor whose transpose b is, if its packing may be kept.
    """
    m, n = out.shape[-2:]
    k = a.shape[-1]
    if out.numel() == 0:
        return
    dtype = a.dtype
    size = dtype.itemsize
    res = e.residual
    batch = out.shape[:-2]
    count = out.numel() // (m * n)
    if count > 1 and b.dim() == 2 and a.is_contiguous() and (res is None or res.is_contiguous()):
        # One matrix on the right: the batch is only more rows.
        m *= count
        a, count, batch = a.view(m, k), 1, batch[:0]
        res = res.view(m, n) if res is not None else None
    table = a_b = b_b = r_b = 0
    if count > 1:
        a, b = _batched(a, batch), _batched(b, batch)
        if len(batch) == 1:
            a_b, b_b, r_b = a.stride(0) * size, b.stride(0) * size, 0 if res is None else res.stride(0) * size
        elif not (a.is_contiguous() and b.is_contiguous() and (res is None or res.is_contiguous())):
            offsets = torch.stack([_offsets(a, batch), _offsets(b, batch), _offsets(res, batch)], 1)
            table = offsets.data_ptr()
        else:
            a_b, b_b, r_b = m * k * size, k * n * size, m * n * size
    r = r_m = r_n = 0
    if res is not None:
        r, r_m, r_n = res.data_ptr(), res.stride(-2) * size, res.stride(-1) * size
        if r_n not in (0, size):
            res = res.clone(memory_format=torch.contiguous_format)  # contiguous() leaves a column of any stride as it is
            return _multiply(out, a, b, e._replace(residual=res), weight)
    multiply(dtype, weight, count, table, m, n, k, a.data_ptr(), a_b, a.stride(-2) * size, a.stride(-1) * size,
         b.data_ptr(), b_b, b.stride(-2) * size, b.stride(-1) * size, out.data_ptr(),
         0 if e.bias is None else e.bias.data_ptr(), r, r_b, r_m, r_n, e.act, e.alpha, e.beta, e.p0, e.p1)


def multiply(dtype: torch.dtype, weight: Tensor | None, count: int, table: int, m: int, n: int, k: int,
         a: int, a_b: int, a_m: int, a_k: int, b: int, b_b: int, b_k: int, b_n: int, c: int,
         bias: int = 0, r: int = 0, r_b: int = 0, r_m: int = 0, r_n: int = 0, act: int = 0,
         alpha: float = 1.0, beta: float = 0.0, p0: float = 0.0, p1: float = 0.0, bias_m: int = 0,
         planes: bool = False) -> None:
    """``count`` products of addresses and byte strides by the kernel that suits their shape; the outputs are contiguous.

    With ``bias_m`` the bias is one of rows, so many bytes apart, each of them as long as a panel is wide (float32, float64).
    ``planes``: B's rows are long and A is read by all products, so that B is packed for all of A's rows in a block that stays in
    L2, while the next one is fetched.
    """
    size = dtype.itemsize
    nt = 1 if count * m * n * k < _SERIAL else threads.count()

    # A matrix and a vector, or few enough vectors that reading the matrix is most of the work.
    if table == 0 and k > 0 and not bias_m:
        if m <= 4 and (b_k == size or k == 1) and (a_k == size or k == 1):
            return _ROWS_DOT[dtype].run(nt, count, m, n, k, b, b_b, b_n, a, a_b, a_m, c, m * n * size, n * size, bias,
                                        r, r_b, r_m, r_n, act, workspace(nt * _SCRATCH), alpha, beta, p0, p1)
        if n == 1 and bias == 0 and r == 0 and (b_k == size or k == 1):
            if a_k == size:
                return _ROWS_DOT[dtype].run(nt, count, 1, m, k, a, a_b, a_m, b, b_b, 0, c, m * size, 0, 0, 0, 0, 0, 0,
                                            act, workspace(nt * _SCRATCH), alpha, beta, p0, p1)
            if a_m == size and count == 1:
                return _rows_sum(dtype, nt, m, k, a, a_k, b, b_k, c, 0, 0, 0, act, alpha, beta, p0, p1)
        if m == 1 and b_n == size and count == 1:
            return _rows_sum(dtype, nt, n, k, b, b_k, a, a_k, c, bias, r, r_n, act, alpha, beta, p0, p1)

    keep = None if weight is None or k * n < _SMALL_WEIGHT else _kept(weight, n, k, b_k, b_n)
    plan = _plan(dtype, count, m, n, k, nt, keep is not None, b_n == size, a_k == size, planes)
    tm, tn, group, cut, direct, mc, kc, pack_a, need, share = plan
    if tm * tn < nt and count == 1 and k >= _LONG and size >= 4 and not (bias or r or act) and alpha == 1.0:
        return _split_k(dtype, nt, m, n, k, a, a_m, a_k, b, b_k, b_n, c)
    room = workspace(need * nt + share)
    _PRODUCT[dtype].run(
        nt, count * tm * tn, tm, tn, group, table, m, n, k, a, a_b, a_m, a_k, b, b_b, b_k, b_n,
        0 if keep is None else keep.address, room + need * nt if share else 0, cut if keep is None else keep.cut, direct,
        c, m * n * size, n * size, bias, bias_m, r, r_b, r_m, r_n, act, int(act > 0 or r != 0 or alpha != 1.0), mc, kc, pack_a,
        room, need, alpha, beta, p0, p1)


@lru_cache(4096)
def _plan(dtype: torch.dtype, count: int, m: int, n: int, k: int, nt: int, kept: bool, b_rows: bool,
          a_rows: bool, planes: bool) -> tuple[int, ...]:
    """(tm, tn, group, cut, direct, mc, kc, pack_a, bytes of scratch a thread, and for all): how a product is cut and packed.

    ``b_rows``, ``a_rows``: the operand's elements lie next to each other along its last dimension.
    """
    f = _format(dtype)
    depth = max(1, (k + 1) // 2 if f.pairs else k)
    direct = not kept and b_rows and not f.half and m <= _REUSE * f.rows
    mc, kc = _blocks(f)
    if f.half:  # the sums stay in float32 until they are whole
        kc = depth
        mc = max(f.rows, caches().l2 * 3 // 8 // (kc * f.unit) // f.rows * f.rows)
    else:
        kc = -(-depth // -(-depth // kc))
    # A transposed A (a weight's gradient) is worth a copy where enough panels read it: 98 → 153 GFLOP/s at 1024×1600×256.
    pack_a = (not f.pairs or k % 2 == 1 or not a_rows) if f.half else not a_rows and n > 64
    cut = _panels(f, n, nt)
    group = 0
    if planes:
        kc, group = _columns(f, k)
        direct, tm, tn = False, 1, min(max(1, cut // group), 1 if count % nt == 0 else 2 * nt)
    else:
        tm, tn = _grid(f, count, m, kc if not (kept or direct) else depth, cut, mc, nt, pack_a,
                       64 // f.size if pack_a and not a_rows else f.rows)
    need, share = _SCRATCH, 0
    if pack_a:
        need += (mc + 2 * f.lanes) * kc * f.unit
    if not (kept or direct):
        if group:
            need += group * f.vecs * f.lanes * kc * f.unit
        elif count == 1:
            share = -(-n // f.lanes) * f.lanes * kc * f.unit
        else:
            need += (-(-n // f.lanes) // tn + 2 * f.vecs) * f.lanes * kc * f.unit
    return tm, tn, group, cut, int(direct), mc, kc, int(pack_a), -(-need // 4096) * 4096, share


def _columns(f: Format, k: int) -> tuple[int, int]:
    """(depth, panels) of a block of B that is packed at once, in a quarter of L2."""
    kc = -(-k // -(-k // _DEPTH))
    return kc, max(1, caches().l2 // 4 // (kc * f.vecs * f.lanes * f.unit))


def _rows_sum(dtype: torch.dtype, nt: int, n: int, k: int, w: int, w_k: int, x: int, x_k: int, c: int,
              bias: int = 0, r: int = 0, r_n: int = 0, act: int = 0,
              alpha: float = 1.0, beta: float = 0.0, p0: float = 0.0, p1: float = 0.0) -> None:
    """c[n] = epilogue(Σ x[k] · w[k, :]); x = 0: the sum of the rows."""
    f = _format(dtype)
    row = -(-n * f.unit // 64) * 64 + 64
    split = n < f.lanes * 4 * nt and k > n
    _ROWS_SUM[dtype].run(nt, int(split), n, k, w, w_k, x, x_k, c, bias, r, r_n, act, workspace(2 * row * nt), row,
                         alpha, beta, p0, p1)


def _split_k(dtype: torch.dtype, parts: int, m: int, n: int, k: int, a: int, a_m: int, a_k: int, b: int, b_k: int, b_n: int,
             c: int) -> None:
    """A small output and a long sum: each thread sums a stretch of k, and the stretches are added in their order."""
    stretch = k // parts
    whole = parts * stretch
    sums = torch.empty(parts + (whole < k), m, n, dtype=dtype)
    multiply(dtype, None, parts, 0, m, n, stretch, a, stretch * a_k, a_m, a_k, b, stretch * b_k, b_k, b_n, sums.data_ptr())
    if whole < k:
        multiply(dtype, None, 1, 0, m, n, k - whole, a + whole * a_k, 0, a_m, a_k, b + whole * b_k, 0, b_k, b_n,
             sums[parts].data_ptr())
    _rows_sum(dtype, 1, m * n, len(sums), sums.data_ptr(), m * n * dtype.itemsize, 0, 0, c)


def _kept(weight: Tensor, n: int, k: int, b_k: int, b_n: int) -> packed.Packing | None:
    """The kept packing of a weight that has been seen before, unchanged."""
    if weight.is_inference() or not weight.is_contiguous():
        return None
    f = _format(weight.dtype)
    cut = _panels(f, n, threads.count())
    depth = (k + 1) // 2 if f.pairs else k

    def pack(address: int) -> int:
        _PACK[weight.dtype].run(threads.count(), n, k, weight.data_ptr(), b_k, b_n, cut, address)
        return cut
    return packed.get(weight, -(-n // f.lanes) * f.lanes * depth * f.unit, pack)


# The operators -------------------------------------------------------------------------------------------------------


def matmul(out: Tensor, input: Tensor, other: Tensor) -> None:
    """out = input @ other, as torch.matmul: vectors, matrices and broadcast batches."""
    if input.dim() == 2 and other.dim() == 2:  # the usual case, without a detour
        if out.numel():
            dtype = input.dtype
            size = dtype.itemsize
            (m, k), n = input.shape, other.shape[1]
            a_m, a_k = input.stride()
            b_k, b_n = other.stride()
            multiply(dtype, None, 1, 0, m, n, k, input.data_ptr(), 0, a_m * size, a_k * size,
                 other.data_ptr(), 0, b_k * size, b_n * size, out.data_ptr())
        return
    if input.dim() == 1:
        input, out = input.unsqueeze(0), out.unsqueeze(-2 if other.dim() > 1 else 0)
    if other.dim() == 1:
        other, out = other.unsqueeze(-1), out.unsqueeze(-1)
    _multiply(out, input, other)


def addmm(out: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> None:
    """out = beta · input + alpha · mat1 @ mat2. Of what is taken zero times nothing is seen, NaN and Inf either; in torch, and so
    here, a batch's products are taken all the same."""
    if alpha == 0 and mat1.dim() == 2:
        out.zero_() if beta == 0 else torch.mul(input.expand(out.shape), beta, out=out)
        return
    _multiply(out, mat1, mat2, Epilogue(residual=input.expand(out.shape) if beta != 0 else None, alpha=alpha, beta=beta))


def linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
           activation: str | None) -> None:
    """out = act(input Wᵀ + bias + residual). W's packing is kept, from its second call on, until W changes."""
    if residual is None and (bias is None or bias.is_contiguous()) and input.is_contiguous():
        n, k = weight.shape  # the usual case, without a detour
        total = out.numel()
        if total:
            dtype = input.dtype
            size = dtype.itemsize
            b_n, b_k = weight.stride()
            multiply(dtype, weight, 1, 0, total // n, n, k, input.data_ptr(), 0, k * size, size,
                 weight.data_ptr(), 0, b_k * size, b_n * size, out.data_ptr(), 0 if bias is None else bias.data_ptr(),
                 act=CODES[activation] if activation is not None else 0)
            return
    if input.dim() == 1:
        input, out = input.unsqueeze(0), out.unsqueeze(0)
        residual = residual.unsqueeze(0) if residual is not None else None
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    e = _PLAIN if bias is None and residual is None and activation is None else Epilogue(
        bias, residual, act=CODES[activation] if activation is not None else 0)
    _multiply(out, input, weight.t(), e, weight)


KERNELS: dict[str, Callable[..., None]] = {"matmul": matmul, "addmm": addmm, "linear": linear}

# The automatic choice, not a limit: below this product of the operands' sizes a call costs more than the arithmetic, and torch's
# way to its kernel, in C++, is shorter; with a gradient to come there are three products, and autograd's way to and fro besides.
# `bench matmul --case small` shows both sides of it.
TINY, TINY_TRAINING = 1 << 22, 1 << 31


def _tiny(left: Tensor, right: Tensor) -> str | None:
    """Why torch is faster for the product of two operands this small; None if it is not. (In a forked child torch might hang.)"""
    training = (left.requires_grad or right.requires_grad) and torch.is_grad_enabled()
    small = left.numel() * right.numel() <= (TINY_TRAINING if training else TINY)
    if small and overhead.RULES and not threads.forked():
        return "a product this small takes less time in torch than a call of ours"
    return None


def _tiny_linear(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, act: str | None) -> str | None:
    return _tiny(input, weight) if residual is None and act is None else None  # else torch needs several calls


#: When the automatic choice is torch, by measurement: op → (*args) → the reason, or None.
TORCH_IS_FASTER: dict[str, Callable[..., str | None]] = {
    "matmul": _tiny, "linear": _tiny_linear, "addmm": lambda input, mat1, mat2, beta, alpha: _tiny(mat1, mat2),
}
