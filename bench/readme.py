"""The README's table of measured ratios, made from the committed records: ``python -m fastnn.bench.readme``.

Each row says which cases of a family it is about, in groups; a cell has each group's numbers on one machine.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .cases import families
from .peers import OURS
from .report import RESULTS, SHORT, duration, geometric_mean, load, unsteady
from .run import Record, dtype_name, select

README = Path("README.md")
BEGIN, END = "<!-- speed: made by python -m fastnn.bench.readme -->", "<!-- /speed -->"
#: What the README compares: records made otherwise (cold caches, another number of threads) are not in its table.
METHOD, THREADS = "warm", 2
#: Its sessions are made for one shape and pack the weights beforehand: a column of its own.
APART = "onnxruntime"
NOTHING = "–"
MODES = "forward", "backward", "train"
#: torch's eager ratio is told beside the best peer's where it is more than so many times that.
FARTHER = 1.25
#: A share above this is of a limit that was disturbed; of FMA it is Winograd's, which multiplies less than is counted.
DISTURBED = 1.05

Key = tuple[str, str, str, str]
Cases = Sequence[Mapping[str, Record]]  # each case's records by provider
Records = Mapping[Key, Mapping[str, Record]]


@dataclass(frozen=True)
class Machine:
    """A folder of records, how the table calls it, and what a reader must know of it."""

    folder: str
    name: str
    text: str


MACHINES = (
    Machine("zen4-avx512-2cores", "Zen 4", "2 cores of an AMD EPYC with AVX-512 and AVX512-BF16, a virtual machine"),
    Machine(
        "zen3-avx2-2cores",
        "Zen 3",
        "2 cores of an AMD EPYC with AVX2, a virtual machine whose neighbours took up to 13% of it and are busy on its cores' "
        "other hyper-threads, so that its speed swings by a third: its shares of the limit say as much of them as of us",
    ),
)


def _choices(pattern: str) -> list[str]:
    """A pattern for each choice in its braces: a/{b,c} is a/b and a/c."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inside, _, after = rest.partition("}")
    return [each for choice in inside.split(",") for each in _choices(before + choice + after)]


@dataclass(frozen=True)
class Group:
    """Cases that are told together: their names (shell patterns, told in this order), mode and dtype."""

    patterns: tuple[str, ...]
    mode: str = "forward"
    dtype: str = "float32"

    @classmethod
    def of(cls, text: str) -> Group:
        """``[mode] [dtype] pattern …``: ``train bfloat16 square/{1024,2048}``."""
        words = text.split()
        mode = next((word for word in words if word in MODES), cls.mode)
        dtype = next((word for word in words if word in SHORT), cls.dtype)
        return cls(tuple(each for word in words if word not in (mode, dtype) for each in _choices(word)), mode, dtype)

    def keys(self, family: str, known: Iterable[Key]) -> list[Key]:
        """Of the known cases this group's, recorded or not, so that a cell has them in its label's order."""
        mine = sorted(k for k in known if (k[0], *k[2:]) == (family, self.mode, self.dtype))
        return list(dict.fromkeys(key for pattern in self.patterns for key in mine if fnmatchcase(key[1], pattern)))


@dataclass(frozen=True)
class Row:
    """A line of the table. ``seconds``: what counts is the time itself, and nobody else's is beside it."""

    label: str
    family: str
    groups: tuple[Group, ...]
    seconds: bool = False


def row(family: str, label: str, *groups: str, seconds: bool = False) -> Row:
    return Row(label, family, tuple(map(Group.of, groups)), seconds)


# The rows -------------------------------------------------------------------------------------------------------------
# In the names of cases "[!c]/" and "*[0-9]" leave out what ends in _nhwc and in channels_last.

_POINTWISE = "{relu,leaky_relu,relu6,elu,gelu,gelu_tanh,silu,mish,sigmoid,tanh,hardswish,hardsigmoid,hardtanh,softplus}"
_OF_MODELS = "{gelu_tanh/gpt2_up,gelu/vit_b_up,silu/llama_gate,relu6/mobilenet_v2,relu/mnist_hidden}/*"
_MAXIMA, _MEANS = "max_pool/{vgg16,vgg16_deep,inception,yolo_spp,r3d,crepe}", "avg_pool/{densenet,inception,adaptive_vgg16}"

