"""Attention on the GPU, or in Triton's interpreter, against the plain maths in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")

import triton
import triton.language as tl

from fastnn.kernels.gpu import attention as kernels
from fastnn.kernels.gpu import attention_code as code
from fastnn.kernels.gpu.engine import launch
from fastnn.kernels.gpu.engine.launch import signed
from fastnn.kernels.layout import mix
from fastnn.kernels.reference import attention as plain
from fastnn.kernels.reference.activation import random_bits
from fastnn.ops import attention as ops
from gpu import DEVICE, DTYPES, HERE, run, watched
from rule import LAYOUTS, randn

INF, NAN = float("inf"), float("nan")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]


@pytest.fixture(autouse=True, params=["added", "ordered"] if HERE else ["others", "added", "ordered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the forward, float32 too, and the three of the backward; a GPU has its own of the first"""
    hopper = request.param != "others"
    monkeypatch.setattr(kernels, "order_matters", lambda: request.param == "ordered")  # which memory full of NaN asks for
    if not HERE:
        monkeypatch.setattr(kernels.Call, "behind", lambda self, rows: hopper and not self.kind & code.PREFIX.value)
        monkeypatch.setattr(kernels.Call, "hopper", property(lambda self: hopper and self.query.itemsize == 2))
    return str(request.param)


