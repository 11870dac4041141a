"""Which backend serves, how it is chosen, what is said when it cannot, and the trace."""

import os
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnn
import fastnn.functional as f
import fresh
from fastnn import backends
from fastnn.ops.matmul import linear as linear_op

CHECKOUT = Path(__file__).resolve().parents[1]


def fake_module(monkeypatch: pytest.MonkeyPatch, **kernels: Callable[..., Any]) -> types.ModuleType:
    """A kernel module for the matmul family that takes whatever `refuse` gives no reason against."""
    module = types.ModuleType("fastnn.kernels.cpu.matmul")
    refuse = kernels.pop("refuse", lambda op, *args: None)
    module.KERNELS, module.supports = kernels, refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def double(out: Tensor, input: Tensor, other: Tensor) -> None:
    """A product that can be told from a right one."""
    out.copy_(2 * (input @ other))


@pytest.mark.usefixtures("fresh_registry")
def test_a_kernel_that_accepts_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, matmul=double)
    x, w = torch.randn(3, 4), torch.randn(4, 5)
    with fastnn.trace() as calls:
        torch.testing.assert_close(f.matmul(x, w), 2 * (x @ w))
    torch.testing.assert_close(f.matmul(x, w), 2 * (x @ w))
    (call,) = calls
    assert (call.op, call.backend, call.reason) == ("matmul", "cpu", "")
    assert call.shapes == ((3, 4), (4, 5))
    assert call.dtypes == (torch.float32, torch.float32)
    assert call.kernel.endswith("double")
    torch.testing.assert_close(torch.ops.fastnn.matmul(x, w), 2 * (x @ w))


@pytest.mark.usefixtures("fresh_registry")
def test_a_kernel_that_refuses_leaves_the_call_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(op: str, input: Tensor, other: Tensor) -> str | None:
        return "more than 3 rows" if input.shape[0] > 3 else None

    fake_module(monkeypatch, matmul=double, refuse=narrow)
    w = torch.randn(4, 5)
    for rows, factor in ((3, 2), (4, 1)):
        x = torch.randn(rows, 4)
        with fastnn.trace() as calls:
            torch.testing.assert_close(f.matmul(x, w), factor * (x @ w))
        torch.testing.assert_close(f.matmul(x, w), factor * (x @ w))
        assert calls[0].backend == ("cpu" if factor == 2 else "torch")
    assert calls[0].reason == "more than 3 rows"
    with pytest.raises(
        RuntimeError, match=r"matmul\(\): backend='cpu' cannot serve this call: more than 3 rows. Use backend='auto'"
    ):
        f.matmul(torch.randn(4, 4), w, backend="cpu")


@pytest.mark.usefixtures("fresh_registry")
def test_an_op_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, matmul=double)
    with fastnn.trace() as calls:
        f.linear(torch.randn(2, 3), torch.randn(4, 3))
    assert calls[0].backend == "torch"
    assert calls[0].reason == "there is no cpu kernel for linear"