ROWS = (
    row("matmul", "square products 512–4096, nothing packed beforehand", "square/*"),
    row("matmul", "bfloat16 products 1024, 2048", "bfloat16 square/{1024,2048}"),
    row("matmul", "linear + bias + GELU, the layers of BERT-base and (4096, 4096): M = 8 · 32, 128, 512",
        "linear_gelu/*/8", "linear_gelu/*/{32,128,512}"),
    row("matmul", "linear + bias: the same layers, M = 32, 128 · Llama's keys (32), GPT-2's attention (1024), "
        "ViT-B's with GELU (3152) · MNIST's two (64)",
        "linear/{bert_attention,bert_up,bert_down,llama_projection}/*",
        "linear/{llama_kv/32,gpt2_qkv/1024} mlp/vit_b_up/3152", "linear/{mnist_hidden,mnist_output}/64"),
    row("matmul", "linear forward and backward: BERT-base's layers, batch 128, 512 · a hidden layer for MNIST, batch 64 · "
        "backward alone: (768, 3072), batch 128",
        "train linear_train/bert_*", "train linear_train/mnist_hidden/64", "backward linear_backward/*"),
    row("matmul", "bmm of attention sizes", "bmm/*"),
    row("matmul", "matrix–vector 4096² · linear at M = 1: (4096, 4096), (768, 3072), (768, 50257)",
        "mv/square/*", "mv/linear_{llama_projection,gpt2_up,gpt2_vocabulary}/*"),
    row("matmul", "products of 128, 96 · 64, 48 · 32, 16, 8 · an 8×8 linear, one call",
        "small/{128,96}", "small/{64,48}", "small/{32,16,8}", "call/linear/8x8"),
    row("softmax", "softmax, 4096×768: forward · backward · along columns · five other shapes of real models: forward · backward",
        "softmax/bert_base/*", "backward softmax/bert_base/*", "softmax/bert_base_dim0/*", "softmax/{*_scores,gpt2_vocabulary}/*",
        "backward softmax/{*_scores,gpt2_vocabulary}/*"),
    row("softmax", "log_softmax, 4096×768, 512×50257: forward · backward", "log_softmax/*", "backward log_softmax/*"),
    row("softmax", "cross_entropy (512, 30522): forward · both",
        "cross_entropy/bert_vocabulary/*", "train cross_entropy/bert_vocabulary/*"),
    row("softmax", "cross_entropy (4096, 50257): forward · backward · both",
        "cross_entropy/gpt2/*", "backward cross_entropy/gpt2/*", "train cross_entropy/gpt2/*"),
    row("softmax", "cross_entropy (256, 1000), (64, 10): forward · both",
        "cross_entropy/{resnet50,mnist}/*", "train cross_entropy/{resnet50,mnist}/*"),
    row("softmax", "linear_cross_entropy, 1024 words of GPT-2, 50257 classes: forward · both",
        "linear_cross_entropy/*", "train linear_cross_entropy/*"),
    row("activation", "gelu, silu, tanh, 4096×768 · fourteen activations · the same, 4096×3072",
        "{gelu,silu,tanh}/bert_base/*", f"{_POINTWISE}/bert_base/*", f"{_POINTWISE}/bert_base_up/*"),
    row("activation", "their gradients: gelu, 4096×768 · the fourteen · the same, 4096×3072",
        "backward gelu/bert_base/*", f"backward {_POINTWISE}/bert_base/*", f"backward {_POINTWISE}/bert_base_up/*"),
    row("activation", "dropout · prelu, glu, 4096×768 · their gradients · gelu, silu, relu6, relu of five models · theirs",
        "dropout/*", "{prelu,glu}/*", "backward {prelu,glu}/*", _OF_MODELS, f"backward {_OF_MODELS}"),
    row("rnn", "LSTM T50 B32 I128 H256: forward · training step", "lstm/usual/*", "train lstm/usual/*"),
    row("rnn", "GRU, the same", "gru/usual/*", "train gru/usual/*"),
    row("rnn", "RNN tanh, the same", "rnn_tanh/usual/*", "train rnn_tanh/usual/*"),
    row("rnn", "LSTM T100 B1 I256 H512", "lstm/one_sequence/*"),
    row("rnn", "two layers in both directions, T40 B16 H256: LSTM forward · training · GRU forward",
        "lstm/seq2seq_encoder/*", "train lstm/seq2seq_encoder/*", "gru/seq2seq_encoder/*"),
    row("rnn", "LSTM: DeepSpeech's size, a language model's 2×650: forward · the second in training",
        "lstm/{deepspeech,language_model}/*", "train lstm/language_model/*"),
    row("models", "Resemblyzer, the whole model: 48 pieces of a voice at once, one", "resemblyzer/{voices,one_voice}/*"),
    row("rnn", "LSTM, Resemblyzer's size (3 layers), 4 sequences, one · packed lengths 5–100, batch 32",
        "lstm/{resemblyzer,resemblyzer_one}/*", "lstm/packed_5_to_100/*"),
    row("rnn", "tiny, T50: LSTM H32 B8, GRU H64 B8, two GRU layers H64 B1", "lstm/tiny/* gru/tiny/{1x1,2x1}*"),
    row("rnn", "LSTM H128, six lengths in turn, batch 8 · one step of a stream, H512",
        "lstm/changing_lengths/*", "lstm/streaming/*"),
    row("rnn", "QRNN T105 B20 H640 against a product and a loop: forward · training step", "qrnn/*", "train qrnn/*"),
    row("rnn", "cells (functions), batch 1: LSTM, GRU, RNN of 64 · of 256",
        "{lstm,gru,rnn_tanh}_cell/step/B1_H64", "{lstm,gru,rnn_tanh}_cell/step/B1_H256"),
    row("pool", "max_pool2d 3×3 stride 2, ResNet-50 batch 8, NCHW · NHWC: forward; forward and backward; backward",
        *(f"{mode} max_pool/{name}/*" for mode in ("forward", "train", "backward") for name in ("resnet50", "resnet50_nhwc"))),
    row("pool", "max_pool of six other layers, NCHW · NHWC: forward; forward and backward; backward",
        *(f"{mode} {_MAXIMA}{form}/*" for mode in ("forward", "train", "backward") for form in ("", "_nhwc"))),
    row("pool", "adaptive_avg_pool2d to 1×1, ResNet-50 batch 8, NCHW · NHWC: forward; forward and backward",
        *(f"{mode} avg_pool/global_resnet50{form}/*" for mode in ("forward", "train") for form in ("", "_nhwc"))),
    row("pool", "avg_pool of DenseNet, Inception, VGG-16, NCHW · NHWC: forward; forward and backward",
        *(f"{mode} {_MEANS}{form}/*" for mode in ("forward", "train") for form in ("", "_nhwc"))),
    row("pool", "SegNet's max_pool2d with indices and max_unpool2d in turn, NCHW · NHWC: forward; forward and backward; backward",
        *(f"{mode} max_pool/segnet{form}/*" for mode in ("forward", "train", "backward") for form in ("", "_nhwc"))),
    row("pool", "I3D's avg_pool3d, NCHW · NHWC: forward; forward and backward",
        *(f"{mode} avg_pool/i3d{form}/*" for mode in ("forward", "train") for form in ("", "_nhwc"))),
    row("norm", "batch_norm with known moments, five images of CNNs, (4096, 512): NCHW · NHWC",
        "batch_norm_eval/*[!c]/*", "batch_norm_eval/*_nhwc/*"),
    row("norm", "the same, training, forward: NCHW · NHWC", "batch_norm/*[!c]/*", "batch_norm/*_nhwc/*"),
    row("norm", "the same, training, forward and backward: NCHW · NHWC", "train batch_norm/*[!c]/*", "train batch_norm/*_nhwc/*"),
    row("norm", "group_norm, the same images: NCHW · NHWC · (4096, 512) in 32 groups",
        "group_norm/{resnet50*[!c],pointnet}/*", "group_norm/*_nhwc/*", "group_norm/mlp/*"),
    row("norm", "the same, forward and backward: NCHW · NHWC · (4096, 512)",
        "train group_norm/{resnet50*[!c],pointnet}/*", "train group_norm/*_nhwc/*", "train group_norm/mlp/*"),
    row("norm", "instance_norm (4, 128, 64, 64), NCHW · NHWC: forward; forward and backward",
        *(f"{mode} instance_norm/style_128{form}/*" for mode in ("forward", "train") for form in ("", "_nhwc"))),
    row("norm", "layer_norm (4096, 768): forward · forward and backward · forward in bfloat16",
        "layer_norm/bert_base/*", "train layer_norm/bert_base/*", "bfloat16 layer_norm/bert_base/*"),
    row("norm", "layer_norm (1024, 768), (2048, 384), (512, 4096), (128, 768): forward · forward and backward",
        "layer_norm/{gpt2,minilm,llama,bert_base_one}/*", "train layer_norm/{gpt2,minilm,llama,bert_base_one}/*"),
    row("norm", "rms_norm (4096, 768), (512, 4096): forward · forward and backward",
        "rms_norm/{bert_base,llama}/*", "train rms_norm/{bert_base,llama}/*"),
    row("norm", "with a residual in the same pass, (4096, 768): layer_norm, rms_norm", "add_{layer,rms}_norm/*"),
    row("embedding", "embedding, 2048 of 30522 × 384 · 4096 of 30522 × 768, of 1000 × 64 · forward and backward, the three",
        "embedding/minilm/*", "embedding/{bert_base,characters}/*", "train embedding/{minilm,bert_base,characters}/*"),
    row("attention", "attention, 12 heads of 64: 512 × 512 · causal · 8 × 128 × 128 · the same, padded",
        "attention/bert_base/*", "attention_causal/bert_base/*", "attention/bert_base_b8/*", "attention_padded/*"),
    row("attention", "causal (shares of the kept half): GPT-2's 1024, 2048 · Llama's 512, 32 heads of 128 on 8 · 4096, 16384",
        "attention_causal/{gpt2,gpt2_2k}/*", "attention_causal/llama_gqa/*", "attention_causal/{long_4k,long_16k}/*"),
    row("attention", "4096 × 4096, 8 heads of 64 · ViT-B batch 8 · Whisper's cross attention · T5's bias, batch 4",
        "attention/long_4k/*", "attention/vit_b/*", "attention/whisper_cross/*", "attention_bias/*"),
    row("attention", "a window of 256 keys at 8192, against a dense mask (the areas: 32×; the share is of the kept part)",
        "attention_window/*"),
    row("attention", "training: 512 × 512 · GPT-2's 1024, causal · a learned bias: 12 heads, batch 4 · (512, 512) · dropout 0.1",
        "train attention_train/bert_base/*", "train attention_train/gpt2/*", "train attention_bias_train/t5_base/*",
        "train attention_bias_train/bert_base/*", "attention_dropout_train/*"),
    row("attention", "bfloat16: 512 × 512 · causal · 8 × 128 × 128 · training · one query, 4096 keys",
        "bfloat16 attention/bert_base/*", "bfloat16 attention_causal/bert_base/*", "bfloat16 attention/bert_base_b8/*",
        "train bfloat16 attention_train/*", "bfloat16 decode/*"),
    row("attention", "one query, 32 heads of 128 on 8: 128, 1024 keys · 4096, 8192",
        "decode/decode_{128,1024}/*", "decode/decode_{4096,8192}/*"),
    row("models", "whole models after `replace`: MiniLM, 96 sentences, 32 × 64, 1 × 16 tokens · CREPE full, tiny · "
        "the same fused · an MLP on digits, a ResNet fused and only replaced · a GPT, a vision transformer · "
        "a step of the MLP's training",
        "minilm/embeddings/{96,32x64,1x16}", "crepe_{full,tiny}/[0-9]*", "crepe_{full,tiny}/fused/*", "digits_mlp/* resnet/*",
        "{gpt,vit}/*", "train digits_mlp/*"),
    row("models", "MultiheadAttention to itself, MiniLM's 32 × 64, BERT-base's 8 × 128: evaluation · training · "
        "TransformerEncoderLayer, the same: evaluation · training",
        *(f"{mode} {kind}/{{minilm,bert_base}}/*" for kind in ("multihead_attention", "encoder_layer")
          for mode in ("forward", "train"))),
    row("conv", "3×3, stride 1 (Winograd; shares as the plain sum counts): ResNet-50, batch 1, 8 · channels last, batch 1 · "
        "VGG-16, batch 1",
        "3x3/resnet50_*[0-9]", "3x3/*/channels_last", "3x3/vgg16_*"),
    row("conv", "ResNet-50's 1×1, batch 1, 8 · of stride 2", "1x1/resnet50_*[0-9]", "1x1_stride/*"),
    row("conv", "1×1, batch 1: four of ResNet-50's, channels last · MobileNetV2's 24 to 144 channels, 144 to 24, 320 to 1280",
        "1x1/*/channels_last", "1x1/mobilenetv2_{24,144,320}_*"),
    row("conv", "7×7 stem of ResNet-50, batch 1, 8 · channels last, batch 1", "stem/*/{1x,8x}*[0-9]", "stem/*/channels_last"),
    row("conv", "ResNet-50's 3×3 of stride 2, batch 1, 8 · channels last, batch 1",
        "3x3_stride/*[0-9]", "3x3_stride/*/channels_last"),
    row("conv", "dilated 3×3 of DeepLab, dilation 2 (Winograd), 6, 12", "dilated/deeplab_{2,6,12}/*"),
    row("conv", "grouped 3×3 of ResNeXt-50, 32 groups of 4, 8 channels · 16, 32 · channels last (below 32 torch's, by rule)",
        "grouped/resnext50_{128,256}/*[0-9]", "grouped/resnext50_{512,1024}/*[0-9]", "grouped/*/channels_last"),
    row("conv", "depthwise 3×3, 5×5, 7×7 of MobileNetV2, EfficientNet, ConvNeXt · channels last",
        "depthwise/*[0-9]", "depthwise/*/channels_last"),
    row("conv", "conv1d: wav2vec 2's first three layers · CREPE's first, second, a later one",
        "conv1d/wav2vec2_{1_10,512_3,512_2}/*", "conv1d/crepe_{1_1024,1024_128,128_128}/*"),
    row("conv", "conv3d of R3D-18: 64, 128, 256 channels · channels last · stem",
        "conv3d/r3d18_{64,128,256}/*[0-9]", "conv3d/r3d18_{64,128,256}/*/channels_last", "conv3d/r3d18_stem/*"),
    row("conv", "transposed: U-Net's 1024, 128 channels · DCGAN's 512, 256, 64",
        "transposed/unet_{1024,128}/*", "transposed/dcgan_{512,256,64}/*"),
    row("conv", "conv1d whose length is another one at every call (beside torch alone): 512, 128 channels · 192, 32",
        "changing/{wav2vec2_512,crepe_128}", "changing/{vits_192,hifigan_32}"),
    row("conv", "gradients of input, weight and bias: 3×3, channels last · 1×1, channels last · stride 2 · stem · dilated · "
        "grouped · conv1d · conv3d · transposed",
        *(f"backward gradients/resnet50_{layer}/{{*[0-9],*last}}" for layer in ("3x3_64", "1x1_256")),
        *(f"backward gradients/{layer}/*" for layer in ("resnet50_3x3_128s2", "resnet50_stem", "deeplab_2", "resnext50_256",
                                                        "wav2vec2_512", "r3d18_64", "unet_128"))),
    row("conv", "gradients of depthwise ones: MobileNetV2's 144, 96 stride 2, 960 · channels last · 5×5, channels last · "
        "7×7, channels last",
        *(f"backward gradients/mobilenetv2_{{144,96s2,960}}/{form}" for form in ("*[0-9]", "*last")),
        *(f"backward gradients/{layer}/{{*[0-9],*last}}" for layer in ("efficientnet_672", "convnext_192"))),
    row("conv", "forward and backward in one: ResNet-50's 3×3, 64 channels, 256, batch 8 · its 1×1, 3×3 of stride 2 · "
        "depthwise · conv1d · conv3d · transposed",
        "train train/resnet50_{3x3_64,3x3_256}/*", "train train/resnet50_{1x1_256,3x3_128s2}/*",
        *(f"train train/{layer}/*" for layer in ("mobilenetv2_144", "crepe_128", "r3d18_64", "dcgan_256"))),
    row("startup", "`import fastnn` after torch · first linear, cold · warm cache",
        "import/*", "first_linear/cold", "first_linear/warm", seconds=True),
)  # fmt: skip


