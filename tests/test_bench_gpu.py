"""The GPU's stopwatch: run as a whole on a stand-in for CUDA, because what it does with events and graphs is plain Python."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastnn.bench.cases as cases
import fastnn.bench.command as command
import fastnn.bench.gpu as gpu
import fastnn.bench.peers as peers
import fastnn.bench.run as run
from fastnn.__main__ import main
from fastnn.bench.cases import Case, random, together


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds, as CUDA's."""
        return (end.at - self.at) * 1e3


replays: list["Graph"] = []


class Graph:
    """Counts its replays."""

    def replay(self) -> None:
        replays.append(self)


class Stream:
    def wait_stream(self, other: object) -> None:
        pass


streams = [Stream()]


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    streams.append(stream)
    yield
    streams.pop()


@contextmanager
def _graph(graph: Graph, stream: Stream) -> Iterator[None]:
    assert stream is streams[-1] is not streams[0], "captured where the call was not prepared"
    yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.cuda as far as the stopwatch uses it, on the CPU."""
    stand_in: dict[str, Any] = {
        "is_available": lambda: True,
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "stream": _stream,
        "graph": _graph,
        "current_stream": lambda: streams[-1],
        "_sleep": lambda cycles: None,
        "mem_get_info": lambda: (1 << 30, 1 << 30),
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 1400,
        "get_device_properties": lambda device: SimpleNamespace(
            name="Stand In", total_memory=1 << 30, L2_cache_size=1 << 16, multi_processor_count=3, major=9, minor=0
        ),
    }
    for name, value in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SIDE", 64)
    monkeypatch.setattr(gpu, "COPY", 1 << 16)
    gpu._flusher.cache_clear()
    gpu._stream.cache_clear()
    replays.clear()
    yield
    gpu._flusher.cache_clear()
    gpu._stream.cache_clear()


def _sleeps(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_long_calls_are_timed_by_events(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(gpu, "flush", lambda: lambda: flushed.append(1))
    with gpu.session():
        times, how, problems = gpu.measure({"long": _sleeps(1e-3), "longer": _sleeps(2e-3)}, 0.02, rounds=2)
    assert 1e-3 <= times["long"].median < 0.1
    assert (how, problems) == (gpu.EVENTS, [])
    assert len(flushed) >= times["long"].runs + times["longer"].runs
    assert not replays


def test_one_short_call_puts_everyone_in_graphs(cuda: None) -> None:
    """A replay of the one and events of the other could not be compared."""
    with gpu.session():
        times, how, problems = gpu.measure({"long": _sleeps(1e-3), "short": lambda: None}, 0.02, rounds=2)
    assert (how, problems) == (gpu.GRAPHS, [])
    assert len(set(replays)) == 2
    assert len(replays) >= times["short"].runs + times["long"].runs


def test_a_graph_holds_several_calls_and_a_time_is_one_calls(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []
    with gpu.session():
        gpu.graph_of(lambda: captured.append(1))
    assert len(captured) == gpu.IN_GRAPH > 1
    monkeypatch.setattr(gpu, "graph_of", lambda call: lambda: time.sleep(gpu.IN_GRAPH * 1e-3))  # a millisecond a call
    with gpu.session():
        times, how, _ = gpu.measure({"short": lambda: None}, 0.001, rounds=2)
    assert how == gpu.GRAPHS
    assert 1e-3 <= times["short"].median < 10e-3


def test_in_graphs_memory_is_no_limit(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their inputs lie in L2."""
    case = Case("matmul", "gpu/relu", together(random(64, 64, seed=1)), theirs=lambda F, x: F.relu(x), passes=((4096, 4096),))
    providers, _ = run.available_peers(["torch"])
    for shortest, limit in ((0.0, "copy"), (1.0, None)):
        monkeypatch.setattr(gpu, "GRAPH", shortest)
        with gpu.session():
            (record,) = run.measure_case(case, torch.float32, 1, providers, gpu.Limits(), 0.01)
        assert (record.limit, record.method == gpu.GRAPHS) == (limit, limit is None)


def test_the_gpus_memory_is_what_counts(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("matmul", "gpu/relu", together(random(64, 64)), theirs=lambda F, x: F.relu(x), passes=((1 << 28, 1 << 28),))
    providers, _ = run.available_peers(["fastnn", "torch"])

    def missing() -> set[tuple[str | None, bool | None]]:
        with gpu.session():
            return {(r.missing, r.correct) for r in run.measure_case(case, torch.float32, 1, providers, gpu.Limits(), 0.01)}

    assert missing() == {("the check needs 12 GiB of memory, 1 are free", None)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))

    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("tried to allocate 12 GiB")

    monkeypatch.setattr(run, "check", full)
    ((why, correct),) = missing()
    assert why is not None
    assert "needs more memory than there is: OutOfMemoryError: tried to allocate 12 GiB" in why
    assert correct is None, "red, as if our result were wrong"


