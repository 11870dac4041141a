"""The stopwatch: providers in rotating blocks, each block after a pause and discarded calls.

After a parallel region the threads of an OpenMP pool spin for milliseconds. Whoever is timed right after another
pool's work
shares its cores with the spinning, and has read up to ten times slower than alone: hence the pause.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

PAUSE = 0.03
DISCARD = 3
#: A sample is at least so long, so that the clock (some 50 ns) does not count: short calls are timed in batches.
SAMPLE = 20e-6

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds a call: the median, the times that one call and four calls in five beat, and the number of samples."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        ordered = sorted(samples)
        n = len(ordered)
        middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        return cls(middle, ordered[n // 5], ordered[min(n - 1, n * 4 // 5)], n)

    @property
    def spread(self) -> float:
        """(p80 − p20) / median."""
        return (self.p80 - self.p20) / self.median


def sample(call: Call, batch: int) -> float:
    """Seconds a call over a batch of them. Results are dropped as soon as they are there, as in a chain of layers."""
    begin = time.perf_counter()
    for _ in repeat(None, batch):
        call()
    return (time.perf_counter() - begin) / batch


def warm_up(call: Call, seconds: float = 0.5) -> float:
    """Call until two successive estimates agree within a tenth or the time is up; returns the last, in seconds."""
    stop = time.perf_counter() + seconds
    last = sample(call, 1)  # the first may compile
    batch = 1
    while True:
        estimate = sample(call, batch)
        if time.perf_counter() > stop or (batch * estimate > 2e-3 and abs(estimate - last) < 0.1 * last):
            return estimate
        last = estimate
        if batch * estimate < 5e-3:
            batch *= 2


def measure(calls: Mapping[str, Call], seconds: float, rounds: int = 5) -> dict[str, Times]:
    """Time every call for about so many seconds, in rotating blocks.

    Raises:
        whatever a call raises: a provider that cannot do the work must not be among them.
    """
    batches = {}
    for name, call in calls.items():
        time.sleep(PAUSE)
        batches[name] = max(1, round(SAMPLE / max(warm_up(call, min(0.5, seconds)), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call, batch = calls[name], batches[name]
            time.sleep(PAUSE)
            discarded = sample(call, 1)
            if discarded < 0.1:  # seconds: a call as long as that has outlived every spinning pool by itself
                sample(call, DISCARD - 1)
                sample(call, batch)
            stop = time.perf_counter() + seconds / rounds
            while True:
                samples[name].append(sample(call, batch))
                if time.perf_counter() > stop:
                    break
    return {name: Times.of(values) for name, values in samples.items()}


class Neighbours:
    """How much of the machine other processes used during a stretch of time (Linux; elsewhere unknown)."""

    def __init__(self) -> None:
        self._begin = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: busy on all cores, our own, wall clock."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(
            int, stat.read_text().split("\n", 1)[0].split()[1:]
        )
        own = os.times()
        return (
            (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"),
            own.user + own.system + own.children_user + own.children_system,
            time.perf_counter(),
        )

    def share(self) -> float | None:
        """The share of all cores that others used since this object was made; None where the system does not tell."""
        end = self._read()
        if self._begin is None or end is None:
            return None
        busy, own, wall = (e - b for e, b in zip(end, self._begin, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def load_average() -> float | None:
    """The one-minute load average; None where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