@pytest.mark.usefixtures("fresh_registry")
def test_kernels_see_only_what_the_operator_has_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def remember(op: str, *args: Any) -> str | None:
        seen.append(args)
        return None

    fake_module(monkeypatch, linear=lambda out, *args: out.zero_(), refuse=remember)
    x = torch.randn(2, 3)
    for bad in (torch.randn(4, 2), torch.randn(4, 3).double(), torch.randn(4, 3, 1)):
        with pytest.raises(RuntimeError):
            f.linear(x, bad)
    f.linear(x, torch.randn(3))
    f.linear(x.int(), torch.ones(4, 3, dtype=torch.int32))
    f.linear(x, torch.randn(4, 3), torch.randn(1))
    f.linear(torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta"))
    f.matmul(x.to_sparse(), torch.randn(3, 3))
    assert seen == []
    f.linear(x, torch.randn(4, 3), torch.randn(4))
    assert len(seen) == 1


@pytest.mark.usefixtures("fresh_registry")
def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Numba is missing: automatic calls are torch's, with one warning; naming the backend is an error."""
    monkeypatch.setitem(sys.modules, "fastnn.kernels.cpu.matmul", None)
    x = torch.randn(3, 3)
    with pytest.warns(RuntimeWarning, match="the cpu kernels for matmul are not installed"):
        torch.testing.assert_close(f.matmul(x, x), x @ x)
    with warnings.catch_warnings(), fastnn.trace() as calls:
        warnings.simplefilter("error")
        f.matmul(x, x)
    assert calls[0].backend == "torch"
    assert "not installed" in calls[0].reason
    with pytest.raises(
        RuntimeError, match=r"matmul\(\): backend='cpu' cannot serve this call: .*not installed.*Use backend='auto'"
    ):
        f.matmul(x, x, backend="cpu")


WITHOUT = """
import importlib.metadata, sys, warnings

gone, there = {gone!r}, importlib.metadata.version

def version(name):
    if name in gone:
        raise importlib.metadata.PackageNotFoundError(name)
    return there(name)

importlib.metadata.version = version
sys.modules.update(dict.fromkeys(gone))  # None: a later import raises
import torch, fastnn
from fastnn.__main__ import main

x = torch.randn(300, 300)
with warnings.catch_warnings(record=True) as seen:
    print(torch.equal(fastnn.functional.matmul(x, x), x @ x))
    print(torch.equal(fastnn.functional.relu(x), x.relu()))
print(*(str(w.message) for w in seen), sep="\\n")
print(main(["info"]), main(["warmup"]))
"""


@pytest.mark.parametrize("gone", [["numba"], ["numba", "llvmlite"]], ids="-".join)
def test_without_the_compiler_torch_serves(gone: list[str]) -> None:
    """Where Numba is missing, its llvmlite is left behind by pip; its kernels' cache says which Numba made it."""
    run = fresh.python("-c", WITHOUT.format(gone=gone), env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, cwd=CHECKOUT)
    assert run.returncode == 0, run.stderr
    first, second, *said = run.stdout.splitlines()
    assert (first, second, said[-1]) == ("True", "True", "0 2")
    for line, family in zip(said, ("matmul", "activation")):
        assert line.startswith(f"fastnn: the cpu kernels for {family} are not installed (")
        assert "pip install numba" in line
    assert "fastnn " in run.stdout, "info printed nothing"
    assert re.fullmatch(r"(numba|llvmlite) is needed for this: pip install \1\n", run.stderr), run.stderr


def test_gpu_backend_on_cpu_tensors() -> None:
    with pytest.raises(
        RuntimeError, match=r"^relu\(\): backend='gpu' cannot serve this call: .*device 'cpu'"
    ):
        f.relu(torch.randn(3), backend="gpu")


def test_unknown_backend() -> None:
    x = torch.randn(2, 2)
    for call in (lambda: f.matmul(x, x, backend="fpga"), lambda: fastnn.backend("fpga").__enter__()):
        with pytest.raises(
            ValueError, match="backend: got 'fpga', allowed are 'auto', 'cpu', 'gpu', 'torch', 'reference'"
        ):
            call()


def test_named_backend_where_only_torch_can_serve() -> None:
    i = torch.arange(4).reshape(2, 2)
    with pytest.raises(
        RuntimeError, match=r"backend='cpu' cannot serve this call: dtype torch.int64 has no fastnn kernel"
    ):
        f.matmul(i, i, backend="cpu")
    with pytest.raises(RuntimeError, match=r"relu\(\): backend='cpu' cannot serve this call: inplace=True"):
        f.relu(torch.randn(3), inplace=True, backend="cpu")
    with fastnn.trace() as calls:
        f.matmul(i, i, backend="reference")
    assert calls[0].backend == "reference"


def test_argument_beats_context_beats_environment() -> None:
    x = torch.randn(2, 2)
    with fastnn.trace() as calls:
        with fastnn.backend("reference"):
            f.matmul(x, x)
            f.matmul(x, x, backend="torch")
            with fastnn.backend("torch"):
                f.matmul(x, x)
            f.matmul(x, x)
        f.matmul(x, x, backend="auto")
    assert [call.backend for call in calls][:4] == ["reference", "torch", "torch", "reference"]
    assert calls[4].backend != "reference"
    assert calls[1].reason == "backend 'torch' was named"


def test_context_is_left_after_an_error() -> None:
    with pytest.raises(KeyError), fastnn.backend("reference"):
        raise KeyError
    assert backends.chosen(None) == "auto"


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("reference", "reference"),
        ("torch", "torch"),
        ("fpga", "ValueError the environment's FASTNN_BACKEND: got 'fpga', allowed are 'auto'"),
    ],
)
def test_environment(value: str, printed: str) -> None:
    code = (
        "import torch, fastnn\n"
        "x = torch.ones(2, 2)\n"
        "with fastnn.trace() as calls:\n"
        "    try: fastnn.functional.matmul(x, x); print(calls[0].backend)\n"
        "    except ValueError as e: print(type(e).__name__, e)\n"
    )
    run = fresh.python("-c", code, env={"PYTHONPATH": str(CHECKOUT), "FASTNN_BACKEND": value}, cwd=CHECKOUT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(printed)


def test_the_gradient_uses_the_backend_of_the_forward() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with fastnn.trace() as calls:
        with fastnn.backend("reference"):
            y = f.gelu(x)
        y.sum().backward()
        f.gelu(x, backend="reference").sum().backward()
    assert [(call.op, call.backend) for call in calls] == [
        ("activation", "reference"),
        ("activation_backward", "reference"),
    ] * 2


def test_trace_prints_a_line_a_call() -> None:
    with fastnn.trace() as calls:
        f.gelu(torch.randn(2, 3), backend="torch")
        f.softmax(torch.randn(2, 3), 1, backend="reference")
    assert str(calls[0]) == "activation(2×3; float32, gelu) → torch activation: backend 'torch' was named"
    assert str(calls[1]) == "softmax(2×3; float32, 1) → fastnn.kernels.reference.softmax.softmax"


def test_the_trace_names_the_way_of_several() -> None:
    ways: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
        "winograd 3x4": ((1, 64, 12, 12), (8, 64, 3, 3), {}), "product": ((1, 64, 16, 16), (8, 64, 1, 1), {}),
        "depthwise": ((1, 8, 16, 20), (8, 1, 3, 3), {"groups": 8}),
        "implicit im2col": ((1, 5, 9, 9), (8, 5, 3, 3), {"stride": 2}),
    }  # fmt: skip
    for way, (x, w, options) in ways.items():
        with fastnn.trace() as calls:
            fastnn.functional.conv2d(torch.randn(x), torch.randn(w), **options, backend="cpu")
        assert [call.way for call in calls] == [way]
        assert str(calls[0]).endswith(f"kernels.cpu.conv.conv ({way})")


