"""replace, restore and use: what they change, what they leave alone, and what they say about it."""

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastnn
from fastnn import _hugging_face
from fastnn.nn import _lookalike
from fastnn.replace import Report


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.body = nn.Sequential(nn.GELU(), nn.Linear(8, 8), nn.Dropout(0.25))
        self.again = self.first
        self.act = nn.ReLU()
        self.odd = nn.Softsign()  # which fastnn has not
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.act(self.body(self.norm(self.first(x))))))


def torch_model() -> Net:
    torch.manual_seed(1)
    return Net()


def test_replace_switches_classes_and_nothing_else() -> None:
    model = torch_model().eval()
    x = torch.randn(5, 6)
    expected = model(x)
    before = {name: (id(m), type(m)) for name, m in model.named_modules()}
    parameters = [id(p) for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = fastnn.replace(model)
    assert type(model.first) is fastnn.nn.Linear
    assert type(model.body[0]) is fastnn.nn.GELU
    assert model.again is model.first
    assert {name: id(m) for name, m in model.named_modules()} == {name: i for name, (i, _) in before.items()}
    assert [id(p) for p in model.parameters()] == parameters
    assert [e.name for e in report.replaced] == ["first", "norm", "body.0", "body.1", "body.2", "act", "last"]
    assert [tuple(e) for e in report.left] == [("odd", "Softsign", "no fastnn kernel for Softsign")]
    torch.testing.assert_close(model(x), expected)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with fastnn.trace() as calls:
        model(x)
    assert [call.op for call in calls] == ["linear", "layer_norm", "activation", "linear", "activation", "linear"]

    assert fastnn.restore(model) is model
    assert {name: type(m) for name, m in model.named_modules()} == {name: t for name, (_, t) in before.items()}
    with fastnn.trace() as calls:
        torch.testing.assert_close(model(x), expected)
    assert calls == []


def test_replace_is_idempotent() -> None:
    model = torch_model()
    first, second = fastnn.replace(model), fastnn.replace(model)
    assert [e.name for e in first.replaced] == [e.name for e in second.replaced]
    assert {e.reason for e in second.replaced} == {"already fastnn's"}
    assert type(model.first) is fastnn.nn.Linear
    fastnn.restore(fastnn.restore(model))
    assert type(model.first) is nn.Linear


def test_report_reads_well() -> None:
    text = str(fastnn.replace(torch_model()))
    assert text.splitlines()[0] == "replaced 7 modules, left 1"
    assert "3 × Linear" in text
    assert "1 × Softsign             left: no fastnn kernel for Softsign" in text
    assert str(Report()) == "replaced 0 modules, left 0"


def test_the_model_itself_may_be_a_layer() -> None:
    layer = nn.Linear(2, 3)
    report = fastnn.replace(layer)
    assert type(layer) is fastnn.nn.Linear
    assert report.replaced[0].name == ""


def test_hooks_and_training_stay() -> None:
    model = torch_model()
    seen: list[str] = []
    model.first.register_forward_hook(lambda *_: seen.append("forward"))
    model.first.register_full_backward_hook(lambda *_: seen.append("backward"))
    fastnn.replace(model)
    model(torch.randn(2, 6)).sum().backward()
    assert seen == ["forward", "backward"]
    assert model.first.weight.grad is not None


def test_training_gives_torchs_losses() -> None:
    data = torch.randn(64, 6)
    target = data[:, :3].argmax(1)
    losses: list[list[float]] = []
    for switch in (False, True):
        model = torch_model()
        model.eval()  # no dropout: its draws are not torch's
        loss_function: nn.Module = nn.CrossEntropyLoss()
        if switch:
            fastnn.replace(model)
            fastnn.replace(loss_function)
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        losses.append([])
        for _ in range(20):
            loss = loss_function(model(data), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(float(loss.detach()))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_copies_and_pickles_stay_replaced() -> None:
    model = torch_model().eval()
    fastnn.replace(model, backend="reference")
    x = torch.randn(3, 6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.first) is fastnn.nn.Linear
        assert other.first.backend == "reference"
        torch.testing.assert_close(other(x), model(x))


def test_backend_of_the_replaced() -> None:
    model = torch_model().eval()
    fastnn.replace(model, backend="reference")
    with fastnn.trace() as calls:
        model(torch.randn(2, 6))
    assert {call.backend for call in calls} == {"reference"}
    fastnn.restore(model)
    assert "backend" not in model.first.__dict__
    with pytest.raises(ValueError, match="backend: got 'fpga', allowed are 'auto'"):
        fastnn.replace(model, backend="fpga")
    assert type(model.first) is nn.Linear
    with pytest.raises(TypeError, match=r"argument 'model' must be torch\.nn\.Module, not list"):
        fastnn.replace([model])  # type: ignore[arg-type]


class UserLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def overridden() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = lambda input: input * 2  # type: ignore[method-assign]
    return layer


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def parametrised() -> nn.Module:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def subclassed_weight() -> nn.Module:
    class Tagged(Tensor):
        pass

    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.randn(3, 3).as_subclass(Tagged))
    return layer


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: UserLinear(3, 3), "a subclass of torch.nn.Linear: only exact types are switched"),
        (overridden, "its forward is overridden on the instance"),
        (parametrised, "parametrised"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "parametrised"),
        (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), "parametrised"),
        (old_weight_norm, "weight_norm"),
        (subclassed_weight, "a subclass of Tensor"),
        (lambda: nn.LazyLinear(3), "lazy"),
        (lambda: torch.ao.nn.qat.Linear(3, 3, qconfig=torch.ao.quantization.default_qconfig), "quantised"),
        (lambda: torch.jit.script(nn.Linear(3, 3)), "compiled by torch.jit"),
        (lambda: parametrizations.orthogonal(nn.MultiheadAttention(4, 2), "in_proj_weight"), "parametrised"),
        (lambda: nn.EmbeddingBag(3, 3), "no fastnn kernel for EmbeddingBag"),
    ],
)
def test_what_is_left_and_why(make, reason: str) -> None:  # type: ignore[no-untyped-def]
    layer = make()
    kind = type(layer)
    report = fastnn.replace(nn.Sequential(layer))
    assert type(layer) is kind
    (entry,) = [e for e in report.left if e.name == "0"]
    assert entry.class_name == kind.__name__
    assert reason in entry.reason
    assert all(e.name != "0" for e in report.replaced)


