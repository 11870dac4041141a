"""Scaled dot-product attention on the CPU against float64, beside torch; what torch has no word for against the plain maths."""

import itertools
from array import array
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnn
import fastnn.functional as ours
from fastnn import ops
from fastnn._numerics import attention_scale
from fastnn.kernels.cpu import attention as kernels
from fastnn.kernels.cpu.attention_fields import TABLE
from fastnn.kernels.reference import attention as plain
from fastnn.kernels.reference.activation import _mix as mix
from rule import DTYPES, LAYOUTS, check, randn

F = torch.nn.functional
INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.usefixtures("poison", "threads")
attention: Callable[..., Any] = ours.scaled_dot_product_attention
torchs: Callable[..., Tensor] = F.scaled_dot_product_attention  # whose stubs know no unpacked lists


def tensors(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    """Query, key and value: batch, heads, heads of keys, queries, keys, sizes of a key and of a value."""
    b, h, hk, lq, lk, d, dv = shape
    made = [randn(b, h, lq, d, dtype=dtype), randn(b, hk, lk, d, dtype=dtype, seed=1), randn(b, hk, lk, dv, dtype=dtype, seed=2)]
    return [t.requires_grad_(grad) for t in made]


# Shapes around the tile (6 or 12 rows, panels of 8 to 32 keys), the block (48, 96 or 120 queries, 128 or 512 keys) and the rows
# that are read in place (8).
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1), (2, 3, 3, 7, 5, 5, 3), (1, 2, 2, 49, 33, 8, 17), (1, 2, 1, 121, 130, 64, 64), (2, 4, 2, 3, 67, 20, 40),
    (1, 2, 1, 13, 1301, 32, 16), (1, 8, 2, 1, 300, 16, 16), (1, 1, 1, 50, 61, 256, 129),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = tensors(*shape, dtype=dtype)
    gqa = shape[1] != shape[2]
    for causal in (False, True):
        check(lambda space, q, k, v, c=causal: space.scaled_dot_product_attention(q, k, v, is_causal=c, enable_gqa=gqa),
              inputs, attention_scale(is_causal=causal))


MASKS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "full": lambda r: r(2, 2, 50, 70), "shared by all": lambda r: r(50, 70), "a row": lambda r: r(2, 1, 1, 70),
    "vector": lambda r: r(70), "a column": lambda r: r(2, 50, 1), "one": lambda r: r(1, 1), "heads": lambda r: r(2, 1, 50, 70),
    "transposed": lambda r: r(70, 50).t(), "stepped": lambda r: r(2, 1, 50, 140)[..., ::2],
    "expanded": lambda r: r(70).expand(2, 2, 50, 70), "expanded and transposed": lambda r: r(70, 50).t().expand(2, 2, 50, 70),
}


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, kind: str) -> None:
    """Of every shape that broadcasts, and every stride; with the gradient of what is added."""
    mask = MASKS[name](lambda *shape: randn(*shape, seed=7))
    mask = mask > -0.5 if kind == "bool" else mask.requires_grad_()

    def call(space: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return space.scaled_dot_product_attention(q, k, v, m if m.dim() > 1 else m[None])
    check(call, [*tensors(2, 2, 2, 50, 70, 16, 8), mask], attention_scale())


def test_a_bias_whose_keys_threads_share() -> None:
    check(lambda space, q, k, v, m: space.scaled_dot_product_attention(q, k, v, m),
          [*tensors(1, 3, 3, 20, 301, 8, 8), randn(20, 301, seed=7).requires_grad_()], attention_scale())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_masks_of_other_dtypes(dtype: torch.dtype) -> None:
    inputs = tensors(2, 2, 1, 17, 31, 16, 8, dtype=dtype)
    added = [randn(*shape, dtype=dtype).requires_grad_() for shape in ((17, 31), (2, 17, 1))]
    for mask in (randn(2, 1, 17, 31) > 0, *added):
        check(lambda space, q, k, v, m: space.scaled_dot_product_attention(q, k, v, m, enable_gqa=True), [*inputs, mask],
              attention_scale())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_float32_mask_beside_others(dtype: torch.dtype) -> None:
    q, k, v = tensors(1, 2, 2, 17, 31, 16, 8, dtype=dtype, grad=False)
    mask = randn(17, 31).requires_grad_()
    out = attention(q, k, v, mask, backend="cpu")
    expected = torchs(q.double(), k.double(), v.double(), mask.double())
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    (grad,), (wanted,) = (torch.autograd.grad(y.sum(), mask) for y in (out.double(), expected))
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, wanted, rtol=2 * tolerance, atol=2 * tolerance)
    for expanded in (mask[:1].expand(2, 17, 31), mask[:, :1].expand(2, 17, 31)):
        rows = kernels._readable(expanded, q)
        assert rows is not None
        assert rows.untyped_storage().nbytes() <= mask.nbytes * 2
        out, expected = attention(q, k, v, expanded, backend="cpu"), torchs(q.double(), k.double(), v.double(), expanded.double())
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lowest_numbers_are_no_infinities(dtype: torch.dtype) -> None:
    """Where a mask is finfo.min, which many write for -Inf, in a whole row, all that is not -Inf weighs the same, as in torch"""
    low = torch.finfo(dtype).min
    for shape, lq in (((9, 40), 9), ((1, 40), 1), ((9, 1), 9)):
        q, k, v = tensors(1, 2, 2, lq, 40, 16, 8, dtype=dtype)
        mask = torch.zeros(shape, dtype=dtype)
        mask[0] = low
        if shape == (9, 40):
            mask[5], mask[7, 3:] = low, low
            mask[5, :30] = -INF
        mask.requires_grad_()
        mine, wanted = (f(q, k, v, mask) for f in (lambda *t: attention(*t, backend="cpu"), torchs))
        upstream = randn(*mine.shape, dtype=dtype)
        grads, expected = (torch.autograd.grad(y, (q, k, v, mask), upstream) for y in (mine, wanted))
        tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=3 * tolerance)

