"""Matrix products on the GPU: one Triton kernel, ``product``, and ``add_parts`` for sums that several programs share.

``product`` is persistent: as many programs as processors go through the output's tiles, in groups of rows, so that programs that
run side by side read the same columns. A chip with a copy engine (TMA) reads whole tiles by descriptors where the operands' rows
or columns allow it. Few tiles and a long sum: each sum is cut, and ``add_parts`` adds the parts in their order: no atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnn import backends

from .engine import functions, launch, tune
from .engine.launch import Chip, power_of_two

# The kernels --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _finish(c, sums, bias, r, rows, columns, m, n, r_m, r_n, alpha, beta, ACT: tl.constexpr, WHOLE: tl.constexpr):
    """c = act(alpha · sums + bias + beta · residual), or the sums where they are not WHOLE; c's rows lie next to each other"""
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    y = sums
    if WHOLE:
        y *= alpha
        if bias is not None:
            y += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        if r is not None:
            y += beta * tl.load(r + rows[:, None] * r_m + columns[None, :] * r_n, mask=inside, other=0.0).to(tl.float32)
        y = functions.activation(y, ACT, 0.0, 0.0)
    tl.store(c + rows[:, None] * n + columns[None, :], y.to(c.dtype.element_ty), mask=inside)


@triton.jit
def _descriptor(t, batch, inner, rows, columns, t_o, t_i, t_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of outer · inner matrices whose columns lie next to each other, ROWS × COLUMNS of one at a time"""
    return tl.make_tensor_descriptor(
        t, [batch // inner, inner, rows, columns], [functions.wide(t_o), functions.wide(t_i), functions.wide(t_rows), 1],
        [1, 1, ROWS, COLUMNS],
    )


@triton.jit
def product(
    c, a, b, bias, r,  # output or, with PARTS > 1, float32 parts; operands; bias and residual or None
    batch, inner, m, n, k,  # batch = outer · inner matrices
    c_b, a_o, a_i, a_m, a_k, b_o, b_i, b_k, b_n, r_o, r_i, r_m, r_n,  # strides; c's rows lie next to each other
    alpha, beta,
    ACT: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,  # whether k, or n, has stride 1
    DESCRIPTORS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c = epilogue(a @ b), a tile of M × N at a time"""
    down, across = tl.cdiv(m, M), tl.cdiv(n, N)
    steps = tl.cdiv(tl.cdiv(k, K), PARTS)  # of each part
    if DESCRIPTORS:
        if A_ROWS:
            from_a = _descriptor(a, batch, inner, m, k, a_o, a_i, a_m, M, K)
        else:
            from_a = _descriptor(a, batch, inner, k, m, a_o, a_i, a_k, K, M)
        if B_ROWS:
            from_b = _descriptor(b, batch, inner, k, n, b_o, b_i, b_k, K, N)
        else:
            from_b = _descriptor(b, batch, inner, n, k, b_o, b_i, b_n, N, K)
    # Flat, the next tile's first loads are under way while this one is finished; a part may be empty, which no flat loop is.
    tiles = batch * PARTS * down * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=DESCRIPTORS and PARTS == 1):
        which = tile // (down * across)
        matrix, part = (which // PARTS).to(tl.int64), which % PARTS
        at = tile % (down * across)
        first = at // (GROUP * across) * GROUP
        height = tl.minimum(down - first, GROUP)
        top = (first + at % (GROUP * across) % height) * M
        left = at % (GROUP * across) // height * N
        rows, columns = top.to(tl.int64) + tl.arange(0, M), left.to(tl.int64) + tl.arange(0, N)
        begin, end = part * steps * K, tl.minimum(k, (part + 1) * steps * K)
        sums = tl.zeros((M, N), tl.float32)
        if DESCRIPTORS:
            outer_at, inner_at = which // PARTS // inner, which // PARTS % inner
            for depth in tl.range(begin, end, K):
                if A_ROWS:
                    va = from_a.load([outer_at, inner_at, top, depth]).reshape(M, K)
                else:
                    va = from_a.load([outer_at, inner_at, depth, top]).reshape(K, M).T
                if B_ROWS:
                    vb = from_b.load([outer_at, inner_at, depth, left]).reshape(K, N)
                else:
                    vb = from_b.load([outer_at, inner_at, left, depth]).reshape(N, K).T
                sums = tl.dot(va, vb, sums, input_precision=PRECISION)
        else:
            along = tl.arange(0, K).to(tl.int64)
            pa = a + matrix // inner * a_o + matrix % inner * a_i + rows[:, None] * a_m + (begin + along)[None, :] * a_k
            pb = b + matrix // inner * b_o + matrix % inner * b_i + (begin + along)[:, None] * b_k + columns[None, :] * b_n
            for depth in tl.range(begin, end, K):
                inside = depth + along < k  # not < end, of which the compiler does not know that 16 divides it
                va = tl.load(pa, mask=(rows < m)[:, None] & inside[None, :], other=0.0)
                vb = tl.load(pb, mask=inside[:, None] & (columns < n)[None, :], other=0.0)
                sums = tl.dot(va, vb, sums, input_precision=PRECISION)
                pa += K * functions.wide(a_k)
                pb += K * functions.wide(b_k)
        pc = c + which.to(tl.int64) * c_b
        pr = r
        if r is not None:
            pr = r + matrix // inner * r_o + matrix % inner * r_i
        if N == 256:  # in halves: addresses and residuals of all at once do not fit into the registers
            low, high = tl.split(tl.permute(tl.reshape(sums, (M, 2, N // 2)), (0, 2, 1)))
            columns = left.to(tl.int64) + tl.arange(0, N // 2)
            _finish(pc, low, bias, pr, rows, columns, m, n, r_m, r_n, alpha, beta, ACT, PARTS == 1)
            _finish(pc, high, bias, pr, rows, columns + N // 2, m, n, r_m, r_n, alpha, beta, ACT, PARTS == 1)
        else:
            _finish(pc, sums, bias, pr, rows, columns, m, n, r_m, r_n, alpha, beta, ACT, PARTS == 1)


@triton.jit
def add_parts(
    c, parts, bias, r, inner, m, n, r_o, r_i, r_m, r_n, alpha, beta,
    ACT: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """c = epilogue(Σ parts), where each matrix has its PARTS behind each other"""
    down, across = tl.cdiv(m, M), tl.cdiv(n, N)
    pid = tl.program_id(0)
    matrix = (pid // (down * across)).to(tl.int64)
    rows = (pid // across % down * M + tl.arange(0, M)).to(tl.int64)
    columns = (pid % across * N + tl.arange(0, N)).to(tl.int64)
    place = rows[:, None] * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    size = functions.wide(m) * n
    sums = tl.zeros((M, N), tl.float32)
    for part in range(PARTS):
        sums += tl.load(parts + (matrix * PARTS + part) * size + place, mask=inside, other=0.0)
    pr = r
    if r is not None:
        pr = r + matrix // inner * r_o + matrix % inner * r_i
    _finish(c + matrix * size, sums, bias, pr, rows, columns, m, n, r_m, r_n, alpha, beta, ACT, True)


# The table ----------------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A program's part of the output, the depth of a step, and what Triton is told."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


#: For each kind of arithmetic the tiles of a chip; `_cost` tells which is best.
_TILES: dict[tuple[str, str], list[Tile]] = {
    ("half", "sm_90"): [Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)],
    ("half", "sm_80"): [Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 4, 4), Tile(64, 64, 32, 4, 4)],
    ("half", "gfx"): [Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)],
    ("tf32", "sm_90"): [Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 4, 4), Tile(64, 64, 32, 4, 4)],
    ("tf32", "sm_80"): [Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)],
    ("tf32", "gfx"): [Tile(64, 64, 32, 4, 2)],
    ("ieee", "sm_90"): [Tile(64, 64, 16, 4, 2), Tile(32, 32, 32, 4, 2)],
    ("ieee", "sm_80"): [Tile(64, 64, 16, 4, 2), Tile(32, 32, 32, 4, 2)],
    ("ieee", "gfx"): [Tile(64, 64, 16, 4, 2), Tile(32, 32, 32, 4, 2)],
}
_GROUP = 8  # rows of tiles that are gone through together
_PARTS = 8  # parts that a sum is cut into at most
_PART = 512  # and the depth of a part at least
# Of a processor of Hopper's kind, a cycle: multiplications, bytes from the L2 cache and from memory; cycles to wait for bytes and
# for another launch.
_RATE = {"half": 2048, "tf32": 1024, "ieee": 128}
_L2, _MEMORY, _LATENCY, _LAUNCH = 32, 16, 800, 5000


def _tiles(kind: str, chip: Chip) -> list[Tile]:
    if chip is launch.STAND_IN:  # a few programs with large tiles cost the interpreter least
        return [Tile(32, 32, 32, 4, 2)]
    return _TILES[kind, "sm_90" if chip.nvidia >= 90 else "sm_80" if chip.nvidia else "gfx"]


def _programs(chip: Chip, tile: Tile) -> int:
    """Programs that a processor runs at once"""
    return 1 if tile.m * tile.n >= 128 * 128 else 2 if tile.m * tile.n >= 64 * 128 else 4


def _cost(kind: str, chip: Chip, count: int, m: int, n: int, k: int, tile: Tile, parts: int) -> float:
    """About how many cycles, by a model that no GPU has confirmed: a step takes its arithmetic, its bytes from the L2 cache or
    the wait for them, whatever is longest; programs of a processor share the first two; the last wave lasts as long as all.
    """
    tiles = count * -(-m // tile.m) * -(-n // tile.n) * parts
    each = min(_programs(chip, tile), -(-tiles // chip.processors))
    waves = -(-tiles // (chip.processors * each))
    size = 2 if kind == "half" else 4
    largest = max(t.m * t.n for t in _tiles(kind, chip))
    arithmetic = tile.m * tile.n * tile.k / _RATE[kind] * (largest / (tile.m * tile.n)) ** 0.25  # smaller ones wait more
    step = max(each * arithmetic, each * (tile.m + tile.n) * tile.k * size / _L2, _LATENCY / tile.stages)
    steps = -(-k // (tile.k * parts))
    joined = _LAUNCH + 8 * count * parts * m * n / (chip.processors * _MEMORY) if parts > 1 else 0.0
    return waves * (steps * step + _LATENCY + each * tile.m * tile.n / 16) + joined


def _few(kind: str, chip: Chip, count: int, m: int, n: int, k: int) -> list[tuple[Tile, int]]:
    """The chip's tiles, each with the number of parts that its sum had best be cut into; the best is the first."""
    # A tile is cut down to what there is of it, and not below what the matrix instruction takes.
    sizes = [(t, power_of_two(m, 16, t.m), power_of_two(n, 16, t.n)) for t in _tiles(kind, chip)]
    cut = dict.fromkeys(t._replace(m=h, n=w, warps=t.warps if h * w >= 128 * 128 else 4) for t, h, w in sizes)
    most = max(1, min(_PARTS, k // _PART))
    few = []
    for tile in cut:
        costs = [_cost(kind, chip, count, m, n, k, tile, parts) for parts in range(1, most + 1)]
        few.append((min(costs), tile, 1 + costs.index(min(costs))))
    return [(tile, parts) for _, tile, parts in sorted(few, key=lambda f: f[0])]


def precision(t: Tensor, torchs: bool = True) -> str:
    """How tl.dot multiplies such numbers: float32 as set_float32_precision was told, else as torch's settings say."""
    if t.dtype != torch.float32:
        return "ieee"
    return backends.float32_precision or ("tf32" if torchs and backends.tf32("matmul") else "ieee")


# The host -----------------------------------------------------------------------------------------------------------------------


class Epilogue(NamedTuple):
    """act(alpha · A B + bias + beta · residual); the residual has the output's shape."""

    bias: Tensor | None = None
    residual: Tensor | None = None
    alpha: float = 1.0
    beta: float = 1.0
    act: str | None = None


_PLAIN = Epilogue()


def _two_batches(batch: torch.Size, tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of shape (*batch, rows, columns), expanded where they broadcast, with two batch dimensions: outer and inner."""
    full = [t.expand(*batch, *t.shape[-2:]) for t in tensors]
    if len(batch) <= 2:
        return [t.reshape(*[1] * (2 - len(batch)), *t.shape) for t in full]
    return [t.reshape(-1, *t.shape[-3:]) for t in full]  # a copy where it has to be one


def _describable(t: Tensor, rows: bool) -> bool:
    """Whether the copy engine reads matrices (outer, inner, …), along their rows or their columns: nothing may be expanded."""
    step, one = (t.stride(-2), t.stride(-1)) if rows else (t.stride(-1), t.stride(-2))
    steps = [step, *(stride for size, stride in zip(t.shape[:2], t.stride()) if size > 1)]
    return one == 1 and all(s > 0 and s * t.itemsize % 16 == 0 for s in steps) and t.data_ptr() % 16 == 0


def _batch_strides(t: Tensor) -> tuple[int, int]:
    """Of the two batch dimensions. A descriptor takes no stride of 0, not even where only 0 is multiplied by it."""
    return t.stride(0) if t.shape[0] > 1 else 16, t.stride(1) if t.shape[1] > 1 else 16


def multiply(out: Tensor, a: Tensor, b: Tensor, e: Epilogue = _PLAIN, how: str | None = None) -> None:
    """out[…, m, n] = epilogue(a[…, m, k] @ b[…, k, n]); batch dimensions broadcast; out is contiguous; how: a precision."""
    if out.numel() == 0:
        return
    m, n = out.shape[-2:]
    k = a.shape[-1]
    r = e.residual
    batch = out.shape[:-2]
    if batch.numel() > 1 and b.dim() == 2 and a.is_contiguous() and (r is None or r.is_contiguous()):
        m *= batch.numel()  # one matrix on the right: the batch is only more rows
        a, r, batch = a.view(m, k), None if r is None else r.view(m, n), batch[:0]
    a, b, *rest = _two_batches(batch, [a, b] if r is None else [a, b, r])
    r = rest[0] if rest else None
    inner = a.shape[1]
    count = a.shape[0] * inner
    chip = launch.chip(out.device)
    how = how or precision(a)
    kind = "half" if a.itemsize == 2 else "ieee" if how == "ieee" else "tf32"
    a_rows, b_rows = a.stride(3) == 1, b.stride(3) == 1
    described = k > 0 and chip.descriptors and kind != "ieee" and _describable(a, a_rows) and _describable(b, b_rows)
    if described:
        launch.allow_descriptors()
    r_strides = (0, 0, 0, 0) if r is None else r.stride()

    def run(tile: Tile, parts: int, out: Tensor) -> None:
        tiles = count * parts * -(-m // tile.m) * -(-n // tile.n)
        target = out if parts == 1 else out.new_empty((count * parts, m, n), dtype=torch.float32)
        launch.run(
            product, min(tiles, chip.processors * _programs(chip, tile)), out.device,
            target, a, b, e.bias if parts == 1 else None, r if parts == 1 else None, count, inner, m, n, k,
            m * n, *_batch_strides(a), *a.stride()[2:], *_batch_strides(b), *b.stride()[2:], *r_strides, e.alpha, e.beta,
            ACT=e.act, PARTS=parts, PRECISION=how, A_ROWS=a_rows, B_ROWS=b_rows,
            DESCRIPTORS=described, M=tile.m, N=tile.n, K=tile.k, GROUP=_GROUP, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if parts > 1:
            high, wide = power_of_two(m, most=16), power_of_two(n, most=128)
            launch.run(
                add_parts, count * -(-m // high) * -(-n // wide), out.device, out, target, e.bias, r, inner, m, n, *r_strides,
                e.alpha, e.beta, ACT=e.act, PARTS=parts, M=high, N=wide, num_warps=4,
            )  # fmt: skip

    few = _few(kind, chip, count, m, n, k)
    chosen = few[0]
    if tune.ON:
        options = (a.dtype, out.dtype, how, a_rows, b_rows, described, e.act, e.bias is None, r is None)
        # Into another output: the residual may be this one itself.
        chosen = tune.choose("product", chip, options, (count, m, n, k), chosen, few, lambda f: run(*f, torch.empty_like(out)))
    run(*chosen, out)


# The operators ------------------------------------------------------------------------------------------------------------------


def matmul(out: Tensor, input: Tensor, other: Tensor) -> None:
    """out = input @ other, as torch.matmul: vectors, matrices and broadcast batches."""
    if input.dim() == 1:
        input, out = input.unsqueeze(0), out.unsqueeze(-2 if other.dim() > 1 else 0)
    if other.dim() == 1:
        other, out = other.unsqueeze(-1), out.unsqueeze(-1)
    multiply(out, input, other)


def addmm(out: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> None:
    """out = beta · input + alpha · mat1 @ mat2. Of what is taken zero times nothing is seen (a batch aside), as on the CPU."""
    if alpha == 0 and mat1.dim() == 2:
        out.zero_() if beta == 0 else torch.mul(input.expand(out.shape), beta, out=out)
        return
    residual = input.expand(out.shape) if beta != 0 else None
    multiply(out, mat1, mat2, Epilogue(residual=residual, alpha=float(alpha), beta=float(beta)))


def linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
           activation: str | None) -> None:
    """out = act(input Wᵀ + bias + residual)"""
    if input.dim() == 1:
        input, out = input.unsqueeze(0), out.unsqueeze(0)
        residual = residual.unsqueeze(0) if residual is not None else None
    bias = None if bias is None else bias.contiguous()
    multiply(out, input, weight.t(), Epilogue(bias, residual, act=activation))


def supports(op: str, *args: Any) -> str | None:
    return launch.refuses(*(a for a in args if isinstance(a, Tensor)))


KERNELS: dict[str, Callable[..., None]] = {"matmul": matmul, "addmm": addmm, "linear": linear}