def test_parametrising_after_replacing_works() -> None:
    torch.manual_seed(2)
    layer = nn.Linear(3, 3)
    fastnn.replace(layer)
    parametrizations.weight_norm(layer)
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_functional_call_and_stacked_modules() -> None:
    """torch.func's way of calling a module with other parameters, and a vmap over an ensemble of them."""
    models = [nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)) for _ in range(3)]
    x = torch.randn(7, 4)
    expected = torch.stack([m(x) for m in models])
    for m in models:
        fastnn.replace(m)
    parameters, buffers = torch.func.stack_module_state(models)
    stacked = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(stacked, expected)


# use()


def torchs_own_calls(x: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
    return [
        x @ w,
        x.matmul(w),
        torch.matmul(x, w),
        torch.mm(x, w),
        x.mm(w),
        x.mv(v),
        torch.bmm(x[None], w[None]),
        torch.addmm(v[:1], x, w),
        torch.addmm(x @ w, x, w, beta=2),
        F.linear(x, w.T, bias=None),
        F.relu(x),
        torch.relu(x),
        x.relu(),
        F.gelu(x, approximate="tanh"),
        F.silu(x),
        x.sigmoid(),
        F.sigmoid(x),
        x.tanh(),
        F.glu(x),
        x.softmax(-1),
        torch.softmax(x, 0, dtype=torch.float64),
        F.softmax(x, dim=-1, dtype=torch.float32),
        F.log_softmax(x, -1),
        x.log_softmax(dim=1),
        F.cross_entropy(x, torch.tensor([0, 1, 2])),
        F.mse_loss(x, x.cos()),
        F.scaled_dot_product_attention(x, x, x, is_causal=True),
        F.layer_norm(x, (4,), v),
        torch.layer_norm(x, (4,), v, None, 1e-5, False),
        F.rms_norm(x, [4]),
        torch.rms_norm(x, (4,), v, 0.1),
    ]


def test_use_serves_torchs_own_calls() -> None:
    x, w, v = torch.randn(3, 4), torch.randn(4, 4), torch.randn(4)
    expected = torchs_own_calls(x, w, v)
    with fastnn.use(), fastnn.trace() as calls:
        results = torchs_own_calls(x, w, v)
        unserved = torch.cumsum(x, 0)
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right)
    torch.testing.assert_close(unserved, x.cumsum(0))
    assert len(calls) == len(expected) + 1  # one of them is of two products
    with fastnn.trace() as calls:
        torchs_own_calls(x, w, v)
    assert calls == []


