"""One benchmark run: for each case the check, then the stopwatch, then the arithmetic; and the results as they come."""

from __future__ import annotations

import fnmatch
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastnn._numerics import TORCH, Error, error, results, widen

from . import gpu, memory
from . import peers as peer_module
from .cases import Case, cases
from .limits import Limits
from .peers import OURS, Job, Peer, TorchEager, Work
from .timing import Neighbours, Times, evict, load_average, measure

#: A case is called unsteady from these on: spread of the samples, share of other processes, loss of clock speed, and
#: how often a second a thread of ours lost its core.
SPREAD, SHARE, DRIFT, SWITCHES = 0.25, 0.05, 0.07, 100
#: Families that a GPU is asked for in bfloat16 too: its matrix units, and torch's flash attention and cuDNN's, have no float32.
_LOWER = ("matmul", "attention", "conv")
#: Products that read less are not limited by memory.
_CACHED = 4 << 20
DRIFTED = "the multiply-add loop right after ran at {:.0%} of its best (clock, or a core that was not ours)"
#: What is said of a case that is faster than its limit.
DISTURBED = "faster than the limit that was measured: the limit was disturbed"
FEWER = "faster than the multiply-add limit: fewer operations are done than are counted (Winograd), or the limit was disturbed"

METHOD = (
    "Every provider's result is checked against float64 before it is timed. Providers run in rotating blocks, each "
    "after a pause (30 ms, and until no thread pool spins any more) and three discarded calls. {} Every provider "
    "allocates its output anew in each call, and so do the copies that memory-bound cases are compared with: {}."
)
#: Where outputs lie, by whether glibc keeps what is freed: see ``memory.kept``.
ALLOCATIONS = {
    True: "glibc is told to keep what is freed, so that all of these lie in pages that are there already, as with jemalloc; by "
    "its default an output above 32 MiB is new pages in each call, which the system clears first, at a cost alike for everyone",
    False: "where those lie is the system's business, and large ones may be new pages in each call",
}
GPU_METHOD = (
    "Every provider's result is checked against float64 before it is timed. Providers run in rotating blocks, each after "
    "three discarded calls. A call is timed by CUDA events, and before each twice the L2 cache is read; a case in which a "
    "call takes less than 20 µs is timed in CUDA graphs by all providers, with inputs in L2. TF32 is off, and cuDNN "
    "chooses by trial."
)
#: The ways to time: what happens between two samples.
METHODS = {
    "warm": "Caches are warm: the same inputs every call.",
    "cold": "Caches are cold: before every call twice their size is read, and the thread pools have gone to sleep.",
    "interleaved": "Every call comes right after PyTorch's own for the same case, as in a half-replaced model; PyTorch "
    "after itself is the base line.",
}


