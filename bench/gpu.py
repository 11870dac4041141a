"""The stopwatch and the limits of a GPU: what ``timing``, ``limits`` and ``memory`` are for a CPU.

A call is timed by CUDA events on its stream. Before each call twice the L2 cache is read, so that inputs come from memory,
as they do in a model, and the GPU sleeps for a moment, in which Python launches the call. Where one provider's call takes
less than a launch does, the calls of all of them are captured in CUDA graphs, whose replays are timed: nothing is flushed
then, and the records' method says so. Everything happens on one stream: a backward runs where its forward ran, and a capture
sees only its own stream.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .timing import DISCARD, ENOUGH, Call, Times, warm_up

#: Seconds below which the launch would be the measure, and the calls that one graph holds.
GRAPH, IN_GRAPH = 20e-6, 20
#: The product whose rate counts as the limit, and the bytes of the copy.
SIDE, COPY = 8192, 1 << 30

DEVICE = "cuda"
#: The methods of records.
EVENTS, GRAPHS = "gpu", "gpu, in CUDA graphs with inputs in L2"
#: Clock cycles for which the GPU sleeps before a sample: some 0.1 ms, in which Python launches what is timed.
SLEEP = 200_000


def require() -> None:
    """Raise ValueError if there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here (torch.cuda.is_available() is False)")


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextmanager
def session() -> Iterator[None]:
    """What holds for a whole run: one stream, float32 products and convolutions in float32, cuDNN's choice by trial."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, False, True
    side = _stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        torch.cuda.current_stream().wait_stream(side)
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


@cache
def _flusher(size: int) -> Call:
    room = torch.zeros(size // 4, device=DEVICE)
    return room.sum  # read only: what was written would have to leave the cache while the next call is timed


def flush() -> Call:
    """A call that leaves nothing of any input in the L2 cache."""
    return _flusher(2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size)


def sample(call: Call, number: int, before: Call | None = None) -> list[float]:
    """Seconds of each of so many calls, ``before`` not included."""
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(number)]
    for begin, end in pairs:
        if before is not None:
            before()
        torch.cuda._sleep(SLEEP)
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]


def _to_its_end(call: Call) -> Call:
    def whole() -> None:
        call()
        torch.cuda.synchronize()

    return whole


def graph_of(call: Call) -> Call:
    """IN_GRAPH calls as one CUDA graph; what happens once must have happened, on the session's stream.

    Raises:
        RuntimeError: something in the call cannot be captured, or it was made ready outside of the session.
    """
    if torch.cuda.current_stream() != _stream():
        raise RuntimeError("prepared on another stream")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream()):
        for _ in range(IN_GRAPH):
            call()
    return graph.replay


def _graphs(calls: Mapping[str, Call]) -> tuple[dict[str, Call], str]:
    """A graph for every call, or none and why: times by two methods could not be compared."""
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = graph_of(call)
        except RuntimeError as problem:
            reason = (str(problem) or type(problem).__name__).splitlines()[0]
            return {}, f"no CUDA graph of {name} ({reason}): launches may be part of every time"
    return graphs, ""


def measure(calls: Mapping[str, Call], seconds: float, rounds: int = 5) -> tuple[dict[str, Times], str, list[str]]:
    """As ``timing.measure``: every call for about so many seconds, in rotating blocks; the method, and what is to be said."""
    lasts: dict[str, float] = {}
    for name, call in calls.items():
        warm_up(_to_its_end(call), min(0.5, seconds))
        lasts[name] = sorted(sample(call, 9, flush()))[4]
    graphs, problem = _graphs(calls) if min(lasts.values(), default=GRAPH) < GRAPH else ({}, "")
    batch, before = (IN_GRAPH, None) if graphs else (1, flush())
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds if names else 0):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if sum(samples[name]) * batch > ENOUGH * seconds:
                continue
            call = graphs.get(name, calls[name])
            number = max(1, min(1000, round(seconds / rounds / max(lasts[name] * batch, 1e-6))))
            sample(call, DISCARD, before)
            samples[name] += [t / batch for t in sample(call, number, before)]
    times = {name: Times.of(values) for name, values in samples.items()}
    return times, GRAPHS if graphs else EVENTS, [problem] if problem else []


def extra(call: Callable[[], object]) -> int:
    """The bytes of GPU memory by which a call grows what torch has allocated at most, its result included."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Limits:
    """The limits of this GPU as torch's own libraries reach them: cuBLAS's large product, and a copy in memory."""

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self._fma: dict[torch.dtype, float] = {}
        self._factors: list[torch.Tensor] = []
        self._copy = 0.0

    def fma(self, dtype: torch.dtype) -> float:
        """Operations a second."""
        if dtype not in self._fma:
            self.refresh_fma(dtype)
        return self._fma[dtype]

    def refresh_fma(self, dtype: torch.dtype) -> float:
        """Measure again; returns this measurement."""
        if not self._factors:  # once, and on the CPU: after a capture that failed the GPU's generator refuses
            made = (torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(n)) for n in range(2))
            self._factors = [t.to(DEVICE) for t in made]
        a, b = (t.to(dtype) for t in self._factors)
        rate = 2 * SIDE**3 / min(sample(lambda: a @ b, 5))
        self._fma[dtype] = max(rate, self._fma.get(dtype, 0.0))
        return rate

    def known(self) -> dict[str, Any]:
        """The best of each limit so far, in GFLOP/s and GB/s, by the header's names."""
        fma = {str(kind).removeprefix("torch."): rate / 1e9 for kind, rate in self._fma.items()}
        return {"fma_gflops": fma, "copy_gbs_memory": self._copy / 1e9}

    def memory(self, reads: int, writes: int, again: bool = False, cold: bool = False) -> float:
        """Seconds that moving so many bytes takes at least, at the speed of a copy."""
        if again or not self._copy:
            source, out = (torch.zeros(COPY, dtype=torch.uint8, device=DEVICE) for _ in range(2))
            self._copy = max(self._copy, 2 * COPY / min(sample(lambda: out.copy_(source), 5)))
        return (reads + writes) / self._copy

    def describe(self) -> dict[str, Any]:
        """What a header says of the limits, in GFLOP/s and GB/s."""
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            self.fma(dtype)
        self.memory(0, 0)
        return self.known()


def _driver() -> str | None:
    """The version of NVIDIA's driver, where Linux tells it."""
    file = Path("/sys/module/nvidia/version")
    return file.read_text().strip() if file.exists() else None


def describe() -> dict[str, Any]:
    """The GPU and what it runs with."""
    found = torch.cuda.get_device_properties(DEVICE)
    return {
        "name": found.name,
        "memory": found.total_memory,
        "l2": found.L2_cache_size,
        "multiprocessors": found.multi_processor_count,
        "capability": f"sm_{found.major}{found.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
        "matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
    }
