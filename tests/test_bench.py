"""The benchmark: its limits exist, its arithmetic is right, a wrong result has no speed, its files can be read.

Nothing here asserts a speed.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnn.bench.cases as cases
import fastnn.bench.command as command
import fastnn.bench.gpu as gpu
import fastnn.bench.limits as limits
import fastnn.bench.memory as memory
import fastnn.bench.peers as peers
import fastnn.bench.report as report
import fastnn.bench.run as run
import fastnn.bench.timing as timing
import fresh
from fastnn import _info, backends
from fastnn.__main__ import main
from fastnn._numerics import all_of, sum_of_magnitudes, widen
from fastnn.bench.cases import Case, random, together
from fastnn.bench.run import Record
from fastnn.bench.timing import Times

# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_limits_are_plausible(threads: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert 1e8 < limits.fma(dtype, threads, seconds=0.01) < 1e15, dtype
    for rate in (
        limits.read(1 << 20, threads, seconds=0.01),
        limits.copy(1 << 20, threads, seconds=0.01),
        limits.copy(1 << 20, threads, sources=2, fresh=None, seconds=0.01),
        limits.copy(1 << 20, threads, fresh=limits.new_pages, seconds=0.01),
    ):
        assert 1e7 < rate < 1e14


def test_the_fma_loop_is_what_it_says() -> None:
    """The widest vectors, enough independent chains, and no memory access or call among them."""
    text, flops = limits._fma_text(torch.float32)
    lines = [line.strip() for line in limits.assembly(text).splitlines()]
    fused = [n for n, line in enumerate(lines) if line.startswith(("vfmadd", "fmla"))]
    if not fused:
        pytest.skip("this CPU has no fused multiply-add")
    chains = flops // (2 * limits.vector_bytes() // 4)
    assert len(fused) == chains >= 12
    assert fused == list(range(fused[0], fused[0] + chains)), "something stands between the multiply-adds"
    register = {64: "%zmm", 32: "%ymm"}.get(limits.vector_bytes(), "")
    assert all(lines[n].count(register) >= 3 and "(" not in lines[n] for n in fused)


@pytest.mark.parametrize("streams", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("sources", "store"),
    [(0, "plain"), (0, "stream"), (1, "plain"), (1, "stream"), (2, "plain"), (2, "stream"), (1, "")],
)
def test_the_memory_loops_touch_every_byte(sources: int, store: str, streams: int) -> None:
    """A loop that skipped memory would make a limit that nobody can reach."""
    steps, size = limits._block(3, 100_000)
    a, b, out = (limits._buffer(size) for _ in range(3))
    a.random_(), b.random_(), out.zero_()
    data = limits._data(3, steps, a, b, out, times=2)
    limits.launch(limits._memory(sources, store, streams), data, 2)
    first = a[: limits.vector_bytes()].repeat(size // limits.vector_bytes())
    if store:
        assert torch.equal(out, (first, a, a ^ b)[sources])
    else:
        width = limits.vector_bytes()
        found, true = (t.view(-1, width).unbind() for t in (out[: 3 * width], a))
        total = [torch.zeros(width, dtype=torch.uint8), torch.zeros(width, dtype=torch.uint8)]
        for n, vectors in enumerate((found, true)):
            for vector in vectors:
                total[n] ^= vector
        assert torch.equal(*total)


def test_every_cache_has_a_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[tuple[int, int]] = []

    def rate(size: int, threads: int, *options: Any) -> float:
        walked.append((size * options[-1], size))
        return 1e9 + (len(walked) - 1) // 3 % 2  # the second time is better

    monkeypatch.setattr(limits, "read", rate)
    monkeypatch.setattr(limits, "copy", rate)
    found = limits.bandwidths(2)
    assert set(found) == {"read", "write", "copy"}
    assert set(found["read"]) >= {"l1", "l2", "memory"}
    assert {rate for rates in found.values() for rate in rates.values()} == {1e9 + 1}, "the best of two"
    assert all(total > 4 << 20 for total, _ in walked)  # else the start-up would be measured
    assert len({size for _, size in walked}) > 4


def test_going_through_a_cache_several_times_counts() -> None:
    assert 1e7 < limits.read(16 << 10, 1, seconds=0.01, times=100) < 1e14
    assert 1e7 < limits.copy(16 << 10, 1, 0, None, seconds=0.01, times=100) < 1e14


def test_limits_keep_their_best(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([5.0, 9.0, 7.0])
    monkeypatch.setattr(limits, "fma", lambda *_: next(rates))
    kept = limits.Limits(2)
    assert kept.fma(torch.float32) == 5.0
    assert [kept.refresh_fma(torch.float32), kept.refresh_fma(torch.float32)] == [9.0, 7.0]
    assert kept.fma(torch.float32) == 9.0
    assert kept.fma(torch.float16) == 9.0  # computed in float32
    moved = iter([100.0, 50.0])
    monkeypatch.setattr(limits, "read", lambda size, *_: next(moved))
    monkeypatch.setattr(limits, "copy", lambda size, threads, sources, seconds: 10.0 * sources)
    assert kept.memory(1000, 0) == 10.0
    assert kept.memory(1000, 0, again=True) == 10.0
    assert kept.memory(100, 100) == 20.0
    assert kept.memory(200, 100) == 15.0


def test_a_limit_waits_for_spinning_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the stopwatch does: else the multiply-add loop would share a core with whatever pool was timed before."""
    order: list[str] = []
    monkeypatch.setattr(timing, "pause", lambda: order.append("pause"))
    limits._repeat(lambda: order.append("call"), 0.0)
    assert order[:2] == ["pause", "call"]


