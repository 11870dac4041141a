"""The CPU engine's parts by themselves: SIMD primitives, packers, the register tile, and the machine code they become."""

import ctypes
import hashlib
import itertools
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fresh
from fastnn.kernels.cpu.engine import host
from fastnn.kernels.cpu.engine.build import Kernel
from fastnn.kernels.cpu.engine.host import simd
from fastnn.kernels.cpu.engine.workspace import workspace
from guard import Placed

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTH = simd().width
VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # these kernels are made of this file, too
HERE = Path(__file__).resolve().parent


def kernel(name: str, signature: str, make: Callable[[], Callable[..., Any]]) -> Callable[..., None]:
    return Kernel(f"test_{VERSION}_{name}", signature, make).load()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def bits(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])


# SIMD -----------------------------------------------------------------------------------------------------------------


@cache
def convert(source: str, target: str) -> Callable[..., None]:
    """convert(src, dst, n): element by vector, the last vector masked; float32 in between."""

    def make() -> Callable[..., Any]:
        from fastnn.kernels.cpu.engine.simd import ELEMS, load, load_n, store, store_n

        s, t = ELEMS[source], ELEMS[target]

        def run(src, dst, n):  # type: ignore[no-untyped-def]
            whole = n // s.lanes
            for i in range(whole):
                store(t, dst + i * t.bytes, load(s, src + i * s.bytes))
            store_n(t, dst + whole * t.bytes, load_n(s, src + whole * s.bytes, n - whole * s.lanes), n - whole * s.lanes)

        return run

    return kernel(f"convert_{source}_{target}", "iii", make)


@cache
def convert_scalars(source: str, target: str) -> Callable[..., None]:
    def make() -> Callable[..., Any]:
        from fastnn.kernels.cpu.engine.simd import ELEMS, load_scalar, store_scalar

        s, t = ELEMS[source], ELEMS[target]

        def run(src, dst, n):  # type: ignore[no-untyped-def]
            for i in range(n):
                store_scalar(t, dst + i * t.size, load_scalar(s, src + i * s.size))

        return run

    return kernel(f"convert_scalars_{source}_{target}", "iii", make)


def same_values(ours: Tensor, theirs: Tensor) -> bool:
    """Bit by bit, but that one NaN is as good as another."""
    nan = theirs.isnan()
    return torch.equal(ours.isnan(), nan) and torch.equal(bits(ours)[~nan], bits(theirs)[~nan])