def torchs_own_pools_and_norms(x: Tensor, v: Tensor) -> list[Any]:
    t: Any = torch  # whose stubs do not have all of these
    flat, deep = x[0], x.unsqueeze(2)
    return [
        F.max_pool1d(flat, 2, return_indices=True),
        F.max_pool2d(x, 2, stride=1, return_indices=True),
        F.max_pool3d(deep, (1, 2, 2), return_indices=True),
        F.adaptive_max_pool1d(flat, 2, return_indices=True),
        F.adaptive_max_pool2d(x, 2, return_indices=True),
        F.adaptive_max_pool3d(deep, (1, 2, 2), return_indices=True),
        F.max_pool2d_with_indices(x, (2, 2)),
        t.max_pool1d_with_indices(flat, 2),
        t.adaptive_max_pool1d(flat, 2),
        F.max_pool2d(x, 2),
        t.max_pool1d(flat, 2),
        t.max_pool2d(x, 2, 1, 1, 1, True),
        t.max_pool3d(deep, (1, 2, 2)),
        t.avg_pool1d(flat, 2),
        t.adaptive_avg_pool1d(flat, 2),
        F.max_unpool2d(x[..., :2, :2], torch.arange(4).view(2, 2).expand(2, 4, 2, 2), (2, 2)),
        t.batch_norm(x, v, None, v, v.abs(), False, 0.1, 1e-5, True),
        t.batch_norm(x, None, v, None, None, True, 0.1, 1e-3, True),
        t.group_norm(x, 2, v, v),
        t.instance_norm(x, v, None, None, None, True, 0.1, 1e-5, True),
        F.instance_norm(x),
        F.group_norm(x, 2),
    ]


def test_use_serves_torchs_own_pools_and_norms() -> None:
    x, v = torch.randn(2, 4, 6, 7), torch.randn(4)
    expected = torchs_own_pools_and_norms(x, v)
    with fastnn.use(), fastnn.trace() as calls:
        results = torchs_own_pools_and_norms(x, v)
    torch.testing.assert_close(results, expected)
    assert len(calls) == len(expected)


def test_rmatmul_is_served() -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 4)
    with fastnn.use(), fastnn.trace() as calls:
        result = Tensor.__rmatmul__(w, x)
    torch.testing.assert_close(result, x @ w)
    assert len(calls) == 1


untyped: Any = torch  # whose stubs do not have all of these
ONLY_TORCHS_FORM: dict[str, Callable[[Any, Any], Tensor]] = {
    "tanh(out=)": lambda x, w: untyped.tanh(x, out=torch.empty(3, 4)),
    "sigmoid(out=)": lambda x, w: untyped.sigmoid(x, out=torch.empty(3, 4)),
    "softmax(out=)": lambda x, w: untyped.softmax(x, 1, out=torch.empty(3, 4)),
    "log_softmax(out=)": lambda x, w: untyped.log_softmax(x, 1, out=torch.empty(3, 4)),
    "gelu(out=)": lambda x, w: untyped.nn.functional.gelu(x, out=torch.empty(3, 4)),
    "softmax(axis=)": lambda x, w: untyped.softmax(x, axis=1),
    "addmm(beta, alpha)": lambda x, w: untyped.addmm(2, x, 3, x, w),
    "Tensor.addmm(beta)": lambda x, w: x.addmm(2, x, w),
    "baddbmm(beta)": lambda x, w: untyped.baddbmm(2, x[None], x[None], w[None]),
}


@pytest.mark.filterwarnings("ignore:This overload of:UserWarning")
@pytest.mark.parametrize("form", ONLY_TORCHS_FORM)
def test_use_leaves_to_torch_the_forms_that_only_torch_has(form: str) -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 4)
    expected = ONLY_TORCHS_FORM[form](x, w)
    with fastnn.use(), fastnn.use(), fastnn.trace() as calls:
        result = ONLY_TORCHS_FORM[form](x, w)
        x @ w
    assert torch.equal(result, expected)
    other, product = calls
    assert other.backend == "torch"
    assert other.reason == "only torch takes these arguments"
    assert product.op == "matmul", "it did not go on serving"
    with fastnn.use(), fastnn.backend("cpu"), pytest.raises(RuntimeError, match="backend='cpu' cannot serve this call: only"):
        ONLY_TORCHS_FORM[form](x, w)


def test_use_raises_torchs_own_error_for_a_call_that_neither_takes() -> None:
    x = torch.randn(3, 4)
    with fastnn.use(), pytest.raises(TypeError, match="invalid combination of arguments"):
        untyped.addmm(x, x)