def test_rows_that_see_nothing() -> None:
    """0, and a gradient of 0, whatever stands in the keys that they do not see."""
    for mask in (torch.ones(9, 40).bool(), torch.zeros(9, 40)):
        mask[3], mask[8] = (False, False) if mask.dtype == torch.bool else (-INF, -INF)
        q, k, v = tensors(1, 2, 2, 9, 40, 16, 16)
        m = mask if mask.dtype == torch.bool else mask.requires_grad_()
        out, lse = attention(q, k, v, m, return_lse=True, backend="cpu")
        assert not out[:, :, [3, 8]].any()
        assert (lse[:, :, [3, 8]] == -INF).all()
        assert lse[:, :, :3].isfinite().all()
        grads = torch.autograd.grad(out.sum(), [q, k, v] if mask.dtype == torch.bool else [q, k, v, m])
        assert all(g.isfinite().all() for g in grads)
        assert not grads[0][:, :, [3, 8]].any()


def test_special_values() -> None:
    """NaN and Inf go where torch lets them go."""
    for place, value in itertools.product(range(3), (NAN, INF, -INF, 3e38)):
        inputs = [t.detach() for t in tensors(1, 2, 2, 20, 40, 16, 16)]
        inputs[place][0, 1, 7, 3] = value
        for causal in (False, True):
            out = attention(*inputs, is_causal=causal, backend="cpu")
            expected = torchs(*inputs, is_causal=causal)
            seen = 7 if causal and place == 2 else 0  # rows above may skip what torch multiplies by 0
            torch.testing.assert_close(out[:, :, seen:], expected[:, :, seen:], rtol=1e-4, atol=1e-5, equal_nan=True)


# What torch has no word for


EXTRAS: dict[str, dict[str, Any]] = {
    "window": {"window": (11, 5)}, "left window": {"window": (3, None), "is_causal": True}, "no right": {"window": (None, 0)},
    "bottom right": {"is_causal": True, "align": "bottom-right"}, "windowed below": {"window": (20, 9), "align": "bottom-right"},
    "prefix": {"is_causal": True, "window": (9, 0), "global_prefix": 5}, "long prefix": {"is_causal": True, "global_prefix": 140},
    "global": {"window": (11, 5), "global_prefix": 3},
    "global below": {"window": (20, 9), "align": "bottom-right", "global_prefix": 60},
    "softcap": {"softcap": 2.0}, "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 1.0])},
    "alibi of a batch": {"alibi_slopes": torch.rand(2, 4, generator=torch.Generator().manual_seed(1)), "align": "bottom-right"},
    "dropout": {"dropout_p": 0.4, "seed": 2**40 + 3}, "causal dropout": {"dropout_p": 0.4, "seed": 3, "is_causal": True},
    "all": {"window": (30, 7), "softcap": 3.0, "dropout_p": 0.2, "seed": 1, "alibi_slopes": torch.linspace(0, 1, 4),
            "global_prefix": 2, "scale": 0.7},
    "negative scale": {"scale": -0.5}, "zero scale": {"scale": 0.0},
}