@pytest.mark.parametrize("how", [convert, convert_scalars])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_types_widen_and_round_as_torch_does(half: str, how: Callable[..., Callable[..., None]]) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(DTYPES[half])
    wide = torch.empty(2**16)
    how(half, "float32")(every.data_ptr(), wide.data_ptr(), 2**16)
    assert same_values(wide, every.float())
    # All numbers between two neighbours that matter for rounding, and random bits: NaN, infinite, subnormal, too large.
    bases = bits(every.float())
    near = torch.cat([bases + d for d in (-1, 0, 1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001)])
    values = torch.cat([near, torch.randint(-(2**31), 2**31, (2**20,), dtype=torch.int64).to(torch.int32)]).view(torch.float32)
    narrow = torch.empty(len(values), dtype=DTYPES[half])
    how("float32", half)(values.data_ptr(), narrow.data_ptr(), len(values))
    assert same_values(narrow, values.to(DTYPES[half]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_loads_and_stores_touch_only_their_lanes(dtype: str) -> None:
    run = convert(dtype, dtype)
    for n, end in itertools.product(range(1, 2 * WIDTH // 2 + 2), ("front", "back")):
        src = Placed(random(n, dtype=DTYPES[dtype]), end)
        dst = Placed(torch.full((n,), torch.nan, dtype=DTYPES[dtype]), end)
        run(src.tensor.data_ptr(), dst.tensor.data_ptr(), n)
        assert torch.equal(dst.tensor, src.tensor)
        assert not dst.changed_outside()


@cache
def lanewise(dtype: str) -> Callable[..., None]:
    """lanewise(a, b, out): one vector of each result, one after the other; two scalars behind them."""

    def make() -> Callable[..., Any]:
        from fastnn.kernels.cpu.engine import simd as s

        e = s.ELEMS[dtype]
        load, store, select = s.load, s.store, s.select
        maximum, maximum_fast, minimum_fast = s.maximum, s.maximum_fast, s.minimum_fast
        fma, sqrt, absolute, copysign, nearest = s.fma, s.sqrt, s.absolute, s.copysign, s.nearest
        reduce_add, reduce_max, spread, from_bits, to_bits = s.reduce_add, s.reduce_max, s.spread, s.from_bits, s.to_bits
        to_int, to_float, store_scalar = s.to_int, s.to_float, s.store_scalar

        def run(a, b, out):  # type: ignore[no-untyped-def]
            x, y = load(e, a), load(e, b)
            store(e, out, x + y)
            store(e, out + e.bytes, x - 2.0)
            store(e, out + 2 * e.bytes, 3.0 * y)
            store(e, out + 3 * e.bytes, x / y)
            store(e, out + 4 * e.bytes, fma(x, y, 1.0))
            store(e, out + 5 * e.bytes, select(x < y, x, 7.0))
            store(e, out + 6 * e.bytes, select((x != x) | (y >= 0.5), x, y))
            store(e, out + 7 * e.bytes, maximum(x, y))
            store(e, out + 8 * e.bytes, sqrt(absolute(x)))
            store(e, out + 9 * e.bytes, copysign(x, y))
            store(e, out + 10 * e.bytes, nearest(x))
            store(e, out + 11 * e.bytes, -x)
            store(e, out + 12 * e.bytes, from_bits(to_bits(x)))
            store(e, out + 13 * e.bytes, to_float(to_int(select(x == x, minimum_fast(maximum_fast(x, -1000.0), 1000.0), 0.0))))
            store(e, out + 14 * e.bytes, spread(e, reduce_add(y)))
            store_scalar(e, out + 15 * e.bytes, reduce_max(x))
            store_scalar(e, out + 15 * e.bytes + e.size, reduce_max(y))

        return run

    return kernel(f"lanewise_{dtype}", "iii", make)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lanewise_operations(dtype: str) -> None:
    lanes = WIDTH // DTYPES[dtype].itemsize
    special = torch.tensor(
        [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -3.5, 1e-40, 1e30, 5.0, -5.0, 1.0, 100.0]
    )
    for seed in range(16):
        x = special.to(DTYPES[dtype]).roll(seed)[:lanes].contiguous()
        y = random(lanes, dtype=DTYPES[dtype])
        out = torch.full((16 * lanes,), torch.nan, dtype=DTYPES[dtype])
        lanewise(dtype)(x.data_ptr(), y.data_ptr(), out.data_ptr())
        wanted = [
            x + y,
            x - 2,
            3 * y,
            x / y,
            None,
            torch.where(x < y, x, 7.0),
            torch.where(x.isnan() | (y >= 0.5), x, y),
            torch.maximum(x, y),
            x.abs().sqrt(),
            torch.copysign(x, y),
            x.round(),
            -x,
            x,
            x.nan_to_num(0, 1000, -1000).clamp(-1000, 1000).trunc(),
        ]
        for number, w in enumerate(wanted):
            got = out[number * lanes : (number + 1) * lanes]
            if w is not None:
                assert same_values(got + 0.0 if number == 13 else got, w + 0.0 if number == 13 else w), (number, x, y, got, w)
        once = (x.double() * y.double() + 1.0).to(x.dtype)  # see test_fma_rounds_once
        torch.testing.assert_close(
            out[4 * lanes : 5 * lanes], once, rtol=1e-6 if lanes == WIDTH // 4 else 1e-13, atol=0, equal_nan=True
        )
        torch.testing.assert_close(out[14 * lanes : 15 * lanes], y.sum().expand(lanes), rtol=1e-5, atol=1e-5)
        assert same_values(out[15 * lanes : 15 * lanes + 2], torch.stack([x.max(), y.max()]))


def test_fma_rounds_once() -> None:
    lanes = WIDTH // 4
    x = torch.full((lanes,), 1 + 2.0**-12)
    y = torch.full((lanes,), -1 + 2.0**-12)  # x · y = -1 + 2^-24: rounded by itself it would be -1
    out = torch.empty(16 * lanes)
    lanewise("float32")(x.data_ptr(), y.data_ptr(), out.data_ptr())
    assert (out[4 * lanes : 5 * lanes] == 2.0**-24).all()


# Scratch memory -------------------------------------------------------------------------------------------------------


def test_scratch_memory_is_aligned_kept_and_grown_and_a_threads_own() -> None:
    def ask() -> list[int]:
        return [workspace(size) for size in (1, 100, 2 << 20, 1, 40 << 20, 40 << 20, 1)]

    mine, (others,) = ask(), ThreadPoolExecutor(1).map(lambda _: ask(), [0])
    assert all(address % 4096 == 0 for address in mine + others)
    for first, again, whole, small, large, large_again, after in (mine, others):
        assert first == again == whole == small
        assert large == large_again == after
    assert mine[-1] != others[-1]
    ctypes.memset(mine[-1], 1, 40 << 20)  # all of it is there
    assert workspace(0) == 0


# Packing --------------------------------------------------------------------------------------------------------------


@cache
def pack(dtype: str) -> Callable[..., None]:
    def make() -> Callable[..., Any]:
        from fastnn.kernels.cpu.engine.pack import packer, pair_packer
        from fastnn.kernels.cpu.engine.simd import ELEMS

        function = pair_packer() if dtype == "pairs" else packer(ELEMS[dtype])

        def run(src, s_w, s_k, w, k, dst, width):  # type: ignore[no-untyped-def]
            function(src, s_w, s_k, w, k, dst, width)

        return run

    return kernel(f"pack_{dtype}", "i" * 7, make)


def packed_plainly(x: Tensor, width: int, pairs: bool) -> Tensor:
    """x is (k, w): zero columns up to the width; pairs of k side by side."""
    k, w = x.shape
    whole = torch.zeros(
        k + (k % 2 if pairs else 0), width, dtype=x.dtype if pairs else torch.promote_types(x.dtype, torch.float32)
    )
    whole[:k, :w] = x
    return whole.unflatten(0, (-1, 2)).transpose(1, 2).contiguous().flatten() if pairs else whole.flatten()


@pytest.mark.parametrize("dtype", [*DTYPES, "pairs"])
def test_packing_equals_a_plain_reshape(dtype: str) -> None:
    run = pack(dtype)
    memory = DTYPES.get(dtype, torch.bfloat16)
    lanes = WIDTH // max(4, memory.itemsize)
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "rows": lambda x: x.contiguous(),
        "columns": lambda x: x.t().contiguous().t(),
        "steps": lambda x: torch.full((x.shape[0], 3 * x.shape[1]), torch.nan, dtype=x.dtype)[:, ::3].copy_(x),
        "far columns": lambda x: torch.full((x.shape[1], x.shape[0] + 5), torch.nan, dtype=x.dtype)[:, 2:-3].t().copy_(x),
        "one row repeated": lambda x: x[:1].contiguous().expand_as(x),
        "one column repeated": lambda x: x[:, :1].contiguous().expand_as(x),
    }
    for name, layout in layouts.items():
        for k, w, width in [
            (0, 1, lanes),
            (1, 1, lanes),
            (2, lanes, lanes),
            (lanes, lanes, lanes),
            (lanes + 1, lanes - 1, lanes),
            (5, lanes + 1, 3 * lanes),
            (2 * lanes + 3, 3 * lanes, 3 * lanes),
            (37, 2 * lanes + lanes // 2, 3 * lanes),
            (3 * lanes, 2 * lanes - 1, 2 * lanes),
        ]:
            if k == 0 and name == "one row repeated":
                continue
            x = layout(random(k, w, dtype=memory))
            wanted = packed_plainly(x, width, dtype == "pairs")
            for end in ("front", "back"):
                src, dst = Placed(x, end), Placed(torch.full_like(wanted, torch.nan), end)
                t = src.tensor
                run(t.data_ptr(), t.stride(1) * t.itemsize, t.stride(0) * t.itemsize, w, k, dst.tensor.data_ptr(), width)
                assert torch.equal(dst.tensor, wanted), (name, k, w, width)
                assert not dst.changed_outside()


# The register tile ----------------------------------------------------------------------------------------------------

ROWS = (1, 2, 3, 4, 8) if simd().registers == 32 else (1, 2, 3, 4)
KINDS = ["float32", "float64", *(["pairs"] if simd().bf16_dot else [])]


@cache
def tile(kind: str, masked: bool, table: bool) -> Callable[..., None]:
    """tile(rows, vecs, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last)"""

    def make() -> Callable[..., Any]:
        from fastnn.kernels.cpu.engine.simd import ELEMS, inline
        from fastnn.kernels.cpu.engine.tile import Tile, multiply

        def of_size(rows: int, vecs: int) -> Any:
            t = Tile(ELEMS["float32" if kind == "pairs" else kind], rows, vecs, masked, table, kind == "pairs")

            @inline
            def run(k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last):  # type: ignore[no-untyped-def]
                multiply(t, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last)

            return run

        def of_rows(rows: int) -> Any:
            one, two, three = of_size(rows, 1), of_size(rows, 2), of_size(rows, 3)

            @inline
            def run(vecs, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last):  # type: ignore[no-untyped-def]
                if vecs == 1:
                    one(k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last)
                elif vecs == 2:
                    two(k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last)
                else:
                    three(k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last)

            return run

        r1, r2, r3, r4, r8 = (of_rows(r if r in ROWS else 1) for r in (1, 2, 3, 4, 8))

        def run(rows, vecs, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last):  # type: ignore[no-untyped-def]
            if rows == 1:
                r1(vecs, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last)
            elif rows == 2:
                r2(vecs, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last)
            elif rows == 3:
                r3(vecs, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last)
            elif rows == 4:
                r4(vecs, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last)
            else:
                r8(vecs, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last)

        return run

    return kernel(f"tile_{kind}{'_masked' * masked}{'_table' * table}", "i" * 13, make)


def tile_operands(
    kind: str, rows: int, k: int, columns: int, a_layout: str, b_layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A (rows, k) and B (k, columns) as laid out in memory, and their values; k counts pairs in the tile's sense."""
    if kind == "pairs":
        a, b = random(rows, 2 * k, dtype=torch.bfloat16), random(2 * k, columns, dtype=torch.bfloat16)
        words_a, words_b = bits(a).int() & 0xFFFF, bits(b).int() & 0xFFFF
        in_a, in_b = words_a[:, ::2] | words_a[:, 1::2] << 16, words_b[::2] | words_b[1::2] << 16  # a pair is one element
    else:
        in_a, in_b = a, b = random(rows, k, dtype=DTYPES[kind]), random(k, columns, dtype=DTYPES[kind])
    if a_layout == "packed":
        in_a = in_a.t().contiguous().t()
    elif a_layout == "padded":
        in_a = torch.full((rows, k + 5), -1, dtype=in_a.dtype)[:, 2 : 2 + k].copy_(in_a)
    if b_layout == "padded":
        in_b = torch.full((k, columns + 7), -1, dtype=in_b.dtype)[:, :columns].copy_(in_b)
    return in_a, in_b, a.double(), b.double()


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile(kind: str, masked: bool, table: bool) -> None:
    run = tile(kind, masked, table)
    dtype = DTYPES.get(kind, torch.float32)
    lanes = WIDTH // dtype.itemsize
    for rows, vecs, k in itertools.product(ROWS, (1, 2, 3), (0, 1, 2, 7, 33)):
        for last, (a_layout, b_layout) in itertools.product(
            (1, lanes - 1, lanes) if masked else (lanes,), [("rows", "rows"), ("packed", "padded"), ("padded", "rows")]
        ):
            columns = (vecs - 1) * lanes + last
            width = vecs * lanes if kind == "pairs" else columns  # panels of pairs are always whole
            in_a, in_b, a, b = tile_operands(kind, rows, k, width, a_layout, b_layout)
            pa, pb = Placed(in_a, "back"), Placed(in_b, "back")
            item = in_b.itemsize
            b_address, b_k = pb.tensor.data_ptr(), pb.tensor.stride(0) * item
            if table:  # the rows of B in another order
                order = torch.randperm(k)
                b = (b.unflatten(0, (k, 2))[order].flatten(0, 1) if kind == "pairs" else b[order]) if k else b
                offsets = Placed(order * b_k, "back")
                b_k = offsets.tensor.data_ptr()
            for start in ("zero", "c", "bias"):
                c = Placed(random(rows, columns, dtype=dtype), "back")
                bias = Placed(random(columns, dtype=dtype), "back")
                wanted = (a @ b)[:, :columns]
                if start != "zero":
                    wanted = wanted + (c if start == "c" else bias).tensor.double()
                at = {"zero": 0, "c": c.tensor.data_ptr(), "bias": bias.tensor.data_ptr()}[start]
                row = c.tensor.stride(0) * c.tensor.itemsize
                t = pa.tensor
                run(
                    rows,
                    vecs,
                    k,
                    t.data_ptr(),
                    t.stride(0) * t.itemsize,
                    t.stride(1) * t.itemsize,
                    b_address,
                    b_k,
                    at,
                    row if start == "c" else 0,
                    c.tensor.data_ptr(),
                    row,
                    last,
                )
                torch.testing.assert_close(
                    c.tensor,
                    wanted.to(dtype),
                    rtol=1e-5 if dtype.itemsize == 4 else 1e-13,
                    atol=1e-4 if dtype.itemsize == 4 else 1e-12,
                )
                assert not c.changed_outside()


# Machine code ---------------------------------------------------------------------------------------------------------


@cache
def main_tile_assembly(kind: str, masked: bool) -> str:
    """The assembly of the largest tile."""

    def make() -> Callable[..., Any]:
        from fastnn.kernels.cpu.engine.simd import ELEMS
        from fastnn.kernels.cpu.engine.tile import Tile, multiply, tile_size

        t = Tile(ELEMS["float32" if kind == "pairs" else kind], *tile_size(), masked, False, kind == "pairs")

        def run(k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last):  # type: ignore[no-untyped-def]
            multiply(t, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last)

        return run

    return Kernel(f"test_main_tile_{kind}_{masked}", "i" * 11, make).assembly()


def innermost_loops(assembly: str) -> list[list[str]]:
    """The instructions between a label and the first jump back to it, where no other label lies between."""
    loops, at, label = [], {}, ""
    lines = [line.split("#")[0].strip() for line in assembly.splitlines()]
    for number, line in enumerate(lines):
        if re.fullmatch(r"\.?\w+:", line):
            label = line[:-1]
            at[label] = number
        elif (jump := re.fullmatch(r"j\w+\s+(\S+)", line)) and jump[1] == label and label in at:
            loops.append([x for x in lines[at[label] + 1 : number] if x and not x.startswith(".")])
    return loops


def multiply_adds(loop: list[str]) -> int:
    return sum(bool(re.match(r"vfmadd|vdpbf16ps", line)) for line in loop)


def on_the_stack(loop: list[str]) -> list[str]:
    """What moves vector registers to the stack or back."""
    return [line for line in loop if re.search(r"%[xyz]mm", line) and "(%rsp" in line]


def spills(loop: list[str]) -> list[str]:
    return [line for line in on_the_stack(loop) if line.endswith(")")]


needs_x86 = pytest.mark.skipif(simd().name not in ("avx512", "avx2"), reason="the assembly that is read here is x86's, with FMA")


@needs_x86
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_main_loop_keeps_everything_in_registers(kind: str, masked: bool) -> None:
    from fastnn.kernels.cpu.engine.tile import tile_size

    loop = max(innermost_loops(main_tile_assembly(kind, masked)), key=multiply_adds)
    rows, vecs = tile_size()
    assert multiply_adds(loop) % (rows * vecs) == 0, "\n".join(loop)
    assert multiply_adds(loop) > 0
    assert spills(loop) == []
    assert masked or on_the_stack(loop) == []  # where registers are few, the mask itself may be read from there
    assert not any("call" in line for line in loop)
    register = {64: "zmm", 32: "ymm"}[WIDTH]
    assert all(register in line for line in loop if line.startswith(("vfmadd", "vdpbf16ps")))


@needs_x86
def test_the_width_is_the_one_asked_for() -> None:
    assembly = main_tile_assembly("float32", False)
    assert ("zmm" in assembly) == (WIDTH == 64)
    assert "ymm" in assembly or WIDTH == 64


def test_reading_assembly_finds_spills() -> None:
    """The reader itself, on a loop that spills."""
    text = ".L1:\n vfmadd231ps (%rax){1to16}, %zmm1, %zmm2\n vmovups %zmm2, 64(%rsp) # 64-byte Spill\n jne .L1\n"
    (loop,) = innermost_loops(text)
    assert multiply_adds(loop) == 1
    assert len(spills(loop)) == 1
    assert spills(["vmovups %zmm2, 64(%rax)", "movq %rax, 8(%rsp)", "vmovups -32(%rsp), %ymm12"]) == []
    assert len(on_the_stack(["vmovups -32(%rsp), %ymm12", "vaddps 8(%rax), %ymm1, %ymm2"])) == 1


# Forced instruction sets ----------------------------------------------------------------------------------------------


def under(width: str, *selection: str, timeout: float = 900) -> None:
    """Run tests again, in a process that is told to use less than this machine's best."""
    command = ("-m", "pytest", "-q", "-x", "--no-header", *selection)
    done = fresh.python(*command, cwd=HERE.parent, env={**os.environ, "FASTNN_SIMD": width}, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout


#: What this host can run besides its best, which all other tests run; in the process that `under` starts, nothing.
NARROWER = [] if "FASTNN_SIMD" in os.environ else host._allowed()[1:]


@pytest.mark.slow
@pytest.mark.parametrize("width", NARROWER)
def test_narrower_vectors(width: str) -> None:
    """Only the best set has AVX-512's scaling by a power of two: all others share what makes exponentials, so that whole
    functions are tested in one of them."""
    functions = (
        " or test_activation and test_error and float32 and (gelu-torch or mish)"
        " or test_softmax and test_rows and softmax-65-torch.float32"
    )
    under(
        width,
        *(f"tests/test_{name}.py" for name in ("engine", "matmul", "vecmath", "activation", "softmax", "conv")),
        "-k",
        "test_engine and (half or masked_loads or lanewise or fma or packing or main_loop or width or (tile and float32))"
        " or linear_of_many_shapes and dtype0 or test_every_path and dtype0 or batches and dtype0"
        " or float32_within and (exp or tanh or erf)"
        " or depthwise_straight or short_sequences and slices" + functions * (width == NARROWER[0]),
    )


def test_an_impossible_instruction_set_is_refused() -> None:
    code = "from fastnn.kernels.cpu.engine.host import simd; simd()"
    done = fresh.python("-c", code, cwd=HERE.parent, env={**os.environ, "FASTNN_SIMD": "mmx"})
    assert done.returncode != 0
    assert "ValueError: FASTNN_SIMD is 'mmx', but this host allows only:" in done.stderr