def test_a_limit_of_all_cores_is_not_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one thread had to do the work of both, it is measured again."""
    rates = {torch.float32: iter([100.0, 105.0, 198.0]), torch.float64: iter([60.0, 40.0, 50.0, 55.0, 60.0, 61.0, 1e9])}

    def fma(dtype: torch.dtype, threads: int, seconds: float) -> float:
        return 100.0 if threads == 1 else next(rates[dtype])

    monkeypatch.setattr(limits, "fma", fma)
    monkeypatch.setattr(limits, "has_bf16_dot", lambda: False)
    monkeypatch.setattr(limits, "read", lambda *_, **__: 3e9)
    monkeypatch.setattr(limits, "copy", lambda *_, **__: 2e9)
    found = limits.Limits(2).describe()
    assert found["fma_gflops"] == {"float32": 198e-9, "float64": 61e-9}  # two cores that are never as fast as twice one
    assert found["fma_gflops_one_core"] == {"float32": 100e-9, "float64": 100e-9}


def test_a_header_has_the_best_of_each_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of memory: what a case was judged by, and no less than what a point of the roofline reached."""
    monkeypatch.setattr(limits, "fma", lambda *_: 1e9)
    read = iter([30e9, 51e9, 40e9])
    monkeypatch.setattr(limits, "read", lambda *_: next(read))
    monkeypatch.setattr(limits, "copy", lambda size, threads, sources, seconds: (4 + sources) * 1e9)
    kept = limits.Limits(2)
    kept.memory(64 << 20, 0)
    kept.memory((64 << 20) + 9, 0)
    kept.memory(1 << 20, 0)
    kept.memory(2 << 20, 1 << 20)
    assert kept.known() == {
        "fma_gflops": {},
        "memory_gbs": {"read 1 MiB": 40.0, "two into one 1 MiB": 6.0, "read 64 MiB": 30.0, "read 80 MiB": 51.0},
        "read_gbs_64MiB": 51.0,
    }


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_times() -> None:
    times = Times.of([5.0, 1.0, 3.0, 2.0, 4.0, 10.0])
    assert times == Times(3.5, 2.0, 5.0, 6)
    assert times.spread == pytest.approx(3 / 3.5)
    assert Times.of([2.0]) == Times(2.0, 2.0, 2.0, 1)


def test_measure_runs_everyone_in_turn() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    found = timing.measure({"a": call("a"), "b": call("b"), "c": call("c")}, 0.003, rounds=3)
    assert set(found) == {"a", "b", "c"}
    assert all(0 < t.p20 <= t.median <= t.p80 and t.runs >= 3 for t in found.values())
    blocks = [name for n, name in enumerate(order) if n == 0 or order[n - 1] != name]
    assert blocks == [*"abc", *"abc", *"bca", *"cab"]  # warm-up, then rotating rounds; neighbours of one name merge


def test_every_block_follows_a_pause_and_discarded_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is discarded is no sample."""
    order: list[Any] = []

    def sample(call: Callable[[], str], batch: int) -> float:
        order.append((call(), batch))
        return 1e-6 if order[-2] == (call(), batch) else 1.0

    def warm_up(call: Callable[[], str], seconds: float) -> float:
        order.append(("warm", call()))
        return 1e-6

    clock = count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))  # a block's time is up at once
    monkeypatch.setattr(timing, "pause", lambda: order.append("pause"))
    monkeypatch.setattr(timing, "warm_up", warm_up)
    monkeypatch.setattr(timing, "sample", sample)
    found = timing.measure({"a": lambda: "a", "b": lambda: "b"}, 0.5, rounds=2)
    blocks = {name: ["pause", (name, timing.DISCARD), (name, 20), (name, 20)] for name in "ab"}  # 20 calls take 20 µs
    assert timing.DISCARD >= 3
    assert order == ["pause", ("warm", "a"), "pause", ("warm", "b"), *blocks["a"], *blocks["b"], *blocks["b"], *blocks["a"]]
    assert found["a"] == found["b"] == Times.of([1e-6, 1e-6])


@pytest.mark.parametrize(
    ("estimates", "calls"),
    [
        ([9.0, 0.5, 0.3, 0.29, 0.1], 4),  # two that agree
        ([9.0, 0.3, 0.29, 0.1], 3),
        ([9.0, *[1e-4] * 9], 7),  # short calls in batches of 1, 2, 4, …, 32, since the clock must count for nothing
    ],
)
def test_a_call_is_warm_when_two_estimates_agree(estimates: list[float], calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def sample(call: Any, batch: int) -> float:
        batches.append(batch)
        return estimates[len(batches) - 1]

    monkeypatch.setattr(timing, "sample", sample)
    assert timing.warm_up(lambda: None, 60) == estimates[calls - 1]
    assert len(batches) == calls
    assert estimates[calls - 1] * batches[-1] > 2e-3


def test_a_call_that_never_settles_is_warm_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    estimates = iter([0.1, 0.2] * 10**6)
    monkeypatch.setattr(timing, "sample", lambda call, batch: next(estimates))
    begin = time.perf_counter()
    timing.warm_up(lambda: None, 0.05)
    assert 0.05 < time.perf_counter() - begin < 5


def test_what_is_called_between_is_timed_by_itself() -> None:
    order: list[str] = []

    def between() -> None:
        order.append("b")
        time.sleep(0.001)

    found = timing.measure({"a": lambda: order.append("a")}, 0.003, rounds=1, between=between)
    assert found["a"].between is not None
    assert found["a"].between > 0.001  # it slept
    assert "".join(order).endswith("ba" * found["a"].runs)


def test_a_pause_outlasts_spinning_threads() -> None:
    stop = time.perf_counter() + 0.2

    def spin() -> None:
        while time.perf_counter() < stop:
            pass

    spinning = threading.Thread(target=spin)
    spinning.start()
    timing.pause()
    assert time.perf_counter() > stop


def test_eviction_walks_twice_the_cache() -> None:
    found = memory.extra(lambda: timing.evict(40 << 20), calls=1)
    assert found is None or found > 80 << 20


def test_neighbours_tell_others_from_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = 2
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    # seconds: busy on all cores, our own, wall clock, stolen
    readings = iter([(10.0, 5.0, 100.0, 1.0), (14.0, 8.0, 102.0, 1.5), (14.0, 8.0, 102.0, 1.5)])
    monkeypatch.setattr(timing.Neighbours, "_read", staticmethod(lambda: next(readings)))
    switches = iter([40, 47])
    monkeypatch.setattr(timing, "_involuntary_switches", lambda: next(switches))
    neighbours = timing.Neighbours()
    assert neighbours.share() == pytest.approx(1 / 4)
    assert neighbours.stolen() == pytest.approx(0.5 / 4)
    assert neighbours.switches() == 7


def test_doubts_are_what_others_took(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubts(share: float | None, stolen: float | None, switches: int) -> list[str]:
        return run._doubts(SimpleNamespace(share=lambda: share, stolen=lambda: stolen, switches=lambda: switches,
                                           seconds=lambda: 2.0))  # fmt: skip

    assert doubts(0.04, 0.02, 199) == doubts(None, None, 0) == []
    assert doubts(0.3, 0.1, 300) == ["others used 30% of the machine", "the hypervisor gave 10% of it to other machines",
                                     "our threads lost their cores 300 times"]  # fmt: skip


def test_a_clock_that_slows_down_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The multiply-add loop runs again after each case: here at 80% of its best, then at 95%."""
    monkeypatch.setattr(run, "_doubts", lambda neighbours: ["busy"])
    monkeypatch.setattr(run, "SPREAD", 1e9)
    rates = iter([100e9, 80e9, 95e9])
    monkeypatch.setattr(limits, "fma", lambda *_: next(rates))
    kept = limits.Limits(1, seconds=0.01)
    kept.refresh_fma(torch.float32)
    providers, _ = run.available_peers(["torch"])
    found = [run.measure_case(_case(), torch.float32, 1, providers, kept, seconds=0.01)[0].notes for _ in range(2)]
    assert found == [["busy", run.DRIFTED.format(0.8)], ["busy"]]
    assert "at 80% of its best" in found[0][1]