def test_use_does_not_recurse_and_nests() -> None:
    x = torch.randn(3, 4)
    with fastnn.use(), fastnn.backend("torch"), fastnn.trace() as calls, fastnn.use():
        F.gelu(x)
    assert len(calls) == 1
    assert calls[0].backend == "torch"


def test_use_serves_a_model_that_was_not_replaced() -> None:
    model = torch_model().eval()
    x = torch.randn(5, 6)
    expected = model(x)
    with fastnn.use(), fastnn.trace() as calls:
        torch.testing.assert_close(model(x), expected)
    assert [call.op for call in calls] == ["linear", "layer_norm", "activation", "linear", "activation", "linear"]
    with fastnn.use():
        model(x).sum().backward()
    assert model.first.weight.grad is not None


def test_use_dropout_follows_its_mode() -> None:
    layer = nn.Dropout(0.5)
    x = torch.ones(2000)
    with fastnn.use(), fastnn.trace() as calls:
        kept = layer(x) != 0
        assert layer.eval()(x) is x
    assert 0.4 < float(kept.float().mean()) < 0.6
    assert [call.op for call in calls] == ["dropout"]


# Models of transformers, small and with random weights


HUGGING_FACE: dict[str, dict[str, Any]] = {
    "Bert": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50},
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 64},
    "Llama": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 64, "vocab_size": 50},
    "ViT": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
            "patch_size": 8},
    "T5": {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 64, "vocab_size": 50, "dropout_rate": 0.0},
    "Whisper": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 60,
                "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
                "max_source_positions": 16, "pad_token_id": 0, "decoder_start_token_id": 1},
}  # fmt: skip
NORMS = {"Llama": 3, "T5": 7}  # root-mean-square norms of their own


def hugging_face(name: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**HUGGING_FACE[name], **options)
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models(name: str) -> None:
    """Unmodified, by use and by replace: the same outputs, from our attention, norms and products."""
    model = hugging_face(name)
    tokens = torch.randint(2, 50, (2, 9))
    inputs: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][1, 6:] = 0
    if name == "ViT":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    elif name == "Whisper":
        inputs = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens}
    elif name == "T5":
        inputs["decoder_input_ids"] = tokens

    def same(block: Any) -> set[str]:
        with torch.no_grad(), block, fastnn.trace() as calls:
            found = model(**inputs).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        assert not any(call.op == "attention" and call.backend != "cpu" for call in calls)
        return {call.op for call in calls if call.backend == "cpu"}

    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    norm = "rms_norm" if name in NORMS else "layer_norm"
    products = {"addmm"} if name == "GPT2" else {"linear"}
    served = same(fastnn.use())
    assert served >= {"attention", *products, norm}, served
    report = fastnn.replace(model)
    assert sum(e.reason.startswith("root-mean-square") for e in report.replaced) == NORMS.get(name, 0)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "save_pretrained")}
    assert sum("attention" in e.reason for e in report.replaced) == len(configs) == (3 if name == "T5" else 1)
    assert same(fastnn.use()) >= {"attention", norm, *products}
    assert same(nullcontext()) >= {"attention", norm, *products - {"addmm"}}
    assert name != "Bert" or not report.left
    classes = {type(m) for m in fastnn.restore(model).modules()}
    assert not any(kind.__module__.startswith("fastnn") for kind in classes)
    assert {config._attn_implementation for config in configs.values()} == {"sdpa"}


def attentions(model: Any) -> list[fastnn.backends.Call]:
    with torch.no_grad(), fastnn.trace() as calls:
        model(input_ids=torch.arange(2, 11).view(1, 9))
    return [call for call in calls if call.op == "attention"]


