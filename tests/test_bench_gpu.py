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


@contextmanager
def _nothing(*args: object) -> Iterator[None]:
    yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.cuda as far as the stopwatch uses it, on the CPU."""
    stand_in: dict[str, Any] = {
        "is_available": lambda: True,
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "stream": _nothing,
        "graph": _nothing,
        "current_stream": Stream,
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
    replays.clear()
    yield
    gpu._flusher.cache_clear()


def _sleeps(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_long_calls_are_timed_by_events_and_short_ones_in_graphs(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(gpu, "flush", lambda: lambda: flushed.append(1))
    times, notes = gpu.measure({"long": _sleeps(1e-3), "short": lambda: None}, 0.02, rounds=2)
    assert 1e-3 <= times["long"].median < 0.1
    assert notes == {"short": gpu.NOTE}
    assert len(flushed) >= times["long"].runs
    assert len(replays) >= times["short"].runs


def test_the_flush_is_not_timed(cuda: None) -> None:
    assert max(gpu.sample(lambda: None, 3, before=_sleeps(0.02))) < 0.02


def test_what_cannot_be_captured_is_said(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu, "graph_of", refuse)
    times, notes = gpu.measure({"short": lambda: None}, 0.01, rounds=1)
    assert times["short"].runs
    assert "not permitted when stream is capturing)" in notes["short"]


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
    assert by["torch"]["method"] == "gpu"
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
        assert main(["bench", family, "--quick", "--device", "cpu", "--json", str(file)]) == 0
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    arguments = ["bench", "matmul", "--device", "cuda", "--case", "square/512", "--providers", "torch", "--quick"]
    assert main([*arguments, "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())["records"]
    assert record["correct"]
    assert 0 < record["limit_fraction"] < 1.1