def against_plain(call: Callable[[str, list[Tensor]], Any], inputs: list[Tensor], tolerance: float = 2e-5) -> None:
    """Outputs and gradients of the kernels beside those of the plain maths in float64."""
    found = []
    for backend, wide in (("cpu", False), ("reference", True)):
        leaves = [(t.detach().double() if wide else t.detach()).requires_grad_(t.requires_grad) for t in inputs]
        out, lse = call(backend, leaves)
        upstream = [randn(*t.shape, seed=5 + n).to(t.dtype) for n, t in enumerate((out, lse))]
        finite = [t.masked_fill(t.isinf(), 0) for t in (out, lse)]
        grads = torch.autograd.grad(finite, [t for t in leaves if t.requires_grad], upstream)
        found.append([t.double() for t in (out.detach(), lse.detach(), *grads)])
    for mine, wanted in zip(*found, strict=True):
        largest = max(1.0, float(wanted.masked_fill(~wanted.isfinite(), 0).abs().amax()))
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("lengths", [(1, 150), (5, 5), (70, 150), (150, 70)], ids=str)
@pytest.mark.parametrize("name", EXTRAS)
def test_extras(name: str, lengths: tuple[int, int]) -> None:
    options = EXTRAS[name]

    def call(backend: str, leaves: list[Tensor]) -> Any:
        return attention(*leaves, enable_gqa=True, return_lse=True, backend=backend, **options)
    against_plain(call, tensors(2, 4, 2, *lengths, 16, 9))


@pytest.mark.parametrize("name", ["window", "all"])
def test_extras_with_a_mask(name: str) -> None:
    mask = randn(2, 1, 70, 150, seed=8).masked_fill(randn(2, 1, 70, 150) > 1, -INF).requires_grad_()

    def call(backend: str, leaves: list[Tensor]) -> Any:
        return attention(*leaves, return_lse=True, backend=backend, **EXTRAS[name])
    against_plain(call, [*tensors(2, 4, 4, 70, 150, 16, 9), mask])


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "align": "bottom-right"}, {"dropout_p": 0.3, "seed": 4}], ids=str)
def test_variable_lengths(options: dict[str, Any]) -> None:
    """Sequences one after the other, one of them empty: as the plain maths has it, and as each by itself."""
    offsets_q, offsets_k = torch.tensor([0, 17, 17, 18, 80]), torch.tensor([0, 30, 41, 50, 151], dtype=torch.int32)
    inputs = [t[0] for t in tensors(1, 4, 2, 80, 151, 16, 8)]

    def call(backend: str, leaves: list[Tensor]) -> Any:
        return attention(*leaves, enable_gqa=True, cu_seqlens_q=offsets_q, cu_seqlens_k=offsets_k, return_lse=True,
                         backend=backend, **options)
    against_plain(call, inputs)
    if "seed" not in options:
        out, _ = call("cpu", inputs)
        for a, b, c, d in zip(offsets_q, offsets_q[1:], offsets_k, offsets_k[1:]):
            one = inputs[0][:, a:b], inputs[1][:, c:d], inputs[2][:, c:d]
            alone = attention(*one, enable_gqa=True, backend="cpu", **options)
            torch.testing.assert_close(out[:, a:b], alone, rtol=1e-5, atol=1e-6)


