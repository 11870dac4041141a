"""The stopwatch and the limits of a GPU: what ``timing``, ``limits`` and ``memory`` are for a CPU.

A call is timed by CUDA events on its stream, and before each call twice the L2 cache is overwritten, so that inputs come
from memory, as they do in a model; that also gives Python time to launch the call while the GPU is busy. Where a call takes
less than a launch does, calls are captured in a CUDA graph and its replays are timed: nothing is flushed then, and the
record says so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from .timing import DISCARD, ENOUGH, Call, Times, warm_up

#: Seconds below which the launch would be the measure, and the calls that one graph holds.
GRAPH, IN_GRAPH = 20e-6, 20
#: The product whose rate counts as the limit, and the bytes of the copy.
SIDE, COPY = 8192, 1 << 30

DEVICE = "cuda"
NOTE = "timed in a CUDA graph, inputs in L2"


def require() -> None:
    """Raise ValueError if there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here (torch.cuda.is_available() is False)")


@cache
def _flusher(size: int) -> Call:
    room = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    return room.zero_


def flush() -> Call:
    """A call that leaves nothing of any input in the L2 cache."""
    return _flusher(2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size)


def sample(call: Call, number: int, before: Call | None = None) -> list[float]:
    """Seconds of each of so many calls, ``before`` not included."""
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(number)]
    for begin, end in pairs:
        if before is not None:
            before()
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
    """IN_GRAPH calls as one CUDA graph.

    Raises:
        RuntimeError: something in the call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants everything that happens once to have happened, on another stream
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_GRAPH):
            call()
    return graph.replay


def measure(calls: Mapping[str, Call], seconds: float, rounds: int = 5) -> tuple[dict[str, Times], dict[str, str]]:
    """As ``timing.measure``: every call for about so many seconds, in rotating blocks; and for each what must be said of it."""
    ways: dict[str, tuple[Call, int, Call | None]] = {}
    notes: dict[str, str] = {}
    lasts: dict[str, float] = {}
    for name, call in calls.items():
        warm_up(_to_its_end(call), min(0.5, seconds))
        lasts[name] = sorted(sample(call, 9, flush()))[4]
        ways[name] = call, 1, flush()
        if lasts[name] < GRAPH:
            try:
                ways[name], notes[name] = (graph_of(call), IN_GRAPH, None), NOTE
            except RuntimeError as problem:
                notes[name] = f"no CUDA graph ({str(problem).splitlines()[0]}): launches are part of the time"
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds if names else 0):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call, batch, before = ways[name]
            if sum(samples[name]) > ENOUGH * seconds:
                continue
            number = max(1, min(1000, round(seconds / rounds / max(lasts[name] * batch, 1e-6))))
            sample(call, DISCARD, before)
            samples[name] += [t / batch for t in sample(call, number, before)]
    return {name: Times.of(values) for name, values in samples.items()}, notes


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
        self._copy = 0.0

    def fma(self, dtype: torch.dtype) -> float:
        """Operations a second."""
        if dtype not in self._fma:
            self.refresh_fma(dtype)
        return self._fma[dtype]

    def refresh_fma(self, dtype: torch.dtype) -> float:
        """Measure again; returns this measurement."""
        a, b = (torch.randn(SIDE, SIDE, dtype=dtype, device=DEVICE) for _ in range(2))
        rate = 2 * SIDE**3 / min(sample(lambda: a @ b, 5))
        self._fma[dtype] = max(rate, self._fma.get(dtype, 0.0))
        return rate

    def known(self) -> dict[str, float]:
        """The product's limits measured so far, in GFLOP/s by dtype."""
        return {str(kind).removeprefix("torch."): rate / 1e9 for kind, rate in self._fma.items()}

    def memory(self, reads: int, writes: int, again: bool = False) -> float:
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
        return {"fma_gflops": self.known(), "copy_gbs_memory": self._copy / 1e9}


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
    }
