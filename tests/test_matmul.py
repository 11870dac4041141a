"""Matrix products on the CPU against float64, beside torch: shapes, strides, epilogues, special values, kept weights."""

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastnn.functional as ours
from fastnn._numerics import error
from fastnn.kernels.cpu import matmul as kernels
from fastnn.kernels.cpu.engine import host, packed
from fastnn.kernels.cpu.engine.activation_codes import CODES, PARAMETERS
from rule import lazily

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PARAMETERLESS = [name for name in CODES if PARAMETERS[name] == 0]
pytestmark = pytest.mark.usefixtures("poison", "threads")


def torch_activation(name: str | None) -> Callable[[Tensor], Tensor]:
    if name is None:
        return lambda x: x
    if name == "gelu_tanh":
        return lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    return getattr(torch.nn.functional, name)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**40)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


class Exactly(TorchFunctionMode):
    """Products of float64 matrices summed in long double: a reference that can judge float64 results."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        match func.__name__:
            case "matmul" | "mm" | "bmm" | "mv":
                return self.product(*args)
            case "addmm" | "baddbmm":
                product = self.product(*args[1:]) * kwargs.get("alpha", 1)
                return product + args[0] * kwargs["beta"] if kwargs.get("beta", 1) != 0 else product
            case "linear":
                product = self.product(args[0], args[1].mT)
                return product if len(args) < 3 or args[2] is None else product + args[2]
        return func(*args, **kwargs)

    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        with np.errstate(all="ignore"):
            return torch.as_tensor(np.asarray(a.numpy().astype(np.longdouble) @ b.numpy().astype(np.longdouble), np.float64))


def check(
    ours_: Callable[..., Tensor], torchs: Callable[..., Tensor], *args: Any, magnitudes: Callable[..., Tensor] | None = None
) -> None:
    """Our result, written into poisoned memory, obeys the error rule; the arguments stay as they were.

    ``magnitudes`` is the linear part of the function, whose sum of absolute values is the scale of rounding errors.
    """
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    out = ours_(*args)
    own = torchs(*args)
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    with Exactly() if own.dtype == torch.float64 else nullcontext():
        reference = torchs(*wide)
    scale = (magnitudes or torchs)(*(a.abs() if isinstance(a, Tensor) else a for a in wide))
    assert (out.shape, out.dtype, out.is_contiguous()) == (own.shape, own.dtype, True)
    ours_off, torchs_off = error(out, reference, scale, own), error(own, reference, scale)
    assert ours_off.within(torchs_off, out.dtype), f"our error {ours_off}, torch's {torchs_off}"
    for a, b in zip(args, before, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg="an argument was changed")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return ours.matmul(a, b, backend="cpu")


def test_poison_reaches_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that no kernel wrote is NaN in what the caller gets: the premise of this file."""
    from fastnn import backends

    a, b = randn(3, 4), randn(4, 5)
    matmul(a, b)
    monkeypatch.setattr(backends, "select", lambda *args, **kwargs: lambda out, *rest: None)
    assert matmul(a, b).isnan().all()


# Shapes and strides ---------------------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.sampled_from([1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 24, 25, 31, 47, 48, 49, 63, 65, 96, 97, 127, 131]), st.integers(0, 140)
)