def drawn(number: int) -> tuple[list[Tensor], Tensor | None, dict[str, Any]]:
    """Query, key and value, a mask, and options: each as likely as not, in any dtype, size and layout."""
    rng = Random(number)
    dtype, batch, heads, group = rng.choice(DTYPES), rng.choice((1, 2, 3)), rng.choice((1, 2, 3)), rng.choice((1, 1, 2, 4))
    lq, size = rng.choice((1, 2, 5, 13, 49, 121)), rng.choice((1, 7, 8, 33, 64, 65, 257))
    lk, value = rng.choice((lq, 1, 3, 33, 129, 513)), rng.choice((size, 5, 40, 129))
    joined, h = rng.random() < 0.2, heads * group
    batch = 1 if joined else batch
    seeds = itertools.count(number * 100)

    def made(*shape: int) -> Tensor:
        return randn(*shape, dtype=torch.float64, seed=next(seeds))

    shapes = (batch, h, lq, size), (batch, heads, lk, size), (batch, heads, lk, value)
    layouts = "contiguous", "transposed", "rotated", "stepped", "offset"
    inputs = [LAYOUTS[rng.choice(layouts)](made(*shape).to(dtype)) for shape in shapes]
    options: dict[str, Any] = {"scale": rng.choice((None, None, 0.3, -0.5, 0.0))}
    kind, mask = rng.choice(("none", "bool", "own", "float32")), None
    if kind != "none":
        shape = rng.choice(((lq, lk), (1, lk), (lq, 1), (1, 1), (batch, 1, 1, lk), (batch, h, lq, lk), (h, 1, lk), (1, h, lq, 1)))
        mask = made(*shape)
        mask = mask > -0.8 if kind == "bool" else mask.masked_fill(made(*shape) > 1.2, -INF)
        mask = mask if kind == "bool" else mask.to(dtype if kind == "own" else torch.float32)
        mask = rng.choice((mask, mask.mT.contiguous().mT, mask.expand(torch.broadcast_shapes(mask.shape, (h, 1, 1)))))
    elif rng.random() < 0.4:
        options["is_causal"] = True
    more: dict[str, Callable[[], Any]] = {
        "window": lambda: (rng.choice((None, 0, 3, 20)), rng.choice((None, 0, 2, 15))),
        "align": lambda: "bottom-right", "softcap": lambda: 2.0, "global_prefix": lambda: rng.choice((1, 5, 70)),
        "alibi_slopes": lambda: (made(h) if joined else made(batch, h)).abs().float(),
    }  # fmt: skip
    options |= {name: draw() for name, draw in more.items() if rng.random() < 0.3}
    if rng.random() < 0.25:
        options |= {"dropout_p": 0.3, "seed": rng.randrange(2**62)}
    if joined:
        for name, length in (("cu_seqlens_q", lq), ("cu_seqlens_k", lk)):
            cuts = sorted(rng.randrange(length + 1) for _ in range(2))
            options[name] = torch.tensor([0, *cuts, length], dtype=rng.choice((torch.int32, torch.int64)))
    return inputs, mask, options


@pytest.mark.parametrize("number", range(60))
def test_all_that_may_come_together(number: int) -> None:
    inputs, mask, options = drawn(number)
    learned = mask is not None and mask.dtype != torch.bool
    leaves = [t.detach().requires_grad_() for t in (*inputs, *([mask] if learned and mask is not None else []))]

    def call(backend: str, leaves: list[Tensor]) -> Any:
        added = leaves[3] if learned else mask
        return attention(*leaves[:3], added, enable_gqa=True, return_lse=True, backend=backend, **options)
    tolerance = {torch.float32: 3e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 6e-3}[inputs[0].dtype]
    mixed = learned and mask is not None and mask.dtype != inputs[0].dtype
    against_plain(call, leaves, max(tolerance, 1e-6) if mixed else tolerance)