def test_max_autotune_of_a_gpu_is_compiled_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str | None] = []

    def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            calls.append(mode)
            return function(*inputs)

        return call

    monkeypatch.setattr(peers, "_compiled", compiled)
    case = Case("matmul", "gpu/relu", together(random(4, 4, seed=1)), theirs=lambda F, x: F.relu(x))
    job = peers.Job.of(case, torch.float32, 1)
    work = peers.MaxAutotuneGPU().prepare(job)
    assert calls == ["max-autotune-no-cudagraphs"]
    assert torch.equal(work()[0], job.inputs[0].relu())
    assert len(calls) == 2


def test_the_flush_is_not_timed_and_only_reads(cuda: None) -> None:
    assert max(gpu.sample(lambda: None, 3, before=_sleeps(0.02))) < 0.02
    assert gpu._flusher(1 << 10).__name__ == "sum"
    assert gpu.flush().__self__.nbytes == 2 << 16  # twice the stand-in's L2


def test_launches_hide_behind_a_sleeping_gpu(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))

    def record(event: Event) -> None:
        order.append("event")
        event.at = 0.0

    monkeypatch.setattr(Event, "record", record)
    gpu.sample(lambda: order.append("call"), 1, before=lambda: order.append("flush"))
    assert order == ["flush", "sleep", "event", "call", "event"]


def test_what_cannot_be_captured_is_said(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []

    def refuse(call: object) -> Callable[[], None]:
        captured.append(1)
        if len(captured) == 1:
            return lambda: None
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu, "graph_of", refuse)
    times, how, (problem,) = gpu.measure({"short": lambda: None, "bad": _sleeps(1e-4)}, 0.01, rounds=1)
    assert times["short"].runs
    assert how == gpu.EVENTS, "and nobody has a graph then"
    assert not replays
    assert "no CUDA graph of bad (operation not permitted when stream is capturing)" in problem


def test_what_was_prepared_on_another_stream_is_not_captured(cuda: None) -> None:
    """A backward would run where its forward ran, and the capture fail."""
    _, how, (problem,) = gpu.measure({"short": lambda: None}, 0.01, rounds=1)
    assert how == gpu.EVENTS
    assert "prepared on another stream" in problem


def test_a_backward_is_prepared_and_captured_on_one_stream(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Stream] = []

    def relu(F: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(streams[-1])
        return F.relu(x)

    case = Case("matmul", "gpu/relu", together(random(8, 8, grad=True)), theirs=relu, mode="backward")
    with gpu.session():
        providers, _ = run.available_peers(["torch"])
        (record,) = run.measure_case(case, torch.float32, 1, providers, gpu.Limits(), 0.01)
    assert record.correct
    assert set(seen) == {seen[0]} != {streams[0]}
    monkeypatch.setattr(gpu, "GRAPH", 1.0)
    with gpu.session():
        (record,) = run.measure_case(case, torch.float32, 1, providers, gpu.Limits(), 0.01)
    assert record.method == gpu.GRAPHS
    assert record.remarks == []
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: pytest.fail("not asked"))
    (record,) = run.measure_case(case, torch.float32, 1, providers, gpu.Limits(), 0.01)  # outside of the session
    assert "prepared on another stream" in record.remarks[0], "and not among what is unsteady"
    assert not any("CUDA graph" in note for note in record.notes)
    assert replays


