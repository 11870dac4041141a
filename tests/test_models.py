"""Whole models in the benchmark: the same numbers before and after, and a table of layers that says who served them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastnn
import fastnn.bench.cases as cases
import fastnn.bench.limits as limits
import fastnn.bench.models as models
import fastnn.bench.run as run
from fastnn import backends
from fastnn.bench.run import Record


def _measure(name: str, *names: str, dtype: torch.dtype = torch.float32) -> dict[str, Record]:
    case = next(c for c in cases.cases("models") if c.name == name)
    providers, _ = run.available_peers(names)
    found = run.measure_case(case, dtype, 1, providers, limits.Limits(1, seconds=0.01), seconds=0.01)
    return {record.provider: record for record in found}


@pytest.mark.parametrize(
    "name",
    [
        "digits_mlp/inference/1437",
        "digits_mlp/training_step/64",
        "minilm/embeddings/1x16",
        "crepe_tiny/94",
        "crepe_tiny/fused/94",
        "resnet/replaced/8",
        "resnet/fused/8",
        "gpt/characters/16x128",
        "vit/digits/256",
        "multihead_attention/minilm/train",
        "encoder_layer/minilm/forward",
    ],
)
def test_models_keep_their_numbers(name: str) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    found = _measure(name, "fastnn", "torch")
    for record in found.values():
        assert record.correct
        assert record.median
    assert "linear: cpu" in (found["fastnn"].served_by or "") or "conv: cpu" in (found["fastnn"].served_by or "")


@pytest.mark.parametrize("name", ["digits_mlp/inference/1437", "digits_mlp/training_step/64"])
def test_a_broken_kernel_makes_the_model_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

    def broken(out: Tensor, x: Tensor, *rest: Any) -> None:
        out.fill_(0.1)

    monkeypatch.setitem(backends.tables["cpu"], "activation", (broken, None, None))
    found = _measure(name, "fastnn", "torch")
    assert found["fastnn"].correct is False
    assert found["fastnn"].median is None
    assert found["torch"].correct


def test_a_model_that_cannot_be_loaded_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"examples/nothing\.py, which only a checkout has"):
        models.example("nothing")

    def fail() -> models.Model:
        raise ImportError("there is no transformers here")

    monkeypatch.setattr(models, "loaded", {})
    monkeypatch.setitem(models._MAKERS, "minilm/embeddings/96", fail)
    for record in _measure("minilm/embeddings/96", "fastnn", "torch").values():
        assert record.missing == "there is no transformers here"
        assert record.median is record.correct is None
    found = _measure("digits_mlp/inference/1437", "torch", dtype=torch.bfloat16)
    assert found["torch"].missing == "the whole models are float32"


def test_a_network_is_compared_layer_for_layer_and_fused() -> None:
    """Else ours would be compared folded with others' unfolded only."""

    def norms(model: nn.Module) -> int:
        return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())

    replaced, fused = models.load("resnet/replaced/8"), models.load("resnet/fused/8")
    assert norms(replaced.after) == norms(replaced.before) == norms(fused.before) > 0 == norms(fused.after)


def test_operations_of_transformers_parts_are_as_many_as_torch_counts() -> None:
    for name, maker in models._MAKERS.items():
        if not name.startswith(("multihead_attention/", "encoder_layer/")):
            continue
        case, model = next(c for c in cases.cases("models") if c.name == name), maker().before.to("meta").train()
        x = torch.randn(models.ENCODERS[name.split("/")[1]][:3], device="meta", requires_grad=True) * 1
        with FlopCounterMode(display=False) as counter:
            out = model(x)
            if case.mode == "train":
                torch.autograd.grad(out, [x, *model.parameters()], torch.empty_like(out))
        assert case.flops == pytest.approx(counter.get_total_flops(), rel=0.06), name


def test_every_model_has_a_case() -> None:
    assert {case.name for case in cases.cases("models")} == set(models._MAKERS)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.activation, self.norm = nn.GELU(), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm(self.activation(self.first(x))))
        return self.second(fastnn.functional.softmax(y, -1))


def test_layers_say_who_served_them() -> None:
    net = _Net()
    model = models.Model.of(net, (torch.randn(32, 8),))
    assert [id(p) for p in model.after.parameters()] == [id(p) for p in net.parameters()]
    before, after = (models.layers(m, model.inputs, seconds=0.0) for m in (model.before, model.after))
    names = ["first", "activation", "norm", "second", models.OUTSIDE]
    assert [layer.name for layer in before] == [layer.name for layer in after] == names
    assert [layer.kind for layer in before] == ["Linear", "GELU", "LayerNorm", "Linear", ""]
    assert [layer.served_by for layer in before[:4]] == ["torch"] * 4
    served = {layer.name: layer.served_by for layer in after}
    assert served == {
        "first": "linear: cpu",
        "activation": "activation: cpu",
        "norm": "layer_norm: cpu",
        "second": "linear: cpu",
        models.OUTSIDE: "softmax: cpu",
    }
    assert all(layer.seconds > 0 for layer in after)
    for module in (*model.before.modules(), *model.after.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_fused_model_has_fewer_layers() -> None:
    """Its batch norms are gone: their rows have no time after, and the others are joined by name."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    after, _ = fastnn.fuse(net)
    fastnn.replace(after)
    x = torch.randn(2, 1, 8, 8)
    before, fused = (models.layers(model, (x,), seconds=0.0) for model in (net, after))
    rows = {row["module"]: row for row in models.joined(before, fused)}
    assert list(rows) == [layer.name for layer in before]
    assert rows["1"]["class"] == "BatchNorm2d"
    assert rows["1"]["before"] > 0
    assert rows["1"]["after"] is None
    assert rows["4"]["after"] > 0
    lines = {line[0]: line[3:] for line in models.layer_lines(list(rows.values()))}
    assert lines["1"][1:] == ("–", "–", "–")
    assert "–" not in lines["all"]


def test_like_layers_share_a_row() -> None:
    from rich.console import Console

    rows = [
        {"module": f"net.{n}.linear", "class": "Linear", "before": 0.002, "after": 0.001, "served_by": "linear: cpu"}
        for n in range(3)
    ] + [{"module": models.OUTSIDE, "class": "", "before": 0.001, "after": 0.001, "served_by": "torch"}]
    console = Console(width=160, record=True)
    models.print_layers(console, "a model", rows)
    text = console.export_text()
    assert [cell.strip() for cell in next(line for line in text.splitlines() if "net.*" in line).split("│")[1:-1]] == [
        "net.*.linear", "Linear", "3", "6", "3", "2.00", "linear: cpu",
    ]  # fmt: skip
    assert next(line for line in text.splitlines() if "│ all" in line).split("│")[4].strip() == "7"