# Numbers in words -----------------------------------------------------------------------------------------------------


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _told(values: Sequence[float | str], number: Callable[[float], str], unit: str, mean: bool) -> str:
    """Up to three one by one, more as a range; a string says why a number is not there."""
    there = [v for v in values if not isinstance(v, str)]
    if not there:
        return next((str(v) for v in values if v != NOTHING), NOTHING)
    if len(values) <= 3:
        return ", ".join(v if isinstance(v, str) else number(v) + unit for v in values)
    low, high = number(min(there)), number(max(there))
    text = f"{low}–{high}{unit}" if low != high else low + unit
    if mean and low != high:
        text += f", geometric mean {number(geometric_mean(there))}{unit}"
    return text if len(there) == len(values) else f"{text} ({len(there)} of {len(values)})"


def _ratio(case: Mapping[str, Record], peers: Callable[[str], bool]) -> float | str:
    """The fastest of these peers' median over ours, of the same run; or why there is none."""
    ours = case.get(OURS)
    if ours is None or ours.median is None:
        return "red" if ours and ours.correct is False else NOTHING
    beside = [r for name, r in case.items() if name != OURS and peers(name)]
    times = [r.median for r in beside if r.median]
    if times:
        return min(times) / ours.median
    return "wrong" if any(r.correct is False for r in beside) else NOTHING


