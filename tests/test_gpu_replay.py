"""Calls that come again: what is replayed on other tensors is what the call itself does with them, bit for bit.

Without a GPU a call's launches get addresses from the tape as on one, and hand them to Triton's interpreter or the shim.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")

import fastnn
from cuda_shim import needs_compiler, shim
from fastnn import backends, ops
from fastnn.ops import _operator
from fastnn.ops._operator import Operator
from gpu import DEVICE, HERE, record, run

pytestmark = [pytest.mark.gpu] if HERE else [pytest.mark.gpu, needs_compiler]


class Interpreted:
    """What stands for a compiled kernel: it knows its arguments' types, and gets addresses."""

    class metadata:
        global_scratch_size = 0

    function = packed_metadata = None

    def __init__(self, executor: Any, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = dict(zip(executor.arg_names, args)) | options
        self._executor, self._call = executor, call
        self._dtypes = {name: value.dtype for name, value in given.items() if isinstance(value, Tensor)}

    def run(self, programs: int, *rest: Any) -> None:
        args = dict(zip(self._executor.arg_names, rest[8:], strict=True))
        for name, dtype in self._dtypes.items():  # an element there, of which the interpreter takes the address
            assert type(args[name]) is int, f"{name} is to be an address"
            args[name] = torch.frombuffer((ctypes.c_char * 8).from_address(args[name]), dtype=dtype, count=1)
        self._executor.grid = (programs,)
        self._call(self._executor, **args)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if HERE:
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def launch(self: Any, *args: Any, **options: Any) -> Interpreted:
        call(self, *args, **options)
        return Interpreted(self, call, args, options)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    with shim():
        yield


def other(t: Any, change: bool) -> Any:
    """A tensor that lies the same way in memory of its own; change: with other numbers, if it has any"""
    if not isinstance(t, Tensor):
        return t
    room = t.untyped_storage().clone()
    found = torch.empty(0, dtype=t.dtype, device=t.device).set_(room, t.storage_offset(), t.size(), t.stride())
    if change and t.is_floating_point():
        torch.empty(0, dtype=t.dtype, device=t.device).set_(room).mul_(-0.75).add_(0.125)
    return found


def r(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def rows(number: int, classes: int) -> Tensor:
    return torch.arange(number, device=DEVICE) * 7 % classes


BF16 = torch.bfloat16
Q = r(2, 4, 9, 16)
ALL = [1, 1]
CALLS: dict[str, tuple[Operator, tuple[Any, ...]]] = {
    "activation, a view": (ops.activation.activation, (r(6, 40)[:, ::2], "gelu", [])),
    "activation, copied first": (ops.activation.activation, (r(2, 3, 4, 5, 6).permute(4, 0, 2, 1, 3)[:, :, ::2], "silu", [])),
    "prelu_backward": (ops.activation.prelu_backward, (r(4, 3, 10), r(4, 3, 10) - 0.5, r(3))),
    "glu_backward": (ops.activation.glu_backward, (r(4, 6), r(4, 12), 1)),
    "dropout": (ops.activation.dropout, (r(5, 33), 0.4, 1 << 40)),
    "linear": (ops.matmul.linear, (r(2, 5, 24), r(7, 24), r(7), r(2, 5, 7), "gelu")),
    "linear, in parts": (ops.matmul.linear, (r(4, 2048), r(6, 2048), None, None, None)),
    "linear, of 16 bits": (ops.matmul.linear, (r(16, 32, dtype=BF16), r(32, 32, dtype=BF16), r(32, dtype=BF16), None, None)),
    "matmul, broadcast": (ops.matmul.matmul, (r(3, 1, 4, 6), r(2, 6, 5))),
    "matmul, the same twice": (ops.matmul.matmul, (Q[0, 0, :9, :9], Q[0, 0, :9, :9])),
    "softmax along columns": (ops.softmax.softmax, (r(3, 10, 4), 1)),
    "softmax in parts": (ops.softmax.softmax, (r(2, 40000), -1)),
    "cross_entropy": (ops.softmax.cross_entropy, (r(6, 11), rows(6, 11), r(11).abs(), 3, "mean", 0.1)),
    "cross_entropy_backward": (
        ops.softmax.cross_entropy_backward,
        (r(), r(6, 11), rows(6, 11), None, r(2, 6).double(), -100, "mean", 0.0),
    ),
    "mse_loss": (ops.softmax.mse_loss, (r(50), r(50) + 1, "mean")),
    "layer_norm": (ops.norm.add_layer_norm, (r(5, 20), r(5, 20) - 1, r(20), r(20), [20], 1e-5)),
    "layer_norm_backward": (
        ops.norm.layer_norm_backward, (r(5, 20), r(5, 20), r(20), r(2, 5).double().abs(), None, [20], 1e-5),
    ),
    "batch_norm": (ops.norm.batch_norm, (r(3, 4, 5, 5), r(4), r(4), None, None, 1e-5)),
    "group_norm_backward": (
        ops.norm.group_norm_backward, (r(2, 4, 6), r(2, 4, 6), r(4), r(2, 2, 2).double().abs(), 2, 1e-5),
    ),
    "embedding_backward": (ops.embedding.embedding_backward, (r(3, 4, 8), rows(12, 9).view(3, 4), 9, 2, True)),
    "conv": (ops.conv.conv, (r(2, 4, 7, 7), r(6, 4, 3, 3), r(6), None, ALL, [1, 1], ALL, False, [0, 0], 1, "relu")),
    "conv_weight": (ops.conv.conv_weight, (r(2, 6, 7, 7), r(2, 4, 7, 7), [3, 3], ALL, [1, 1], ALL, 1)),
    "max_pool": (ops.pool.max_pool, (r(2, 3, 8, 8), False, [2, 2], [2, 2], [0, 0], [1, 1], False, True)),
    "avg_pool_backward": (
        ops.pool.avg_pool_backward,
        (r(2, 3, 4, 4).transpose(2, 3), r(2, 3, 8, 8), False, [2, 2], [2, 2], [0, 0], False, True, 0),
    ),
    "scan": (ops.rnn.scan, (r(6, 2, 5), r(6, 2, 5) + 1, r(2, 5), False)),
    "lstm of 16 bits": (ops.rnn.recurrent_stack, (r(6, 5, dtype=BF16), r(1, 3, 8, dtype=BF16), r(1, 3, 8, dtype=BF16),
                                                  r(32 * 15, dtype=BF16), None, "lstm", 1, False, True, True)),
}  # fmt: skip


def attention_calls() -> dict[str, tuple[Operator, tuple[Any, ...]]]:
    """One tensor for query, key and value; a mask that is broadcast and has a gradient; few queries, whose keys are split"""
    found: dict[str, tuple[Operator, tuple[Any, ...]]] = {}
    for name, q, k, mask in (
        ("itself", Q, Q, None), ("a mask", Q, Q + 1, r(9, 9)), ("few queries", r(1, 2, 1, 16), r(1, 2, 600, 16), None),
    ):  # fmt: skip
        args = (q, k, k, mask, None, None, None, 0.0, 0, 0.25, -1, 0 if name == "itself" else -1, True, 0, 0.0)
        found[f"attention, {name}"] = (ops.attention.attention, args)
        out, stats = (t.clone() for t in (q, r(2, *q.shape[:-1]).abs() + 1))
        back = (q * 0.5, *args[:7], out, stats, None, mask is not None, *args[7:])
        found[f"attention_backward, {name}"] = (ops.attention.attention_backward, back)
    return found


CALLS |= attention_calls()


def vars_of(name: str) -> list[Any]:
    """The locals of the innermost function of this name"""
    frame = sys._getframe()
    while frame.f_code.co_name != name and frame.f_back is not None:
        frame = frame.f_back
    return list(frame.f_locals.values())


@contextmanager
def watching(look: Callable[[], object]) -> Iterator[None]:
    """look() at each of torch's operators"""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            look()
            return func(*args, **(kwargs or {}))

    with Watch():
        yield


def tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for t in found if t is not None]


@pytest.mark.parametrize("name", CALLS)
def test_replayed_as_called(name: str) -> None:
    op, args = CALLS[name]
    expected = run(op, *args)
    # Recorded with other numbers
    changed = {id(a): other(a, True) for a in args if isinstance(a, Tensor)}
    kernel = backends.load("gpu", op)[0]
    assert kernel is not None
    recorded, again = record(
        lambda *own: op._launch(kernel, op.check(*own), own), [changed.get(id(a), a) for a in args], len(op.tensors)
    )
    assert again is not None
    copies = {id(a): other(a, False) for a in args}  # one is given twice where it was
    apart = [copies[id(a)] for a in args[: len(op.tensors)]]
    mine = again(*apart)
    for m, e, old in zip(tensors(mine), tensors(expected), tensors(recorded), strict=True):
        assert (m.shape, m.stride(), m.dtype) == (e.shape, e.stride(), e.dtype)
        torch.testing.assert_close(m, e, rtol=0, atol=0, equal_nan=True)
        assert m.numel() == 0 or m.data_ptr() != old.data_ptr()
    for now, before in zip(apart, args):
        if isinstance(now, Tensor):
            torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True, msg="an input was changed")