def test_the_trace_tells_plain_maths_from_torchs_own_op() -> None:
    x, target = torch.randn(2, 3), torch.tensor([0, 2])
    with fastnn.backend("torch"), fastnn.trace() as calls:
        f.dropout(x, seed=3)
        f.nll_loss(x, target)
        torch.ops.fastnn.nll_loss_backward(torch.ones(()), x, target, None, -100, "mean")
    plain = "fastnn.kernels.reference.softmax.nll_loss_backward"
    assert [call.kernel for call in calls] == ["fastnn.kernels.reference.activation.dropout", "torch nll_loss", plain]
    assert {call.backend for call in calls} == {"torch"}


def test_traces_nest_and_end() -> None:
    x = torch.randn(3)
    with fastnn.trace() as outer:
        f.relu(x)
        with fastnn.trace() as inner:
            f.tanh(x)
        f.silu(x)
    f.mish(x)
    assert [call.options[0] for call in outer] == ["relu", "tanh", "silu"]
    assert [call.options[0] for call in inner] == ["tanh"]


def test_two_equal_traces_do_not_end_each_other() -> None:
    with fastnn.trace() as outer:
        with fastnn.trace():
            pass
        f.relu(torch.randn(2))
    assert len(outer) == 1


def test_threads_choose_for_themselves() -> None:
    x = torch.randn(4, 4)
    names = ["reference", "torch", "auto", "reference"]
    found: dict[int, set[str]] = {}
    barrier = threading.Barrier(len(names))

    def work(i: int) -> None:
        with fastnn.backend(names[i]):
            barrier.wait()
            found[i] = {backends.chosen(None) for _ in range(200) if f.matmul(x, x) is not None}

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: {name} for i, name in enumerate(names)}