@pytest.mark.parametrize("window", [(9, 4), (None, 6), (9, 0)], ids=str)
def test_a_global_prefix_sees_and_is_seen(window: tuple[int | None, int]) -> None:
    """As a mask says it to torch; the second block of queries, and of keys, is beyond the prefix"""
    q, k, v = tensors(1, 2, 2, 210, 300, 8, 8)
    i, j = torch.arange(210)[:, None], torch.arange(300)
    seen = (j <= i + window[1]) & (j >= i - (300 if window[0] is None else window[0])) | (j < 5)
    if window[1]:
        seen[:5] = True
    out, expected = attention(q, k, v, window=window, global_prefix=5, backend="cpu"), torchs(q, k, v, seen)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    upstream = randn(*out.shape)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_keeps_its_share_and_repeats() -> None:
    q, k = torch.zeros(1, 2, 64, 8), torch.zeros(1, 2, 500, 8)
    v = torch.ones(1, 2, 500, 8)
    first, again = (attention(q, k, v, dropout_p=0.25, seed=9, backend="cpu") for _ in range(2))
    assert torch.equal(first, again)
    assert 0.98 < float(first.mean()) < 1.02
    assert not attention(q, k, v, dropout_p=1 - 1e-12, seed=9, backend="cpu").any()
    assert not torch.equal(first, attention(q, k, v, dropout_p=0.25, seed=10, backend="cpu"))
    torch.manual_seed(3)
    drawn = attention(q, k, v, dropout_p=0.25, backend="cpu")
    torch.manual_seed(3)
    assert torch.equal(drawn, attention(q, k, v, dropout_p=0.25, backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_counts_past_two_to_the_32(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Of weights too many to make: the kernels are told that theirs start near a multiple of 2^32."""
    start, seed, n, m = 2**33 - 1000, 2**40 + 5, 7, 203
    memory, column = kernels.Plan.memory, TABLE.index("drop")

    def moved(self: kernels.Plan, seed: int, keys: int) -> Any:
        fields, rows = memory(self, seed, keys)
        return fields, array("q", [*rows[:column], start, *rows[column + 1 :]])

    monkeypatch.setattr(kernels.Plan, "memory", moved)
    q, k = torch.zeros(1, n, 8, dtype=dtype), torch.zeros(1, m, 8, dtype=dtype)
    v = torch.eye(m, dtype=dtype)[None].requires_grad_()
    weights = attention(q, k, v, dropout_p=0.5, seed=seed, backend="cpu")
    (grad,) = torch.autograd.grad(weights, v, torch.eye(n, m, dtype=dtype)[None])
    i = start + torch.arange(n * m).reshape(n, m)
    a, b = mix(seed & 0xFFFFFFFF ^ mix(i >> 32)), mix(torch.tensor((seed >> 32) + 0x9E3779B9))
    kept = mix(mix((i & 0xFFFFFFFF) + a & 0xFFFFFFFF) ^ b) >= 2**31
    assert torch.equal(weights[0] != 0, kept)
    assert torch.equal(grad[0, :, :n].T != 0, kept)


# Layouts, shapes, threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (0.02, 0.02)  # weights rounded, or not
    q, k, v = (t.detach().to(dtype) for t in tensors(2, 3, 3, 19, 30, 16, 8))
    for lq in (19, 2):
        q = q[:, :, :lq].detach()
        lying = [LAYOUTS[layout](t.detach()).requires_grad_() for t in (q, k, v)]
        out = attention(*lying, is_causal=True, align="bottom-right", backend="cpu")
        straight = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (q, k, v)]
        expected = attention(*straight, is_causal=True, align="bottom-right", backend="cpu")
        torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
        upstream = LAYOUTS["rotated"](randn(*out.shape).to(dtype))
        grads, wanted = torch.autograd.grad(out, lying, upstream), torch.autograd.grad(expected, straight, upstream)
        for a, b in zip(grads, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_weights_are_rounded_where_torch_rounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "simd", lambda: SimpleNamespace(bf16_dot=True))
    half, mask = torch.bfloat16, torch.zeros(1)
    assert kernels._flags(half, None, None, 0.0, 0.0) == kernels._flags(half, mask, None, 0.0, 0.0) == ("pairs",)
    assert not kernels._flags(torch.float32, None, None, 0.0, 0.0)
    assert not kernels._flags(half, mask.requires_grad_(), None, 0.0, 0.0)  # torch then keeps them in float32, as for dropout
    assert not kernels._flags(half, None, None, 0.1, 0.0)
    assert not kernels._flags(half, None, mask, 0.0, 0.0)
    assert not kernels._flags(half, None, None, 0.0, 3.0)


def test_positions_before_heads_are_read_in_place() -> None:
    """(batch, positions, heads, size) and its views: the output lies as the queries do, so that heads join without a copy."""
    q, k, v = (randn(2, n, 3, 16).transpose(1, 2).requires_grad_() for n in (20, 30, 30))
    out = attention(q, k, v, backend="cpu")
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, torchs(q, k, v), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shapes", [
    ((7, 8), (9, 8), (9, 8)), ((3, 7, 8), (3, 9, 8), (3, 9, 5)), ((2, 2, 3, 7, 8), (2, 2, 3, 9, 8), (2, 2, 3, 9, 8)),
    ((2, 3, 7, 8), (1, 3, 9, 8), (3, 9, 8)), ((2, 3, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8)), ((7, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    ((2, 1, 3, 2, 8), (1, 4, 3, 9, 8), (1, 1, 3, 9, 8)),
], ids=str)
def test_batch_dimensions(shapes: tuple[tuple[int, ...], ...]) -> None:
    inputs = [randn(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]
    out, expected = attention(*inputs, backend="cpu"), torchs(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    grad = randn(*out.shape)
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5, 8), (2, 0, 4, 5, 8), (2, 3, 0, 5, 8), (2, 3, 4, 0, 8), (2, 3, 4, 5, 0)], ids=str)
def test_empty(sizes: tuple[int, ...]) -> None:
    b, h, lq, lk, d = sizes
    inputs = [t.requires_grad_() for t in (torch.randn(b, h, lq, d), torch.randn(b, h, lk, d), torch.randn(b, h, lk, 6))]
    out, expected = attention(*inputs), torchs(*inputs)
    torch.testing.assert_close(out, expected)
    for a, e in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, e)


def test_same_bits_twice_and_the_same_values_for_any_number_of_threads() -> None:
    """Even where several heads add to one mask's gradient, and where the keys of a head are shared out."""
    for shape, mask_shape in (((3, 4, 2, 70, 150, 16, 8), (70, 150)), ((1, 1, 1, 3, 1100, 64, 64), (3, 1100)),
                              ((1, 1, 1, 70, 700, 8, 8), (1, 700))):
        mask = randn(*mask_shape).requires_grad_()
        inputs = [*tensors(*shape), mask]
        grad = randn(*shape[:2], shape[3], shape[6])
        found: list[list[Tensor]] = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            out = attention(*inputs, enable_gqa=True, backend="cpu")
            found.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
        assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))
        for other in (found[1], found[3]):
            for a, b in zip(found[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_no_array_of_all_scores() -> None:
    """At 20000 keys one head's scores would be 1.6 GB; forward and backward stay below 64 MB beside their inputs."""
    import resource

    q, k, v = (torch.randn(1, 1, 20000, 8).requires_grad_() for _ in range(3))
    attention(q[:, :, :500], k, v, window=(64, 64), backend="cpu").sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attention(q, k, v, window=(64, 64), backend="cpu").sum().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


# Derivatives and torch's machinery


def test_gradcheck() -> None:
    q, k, v = (t.double().detach().requires_grad_() for t in tensors(1, 2, 1, 3, 5, 4, 3))
    mask = randn(1, 3, 5, dtype=torch.float64).requires_grad_()

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        return attention(q, k, v, mask, enable_gqa=True, softcap=2.0, dropout_p=0.3, seed=2, window=(2, 1), return_lse=True,
                         backend="cpu")
    assert torch.autograd.gradcheck(call, (q, k, v, mask), nondet_tol=0)


def test_double_backward() -> None:
    inputs = tuple(t.double().detach().requires_grad_() for t in tensors(1, 2, 1, 3, 4, 3, 2))
    assert torch.autograd.gradgradcheck(lambda q, k, v: attention(q, k, v, is_causal=True, enable_gqa=True, softcap=3.0), inputs)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_as_torch(lower: torch.dtype) -> None:
    q, k, v = tensors(1, 2, 2, 9, 11, 8, 8)
    with torch.autocast("cpu", lower):
        out, expected = attention(q, k, v), torchs(q, k, v)
        masked = attention(q, k, v, torch.zeros(9, 11))
    assert out.dtype == masked.dtype == expected.dtype == lower
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_compiled_with_extras() -> None:
    q, k, v = tensors(1, 4, 2, 9, 11, 8, 8)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q, k, v, is_causal=True, align="bottom-right", enable_gqa=True, softcap=2.0, return_lse=True,
                         dropout_p=0.1, seed=3)
    torch._dynamo.reset()
    got, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v)
    torch.testing.assert_close(got, expected)
    grads, wanted = (torch.autograd.grad(y[0].sum(), (q, k, v)) for y in (got, expected))
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_compiled_dropout_with_a_mask_and_a_causal_window(kind: str) -> None:
    """Drawn by torch, which has no word for both: each row's values are among those that it sees."""
    q, k, v = torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 9, 8), torch.eye(9)[None, None]
    mask = torch.ones(1, 9).bool() if kind == "bool" else torch.zeros(1, 9)
    mask[0, 2] = False if kind == "bool" else -INF
    torch._dynamo.reset()
    step = torch.compile(lambda *t: attention(*t, dropout_p=0.1, window=(None, 0)), fullgraph=True, backend="aot_eager")
    weights = sum(step(q, k, v, mask) for _ in range(20))[0, 0] > 0
    seen = torch.ones(9, 9).bool().tril()
    seen[:, 2] = False
    assert torch.equal(weights, seen)


