"""Whole models before and after ``fastnn.replace``: what is run, and where the time goes, layer by layer."""

from __future__ import annotations

import copy
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastnn

from .cases import Inputs
from .timing import pause


@dataclass(frozen=True)
class Model:
    """A model as it comes, the same after ``fastnn.replace`` (its parameters are the first one's), and its inputs."""

    before: nn.Module
    after: nn.Module
    inputs: Inputs

    @classmethod
    def of(cls, before: nn.Module, inputs: Inputs) -> Model:
        after = copy.deepcopy(before, {id(p): p for p in before.parameters()})
        fastnn.replace(after)
        return cls(before, after, inputs)

    @classmethod
    def fused(cls, before: nn.Module, inputs: Inputs) -> Model:
        """What inference would use: ``fastnn.fuse`` before ``fastnn.replace``."""
        after, _ = fastnn.fuse(before)
        fastnn.replace(after)
        return cls(before, after, inputs)


class Training(nn.Module):
    """The classifier with its loss: what is differentiated in a step of training."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.classifier.loss(self.classifier(x), y)


def example(name: str) -> Any:
    """The module ``examples/<name>.py``.

    Raises:
        ImportError: this is no checkout, or a package that the example needs is missing.
    """
    if module := sys.modules.get(f"fastnn_example_{name}"):
        return module
    file = Path(fastnn.__file__).resolve().parents[1] / "examples" / f"{name}.py"
    spec = spec_from_file_location(f"fastnn_example_{name}", file)
    if not file.exists() or spec is None or spec.loader is None:
        raise ImportError(f"this model is examples/{name}.py, which only a checkout has")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    sys.path.append(str(file.parent))  # examples import one another
    try:
        spec.loader.exec_module(module)
    except ImportError:
        del sys.modules[spec.name]
        raise
    finally:
        sys.path.remove(str(file.parent))
    return module


def _digits() -> Model:
    digits = example("digits")
    return Model.of(digits.classifier().eval().requires_grad_(False), (digits.digits().train_x,))


def _digits_training() -> Model:
    digits = example("digits")
    data = digits.digits()
    return Model.of(Training(digits.classifier()), (data.train_x[:64], data.train_y[:64]))


def _minilm(sentences: int = 0, length: int = 0) -> Model:
    """The example's sentences, or so many, repeated or cut to so many words each."""
    model, tokens = example("embeddings").embedder()
    inputs = tuple(tokens.values())
    if sentences:
        inputs = tuple(t[:sentences].repeat(1, -(-length // t.shape[1]))[:, :length] for t in inputs)
    return Model.of(model.requires_grad_(False), inputs)


def _crepe(size: str, windows: int, fused: bool) -> Model:
    crepe = example("crepe")
    audio, _ = crepe.signals()["vibrato"]
    model, inputs = crepe.crepe(size), (crepe.frames(audio)[:windows],)
    return Model.fused(model, inputs) if fused else Model.of(model, inputs)


def _resnet(fused: bool) -> Model:
    torch.manual_seed(0)
    model, inputs = example("cnn").resnet(64).eval().requires_grad_(False), (torch.randn(8, 1, 32, 32),)
    return Model.fused(model, inputs) if fused else Model.of(model, inputs)


def _voices(parts: int) -> Model:
    voices = example("voices")
    return Model.of(voices.encoder().requires_grad_(False), (voices.utterances().flatten(0, 1)[:parts],))


def _gpt() -> Model:
    """As the example makes it: its attention, which is no layer, switched too."""
    transformer = example("transformer")
    data, alphabet = transformer.manual()
    made = transformer.both(lambda: transformer.Decoder(len(alphabet), 512, 192, 6, 4).eval().requires_grad_(False))
    before, after = (model for _, model in made)
    return Model(before, after, (data[: 16 * 128].view(16, 128),))


def _vit() -> Model:
    torch.manual_seed(0)
    return Model.of(example("transformer").Vision().eval().requires_grad_(False), (example("digits").digits().train_x[:256],))


_MAKERS: dict[str, Callable[[], Model]] = {
    "digits_mlp/inference/1437": _digits,
    "digits_mlp/training_step/64": _digits_training,
    "minilm/embeddings/96": _minilm,
    "minilm/embeddings/32x64": lambda: _minilm(32, 64),
    "minilm/embeddings/1x16": lambda: _minilm(1, 16),
    "crepe_tiny/94": lambda: _crepe("tiny", 94, fused=False),
    "crepe_full/32": lambda: _crepe("full", 32, fused=False),
    "crepe_tiny/fused/94": lambda: _crepe("tiny", 94, fused=True),
    "crepe_full/fused/32": lambda: _crepe("full", 32, fused=True),
    "resnet/replaced/8": lambda: _resnet(fused=False),
    "resnet/fused/8": lambda: _resnet(fused=True),
    "resemblyzer/voices/48": lambda: _voices(48),
    "resemblyzer/one_voice/1": lambda: _voices(1),
    "gpt/characters/16x128": _gpt,
    "vit/digits/256": _vit,
}


class SelfAttention(nn.Module):
    """MultiheadAttention of a sequence to itself, without its weights."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


def _transformers_part(kind: str, model: str, training: bool) -> Model:
    """A layer of an encoder, or its attention. Without dropout, which would be another one for everybody."""
    batch, length, size, heads = ENCODERS[model]
    torch.manual_seed(0)
    part: nn.Module = SelfAttention(size, heads)
    if kind == "encoder_layer":
        part = nn.TransformerEncoderLayer(size, heads, 4 * size, 0.0, "gelu", batch_first=True)
    return Model.of(part.train(training).requires_grad_(training), (torch.randn(batch, length, size, requires_grad=training),))


#: batch, length, size, heads
ENCODERS = {"minilm": (32, 64, 384, 12), "bert_base": (8, 128, 768, 12)}
_MAKERS |= {
    f"{kind}/{model}/{mode}": partial(_transformers_part, kind, model, mode == "train")
    for kind in ("multihead_attention", "encoder_layer")
    for model in ENCODERS
    for mode in ("forward", "train")
}


#: The models that have been loaded, by the case's name. A plain dictionary: torch.compile looks through it.
loaded: dict[str, Model] = {}


def load(name: str) -> Model:
    """The model of a case.

    Raises:
        ImportError: something that it needs is not installed.
    """
    if name not in loaded:
        loaded[name] = _MAKERS[name]()
    return loaded[name]


# Layer by layer -------------------------------------------------------------------------------------------------------

OUTSIDE = "(outside of these modules)"


@dataclass
class Layer:
    """A module without children in one call of the model: seconds (median), and who served it.

    The last one of a model, called ``OUTSIDE``, stands for what happens between the modules.
    """

    name: str
    kind: str
    seconds: float
    served_by: str


@contextmanager
def _hooked(leaves: dict[str, nn.Module], enter: Callable[[str], None], leave: Callable[[str], None]) -> Iterator[None]:
    hooks = []
    for name, leaf in leaves.items():
        hooks.append(leaf.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        hooks.append(leaf.register_forward_hook(lambda *_, name=name: leave(name), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layers(model: nn.Module, inputs: Inputs, seconds: float = 1.0, least: int = 5) -> list[Layer]:
    """Time every module without children in the forward, in the order of the first calls. The hooks cost microseconds.

    A module that is called several times counts with the sum; a shared one has its first name.
    """
    leaves = {name: m for name, m in model.named_modules() if not list(m.children())}
    calls: list[fastnn.backends.Call]
    served: dict[str, list[str]] = {}
    entered: dict[str, float] = {}

    def leave(name: str) -> None:
        served.setdefault(name, []).extend(_server(call) for call in calls)
        calls.clear()

    with torch.no_grad():
        with fastnn.trace() as calls:
            # What was called since the last module was left, and before this one, is nobody's.
            with _hooked(leaves, lambda name: leave(OUTSIDE), leave):
                model(*inputs)
            leave(OUTSIDE)
        samples: dict[str, list[float]] = {name: [] for name in served}

        def start(name: str) -> None:
            entered[name] = time.perf_counter()

        def stop(name: str) -> None:
            samples[name][-1] += time.perf_counter() - entered[name]

        pause()
        model(*inputs)
        end = time.perf_counter() + seconds
        with _hooked(leaves, start, stop):
            while len(samples[OUTSIDE]) < least or time.perf_counter() < end:
                for values in samples.values():
                    values.append(0.0)
                begin = time.perf_counter()
                model(*inputs)
                whole = time.perf_counter() - begin
                samples[OUTSIDE][-1] = whole - sum(values[-1] for values in samples.values())
    return [
        Layer(name, type(leaves[name]).__name__ if name in leaves else "", median(samples[name]), _names(served[name]))
        for name in (*(n for n in served if n != OUTSIDE), OUTSIDE)
    ]


def _server(call: fastnn.backends.Call) -> str:
    return f"{call.op}: {call.backend}" + (f" ({call.reason})" if call.reason else "")


def _names(servers: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(servers)) or "torch"


def layer_table(name: str) -> list[dict[str, Any]]:
    """A row a module: its name, class, seconds before and after replace, and who served it after."""
    model = load(name)
    return joined(layers(model.before, model.inputs), layers(model.after, model.inputs))


def joined(before: Sequence[Layer], after: Sequence[Layer]) -> list[dict[str, Any]]:
    """A row a module, by its name; None where only one of the models calls it: ``fastnn.fuse`` takes modules away."""
    sides = [{layer.name: layer for layer in found} for found in (before, after)]
    names = [name for name in dict.fromkeys([*sides[0], *sides[1]]) if name != OUTSIDE]
    rows = []
    for name in (*names, OUTSIDE):
        b, a = (side.get(name) for side in sides)
        rows.append(
            {
                "module": name,
                "class": (b or a or Layer(name, "", 0.0, "")).kind,
                "before": b and b.seconds,
                "after": a and a.seconds,
                "served_by": a.served_by if a else "–",
            }
        )
    return rows


COLUMNS = ("module", "class", "modules", "torch, ms", "replaced, ms", "times faster", "served by")


def layer_lines(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table's lines, by COLUMNS, and the total last. Modules whose names differ in numbers only (layers of a stack) and
    that are alike share a line."""
    alike: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((re.sub(r"\d+", "*", row["module"]), row["class"], row["served_by"]), []).append(row)
    lines = []
    for (module, kind, served), same in alike.items():
        before, after = (_sum(same, when) for when in ("before", "after"))
        first = same[0]["module"] if len(same) == 1 else module
        lines.append((first, kind, str(len(same)) if kind else "", *_milliseconds(before, after), served))
    total = _milliseconds(*(_sum(rows, when) for when in ("before", "after")))
    return [*lines, ("all", "", "", *total, "")]


def print_layers(console: Console, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """The table of one model."""
    table = Table(title=f"{name}: where the time of a forward goes", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    *lines, total = layer_lines(rows)
    for line in lines:
        table.add_row(*line)
    table.add_section()
    table.add_row(*total)
    console.print(table)


_NUMBERS = ("modules", "torch, ms", "replaced, ms", "times faster")


def _sum(rows: Sequence[dict[str, Any]], when: str) -> float | None:
    """None if none of them was called then."""
    values = [row[when] for row in rows if row[when] is not None]
    return sum(values) if values else None


def _milliseconds(before: float | None, after: float | None) -> tuple[str, str, str]:
    first, second = (
        "–" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"
        for seconds in (before, after)
    )
    return first, second, f"{before / after:.2f}" if before is not None and after else "–"
