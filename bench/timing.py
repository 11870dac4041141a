"""The stopwatch: providers in rotating blocks, each block after a pause and discarded calls.

After a parallel region the threads of a pool go on spinning: libgomp's for about 5 ms, ONNX Runtime's for 40, OpenBLAS's
for 110. Whoever is timed right after another pool's work shares its cores with the spinning, and has read up to ten
times slower than alone: hence the pause, which ends when this process is quiet.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch

PAUSE = 0.03
#: A pause that is not quiet by then has met threads that never rest; they are everyone's neighbours.
LONGEST_PAUSE = 0.5
DISCARD = 3
#: A peer without a kernel for the case can be a hundred times slower; that is known well enough after so many times the time.
ENOUGH = 4
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
    #: The median of what was called between the samples.
    between: float | None = None

    @classmethod
    def of(cls, samples: list[float], between: list[float] | None = None) -> Times:
        ordered = sorted(samples)
        n = len(ordered)
        middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        others = cls.of(between).median if between else None
        return cls(middle, ordered[n // 5], ordered[min(n - 1, n * 4 // 5)], n, others)

    @property
    def spread(self) -> float:
        """(p80 − p20) / median."""
        return (self.p80 - self.p20) / self.median


def pause() -> None:
    """Sleep until no thread of this process is at work any more."""
    stop = time.perf_counter() + LONGEST_PAUSE
    time.sleep(PAUSE)
    while time.perf_counter() < stop:
        busy, begin = time.process_time(), time.perf_counter()
        time.sleep(PAUSE / 6)
        if time.process_time() - busy < 0.1 * (time.perf_counter() - begin):
            return


def evict(cache: int) -> Call:
    """A call that leaves nothing in caches of ``cache`` bytes, on all threads, and no pool awake."""
    walked = torch.ones(max(2 * cache, 64 << 20) // 4 + (1 << 20))

    def walk() -> None:
        walked.sum()  # read only: what was written would have to leave the caches while the next call is timed
        time.sleep(PAUSE / 3)  # torch's own pool, the only one at work, sleeps by then

    return walk


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


def measure(
    calls: Mapping[str, Call], seconds: float, rounds: int = 5, between: Call | None = None
) -> dict[str, Times]:
    """Time every call for about so many seconds, in rotating blocks. One that has taken ENOUGH times as long sits out the rest.

    With ``between``, each sample is one call, and ``between`` is called before it and timed by itself.

    Raises:
        whatever a call raises: a provider that cannot do the work must not be among them.
    """
    batches, lasts = {}, {}
    for name, call in calls.items():
        pause()
        lasts[name] = estimate = warm_up(call, min(0.5, seconds))
        batches[name] = 1 if between else max(1, round(SAMPLE / max(estimate, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    others: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds if names else 0):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call, batch = calls[name], batches[name]
            if sum(samples[name]) * batch > ENOUGH * seconds:
                continue
            pause()
            if lasts[name] < 0.1:  # seconds: a call as long as that outlives every spinning pool by itself
                sample(call, DISCARD)
                sample(call, batch)
            stop = time.perf_counter() + seconds / rounds
            while True:
                if between:
                    others[name].append(sample(between, 1))
                samples[name].append(sample(call, batch))
                if time.perf_counter() > stop:
                    break
    return {name: Times.of(values, others[name]) for name, values in samples.items()}


class Neighbours:
    """How much of the machine others used during a stretch of time (Linux; elsewhere unknown)."""

    def __init__(self) -> None:
        self._begin, self._start = self._read(), time.perf_counter()
        self._switches = _involuntary_switches()

    @staticmethod
    def _read() -> tuple[float, float, float, float] | None:
        """Seconds: busy on all cores, our own, wall clock, and those that the hypervisor gave to other machines."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(
            int, stat.read_text().split("\n", 1)[0].split()[1:]
        )
        own, ticks = os.times(), os.sysconf("SC_CLK_TCK")
        return (
            (user + nice + system + irq + softirq + steal) / ticks,
            own.user + own.system + own.children_user + own.children_system,
            time.perf_counter(),
            steal / ticks,
        )

    def share(self) -> float | None:
        """The share of all cores that others used since this object was made; None where the system does not tell."""
        passed = self._passed()
        return None if passed is None else max(0.0, passed[0] - passed[1]) / passed[2]

    def stolen(self) -> float | None:
        """The part of that share that went to other virtual machines."""
        passed = self._passed()
        return None if passed is None else passed[3] / passed[2]

    def switches(self) -> int:
        """How often since then a thread of this process lost its core while it had work."""
        return _involuntary_switches() - self._switches

    def seconds(self) -> float:
        """How long that has been."""
        return time.perf_counter() - self._start

    def _passed(self) -> tuple[float, float, float, float] | None:
        """Core seconds since this object was made: busy, our own, all that there were, stolen."""
        end = self._read()
        if self._begin is None or end is None:
            return None
        busy, own, wall, steal = (e - b for e, b in zip(end, self._begin, strict=True))
        return busy, own, wall * (os.cpu_count() or 1), steal


def _involuntary_switches() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def load_average() -> float | None:
    """The one-minute load average; None where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
