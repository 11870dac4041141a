"""Positions against the formulas of their papers, written as loops over numbers, and against the models that use them."""

import math

import pytest
import torch
from torch import Tensor

import fastnn.functional as f
from rule import randn


def test_sinusoidal() -> None:
    table = f.sinusoidal_positions(50, 6, offset=3)
    for p in range(50):
        for i in range(3):
            angle = (p + 3) / 10000 ** (2 * i / 6)
            assert float(table[p, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-7)
            assert float(table[p, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-7)
    assert f.sinusoidal_positions(2, 4, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="size must be even, got 5"):
        f.sinusoidal_positions(2, 5)


def test_learned() -> None:
    x, weight = randn(2, 3, 4), randn(9, 4, seed=1).requires_grad_()
    y = f.learned_positions(x, weight, offset=5)
    for t in range(3):
        torch.testing.assert_close(y[:, t], x[:, t] + weight[5 + t])
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.sum(1).tolist() == [0, 0, 0, 0, 0, 8, 8, 8, 0]
    with pytest.raises(RuntimeError, match=r"offset \+ L must be in \[0, 9\].*got 10"):
        f.learned_positions(x, weight, offset=7)
    with pytest.raises(RuntimeError, match=r"weight must be \(positions, 4\), got \(9, 5\)"):
        f.learned_positions(x, randn(9, 5))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool) -> None:
    """A pair is a complex number, times e^(i p theta)"""
    x = randn(2, 3, 7, 10)
    y = f.rotary(x, f.rotary_angles(7, 8, offset=2), interleaved=interleaved)
    for p in range(7):
        for i in range(4):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + 4)
            turn = complex(math.cos((p + 2) * 10000 ** (-2 * i / 8)), math.sin((p + 2) * 10000 ** (-2 * i / 8)))
            expected = torch.complex(x[..., p, a], x[..., p, b]) * turn
            torch.testing.assert_close(torch.complex(y[..., p, a], y[..., p, b]), expected)
    assert torch.equal(y[..., 8:], x[..., 8:])
    with pytest.raises(RuntimeError, match=r"angles must be \(…, 7, at most 5\), got \(6, 4\)"):
        f.rotary(x, f.rotary_angles(6, 8))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    q, k = randn(1, 16, seed=1, dtype=torch.float64), randn(1, 16, seed=2, dtype=torch.float64)

    def at(t: Tensor, p: int) -> Tensor:
        return f.rotary(t, f.rotary_angles(1, 16, offset=p, dtype=torch.float64), interleaved=interleaved)

    torch.testing.assert_close((at(q, 9) * at(k, 4)).sum(), (at(q, 105) * at(k, 100)).sum())
    assert abs(float((at(q, 9) * at(k, 4)).sum() - (at(q, 9) * at(k, 5)).sum())) > 1e-3


def test_rotary_gradients() -> None:
    x = randn(2, 5, 6, dtype=torch.float64).requires_grad_()
    angles = f.rotary_angles(5, 6, dtype=torch.float64).requires_grad_()
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda x, a: f.rotary(x, a, interleaved=interleaved), (x, angles))  # noqa: B023


def test_relative_shift() -> None:
    """Column K - 1 of row i is distance 0: it comes to the key at the query's place; the next distance to the key before it"""
    scores = randn(2, 3, 5, 5)
    shifted = f.relative_shift(scores)
    for i in range(5):
        for j in range(i + 1):
            assert torch.equal(shifted[..., i, j], scores[..., i, 4 - (i - j)])
    longer = randn(3, 5)  # two keys of a memory before the queries
    shifted = f.relative_shift(longer)
    for i in range(3):
        for j in range(i + 3):
            assert torch.equal(shifted[i, j], longer[i, 4 - (i + 2 - j)])


def test_t5_buckets() -> None:
    near = f.t5_buckets(torch.arange(-8, 9))
    assert near.tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert f.t5_buckets(torch.tensor([-1000, -128, 128, 1000])).tolist() == [15, 15, 31, 31]
    for d in range(8, 128):  # 8 + floor(log(d / 8) / log(16) · 8): the borders are where it is a whole number
        expected = 8 + math.log(d / 8) / math.log(128 / 8) * 8
        if abs(expected - round(expected)) > 1e-6:
            assert int(f.t5_buckets(torch.tensor(-d))) == math.floor(expected)
    causal = f.t5_buckets(torch.arange(-20, 5), bidirectional=False)
    assert causal[-5:].tolist() == [0] * 5
    assert causal[4:21].flip(0).tolist() == [*range(16), 16]


def test_t5_is_that_of_transformers() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed")
    distance = torch.arange(-300, 300)
    for options in ({}, {"bidirectional": False}, {"buckets": 20, "max_distance": 50}):
        theirs = {{"buckets": "num_buckets"}.get(k, k): v for k, v in options.items()}
        expected = t5.T5Attention._relative_position_bucket(distance, **theirs)
        assert torch.equal(f.t5_buckets(distance, **options), expected)


def test_t5_bias() -> None:
    weight = randn(32, 4)
    bias = f.t5_bias(weight, 5, 7)
    assert bias.shape == (4, 5, 7)
    torch.testing.assert_close(bias[:, 1, 4], weight[16 + 3])
    torch.testing.assert_close(f.t5_bias(weight, 1, 7, offset=4, bidirectional=False)[:, 0],
                               f.t5_bias(weight, 5, 7, bidirectional=False)[:, 4])  # fmt: skip