def test_what_cannot_be_replayed() -> None:
    """A value that is read, a tensor that comes from elsewhere or lies on another device"""
    x, strange = r(4), r(4)
    for call in (lambda x: x * x.sum().item(), lambda x: x + strange, lambda x: x + x.to("meta").shape[0] * x.to("meta").numel()):
        result, again = record(call, [x], 1)
        torch.testing.assert_close(result, call(x))
        assert again is None


def test_values_on_another_device_may_have_been_read() -> None:
    """A packed sequence's batch sizes: looking at them reaches no dispatch mode."""
    x = r(4)
    assert record(lambda x, sizes: x * sizes.shape[0], [x, torch.ones(2, device="meta")], 2)[1] is None


def test_memory_goes_back_as_early_as_in_the_call() -> None:
    def call(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x * 2 + 1
        return x

    x = r(8)
    _, again = record(call, [x], 1)
    assert again is not None
    torch.testing.assert_close(again(x), call(x), rtol=0, atol=0)
    alive = []
    with watching(lambda: alive.append(sum(isinstance(o, Tensor) and o.shape == (8,) for o in vars_of("replay")))):
        again(x)
    assert max(alive) <= 3  # what goes in, what is read, what is made


def test_torchs_own_operators_are_replayed_too() -> None:
    """In place, with lists, of several results, and views of views"""

    def call(x: Tensor, y: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(x)
        low, high = out.view(2, -1).unbind(0)
        low.copy_(x.view(2, -1)[1] * n)
        torch.mul(x.view(2, -1)[0], 3.5, out=high)
        return out, torch.cat([x[1:].sum(0, keepdim=True), x])

    x = r(8)
    _, again = record(call, [x * 2, None, 3], 2)
    assert again is not None
    for mine, expected in zip(again(x, None), call(x, None, 3), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Operator], Callable[..., Any]]:
    """An operator's call that takes the tensors here for a GPU's"""
    if HERE:
        return lambda op: op.call
    here = _operator._CALL.replace("{first}.is_cuda", "{first}.is_cpu").replace("== current_device()", "== -1")
    monkeypatch.setattr(_operator, "_CALL", here.replace("and {all_on_cpu}", "and False"))
    monkeypatch.setitem(backends._DEVICE, "gpu", "cpu")
    monkeypatch.setattr(backends, "_backend_of", lambda args: "gpu")
    return lambda op: op._write_call(False)


@pytest.fixture
def linear(as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Callable[..., Any], list[str]]]:
    """linear, and which of its calls went the general way"""
    op, general = ops.matmul.linear, []
    right = Operator.general

    def noted(self: Operator, *rest: Any) -> Any:
        general.append(self.name)
        return right(self, *rest)

    monkeypatch.setattr(Operator, "general", noted)
    op.forget()
    yield as_on_a_gpu(op), general
    op.forget()


