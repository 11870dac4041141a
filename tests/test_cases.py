"""The benchmark's cases: their checks can fail, and ONNX Runtime can take part in them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastnn.bench.cases as cases
import fastnn.bench.cases.attention as attention
import fastnn.bench.cases.norm as norm
import fastnn.bench.peers as peers
import fastnn.bench.run as run
import fastnn.functional
from fastnn.bench.cases import Case
from fastnn.bench.peers import Job

#: ulp at the scale of a case that PyTorch's own float32 error may be, which is half of what is allowed: a ten-thousandth.
LOOSE = 1000.0


def _small(family: str) -> list[Case]:
    """The smallest case of each kind that can be computed in a moment."""
    by_size = sorted(cases.cases(family), key=lambda c: -sum(map(sum, c.passes)) - c.flops)
    smallest = {(c.group, c.mode): c for c in by_size if torch.float32 in c.dtypes and "cpu" in c.devices}.values()
    return [c for c in smallest if not c.judge and sum(map(sum, c.passes)) < 1 << 25 and c.flops < 1 << 31]


@pytest.mark.parametrize("family", sorted({*cases.families()} - {"models", "startup"}))
def test_the_error_rule_is_tight_for_every_case(family: str) -> None:
    """Results that cancel and are counted at themselves have millions of ulp: then the rule would allow anything."""
    for case in _small(family):
        with torch.set_grad_enabled(case.mode != "forward"):
            allowed, _ = run.check(Job.of(case, torch.float32, torch.get_num_threads()), {})
        assert allowed.worst < LOOSE, (case.name, case.mode)


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Case:
    """Attention in a window, as the case has it but short."""
    monkeypatch.setitem(attention.SHAPES, "window_8k", (1, 2, 2, 512, 512, 64))
    return attention.attention("attention_window", "window_8k", window=256)


def test_a_window_that_is_a_key_off_is_red(window: Case) -> None:
    job = Job.of(window, torch.float32, 1)
    q, k, v, mask = job.inputs
    works = {"right": mask, "a key more": attention._window_mask(512, 257), "a key less": attention._window_mask(512, 255)}

    def attended(mask: Tensor) -> peers.Work:
        return lambda: (torch.nn.functional.scaled_dot_product_attention(q, k, v, mask),)

    with torch.no_grad():
        allowed, errors = run.check(job, {name: attended(mask) for name, mask in works.items()} | {
            "ours": peers.Fastnn().prepare(job)})  # fmt: skip
    assert allowed.worst < LOOSE
    right = {name for name, found in errors.items() if found.within(allowed, torch.float32)}
    assert right == {"right", "ours"}


def test_a_long_window_is_torchs_calls_for_chunks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.SHAPES, "mistral_64k", (1, 2, 2, 512, 512, 64))
    job = Job.of(attention.sliding("mistral_64k", 100, chunk=128), torch.float32, 1)

    def attended(window: int, more: float = 0.0) -> peers.Work:
        ours = attention.sliding("mistral_64k", window, chunk=128).ours
        assert ours is not None
        return lambda: (ours(fastnn.functional, *job.inputs) * (1 + more),)

    with torch.no_grad():
        works = {"ours": attended(100), "a key less": attended(99), "a little more": attended(100, 0.001)}
        allowed, errors = run.check(job, works)
    assert [name for name, found in errors.items() if found.within(allowed, torch.float32)] == ["ours"]


def test_peers_have_the_mask_of_a_window_beforehand(window: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = window.make(torch.float32)
    monkeypatch.setattr(attention, "_window_mask", None)  # made again in a call, it would be timed as the peer's
    assert window.theirs(peers.TORCH, *inputs).shape == inputs[0].shape


def _for_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Case, int]]:
    """Small cases like those of real models, and how many inputs remain once a model's constant weights are its own."""
    monkeypatch.setitem(attention.SHAPES, "grouped", (2, 8, 2, 5, 21, 16))
    monkeypatch.setitem(attention.SHAPES, "grouped_square", (2, 8, 2, 21, 21, 16))
    yield attention.attention("decode", "grouped"), 3
    yield attention.attention("attention_causal", "grouped_square", causal=True), 3
    monkeypatch.setitem(norm.ROWS, "few", (7, 64))
    for name in ("layer_norm", "rms_norm"):
        for added in (False, True):
            yield norm.rows(name, "few", added=added), 1 + added
    monkeypatch.setitem(norm.ROWS, "more", (2100, 64))  # so large that its results are bound
    yield norm.rows("layer_norm", "more", added=True), 2
    monkeypatch.setitem(norm.SHAPES, "small", (2, 64, 5, 3))
    for kind in ("eval", "batch", "group"):
        yield norm.norm(kind, "small", False), 1