def _ratios(cases: Cases, peers: Callable[[str], bool]) -> str:
    return _told([_ratio(case, peers) for case in cases], _times, "×", mean=True)


def _over_best(cases: Cases) -> str:
    """Over the best peer but ONNX Runtime; and over torch's eager call, where that is far from it."""

    def torch(name: str) -> bool:
        return name == "torch"

    def best(name: str) -> bool:
        return name != APART

    text = _ratios(cases, best)
    pairs = [
        (a, b) for case in cases if isinstance(a := _ratio(case, torch), float) and isinstance(b := _ratio(case, best), float)
    ]
    if pairs and geometric_mean([a / b for a, b in pairs]) > FARTHER:
        text += f" (torch {_ratios(cases, torch)})"
    return text


def _over_onnxruntime(cases: Cases) -> str:
    return _ratios(cases, lambda name: name == APART)


def _seconds(cases: Cases) -> str:
    return ", ".join(duration(case[OURS].median) if OURS in case else NOTHING for case in cases)


def _joined(groups: Sequence[str]) -> str:
    return NOTHING if all(text == NOTHING for text in groups) else " · ".join(groups)


def _share(case: Mapping[str, Record]) -> tuple[str, float] | None:
    """What limits ours, and how near to that it comes; None where that was not measured, or was disturbed."""
    r = case.get(OURS)
    if r is None or r.limit is None or r.limit_fraction is None or (r.limit != "fma" and r.limit_fraction > DISTURBED):
        return None
    return "FMA" if r.limit == "fma" else r.limit, r.limit_fraction