def test_the_third_call_is_replayed(linear: tuple[Callable[..., Any], list[str]]) -> None:
    call, general = linear
    w = r(4, 8)
    for n in range(4):
        x = r(3, 8) + n
        torch.testing.assert_close(call(x, w, None, None, "relu"), (x @ w.t()).relu(), rtol=1e-5, atol=1e-5)
        assert len(general) == min(n + 1, 2)


def test_what_a_call_must_share_to_be_replayed(linear: tuple[Callable[..., Any], list[str]]) -> None:
    """Sizes, strides, dtype, alignment, options, what wants a gradient, and what products are made of"""
    call, general = linear
    x, w = r(3, 8), r(4, 8)
    for _ in range(3):
        call(x, w, None, None, None)
    del general[:]
    bf16 = torch.bfloat16
    calls: list[Callable[[], Any]] = [
        lambda: call(r(5, 8), w, None, None, None),
        lambda: call(r(8, 3).t(), w, None, None, None),
        lambda: call(x.to(bf16), w.to(bf16), None, None, None),
        lambda: call(r(25)[1:].view(3, 8), w, None, None, None),
        lambda: call(x, w, r(4), None, None),
        lambda: call(x, w, None, None, "gelu"),
        lambda: call(x, w.clone().requires_grad_(), None, None, None),
        lambda: call(x, w, None, None, None, "gpu"),
        lambda: call(w, w, None, None, None),
        lambda: call(torch.nn.Parameter(x, False), w, None, None, None),
    ]
    for n, each in enumerate(calls):
        each()
        assert len(general) == n + 1
    fastnn.set_float32_precision("bf16x6")
    try:
        call(x, w, None, None, None)
    finally:
        fastnn.set_float32_precision(None)
    assert len(general) == len(calls) + 1
    call(x, w, None, None, None)
    assert len(general) == len(calls) + 1