def test_attention_of_transformers_is_copied_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hugging_face("Bert")
    fastnn.replace(model, backend="reference")
    assert [call.backend for call in attentions(model)] == ["reference"]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = pickle.dumps(model)
    from transformers.modeling_utils import AttentionInterface

    registry = {k: v for k, v in AttentionInterface._global_mapping.items() if not k.startswith("fastnn")}
    monkeypatch.setattr(AttentionInterface, "_global_mapping", registry)  # as in a fresh process
    for other in (pickle.loads(pickled), torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert [call.backend for call in attentions(other)] == ["reference"]
        assert attentions(fastnn.restore(other)) == []
        assert other.config._attn_implementation == "sdpa"
    assert len(attentions(model)) == 1
    model.save_pretrained(tmp_path)
    assert "fastnn" not in (tmp_path / "config.json").read_text()
    assert "fastnn" not in str(model.config.to_dict())
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_attention_of_transformers_that_is_left() -> None:
    for choice, words in (("eager", "also returns the weights"), ("sdpa", "")):
        bert = hugging_face("Bert", attn_implementation=choice)
        model = nn.ModuleDict({"bert": bert})
        report = fastnn.replace(model)
        where = report.replaced if choice == "sdpa" else report.left
        assert [words in e.reason and e.name for e in where if "attention" in e.reason] == ["bert"]
        assert len(attentions(bert)) == (choice == "sdpa")
    assert "already" in next(e.reason for e in fastnn.replace(model).replaced if "attention" in e.reason)
    bert.set_attn_implementation("eager")  # the user's choice, later
    fastnn.restore(model)
    assert attentions(bert) == []
    assert bert.config._attn_implementation == "eager"
    bert = hugging_face("Bert")
    for module in bert.modules():
        if type(module).__name__ == "BertSelfAttention":
            module.__class__ = type("Own", (type(module),), {"__module__": __name__})  # here "sdpa": and == "sdpa" are written
    assert ["by its name" in e.reason for e in fastnn.replace(bert).left if "attention" in e.reason] == [True]


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [7, 11])
def test_attention_of_transformers_is_theirs(mask: str, causal: bool, keys: int) -> None:
    """With a learned bias and grouped heads: the outputs, and the gradients, of transformers' function."""
    sdpa = pytest.importorskip("transformers.integrations.sdpa_attention", reason="transformers is not installed")
    torch.manual_seed(0)
    module: Any = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, causal
    q, k, v = (torch.randn(2, heads, n, 8, requires_grad=True) for heads, n in ((4, 7), (2, keys), (2, keys)))
    bias = torch.randn(1, 4, 7, keys, requires_grad=True)
    seen = torch.rand(2, 1, 7, keys) < 0.7
    seen[..., 0] = True
    masks = {"none": None, "bool": seen, "float": torch.where(seen, 0.0, -1e30)}
    for position_bias in (None, bias):
        found, expected = (
            function(module, q, k, v, masks[mask], scaling=0.3, position_bias=position_bias)[0]
            for function in (_hugging_face.attention, sdpa.sdpa_attention_forward)
        )
        inputs = (q, k, v, bias)[: 4 if position_bias is not None else 3]
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(out.sin().sum(), inputs, retain_graph=True) for out in (found, expected))
        torch.testing.assert_close(*grads)
    with fastnn.trace() as calls:
        _hugging_face.attention(module, q, k, v, masks[mask], dropout=0.5, softcap=2.0)
    assert calls[0].shapes[1][1] == 2  # heads, not repeated
    assert calls[0].options[0] == 0.5


class _Norm(nn.Module):
    """A root-mean-square norm, or nearly"""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(8)), 1e-5
        if change == "another attribute":
            self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)


def _changed(change: str) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if change == "centred":
            x = x - x.mean(-1, keepdim=True)
        divisor = torch.rsqrt(x.square().mean(-1, keepdim=True) + (1e-5 if change == "an eps of its own" else self.epsilon))
        if change == "eps outside":
            divisor = 1 / (x.square().mean(-1, keepdim=True).sqrt() + self.epsilon)
        if change == "no gradient":
            divisor = divisor.detach()
        return (self.weight + (change == "one more")) * x * divisor * (1.5 if change == "in training" and self.training else 1.0)

    return type("RMSNorm", (_Norm,), {"forward": forward})