def test_many_threads_call_at_once() -> None:
    tensors = [torch.randn(17, 33), torch.randn(29, 33), torch.randn(29)]
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(*tensors))
    wrong: list[float] = []

    def work() -> None:
        for _ in range(50):
            error = float((f.linear(*tensors, activation="gelu") - expected).abs().max())
            if not error < 1e-4:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_short_way_and_the_general_way_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operator.call is written for the usual case; Operator.general holds for all of them."""
    args = (torch.randn(3, 5), torch.randn(4, 5), torch.randn(4), None, "relu")
    torch.testing.assert_close(linear_op.call(*args), linear_op.general(args, None))
    taken: list[int] = []
    monkeypatch.setattr(linear_op, "general", lambda *_: taken.append(1))
    linear_op.call(*args)
    linear_op.call(*(a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in args))
    assert taken == [], "a plain call took the long way"
    linear_op.call(*args, backend="reference")
    assert taken == [1]


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it, with small numbers."""
    monkeypatch.setattr("fastnn.kernels.cpu.engine.overhead.RULES", True)
    monkeypatch.setattr("fastnn.kernels.cpu.matmul.TINY", 16 * 16 * 16 * 16)
    monkeypatch.setattr("fastnn.kernels.cpu.matmul.TINY_TRAINING", 20 * 16 * 16 * 16)


@pytest.mark.usefixtures("rule")
def test_what_is_too_small_for_a_call_of_ours_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, bias = torch.randn(16, 16), torch.randn(17, 16), torch.randn(16)
    with fastnn.trace() as calls:
        f.linear(small, small, bias)
        f.linear(large, small, bias)
        f.linear(small, small, bias, activation="relu")
        f.matmul(small, small)
        f.matmul(small, small, backend="cpu")
        f.addmm(small, small, small)
    assert [c.backend for c in calls] == ["torch", "cpu", "cpu", "torch", "cpu", "torch"]
    assert "less time in torch" in calls[0].reason
    with pytest.raises(RuntimeError, match="in_features of weight"):  # our own words, not torch's
        f.linear(small, torch.randn(4, 5))
    theirs = torch.nn.functional.linear
    served: list[int] = []

    def counted(*args: Tensor) -> Tensor:
        served.append(len(args))
        return theirs(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    f.linear(small, small, bias)
    f.linear(large, small, bias)
    assert served == [3], "a call that nobody traces follows the same rule"


@pytest.mark.usefixtures("rule")
def test_a_gradient_to_come_costs_more_calls_and_leaves_more_to_torch() -> None:
    x, w = torch.randn(18, 16), torch.randn(16, 16, requires_grad=True)
    wide = torch.randn(1 << 8, 1 << 8)
    with fastnn.trace() as calls:
        f.linear(x, w).sum().backward()
        assert w.grad is not None
        f.linear(torch.randn(21, 16), w)
        f.tanh(wide)
        f.tanh(wide[:10].clone().requires_grad_())
        with torch.no_grad():
            f.linear(x, w)
    assert [c.backend for c in calls] == ["torch", "cpu", "cpu", "torch", "cpu"]


@pytest.mark.usefixtures("rule")
def test_the_rule_is_the_same_with_out() -> None:
    a, out = torch.randn(16, 16), torch.empty(16, 16)
    with fastnn.trace() as calls:
        assert f.matmul(a, a, out=out) is out
    assert calls[0].backend == "torch"
    again = torch.empty(16, 16)
    f.matmul(a, a, out=again)
    assert torch.equal(out, again)
    assert torch.equal(out, torch.matmul(a, a)), "served by another than the trace says"


@pytest.mark.usefixtures("rule")
def test_the_rule_hides_no_op_from_what_traces() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x, w: f.linear(x, w))(torch.randn(3, 4), torch.randn(5, 4))
    assert "fastnn.linear" in graph.code
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(lambda x: f.mm(x, x), torch.randn(20, 20))


@pytest.mark.usefixtures("rule")
def test_the_rule_leaves_nothing_to_torch_in_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnn.kernels.cpu.engine import threads

    monkeypatch.setattr(threads, "_forked", True)
    with fastnn.trace() as calls:
        f.matmul(torch.randn(16, 16), torch.randn(16, 16))
    assert calls[0].backend == "cpu"


def test_a_backward_may_be_served_by_another_backend_than_its_forward() -> None:
    x, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, 2, 2])
    wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(x, target), x)
    for first, second in (("reference", "cpu"), ("cpu", "reference"), ("torch", "cpu")):
        with fastnn.backend(first):
            loss = torch.ops.fastnn.cross_entropy(x, target, None, -100, "mean", 0.0)[0]
        with fastnn.backend(second):
            torch.testing.assert_close(torch.autograd.grad(loss, x), wanted)