def test_the_memory_of_a_call_is_its_peak() -> None:
    a = torch.ones(4 << 20)
    if memory.extra(lambda: a) is None:
        pytest.skip("only Linux tells how much memory a process had at most")
    slack = 1 << 20
    assert (memory.extra(lambda: a) or 0) < slack
    assert 16 << 20 <= (memory.extra(lambda: a + 1) or 0) + slack < 18 << 20
    assert 32 << 20 <= (memory.extra(lambda: (a + 1) * 2) or 0) + slack < 34 << 20  # both are there at once


FAULTS = """
import itertools, resource
import torch
from fastnn.bench import limits, memory

def faults(call):  # the new pages that a call needs, once it has found its place in the heap, after ten calls or so: their median
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(41):
        call()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return sorted(b - a for a, b in itertools.pairwise(counts))[20]

large = [torch.ones(size << 18) for size in (8, 48, 64)]
with memory.kept():
    if not memory.keeps:
        raise SystemExit("no glibc")
    found = [faults(lambda t=t: t + 1) for t in large]
    found.append(faults(lambda: (large[1] + 1) * 2))
    holes = [torch.ones(20 << 18) for _ in range(5)][::2]
    found += [faults(lambda t=t: t + 1) for t in large]
    assert max(found) < 100, found
    assert faults(lambda: limits.new_pages(8 << 20).fill_(1)) > 1
assert not memory.keeps
assert len(holes) == 3
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
def test_outputs_of_every_size_lie_in_memory_that_is_kept() -> None:
    """By glibc's default those above 32 MiB are new pages, unless there happens to be a hole in the heap. In a process of its
    own: what others left in this one's heap may keep a result from the place that it was given before."""
    done = fresh.python("-c", FAULTS, env=os.environ, cwd=Path(__file__).parents[1])
    if "no glibc" in done.stderr:
        pytest.skip("no glibc")
    assert done.returncode == 0, done.stderr