@dataclass
class Record:
    """One case and provider. Times are in seconds and None where nothing was timed: see ``correct`` and ``missing``.

    Attributes:
        correct: within the error rule; None if the provider is missing.
        rate: operations or bytes a second in units of 10⁹, as ``unit`` says.
        limit: what limits the case on this machine ("fma", "read" or "copy"); ``limit_fraction`` is how near this
            comes, ``limit_rate`` the rate at the limit, in the same unit.
        ratio: the best peer's time over this one's: above 1, this provider is faster than the best peer (never above
            1 for a peer).
        flops, bytes: operations and least memory traffic of one call; 0 where the case does not count them.
        error_ulp: largest error against the float64 reference; torch_error_ulp: PyTorch's own.
        memory: bytes by which the process grew at most during a call, the result included.
        method: what happens between two samples: see METHODS, and on a GPU ``gpu.EVENTS`` and ``gpu.GRAPHS``.
        between: with "interleaved", the median of PyTorch's calls between this provider's.
        missing: why this provider did not take part.
        served_by: which kernel of ours did the work.
        notes: what makes the numbers doubtful; remarks: what else a reader must know of them.
        run: the ``started`` of the header of the run that it comes from.
    """

    family: str
    case: str
    dtype: str
    threads: int
    mode: str
    provider: str
    correct: bool | None = None
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    runs: int = 0
    rate: float | None = None
    unit: str | None = None
    limit: str | None = None
    limit_fraction: float | None = None
    ratio: float | None = None
    error_ulp: float | None = None
    torch_error_ulp: float | None = None
    memory: int | None = None
    method: str = "warm"
    between: float | None = None
    missing: str | None = None
    served_by: str | None = None
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    flops: int = 0
    bytes: int = 0
    run: str = ""
    limit_rate: float | None = None

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def select(
    families: Iterable[str],
    dtype: torch.dtype | None = None,
    pattern: str | None = None,
    quick: bool = False,
    device: str = "cpu",
) -> list[tuple[Case, torch.dtype]]:
    """The cases to run on a device. ``pattern`` is a shell pattern, or a part of the name; it overrides ``quick``. On a GPU they
    are those that are for a GPU alone, where a family has some: a CPU's are too small for it.

    Raises:
        ValueError: an unknown family, or no case is left.
    """
    chosen: dict[tuple[str, str, str, torch.dtype], tuple[Case, torch.dtype]] = {}
    for family in families:
        listed = [case for case in cases(family) if device in case.devices]
        if device == gpu.DEVICE and not pattern:
            listed = [case for case in listed if case.devices == (device,)] or listed
        for case in listed:
            if pattern in case.name or fnmatch.fnmatch(case.name, pattern) if pattern else case.quick or not quick:
                also = device == gpu.DEVICE and case.devices != (device,) and family in _LOWER
                lower = (torch.bfloat16,) if also else ()
                for kind in (dtype,) if dtype else (*case.dtypes, *lower):
                    chosen.setdefault((family, case.name, case.mode, kind), (case, kind))
    if not chosen:
        raise ValueError(f"no case matches {pattern!r} in: {', '.join(families)}")
    return list(chosen.values())


# Correctness ----------------------------------------------------------------------------------------------------------


def check(job: Job, works: dict[str, Work]) -> tuple[Error, dict[str, Error]]:
    """PyTorch's own error, which is the yardstick, and each provider's."""
    case = job.case
    inputs, grad = [widen(v) for v in job.inputs], widen(job.grad)
    reference = case.reference or case.theirs
    true = _judged(case, inputs, results(lambda *values: reference(TORCH, *values), inputs, grad))
    scales = case.scale(inputs, grad) if case.scale else (None,) * len(true)
    yardstick = _judged(case, job.inputs, results(lambda *values: case.theirs(TORCH, *values), job.inputs, job.grad))

    def worst(found: tuple[Any, ...], other: tuple[Tensor | None, ...]) -> Error:
        tensors = tuple(t if isinstance(t, Tensor) else torch.as_tensor(t) for t in found)
        if found is not yardstick:
            tensors = _judged(case, job.inputs, tensors)
        return sum(
            (error(*four, forward=grad is None) for four in zip(tensors, true, scales, other, strict=True)), Error()
        )

    return worst(yardstick, (None,) * len(true)), {name: worst(work(), yardstick) for name, work in works.items()}