@pytest.mark.parametrize(
    "change",
    ["nothing", "centred", "an eps of its own", "eps outside", "no gradient", "one more", "in training", "another attribute"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_norms_are_known_by_what_they_do(change: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lookalike, "_classes", {})
    kind = _Norm if change == "another attribute" else _changed(change)
    model = nn.Sequential(kind(change))
    nn.init.uniform_(next(model.parameters()), 0.5, 2)
    model.requires_grad_(not frozen)
    before = torch.get_rng_state()
    report = fastnn.replace(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(report.replaced) == (change == "nothing")
    if change == "nothing":
        x = torch.randn(3, 8)
        for dtype in (torch.float32, torch.bfloat16):  # beside float32 weights: the class's own forward
            fastnn.replace(model)
            found = model(x.to(dtype))
            again = fastnn.restore(model)(x.to(dtype))
            assert type(model[0]) is kind
            assert found.dtype == again.dtype
            torch.testing.assert_close(found, again)
        fastnn.replace(model)
        assert copy.deepcopy(model)[0].state_dict().keys() == {"weight"}
        with fastnn.trace() as calls:
            model(x)
        assert [call.op for call in calls] == ["rms_norm"]


class _NormOfMaxima(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (x.abs().amax(-1, keepdim=True) + self.eps))


def test_use_serves_norms_of_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their class, whose forward is its own again after the block; nothing else, and nowhere else."""
    monkeypatch.setattr("fastnn.nn._lookalike._classes", {})
    own, x = _Norm.forward, torch.randn(3, 8, requires_grad=True)
    norm, hooked = _Norm("nothing"), []
    norm.weight.data.normal_()
    norm.register_forward_hook(lambda *_: hooked.append(1))
    expected = norm(x)
    (slope,) = torch.autograd.grad(expected.sum(), x)

    def served(module: nn.Module, x: Tensor = x) -> list[str]:
        with fastnn.trace() as calls:
            module(x)
        return [call.op for call in calls if call.backend == "cpu"]

    with torch.inference_mode(), fastnn.use():  # where it is met first must not matter
        assert served(norm, torch.randn(3, 8)) == ["rms_norm"]
    with fastnn.use(), fastnn.use():
        found = norm(x)
        assert served(norm) == ["rms_norm"]
        assert served(norm, x.double()) == served(_changed("nothing")("")) == served(_NormOfMaxima(8)) == []
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(served, norm).result() == []
        with fastnn.use():
            pass
        assert served(norm) == ["rms_norm"]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], slope)
    assert len(hooked) == 7, "the trial is nobody's call"
    assert _Norm.forward is own
    with pytest.raises(ZeroDivisionError), fastnn.use():
        assert 1 / (_Norm.forward is own)
    assert _Norm.forward is own
    assert served(norm) == []


def test_use_leaves_a_forward_that_was_set_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Norm, "forward", _Norm.forward)  # put back at the end
    with monkeypatch.context() as patched:
        with fastnn.use():
            patched.setattr(_Norm, "forward", lambda self, x: x + 1)
            assert torch.equal(_Norm("nothing")(torch.zeros(8)), torch.ones(8))
        assert torch.equal(_Norm("nothing")(torch.zeros(8)), torch.ones(8))


def test_use_around_a_compiled_norm() -> None:
    norm, x = _Norm("nothing"), torch.randn(3, 8)
    torch._dynamo.reset()
    step = torch.compile(norm, backend="aot_eager")
    with fastnn.use():
        torch.testing.assert_close(step(x), norm(x))
    torch.testing.assert_close(step(x), norm(x))


def test_gelus_are_known_by_what_they_do() -> None:
    activations = pytest.importorskip("transformers.activations", reason="transformers is not installed")
    kinds = "gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_10", "quick_gelu"
    model: Any = nn.Sequential(*(activations.ACT2FN[name] for name in kinds))
    x = torch.linspace(-5, 15, 41)
    expected = [layer(x) for layer in model]
    report = fastnn.replace(model)
    assert [e.name for e in report.replaced] == list("01234")
    assert {e.reason for e in report.replaced} == {"gelu, by trial"}
    for other in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        with fastnn.trace() as calls:
            torch.testing.assert_close([layer(x) for layer in other], expected, rtol=1e-5, atol=1e-5)
        assert [call.op for call in calls] == ["activation"] * 5
    fastnn.restore(model)
    assert not any(type(m).__module__.startswith("fastnn") for m in model)


@pytest.mark.parametrize("process", ["this one", "a fresh one"])
def test_a_replaced_norm_is_pickled(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(_Norm("nothing"))
    fastnn.replace(model, backend="cpu")
    kind, x, file = type(model[0]), torch.randn(3, 8), io.BytesIO()
    pickled = pickle.dumps(model)
    torch.save(model, file)
    if process == "a fresh one":  # which has not made our class yet
        monkeypatch.setattr(_lookalike, "_classes", {})
    file.seek(0)
    for other in (pickle.loads(pickled), torch.load(file, weights_only=False)):
        assert (type(other[0]) is kind) == (process == "this one")
        with fastnn.trace() as calls:
            torch.testing.assert_close(other(x), model(x))
        assert [call.backend for call in calls] == ["cpu", "cpu"]
        fastnn.restore(other)
        assert type(other[0]) is _Norm