def test_a_run_keeps_memory_and_says_so(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[bool] = []

    def relu(F: Any, x: Tensor) -> Tensor:
        seen.append(memory.keeps)
        return F.relu(x)

    case = _case(name="kept", theirs=relu)
    monkeypatch.setattr(run, "cases", lambda family: [case])
    file = tmp_path / "kept.json"
    assert _bench("--json", str(file)) == 0
    (header,) = json.loads(file.read_text())["headers"]
    assert set(seen) == {sys.platform == "linux"}
    assert ("glibc is told to keep" in header["method"]) == seen[0]


def _case(**changes: Any) -> Case:
    return Case("matmul", "test/relu/64", together(random(64, 64, seed=1)), theirs=lambda F, x: F.relu(x)).on(**changes)


def _times(**medians: float) -> dict[str, Times]:
    return {name.replace("_", "."): Times(t, 0.98 * t, 1.02 * t, 9) for name, t in medians.items()}


def _records(case: Case, *names: str) -> list[Record]:
    return [Record(case.family, case.name, "float32", 2, case.mode, name, correct=True) for name in names]


def test_ratios_rates_and_fractions() -> None:
    case = _case(flops=4_000_000)
    ours, eager, compiled, numpy = records = _records(case, "fastnn", "torch", "torch.compile", "numpy")
    run.fill(records, _times(fastnn=0.002, torch=0.004, torch_compile=0.003), case, torch.float32, ("fma", 0.001))
    assert ours.ratio == pytest.approx(1.5)  # against the best peer, not the weakest
    assert (ours.flops, ours.bytes) == (4_000_000, 0)
    assert [eager.ratio, compiled.ratio] == pytest.approx([0.75, 1.0])
    assert ours.rate == pytest.approx(2.0)
    assert ours.unit == "GFLOP/s"
    assert [ours.limit, ours.limit_fraction, eager.limit_fraction] == ["fma", 0.5, 0.25]
    assert [ours.limit_rate, eager.limit_rate] == pytest.approx([4.0, 4.0])  # GFLOP/s, as the rate
    assert numpy.median is numpy.ratio is None
    assert ours.notes == []


def test_memory_bound_cases_count_bytes() -> None:
    case = _case(passes=((1000, 500), (500, 0)))
    assert case.bytes(torch.bfloat16) == 4000
    records = _records(case, "fastnn")
    run.fill(records, {"fastnn": Times(1e-6, 0.5e-6, 2e-6, 9)}, case, torch.float32, None)
    assert (records[0].rate, records[0].unit) == (pytest.approx(8.0), "GB/s")
    assert (records[0].flops, records[0].bytes) == (0, 8000)
    assert records[0].ratio is records[0].limit_fraction is None
    assert records[0].notes == ["spread 150%"]


def test_fractions_are_of_the_best_limit_of_the_whole_run() -> None:
    case = _case(flops=4_000_000)
    records = [*_records(case, "fastnn", "torch"), *_records(_case(name="other"), "fastnn")]
    run.fill(records[:2], _times(fastnn=0.002, torch=0.004), case, torch.float32, ("fma", 0.003))
    assert records[0].limit_fraction == 1.5
    assert records[0].remarks == [run.FEWER]
    run.refill([(case, torch.float32)], records, SimpleNamespace(fma=lambda dtype: 2e9))
    assert [r.limit_fraction for r in records] == [1.0, 0.5, None]
    assert records[0].remarks == []


def test_what_beats_its_limit_is_said() -> None:
    """Winograd does fewer operations than are counted, which makes nothing unsteady; memory cannot be outrun."""
    product, copied = _case(flops=4_000_000), _case(passes=((1000, 1000),))
    for case, name, notes, remarks in ((product, "fma", [], [run.FEWER]), (copied, "copy", [run.DISTURBED], [])):
        (record,) = _records(case, "fastnn")
        run.fill([record], _times(fastnn=0.002), case, torch.float32, (name, 0.003))
        assert (record.notes, record.remarks) == (notes, remarks)


def test_a_case_is_limited_by_what_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = limits.Limits(2)
    monkeypatch.setattr(kept, "fma", lambda dtype: 1e12)
    monkeypatch.setattr(kept, "memory", lambda reads, writes, again=False, cold=False: (reads + writes) / (1e11 - 5e10 * cold))
    big = ((10_000_000, 0),)
    assert run.limit_of(_case(flops=10**9, passes=big), torch.float32, kept) == ("fma", 1e-3)
    assert run.limit_of(_case(flops=10**8, passes=big), torch.float32, kept) == ("read", 4e-4)
    assert run.limit_of(_case(flops=10**3, passes=((1000, 10),)), torch.float32, kept) == ("fma", 1e-9)  # in cache
    assert run.limit_of(_case(passes=((500, 500), (1000, 0))), torch.float32, kept) == ("copy", 8e-8)
    assert run.limit_of(_case(), torch.float32, kept) is None
    small = _case(flops=10**3, passes=((1000, 10),))
    assert run.limit_of(small, torch.float32, kept, method="cold") == ("read", 4040 / 5e10)
    assert run.limit_of(_case(flops=10**8, passes=big), torch.float32, kept, method=gpu.GRAPHS) == ("fma", 1e-4)
    assert run.limit_of(_case(passes=big), torch.float32, kept, method=gpu.GRAPHS) is None


def test_cold_inputs_come_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that a cache would hold; and they are evicted before each sample."""
    read: list[int] = []
    monkeypatch.setattr(limits, "read", lambda size, *_: read.append(size) or 1e9)  # type: ignore[func-returns-value]
    limits.Limits(1).memory(1000, 0)
    limits.Limits(1).memory(1000, 0, cold=True)
    assert read[0] < 2000
    assert read[1] == limits.memory_size() >= 64 << 20
    evicted: list[int] = []
    monkeypatch.setattr(run, "evict", lambda size: lambda: evicted.append(size))
    providers, _ = run.available_peers(["fastnn", "torch"])
    found = run.measure_case(_case(), torch.float32, 1, providers, limits.Limits(1, seconds=0.01), 0.01, "cold")
    assert len(evicted) >= sum(r.runs for r in found) > 4
    assert set(evicted) == {run._last_cache()}


def test_summary_compares_with_the_goals() -> None:
    goals = {"limit": 0.9, "best": 1.0, "mean": 1.25, "numpy": 2.0}
    fast, slow = (_case(name=f"group/{n}", goals=goals) for n in ("fast", "slow"))
    records = []
    for case, ours in ((fast, 1.0), (slow, 2.0)):
        mine = _records(case, "fastnn", "torch", "numpy")
        run.fill(mine, _times(fastnn=ours, torch=2.0, numpy=3.0), case, torch.float32, ("fma", 0.95))
        records += mine
    chosen = [(fast, torch.float32), (slow, torch.float32), (_case(name="group/not run", goals=goals), torch.float32)]
    rows = {row["goal"]: row for row in report.summary(chosen, records)}
    assert set(rows) == set(goals)
    assert {goal: row["worst"] for goal, row in rows.items()} == pytest.approx(
        {"limit": 0.475, "best": 1.0, "mean": 1.0, "numpy": 1.5}
    )
    assert rows["mean"]["mean"] == pytest.approx(2**0.5)
    assert {goal: row["reached"] for goal, row in rows.items()} == {
        "limit": False, "best": True, "mean": True, "numpy": False,
    }  # fmt: skip
    assert {row["worst_case"] for row in rows.values()} == {"group/slow"}


def test_summary_compares_dtypes_and_seconds() -> None:
    case = _case(name="square/8", goals={"float32": 1.7})
    wide, narrow = _records(case, "fastnn") + _records(case, "fastnn")
    narrow.dtype, wide.median, narrow.median = "bfloat16", 3.0, 2.0
    (row,) = report.summary([(case, torch.bfloat16)], [wide, narrow])
    assert (row["worst"], row["reached"]) == (1.5, False)
    start = _case(name="import/it", goals={"seconds": 0.15})
    quick = _records(start, "fastnn")
    quick[0].median = 0.1
    (row,) = report.summary([(start, torch.float32)], quick)
    assert row["reached"]


# Cases ----------------------------------------------------------------------------------------------------------------


def test_every_row_of_the_speed_table_has_cases() -> None:
    found = {(case.family, case.group) for family in cases.families() for case in cases.cases(family)}
    assert found >= {
        *(("matmul", g) for g in ("square", "linear_gelu", "mv", "small", "bmm", "linear_train", "call")),
        *(("activation", g) for g in ("relu", "gelu", "gelu_tanh", "silu", "mish", "softplus", "prelu", "glu")),
        *(("softmax", g) for g in ("softmax", "log_softmax", "cross_entropy")),
        *(("pool", g) for g in ("max_pool", "avg_pool")),
        *(("norm", g) for g in ("batch_norm", "batch_norm_eval", "group_norm", "layer_norm", "rms_norm", "add_layer_norm")),
        ("embedding", "embedding"),
        *(("rnn", g) for g in ("lstm", "gru", "rnn_tanh", "lstm_cell", "gru_cell", "rnn_tanh_cell", "qrnn")),
        *(("models", g) for g in ("digits_mlp", "minilm", "crepe_full", "resnet", "resemblyzer", "gpt", "vit")),
        *(("attention", g) for g in ("attention", "attention_causal", "attention_bias_train", "attention_window", "decode")),
        *(("conv", g) for g in ("3x3", "1x1", "stem", "depthwise", "grouped", "dilated", "transposed", "conv3d", "conv1d")),
        *(("startup", g) for g in ("import", "first_linear")),
    }  # fmt: skip
    sizes = {case.name for case in cases.cases("matmul") if case.group == "linear_gelu" and "cpu" in case.devices}
    assert len(sizes) == 16


@pytest.mark.parametrize("family", cases.families())
def test_cases_are_well_formed(family: str) -> None:
    """No two are the same; the formulas fit the shapes of the tensors that the functions really take and give."""
    listed = cases.cases(family)
    keys = [(c.name, c.mode, dtype) for c in listed for dtype in c.dtypes]
    assert len(set(keys)) == len(keys)
    assert any(case.quick for case in listed)
    for case in listed:
        assert case.family == family
        assert case.mode in ("forward", "backward", "train")
        assert case.goals
        if case.programs or family == "models" or case.group == "call" or sum(map(sum, case.passes)) > 12_000_000:
            continue
        if family == "embedding":
            continue  # reads a part of its table
        inputs = case.make(torch.float32)
        tensors = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
        assert any(t.requires_grad for t in tensors) == (case.mode != "forward"), case.name
        with torch.no_grad():
            outs = all_of(case.theirs(peers.TORCH, *inputs))
        if case.mode == "forward":
            reads, writes = (sum(one) for one in zip(*case.passes))
            assert reads <= sum(t.numel() for t in tensors) <= 1.1 * reads, case.name
            assert writes in (sum(t.numel() for t in outs), 0), case.name  # a loss is not worth counting


@pytest.mark.parametrize("family", sorted({*cases.families()} - {"models", "startup"}))
def test_nothing_of_a_case_is_left_on_the_cpu(family: str) -> None:
    """On "meta", which has no numbers: the results and their scales are where the inputs are."""
    by_size = sorted((c for c in cases.cases(family) if not c.judge), key=lambda c: -sum(map(sum, c.passes)))
    for case in {(c.group, c.mode): c for c in by_size}.values():  # the smallest of each kind
        with FakeTensorMode():
            shapes = [(t.shape, t.dtype, t.requires_grad) if isinstance(t, Tensor) else t for t in case.make(torch.float32)]
        inputs = [torch.empty(t[0], dtype=t[1], device="meta", requires_grad=t[2]) if isinstance(t, tuple) else t for t in shapes]
        out, *more = all_of(case.theirs(peers.TORCH, *inputs))
        assert all(t.is_meta for t in (out, *more)), case.name
        if not case.scale:
            continue
        wide = [widen(t) for t in inputs]
        for grad in (None, *([torch.empty_like(out, dtype=torch.float64)] if case.mode != "forward" else [])):
            assert all(t.is_meta for t in case.scale(wide, grad)), case.name


def test_every_goal_is_one_that_the_summary_knows() -> None:
    """A peer's name that nobody has would never be reached, and never be missed."""
    known = {*report._GOALS, *(peer.name for peer in peers.PEERS)} - {peers.OURS}
    goals = {(goal, case.name) for family in cases.families() for case in cases.cases(family) for goal in case.goals}
    assert {(goal, name) for goal, name in goals if goal not in known} == set()


@pytest.mark.parametrize("family", ["attention", "conv", "matmul", "rnn"])
def test_training_moves_the_gradients_too(family: str) -> None:
    """What is read and written at least, from the tensors themselves: the smallest case of each kind with gradients."""
    by_size = sorted((c for c in cases.cases(family) if c.mode != "forward"), key=lambda c: -c.bytes(torch.float32))
    smallest = {(c.group, c.mode): c for c in by_size}.values()
    assert smallest
    for case in smallest:
        with FakeTensorMode():
            inputs = [t for t in case.make(torch.float32) if isinstance(t, Tensor)]
            out = case.theirs(peers.TORCH, *inputs).nbytes
        read = sum(t.nbytes for t in inputs)
        gradients = sum(t.nbytes for t in inputs if t.requires_grad)
        backward = read + out + gradients
        assert case.bytes(torch.float32) == backward + (read + out) * (case.mode == "train"), case.name


def test_select() -> None:
    def names(*arguments: Any, **options: Any) -> list[str]:
        return [case.name for case, _ in run.select(*arguments, **options)]

    assert names(["matmul"], pattern="square/512") == ["square/512"]
    assert set(names(["matmul"], pattern="small/*8")) == {"small/8", "small/48", "small/128"}
    assert set(names(["activation"], pattern="gelu/bert_base/")) == {"gelu/bert_base/4096x768"}
    assert len(names(["matmul"], quick=True)) < len(names(["matmul"]))
    both = run.select(["matmul"], pattern="square/1024")
    assert [dtype for _, dtype in both] == [torch.float32, torch.bfloat16]
    assert [dtype for _, dtype in run.select(["matmul"], torch.float64, "square/1024")] == [torch.float64]
    with pytest.raises(ValueError, match="unknown family 'convolution'; there are: activation, attention"):
        run.select(["convolution"])
    with pytest.raises(ValueError, match="no case matches 'nowhere' in: matmul"):
        run.select(["matmul"], pattern="nowhere")


# Measuring a case -----------------------------------------------------------------------------------------------------


def _measure(case: Case, *names: str, dtype: torch.dtype = torch.float32) -> dict[str, Record]:
    providers, missing = run.available_peers(names)
    assert not missing
    found = run.measure_case(case, dtype, 1, providers, limits.Limits(1, seconds=0.01), seconds=0.01)
    return {record.provider: record for record in found}


@pytest.mark.parametrize("mode", ["forward", "backward", "train"])
def test_every_provider_does_the_same_work(mode: str) -> None:
    def gelu(F: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.gelu(F.linear(x, w, b))

    grad = mode != "forward"
    makers = (random(*shape, seed=n, grad=grad) for n, shape in enumerate([(16, 24), (32, 24), (32,)]))
    scale = sum_of_magnitudes(lambda F, x, w, b: F.linear(x, w, b))
    case = _case(theirs=gelu, ours=lambda F, x, w, b: F.linear(x, w, b, activation="gelu"), make=together(*makers),
                 mode=mode, scale=scale, flops=2 * 16 * 24 * 32)  # fmt: skip
    found = _measure(case, "fastnn", "torch", "torch.compile")
    for record in found.values():
        assert record.missing is None
        assert record.correct
        assert record.median is not None
        assert 0 < record.p20 <= record.median <= record.p80
        assert record.error_ulp is not None
        assert record.error_ulp < 100
        assert 0 < record.limit_fraction < 10
    assert "cpu" in (found["fastnn"].served_by or "")
    best = min(found[name].median or 0 for name in ("torch", "torch.compile"))
    assert found["fastnn"].ratio == pytest.approx(best / (found["fastnn"].median or 1))


@pytest.mark.parametrize("method", ["warm", "cold", "interleaved"])
def test_methods_and_memory_are_recorded(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_last_cache", lambda: 1 << 20)
    case = _case(make=together(random(1024, 1024, seed=1)))
    providers, _ = run.available_peers(["fastnn", "torch"])
    found = run.measure_case(
        case, torch.float32, 1, providers, limits.Limits(1, seconds=0.01), seconds=0.01, method=method
    )
    for record in found:
        assert record.correct
        assert record.method == method
        assert (record.between is not None) == (method == "interleaved")
        assert record.memory is None or (4 << 20) - (256 << 10) < record.memory < 6 << 20


def test_random_results_are_judged_by_what_must_hold() -> None:
    """A dropout that drops nothing, too much, or scales wrongly is red; one that draws other elements is not."""
    (case,) = (c for c in cases.cases("activation") if c.group == "dropout" and "cpu" in c.devices)
    small = case.on(make=together(random(4096, 768, seed=1)))
    wrong: list[Callable[..., Tensor]] = [
        lambda F, x: x / 0.9,
        lambda F, x: torch.nn.functional.dropout(x, 0.11),
        lambda F, x: torch.nn.functional.dropout(x, 0.1) * 1.001,
    ]
    for ours in wrong:
        assert _measure(small.on(ours=ours), "fastnn")["fastnn"].correct is False
    assert _measure(small, "fastnn", "torch")["fastnn"].correct


def test_a_red_case_has_no_speed() -> None:
    found = _measure(_case(ours=lambda F, x: F.relu(x) + 1e-3), "fastnn", "torch")
    ours = found["fastnn"]
    assert ours.correct is False
    assert ours.median is ours.ratio is ours.rate is ours.limit_fraction is None
    assert (ours.error_ulp or 0) > 100
    assert found["torch"].correct
    assert found["torch"].median


def test_a_wrong_peer_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio to the best peer must not be spoilt by one that is fast because it is wrong."""
    monkeypatch.setattr(peers.TorchEager, "prepare", lambda self, job: lambda: (job.inputs[0],))
    found = _measure(_case(numpy=lambda x: x.clip(0)), "fastnn", "torch", "numpy")
    assert found["torch"].correct is False
    assert found["torch"].median is None
    assert found["fastnn"].ratio == pytest.approx((found["numpy"].median or 0) / (found["fastnn"].median or 1))


def test_lost_special_values_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(dtype: torch.dtype) -> tuple[Tensor]:
        return (torch.tensor([1.0, float("nan"), float("inf")] * 20, dtype=dtype),)

    found = _measure(_case(make=make, ours=lambda F, x: F.relu(x).nan_to_num()), "fastnn", "torch")
    assert found["fastnn"].correct is False
    assert "NaN" in found["fastnn"].remarks[0]


def test_missing_peers_are_shown_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    square = next(c for c in cases.cases("matmul") if c.name == "small/8")
    found = _measure(square, "torch", "numpy", dtype=torch.bfloat16)
    assert found["numpy"].missing == "NumPy has no fast bfloat16 product"
    assert found["numpy"].median is found["numpy"].correct is None
    assert _measure(_case(), "numpy", "torch")["numpy"].missing == "NumPy does not have this operation"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "C++ compiler" in (_measure(_case(), "torch.compile", "torch")["torch.compile"].missing or "")
    monkeypatch.setattr(peers.NumPy, "__init__", lambda self: (_ for _ in ()).throw(ImportError("no numpy here")))
    there, missing = run.available_peers()
    assert missing == {"numpy": "no numpy here"}
    assert "numpy" not in [peer.name for peer in there]


def test_a_provider_that_raises_is_a_finding() -> None:
    def fail(F: Any, x: Tensor) -> Tensor:
        raise NotImplementedError("not for this shape")

    found = _measure(_case(ours=fail), "fastnn", "torch")
    assert found["fastnn"].correct is False
    assert found["fastnn"].missing == "NotImplementedError: not for this shape"
    assert found["torch"].median


def test_a_case_that_cannot_be_checked_is_red_and_not_the_end(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> tuple[Tensor, ...]:
        raise RuntimeError("expected all tensors on one device\nmore")

    tiny = [_case(name="bad", scale=fail), _case(name="good")]
    monkeypatch.setattr(run, "cases", lambda family: tiny)
    found: list[Record] = []
    run.run([(case, torch.float32) for case in tiny], 1, 0.01, run.available_peers(["fastnn", "torch"])[0],
            lambda case, dtype, records: found.extend(records))  # fmt: skip
    assert [r.correct for r in found] == [False, None, True, True]
    assert {r.missing for r in found[:2]} == {"RuntimeError: expected all tensors on one device"}
    assert _bench() == 1
    assert "RED fastnn: RuntimeError: expected all tensors" in capsys.readouterr().out


def test_a_case_too_large_for_the_memory_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_available_memory", lambda on_gpu: 3 << 30)
    case = _case(passes=((1 << 28, 1 << 28),), make=lambda dtype: pytest.fail("inputs were made"))
    assert _measure(case, "torch")["torch"].missing == "the check needs 12 GiB of memory, 3 are free"


def test_the_environment_is_left_as_it_was() -> None:
    before = torch.get_num_threads(), torch.is_grad_enabled()
    run.run([(_case(), torch.float32)], 1, 0.01, run.available_peers(["torch"])[0], lambda *_: None)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long measurements: the numbers do not matter here."""
    monkeypatch.setattr(command, "SECONDS", {"quick": 0.01, "full": 0.01})
    monkeypatch.setattr(timing, "PAUSE", 1e-3)
    monkeypatch.setattr(timing, "LONGEST_PAUSE", 1e-3)
    for name in ("fma", "read", "copy"):
        monkeypatch.setattr(limits, name, lambda *args, **options: 1e10)


def _bench(*arguments: str) -> int:
    return main(["bench", "matmul", "--providers", "fastnn", "torch", "numpy", "--threads", "1", *arguments])


def test_json_has_one_record_a_case_and_provider(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "results.json"
    assert _bench("--case", "small/[18]*", "--json", str(file), "--threads", "1", "2") == 0
    saved = json.loads(file.read_text())
    assert set(saved) == {"headers", "records"}
    assert [head["threads"] for head in saved["headers"]] == [1, 2]
    for head in saved["headers"]:
        assert {"started", "machine", "versions", "limits", "load_average", "method", "command"} <= set(head)
        assert head["machine"]["cpu"]
        assert head["versions"]["torch"] == torch.__version__
        assert head["limits"]["fma_gflops"]["float32"] > 0
        assert head["limits"]["fma_gflops_one_core"]["float32"] > 0
    keys = [(r["case"], r["dtype"], r["threads"], r["mode"], r["provider"]) for r in saved["records"]]
    assert len(set(keys)) == len(keys) == 3 * 3 * 2
    for record in saved["records"]:
        assert {"family", "median", "p20", "p80", "rate", "unit", "limit_fraction", "ratio", "correct"} <= set(record)
        assert record["correct"] is True
        assert record["family"] == "matmul"
        assert record["unit"] == "GFLOP/s"
        assert 0 < record["p20"] <= record["median"] <= record["p80"] < 10
        assert record["ratio"] > 0
    out = capsys.readouterr().out
    assert "small/128" in out
    assert "What was reached" in out


def test_plots_and_the_page_are_written(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "page.html"
    assert _bench("--case", "small/8", "--plot", str(tmp_path / "plots"), "--html", str(page)) == 0
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [p.name for p in pictures] == ["matmul-1threads-ratios.png", "matmul-1threads-roofline.png"]
    text = page.read_text()
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert b64encode(picture.read_bytes()).decode() in text
    assert "small/8" in text
    out = capsys.readouterr().out
    assert "1 cases: about 10 seconds if nothing else runs; Ctrl-C keeps what is finished." in out
    assert f"saved {page}" in out.replace("\n", "")


def test_plots_without_matplotlib_are_refused_before_the_run(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert _bench("--case", "small/8", "--html", str(tmp_path / "page.html")) == 2
    found = capsys.readouterr()
    assert "matplotlib is needed for this" in found.err
    assert "small/8" not in found.out


def test_results_are_saved_by_machine_and_family(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [_case(name="small/8"), _case(name="small/16")], [_case(family="activation")]
    monkeypatch.setattr(run, "cases", lambda family: tiny[family == "activation"])
    assert main(["bench", "matmul", "activation", "--save", "--providers", "fastnn", "torch"]) == 0
    folder = tmp_path / "bench" / "results"
    files = {str(p.relative_to(folder)): report.load(p)[1] for p in folder.rglob("*.json")}
    machine = report.slug(_info.machine())
    assert {name: {r.case for r in records} for name, records in files.items()} == {
        f"{machine}/matmul.json": {"small/8", "small/16"},
        f"{machine}/activation.json": {"test/relu/64"},
    }
    before = {r.case: r.run for r in report.load(folder / machine / "matmul.json")[1]}
    monkeypatch.setattr("fastnn.bench.command.header", lambda *args: run.header(*args) | {"started": "later"})
    assert main(["bench", "matmul", "--case", "small/8", "--save", "--providers", "fastnn", "torch"]) == 0
    headers, records = report.load(folder / machine / "matmul.json")
    assert {(r.case, r.run) for r in records} == {("small/8", "later"), ("small/16", before["small/16"])}
    assert {h["started"] for h in headers} == {"later", before["small/16"]}


def test_the_method_is_said(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    assert _bench("--case", "small/8", "--interleaved", "--json", str(file)) == 0
    saved = json.loads(file.read_text())
    assert "PyTorch" in saved["headers"][0]["method"]
    assert saved["headers"][0]["seconds"] == command.SECONDS["full"]
    assert {r["method"] for r in saved["records"]} == {"interleaved"}
    assert all(r["between"] > 0 for r in saved["records"])
    assert "between its own" in capsys.readouterr().out


def test_who_was_not_asked_is_said(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of those that have something to do with the cases here; and what is kept at Ctrl-C only where something is kept."""
    file = tmp_path / "results.json"
    assert _bench("--case", "small/8", "--json", str(file)) == 0
    (header,) = json.loads(file.read_text())["headers"]
    assert header["missing"] == dict.fromkeys(("torch.compile", "max-autotune", "onnxruntime"), "not asked for")
    out = capsys.readouterr().out
    assert "onnxruntime is missing: not asked for" in out
    assert "Ctrl-C keeps what is finished" in out
    assert _bench("--case", "small/8") == 0
    out = capsys.readouterr().out
    assert "Ctrl-C keeps" not in out
    assert "nothing is written without --json FILE or --save" in out


def test_a_red_case_fails_the_command(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kernel(out: Tensor, *args: Any) -> None:
        out.zero_()

    monkeypatch.setitem(backends.tables["cpu"], "matmul", (kernel, None, None))
    assert _bench("--case", "small/16") == 1
    out = capsys.readouterr().out
    assert "RED fastnn: error" in out
    assert "no speed is reported" in out
    (line,) = (line for line in out.splitlines() if line.startswith("small/16"))
    assert "GFLOP/s" not in line, "a peer's speed in our column"
    assert line.split()[:6] == ["small/16", "forward", "f32", "red", "–", "–"]


def test_a_red_peer_is_shown_and_no_failure(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers.NumPy, "prepare", lambda self, job: lambda: (job.inputs[0],))
    assert _bench("--case", "small/16") == 0
    assert "RED numpy: error" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_is_done(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, count = run.measure_case, iter(range(9))

    def interrupt(*arguments: Any) -> list[Record]:
        if next(count) == 2:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(run, "measure_case", interrupt)
    file, page, plots = tmp_path / "part.json", tmp_path / "part.html", tmp_path / "plots"
    assert _bench("--case", "small/*", "--json", str(file), "--html", str(page), "--plot", str(plots)) == 130
    assert {r["case"] for r in json.loads(file.read_text())["records"]} == {"small/8", "small/16"}
    assert set(re.findall(r"small/\d+", page.read_text())) == {"small/8", "small/16"}
    assert (plots / "matmul-1threads-ratios.png").exists()
    assert "Interrupted after 2 of 7 cases" in capsys.readouterr().out


@pytest.mark.parametrize("at", ["case", "layers"])
def test_an_interrupted_run_makes_no_layer_tables(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    """Whether Ctrl-C comes in a case or in such a table: the summary, the JSON and the page are there."""
    measured, count = run.measure_case, iter(range(9))

    def interrupt(*arguments: Any) -> list[Record]:
        if at == "case" and next(count):
            raise KeyboardInterrupt
        return measured(*arguments)

    def table(name: str) -> list[dict[str, Any]]:
        assert at == "layers"
        raise KeyboardInterrupt

    tiny = [_case(family="models", name=name, goals={"torch": 0.001}) for name in ("one", "two")]
    monkeypatch.setattr(run, "cases", lambda family: tiny)
    monkeypatch.setattr(run, "measure_case", interrupt)
    monkeypatch.setattr(command.models, "layer_table", table)
    file, page = tmp_path / "part.json", tmp_path / "part.html"
    arguments = ["bench", "models", "--providers", "fastnn", "torch", "--threads", "1"]
    assert main([*arguments, "--json", str(file), "--html", str(page)]) == 130
    assert {r["case"] for r in json.loads(file.read_text())["records"]} == {"one", *(["two"] if at == "layers" else [])}
    assert page.exists()
    assert "What was reached" in capsys.readouterr().out


def test_a_red_model_has_no_layer_table(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "cases", lambda family: [_case(family="models", name="one", ours=lambda F, x: F.relu(x) + 1)])
    monkeypatch.setattr(command.models, "layer_table", lambda name: pytest.fail("it says how fast wrong results are"))
    assert main(["bench", "models", "--providers", "fastnn", "torch", "--threads", "1"]) == 1


def test_make_bench_quick_keeps_its_results() -> None:
    makefile = Path(__file__).parents[1] / "Makefile"
    target = makefile.read_text().partition("\nbench-quick:")[2].partition("\n\n")[0]
    assert "--json report/" in target


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["poetry"], "unknown family 'poetry'; there are: activation, attention, conv, embedding, matmul, models, norm, pool, rnn, "
                  "softmax, startup"),
     (["matmul", "--threads", "0"], "--threads is 0; it must be 1 or more"),
     (["matmul", "--dtype", "int8"], "dtype is 'int8'; allowed: float32"),
     (["matmul", "--case", "nowhere"], "no case matches 'nowhere' in: matmul"),
     (["matmul", "--providers", "abacus"], "no provider is called 'abacus'; there are: fastnn, torch, sdpa.flash, sdpa.cudnn"),
     (["matmul", "--cold", "--interleaved"], "not allowed with argument")],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # by argparse, whose status is also 2
        assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_startup_is_measured_in_new_processes() -> None:
    providers, _ = run.available_peers(["fastnn", "torch"])
    case = next(c for c in cases.cases("startup") if c.name == "first_linear/warm")
    found = {r.provider: r for r in run.measure_processes(case, 1, providers, runs=1)}
    assert found["fastnn"].correct
    assert 0 < (found["fastnn"].median or 0) < 600
    assert found["torch"].median
    broken = case.on(programs={"fastnn": "raise SystemExit('no such kernel')", "torch": "print(0.5, False)"})
    found = {r.provider: r for r in run.measure_processes(broken, 1, providers, runs=1)}
    assert found["fastnn"].missing == "no such kernel"
    assert [r.correct for r in found.values()] == [False, False]
    assert [r.median for r in found.values()] == [None, None]


def test_a_provider_that_is_far_too_slow_sits_out() -> None:
    """One call of it says enough; five rounds of them would take minutes."""
    times = timing.measure({"slow": lambda: time.sleep(0.05), "fast": lambda: None}, 0.01)
    assert times["slow"].runs < 3 < times["fast"].runs