@st.composite
def laid_out(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random values in memory of any order of dimensions, steps, gaps, offset, repeated dimensions; NaN in between."""
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else list(range(len(shape)))
    repeated = {d for d in range(len(shape)) if draw(st.integers(0, 9)) == 0}
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        if d in repeated:
            continue
        step *= draw(st.sampled_from([1, 1, 1, 2, 3]))
        strides[d] = step
        step = step * shape[d] + draw(st.sampled_from([0, 0, 0, 1, 5]))
    offset = draw(st.sampled_from([0, 0, 1, 7, 64]))
    memory = torch.full((offset + max(step, 1) + 3,), torch.nan, dtype=dtype)
    t = memory.as_strided(shape, strides, offset)
    once = t[tuple(slice(0, 1) if d in repeated else slice(None) for d in range(len(shape)))]
    once.copy_(randn(*once.shape, dtype=dtype, seed=seed, scale=draw(st.sampled_from([1.0, 0.01, 30.0]))))
    return t


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two operands that torch.matmul accepts: vectors, matrices, batches that broadcast."""
    dtype = draw(st.sampled_from(DTYPES))
    m, k, n = draw(SIZES), draw(SIZES), draw(SIZES)
    kinds = draw(st.sampled_from(["mm", "mm", "mm", "mv", "vm", "dot", "batched", "batched"]))
    a: tuple[int, ...] = (k,) if kinds in ("vm", "dot") else (m, k)
    b: tuple[int, ...] = (k,) if kinds in ("mv", "dot") else (k, n)
    if kinds == "batched":
        batch = draw(
            st.lists(st.sampled_from([0, 1, 2, 3, 4]) if draw(st.integers(0, 5)) == 0 else st.integers(1, 4), max_size=3)
        )
        left, right = (
            [1 if draw(st.integers(0, 3)) == 0 else x for x in batch][draw(st.integers(0, len(batch))) :] for _ in range(2)
        )
        a = (*left, m, k)
        b = (*right, k, n)
    return draw(laid_out(a, dtype, 1)), draw(laid_out(b, dtype, 2))


@given(products(), st.sampled_from([1, 2, 3]))
@example((randn(1, 8, 8200), randn(1, 8200, 8)), 2)  # few outputs and a long sum, in a batch of one
@example((randn(2, 3, 0), randn(0, 4)), 1)  # nothing to sum, in a batch
@example((randn(0, 4), randn(4, 3)), 1)
@example((randn(4, 3), randn(3, 0)), 1)
@example((randn(0), randn(0)), 1)
def test_matmul_of_any_shape_and_strides(operands: tuple[Tensor, Tensor], threads: int) -> None:
    torch.set_num_threads(threads)
    check(matmul, torch.matmul, *operands)


# Each of the paths that a product may take, in sizes at their borders; threads enough to divide the work.
PATHS = [
    (1, 512, 700), (2, 511, 300), (4, 1030, 290), (700, 512, 1), (1, 4100, 30),  # memory-bound
    (8, 16, 48), (9, 17, 49), (64, 64, 64), (65, 65, 65), (120, 120, 120),  # small
    (71, 523, 393), (263, 391, 257), (129, 1031, 200), (520, 70, 530),  # blocked, B packed; more than a block deep
    (8, 4096, 8), (5, 8209, 31), (16, 20011, 16),  # split along the sum
    (4099, 8, 8), (8, 8, 4099),  # tall, wide
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PATHS, ids=str)
def test_every_path(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    operands = randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1, scale=0.1)
    by_columns = [t.t().contiguous().t() for t in operands]
    rows_a, rows_b = operands
    columns_a, columns_b = by_columns
    for threads, a, b in [
        (1, rows_a, rows_b),
        (2, rows_a, rows_b),
        (5, rows_a, rows_b),
        (2, rows_a, columns_b),
        (3, columns_a, rows_b),
        (1, columns_a, columns_b),
    ]:
        torch.set_num_threads(threads)
        check(matmul, torch.matmul, a, b)


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a CPU with an eighth of an L2 cache of a usual size: 64 KiB."""
    found, smaller = kernels.caches(), host.Caches(16 << 10, 64 << 10, 1 << 20)
    assert found.l2 > smaller.l2
    for kept in (kernels._blocks, kernels._plan):
        kept.cache_clear()
    monkeypatch.setattr(kernels, "caches", lambda: smaller)
    yield
    for kept in (kernels._blocks, kernels._plan):
        kept.cache_clear()


def test_blocks_follow_the_cache(small_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _, depth = kernels._blocks(kernels._format(torch.float32))
    kernels._blocks.cache_clear()
    monkeypatch.setattr(kernels, "caches", host.caches)
    assert depth < kernels._blocks(kernels._format(torch.float32))[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(71, 523, 393), (129, 1031, 200), (520, 70, 530)], ids=str)
def test_many_small_blocks(shape: tuple[int, int, int], dtype: torch.dtype, small_cache: None) -> None:
    m, k, n = shape
    a, b = randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1, scale=0.1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        check(matmul, torch.matmul, a, b)
        check(matmul, torch.matmul, a.t().contiguous().t(), b.t().contiguous().t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches(dtype: torch.dtype) -> None:
    for left, right in [
        ((96, 33, 64), (96, 64, 17)),
        ((2, 3, 65, 20), (3, 20, 50)),
        ((4, 1, 9, 7), (5, 7, 11)),
        ((3, 130), (7, 130, 5)),
        ((2, 3, 4, 5, 6), (6,)),
        ((3, 4, 300), (300, 129)),
        ((1, 1, 9, 5), (5, 5)),
        ((2, 0, 3), (3, 4)),
        ((0, 2, 3), (3, 4)),
    ]:
        a, b = randn(*left, dtype=dtype), randn(*right, dtype=dtype, seed=1)
        check(matmul, torch.matmul, a, b)
        check(matmul, torch.matmul, a.transpose(0, -2).contiguous().transpose(0, -2), b)
    a, b = randn(4, 9, 33, dtype=dtype), randn(4, 33, 20, dtype=dtype, seed=1)
    check(lambda x, y: ours.bmm(x, y, backend="cpu"), torch.bmm, a, b)
    check(lambda x, y: ours.mm(x, y, backend="cpu"), torch.mm, a[0], b[0])
    check(lambda x, y: ours.mv(x, y, backend="cpu"), torch.mv, a[0], b[0, :, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_two_gigabytes(dtype: torch.dtype) -> None:
    far = 3 << 30
    memory = lazily(8 * far, dtype)
    step = far // dtype.itemsize
    for shape, strides in [((7, 40), (step, 1)), ((40, 7), (1, step)), ((6, 5, 4), (step, 4, 1)), ((4, 7, 3), (3, step, 1))]:
        a = memory.as_strided(shape, strides).copy_(randn(*shape, dtype=dtype))
        near = randn(*shape[:-2], shape[-1], 35, dtype=dtype, seed=1)
        check(matmul, torch.matmul, a, near)
        check(matmul, torch.matmul, near.mT, a.mT)
        check(matmul, torch.matmul, a[..., :1, :], near)
        check(
            lambda x, w: ours.linear(x, w, backend="cpu"),
            torch.nn.functional.linear,
            near[..., :9].mT.flatten(0, -2),
            a.flatten(0, -3)[-1:][0] if a.dim() > 2 else a,
        )


def test_more_than_two_to_the_31_elements_in_an_expanded_operand() -> None:
    row = randn(2**14 + 1)
    a = row.expand(2**17 + 3, 2**14 + 1)
    assert a.numel() > 2**31
    x = randn(2**14 + 1, seed=1)
    out = matmul(a, x)
    assert out.shape == (2**17 + 3,)
    assert (out == out[0]).all()
    check(matmul, torch.matmul, row, x)
    torch.testing.assert_close(out[0], row @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_more_than_two_to_the_31_outputs() -> None:
    torch.use_deterministic_algorithms(False)  # no poison: it takes longer than the product
    a, b = randn(2**16 + 5, 1, dtype=torch.bfloat16), randn(1, 2**15, dtype=torch.bfloat16, seed=1)
    out = matmul(a, b)
    assert out.numel() > 2**31
    for rows in (slice(0, 9), slice(2**15 - 4, 2**15 + 4), slice(2**16 - 4, None)):
        assert torch.equal(out[rows], a[rows] @ b)


# Epilogues ------------------------------------------------------------------------------------------------------------


def linear_reference(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    y = torch.nn.functional.linear(x, w, bias)
    return torch_activation(activation)(y if residual is None else y + residual)


def check_linear(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> None:
    def fast(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
        return ours.linear(x, w, bias, residual=residual, activation=activation, backend="cpu")

    def plain(x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, _: str | None) -> Tensor:
        return linear_reference(x, w, b, r, None)

    check(fast, linear_reference, x, w, bias, residual, activation, magnitudes=plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *PARAMETERLESS])
def test_linear_with_every_epilogue(activation: str | None, dtype: torch.dtype) -> None:
    for m, k, n in [(1, 40, 70), (3, 33, 50), (8, 64, 48), (33, 70, 97)]:
        x, w = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1, scale=0.2)
        for bias in (None, randn(n, dtype=dtype, seed=2)):
            for residual in (
                None,
                randn(m, n, dtype=dtype, seed=3),
                randn(n, m, dtype=dtype, seed=4).t(),
                randn(1, n, dtype=dtype).expand(m, n),
                randn(m, 1, dtype=dtype).expand(m, n),
            ):
                check_linear(x, w, bias, residual, activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_many_shapes(dtype: torch.dtype) -> None:
    for shape, n in [
        ((40,), 9),
        ((2, 3, 40), 50),
        ((5, 1, 40), 1),
        ((0, 40), 7),
        ((7, 0), 5),
        ((2, 3, 0), 5),
        ((9, 40), 0),
        ((300, 129), 520),
    ]:
        x, w = randn(*shape, dtype=dtype), randn(n, shape[-1], dtype=dtype, seed=1)
        for bias, residual in [(None, None), (randn(n, dtype=dtype, seed=2), randn(*shape[:-1], n, dtype=dtype, seed=3))]:
            check_linear(x, w, bias, residual, "gelu")
            check_linear(x, w.t().contiguous().t(), bias, residual, None)
            if x.dim() > 1:
                check_linear(x.transpose(0, -1).contiguous().transpose(0, -1), w, bias, residual, "relu")
    w = randn(64, 2 * 40, dtype=dtype)[::2, ::2]
    check_linear(randn(9, 40, dtype=dtype), w, randn(64, dtype=dtype)[::2], None, "tanh")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_whose_stride_is_not_one(dtype: torch.dtype) -> None:
    """Of a dimension of size 1 the stride says nothing, not even to is_contiguous()."""
    column = randn(5, 8, dtype=dtype).t()[:, :1]
    assert column.is_contiguous()
    assert column.stride(1) != 1
    check_linear(randn(8, 40, dtype=dtype), randn(1, 40, dtype=dtype, seed=1), None, column, None)
    check_linear(randn(8, 70, dtype=dtype), randn(1, 70, dtype=dtype, seed=1), randn(1, dtype=dtype), column, "gelu")
    check(matmul, torch.matmul, column, column.t())
    check(matmul, torch.matmul, column.t(), column)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 2), (0, 1), (0, -1.5), (1, 0), (-2, 0.25)])
def test_addmm_and_baddbmm(beta: float, alpha: float, dtype: torch.dtype) -> None:
    def both(module: Any, name: str) -> Callable[..., Tensor]:
        more = {"backend": "cpu"} if module is ours else {}
        return lambda x, a, b: getattr(module, name)(x, a, b, beta=beta, alpha=alpha, **more)

    def sizes(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return abs(beta) * x + abs(alpha) * (a @ b)

    for m, k, n in [(1, 33, 40), (9, 17, 49), (33, 7, 1), (70, 130, 97), (5, 0, 4), (200, 300, 520)]:
        a, b = randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1)
        for shape in [(m, n), (n,), (1, n), (m, 1), (1, 1), ()]:
            check(both(ours, "addmm"), both(torch, "addmm"), randn(*shape, dtype=dtype, seed=2), a, b, magnitudes=sizes)
        check(both(ours, "addmm"), both(torch, "addmm"), randn(n, m, dtype=dtype, seed=3).t(), a, b, magnitudes=sizes)
    a, b = randn(3, 9, 17, dtype=dtype), randn(3, 17, 50, dtype=dtype, seed=1)
    for shape in [(3, 9, 50), (9, 50), (50,), (1, 9, 1), (3, 1, 1)]:
        check(both(ours, "baddbmm"), both(torch, "baddbmm"), randn(*shape, dtype=dtype, seed=2), a, b, magnitudes=sizes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_beta_zero_the_input_is_ignored(dtype: torch.dtype) -> None:
    nan = torch.full((9, 50), torch.nan, dtype=dtype)
    a, b = randn(9, 17, dtype=dtype), randn(17, 50, dtype=dtype, seed=1)
    assert ours.addmm(nan, a, b, beta=0, backend="cpu").isfinite().all()
    assert ours.addmm(nan, a, b, beta=1, backend="cpu").isnan().all()
    assert ours.baddbmm(nan[None], a[None], b[None], beta=0, backend="cpu").isfinite().all()


# Special values, and the same bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 33, 50), (3, 17, 20), (50, 33, 1), (9, 17, 49), (65, 71, 50), (8, 4101, 9), (70, 523, 391)], ids=str
)
def test_nan_and_infinity_spread_as_in_torch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    for value in (torch.nan, torch.inf, -torch.inf):
        for i, j in [(0, 0), (m - 1, k - 1), (m // 2, k // 2)]:
            a, b = randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1)
            a[i, j] = value
            check(matmul, torch.matmul, a, b)
            out = matmul(a, b)
            assert not out[i].isfinite().any()
            assert torch.cat([out[:i], out[i + 1 :]]).isfinite().all()
            b[j] = 0  # zero times infinity
            assert matmul(a, b)[i].isnan().all()
            right = matmul(b.t().contiguous(), a.t())
            assert right[:, i].isnan().all()
            assert torch.cat([right[:, :i], right[:, i + 1 :]], 1).isfinite().all()


@pytest.mark.parametrize("activation", [None, *PARAMETERLESS])
def test_nan_passes_every_epilogue(activation: str | None) -> None:
    x, w, bias = randn(9, 33), randn(50, 33, seed=1), randn(50, seed=2)
    for value in (torch.nan, torch.inf, -torch.inf):
        bias[3], residual = value, randn(9, 50, seed=3)
        residual[2, 5] = value
        check_linear(x, w, bias, residual, activation)


def test_large_half_precision_results_overflow_as_in_torch() -> None:
    a, b = torch.full((9, 33), 300.0, dtype=torch.float16), torch.full((33, 50), 300.0, dtype=torch.float16)
    assert torch.equal(matmul(a, b), a @ b)
    assert matmul(a, b).isinf().all()
    b[1::2] *= -1  # the sum is 300² though its parts exceed the range: float32 carries them
    assert torch.equal(matmul(a * 0.5, b), a * 0.5 @ b)
    assert matmul(a * 0.5, b).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for m, k, n in PATHS:
            a, b = randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1)
            first = matmul(a, b)
            for _ in range(3):
                assert torch.equal(matmul(a, b), first), (m, k, n, threads)


# Weights that are kept packed -----------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[Any]:
    packed.clear()
    before = packed.limit()
    yield packed
    packed.limit(before)
    packed.clear()


X = randn(33, 200)


def served(w: Tensor, times: int = 3) -> Tensor:
    """The last of a few products without gradients: packed for keeps by then."""
    with torch.no_grad():
        for _ in range(times):
            out = ours.linear(X.to(w.dtype), w, backend="cpu")
        check(lambda x, w: ours.linear(x, w, backend="cpu"), torch.nn.functional.linear, X.to(w.dtype), w)
    return out


def weight(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(randn(300, 200, dtype=dtype, seed=5))


@pytest.mark.parametrize("value", ["abc", "-1", "1.5"])
def test_a_setting_of_the_store_that_is_no_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_limit", None)
    monkeypatch.setenv("FASTNN_PACK_MB", "3")
    assert packed.limit() == 3
    monkeypatch.setenv("FASTNN_PACK_MB", value)
    with pytest.raises(ValueError, match=rf"FASTNN_PACK_MB is '{value}', but must be a whole number of MiB, 0 or more"):
        packed.limit()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_kept_and_its_memory_returned(dtype: torch.dtype, store: Any) -> None:
    w = weight(dtype)
    served(w)
    held = store.held()
    assert held >= w.numel() * w.itemsize
    served(w)
    assert store.held() == held
    other = weight(dtype)
    served(other)
    assert store.held() == 2 * held
    del w
    gc.collect()
    assert store.held() == held
    store.clear()
    assert store.held() == 0
    served(other)
    assert store.held() == held


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_packed_once(dtype: torch.dtype, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, packings = kernels._PACK[dtype].load(), []
    monkeypatch.setattr(kernels._PACK[dtype], "run", lambda *args: packings.append(args) or pack(*args))  # type: ignore[func-returns-value]
    w = weight(dtype)
    served(w, 5)
    assert len(packings) == 1
    in_place(w, 0)
    served(w, 5)
    assert len(packings) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_and_unpacked_give_the_same_bits(dtype: torch.dtype, store: Any) -> None:
    for m in (5, 8, 33, 130):
        w, x = weight(dtype), randn(m, 200, dtype=dtype)
        with torch.no_grad():
            results = [ours.linear(x, w, backend="cpu") for _ in range(4)]
        assert store.held() > 0
        assert all(torch.equal(r, results[0]) for r in results)
        store.clear()


def optimizer_step(w: torch.nn.Parameter, seed: int) -> None:
    w.grad = torch.ones_like(w)
    torch.optim.SGD([w], 0.5).step()


def load_state(w: torch.nn.Parameter, seed: int) -> None:
    module = torch.nn.Linear(200, 300, bias=False)
    module.weight = w
    module.load_state_dict({"weight": randn(300, 200, seed=seed)})


def in_place(w: torch.nn.Parameter, seed: int) -> None:
    with torch.no_grad():
        w[7, 11] += 100


def through_a_view(w: torch.nn.Parameter, seed: int) -> None:
    with torch.no_grad():
        w.view(-1)[-1:].fill_(50.0 + seed)


def through_numpy(w: torch.nn.Parameter, seed: int) -> None:
    w.detach().numpy()[:] *= 2


def replace_data(w: torch.nn.Parameter, seed: int) -> None:
    w.data = randn(300, 200, seed=seed)


def replace_data_by_nearly_the_same(w: torch.nn.Parameter, seed: int) -> None:
    near = w.data.clone()
    near[7, 11] += 100  # where no sample of the elements would see it
    w.data = near


def write_data(w: torch.nn.Parameter, seed: int) -> None:
    w.data.mul_(-1)


def other_layout(w: torch.nn.Parameter, seed: int) -> None:
    w.data = randn(200, 300, seed=seed).t()


def resize(w: torch.nn.Parameter, seed: int) -> None:
    w.requires_grad_(False).resize_(300 - seed, 200)


def set_storage(w: torch.nn.Parameter, seed: int) -> None:
    with torch.no_grad():
        w.set_(randn(300, 200, seed=seed).untyped_storage(), 0, (300, 200), (200, 1))


CHANGES = [
    optimizer_step,
    load_state,
    in_place,
    through_a_view,
    through_numpy,
    replace_data,
    write_data,
    other_layout,
    resize,
    set_storage,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_packed_anew(change: Callable[[torch.nn.Parameter, int], None], store: Any) -> None:
    w = weight()
    old = served(w)
    assert store.held() > 0
    for seed in (21, 22):
        change(w, seed)
        new = served(w, 1)
        assert new.shape != old.shape or not torch.equal(new, old)
        served(w)
        old = new
    one = store.held()
    del w
    gc.collect()
    assert store.held() == 0, f"{one} bytes were held"


def test_a_tensor_at_the_same_address_is_another_weight(store: Any) -> None:
    for seed in range(5):
        w = torch.nn.Parameter(randn(300, 200, seed=seed))  # often at its predecessor's id and address
        served(w)
        del w
    gc.collect()
    assert store.held() == 0


def test_training_keeps_nothing(store: Any) -> None:
    """A weight that changes at each step is never worth packing for keeps."""
    w = weight()
    for seed in range(4):
        ours.linear(X, w, backend="cpu").sum().backward()
        assert store.held() == 0
        optimizer_step(w, seed)


def test_the_limit_holds(store: Any) -> None:
    weights = [torch.nn.Parameter(randn(700, 200, seed=s)) for s in range(4)]  # 560 kB each
    store.limit(1)
    for w in weights * 2:
        served(w)
        assert 0 < store.held() <= 1 << 20
    big = torch.nn.Parameter(randn(2000, 200))
    served(big)
    assert store.held() <= 1 << 20
    store.limit(0)
    assert store.held() == 0
    for w in weights:
        served(w)
    assert store.held() == 0
    store.limit(64)
    served(weights[0])
    assert store.held() > 0


def test_a_packing_that_fits_exactly_but_for_its_alignment_is_not_kept(store: Any) -> None:
    store.limit(1)
    w = torch.nn.Parameter(randn(1024, 256))  # its panels take 1 MiB, and 64 bytes to begin at a cache line
    with torch.no_grad():
        for _ in range(3):
            ours.linear(randn(33, 256), w, backend="cpu")
    assert store.held() <= 1 << 20


def test_a_limit_below_zero_is_refused(store: Any) -> None:
    with pytest.raises(ValueError, match=r"limit\(\): megabytes must be 0 or more, got -1"):
        store.limit(-1)


def test_inference_mode(store: Any) -> None:
    with torch.inference_mode():
        w = randn(300, 200, seed=5).clone()
        assert w.is_inference()
        first = served(w)
        w.mul_(2)  # no version counter tells of this
        assert torch.equal(served(w), first * 2)
