"""Multi-head attention and the transformer's layers beside torch's: every argument, gradients, masks, what replace() switches."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnn
import fastnn.functional as f
from rule import randn

L, S, B, E, H = 5, 7, 3, 12, 4
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDED = torch.arange(S) >= torch.tensor([[7], [4], [6]])


def pair(module: nn.Module) -> tuple[Any, Any]:
    """The module, and its replaced copy; no bias is zero, as torch's constructors leave them"""
    generator = torch.Generator().manual_seed(5)
    for p in module.parameters():
        if p.dim() == 1:
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.3)
    ours = copy.deepcopy(module)
    report = fastnn.replace(ours)
    assert not report.left, str(report)
    return ours, module


def same(ours: Any, theirs: Any, call: Callable[..., Any], *inputs: Tensor, train: bool = True) -> None:
    """Values without gradients (torch's fast path, if it has one), values and gradients with them"""
    with torch.no_grad():
        torch.testing.assert_close(call(ours, *inputs), call(theirs, *inputs))
    if not train:
        return
    found = []
    for module in (ours, theirs):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = call(module, *leaves)
        y = out[0] if isinstance(out, tuple) else out
        upstream = randn(*y.shape, seed=11)
        grads = torch.autograd.grad(y, [*leaves, *module.parameters()], upstream, allow_unused=True)
        found.append([y, *(g if g is not None else torch.zeros(()) for g in grads)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=2e-5)


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 6, "vdim": 9},
    "bias_kv and zeros": {"add_bias_kv": True, "add_zero_attn": True},
    "everything": {"kdim": 6, "vdim": 9, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": PADDED},
    "boolean": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(3)},
    "added": {"attn_mask": randn(L, S, seed=8)},
    "each head": {"attn_mask": randn(B * H, L, S, seed=8)},
    "both": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(2), "key_padding_mask": PADDED},
}  # fmt: skip


@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ATTENTION)
def test_attention(kind: str, mask: str, weights: dict[str, Any]) -> None:
    options = ATTENTION[kind]
    ours, theirs = pair(nn.MultiheadAttention(E, H, **options))
    sizes = ((L, E), (S, options.get("kdim", E)), (S, options.get("vdim", E)))
    inputs = [randn(*((B, n, e) if options.get("batch_first") else (n, B, e)), seed=n + e) for n, e in sizes]
    same(ours, theirs, lambda m, *t: m(*t, **MASKS[mask], **weights), *inputs)
    if mask in ("none", "boolean") and not options.get("add_bias_kv"):
        alone = [t[0] if options.get("batch_first") else t[:, 0] for t in inputs]
        same(ours, theirs, lambda m, *t: m(*t, **MASKS[mask], **weights), *alone, train=False)


@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention_is_one_product(batch_first: bool, calls: list[Any]) -> None:
    ours, theirs = pair(nn.MultiheadAttention(E, H, batch_first=batch_first))
    x = randn(*((B, L, E) if batch_first else (L, B, E)))
    mask: dict[str, Any] = {"attn_mask": CAUSAL, "is_causal": True}
    same(ours, theirs, lambda m, x: m(x, x, x, need_weights=False, **mask), x)
    same(ours, theirs, lambda m, x: m(x, x, x, **mask), x, train=False)
    same(ours, theirs, lambda m, x, y: m(x, y, y, need_weights=False), x, x + 1)
    calls.clear()
    ours(x, x, x, need_weights=False)
    assert [c.op for c in calls if c.op == "linear"] == ["linear"] * 2


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_a_sample_of_padding_alone(kind: torch.dtype) -> None:
    """0 before the last product, with and without weights, and finite gradients; torch's is NaN"""
    ours, _ = pair(nn.MultiheadAttention(E, H, batch_first=True))
    pads = PADDED | (torch.arange(B) == 1)[:, None]
    pads = pads if kind == torch.bool else torch.zeros(B, S).masked_fill_(pads, -torch.inf)
    x, y = randn(B, L, E), randn(B, S, E)
    with_weights, weights = ours(x, y, y, key_padding_mask=pads)
    without = ours(x, y, y, key_padding_mask=pads, need_weights=False)[0]
    torch.testing.assert_close(with_weights, without)
    assert not weights[1].any()
    assert weights[0].any()
    for out in (with_weights, without):
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), list(ours.parameters())))


