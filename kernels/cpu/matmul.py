"""Matrix products on the CPU: which kernel serves a call, and how the work is cut.

Four kernels, written in ``matmul_code``: ``product`` (the blocked product), ``rows_dot`` and ``rows_sum`` (a matrix and a few
vectors: memory sets the pace, so the matrix is read once, in place), and ``pack`` (a weight into panels, for keeps).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engine import packed, threads
from .engine.activation_codes import CODES
from .engine.build import Kernel
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
_SERIAL = 1 << 20  # operations below which a second thread costs more than it brings
_LONG = 4096  # a sum long enough to be worth dividing among threads
_SMALL_WEIGHT = 4096  # elements below which packing anew is cheaper than looking the packed weight up


@cache
def _format(dtype: torch.dtype) -> Format:
    s = simd()
    size = dtype.itemsize
    unit = max(4, size)
    return Format(_NAMES[dtype], size, unit, s.width // unit, 8 if s.registers == 32 else 4, 3, size == 2,
                  dtype is torch.bfloat16 and s.bf16_dot)


def _kernel(kind: str, dtype: torch.dtype, signature: str, *flags: str) -> Kernel:
    def make() -> Callable[..., Any]:
        from . import matmul_code

        f = _format(dtype)
        return getattr(matmul_code, kind)(f.name, *(getattr(f, flag) for flag in flags))
    return Kernel(f"{kind}_{_NAMES[dtype]}", signature, make)


_PRODUCT = {d: _kernel("product", d, "i" * 34 + "f" * 4, "pairs") for d in _NAMES}
_ROWS_DOT = {d: _kernel("rows_dot", d, "i" * 21 + "f" * 4) for d in _NAMES}
_ROWS_SUM = {d: _kernel("rows_sum", d, "i" * 15 + "f" * 4) for d in _NAMES}
_PACK = {d: _kernel("pack_weight", d, "i" * 8, "pairs") for d in _NAMES}


@cache
def _blocks(f: Format) -> tuple[int, int]:
    """(rows of A, depth) of a block: a panel of B takes a quarter of L2, a block of A three eighths."""
    l2 = caches().l2
    depth = max(64, l2 // 4 // (f.vecs * f.lanes * f.unit) // 64 * 64)
    return max(f.rows, l2 * 3 // 8 // (depth * f.unit) // f.rows * f.rows), depth


def _panels(f: Format, n: int, parts: int) -> int:
    """Panels that n columns are cut into: at most ``vecs`` vectors each, their number a multiple of ``parts`` where it can be."""
    vectors = -(-n // f.lanes)
    return min(vectors, -(-max(1, -(-vectors // f.vecs)) // parts) * parts)


def _grid(f: Format, batch: int, m: int, n: int, nt: int) -> tuple[int, int]:
    """How many ways to divide the rows and the columns of each product among nt threads."""
    if batch >= 4 * nt or batch % nt == 0:
        return 1, 1
    columns = max(1, -(-n // f.lanes) // f.vecs)
    for tn in range(nt, 0, -1):
        if nt % tn == 0 and tn <= columns:
            return min(nt // tn, -(-m // f.rows)), tn
    return 1, 1


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
    f = _format(a.dtype)
    size = f.size
    res = e.residual
    batch = out.shape[:-2]
    count = out.numel() // (m * n)
    if count > 1 and b.dim() == 2 and a.is_contiguous() and (res is None or res.is_contiguous()):
        # One matrix on the right: the batch is only more rows.
        m *= count
        a, out, count, batch = a.view(m, k), out.view(m, n), 1, batch[:0]
        res = res.view(m, n) if res is not None else None
    table = 0
    a_b = b_b = r_b = 0
    if count > 1:
        a, b = _batched(a, batch), _batched(b, batch)
        if len(batch) == 1:
            a_b, b_b, r_b = a.stride(0) * size, b.stride(0) * size, 0 if res is None else res.stride(0) * size
        elif not (a.is_contiguous() and b.is_contiguous() and (res is None or res.is_contiguous())):
            offsets = torch.stack([_offsets(a, batch), _offsets(b, batch), _offsets(res, batch)], 1)
            table = offsets.data_ptr()
        else:
            a_b, b_b, r_b = m * k * size, k * n * size, m * n * size
    a_m, a_k = a.stride(-2) * size, a.stride(-1) * size
    b_k, b_n = b.stride(-2) * size, b.stride(-1) * size
    r = r_m = r_n = 0
    if res is not None:
        r, r_m, r_n = res.data_ptr(), res.stride(-2) * size, res.stride(-1) * size
        if r_n not in (0, size):
            res = res.clone(memory_format=torch.contiguous_format)  # contiguous() leaves a column of any stride as it is
            return _multiply(out, a, b, e._replace(residual=res), weight)
    bias = 0 if e.bias is None else e.bias.data_ptr()
    scalars = (e.alpha, e.beta, e.p0, e.p1)
    ap, bp, cp = a.data_ptr(), b.data_ptr(), out.data_ptr()
    work = 2 * count * m * n * k
    nt = 1 if work < _SERIAL else threads.count()

    # A matrix and a vector, or few enough vectors that reading the matrix is most of the work.
    if k > 0 and table == 0:
        if m <= 4 and (b_k == size or k == 1) and (a_k == size or k == 1):
            return _ROWS_DOT[a.dtype].run(nt, count, m, n, k, bp, b_b, b_n, ap, a_b, a_m, cp, m * n * size, n * size,
                                      bias, r, r_b, r_m, r_n, e.act, workspace(nt * _SCRATCH), *scalars)
        if n == 1 and bias == 0 and r == 0 and (b_k == size or k == 1):
            if a_k == size:
                return _ROWS_DOT[a.dtype].run(nt, count, 1, m, k, ap, a_b, a_m, bp, b_b, 0, cp, m * size, 0,
                                          0, 0, 0, 0, 0, e.act, workspace(nt * _SCRATCH), *scalars)
            if a_m == size and count == 1:
                return _rows_sum(out, nt, m, k, ap, a_k, bp, b_k, e, bias, 0, 0)
        if m == 1 and b_n == size and count == 1:
            return _rows_sum(out, nt, n, k, bp, b_k, ap, a_k, e, bias, r, r_n)

    if nt > 1 and count == 1 and e is _PLAIN and not f.half and k >= _LONG and _splits_k(f, m, n, nt):
        return _split_k(out, a, b, nt)
    keep = _kept(f, weight, n, k, b_k, b_n) if weight is not None and k * n >= _SMALL_WEIGHT else None
    tm, tn, cut, direct, mc, kc, pack_a, need = _plan(a.dtype, count, m, n, k, nt, keep is not None, b_n == size, a_k == size)
    packed_b = 0
    if keep is not None:
        packed_b, cut = keep.address, keep.cut
    _PRODUCT[a.dtype].run(
        nt, count * tm * tn, tm, tn, table, m, n, k, ap, a_b, a_m, a_k, bp, b_b, b_k, b_n, packed_b, cut, direct,
        cp, m * n * size, n * size, bias, r, r_b, r_m, r_n, e.act, int(e.act > 0 or r != 0 or e.alpha != 1.0), mc, kc, pack_a,
        workspace(need * nt), need, *scalars)


@lru_cache(4096)
def _plan(dtype: torch.dtype, count: int, m: int, n: int, k: int, nt: int, kept: bool, b_rows: bool, a_rows: bool) -> tuple[int, ...]:
    """(tm, tn, cut, direct, mc, kc, pack_a, bytes of scratch a thread): how a product of this shape is cut and packed.

    ``b_rows``, ``a_rows``: the operand's elements lie next to each other along its last dimension.
    """
    f = _format(dtype)
    tm, tn = _grid(f, count, m, n, nt) if nt > 1 else (1, 1)
    depth = max(1, (k + 1) // 2 if f.pairs else k)
    direct = not kept and b_rows and not f.half and (m <= 64 or k * n * f.size <= caches().l2 // 2)
    mc, kc = _blocks(f)
    if f.half:  # the sums stay in float32 until they are whole
        kc = depth
        mc = max(f.rows, caches().l2 * 3 // 8 // (kc * f.unit) // f.rows * f.rows)
    else:
        kc = -(-depth // -(-depth // kc))
    pack_a = f.half and (not f.pairs or k % 2 == 1 or not a_rows)
    need = _SCRATCH
    if pack_a:
        need += (mc + 2 * f.lanes) * kc * f.unit
    if not (kept or direct):
        need += (-(-n // f.lanes) // tn + 2 * f.vecs) * f.lanes * kc * f.unit
    return tm, tn, _panels(f, n, tn), int(direct), mc, kc, int(pack_a), -(-need // 4096) * 4096


def _splits_k(f: Format, m: int, n: int, nt: int) -> bool:
    """Whether the output has too few tiles to give each thread one."""
    tm, tn = _grid(f, 1, m, n, nt)
    return tm * tn < nt


def _rows_sum(out: Tensor, nt: int, n: int, k: int, w: int, w_k: int, x: int, x_k: int, e: Epilogue, bias: int, r: int,
              r_n: int) -> None:
    """out[n] = epilogue(Σ x[k] · w[k, :]); x = 0: the sum of the rows."""
    f = _format(out.dtype)
    row = -(-n * f.unit // 64) * 64 + 64
    split = n < f.lanes * 4 * nt and k > n
    _ROWS_SUM[out.dtype].run(nt, int(split), n, k, w, w_k, x, x_k, out.data_ptr(), bias, r, r_n, e.act,
                         workspace(row * nt), row, e.alpha, e.beta, e.p0, e.p1)


def _split_k(out: Tensor, a: Tensor, b: Tensor, parts: int) -> None:
    """A small output and a long sum: each thread sums a stretch of k, and the stretches are added in their order."""
    out, a, b = (t[(0,) * (t.dim() - 2)] for t in (out, a, b))  # a batch of one, perhaps
    m, n, k = *out.shape, a.shape[-1]
    stretch = k // parts
    rest = k - parts * stretch
    sums = torch.empty(parts + (rest > 0), m, n, dtype=out.dtype)
    whole = parts * stretch
    _multiply(sums[:parts], a[:, :whole].unflatten(1, (parts, stretch)).transpose(0, 1), b[:whole].unflatten(0, (parts, stretch)))
    if rest:
        _multiply(sums[parts], a[:, whole:], b[whole:])
    _rows_sum(out, 1, m * n, len(sums), sums.data_ptr(), m * n * out.itemsize, 0, 0, _PLAIN, 0, 0, 0)


def _kept(f: Format, weight: Tensor, n: int, k: int, b_k: int, b_n: int) -> Any:
    if weight.is_inference() or not weight.is_contiguous():
        return None
    cut = _panels(f, n, threads.count())
    depth = (k + 1) // 2 if f.pairs else k

    def pack(address: int) -> int:
        _PACK[weight.dtype].run(threads.count(), n, k, weight.data_ptr(), b_k, b_n, cut, address)
        return cut
    return packed.get(weight, -(-n // f.lanes) * f.lanes * depth * f.unit, pack)


# The operators -------------------------------------------------------------------------------------------------------


def supports(op: str, *args: Any) -> str | None:
    """None if the kernels here serve the call, else why not."""
    dtype = args[0].dtype
    if dtype not in _NAMES:
        return f"dtype {dtype}; this kernel serves {', '.join(_NAMES.values())}"
    return None


def matmul(out: Tensor, input: Tensor, other: Tensor) -> None:
    """out = input @ other, as torch.matmul: vectors, matrices and broadcast batches."""
    if input.dim() == 1:
        input, out = input.unsqueeze(0), out.unsqueeze(-2 if other.dim() > 1 else 0)
    if other.dim() == 1:
        other, out = other.unsqueeze(-1), out.unsqueeze(-1)
    _multiply(out, input, other)


def addmm(out: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> None:
    """out = beta · input + alpha · mat1 @ mat2; with beta 0 the input is ignored, NaN and all."""
    _multiply(out, mat1, mat2, Epilogue(residual=input.expand(out.shape) if beta != 0 else None, alpha=alpha, beta=beta))


def linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> None:
    """out = act(input Wᵀ + bias + residual). W's packing is kept while gradients are off."""
    if weight.dim() == 1:
        weight = weight.unsqueeze(0)
        out = out.unsqueeze(-1)
        residual = residual.unsqueeze(-1) if residual is not None else None
    if input.dim() == 1:
        input, out = input.unsqueeze(0), out.unsqueeze(0)
        residual = residual.unsqueeze(0) if residual is not None else None
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    if bias is not None and bias.numel() != weight.shape[0]:  # (1,): torch broadcasts it
        bias = bias.expand(weight.shape[0]).contiguous()
    if residual is not None:
        residual = residual.expand(out.shape)
    e = _PLAIN if bias is None and residual is None and activation is None else Epilogue(
        bias, residual, act=CODES[activation] if activation is not None else 0)
    _multiply(out, input, weight.t(), e, weight)


KERNELS: dict[str, Callable[..., None]] = {"matmul": matmul, "addmm": addmm, "linear": linear}