def _shares(cases: Cases) -> dict[str, str]:
    """Of each limit, how near to it those come that it limits."""
    found = [_share(case) for case in cases]
    limits = dict.fromkeys(share[0] for share in found if share)
    few = len(cases) <= 3 and len(limits) == 1  # these keep their places
    return {
        limit: _told([s[1] if s else NOTHING for s in found if few or (s and s[0] == limit)], _percent, "%", mean=False)
        for limit in limits
    }


def _of_limits(groups: Sequence[Cases]) -> str:
    """The groups' shares; a limit is named after the last of the groups in a row that have no other."""
    texts: list[str] = []
    following: set[str] = set()
    for shares in map(_shares, reversed(groups)):
        told = ", ".join(shares.values()) if len(shares) == 1 and set(shares) == following else None
        texts.append(told or ", ".join(f"{text} of {limit}" for limit, text in shares.items()) or NOTHING)
        following = set(shares) or following
    return _joined(texts[::-1])


# The table ------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[Key, dict[str, Record]]:
    """A machine's records by family, case, mode and dtype, then by provider.

    Raises:
        ValueError: a file that is no benchmark's result.
    """
    found: dict[Key, dict[str, Record]] = {}
    for file in sorted(folder.glob("*.json")):
        for r in load(file)[1]:
            if (r.method, r.threads) == (METHOD, THREADS):
                found.setdefault((r.family, r.case, r.mode, r.dtype), {})[r.provider] = r
    return found


