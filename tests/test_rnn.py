"""Recurrent layers and cells on the CPU against torch: values, gradients, streaming, threads, packed sequences, errors."""

import copy
import itertools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastnn
import fastnn.functional as f
from fastnn.kernels.cpu import rnn as cpu
from fastnn.kernels.cpu.engine import packed
from fastnn.ops import rnn as ops

pytestmark = [
    pytest.mark.usefixtures("poison", "threads"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
]
MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
#: An error of so many times the dtype's precision, relative to the largest value (1 at least), is allowed beyond twice
#: torch's own.
FLOOR = {torch.float32: 4.0, torch.float64: 64.0, torch.bfloat16: 1.0, torch.float16: 1.0}


def layer(mode: str, inputs: int, units: int, **options: Any) -> nn.RNNBase:
    torch.manual_seed(7)
    if mode == "rnn_relu":
        options["nonlinearity"] = "relu"
    return {"lstm": nn.LSTM, "gru": nn.GRU}.get(mode, nn.RNN)(inputs, units, **options)


def states(module: nn.RNNBase, batch: int, dtype: torch.dtype = torch.float32) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(count, batch, module.proj_size or module.hidden_size, dtype=dtype)
    return (h, torch.randn(count, batch, module.hidden_size, dtype=dtype)) if isinstance(module, nn.LSTM) else h


def leaves(hx: Any) -> tuple[Tensor, ...]:
    return () if hx is None else hx if isinstance(hx, tuple) else (hx,)


def results(module: nn.Module, x: Any, hx: Any) -> list[Tensor]:
    """Output, last states, and the gradients of input, states and every parameter."""
    data = x.data if isinstance(x, PackedSequence) else x
    given = [t.detach().clone().requires_grad_() for t in (data, *leaves(hx))]
    x = x._replace(data=given[0]) if isinstance(x, PackedSequence) else given[0]
    hx = None if hx is None else tuple(given[1:]) if isinstance(hx, tuple) else given[1]
    out, last = module(x, hx)
    found = [out.data if isinstance(out, PackedSequence) else out, *leaves(last)]
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in found]
    return [*(t.detach() for t in found), *torch.autograd.grad(found, [*given, *module.parameters()], grads)]