def test_the_limit_draws_no_numbers_on_the_gpu(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its generator refuses after a capture that failed, and the limit is measured after every case."""
    drawn: list[object] = []
    randn = torch.randn

    def noted(*sizes: int, **options: Any) -> torch.Tensor:
        drawn.append(options.get("device"))
        return randn(*sizes, **options)

    monkeypatch.setattr(torch, "randn", noted)
    limit = gpu.Limits()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert limit.refresh_fma(dtype) > 0
    assert drawn == [None, None]


def test_a_session_is_float32_and_leaves_the_settings(cuda: None) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32 = True
    try:
        with gpu.session():
            found = gpu.describe()
            assert {"cuda", "cudnn", "driver"} <= set(found)
            assert (found["matmul.allow_tf32"], found["cudnn.allow_tf32"], found["cudnn.benchmark"]) == (False, False, True)
        assert matmul.allow_tf32
        assert not cudnn.benchmark
    finally:
        matmul.allow_tf32 = False


def test_a_gpu_is_asked_for_bfloat16_too() -> None:
    """torch's flash attention and cuDNN's have nothing for float32."""
    kinds = {family: {d for _, d in run.select([family], pattern=model, device="cuda")}
             for family, model in (("attention", "bert_base"), ("conv", "resnet50"))}  # fmt: skip
    assert kinds["attention"] == kinds["conv"] == {torch.float32, torch.bfloat16}
    assert {d for _, d in run.select(["pool"], pattern="vgg16_deep", device="cuda")} == {torch.float32}
    assert {d for _, d in run.select(["attention"], torch.float32, quick=True, device="cuda")} == {torch.float32}
    assert {d for c, d in run.select(["matmul"], device="cuda") if "x3" in c.name} == {torch.float32}  # has dtypes of its own
    assert {d for _, d in run.select(["conv"], quick=True)} == {torch.float32}
    assert any(p.name.startswith("max-autotune") and "cuda" in p.devices for p in peers.PEERS)


@pytest.mark.parametrize("option", ["--cold", "--interleaved"])
def test_a_cpus_method_is_refused(cuda: None, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main(["bench", "matmul", "--device", "cpu", option]) == 2
    assert f"{option} is a way to time a CPU" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["forward", "train"])
def test_recurrent_weights_are_one_buffer_on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in cases.cases("rnn") if c.name.startswith("gru/usual") and c.mode == kind)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda name: name)
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *given: calls.append(given))
    small = case.on(theirs=lambda F, *given: given[0])
    peers.Job.of(small, torch.float32, 1, "meta")
    ((weights, number, inputs, mode, units, projection, layers, first, both),) = calls
    assert [tuple(t.shape) for t in weights] == [(768, 128), (768, 256), (768,), (768,)]
    assert all(t.is_meta for t in weights)
    assert (number, inputs, mode, units, projection, layers, first, both) == (4, 128, "GRU", 256, 0, 1, True, False)
    trained: list[object] = []

    def gru(x: object, hx: object, weights: object, bias: bool, layers: int, p: float, train: bool, *rest: bool) -> list[Any]:
        trained.append(train)
        return [x]

    case.theirs(SimpleNamespace(gru=gru), *case.make(torch.float32))
    assert trained == [kind == "train"], "cuDNN has a backward only of what it was told to train"


def test_a_whole_run(cuda: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = Case("matmul", "gpu/relu", together(random(64, 64, seed=1)), theirs=lambda F, x: F.relu(x), passes=((4096, 4096),))
    elsewhere = case.on(name="gpu/not here", devices=("cpu only",))
    monkeypatch.setattr(run, "cases", lambda family: [case, elsewhere])
    monkeypatch.setattr(command, "SECONDS", {"quick": 0.01, "full": 0.01})
    file = tmp_path / "gpu.json"
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "matmul", "--device", "cpu", "--providers", "fastnn", "torch", "numpy", "--json", str(file)]
    assert main([*arguments, "--save", "--html", str(tmp_path / "page.html")]) == 0
    saved = json.loads(file.read_text())
    (header,) = saved["headers"]
    assert header["machine"]["gpu"]["name"] == "Stand In"
    assert header["limits"]["copy_gbs_memory"] > 0
    assert "CUDA events" in header["method"]
    assert {r["case"] for r in saved["records"]} == {"gpu/relu"}
    by = {r["provider"]: r for r in saved["records"]}
    assert by["fastnn"]["correct"]
    assert by["fastnn"]["median"] > 0
    assert by["fastnn"]["memory"] == 400
    assert by["torch"]["method"] in (gpu.EVENTS, gpu.GRAPHS)
    assert by["torch"]["method"] == by["fastnn"]["method"]
    assert header["machine"]["gpu"]["matmul.allow_tf32"] is False
    assert {r["dtype"] for r in saved["records"]} == {"float32", "bfloat16"}
    assert (tmp_path / "bench/results/stand-in/matmul.json").exists()


def test_attention_has_a_peer_a_backend(cuda: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each alone; one that has no kernel for the case is missing, and where attention is not measured they are not listed."""
    case = next(c for c in cases.cases("attention") if c.group == "attention").on(
        name="attention/small",
        make=together(*(random(1, 2, 16, 8, seed=n) for n in range(3))),
        passes=((768, 256),),
        flops=4 * 2 * 16 * 16 * 8,
        quick=True,
    )
    other = Case("matmul", "gpu/relu", together(random(64, 64, seed=1)), theirs=lambda F, x: F.relu(x), passes=((4096, 4096),),
                 quick=True)  # fmt: skip
    monkeypatch.setattr(peers.SDPA, "devices", ("cpu",))
    monkeypatch.setattr(command, "SECONDS", {"quick": 0.01, "full": 0.01})
    file = tmp_path / "gpu.json"
    found = {}
    for family, only in (("attention", case), ("matmul", other)):
        monkeypatch.setattr(run, "cases", lambda family, only=only: [only])
        assert main(["bench", family, "--quick", "--device", "cpu", "--dtype", "float32", "--json", str(file)]) == 0
        found[family] = {r["provider"]: r for r in json.loads(file.read_text())["records"]}
    by = found["attention"]
    assert by["sdpa.flash"]["correct"]
    assert by["sdpa.math"]["correct"]
    assert by["sdpa.flash"]["error_ulp"] != by["sdpa.math"]["error_ulp"], "both took the same way"
    assert "No viable backend" in by["sdpa.cudnn"]["missing"]
    assert not any(name.startswith("sdpa") for name in found["matmul"])


def test_without_a_gpu_it_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "matmul", "--device", "cuda"]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    arguments = ["bench", "matmul", "--device", "cuda", "--case", "square/512", "--providers", "torch", "--quick"]
    assert main([*arguments, "--dtype", "float32", "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())["records"]
    assert record["correct"]
    assert 0 < record["limit_fraction"] < 1.1