def test_onnx_runtime_takes_part_in_what_its_exporter_has_no_word_for(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnx", reason="torch's exporter needs onnx")
    make, sessions = onnxruntime.InferenceSession, []

    def keep(*arguments: Any, **options: Any) -> Any:
        sessions.append(make(*arguments, **options))
        return sessions[-1]

    monkeypatch.setattr(onnxruntime, "InferenceSession", keep)
    for case, inputs in _for_onnx_runtime(monkeypatch):
        job = Job.of(case, torch.float32, 1)
        with torch.no_grad():
            allowed, errors = run.check(job, {"onnxruntime": peers.OnnxRuntime().prepare(job)})
        assert errors["onnxruntime"].within(allowed, torch.float32), case.name
        assert len(sessions[-1].get_inputs()) == inputs, case.name


def test_the_cases_are_of_the_models_that_people_run() -> None:
    names = " ".join(case.name for family in cases.families() for case in cases.cases(family))
    models = ("bert_base", "gpt2", "llama_gqa", "vit_b", "resnet50", "mobilenetv2", "unet", "wav2vec2", "crepe", "deepspeech",
              "mnist", "minilm")  # fmt: skip
    assert [model for model in models if model not in names] == []


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_norm_of_a_sum_and_the_sum_are_two_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined into one they would be read again, which is nobody's work."""
    monkeypatch.setitem(norm.ROWS, "few", (7, 64))
    case = norm.rows(name, "few", added=True)
    inputs = case.make(torch.float32)
    works = {"fastnn": peers.Fastnn().prepare(Job.of(case, torch.float32, 1)), "torch": lambda: case.theirs(peers.TORCH, *inputs)}
    for work in works.values():
        with torch.no_grad():
            y, total = work()
        assert torch.equal(total, inputs[0] + inputs[1])
        assert y.shape == total.shape
    allowed, errors = run.check(Job.of(case, torch.float32, 1), {"fastnn": works["fastnn"]})
    assert errors["fastnn"].within(allowed, torch.float32)
    assert allowed.worst < LOOSE


def _counted(case: Case) -> int:
    """The operations of a case by torch's own count, on tensors without numbers."""
    with FakeTensorMode():
        made = [(t.shape, t.dtype, t.requires_grad) if isinstance(t, Tensor) else t for t in case.make(torch.float32)]
    inputs = [torch.empty(t[0], dtype=t[1], device="meta", requires_grad=t[2]) if isinstance(t, tuple) else t for t in made]
    with FlopCounterMode(display=False) as counter:
        out = case.theirs(peers.TORCH, *inputs)
        forward = counter.get_total_flops()
        if case.mode != "forward":
            torch.autograd.grad(out, [t for t in inputs if isinstance(t, Tensor) and t.requires_grad], torch.empty_like(out))
    return counter.get_total_flops() - forward * (case.mode == "backward")


#: Half of causal attention is masked, which torch counts.
_COUNTED = [case for family in ("matmul", "rnn", "conv", "attention") for case in cases.cases(family)
            if case.flops and not case.judge and not {"causal", "window"} & set(case.group.split("_"))]  # fmt: skip


@pytest.mark.parametrize("family", ["matmul", "rnn", "conv", "attention"])
def test_operations_are_as_many_as_torch_counts(family: str) -> None:
    """Of the smallest case of each kind, and of every convolution, which differ in more than their size."""
    by_size = sorted((c for c in _COUNTED if c.family == family), key=lambda c: -c.flops)
    kinds = {(c.group, c.mode, c.name if family == "conv" else ""): c for c in by_size}
    assert {mode for _, mode, _ in kinds} >= {"forward", "train"}
    for case in kinds.values():
        counted: float = _counted(case)
        if family == "conv" and case.group != "transposed" and case.mode != "forward" and _grouped(case):
            counted = _counted(case.on(mode="forward")) * {"backward": 2, "train": 3}[case.mode]
        if family == "attention" and case.mode == "train":
            counted *= 7 / 6  # by parts, as torch does it here, the scores are kept; who does not keep them computes them again
        assert counted == pytest.approx(case.flops, rel=0.03), (case.name, case.mode)  # no state before the first step's


def _grouped(case: Case) -> bool:
    """Whether a convolution has groups, of which torch's count of the gradients knows nothing."""
    with FakeTensorMode():
        x, weight, _ = case.make(torch.float32)
    return bool(x.shape[1] != weight.shape[1])
