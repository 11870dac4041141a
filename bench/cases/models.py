"""Whole models before and after ``fastnn.replace``: the MLP on digits, sentences by MiniLM, pitches by CREPE, voices, a ResNet.

They are loaded when they are run: what they need (scikit-learn, transformers) is in the extra ``demo``.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fastnn._numerics import Scale, results

from ..models import ENCODERS, load, loaded
from . import Case, Inputs


def _largest(reference: Callable[..., Tensor]) -> Scale:
    """Errors are counted at a result's largest magnitude: every element is a sum over the whole model."""

    def scale(inputs: Any, grad: Tensor | None) -> tuple[Tensor, ...]:
        true = results(lambda *values: reference(None, *values), inputs, grad)
        return tuple(t.abs().max().expand_as(t) for t in true)

    return scale


def inference(name: str, **extra: Any) -> Case:
    def reference(F: Any, *inputs: Any) -> Tensor:
        return deepcopy(loaded[name].before).double()(*inputs)

    return _case(name, "forward", lambda model: model.inputs, reference, **extra)


def training(name: str, **extra: Any) -> Case:
    """Forward, loss and the gradients of all parameters, which are inputs for this purpose."""

    def reference(F: Any, *inputs: Any) -> Tensor:
        model = loaded[name]
        names = [key for key, _ in model.before.named_parameters()]
        count = len(model.inputs)
        return functional_call(model.before, dict(zip(names, inputs[count:], strict=True)), inputs[:count])

    return _case(name, "train", lambda model: (*model.inputs, *model.before.parameters()), reference, **extra)


def _case(
    name: str, mode: str, inputs: Callable[[Any], Inputs], reference: Callable[..., Tensor], **extra: Any
) -> Case:
    def make(dtype: torch.dtype) -> Inputs:
        if dtype != torch.float32:
            raise NotImplementedError("the whole models are float32")
        return inputs(load(name))

    def before(F: Any, *inputs: Any) -> Tensor:
        model = loaded[name]
        return model.before(*inputs[: len(model.inputs)])

    def after(F: Any, *inputs: Any) -> Tensor:
        model = loaded[name]
        return model.after(*inputs[: len(model.inputs)])

    return Case(
        "models",
        name,
        make,
        theirs=before,
        ours=after,
        reference=reference,
        scale=_largest(reference),
        mode=mode,
        devices=("cpu",),
        **{"goals": {"torch": 1.0}, **extra},
    )


_CREPE_FULL = {"torch": 1.4, "torch.compile": 1.15, "onnxruntime": 1.0}


def transformers_part(kind: str, model: str, mode: str) -> Case:
    """An encoder's layer, or its attention alone."""
    batch, length, size, _ = ENCODERS[model]
    times = (1, 1) if mode == "forward" else (3, 3.5)  # who keeps no scores computes them again
    products, scores = batch * length * size * size * (24 if kind == "encoder_layer" else 8), 4 * batch * length**2 * size
    make = inference if mode == "forward" else training
    return make(f"{kind}/{model}/{mode}", flops=int(times[0] * products + times[1] * scores))


CASES = [
    inference("digits_mlp/inference/1437", quick=True),
    training("digits_mlp/training_step/64"),
    inference("minilm/embeddings/96"),
    *(
        inference(f"minilm/embeddings/{shape}", goals={"torch": 1.5, "torch.compile": 1.25, "onnxruntime": 1.05})
        for shape in ("32x64", "1x16")
    ),
    inference("crepe_tiny/94"),
    inference("crepe_full/32", goals=_CREPE_FULL),
    inference("crepe_tiny/fused/94"),
    inference("crepe_full/fused/32", goals=_CREPE_FULL),
    inference("resnet/replaced/8"),
    inference("resnet/fused/8"),
    inference("resemblyzer/voices/48", goals={"best": 1.3}),
    inference("resemblyzer/one_voice/1", goals={"best": 1.3}),
    inference("gpt/characters/16x128"),
    inference("vit/digits/256"),
    *(
        transformers_part(kind, model, mode)
        for kind in ("multihead_attention", "encoder_layer")
        for model in ENCODERS
        for mode in ("forward", "train")
    ),
]