def _judged(case: Case, inputs: Sequence[Any], found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(case.judge(t, *inputs) for t in found) if case.judge else found


# The limits of a case -------------------------------------------------------------------------------------------------


def limit_of(
    case: Case, dtype: torch.dtype, limits: Limits | gpu.Limits, again: bool = False, method: str = "warm"
) -> tuple[str, float] | None:
    """What limits a case, and the seconds that it takes at that limit: arithmetic or memory, whichever takes longer.

    With ``again`` memory is measured once more, and the better of the measurements counts. Where caches are cold, inputs of any
    size come from memory; in a CUDA graph they lie in L2, and memory is no limit.
    """
    size = dtype.itemsize
    bounds = []
    if case.flops:
        bounds.append((case.flops / limits.fma(dtype), "fma"))
    moved = [(reads * size, writes * size) for reads, writes in case.passes]
    if method != gpu.GRAPHS and moved and (not case.flops or sum(map(sum, moved)) > _CACHED or method == "cold"):
        name = "read" if all(writes * 8 < reads for reads, writes in moved) else "copy"
        bounds.append((sum(limits.memory(*one, again=again, cold=method == "cold") for one in moved), name))
    if not bounds:
        return None
    seconds, name = max(bounds)
    return name, seconds


def fill(
    records: list[Record], times: dict[str, Times], case: Case, dtype: torch.dtype, limit: tuple[str, float] | None
) -> None:
    """The arithmetic: rates, fractions of the limit, ratios to the best peer."""
    peers = [t.median for name, t in times.items() if name != OURS]
    for record in records:
        record.flops, record.bytes = case.flops, case.bytes(dtype)
        if record.provider not in times:
            continue
        t = times[record.provider]
        record.median, record.p20, record.p80, record.runs = t.median, t.p20, t.p80, t.runs
        record.between = t.between if record.method == "interleaved" else None
        work, record.unit = (case.flops, "GFLOP/s") if case.flops else (case.bytes(dtype), "GB/s")
        record.rate = work / t.median / 1e9 if work else None
        if peers:
            record.ratio = min(peers) / t.median
        if t.spread > SPREAD:
            record.notes.append(f"spread {t.spread:.0%}")
    compare_with_limit(records, limit)


def compare_with_limit(records: Iterable[Record], limit: tuple[str, float] | None) -> None:
    """How near each comes to the case's limit: what takes so many seconds, see ``limit_of``."""
    for record in records:
        record.notes = [note for note in record.notes if note != DISTURBED]
        record.remarks = [remark for remark in record.remarks if remark != FEWER]
        if limit is None or not record.median:
            continue
        record.limit, record.limit_fraction = limit[0], limit[1] / record.median
        record.limit_rate = record.rate * record.median / limit[1] if record.rate else None
        if record.limit_fraction > 1.05:
            if record.limit == "fma":
                record.remarks.append(FEWER)
            else:
                record.notes.append(DISTURBED)


def refill(chosen: Iterable[tuple[Case, torch.dtype]], records: Sequence[Record], limits: Limits | gpu.Limits) -> None:
    """The same for a whole run, once its limits are known as well as they will be."""
    by: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        by.setdefault((r.family, r.case, r.mode, r.dtype), []).append(r)
    for case, dtype in chosen:
        mine = by.get((case.family, case.name, case.mode, dtype_name(dtype)), [])
        if any(r.limit for r in mine):
            compare_with_limit(mine, limit_of(case, dtype, limits, method=mine[0].method))


# The run --------------------------------------------------------------------------------------------------------------


def _served_by(work: Work) -> str | None:
    """Which kernels did our work."""
    from fastnn import backends

    with backends.trace() as calls:
        work()
    names = dict.fromkeys(f"{c.op}: {c.backend}" + (f" ({c.reason})" if c.reason else "") for c in calls)
    return "; ".join(names) or None


def _available_memory(on_gpu: bool = False) -> int | None:
    if on_gpu:
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    return next(
        int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line.startswith("MemAvailable")
    )


def measure_case(
    case: Case,
    dtype: torch.dtype,
    threads: int,
    providers: list[Peer],
    limits: Limits | gpu.Limits,
    seconds: float,
    method: str = "warm",
) -> list[Record]:
    """Check and time one case with every provider that can do it, and measure the memory that a call takes."""
    on_gpu = isinstance(limits, gpu.Limits)
    device = gpu.DEVICE if on_gpu else "cpu"
    records = [
        Record(
            case.family,
            case.name,
            dtype_name(dtype),
            threads,
            case.mode,
            peer.name,
            method=gpu.EVENTS if on_gpu else method,
            missing=peer.missing(case, dtype, threads)
            if peer.takes_part(case, device)
            else f"{peer.name} is not for {case.family} on {device}",
        )
        for peer in providers
    ]
    memory.trim()  # every case begins with the same heap, whatever the one before has left
    available = _available_memory(on_gpu)
    needed = 3 * 8 * max(map(sum, case.passes), default=0)  # the float64 reference and its intermediates
    if available is not None and needed > available:
        for record in records:
            record.missing = f"the check needs {needed >> 30} GiB of memory, {available >> 30} are free"
        return records
    try:
        job = Job.of(case, dtype, threads, device)
    except (ImportError, NotImplementedError) as problem:  # a whole model that is not there, or has one dtype only
        for record in records:
            record.missing = str(problem)
        return records
    with torch.set_grad_enabled(case.mode != "forward"), ExitStack() as settings:
        works: dict[str, Work] = {}
        for peer, record in zip(providers, records, strict=True):
            if record.missing:
                continue
            settings.enter_context(peer.settings(threads))
            try:
                work = peer.prepare(job)
                work()
            except Exception as problem:  # a provider that fails is a finding about it, not the end of the run
                if peer.name == OURS:
                    record.correct = False
                record.missing = _reason(problem)
                continue
            works[peer.name] = work
            if peer.name == OURS:
                record.served_by = _served_by(work)
        try:
            torch_error, errors = check(job, works)
        except torch.cuda.OutOfMemoryError as problem:  # float64 is too large for this GPU, which is no fault of anyone's
            for record in records:
                record.missing = record.missing or f"the check needs more memory than there is: {_reason(problem)}"
            return records
        for record in records:
            if record.provider in errors:
                found = errors[record.provider]
                record.correct = found.within(torch_error, dtype)
                record.error_ulp, record.torch_error_ulp = found.worst, torch_error.worst
                if found.specials > torch_error.specials:
                    record.remarks.append(
                        f"{found.specials} NaN or infinite values where the reference has none, or the reverse"
                    )
        gc.collect()
        # A red case prints no speed, and a peer with wrong results is no peer.
        right = {name: work for name, work in works.items() if errors[name].within(torch_error, dtype)}
        for record in records:
            if record.provider in right:
                record.memory = (gpu if on_gpu else memory).extra(right[record.provider])
        limit_of(case, dtype, limits, method=method)
        between = evict(_last_cache()) if method == "cold" else None
        if method == "interleaved":
            between = TorchEager().prepare(job)
        neighbours = Neighbours()
        if not on_gpu:
            times = measure(right, seconds, between=between)
        else:
            times, how, problems = gpu.measure(right, seconds)
            for record in records:
                record.method = how
                record.remarks += problems
        doubts = _doubts(neighbours)
        now = limits.refresh_fma(dtype)
        drift = 1 - now / limits.fma(dtype)
        fill(records, times, case, dtype, limit_of(case, dtype, limits, again=True, method=records[0].method))
    if drift > DRIFT:
        doubts.append(DRIFTED.format(1 - drift))
    for record in records:
        record.notes += doubts
    return records


def _reason(problem: Exception) -> str:
    """What went wrong, in a line."""
    return f"{type(problem).__name__}: {(str(problem).strip() or 'no reason given').splitlines()[0]}"[:300]


def _failed(case: Case, dtype: torch.dtype, threads: int, providers: list[Peer], problem: Exception) -> list[Record]:
    """A case that could not be checked or timed: red, and without any speed."""
    return [
        Record(case.family, case.name, dtype_name(dtype), threads, case.mode, peer.name,
               correct=False if peer.name == OURS else None, missing=_reason(problem))
        for peer in providers
    ]  # fmt: skip


def _doubts(neighbours: Neighbours) -> list[str]:
    """What others took from us while we measured, where it is worth saying."""
    doubts = []
    share, stolen, switches = neighbours.share(), neighbours.stolen(), neighbours.switches()
    if share is not None and share > SHARE:
        doubts.append(f"others used {share:.0%} of the machine")
    if stolen is not None and stolen > SHARE / 2:
        doubts.append(f"the hypervisor gave {stolen:.0%} of it to other machines")
    if switches > SWITCHES * neighbours.seconds():
        doubts.append(f"our threads lost their cores {switches} times")
    return doubts


def _last_cache() -> int:
    """The bytes of all last caches together: some CPUs have one for every few cores."""
    from fastnn import _info

    places = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3/shared_cpu_list")
    count = len({place.read_text() for place in places}) or 1
    return count * max(_info.machine().get("caches", {}).values(), default=32 << 20)


def measure_processes(case: Case, threads: int, providers: list[Peer], runs: int = 3) -> list[Record]:
    """A case whose samples are new processes: the programs of all providers in turn."""
    records = [
        Record(
            case.family,
            case.name,
            "float32",
            threads,
            case.mode,
            peer.name,
            missing=None if peer.name in case.programs else "not part of this case",
        )
        for peer in providers
    ]
    there = {r.provider: r for r in records if not r.missing}
    samples: dict[str, list[float]] = {name: [] for name in there}
    root = str(Path(import_module("fastnn").__file__ or "").parent.parent)
    for _ in range(2 if case.cold else runs):
        for name, record in there.items():
            with TemporaryDirectory() as empty:
                environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": str(threads)}
                if case.cold:
                    environment |= {"FASTNN_CACHE_DIR": empty, "TORCHINDUCTOR_CACHE_DIR": empty}
                done = subprocess.run(
                    [sys.executable, "-c", case.programs[name]],
                    cwd=empty,
                    env=environment,
                    capture_output=True,
                    text=True,
                )
            if done.returncode:
                record.correct, record.missing = False, (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
                continue
            seconds, right = done.stdout.split()
            record.correct = right == "True" and record.correct is not False
            samples[name].append(float(seconds))
    times = {name: Times.of(values) for name, values in samples.items() if values and there[name].correct}
    fill(records, times, case, torch.float32, None)
    return records


def available_peers(
    names: Sequence[str] | None = None, quick: bool = False, device: str | None = None
) -> tuple[list[Peer], dict[str, str]]:
    """The providers (of the given names, or all; or all of a device) that can be imported, and why the others are not there.

    With ``quick``, those that take long to get ready must be named.

    Raises:
        ValueError: a name that no provider has.
    """
    known = [kind.name for kind in peer_module.PEERS]
    for name in names or ():
        if name not in known:
            raise ValueError(f"no provider is called {name!r}; there are: {', '.join(known)}")
    there, missing = [], {}
    for kind in peer_module.PEERS:
        if kind.name not in names if names is not None else device not in (None, *kind.devices):
            continue
        if quick and names is None and kind.slow:
            missing[kind.name] = f"too slow to get ready for a quick run, unless named: --providers {kind.name}"
            continue
        try:
            there.append(kind())
        except ImportError as problem:
            missing[kind.name] = str(problem)
    return there, missing


def header(
    limits: Limits | gpu.Limits, providers: list[Peer], missing: dict[str, str], method: str = "warm", seconds: float = 1.0
) -> dict[str, Any]:
    """Machine, versions, limits and method of a run, and for how many seconds it times each call."""
    from fastnn import _info

    on_gpu = isinstance(limits, gpu.Limits)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "machine": _info.machine() | ({"gpu": gpu.describe()} if on_gpu else {}),
        "versions": _info.versions(),
        "threads": limits.threads,
        "seconds": seconds,
        "environment": {
            k: v
            for k, v in os.environ.items()
            if k.startswith(("FASTNN_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_"))
            and k != "FASTNN_CACHE_DIR"  # where files lie is nobody's business
        },
        "providers": {p.name: p.version for p in providers},
        "missing": missing,
        "load_average": load_average(),
        "limits": limits.describe(),
        "method": GPU_METHOD if on_gpu else METHOD.format(METHODS[method], ALLOCATIONS[memory.keeps]),
    }


def run(
    chosen: list[tuple[Case, torch.dtype]],
    threads: int,
    seconds: float,
    providers: list[Peer],
    done: Callable[[Case, torch.dtype, list[Record]], None],
    limits: Limits | gpu.Limits | None = None,
    method: str = "warm",
) -> None:
    """Measure the chosen cases one after the other; ``done`` gets each as soon as it is finished."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    limits = limits or Limits(threads)
    try:
        for case, dtype in chosen:
            if case.programs:
                done(case, dtype, measure_processes(case, threads, providers))
            else:
                try:
                    records = measure_case(case, dtype, threads, providers, limits, seconds, method)
                except Exception as problem:  # a finding about this case, and not the end of the run
                    records = _failed(case, dtype, threads, providers, problem)
                done(case, dtype, records)
            gc.collect()
    finally:
        torch.set_num_threads(before)