def compare(module: nn.RNNBase, x: Any, hx: Any = None, dtype: torch.dtype = torch.float32) -> None:
    """Ours, by the CPU kernels and no other, errs from float64 by at most twice what torch errs."""

    def to(value: Any, kind: torch.dtype) -> Any:
        return None if value is None else tuple(t.to(kind) for t in value) if isinstance(value, tuple) else value.to(kind)

    def cast(x: Any, kind: torch.dtype) -> Any:
        return x._replace(data=x.data.to(kind)) if isinstance(x, PackedSequence) else x.to(kind)

    module = module.to(dtype)
    x, hx = cast(x, dtype), to(hx, dtype)
    ours = copy.deepcopy(module)
    assert len(fastnn.replace(ours, backend="cpu").replaced) == 1
    mine, theirs = results(ours, x, hx), results(module, x, hx)
    exact = results(copy.deepcopy(module).double(), cast(x, torch.float64), to(hx, torch.float64))
    if isinstance(module, nn.RNN) and module.nonlinearity == "relu" and dtype.itemsize == 2:
        mine, theirs, exact = mine[:2], theirs[:2], exact[:2]  # rounding moves numbers across the kink: other gradients
    for number, (a, b, t) in enumerate(zip(mine, theirs, exact, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        if t.numel():
            error, allowed = (float((v.detach().double() - t).abs().max()) for v in (a, b))
            # A single gradient may be a sum that cancels, of terms about as large as the outputs' gradients, which are 1.
            floor = FLOOR[dtype] * torch.finfo(dtype).eps * max(float(t.abs().max()), 1.0)
            assert error <= 2 * allowed + floor, f"result {number}: {error:.3g}, torch's own {allowed:.3g}"


# Values and gradients


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(mode: str, dtype: torch.dtype) -> None:
    module = layer(mode, 19, 37, bidirectional=True)
    compare(module, torch.randn(5, 7, 19), states(module, 7), dtype)


@pytest.mark.parametrize("units", [1, 8, 17, 48, 67])
@pytest.mark.parametrize("batch", [1, 2, 3, 9])
@pytest.mark.parametrize("mode", MODES)
def test_shapes(mode: str, batch: int, units: int) -> None:
    module = layer(mode, 5, units)
    compare(module, torch.randn(4, batch, 5), states(module, batch))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_long_sums_and_many_rows(mode: str, threads: int) -> None:
    """More terms than one accumulator sums, more rows than are made ahead, a region with barriers."""
    torch.set_num_threads(threads)
    module = layer(mode, 515, 261)
    compare(module, torch.randn(3, 67, 515), states(module, 67))


@pytest.mark.parametrize("options", [
    {"bias": False}, {"num_layers": 3}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("mode", MODES)
def test_options(mode: str, options: dict[str, Any]) -> None:
    module = layer(mode, 6, 11, **options)
    x = torch.randn(3, 5, 6)
    compare(module, x, states(module, 3 if module.batch_first else 5))
    compare(module, x)
    compare(module, x[:, 0])  # unbatched


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("projection", [1, 9, 19])
def test_projection(projection: int, bidirectional: bool) -> None:
    module = layer("lstm", 6, 21, proj_size=projection, num_layers=2, bidirectional=bidirectional)
    compare(module, torch.randn(4, 5, 6), states(module, 5))
    compare(module.bfloat16(), torch.randn(4, 5, 6), states(module, 5), torch.bfloat16)


def test_projection_by_several_threads() -> None:
    torch.set_num_threads(2)
    module = layer("lstm", 100, 150, proj_size=70)
    compare(module, torch.randn(4, 9, 100), states(module, 9))


@pytest.mark.parametrize("mode", MODES)
def test_dropout_draws_what_torch_draws(mode: str) -> None:
    module = layer(mode, 4, 9, num_layers=3, dropout=0.4)
    ours = copy.deepcopy(module)
    fastnn.replace(ours)
    x = torch.randn(5, 3, 4)
    found = []
    for m in (module, ours):
        torch.manual_seed(3)
        found.append(m(x)[0])
    torch.testing.assert_close(found[1], found[0])
    assert not torch.allclose(found[1], ours.eval()(x)[0]), "nothing was dropped"


# Packed sequences

LENGTHS = ([7, 7, 5, 2, 1], [3, 1, 7, 1, 4], [4, 4, 4, 4, 4])


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mode", [*MODES, "projected"])
def test_packed(mode: str, lengths: list[int]) -> None:
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    module = layer("lstm", 6, 13, proj_size=5, **options) if mode == "projected" else layer(mode, 6, 13, **options)
    packed = pack_padded_sequence(torch.randn(7, 5, 6), torch.tensor(lengths), enforce_sorted=lengths == LENGTHS[0])
    compare(module, packed, states(module, 5))
    compare(module, packed)


def test_packed_rows_are_independent() -> None:
    """Each sequence of a packed batch has the bits that it has alone."""
    module = fastnn.nn.LSTM(6, 40, bidirectional=True)
    x = torch.randn(9, 4, 6)
    with torch.no_grad():
        padded, lengths = pad_packed_sequence(module(pack_padded_sequence(x, torch.tensor([9, 6, 6, 2])))[0])
        for b, n in enumerate(lengths.tolist()):
            assert torch.equal(padded[:n, b], module(x[:n, b : b + 1])[0][:, 0])


# Bits


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("mode", [*MODES, "projected"])
def test_streaming_gives_the_same_bits(mode: str, batch: int, dtype: torch.dtype) -> None:
    """One step at a time, any pieces, and the cell: what the whole sequence gives."""
    module = layer("lstm", 260, 75, proj_size=20) if mode == "projected" else layer(mode, 260, 75)
    module = module.to(dtype)
    fastnn.replace(module)
    x = torch.randn(41, batch, 260).to(dtype)
    with torch.no_grad():
        whole, end = module(x)
        for pieces in ([1] * 41, [7, 1, 20, 13]):
            hx, parts = None, []
            for piece in x.split(pieces):
                y, hx = module(piece, hx)
                parts.append(y)
            assert torch.equal(torch.cat(parts), whole)
            assert all(torch.equal(a, b) for a, b in zip(leaves(hx), leaves(end), strict=True))
        if mode == "projected":
            return
        cells: dict[str, Any] = {"lstm": fastnn.nn.LSTMCell, "gru": fastnn.nn.GRUCell}
        options = {"nonlinearity": mode[4:]} if mode.startswith("rnn") else {}
        cell = cells.get(mode, fastnn.nn.RNNCell)(260, 75, dtype=dtype, **options)
        cell.load_state_dict({k.removesuffix("_l0"): v for k, v in module.state_dict().items()})
        hx = None
        for t in range(41):
            hx = cell(x[t], hx)
            assert torch.equal(leaves(hx)[0], whole[t])


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_number_of_threads(mode: str) -> None:
    module = layer(mode, 130, 150)
    fastnn.replace(module, backend="cpu")
    x = torch.randn(9, 6, 130)
    found = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        found.append(results(module, x, None))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_recomputing_gives_the_same_bits_and_keeps_less(mode: str) -> None:
    module: Any = layer(mode, 12, 30, num_layers=2, bidirectional=True)
    fastnn.replace(module, backend="cpu")
    x, hx = torch.randn(20, 3, 12), states(module, 3)
    kept: list[int] = []

    def count(t: Tensor) -> Tensor:
        kept[-1] += t.numel()
        return t

    found = []
    for module.recompute in (False, True):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            found.append(results(module, x, hx))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    gates = {"lstm": 5, "gru": 4}.get(mode, 0)
    assert kept[0] - kept[1] == 4 * gates * 20 * 3 * 30


@pytest.mark.parametrize("mode", MODES)
def test_packed_weights_are_made_anew_when_a_weight_changes(mode: str) -> None:
    module: Any = layer(mode, 40, 50)
    fastnn.replace(module, backend="cpu")
    x = torch.randn(2, 3, 40)
    with torch.no_grad():
        first = [module(x)[0] for _ in range(3)]
        assert torch.equal(first[0], first[1])
        assert torch.equal(first[0], first[2])
        for name in ("weight_ih_l0", "weight_hh_l0"):
            getattr(module, name).mul_(0.5)
            reference = copy.deepcopy(module)
            fastnn.restore(reference)
            torch.testing.assert_close(module(x)[0], reference(x)[0])


KINDS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "layers": (lambda mode: layer(mode, 6, 40, num_layers=2, bidirectional=True), (3, 5, 6)),
    "batch_first": (lambda mode: layer(mode, 6, 40, num_layers=2, batch_first=True, bias=False), (5, 3, 6)),
    "one": (lambda mode: layer(mode, 6, 40), (1, 1, 6)),
    "cell": (lambda mode: getattr(nn, f"{mode.split('_')[0].upper()}Cell")(
        6, 40, **({"nonlinearity": mode[4:]} if "_" in mode else {})), (5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_short_way_has_the_same_bits_and_sees_every_change(mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = KINDS[kind]
    module: Any = make(mode)
    reference = copy.deepcopy(module)
    fastnn.replace(module)
    short: list[bool] = []
    again = ops.again

    def watched(*args: Any) -> Any:
        found = again(*args)
        short.append(found is not None)
        return found

    monkeypatch.setattr(ops, "again", watched)

    def bits(x: Tensor, hx: Any, served: bool) -> Any:
        """The call with that of a fresh copy, which has to go the usual way; and a look at torch's."""
        mine, theirs = module(x, hx), fastnn.restore(copy.deepcopy(module))(x, hx)
        assert short[-1] is served
        fresh = copy.deepcopy(module)(x, hx)
        assert not short[-1]
        assert type(mine) is type(theirs)
        flat = lambda out: [t for o in (out if isinstance(out, tuple) else (out,)) for t in leaves(o)]  # noqa: E731
        for a, b, c in zip(flat(mine), flat(fresh), flat(theirs), strict=True):
            assert torch.equal(a, b)
            assert (a.shape, a.stride()) == (b.shape, b.stride())
            torch.testing.assert_close(a, c)
        return mine

    batch = shape[0] if kind in ("cell", "batch_first") else shape[1]
    def state(batch: int) -> Any:
        if kind != "cell":
            return states(reference, batch)
        return (torch.randn(batch, 40), torch.randn(batch, 40)) if mode == "lstm" else torch.randn(batch, 40)

    x, hx = torch.randn(shape), state(batch)
    weight = next(module.parameters())
    with torch.no_grad():
        for served in (False, False, True, True):
            bits(x, hx, served)
        if kind != "cell":
            longer = torch.randn(tuple(n + 4 * (k == int(kind == "batch_first")) for k, n in enumerate(shape)))
            bits(longer, hx, True)
        weight[0, 5] += 3  # the version tells: this element is not in the sample
        bits(x, hx, False)
        for served in (False, True):
            bits(x, hx, served)
        weight.data[0] = 7.0  # the sample tells
        bits(x, hx, False)
        for served in (False, True):
            bits(x, hx, served)
        old = weight.data
        weight.data = old.clone()
        weight.data[0, 5] += 3  # the address tells
        bits(x, hx, False)
        for served in (False, True):
            bits(x, hx, served)
        other = torch.randn(tuple(n + (n == batch and k == (0 if kind in ("cell", "batch_first") else 1))
                                  for k, n in enumerate(shape)))
        bits(other, state(batch + 1), False)
        bits(x, hx, False)
        bits(x, hx, True)
        bits(x.mT.contiguous().mT if kind == "cell" else torch.stack([x, x], -1)[..., 0], hx, kind == "batch_first")
        bits(x, hx, True)
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        bits(x, hx, False)
        torch.set_num_threads(threads)
        module.backend = "torch"
        module(x, hx)
        assert not short[-1]
        module.backend = None
        with fastnn.trace() as calls:
            module(x, hx)
        assert calls
        short.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(x, hx)
        assert not short[0]
        for _ in range(3):
            module(x, hx)
        assert short[-1]
    out = module(x, hx)
    assert not short[-1]
    assert (out[0] if isinstance(out, tuple) else out).requires_grad
    if kind != "cell":
        with torch.no_grad(), pytest.raises(RuntimeError, match="larger than 0"):
            module(x[:, :0] if kind == "batch_first" else x[:0], hx)
    assert not torch.equal(old, weight)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_layers_side_by_side_have_the_same_bits(mode: str, threads: int) -> None:
    """Small layers on the short way, each some steps behind the one below it, against one after the other."""
    torch.set_num_threads(threads)
    module = layer(mode, 5, 24, num_layers=4)  # with 3 threads one is left over
    fastnn.replace(module, backend="cpu")
    x, hx = torch.randn(70, 3, 5), states(module, 3)
    with torch.no_grad():
        for _ in range(3):
            wanted = module(x, hx)
        run: Any = ops._ready[id(module.weight_ih_l0)][4]
        assert run.many[0][:3] == (threads, threads, True)
        run.many, many = run.few, run.many
        wanted = module(x, hx)
        run.many = many
        for _ in range(20):  # a layer that does not wait would be seen now and then
            y, last = module(x, hx)
            assert torch.equal(y, wanted[0])
            assert all(torch.equal(a, b) for a, b in zip(leaves(last), leaves(wanted[1]), strict=True))
        torch.testing.assert_close(wanted[0], fastnn.restore(copy.deepcopy(module))(x, hx)[0])


@pytest.mark.parametrize("kind", ["GRU", "LSTMCell"])
def test_the_short_way_is_not_gone_for_gradients(kind: str) -> None:
    module: Any = getattr(fastnn.nn, kind)(6, 40).requires_grad_(False)
    x, state = (torch.randn(2, 6), torch.randn(2, 40)) if kind == "LSTMCell" else (torch.randn(3, 2, 6), torch.randn(1, 2, 40))
    hx = (state, state + 1) if kind == "LSTMCell" else state
    for _ in range(4):  # nothing needs a gradient, with gradients on
        module(x, hx)
    assert id(module._parameters["weight_ih" if kind == "LSTMCell" else "weight_ih_l0"]) in ops._ready
    given = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(module(given, hx)[0].sum(), given)
    assert grad.any()
    state.requires_grad_()
    (grad,) = torch.autograd.grad(module(x, hx)[0].sum(), state)
    assert grad.any()
    state.requires_grad_(False)
    next(module.parameters()).requires_grad_()
    assert module(x, hx)[0].requires_grad


def test_the_short_way_ends_when_packings_are_dropped() -> None:
    module, x, h = fastnn.nn.GRUCell(6, 40), torch.randn(2, 6), torch.randn(2, 40)
    with torch.no_grad():
        wanted = [module(x, h) for _ in range(4)][-1]
        run = ops._ready[id(module.weight_ih)][4]
        params = tuple(module.parameters())
        assert torch.equal(run(x, (h,), params), wanted)
        packed.clear()
        assert run(x, (h,), params) is None
        assert torch.equal(module(x, h), wanted)
    key = id(module.weight_ih)
    assert key in ops._ready
    del module, params
    assert key not in ops._ready


def test_a_weight_may_also_be_a_linear_layers() -> None:
    """Packings of one tensor for different kernels are not taken for each other."""
    module: Any = fastnn.nn.LSTM(200, 60)
    x = torch.randn(6, 200)
    with torch.no_grad():
        for _ in range(3):
            y = f.linear(x, module.weight_ih_l0, backend="cpu")
            torch.testing.assert_close(y, nn.functional.linear(x, module.weight_ih_l0))
            out = module(x.unsqueeze(0))[0]
            torch.testing.assert_close(out, fastnn.restore(copy.deepcopy(module))(x.unsqueeze(0))[0])


def _in_child(queue: Any, module: nn.Module, x: Tensor) -> None:
    torch.use_deterministic_algorithms(False)  # whose filling of memory is torch's own region of threads, which hangs here
    with torch.no_grad():
        queue.put(module(x)[0].numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_the_same_bits() -> None:
    module = fastnn.nn.GRU(100, 200)
    x = torch.randn(5, 4, 100)
    with torch.no_grad():
        here = module(x)[0]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, module, x))
    child.start()
    there = torch.from_numpy(queue.get())
    child.join(60)
    assert torch.equal(here, there)


# Strange values


@pytest.mark.parametrize("mode", MODES)
def test_nan_and_infinity_propagate(mode: str) -> None:
    module = layer(mode, 5, 12)
    ours = copy.deepcopy(module)
    fastnn.replace(ours, backend="cpu")
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        x = torch.randn(4, 3, 5)
        x[1, 1, 2] = value
        with torch.no_grad():
            torch.testing.assert_close(ours(x)[0], module(x)[0], equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_strides(mode: str) -> None:
    """Input, states and weights that lie in memory in other ways."""
    module = layer(mode, 6, 10)
    x, h, c = torch.randn(4, 3, 6), torch.randn(1, 3, 10), torch.randn(1, 3, 10)
    weights = list(module._flat_weights)
    stepped = lambda t: torch.stack([t, -t], -1)[..., 0]  # noqa: E731
    turned = lambda t: t.mT.contiguous().mT if t.dim() > 1 else stepped(t)  # noqa: E731
    function = getattr(f, mode)
    hx = (h, c) if mode == "lstm" else h
    options = (True, 1, 0.0, False, False, False)
    with torch.no_grad():
        expected = function(x, hx, weights, *options, backend="torch")
        for change in (stepped, turned):
            moved = tuple(change(t) for t in (h, c)) if mode == "lstm" else change(h)
            for given in ((change(x), hx, weights), (x, moved, weights), (x, hx, [change(w) for w in weights]),
                          (x[:1].expand(4, 3, 6), hx, weights)):  # fmt: skip
                mine = function(*given, *options, backend="cpu")
                theirs = function(*(g.contiguous() if isinstance(g, Tensor) else g for g in given), *options, backend="torch")
                for a, b in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(a, b)
    assert len(expected) == (3 if mode == "lstm" else 2)


def test_batch_of_none() -> None:
    for mode in MODES:
        module = layer(mode, 4, 5)
        ours = copy.deepcopy(module)
        fastnn.replace(ours)
        y, last = ours(torch.empty(3, 0, 4))
        assert y.shape == (3, 0, 5)
        assert leaves(last)[0].shape == (1, 0, 5)
        y.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


# Derivatives of derivatives


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    module = layer(mode, 3, 4, bidirectional=True).double()
    sizes = torch.tensor([2, 2, 1])
    function: Callable[..., Any] = getattr(f, mode)
    names = [n for n, _ in module.named_parameters()]
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    hx = [t.requires_grad_() for t in leaves(states(module, 2, torch.float64))]
    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert len(names) == 8

    def run(x: Tensor, *rest: Tensor) -> Any:
        given = tuple(rest[: len(hx)]) if mode == "lstm" else rest[0]
        return function(x, given, rest[len(hx) :], True, 1, 0.0, False, True, batch_sizes=sizes)

    assert torch.autograd.gradcheck(run, (x, *hx, *weights))


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh"])
def test_gradgradcheck(mode: str) -> None:
    module = layer(mode, 2, 2).double()
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = states(module, 2, torch.float64)
    function = getattr(f, mode)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return function(x, hx, weights, True, 1, 0.0, False, False)[0]

    assert torch.autograd.gradgradcheck(run, (x, *(p.detach().requires_grad_() for p in module.parameters())))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_outputs_may_be_changed_in_place(mode: str, options: dict[str, Any]) -> None:
    """As those of torch's GRU and RNN: an activation or a dropout with inplace=True may follow."""
    module = layer(mode, 4, 6, **options)
    fastnn.replace(module, backend="cpu")
    data = torch.randn(5, 3, 4)
    for x in (data, pack_padded_sequence(data, torch.tensor([5, 2, 1]))):
        found = []
        for change in (Tensor.mul, Tensor.mul_):
            out, last = module(x)
            y = change(out.data if isinstance(out, PackedSequence) else out, 2.0)
            first, *rest = (change(t, 3.0) for t in leaves(last))
            loss = y.square().sum() + first.sum() + sum(t.sum() for t in rest)
            found.append(torch.autograd.grad(loss, list(module.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_only_needed_gradients() -> None:
    module = layer("lstm", 4, 6)
    fastnn.replace(module, backend="cpu")
    x, hx = torch.randn(3, 2, 4), states(module, 2)
    every = dict(zip(["x", "h", "c", *dict(module.named_parameters())], results(module, x, hx)[3:], strict=True))
    for name, parameter in module.named_parameters():
        for p in module.parameters():
            p.requires_grad_(p is parameter)
        out, last = module(x, hx)
        generator = torch.Generator().manual_seed(5)
        grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).float() for t in (out, *last)]
        (grad,) = torch.autograd.grad((out, *last), [parameter], grads)
        assert torch.equal(grad, every[name])


# Everything that traces


def sample(mode: str, grad: bool, sizes: Tensor | None = None, projection: int = 0, keep: bool = True) -> tuple[Any, ...]:
    module = layer(mode, 3, 5, **({"proj_size": projection} if projection else {}))
    weights = [p.detach().clone().requires_grad_(grad) for p in module.parameters()]
    h, *c = leaves(states(module, 2))
    x = torch.randn(6 if sizes is None else int(sizes.sum()), 3)
    states_ = [h[0], c[0][0] if c else None]
    return (x.requires_grad_(grad), *states_, *weights[:4], weights[4] if projection else None, sizes, mode, False, keep)


@pytest.mark.parametrize("mode", ["lstm", "rnn_tanh"])  # with cells and much that is kept, and without
def test_opcheck(mode: str) -> None:
    op = torch.ops.fastnn.recurrent.default
    torch.library.opcheck(op, sample(mode, False))
    torch.library.opcheck(op, sample(mode, True, torch.tensor([2, 2, 1])))
    args = sample(mode, False)
    y, h_n, c_n, reserve = op(*args)
    grads = [torch.randn_like(t) for t in (y, h_n, c_n)]
    needs = [t is not None for t in args[:8]]
    torch.library.opcheck(torch.ops.fastnn.recurrent_backward.default,
                          (*grads, *args[:8], y, reserve, args[8], mode, False, needs))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("mode", [*MODES, "projected"])
def test_other_backends(mode: str, backend: str) -> None:
    """The op itself, forward and backward, whoever serves it."""
    args = sample("lstm" if mode == "projected" else mode, True, torch.tensor([2, 2, 1]), 4 if mode == "projected" else 0)
    inputs = [t for t in args[:8] if isinstance(t, Tensor) and t.requires_grad]
    found = []
    for name in ("cpu", backend):
        out = torch.ops.fastnn.recurrent(*args, backend=name)
        found.append([*out, *torch.autograd.grad(list(out[:2]), inputs, [torch.ones_like(o) for o in out[:2]])])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_compile(mode: str) -> None:
    """A whole graph of the function; of a module where the user lets dynamo see recurrent layers at all."""
    torch._dynamo.reset()
    module = layer(mode, 4, 6, num_layers=2, bidirectional=True)
    fastnn.replace(module)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for steps in (3, 5):
            x = torch.randn(steps, 2, 4, requires_grad=True)
            wanted, mine = module(x)[0], compiled(x)[0]
            torch.testing.assert_close(mine, wanted)
            for a, b in zip(torch.autograd.grad(mine.sum(), [x, *module.parameters()]),
                            torch.autograd.grad(wanted.sum(), [x, *module.parameters()]), strict=True):  # fmt: skip
                torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_use_serves_torchs_own_modules(calls: list[Any]) -> None:
    module, cell = nn.LSTM(4, 6), nn.GRUCell(4, 6)
    x = torch.randn(3, 2, 4)
    packed = pack_padded_sequence(x, torch.tensor([3, 2]))
    with torch.no_grad():
        wanted = module(x)[0], cell(x[0]), module(packed)[0].data
        with fastnn.use():
            mine = module(x)[0], cell(x[0]), module(packed)[0].data
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert [(call.op, call.backend) for call in calls] == [("recurrent", "cpu")] * 3


# Cells


@pytest.mark.parametrize("batch", [None, 1, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell", "relu"])
def test_cells(kind: str, bias: bool, batch: int | None) -> None:
    torch.manual_seed(3)
    options = {"nonlinearity": "relu"} if kind == "relu" else {}
    cell: Any = getattr(nn, "RNNCell" if kind == "relu" else kind)(6, 11, bias=bias, **options)
    ours = copy.deepcopy(cell)
    assert len(fastnn.replace(ours, backend="cpu").replaced) == 1
    x = torch.randn(6) if batch is None else torch.randn(batch, 6)
    shape = (11,) if batch is None else (batch, 11)
    hx: Any = (torch.randn(shape), torch.randn(shape)) if kind == "LSTMCell" else torch.randn(shape)
    for given in ((x,), (x, hx)):
        a, b = leaves(ours(*given)), leaves(cell(*given))
        for mine, theirs in zip(a, b, strict=True):
            torch.testing.assert_close(mine, theirs)
        grads = [torch.autograd.grad(torch.stack([(t * t).sum() for t in out]).sum(), list(m.parameters()), allow_unused=True,
                                     materialize_grads=True)
                 for out, m in ((a, ours), (b, cell))]  # fmt: skip
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs)


# Errors

X, HX, CX = torch.randn(3, 2, 4), torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)
# a call of a layer (m) or cell, and words that our message must have; the exception's type is torch's
BAD: list[tuple[str, str, list[str]]] = [
    ("LSTM", "m(torch.randn(3, 2, 7))", ["4", "7"]),
    ("LSTM", "m(X.double())", ["float64", "float32"]),
    ("LSTM", "m(X, (torch.zeros(1, 3, 5), CX))", ["hidden[0]", "(1, 2, 5)", "[1, 3, 5]"]),
    ("LSTM", "m(X, (HX, torch.zeros(2, 2, 5)))", ["hidden[1]", "(1, 2, 5)", "[2, 2, 5]"]),
    ("LSTM", "m(X, (HX.double(), CX))", ["hidden[0]", "float64", "float32"]),
    ("LSTM", "m(X, (HX, CX[0]))", ["2-D", "3-D"]),
    ("LSTM", "m(X[0], (HX, CX))", ["2-D", "3-D"]),
    ("LSTM", "m(torch.randn(4))", ["2D or 3D", "1D"]),
    ("LSTM", "m(torch.randn(0, 2, 4))", ["larger than 0", "(0, 2, 4)"]),
    ("LSTM", "m(X, (HX,))", []),
    ("LSTM", "m(X, (HX, CX, CX))", ["two hidden states"]),
    ("LSTM", "m(X, HX)", []),
    ("LSTM", "m(pack_padded_sequence(X.double(), torch.tensor([3, 2])))", ["float64", "float32"]),
    ("LSTM", "m(pack_padded_sequence(X, torch.tensor([3, 2])), (torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)))", ["2", "3"]),
    ("GRU", "m(torch.randn(0, 2, 4))", ["larger than 0"]),
    ("GRU", "m(torch.randn(3, 2, 7))", ["4", "7"]),
    ("GRU", "m(X, HX.double())", ["float64", "float32"]),
    ("GRU", "m(X, torch.zeros(1, 9, 5))", ["(1, 2, 5)", "[1, 9, 5]"]),
    ("RNN", "m(X, torch.zeros(1, 2, 6))", ["(1, 2, 5)", "[1, 2, 6]"]),
    ("LSTMCell", "m(torch.randn(2, 7))", ["7", "4"]),
    ("LSTMCell", "m(X[0], (torch.zeros(3, 5), torch.zeros(3, 5)))", ["2", "3"]),
    ("LSTMCell", "m(X[0], (torch.zeros(2, 6), torch.zeros(2, 6)))", ["6", "5"]),
    ("LSTMCell", "m(X[0], torch.zeros(2, 5))", ["Tensor"]),
    ("LSTMCell", "m(X[0], (torch.zeros(2, 5),))", ["two hidden states"]),
    ("LSTMCell", "m(X[0], (torch.zeros(2, 5),) * 3)", ["two hidden states"]),
    ("GRUCell", "m(X[0, 0], torch.zeros(1, 5))", ["1", "5"]),
    ("GRUCell", "m(X[0].double())", ["float64", "float32"]),
    ("GRUCell", "m(X)", ["1D or 2D", "3D"]),
    ("RNNCell", "m(X[0], torch.zeros(2, 6))", ["6", "5"]),
]


@pytest.mark.parametrize(("kind", "call", "words"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(kind: str, call: str, words: list[str]) -> None:
    theirs = getattr(nn, kind)(4, 5)
    ours = copy.deepcopy(theirs)
    fastnn.replace(ours)
    with pytest.raises(Exception) as expected:  # whatever torch raises
        eval(call, globals(), {"m": theirs})
    with pytest.raises(type(expected.value)) as got:
        eval(call, globals(), {"m": ours})
    for word in words:
        assert word in str(got.value)


def test_lengths_out_of_order_or_zero() -> None:
    x = torch.randn(5, 4)
    options = (list(nn.GRU(4, 5).parameters()), True, 1, 0.0, False, False)
    for sizes in ([1, 2, 2], [3, 2, 0], [2, 2], [2, 1, 1], [3, 2, -1, 1]):
        with pytest.raises(RuntimeError, match="batch_sizes must"):
            f.gru(x, torch.zeros(1, 2, 5), *options, batch_sizes=torch.tensor(sizes))
    with pytest.raises(ValueError, match="proj_size"):
        fastnn.nn.GRU(4, 5, proj_size=2)


def test_bad_arguments_of_the_op() -> None:
    args = list(sample("lstm", False))
    for at, value, words in (
        (1, torch.zeros(2, 6), ["w_hh", "(20, 6)"]), (2, None, ["cx", "None"]), (2, torch.zeros(3, 5), ["cx", "(3, 5)"]),
        (3, torch.zeros(20, 4), ["w_ih", "(20, 4)"]), (5, None, ["b_ih", "b_hh"]), (6, torch.zeros(19), ["b_hh", "(19,)"]),
        (3, torch.zeros(20, 3).double(), ["w_ih", "float64"]), (8, torch.tensor([2.0]), ["batch_sizes", "float32"]),
        (0, torch.zeros(7, 3), ["multiple", "7"]), (7, torch.zeros(4, 5), ["w_hr", "(5, 5)"]),
    ):  # fmt: skip
        wrong = [*args[:at], value, *args[at + 1 :]]
        with pytest.raises(RuntimeError) as got:
            ops.recurrent(*wrong)
        assert all(word in str(got.value) for word in words), str(got.value)
    with pytest.raises(ValueError, match="peephole"):
        ops.recurrent(*args[:9], "peephole", False, True)


# Who serves


def test_replace_says_why_not(calls: list[Any]) -> None:
    normed = nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")

    class Mine(nn.GRU):
        pass

    report = fastnn.replace(nn.ModuleList([normed, Mine(3, 4), nn.LSTM(3, 4)]))
    assert [e.class_name for e in report.replaced] == ["LSTM"]
    reasons = " ".join(e.reason for e in report.left)
    assert "weight_hh_l0 is computed" in reasons
    assert "subclass of torch.nn.GRU" in reasons
    module = fastnn.nn.GRU(3, 4)
    with fastnn.backend("torch"):
        module(torch.randn(2, 1, 3))
    assert [call.backend for call in calls] == ["torch"]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_autocast_gives_torchs_dtypes(kind: str, dtype: torch.dtype, given: bool) -> None:
    """(torch's LSTM under autocast needs instructions that not every CPU has.)"""
    module: Any = getattr(nn, kind)(9, 20)
    ours = copy.deepcopy(module)
    fastnn.replace(ours, backend="cpu")
    x = (torch.randn(3, 9) if kind.endswith("Cell") else torch.randn(4, 3, 9)).to(dtype)
    state = torch.randn(3, 20) if kind.endswith("Cell") else torch.randn(1, 3, 20)
    hx = ((state, state) if kind == "LSTMCell" else state) if given else None
    found = []
    for m in (ours, module):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = m(x, hx)
        out = out if isinstance(out, tuple) else (out,)
        found.append([*out, *torch.autograd.grad(sum(t.float().sum() for t in out), m.parameters())])
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05 * max(1.0, float(theirs.detach().abs().max())))


def test_state_dict_and_names_are_torchs() -> None:
    for ours, theirs in itertools.product([fastnn.nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)],
                                          [nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)]):
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(3, 2, 3)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_modes_have_one_meaning() -> None:
    assert list(cpu.MODES) == list(ops.MODES)


# QRNN


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (9, 3, 11), (4, 40, 50)], ids=str)
def test_scan(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    f_, u, c0 = torch.rand(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1:]).to(dtype)
    for reverse, other in itertools.product((False, True), (lambda t: t, lambda t: t.mT.contiguous().mT if t.dim() > 2 else t)):
        mine = ops.scan(other(f_), u, c0, reverse, backend="cpu")
        exact = ops.scan(f_.double(), u.double(), c0.double(), reverse, backend="reference")
        torch.testing.assert_close(mine.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    assert ops.scan(f_[:0], u[:0], c0, False, backend="cpu").shape == (0, *shape[1:])


def test_scan_derivatives() -> None:
    f_, u, c0 = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (4, 3), (3,)))
    for reverse in (False, True):
        assert torch.autograd.gradcheck(lambda *t, r=reverse: ops.scan(*t, r, backend="cpu"), (f_, u, c0))
        assert torch.autograd.gradgradcheck(lambda *t, r=reverse: ops.scan(*t, r, backend="cpu"), (f_, u, c0))
        args = (f_.float().detach().requires_grad_(), u.float().detach(), c0.float().detach(), reverse)
        torch.library.opcheck(torch.ops.fastnn.scan.default, args)


def plain_qrnn(x: Tensor, c: Tensor, weight: Tensor, bias: Tensor, window: int, pooling: str, reverse: bool) -> Tensor:
    """Step by step, as the paper writes it."""
    steps, out = len(x), {}
    for t in reversed(range(steps)) if reverse else range(steps):
        seen = [t + k if reverse else t - k for k in reversed(range(window))]  # the oldest first
        rows = torch.cat([x[s] if 0 <= s < steps else torch.zeros_like(x[0]) for s in seen], 1)
        z, *gates = (rows @ weight.t() + bias).chunk(1 + len(pooling), 1)
        forget, *others = (g.sigmoid() for g in gates)
        c = forget * c + (others[1] if pooling == "ifo" else 1 - forget) * z.tanh()
        out[t] = c if pooling == "f" else others[0] * c
    return torch.stack([out[t] for t in range(steps)])


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_qrnn(window: int, pooling: str) -> None:
    module: Any = fastnn.nn.QRNN(5, 7, bidirectional=True, window=window, pooling=pooling).double()
    module.backend = "cpu"
    for p in module.parameters():
        torch.nn.init.normal_(p)
    x, hx = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    y, last = module(x, hx)
    wanted = [plain_qrnn(x, hx[d], getattr(module, f"weight_l0{end}"), getattr(module, f"bias_l0{end}"), window, pooling, d == 1)
              for d, end in enumerate(("", "_reverse"))]  # fmt: skip
    torch.testing.assert_close(y, torch.cat(wanted, 2))
    if pooling == "f":
        torch.testing.assert_close(last, torch.stack([y[-1, :, :7], y[0, :, 7:]]))
    grads = [torch.autograd.grad(o.sum(), list(module.parameters())) for o in (y, torch.cat(wanted, 2))]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)
    deep = fastnn.nn.QRNN(5, 7, 3, batch_first=True, window=window, pooling=pooling)
    assert deep(torch.randn(3, 6, 5))[0].shape == (3, 6, 7)


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
def test_gradcheck_of_qrnn(pooling: str) -> None:
    shapes = ((4, 2, 3), (2, 5), (5 + 5 * len(pooling), 6), (5 + 5 * len(pooling),))
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    for reverse in (False, True):
        assert torch.autograd.gradcheck(lambda *t, r=reverse: f.qrnn(*t, pooling=pooling, reverse=r, backend="cpu"), given)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_streaming_of_qrnn(window: int) -> None:
    """Pieces as short as a step, shorter than a window, see what the whole sequence sees."""
    module = fastnn.nn.QRNN(5, 7, 2, batch_first=True, window=window, pooling="ifo")
    x = torch.randn(3, 23, 5)
    whole, end = module(x)
    for pieces in ([1] * 23, [2, 1, 9, 3, 8]):
        state: Any = None
        parts = []
        for piece in x.split(pieces, 1):
            y, state = module.stream(piece, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(state[0], end)
    with pytest.raises(ValueError, match="bidirectional is True"):
        fastnn.nn.QRNN(5, 7, bidirectional=True).stream(x)


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_qrnn_under_autocast_and_unbatched(backend: str | None) -> None:
    module: Any = fastnn.nn.QRNN(5, 7, 2, bidirectional=True)
    module.backend = backend
    x, hx = torch.randn(6, 3, 5), torch.randn(4, 3, 7)
    y, last = module(x, hx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x, hx)
        assert [t.dtype for t in low] == [torch.bfloat16] * 2
        torch.testing.assert_close(low[0].float(), y, rtol=0.05, atol=0.05)
        assert all(g.any() for g in torch.autograd.grad(low[0].float().sum(), list(module.parameters())))
    alone = module(x[:, 1], hx[:, 1])
    torch.testing.assert_close(alone[0], y[:, 1])
    torch.testing.assert_close(alone[1], last[:, 1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [("m(torch.randn(6, 3, 4))", RuntimeError, "Expected 5, got 4"), ("m(torch.randn(5))", ValueError, "got 1D"),
     ("m(torch.randn(0, 3, 5))", RuntimeError, r"larger than 0, got \(0, 3, 5\)"),
     ("m(torch.randn(6, 3, 5), torch.zeros(2, 3, 7))", RuntimeError, r"\(1, 3, 7\), got \[2, 3, 7\]"),
     ("m(pack_padded_sequence(torch.randn(6, 1, 5), torch.tensor([6])))", TypeError, "PackedSequence"),
     ("m(torch.randn(6, 3, 5).double())", RuntimeError, "float64"), ("Q(5, 7, window=0)", ValueError, "window.*got 0"),
     ("Q(5, 7, pooling='x')", ValueError, "'x'.*'ifo'"), ("Q(5, 7, zoneout=2.0)", ValueError, "zoneout.*got 2"),
     ("Q(5, 0)", ValueError, "hidden_size.*got 0"), ("Q(5, 7, dropout=-1)", ValueError, "dropout.*got -1")],
)  # fmt: skip
def test_bad_arguments_of_a_qrnn_module(call: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        eval(call, globals(), {"m": fastnn.nn.QRNN(5, 7), "Q": fastnn.nn.QRNN})


def test_zoneout_keeps_cells() -> None:
    module = fastnn.nn.QRNN(4, 300, pooling="f", zoneout=0.3)
    x = torch.randn(2, 50, 4)
    y = module(x)[0]
    kept = (y[1] == y[0]).float().mean()
    assert 0.25 < float(kept) < 0.35
    assert not (module.eval()(x)[0][1] == module(x)[0][0]).any()


def test_bad_arguments_of_qrnn() -> None:
    x, c, w = torch.randn(4, 2, 3), torch.randn(2, 5), torch.randn(15, 6)
    f.qrnn(x, c, w)
    with pytest.raises(ValueError, match=r"'oi'.*'ifo'"):
        f.qrnn(x, c, w, pooling="oi")
    for args, words in (((x[0], c, w), r"input must be"), ((x, c[:1], w), "hx"), ((x, c, w[:, 1:]), r"\(15, 6\), got \(15, 5\)")):
        with pytest.raises(RuntimeError, match=words):
            f.qrnn(*args)
    with pytest.raises(RuntimeError, match=r"before must have shape \(1, 2, 3\), got \(2, 2, 3\)"):
        f.qrnn(x, c, w, before=x[:2])
    with pytest.raises(RuntimeError, match=r"one shape.*\(4, 2\)"):
        ops.scan(x, x[..., 0], c, False)
