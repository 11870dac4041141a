"""torch.compile, export, opcheck, torch.func, fake tensors: everything that traces."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastnn
import fastnn.functional as f
from fastnn.ops import activation as activation_ops
from fastnn.ops import attention as attention_ops
from fastnn.ops import conv as conv_ops
from fastnn.ops import embedding as embedding_ops
from fastnn.ops import matmul as matmul_ops
from fastnn.ops import norm as norm_ops
from fastnn.ops import pool as pool_ops
from fastnn.ops import softmax as softmax_ops
from fastnn.ops._operator import Operator
from layer_cases import ACTIVATION, CASES, FUSED, MATMUL, NORM, POOL, SOFTMAX, Case

OPERATORS: dict[str, Operator] = {
    op.name: op
    for module in (matmul_ops, activation_ops, softmax_ops, conv_ops, pool_ops, norm_ops, attention_ops, embedding_ops)
    for op in vars(module).values()
    if isinstance(op, Operator)
}


def t(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape).requires_grad_(grad)


def last(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1).detach().requires_grad_(grad)


def moments(x: Tensor, groups: int) -> Tensor:
    var, mean = torch.var_mean(x.double().reshape(x.shape[0], groups, -1), -1, correction=0)
    return torch.stack([mean, var])


def row_moments(x: Tensor, centred: bool) -> Tensor:
    """What the ops of rows keep: the mean if ``centred``, and 1 / deviation"""
    mean = x.double().mean(-1) if centred else torch.zeros(x.shape[:-1], dtype=torch.float64)
    rstd = ((x.double() - mean.unsqueeze(-1)).square().mean(-1) + 1e-5).rsqrt()
    return torch.stack([mean, rstd] if centred else [rstd])


X = torch.linspace(-2, 3, 40).cos().reshape(2, 4, 5)
WINDOW = False, [3, 2], [2, 2], [1, 1]
EVENLY: Any = (True, [4], [], [])
CODES = torch.full((2, 3, 5, 4), 3, dtype=torch.uint8)
PLACES = torch.tensor([3, 0, 11, 7]).reshape(2, 2).expand(2, 3, 2, 2)
def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


INDEX = torch.tensor([1, -100, 0, 4])
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])
PLAIN_ATTENTION = (None, None, None, None, 0.0, 0, 0.5, -1, -1, False, 0, 0.0)
CAUSAL_ATTENTION = (0.2, 5, 0.5, 3, 0, True, 1, 4.0)
OFFSETS = torch.tensor([0, 3, 5])
SAMPLES: dict[str, list[Callable[[bool], tuple[Any, ...]]]] = {
    "matmul": [
        lambda g: (t(3, 4, grad=g), t(4, 5, grad=g)),
        lambda g: (t(2, 1, 3, 4, grad=g), t(6, 4, 5, grad=g)),
        lambda g: (t(4, grad=g), t(4, grad=g)),
    ],
    "addmm": [
        lambda g: (t(5, grad=g), t(3, 4, grad=g), t(4, 5, grad=g), 0.5, 2.0),
        lambda g: (t(2, 3, 1, grad=g), t(2, 3, 4, grad=g), t(2, 4, 5, grad=g), 1.0, 1.0),
    ],
    "linear": [
        lambda g: (t(3, 4, grad=g), t(5, 4, grad=g), t(5, grad=g), t(3, 5, grad=g), None),
        lambda g: (t(2, 3, 4, grad=g), t(5, 4, grad=g), None, None, "gelu"),
        lambda g: (t(4, grad=g), t(5, 4, grad=g), t(5, grad=g), None, "silu"),
    ],
    "activation": [
        lambda g: (t(3, 4, grad=g), "mish", []),
        lambda g: (t(4, 3, grad=g).mT.detach().requires_grad_(g), "softplus", [2.0, 10.0]),
    ],
    "activation_backward": [lambda g: (t(3, 4), t(3, 4), "gelu", [])],
    "prelu": [lambda g: (t(2, 3, 4, grad=g), t(3, grad=g)), lambda g: (t(2, 3, grad=g), t(1, grad=g))],
    "prelu_backward": [lambda g: (t(2, 3, 4), t(2, 3, 4), t(3))],
    "glu": [lambda g: (t(3, 4, grad=g), 1), lambda g: (t(3, 4, 2, grad=g), -2)],
    "glu_backward": [lambda g: (t(3, 2), t(3, 4), -1)],
    "dropout": [lambda g: (t(3, 4, grad=g), 0.5, 7)],
    "softmax": [lambda g: (t(3, 4, grad=g), 1), lambda g: (t(3, 4, 2, grad=g), -2)],
    "log_softmax": [lambda g: (t(3, 4, grad=g), 1), lambda g: (t(3, 4, 2, grad=g), 0)],
    "softmax_backward": [lambda g: (t(3, 4), t(3, 4).softmax(1), 1)],
    "log_softmax_backward": [lambda g: (t(3, 4), t(3, 4).log_softmax(1), 1)],
    "cross_entropy": [
        lambda g: (t(4, 5, grad=g), INDEX, WEIGHT, -100, "mean", 0.1),
        lambda g: (t(4, 5, 2, grad=g), torch.stack([INDEX, INDEX], 1), None, -100, "none", 0.0),
        lambda g: (t(4, 5, grad=g), t(4, 5).softmax(1), None, -100, "sum", 0.0),
    ],
    "cross_entropy_backward": [lambda g: (t(), t(4, 5), INDEX, WEIGHT, t(2, 4).double(), -100, "mean", 0.1)],
    "linear_cross_entropy": [
        lambda g: (t(4, 3, grad=g), t(5, 3, grad=g), t(5, grad=g), INDEX, WEIGHT, -100, "mean", 0.1, g),
        lambda g: (t(4, 3, grad=g), t(5, 3, grad=g), None, INDEX, None, -100, "none", 0.0, False),
    ],
    "linear_cross_entropy_backward": [lambda g: (t(), t(4, 3), t(5, 3), t(5), INDEX, WEIGHT, -100, "mean", 0.1)],
    "nll_loss": [
        lambda g: (t(4, 5, grad=g), INDEX, WEIGHT, -100, "mean"),
        lambda g: (t(4, 5, grad=g), INDEX, None, -100, "none"),
    ],
    "nll_loss_backward": [lambda g: (t(), t(4, 5), INDEX, WEIGHT, -100, "mean")],
    "mse_loss": [
        lambda g: (t(3, 4, grad=g), t(3, 4, grad=g), "mean"),
        lambda g: (t(3, 4, grad=g), t(3, 4, grad=g), "none"),
    ],
    "mse_loss_backward": [lambda g: (t(), t(3, 4), t(3, 4), "mean")],
    "max_pool": [
        lambda g: (t(2, 3, 9, 7, grad=g), *WINDOW, [1, 2], False, True),
        lambda g: (t(3, 9, grad=g), *EVENLY, [], False, False),
        lambda g: (last(1, 3, 17, 16, grad=g), True, [1, 1], [], [], [], False, True),
    ],
    "max_pool_with_indices": [
        lambda g: (last(2, 3, 9, 7, grad=g), *WINDOW, [1, 1], True),
        lambda g: (t(2, 3, 9, grad=g), *EVENLY, [], False),
    ],
    "max_pool_backward": [lambda g: (t(2, 3, 5, 4), CODES, t(2, 3, 9, 7), *WINDOW, [1, 1], False)],
    "avg_pool": [
        lambda g: (last(2, 3, 9, 7, grad=g), *WINDOW, False, True, 0),
        lambda g: (t(2, 3, 9, grad=g), *EVENLY, False, True, 0),
    ],
    "avg_pool_backward": [lambda g: (t(2, 3, 5, 4), t(2, 3, 9, 7), *WINDOW, False, True, 0)],
    "max_unpool": [lambda g: (t(2, 3, 2, 2, grad=g), PLACES, [3, 4])],
    "max_unpool_backward": [lambda g: (t(2, 3, 3, 4), PLACES, [3, 4])],
    "batch_norm": [
        lambda g: (t(4, 3, 5, grad=g), t(3, grad=g), t(3, grad=g), None, None, 1e-5),
        lambda g: (last(4, 3, 5, 2, grad=g), None, None, None, None, 1e-5),
        lambda g: (t(4, 3, grad=g), t(3, grad=g), None, t(3), t(3).exp(), 1e-5),
    ],
    "batch_norm_backward": [lambda g: (t(4, 3, 5), t(4, 3, 5), t(3), t(2, 3).double().exp(), False, 1e-5)],
    "group_norm": [
        lambda g: (t(2, 4, 5, grad=g), t(4, grad=g), t(4, grad=g), 2, 1e-5),
        lambda g: (last(2, 4, 3, 3, grad=g), None, t(4, grad=g), 4, 1e-5),
    ],
    "group_norm_backward": [lambda g: (t(2, 4, 5), X, t(4), moments(X, 2), 2, 1e-5)],
    "layer_norm": [
        lambda g: (t(2, 4, 5, grad=g), t(5, grad=g), t(5, grad=g), [5], 1e-5),
        lambda g: (t(5, 4, 2, grad=g).mT.detach().requires_grad_(g), None, t(2, 4, grad=g), [2, 4], 1e-5),
    ],
    "rms_norm": [lambda g: (t(2, 4, 5, grad=g), t(5, grad=g), None, [5], 1e-5)],
    "add_layer_norm": [lambda g: (t(4, 5, grad=g), t(4, 5, grad=g), t(5, grad=g), t(5, grad=g), [5], 1e-5)],
    "add_rms_norm": [lambda g: (t(2, 4, 5, grad=g), t(2, 4, 5, grad=g), t(4, 5, grad=g), None, [4, 5], 1e-5)],
    "layer_norm_backward": [
        lambda g: (t(2, 4, 5), X, t(5), row_moments(X, True), None, [5], 1e-5),
        lambda g: (t(2, 4, 5), X, None, row_moments(X, True), t(2, 4, 5), [5], 1e-5),
    ],
    "rms_norm_backward": [lambda g: (t(2, 4, 5), X, t(5), row_moments(X, False), t(2, 4, 5), [5], 1e-5)],
    "embedding": [
        lambda g: (t(7, 3, grad=g), torch.tensor([[1, 6], [0, 1]]), -1, False),
        lambda g: (t(7, 3, grad=g), torch.tensor([1, 6, 1], dtype=torch.int32), 1, True),
    ],
    "embedding_backward": [lambda g: (t(2, 2, 3), torch.tensor([[1, 6], [0, 1]]), 7, 0, False)],
    "conv": [
        lambda g: (t(2, 4, 6, 5, grad=g), t(6, 2, 3, 3, grad=g), t(6, grad=g), t(2, 6, 3, 3, grad=g), [2, 2], [1, 1], [1, 1],
                   False, [0, 0], 2, None),
        lambda g: (t(2, 3, 5, grad=g), t(3, 4, 3, grad=g), None, None, [2], [1], [1], True, [1], 1, "relu"),
        lambda g: (_last(t(2, 3, 6, 5)).requires_grad_(g), t(4, 3, 3, 3, grad=g), None, None, [1, 1], [1, 1], [1, 1], False,
                   [0, 0], 1, None),
    ],
    "conv_weight": [
        lambda g: (t(2, 6, 3, 3), t(2, 4, 6, 5), [3, 3], [2, 2], [1, 1], [1, 1], 2),
        lambda g: (t(2, 6, 6, 5), _last(t(2, 4, 6, 5)), [3, 3], [1, 1], [1, 1], [1, 1], 1),
    ],
    "attention": [
        lambda g: (t(2, 3, 5, 4, grad=g), t(2, 3, 6, 4, grad=g), t(2, 3, 6, 7, grad=g), *PLAIN_ATTENTION),
        lambda g: (last(2, 4, 5, 3, grad=g), t(2, 2, 6, 3, grad=g), t(2, 2, 6, 3, grad=g), t(4, 1, 6, grad=g), t(4).exp(), None,
                   None, *CAUSAL_ATTENTION),
    ],
    "attention_lse": [
        lambda g: (t(5, 4, grad=g), t(6, 4, grad=g), t(6, 4, grad=g), *PLAIN_ATTENTION),
        lambda g: (t(2, 5, 4, grad=g), t(2, 5, 4, grad=g), t(2, 5, 4, grad=g), None, None, OFFSETS, OFFSETS, *CAUSAL_ATTENTION),
    ],
    "attention_backward": [
        lambda g: (t(3, 5, 7), t(3, 5, 4), t(3, 6, 4), t(3, 6, 7), t(5, 6), None, None, None, t(3, 5, 7),
                   torch.stack([t(3, 5), t(3, 5).exp()]), t(3, 5), True, *PLAIN_ATTENTION[4:]),
    ],
}


def test_every_operator_has_samples() -> None:
    assert set(SAMPLES) == set(OPERATORS)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize(("name", "i"), [(name, i) for name in SAMPLES for i in range(len(SAMPLES[name]))])
def test_opcheck(name: str, i: int, backend: str) -> None:
    if backend == "auto":
        for grad in (False, True):
            torch.library.opcheck(OPERATORS[name].overload, SAMPLES[name][i](grad), {"backend": backend})
    else:  # what may differ between backends; registration and tracing know none
        kinds = ("test_schema", "test_faketensor")
        torch.library.opcheck(OPERATORS[name].overload, SAMPLES[name][i](True), {"backend": backend}, test_utils=kinds)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_dispatchers_op_is_the_eager_one(name: str) -> None:
    for make in SAMPLES[name]:
        args = make(False)
        eager, dispatched = OPERATORS[name](*args), OPERATORS[name].overload(*args)
        if OPERATORS[name].extra is not None:
            dispatched = OPERATORS[name]._visible(dispatched)
        torch.testing.assert_close(eager, dispatched)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Through Dynamo and AOTAutograd, with every graph break an error; the generated code is not what is tested."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("case", [*CASES, *FUSED], ids=str)
def test_compiles_forward_and_backward(case: Case) -> None:
    def step(*tensors: Tensor) -> Tensor:
        return case.ours(*tensors)

    call = compiled(step, dynamic=True)
    for seed in (1, 2):
        mine, theirs = case.tensors(seed=seed, grad=True), case.tensors(seed=seed, grad=True)
        out, expected = call(*mine), case.torch(*theirs)
        torch.testing.assert_close(out, expected)
        upstream = torch.linspace(-1, 2, out.numel()).to(out.dtype).reshape(out.shape)
        for a, b in zip(torch.autograd.grad(out, mine, upstream), torch.autograd.grad(expected, theirs, upstream)):
            torch.testing.assert_close(a, b)


def test_dynamic_shapes_compile_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    w, b = torch.randn(8, 6), torch.randn(8)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(x: Tensor) -> Tensor:
        return f.softmax(f.linear(x, w, b, activation="gelu"), -1)

    for rows in (5, 7, 12, 31):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(step(x), F.softmax(F.gelu(F.linear(x, w, b)), -1))
    assert counter.frame_count == 1
    targets = [node.target for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.fastnn.linear.default in targets
    assert torch.ops.fastnn.softmax.default in targets


def replaced_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.GELU(),
        nn.Linear(8, 8),
        nn.PReLU(),
        nn.LayerNorm(8),
        nn.GLU(),
        nn.Linear(4, 3),
        nn.Softmax(-1),
    )
    return model


def test_inductor_runs_a_replaced_model() -> None:
    theirs, ours = replaced_model(), replaced_model()
    fastnn.replace(ours)
    torch._dynamo.reset()
    call = torch.compile(ours, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(call(x), theirs(x))
        call(x)[:, 0].sum().backward()
        theirs(x)[:, 0].sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_compiled_calls_are_traced_and_choose_their_backend_when_they_run() -> None:
    call = compiled(lambda x, w: f.linear(x, w, activation="relu"))
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    for backend in ("reference", "torch"):
        with fastnn.backend(backend), fastnn.trace() as calls:
            torch.testing.assert_close(call(x, w), F.relu(F.linear(x, w)))
        assert [(c.op, c.backend) for c in calls] == [("linear", backend)]


def test_backend_argument_travels_with_the_graph() -> None:
    call = compiled(lambda x: f.gelu(f.tanh(x, backend="reference"), backend="torch"))
    x = torch.randn(3, 4)
    with fastnn.trace() as calls:
        torch.testing.assert_close(call(x), F.gelu(torch.tanh(x)))
    assert [c.backend for c in calls] == ["reference"]


def test_compiled_dropout_draws_anew() -> None:
    call = compiled(lambda x: f.dropout(x, 0.5))
    x = torch.ones(100, 100)
    torch.manual_seed(0)
    first, second = call(x), call(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, call(x))
    seeded = compiled(lambda x: f.dropout(x, 0.5, seed=3))
    assert torch.equal(seeded(x), f.dropout(x, 0.5, seed=3))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["jit", "make_fx", "fake"])
@pytest.mark.parametrize("op", ["dropout", "attention"])
def test_no_tracer_keeps_a_drawn_seed(op: str, how: str) -> None:
    def call(x: Tensor) -> Tensor:
        return f.dropout(x, 0.5) if op == "dropout" else f.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    ones = torch.ones(2, 4, 500)
    if how == "fake":
        with FakeTensorMode() as mode:
            assert call(mode.from_tensor(ones)).shape == ones.shape
        return
    traced = torch.jit.trace(call, ones, check_trace=False) if how == "jit" else make_fx(call)(ones)
    assert not torch.equal(traced(ones), traced(ones))


@pytest.mark.parametrize("lower", [torch.bfloat16])
def test_autocast_inside_a_compiled_function(lower: torch.dtype) -> None:
    def step(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", lower):
            y = f.linear(x, w)
            return y, f.mse_loss(y, y.relu())

    x, w = torch.randn(3, 4), torch.randn(5, 4)
    for a, b in zip(compiled(step)(x, w), step(x, w)):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)
    assert compiled(step)(x, w)[0].dtype == lower


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    model = replaced_model()
    fastnn.replace(model)
    rows = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(model, (torch.randn(4, 6),), dynamic_shapes=({0: rows},), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {
        "fastnn.linear.default",
        "fastnn.activation.default",
        "fastnn.prelu.default",
        "fastnn.glu.default",
    } <= targets
    for n in (2, 9):
        x = torch.randn(n, 6)
        torch.testing.assert_close(program.module()(x), model(x))
    assert set(program.state_dict) == set(model.state_dict())


def test_fake_tensors_and_meta() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, w = torch.empty(5, 6), torch.empty(4, 6)
        y = f.softmax(f.linear(x, w, activation="silu"), 1)
    assert y.shape == (5, 4)
    outside = f.linear(mode.from_tensor(torch.randn(5, 6)), mode.from_tensor(torch.randn(4, 6)))
    assert type(outside).__name__ == "FakeTensor"
    assert outside.shape == (5, 4)


def test_make_fx_sees_the_ops() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x, w: f.gelu(f.linear(x, w)))(torch.randn(3, 4), torch.randn(5, 4)).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets == ["fastnn.linear.default", "fastnn.activation.default"]


# torch.func: torch's own ops serve, and say so


@pytest.mark.parametrize("case", [*MATMUL, *ACTIVATION, *SOFTMAX, *POOL, *NORM], ids=str)
def test_func_grad_and_vmap(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    every = tuple(range(len(tensors)))

    def total(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: call(*t).sin().sum()

    ours, theirs = torch.func.grad(total(case.ours), every), torch.func.grad(total(case.torch), every)
    for a, b in zip(ours(*tensors), theirs(*tensors)):
        torch.testing.assert_close(a, b)
    batch = [torch.stack([x, x.cos()]) for x in tensors]
    for a, b in zip(torch.func.vmap(ours)(*batch), torch.func.vmap(theirs)(*batch)):
        torch.testing.assert_close(a, b)
    with fastnn.trace() as calls:
        torch.func.vmap(case.ours)(*batch)
    assert [(c.backend, "torch.func" in c.reason) for c in calls] == [("torch", True)]


def test_func_of_a_replaced_model() -> None:
    theirs, ours = replaced_model(), replaced_model()
    fastnn.replace(ours)
    x = torch.randn(5, 6)

    def per_sample(model: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (row[None],))[0, 0].log()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(model.named_parameters()), x)

    for a, b in zip(per_sample(ours).values(), per_sample(theirs).values()):
        torch.testing.assert_close(a, b)


def test_jacobians_and_hessians() -> None:
    w = torch.randn(3, 4).double()
    x = torch.randn(4).double()

    def ours(x: Tensor) -> Tensor:
        return f.gelu(f.linear(x, w)).sum()

    def theirs(x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, w)).sum()

    torch.testing.assert_close(torch.func.hessian(ours)(x), torch.func.hessian(theirs)(x))
    torch.testing.assert_close(torch.func.jacfwd(ours)(x), torch.func.jacfwd(theirs)(x))
    torch.testing.assert_close(torch.autograd.functional.hessian(ours, x), torch.func.hessian(theirs)(x))


def test_func_inside_a_compiled_function() -> None:
    w = torch.randn(3, 4)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: f.gelu(f.linear(x, w)).sum())(x)

    x = torch.randn(5, 4)
    torch.testing.assert_close(compiled(gradient)(x), gradient(x))


def test_dropout_under_vmap_follows_torchs_rule() -> None:
    x = torch.ones(4, 50)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda t: f.dropout(t))(x)
    rows = torch.func.vmap(lambda t: f.dropout(t), randomness="different")(x)
    assert not torch.equal(rows[0], rows[1])
    rows = torch.func.vmap(lambda t: f.dropout(t, seed=1))(x)
    assert torch.equal(rows[0], rows[1])