def test_use_serves_torchs_call() -> None:
    q, k, v = tensors(1, 4, 2, 9, 11, 8, 8)
    expected = torchs(q, k, v, is_causal=True, enable_gqa=True)
    with fastnn.use(), fastnn.trace() as calls:
        out = torchs(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    assert [(c.op, c.backend) for c in calls] == [("attention", "cpu")]


# Errors


Q = torch.randn(1, 4, 5, 8)
ERRORS: list[tuple[type[Exception], dict[str, Any], list[str]]] = [
    (RuntimeError, {"key": Q[..., :4]}, ["one size", "(1, 4, 5, 8)", "(1, 4, 5, 4)"]),
    (RuntimeError, {"value": Q[:, :, :3]}, ["one length", "(1, 4, 3, 8)"]),
    (RuntimeError, {"value": Q.repeat(1, 1, 2, 1)}, ["one length", "(1, 4, 10, 8)"]),
    (RuntimeError, {"key": Q[:, :3], "value": Q[:, :3]}, ["broadcast", "(1, 3, 5, 8)"]),
    (RuntimeError, {"key": Q[:, :3], "value": Q[:, :3], "enable_gqa": True}, ["divide", "(1, 3, 5, 8)"]),
    (RuntimeError, {"key": Q.double()}, ["same dtype", "torch.float64"]),
    (RuntimeError, {"query": Q[0, 0, 0]}, ["2 dimensional"]),
    (RuntimeError, {"attn_mask": torch.ones(4, 5)}, ["broadcast", "(1, 4, 5, 5)", "(4, 5)"]),
    (RuntimeError, {"attn_mask": torch.ones(5, 5).int()}, ["bool or float", "torch.int32"]),
    (RuntimeError, {"attn_mask": torch.ones(5, 5), "is_causal": True}, ["is_causal", "(5, 5)"]),
    (RuntimeError, {"dropout_p": 1.5}, ["[0, 1)", "1.5"]),
    (RuntimeError, {"dropout_p": -0.5}, ["[0, 1)", "-0.5"]),
    (ValueError, {"align": "left"}, ["'left'", "bottom-right"]),
    (ValueError, {"window": (-2, 3)}, ["left", "-2"]),
    (ValueError, {"softcap": -1.0}, ["softcap", "-1.0"]),
    (RuntimeError, {"alibi_slopes": torch.ones(3)}, ["alibi_slopes", "(1, 4)", "(3,)"]),
    (RuntimeError, {"alibi_slopes": torch.ones(4, requires_grad=True)}, ["alibi_slopes", "gradient"]),
    (RuntimeError, {"cu_seqlens_q": torch.tensor([0, 5])}, ["cu_seqlens_q and cu_seqlens_k"]),
    (RuntimeError, {"cu_seqlens_q": torch.tensor([0, 4]), "cu_seqlens_k": torch.tensor([0, 5])},
     ["cu_seqlens_q", "from 0 to 5", "[0, 4]"]),
    (TypeError, {"query": [1.0]}, ["scaled_dot_product_attention(): argument 'query'", "list"]),
    (TypeError, {"attn_mask": [[1]]}, ["scaled_dot_product_attention(): argument 'attn_mask'", "list"]),
    (TypeError, {"attn_mask": [[1]], "is_causal": True}, ["'attn_mask'", "list"]),
    (TypeError, {"alibi_slopes": [1.0]}, ["'alibi_slopes'", "list"]),
    (TypeError, {"cu_seqlens_k": [0, 5]}, ["'cu_seqlens_k'", "list"]),
    (RuntimeError, {"alibi_slopes": torch.ones(4).long()}, ["alibi_slopes", "torch.int64"]),
    *((TypeError, {"window": window}, ["window", str(window)]) for window in (3, (1,), (1.5, 2))),
    (ValueError, {"softcap": NAN}, ["softcap", "nan"]),
]  # fmt: skip


@pytest.mark.parametrize("rules", [False, True], ids=["kernels", "rules"])
@pytest.mark.parametrize(("kind", "change", "words"), ERRORS, ids=lambda v: "-".join(v) if isinstance(v, dict) else None)
def test_errors(kind: type[Exception], change: dict[str, Any], words: list[str], rules: bool,
                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastnn.kernels.cpu.engine.overhead.RULES", rules)  # by rule calls as small as these are torch's
    with pytest.raises(kind) as error:
        attention(**{"query": Q, "key": Q, "value": Q} | change)
    assert all(word in str(error.value) for word in words), str(error.value)


# Decoding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_and_decode_equal_the_whole(dtype: torch.dtype) -> None:
    q, k, v = tensors(2, 4, 2, 70, 70, 16, 16, dtype=dtype, grad=False)
    whole = attention(q, k, v, is_causal=True, enable_gqa=True, backend="cpu")
    truth = torchs(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    cache = fastnn.KVCache(2, 2, 80, 16, dtype=dtype)
    parts, at = [], 0
    for step in (50, 1, 1, 7, 1, 10):
        keys, values = cache.append(k[:, :, at : at + step], v[:, :, at : at + step])
        parts.append(attention(q[:, :, at : at + step], keys, values, is_causal=True, align="bottom-right", enable_gqa=True,
                               backend="cpu"))
        at += step
    worst, allowed = ((y.double() - truth).abs().max() for y in (torch.cat(parts, 2), whole))
    assert worst <= 2 * allowed + 4 * torch.finfo(dtype).eps


def test_cache() -> None:
    k, v = randn(3, 2, 5, 4), randn(3, 2, 5, 6)
    cache = fastnn.KVCache(3, 2, 8, 4, 6)
    assert len(cache) == 0
    assert cache.capacity == 8
    cache.append(k, v)
    memory = cache.keys.data_ptr()
    cache.reorder(torch.tensor([2, 2, 0]))
    assert torch.equal(cache.keys, k[[2, 2, 0]])
    assert torch.equal(cache.values, v[[2, 2, 0]])
    cache.crop(3)
    keys, values = cache.append(k[:, :, :2], v[:, :, :2])
    assert len(cache) == 5
    assert keys.data_ptr() == memory
    assert torch.equal(keys, torch.cat([k[[2, 2, 0], :, :3], k[:, :, :2]], 2))
    assert torch.equal(values, torch.cat([v[[2, 2, 0], :, :3], v[:, :, :2]], 2))


def test_cache_errors() -> None:
    k, v = randn(3, 2, 5, 4), randn(3, 2, 5, 6)
    cache = fastnn.KVCache(3, 2, 8, 4, 6)
    cache.append(k, v)
    before = cache.keys.clone()
    for bad, words in [((k, v), ["full", "5 of 8", "5 more"]), ((k.double(), v), ["key", "torch.float64"]),
                       ((k, v[..., :4]), ["value", "6"]),
                       ((k[:2], v), ["key", "(2, 2, 5, 4)"]), ((k[:, :, :1], v[:, :, :2]), ["1 positions", "2"])]:
        with pytest.raises(RuntimeError) as error:
            cache.append(*bad)
        assert all(word in str(error.value) for word in words), str(error.value)
    with pytest.raises(ValueError, match=r"\[0, 5\], got 6"):
        cache.crop(6)
    with pytest.raises(IndexError, match=r"\[0, 3\)"):
        cache.reorder(torch.tensor([0, 1, 3]))
    with pytest.raises(TypeError, match="list and Tensor"):
        cache.append([1], v)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="list"):
        cache.reorder([0, 1, 2])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="beams"):
        cache.reorder(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="-1"):
        fastnn.KVCache(3, 2, -1, 4)
    assert torch.equal(cache.keys, before)


def test_few_multiplications_are_torchs_by_rule(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastnn.kernels.cpu.engine.overhead.RULES", True)
    few, more = (tensors(1, 2, 1, 9, n, 16, 16, grad=False) for n in (9, 999))
    calls_: list[tuple[Any, dict[str, Any]]] = [(few, {}), (few, {"is_causal": True}), (more, {}), (few, {"window": (3, 0)})]
    for inputs, options in calls_:
        out = attention(*inputs, enable_gqa=True, **options)
        torch.testing.assert_close(out, attention(*inputs, enable_gqa=True, backend="cpu", **options))
    assert [c.backend for c in calls][::2] == ["torch", "torch", "cpu", "cpu"]


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (None, 0)}, {}], ids=str)
@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_what_torch_gets_wrong_is_not_its_by_rule(scale: float, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal and with a scale that is not positive, torch's -Inf for a hidden key becomes NaN or +Inf."""
    monkeypatch.setattr("fastnn.kernels.cpu.engine.overhead.RULES", True)
    inputs = tensors(1, 2, 2, 6, 6, 8, 8, grad=False)
    out = attention(*inputs, scale=scale, **options)
    expected = attention(*(t.double() for t in inputs), scale=scale, backend="reference", **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_plain_maths_is_torchs() -> None:
    q, k, v = (t.detach().double() for t in tensors(2, 4, 2, 9, 11, 8, 6))
    mask = randn(2, 1, 9, 11, dtype=torch.float64)
    out, lse, _ = plain.attention_lse(q, k, v, mask, None, None, None, 0.0, 0, 0.5)
    torch.testing.assert_close(out, torchs(q, k, v, mask, scale=0.5, enable_gqa=True))
    torch.testing.assert_close(lse, (q @ k.repeat_interleave(2, 1).mT * 0.5 + mask).logsumexp(-1))
    assert ops.attention.attention.name == "attention"