def test_autocast_with_weights_and_an_added_mask() -> None:
    ours, theirs = pair(nn.MultiheadAttention(E, H, batch_first=True))
    x, mask = randn(B, L, E), randn(L, L)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (m(x, x, x, attn_mask=mask) for m in (ours, theirs))
    assert [t.dtype for t in found] == [t.dtype for t in expected]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_a_causal_hint_beside_padding_skips_what_is_hidden(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask that is said to be causal is not read: what the kernel gets is the padding, a row a sequence."""
    attention, masks = f.scaled_dot_product_attention, []

    def seen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *args: Any, **options: Any) -> Any:
        masks.append(mask)
        return attention(q, k, v, mask, *args, **options)

    monkeypatch.setattr("fastnn.functional._multihead.scaled_dot_product_attention", seen)
    ours, theirs = pair(nn.MultiheadAttention(E, H, batch_first=True))
    hidden = CAUSAL, PADDED[:, :L]
    causal, pads = (m if kind == torch.bool else torch.zeros(m.shape).masked_fill_(m, -torch.inf) for m in hidden)
    options: dict[str, Any] = {"key_padding_mask": pads, "is_causal": True, "need_weights": False}
    x = randn(B, L, E)
    same(ours, theirs, lambda m, x: m(x, x, x, attn_mask=causal, **options), x)
    assert {tuple(m.shape) for m in masks if m is not None} == {(B, 1, 1, L)}
    assert len(masks) == 2
    if kind != torch.bool:  # a learned one has its gradient
        learned = [causal.clone().requires_grad_() for _ in range(2)]
        for m, mask in zip((ours, theirs), learned, strict=True):
            m(x, x, x, attn_mask=mask, **options)[0].sum().backward()
        torch.testing.assert_close(learned[0].grad, learned[1].grad)


def test_compiled_with_a_causal_hint_padding_and_dropout() -> None:
    layer = fastnn.nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x, calls = randn(B, L, E), {"key_padding_mask": PADDED[:, :L], "attn_mask": CAUSAL, "is_causal": True, "need_weights": False}
    torch._dynamo.reset()
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert step(x, x, x, **calls)[0].isfinite().all()
    layer.eval()
    torch.testing.assert_close(step(x, x, x, **calls)[0], layer(x, x, x, **calls)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    ours, theirs = pair(nn.TransformerEncoderLayer(E, H, 20, 0.0, batch_first=True).to(dtype))
    x = randn(B, L, E, dtype=dtype)
    with torch.no_grad():
        tolerance = 0.05 if dtype.itemsize == 2 else 1e-7
        torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)


def test_dropout_of_the_weights() -> None:
    """Half of them are zero, and what is returned is what the values were weighted by."""
    ours, _ = pair(nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True))
    x = randn(B, 40, E)
    with torch.no_grad():
        weights = ours(x, x, x, average_attn_weights=False)[1]
        assert 0.4 < float((weights == 0).float().mean()) < 0.6
        assert not (ours.eval()(x, x, x, average_attn_weights=False)[1] == 0).any()


LAYER: dict[str, dict[str, Any]] = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "batch first": {"batch_first": True},
    "pre-norm, gelu, no bias": {"norm_first": True, "activation": "gelu", "bias": False, "batch_first": True},
    "tanh": {"activation": torch.tanh, "norm_first": True},
    "gelu module": {"activation": nn.GELU("tanh"), "batch_first": True},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", LAYER)
def test_layers(kind: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training without dropout, whose draws are not torch's"""
    if kind == "gelu module":  # torch's fast path takes every GELU for the exact one
        monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    options = {"dropout": 0.0 if training else 0.3, **LAYER[kind]}
    first = options.get("batch_first", False)
    x, memory = (randn(*((B, n, E) if first else (n, B, E)), seed=n) for n in (L, S))
    ours, theirs = (m.train(training) for m in pair(nn.TransformerEncoderLayer(E, H, 20, **options)))
    padded = torch.arange(L) >= torch.tensor([[5], [2], [4]])
    same(ours, theirs, lambda m, x: m(x), x)
    same(ours, theirs, lambda m, x: m(x, CAUSAL, is_causal=True), x)
    kept = ~padded if first else ~padded.t()  # torch's fast path may leave anything at positions that are padding
    same(ours, theirs, lambda m, x: m(x, src_key_padding_mask=padded)[kept], x)
    if kind == "gelu module":  # of which torch's decoder layers become relu when they are copied
        return
    ours, theirs = (m.train(training) for m in pair(nn.TransformerDecoderLayer(E, H, 20, **options)))
    pads = torch.arange(S) >= torch.tensor([[7], [2], [4]])
    same(ours, theirs, lambda m, x, y: m(x, y, CAUSAL, tgt_is_causal=True), x, memory)
    same(ours, theirs, lambda m, x, y: m(x, y, memory_key_padding_mask=pads, tgt_key_padding_mask=padded)[kept], x, memory)
    both: dict[str, Any] = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "tgt_key_padding_mask": padded}
    same(ours, theirs, lambda m, x, y: m(x, y, **both)[kept], x, memory)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_autocast_keeps_the_residuals(kind: Any, norm_first: bool, training: bool) -> None:
    """Products in bfloat16, their sum with what came in as torch has it: the same dtype, and an error near torch's own"""
    made = pair(kind(E, H, 20, 0.0, batch_first=True, norm_first=norm_first).train(training))
    inputs = [randn(B, L, E) * 20] * (1 if kind is nn.TransformerEncoderLayer else 2)
    truth = copy.deepcopy(made[1]).double()(*(t.double() for t in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (m(*inputs) for m in made)
    assert ours.dtype == theirs.dtype
    error, allowed = (float((y.double() - truth).abs().max()) for y in (ours, theirs))
    assert error <= 2 * allowed


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
def test_a_whole_transformer(norm_first: bool, calls: list[Any]) -> None:
    model = nn.Transformer(E, H, 2, 2, 20, 0.0, batch_first=True, norm_first=norm_first)
    ours, theirs = pair(model)
    assert {type(m).__module__.split(".")[0] for m in ours.modules()} == {"fastnn", "torch"}  # out_proj, lists
    x, y = randn(B, S, E), randn(B, L, E, seed=1)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    same(ours, theirs, lambda m, x, y: m(x, y, tgt_mask=causal), x, y)
    same(ours, theirs, lambda m, x, y: m(x, y, tgt_mask=causal, tgt_is_causal=True), x, y)
    pads = torch.arange(S) >= torch.tensor([[7], [2], [4]])
    for training in (True, False):  # in eval, torch's encoder computes a nested tensor
        with torch.no_grad():
            encoded = [m.train(training).encoder(x, src_key_padding_mask=pads)[~pads] for m in (ours, theirs)]
        torch.testing.assert_close(*encoded)
    calls.clear()
    ours.encoder(x)
    assert [c.op for c in calls].count("add_layer_norm") == (2 if norm_first else 4)
    assert {c.backend for c in calls} == {"cpu"}
    assert fastnn.restore(ours) is ours
    assert {type(m).__module__.split(".")[0] for m in ours.modules()} == {"torch"}
    torch.testing.assert_close(ours(x, y), theirs(x, y))


def test_a_part_that_was_changed_is_called() -> None:
    ours, theirs = pair(nn.TransformerEncoderLayer(E, H, 20, 0.0, batch_first=True, norm_first=True))
    for module in (ours, theirs):
        module.norm2.register_forward_hook(lambda m, args, out: out * 2)
        module.linear1.forward = lambda x, m=module: torch.sin(nn.functional.linear(x, m.linear1.weight, m.linear1.bias))
        module.linear2 = nn.Sequential(nn.Linear(20, E), nn.Tanh())
    theirs.linear2.load_state_dict(ours.linear2.state_dict())
    same(ours, theirs, lambda m, x: m(x), randn(B, L, E))


def test_made_by_themselves_they_are_torchs_but_for_the_class() -> None:
    for name, arguments in (("MultiheadAttention", (E, H)), ("TransformerEncoderLayer", (E, H, 20)),
                            ("TransformerDecoderLayer", (E, H, 20)), ("Transformer", (E, H, 1, 1, 20))):  # fmt: skip
        made = []
        for space in (fastnn.nn, nn):
            torch.manual_seed(3)
            made.append(getattr(space, name)(*arguments, batch_first=True))
        ours, theirs = made
        assert repr(ours) == repr(theirs)
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
        assert all(type(m).__module__.startswith("fastnn") for m in ours.modules() if type(m) in (
            fastnn.nn.MultiheadAttention, fastnn.nn.LayerNorm, fastnn.nn.Linear) or isinstance(m, nn.LayerNorm))  # fmt: skip
    layer = fastnn.nn.TransformerDecoderLayer(E, H, 20, batch_first=True)
    decoder = fastnn.nn.TransformerDecoder(layer, 2).eval()
    assert decoder(randn(B, L, E), randn(B, S, E)).shape == (B, L, E)
    with torch.no_grad():
        encoder = fastnn.nn.TransformerEncoder(fastnn.nn.TransformerEncoderLayer(E, H, 20, batch_first=True), 2).eval()
        mask = nn.Transformer.generate_square_subsequent_mask(L)
        torch.testing.assert_close(encoder(randn(B, L, E), mask), encoder(randn(B, L, E), mask, is_causal=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors_are_torchs() -> None:
    ours, theirs = pair(nn.TransformerEncoderLayer(E, H, 20, batch_first=True).eval())
    with torch.no_grad():
        x = torch.nested.nested_tensor([randn(3, E), randn(5, E)])
        torch.testing.assert_close(ours(x).to_padded_tensor(0), theirs(x).to_padded_tensor(0))


def test_use_serves_a_model_that_was_not_replaced(calls: list[Any]) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 20, 0.0, norm_first=True)
    x = randn(L, B, E)
    expected = layer(x)
    with fastnn.use():
        torch.testing.assert_close(layer(x), expected)
    assert {"linear", "layer_norm"} <= {c.op for c in calls}


def test_compiled() -> None:
    ours, theirs = pair(nn.TransformerEncoderLayer(E, H, 20, 0.0, batch_first=True, norm_first=True))
    torch._dynamo.reset()
    step = torch.compile(ours, fullgraph=True, backend="aot_eager")
    same(step, theirs, lambda m, x: m(x), randn(B, L, E))


@pytest.mark.parametrize("name", ["SwiGLU", "GeGLU"])
def test_gated(name: str) -> None:
    layer = getattr(fastnn.nn, name)(E, 10, bias=True)
    x = randn(B, L, E)
    gate, value = nn.functional.linear(x, layer.linear1.weight, layer.linear1.bias).chunk(2, -1)
    act = nn.functional.silu if name == "SwiGLU" else nn.functional.gelu
    expected = nn.functional.linear(act(gate) * value, layer.linear2.weight, layer.linear2.bias)
    torch.testing.assert_close(layer(x), expected)


# Errors

T = torch.ones(L, B, E)
WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: m(T, T, T, attn_mask=torch.ones(L, L + 1)), r"attn_mask.*5, 5.*5, 6"),
    (lambda m: m(T, T, T, attn_mask=torch.ones(B, L, L)), r"attn_mask.*12, 5, 5.*3, 5, 5"),
    (lambda m: m(T, T, T, attn_mask=torch.ones(L)), r"attn_mask.*5, 5.*5"),
    (lambda m: m(T, T, T, attn_mask=[[0.0]]), "attn_mask.*Tensor.*list"),
    (lambda m: m(T, T, T, is_causal=True, need_weights=False), "attn_mask"),
    (lambda m: m(T[..., :8], T, T), "12"),
    (lambda m: m(T, T, T[:4]), r"5, 3, 12.*4, 3, 12"),
    (lambda m: m(T, T[0], T[0]), "3"),
    (lambda m: m(T, T, T, key_padding_mask=torch.ones(B, L, dtype=torch.int64)), "key_padding_mask.*int64"),
    (lambda m: m(T, T, T, key_padding_mask=torch.ones(L, B).bool()), r"key_padding_mask.*3, 5.*5, 3"),
    (lambda m: m(T, T, T, key_padding_mask=torch.ones(B, L, 1).bool()), r"key_padding_mask.*3, 5.*3, 5, 1"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_bad_input(number: int) -> None:
    call, message = WRONG[number]
    ours, theirs = pair(nn.MultiheadAttention(E, H))
    with pytest.raises(Exception) as expected:  # whatever torch raises
        call(theirs)
    with pytest.raises(expected.type, match=message):
        call(ours)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer"])
def test_heads_that_do_not_divide(name: str) -> None:
    for sizes in ((10, 3), (10, 0)):
        with pytest.raises((AssertionError, ValueError)) as expected:
            getattr(nn, name)(*sizes)
        with pytest.raises(expected.type, match=rf"{sizes[0]}.*\b{sizes[1]}\b"):
            getattr(fastnn.nn, name)(*sizes)
    assert fastnn.nn.Transformer(nhead=4, num_encoder_layers=0, num_decoder_layers=0).d_model == 512


def test_static_keys_are_torchs(calls: list[Any]) -> None:
    m = nn.MultiheadAttention(E, H)
    static = randn(B * H, S, E // H)
    arguments = (T, T, T, E, H, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0, m.out_proj.weight, m.out_proj.bias)
    out = [space.multi_head_attention_forward(*arguments, static_k=static, static_v=static) for space in (f, nn.functional)]
    torch.testing.assert_close(*out)
    assert calls[0].reason == "static keys and values are torch's"