def tensors(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value: batch, heads, heads of keys, queries, keys, sizes of a key and of a value"""
    b, h, hk, lq, lk, d, dv = sizes
    made = [randn(b, h, lq, d, dtype=dtype), randn(b, hk, lk, d, dtype=dtype, seed=1), randn(b, hk, lk, dv, dtype=dtype, seed=2)]
    return [t.to(DEVICE) for t in made]


def wide(t: Any) -> Any:
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def close(mine: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Within a few ulp of the largest number; weights are rounded to the values' dtype before the second product."""
    finite = wanted[wanted.isfinite()]
    largest = max(1.0, float(finite.abs().amax())) if finite.numel() else 1.0
    tolerance = 16 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    torch.testing.assert_close(mine.double(), wanted, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def check(*tensors: Tensor, mask: Tensor | None = None, slopes: Tensor | None = None,
          offsets: tuple[Tensor | None, Tensor | None] = (None, None), backward: bool = True, **options: Any) -> None:
    """Both results, and the gradients of all that has one. ``tensors``: query, key and value."""
    q, k, v = tensors
    args: tuple[Any, ...] = (q, k, v, mask, slopes, *offsets)
    args = tuple(t.to(DEVICE) if isinstance(t, Tensor) else t for t in args)
    o = plain.Options(**({"scale": q.shape[-1] ** -0.5} | options))
    out, lse, stats = run(ops.attention_lse, *args, *o)
    exact_out, exact_lse, exact_stats = plain.attention_lse(*map(wide, args), *o)
    assert out.dtype == q.dtype
    close(out, exact_out, q.dtype)
    close(lse, exact_lse, torch.float32)
    close(stats[1] * torch.exp2(stats[0]), exact_stats[1] * torch.exp2(exact_stats[0]), torch.float32)
    if not backward:
        return
    g, g_lse = randn(*out.shape, seed=5).to(q.dtype).to(DEVICE), randn(*lse.shape, seed=6).to(DEVICE)
    needs = mask is not None and mask.dtype != torch.bool
    found = run(ops.attention_backward, g, *args, out, stats, g_lse, needs, *o)
    exact = plain.attention_backward(wide(g), *map(wide, args), exact_out, exact_stats, wide(g_lse), needs, *o)
    for mine, wanted, like in zip(found, exact, (q, k, v, mask if mask is not None and needs else q), strict=True):
        assert (mine.shape, mine.dtype) == (wanted.shape, like.dtype)
        close(mine, wanted, q.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "right"), [
    ((1, 1, 1, 1, 1, 1, 1), -1), ((1, 2, 1, 35, 70, 16, 9), -1), ((2, 1, 1, 70, 70, 20, 32), 0), ((1, 1, 1, 17, 19, 130, 256), 0),
], ids=str)
def test_against_float64(shape: Any, right: int, dtype: torch.dtype) -> None:
    check(*tensors(*shape, dtype=dtype), right=right)


def test_few_programs_share_out_the_keys() -> None:
    """Also of queries that are too many for one program; joined in rows that see all, some or nothing"""
    for options in ({}, {"right": 0, "bottom_right": True}, {"left": 3, "right": 0}, {"softcap": 2.0}):
        check(*tensors(1, 1, 1, 40, 1300, 16, 9), backward=False, **options)
    q, k, v = tensors(1, 1, 1, 40, 1300, 16, 9)
    check(q, k, v, mask=randn(40, 1300) > 3, backward=False)


EXTRAS: dict[str, dict[str, Any]] = {
    "window": {"left": 11, "right": 5}, "left window": {"left": 3}, "bottom right": {"right": 0, "bottom_right": True},
    "prefix": {"left": 9, "right": 0, "prefix": 5}, "global": {"left": 9, "right": 4, "prefix": 5},
    "long prefix": {"right": 0, "prefix": 40}, "softcap": {"softcap": 2.0},
    "alibi": {"slopes": torch.tensor([[0.5, 0.1]]), "bottom_right": True},
    "dropout": {"dropout": 0.4, "seed": 2**63 - 5, "right": 0},
    "all": {"left": 30, "right": 7, "softcap": 3.0, "dropout": 0.2, "seed": 1, "slopes": torch.linspace(0, 1, 2), "prefix": 2,
            "scale": 0.7, "mask": randn(37, 70, seed=8).masked_fill(randn(37, 70) > 1, -INF)},
    "negative scale": {"scale": -0.5}, "zero scale": {"scale": 0.0},
    "windows beyond 31 bits": {"left": 2**31 - 1, "right": 2**31 - 1, "prefix": 2**31 - 1},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("name", EXTRAS)
def test_extras(name: str, dtype: torch.dtype) -> None:
    check(*tensors(1, 2, 1, 37, 70, 16, 9, dtype=dtype), **EXTRAS[name])


MASKS = {
    "full": randn(2, 2, 19, 40), "shared by all": randn(19, 40), "a row": randn(2, 1, 1, 40), "a column": randn(2, 19, 1),
    "one": randn(1, 1), "transposed and stepped": randn(2, 1, 80, 19)[:, :, ::2].mT,
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    """Of every shape that broadcasts, and every stride; with the gradient of what is added."""
    q, k, v = tensors(2, 2, 2, 19, 40, 16, 8)
    check(q, k, v, mask=MASKS[name])
    check(q, k, v, mask=MASKS[name] > -0.5, backward=name == "shared by all")


def test_masks_of_other_dtypes() -> None:
    q, k, v = tensors(1, 2, 1, 17, 31, 16, 8, dtype=torch.bfloat16)
    check(q, k, v, mask=randn(17, 31))
    check(q, k, v, mask=randn(2, 17, 31, dtype=torch.bfloat16))


def test_a_mask_for_one_of_two_batch_dimensions() -> None:
    q, k, v = (randn(2, 3, 2, 9, 8, seed=n).to(DEVICE) for n in range(3))
    check(q, k, v, mask=randn(3, 2, 9, 9))


def test_rows_that_see_nothing() -> None:
    """0, and a gradient of 0; but all keys alike where a mask of the lowest numbers hides them, as torch has it."""
    q, k, v = tensors(1, 2, 2, 9, 40, 16, 16)
    mask = torch.zeros(9, 40)
    mask[3] = -INF
    check(q, k, v, mask=mask)
    check(q, k, v, mask=mask == 0)
    mask[5] = torch.finfo(torch.float32).min
    out, _ = run(ops.attention, q, k, v, mask.to(DEVICE), None, None, None, *plain.Options())
    assert not out[:, :, 3].any()
    torch.testing.assert_close(out[:, :, 5], v.mean(2))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_keys_that_end_within_a_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all logits are far below 0, what takes the place of keys beyond the last would weigh without bound."""
    q, k, v = tensors(1, 2, 2, 40, 40, 16, 16, dtype=dtype)
    low, mask, slopes = q.abs() * 0.1 + 30, torch.zeros(40, 40, device=DEVICE), torch.tensor([5.0, 9.0], device=DEVICE)
    mask[3] = torch.finfo(torch.float32).min
    for query, key, added, each, right in (
        (low, -k.abs() - 1, None, None, -1), (low, -k.abs() - 1, None, None, 0), (low, -k.abs() * 0.1 - 0.1, None, None, -1),
        (q, k, mask, None, -1), (q, k, None, slopes, -1),
    ):  # fmt: skip
        given, o = (query, key, v, added, each, None, None), plain.Options(scale=0.25, right=right)
        out, stats = run(ops.attention, *given, *o)
        args = randn(*out.shape, dtype=dtype, seed=5).to(DEVICE), *given, out, stats, None, False, *o
        found = run(ops.attention_backward, *args)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "order_matters", lambda: True)
            wanted = run(ops.attention_backward, *args)
        for mine, other in zip(found[:3], wanted, strict=False):
            assert other.isfinite().all()
            close(mine, wide(other), dtype)


@pytest.mark.parametrize("place", ["value", "sequence", "grad", "grad_lse", "scale", "huge"])
def test_special_values_in_the_backward(place: str) -> None:
    """NaN and Inf spread no further than in the plain maths, and huge logits or tiny scales make none."""
    q, k, v = tensors(1, 2, 2, 40, 40, 16, 16, dtype=torch.bfloat16)  # into no other head, above all
    q, k = (q, k) if place != "huge" else (torch.full_like(q, 6e4), torch.full_like(k, 6e4))
    o = plain.Options(scale=1e-38 if place == "scale" else 0.25, right=0)
    ends = torch.tensor([0, 13, 40], device=DEVICE) if place == "sequence" else None
    if ends is not None:
        q, k, v = q[0], k[0], v[0]
    if place in ("value", "sequence"):
        v.view(2, 40, 16)[0, 5, 1] = INF
    others = None, None, ends, ends
    out, lse, stats = run(ops.attention_lse, q, k, v, *others, *o)
    g, g_lse = randn(*out.shape, seed=5).to(q.dtype).to(DEVICE), randn(*lse.shape, seed=6).to(DEVICE)
    if place == "grad":
        g[0, 0, 3, 2] = INF
    if place == "grad_lse":
        g_lse[0, 0, 3] = INF
    found = run(ops.attention_backward, g, q, k, v, *others, out, stats, g_lse, False, *o)[:3]
    if ends is not None:  # the plain maths let them through
        assert all(t[:, 13:].isfinite().all() for t in found)
    wide_out, _, wide_stats = plain.attention_lse(wide(q), wide(k), wide(v), *others, *o)
    saved = wide_out, wide_stats, wide(g_lse), False, *o
    exact = plain.attention_backward(wide(g), wide(q), wide(k), wide(v), *others, *saved)
    for mine, wanted in zip(found, exact, strict=False):
        assert not (~mine.isfinite() & wanted.isfinite().to(mine.device)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_where_the_order_of_sums_matters(dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic algorithms have programs of their own for the gradients of queries, which others add to memory."""
    monkeypatch.setattr(kernels, "order_matters", torch.are_deterministic_algorithms_enabled)
    launched = watched(monkeypatch, lambda kernel, options: kernel.__name__)
    given = *tensors(2, 4, 2, 70, 75, 16, 16, dtype=dtype), *[None] * 4
    o = plain.Options(scale=0.25, right=0)
    out, stats = run(ops.attention, *given, *o)
    args = randn(*out.shape, dtype=dtype, seed=5).to(DEVICE), *given, out, stats, None, False, *o
    del launched[:]
    first, second = (run(ops.attention_backward, *args) for _ in range(2))  # memory full of NaN is theirs
    assert launched == ["backward_queries", "backward_keys"] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.use_deterministic_algorithms(False)
    found = run(ops.attention_backward, *args)
    added = launched[4:] == ["backward_rows", "backward_keys"]
    assert added or launched[4:] == ["backward_queries", "backward_keys"]
    assert HERE or added == (dtype == torch.bfloat16 and way != "others")
    for mine, wanted in zip(found, first, strict=True):
        close(mine, wide(wanted), dtype)


def test_special_values() -> None:
    """NaN and Inf go where torch lets them go."""
    for place, value in [(0, NAN), (0, 3e38), (1, -INF), (2, INF)]:
        q, k, v = inputs = tensors(1, 1, 1, 20, 40, 16, 16)
        inputs[place][0, 0, 7, 3] = value
        out, _ = run(ops.attention, q, k, v, None, None, None, None, *plain.Options(scale=0.25))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("case", [
    {"mask": randn(1, 75)}, {"right": 0, "bottom_right": True, "dropout": 0.3, "seed": 4, "mask": randn(40, 1)},
    {"mask": randn(1, 1)},
    {"mask": randn(40, 75), "left": 5, "prefix": 3},
], ids=["a row", "a column", "one", "window"])
def test_variable_lengths(case: dict[str, Any]) -> None:
    """Sequences one after the other, one of them without queries, one without keys."""
    offsets = torch.tensor([0, 1, 1, 5, 40]), torch.tensor([0, 30, 35, 35, 75], dtype=torch.int32)
    check(*(t[0] for t in tensors(1, 2, 1, 40, 75, 16, 8)), offsets=offsets, **case)


def test_offsets_that_nobody_looked_at() -> None:
    """They leave no tensor, and no row without a value: they count as the rising ones that are next to them."""
    q, k, v = (t[0] for t in tensors(1, 2, 1, 20, 20, 16, 8))
    o = plain.Options(scale=0.3, right=0)
    results = []
    for values in ([7, -3, 12, 5, 99], [0, 0, 12, 12, 20]):
        offsets = torch.tensor(values, device=DEVICE)
        out, stats = torch.full_like(v[:1].expand(2, 20, 8), NAN), q.new_empty(2, 2, 20)
        kernels.attention((out, stats), q, k, v, None, None, offsets, offsets, *o)
        results.append(out)
    assert results[0].isfinite().all()
    assert torch.equal(*results)


@pytest.mark.parametrize("options", [
    {}, {"right": 0, "bottom_right": True}, {"left": 300, "right": 0, "prefix": 3, "bottom_right": True}, {"left": 20,
                                                                                                           "bottom_right": True},
    {"dropout": 0.5, "seed": 3, "slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "softcap": 5.0, "mask": randn(4, 1, 530)},
], ids=str)
def test_few_queries_share_out_their_keys(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = [], launch.run

    def note(kernel: Any, *args: Any, **constants: Any) -> None:
        started.append(kernel.__name__)
        start(kernel, *args, **constants)

    monkeypatch.setattr(launch, "run", note)
    check(*tensors(1, 4, 2, 3, 530, 16, 9), backward=False, **options)
    assert DEVICE == "cuda" or started == ["forward", "join"]


def test_layouts() -> None:
    """The values do not depend on where they lie."""
    inputs = tensors(2, 3, 3, 9, 30, 16, 8)
    o = plain.Options(scale=0.3, right=0, bottom_right=True)
    out, stats = run(ops.attention, *inputs, *[None] * 4, *o)
    g = randn(*out.shape, seed=3).to(DEVICE)
    grads = run(ops.attention_backward, g, *inputs, *[None] * 4, out, stats, None, False, *o)
    for name, lay in LAYOUTS.items():
        lying = [lay(t) for t in inputs]
        result, numbers = run(ops.attention, *lying, *[None] * 4, *o)
        torch.testing.assert_close(result, out, rtol=1e-6, atol=1e-6)
        if name in ("rotated", "sliced"):
            found = run(ops.attention_backward, lay(g), *lying, *[None] * 4, result, numbers, None, False, *o)
            for mine, wanted in zip(found, grads, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shapes", [
    ((7, 8), (9, 8), (9, 8)), ((3, 7, 8), (9, 8), (9, 5)), ((2, 2, 3, 7, 8), (2, 2, 3, 9, 8), (2, 2, 3, 9, 8)),
    ((2, 3, 7, 8), (1, 3, 9, 8), (3, 9, 8)),
], ids=str)
def test_batch_dimensions(shapes: Any) -> None:
    check(*(randn(*shape, seed=n).to(DEVICE) for n, shape in enumerate(shapes)))


def test_nothing_beyond_the_tensors_is_read_or_written() -> None:
    """All of it lies in memory full of NaN, which stays."""
    def inside(t: Tensor) -> tuple[Tensor, Tensor]:
        room = torch.full((*t.shape[:-2], t.shape[-2] + 7, t.shape[-1] + 5), NAN, dtype=t.dtype, device=DEVICE)
        return room, room[..., 3:-4, 2:-3].copy_(t)

    q, k, v = tensors(1, 2, 1, 35, 41, 20, 9)
    lying = [inside(t)[1] for t in (q, k, v)]
    for right in (-1, 0):
        o = plain.Options(scale=0.2, right=right)
        rooms = [inside(torch.full_like(t, NAN)) for t in (q.new_empty(1, 2, 35, 9), q, k, v)]
        stats, nothing = q.new_empty(2, 1, 2, 35), q.new_empty(0)
        out, *grads = (t for _, t in rooms)
        kernels.attention((out, stats), *lying, *[None] * 4, *o)
        g = inside(randn(1, 2, 35, 9))[1]
        kernels.attention_backward((*grads, nothing), g, *lying, *[None] * 4, out, stats, None, False, *o)
        for room, t in rooms:
            assert not t.isnan().any()
            t.fill_(NAN)
            assert room.isnan().all()


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5, 8), (2, 3, 0, 5, 8), (2, 3, 4, 0, 8)], ids=str)
def test_empty(sizes: tuple[int, ...]) -> None:
    b, h, lq, lk, d = sizes
    check(*tensors(b, h, h, lq, lk, d, 6))


@triton.jit(do_not_specialize=["row", "LK", "key0", "key1", "least"])
def kept(out, row, LK, key0, key1, least, N: tl.constexpr):  # type: ignore[no-untyped-def]
    j = tl.arange(0, N)[None, :]
    low, mixed, mixed_next = code._dropout_row(row + tl.zeros((1, 1), tl.int64), LK, 0, key0)
    tl.store(out + j, code._kept(low, mixed, mixed_next, j, key1, least).to(tl.int8))


def test_dropout_beyond_32_bits() -> None:
    """A row's weights may lie on both sides of a multiple of 2³²."""
    length, seed, first = (1 << 31) - 16, 2**62 + 11, 2 * ((1 << 31) - 16)
    out = torch.empty(1, 64, dtype=torch.int8, device=DEVICE)
    key1 = mix((seed >> 32) + 0x9E3779B9 & 0xFFFFFFFF)
    launch.run(kept, 1, out.device, out, 2, length, *(signed(n) for n in (seed & 0xFFFFFFFF, key1, 1 << 31)), N=64)
    bits = _bits_at(first, 64, seed)
    assert (first + 64) >> 32 != first >> 32
    assert out.flatten().tolist() == [int(b >= 1 << 31) for b in bits]


def _bits_at(first: int, n: int, seed: int) -> list[int]:
    """What random_bits has there, without all that comes before."""
    def one(i: int) -> int:
        a, b = mix((seed & 0xFFFFFFFF) ^ mix(i >> 32)), mix((seed >> 32) + 0x9E3779B9 & 0xFFFFFFFF)
        return mix(mix((i & 0xFFFFFFFF) + a & 0xFFFFFFFF) ^ b)

    assert [one(i) for i in range(8)] == random_bits(8, seed).tolist()
    return [one(i) for i in range(first, first + n)]


def test_refusals() -> None:
    q, k, v = tensors(1, 1, 1, 4, 5, 8, 8)
    with pytest.raises(RuntimeError, match="float64"):
        run(ops.attention, q.double(), k.double(), v.double(), *[None] * 4, *plain.Options())
    q, k, v = tensors(1, 1, 1, 4, 5, 8, 257)
    with pytest.raises(RuntimeError, match="257"):
        run(ops.attention, q, k, v, *[None] * 4, *plain.Options())