def line(row: Row, known: Iterable[Key], machines: Sequence[Records]) -> str | None:
    """A row of the table, three cells a machine; None where no machine has recorded any of it. ``known``: all cases there are."""
    groups = [group.keys(row.family, known) for group in row.groups]
    if not any(key in records for records in machines for keys in groups for key in keys):
        return None
    cells = [row.label]
    for records in machines:
        cases = [[records.get(key, {}) for key in keys] for keys in groups]
        if row.seconds:
            cells += [_joined([_seconds(group) for group in cases]), NOTHING, NOTHING]
        else:
            cells += [_joined([tell(group) for group in cases]) for tell in (_over_best, _over_onnxruntime)]
            cells.append(_of_limits(cases))
    return f"| {' | '.join(cells)} |"


def speed(results: Path) -> str:
    """The machines and the table, as Markdown."""
    machines = [read(results / machine.folder) for machine in MACHINES]
    lines = []
    for machine, records in zip(MACHINES, machines, strict=True):
        doubtful, cases = unsteady([r for case in records.values() for r in case.values()])
        lines.append(
            f"- **{machine.name}**: {machine.text} ([records](bench/results/{machine.folder}); "
            f"{doubtful} of {cases} cases were marked unsteady)."
        )
    columns = "over the best of torch, torch.compile, NumPy", "over ONNX Runtime", "share of the limit"
    heads = [f"{machine.name}: {columns[0]}" if n == 0 else columns[n] for machine in MACHINES for n in range(3)]
    lines += ["", f"| {' | '.join(['work (float32 unless said)', *heads])} |", "|---" * (1 + len(heads)) + "|"]
    known = {(case.family, case.name, case.mode, dtype_name(dtype)) for case, dtype in select(families())}
    lines += [text for row in ROWS if (text := line(row, known, machines))]
    return "\n".join(lines)


def renewed(readme: str, results: Path) -> str:
    """The README with the table as the records make it.

    Raises:
        ValueError: it has not one place for the table.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(f"the README must have {BEGIN} and, after it, {END}, once each")
    return f"{before}{BEGIN}\n\n{speed(results)}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table into the README of the working directory; with ``--check``, say whether it is there."""
    parser = ArgumentParser(
        prog="python -m fastnn.bench.readme", description="Makes the README's table from the committed records."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the README says something else")
    check = parser.parse_args(arguments).check
    old = README.read_text(encoding="utf-8")
    new = renewed(old, RESULTS)
    if check:
        if new != old:
            print("README.md is not what the records make: python -m fastnn.bench.readme", file=sys.stderr)
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