def test_who_has_a_say_in_a_replayed_call(linear: tuple[Callable[..., Any], list[str]]) -> None:
    """Modes, transforms, tracers, and tensors that are more than their memory"""
    call, general = linear
    x, w = r(3, 8), r(4, 8)
    for _ in range(3):
        call(x, w, None, None, None)
    del general[:]
    negative = torch.complex(x, -x).conj().imag
    assert negative.is_neg()
    assert torch.equal(negative, x)
    class Named(Tensor):
        pass

    right, strange = call(x, w, None, None, None), [negative, x.as_subclass(Named), x.to_sparse()]
    assert not general
    for n, each in enumerate(strange):
        found = call(each, w, None, None, None)
        torch.testing.assert_close(found.as_subclass(Tensor), right, rtol=1e-5, atol=1e-5)
        assert len(general) == n + 1
    del general[:]
    seen: list[object] = []
    with watching(lambda: seen.append(None)):
        call(x, w, None, None, None)
    assert seen
    torch.func.vmap(lambda x: call(x, w, None, None, None))(x[None])
    torch.func.grad(lambda x: call(x, w, None, None, None).sum())(x)
    torch.jit.trace(lambda x: call(x, w, None, None, None), x, check_trace=False)
    torch.func.jvp(lambda x: call(x, w, None, None, None), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        call(x, w, None, None, None)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert call(x, w, None, None, None).dtype == torch.bfloat16
    torch.use_deterministic_algorithms(True)
    try:
        call(x, w, None, None, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(general) == 8
    call(x, w, None, None, None)
    assert len(general) == 8


def test_inference(linear: tuple[Callable[..., Any], list[str]]) -> None:
    """Tensors made in inference mode, inside and outside of it, are calls of their own kind."""
    call, general = linear
    with torch.inference_mode():
        x, w = r(3, 8), r(4, 8)
        for _ in range(4):
            assert call(x, w, None, None, None).is_inference()
    for _ in range(4):
        assert not call(x, w, None, None, None).is_inference()
    x, w = x.clone(), w.clone()
    for _ in range(4):
        assert not call(x, w, None, None, None).is_inference()
    assert len(general) == 6


def test_gradients_of_replayed_calls(linear: tuple[Callable[..., Any], list[str]]) -> None:
    call, general = linear
    for n in range(4):
        x, w, b = (t.requires_grad_() for t in (r(3, 8) + n, r(4, 8) - n, r(4)))
        y = call(x, w, b, None, None)
        g = r(3, 4)
        found = torch.autograd.grad(y, (x, w, b), g, create_graph=False)
        expected = torch.autograd.grad(torch.nn.functional.linear(x, w, b), (x, w, b), g)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert general.count("linear") == 2


def test_what_is_never_remembered(as_on_a_gpu: Any) -> None:
    """The reference's maths, and what a seed makes new each time"""
    op = ops.activation.dropout
    call = as_on_a_gpu(op)
    for _ in range(3):
        call(r(8), 0.5, 7)
        as_on_a_gpu(ops.activation.activation)(r(8), "relu", [], "reference")
    assert not op._met
    assert not [kind for kind in ops.activation.activation._met if "reference" in kind[0]]


def test_traced_calls_are_not_replayed(linear: tuple[Callable[..., Any], list[str]]) -> None:
    call, _ = linear
    for _ in range(3):
        call(r(3, 8), r(4, 8), None, None, None)
    with fastnn.trace() as calls:
        call(r(3, 8), r(4, 8), None, None, None)
    assert [each.backend for each in calls] == ["gpu"]


def test_of_calls_that_are_looked_up_alike_few_are_remembered(linear: tuple[Callable[..., Any], list[str]]) -> None:
    """The last position of ever longer sequences: each has strides of its own."""
    call, general = linear
    w = r(4, 8)
    for length in range(1, 20):
        x = r(3, length, 8)[:, -1]
        for _ in range(3):
            torch.testing.assert_close(call(x, w, None, None, None), x @ w.t(), rtol=1e-5, atol=1e-5)
    assert [len(each) for each in ops.matmul.linear._replays.values()] == [_operator._EACH]
    assert len(general) == 2 * _operator._EACH + 3 * (19 - _operator._EACH)


def test_a_recording_that_fails_is_tried_again(
    linear: tuple[Callable[..., Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, general = linear
    x, w, right, failed = r(3, 8), r(4, 8), Operator._launch, list[None]()

    def once(self: Operator, *rest: Any) -> Any:
        if len(general) == 2 and not failed:
            failed.append(None)
            raise torch.OutOfMemoryError("no memory")
        return right(self, *rest)

    monkeypatch.setattr(Operator, "_launch", once)
    call(x, w, None, None, None)
    with pytest.raises(torch.OutOfMemoryError):
        call(x, w, None, None, None)
    for _ in range(3):
        call(x, w, None, None, None)
    assert len(general) == 3


def test_what_cannot_be_written_down_fails_no_call(
    linear: tuple[Callable[..., Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, general = linear

    def broken(*args: Any) -> Any:
        raise OverflowError("float too large to pack")

    monkeypatch.setattr("fastnn.kernels.gpu.engine.driver.of_triton", broken)
    for _ in range(4):
        call(r(3, 8), r(4, 8), None, None, None)
    assert len(general) == 4


def test_an_operator_remembers_only_so_much(
    linear: tuple[Callable[..., Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, _ = linear
    monkeypatch.setattr(_operator, "_MOST", 3)
    for n in range(1, 9):
        for _ in range(3):
            call(r(n, 8), r(4, 8), None, None, None)
        assert len(ops.matmul.linear._met) <= 3
        assert len(ops.matmul.linear._replays) <= 3
