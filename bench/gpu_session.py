"""All that a machine with a GPU is asked for, in one command and bounded time: ``make gpu``.

The tests of the GPU kernels, a process a family, side by side; compute-sanitizer on a few of them, if it is there; what a call
costs before the GPU has anything to do; then the benchmark, family by family: beside torch, and in a second round, as far as time
allows, beside torch.compile too. Each is a process with its share of the time: one that is out of time is interrupted and
then ended with all that it has started, and what it has finished is kept. After each step ``summary.txt``, ``index.html`` and
``session.json`` tell of all that there is. Nothing has to be installed: this runs from a checkout with the machine's own Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastnn import _info, backends

from . import gpu, report

#: Families in the order of how much there is to learn from them: what comes last may not be reached.
FAMILIES = ("matmul", "attention", "conv", "rnn", "softmax", "norm", "pool", "activation", "embedding")
INFO, TESTS, SANITIZER, LAUNCHES = 0.05, 0.33, 0.1, 0.05  # the most of the time that they may take
GRACE = 12.0  # seconds for a process that was interrupted to save what it has
LEAST = 20.0  # seconds in which a family gets somewhere: torch and Triton are imported, a case or two are done

#: Tests without a kernel in them: they are for machines without a GPU.
_ELSEWHERE = ("compile", "session")
#: What runs under compute-sanitizer, which makes it 10 to 100 times slower: all kernels in CUDA C, a few in Triton.
_SANITIZED = {
    "memcheck": ("test_gpu_rnn.py::test_layers_side_by_side", "test_gpu_rnn.py::test_one_layer", "test_gpu_rnn.py::test_16_bits",
                 "test_gpu_pool.py::test_adaptive", "test_gpu_pool.py::test_unpool", "test_gpu_matmul.py::test_sizes",
                 "test_gpu_softmax.py::test_rows_and_columns", "test_gpu_attention.py::test_few_queries_share_out_their_keys",
                 "test_gpu_conv.py::test_nothing_beyond_the_tensors_is_read"),
    "racecheck": ("test_gpu_rnn.py::test_layers_side_by_side", "test_gpu_rnn.py::test_16_bits", "test_gpu_rnn.py::test_scan",
                  "test_gpu_pool.py::test_windows"),
}  # fmt: skip
#: The providers of the first round: all but those that have to compile.
_READY = ("fastnn", "torch")
_SDPA = ("sdpa.flash", "sdpa.cudnn", "sdpa.efficient", "sdpa.math")


@dataclass(frozen=True)
class Step:
    """A process, the file that its output goes to, and its time: the most of the whole, or an equal part of what its round has
    left."""

    name: str
    command: list[str]
    log: Path
    share: float | None = None
    round: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


def sanitizer() -> str | None:
    """compute-sanitizer, where CUDA's toolkit has it"""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{place}/bin" for place in places if place)])
    return shutil.which("compute-sanitizer", path=path)


def _tests(folder: Path) -> list[Step]:
    """A process a file, so that one that ends, hangs or loses the GPU takes nobody else's results along."""
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--color=no"]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", "2"]  # a test that ends its process is one failure then, and not the end of the file
    if importlib.util.find_spec("pytest_timeout"):
        pytest += ["--timeout", "60", "--timeout-method", "thread"]
    names = sorted(path.stem.removeprefix("test_gpu_") for path in Path("tests").glob("test_gpu_*.py"))
    return [
        Step(f"tests of {name}", [*pytest, f"tests/test_gpu_{name}.py"], folder / f"tests-{name}.txt", TESTS)
        for name in names if name not in _ELSEWHERE
    ]  # fmt: skip


def _checks(folder: Path) -> list[Step]:
    """memcheck sees torch's allocations one by one only if torch does not keep them in a pool."""
    tool = sanitizer()
    if tool is None:
        return []
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step(name, [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-v", "--tb=short", "-x",
                    "-p", "no:xdist", *(f"tests/{test}" for test in tests)],
             folder / f"{name}.txt", SANITIZER, environment=environment)
        for name, tests in _SANITIZED.items()
    ]  # fmt: skip


def plan(families: Sequence[str], folder: Path, device: str, only: str | None = None, long: bool = False) -> list[list[Step]]:
    """What is run, in its order; what is listed together runs side by side. ``only``: a pattern of cases, for a rehearsal;
    ``long``: no tests, but all cases that are for a GPU."""
    python = sys.executable
    phases = [[Step("info", [python, "-m", "fastnn", "info"], folder / "info.txt", INFO)]]
    if not long:
        phases += [_tests(folder), _checks(folder)]
    if device != "cpu":
        command = [python, "-m", "fastnn.bench.launches", str(folder / "launches.json")]
        phases.append([Step("launches", command, folder / "launches.txt", LAUNCHES)])
    for round, providers in enumerate((_READY, ()) if device != "cpu" else (_READY,), 1):
        for family in families:
            command = [python, "-m", "fastnn", "bench", family, "--device", device]
            command += [] if long else ["--quick"]
            command += ["--save"] if device != "cpu" else ["--json", str(folder / f"{family}.json")]
            command += ["--case", only] if only else []
            if providers:
                command += ["--providers", *providers, *(_SDPA if family == "attention" and device != "cpu" else ())]
            name = family if round == 1 else f"{family}, compiled"
            phases.append([Step(name, command, folder / f"{name.replace(', ', '-')}.txt", round=round)])
    return [steps for steps in phases if steps]


# Running --------------------------------------------------------------------------------------------------------------


def _begin(step: Step) -> subprocess.Popen[bytes]:
    """The process, with a group of its own. (What a shell starts in the background ignores Ctrl-C, and so would this.)"""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": ".", **step.environment}
    step.log.parent.mkdir(parents=True, exist_ok=True)
    with step.log.open("w") as log:
        return subprocess.Popen(
            step.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt those that still run, after a while end them, and whatever they have left behind, which would keep the GPU."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    end = time.monotonic() + GRACE
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(steps: Sequence[Step], seconds: float) -> list[str]:
    """Of each step, all at the same time: "ok", "failed (status)" or "out of time": what was finished is in its files."""
    running: dict[int, subprocess.Popen[bytes]] = {}
    results = ["out of time"] * len(steps)
    end = time.monotonic() + seconds
    try:
        for n, step in enumerate(steps):
            try:
                running[n] = _begin(step)
            except OSError as problem:
                results[n] = f"failed ({problem.strerror})"
        for n, process in running.items():
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(max(0.0, end - time.monotonic()))
                results[n] = "ok" if status == 0 else f"failed ({status})"
    finally:
        _end(list(running.values()))
    return results


Tell = Callable[[Mapping[str, str], Mapping[str, float]], None]


def session(phases: Sequence[Sequence[Step]], minutes: float, tell: Tell = lambda results, seconds: None) -> dict[str, str]:
    """Run all phases within the time; those of a round share what is left. ``tell`` gets results and seconds after each."""
    end = time.monotonic() + 60 * minutes
    results: dict[str, str] = {}
    lasted: dict[str, float] = {}
    for at, steps in enumerate(phases):
        left = end - time.monotonic() - GRACE
        if left <= 0:
            found, begin = ["not reached"] * len(steps), time.monotonic()
        else:
            first, begin = steps[0], time.monotonic()
            alike = sum(phase[0].round == first.round for phase in phases[at:])
            share = first.share * 60 * minutes if first.share is not None else max(LEAST, left / alike)
            try:
                found = run(steps, min(left, share))
            except KeyboardInterrupt:
                found, end = ["interrupted"] * len(steps), begin  # nothing else is reached
        for step, result in zip(steps, found, strict=True):
            results[step.name], lasted[step.name] = result, time.monotonic() - begin
            print(f"{step.name}: {result}, {lasted[step.name]:.0f} s, {step.log}", flush=True)
        try:
            tell(results, lasted)
        except Exception:  # what is measured matters more than how it is told
            traceback.print_exc()
    return results


# Telling --------------------------------------------------------------------------------------------------------------


def _commit() -> str | None:
    """The commit that is checked out, where there is git"""
    with suppress(OSError):
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        return done.stdout.strip() or None
    return None


def _last_line(log: Path) -> str:
    """How pytest, or whatever it was, ended"""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip(" =") if lines else ""


def _write(path: Path, text: str) -> None:
    """Whole at any moment"""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def tell(folder: Path, facts: Mapping[str, Any], logs: Mapping[str, Path], results: Mapping[str, str],
         seconds: Mapping[str, float]) -> None:  # fmt: skip
    """session.json, summary.txt and index.html, of all that there is so far"""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [{"step": name, "result": result, "seconds": round(seconds.get(name, 0.0), 1),
             "last line": _last_line(logs[name]) if name in logs else ""} for name, result in results.items()]  # fmt: skip
    _write(folder / "session.json", json.dumps({**facts, "steps": rows}, indent=1, ensure_ascii=False) + "\n")
    console = Console(file=io.StringIO(), width=200)
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", highlight=False, markup=False)
    for row in rows:
        console.print(f"{row['step']:24} {row['result']:14} {row['seconds']:6} s  {row['last line'][:140]}", highlight=False,
                      markup=False)  # fmt: skip
    headers, records = [], []
    for family in FAMILIES:
        path = folder / f"{family}.json"
        if not path.exists():
            continue
        try:
            its_headers, mine = report.load(path)
        except ValueError as problem:
            console.print(f"\n{problem}", markup=False)
            continue
        headers += its_headers
        records += mine
        console.print(f"\n{family}", markup=False)
        lines = report.Lines(console, list(dict.fromkeys(r.provider for r in mine)))
        lines.head()
        for case in dict.fromkeys((r.case, r.mode, r.dtype) for r in mine):
            lines.case([r for r in mine if (r.case, r.mode, r.dtype) == case])
    assert isinstance(console.file, io.StringIO)
    _write(folder / "summary.txt", console.file.getvalue())
    if headers:
        from . import page

        images = {}
        if importlib.util.find_spec("matplotlib"):
            from . import plots

            images = dict(plots.figures(headers, records))
        _write(folder / "index.html", page.html(headers, records, images))


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all went well, 1 if a step failed or was not reached, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"families to measure (default: {' '.join(FAMILIES)})")
    parser.add_argument("--minutes", type=float, help="for everything (default: 9, or 28 with --long)")
    parser.add_argument("--long", action="store_true", help="no tests, but every case that is for a GPU, timed for longer")
    parser.add_argument("--case", metavar="PATTERN", help="measure only cases whose name contains this")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same steps on the CPU")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.family) - set(FAMILIES):
        parser.error(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    if not arguments.rehearse and not torch.cuda.is_available():
        print(f"make gpu: {backends.without_gpu()}", file=sys.stderr)
        return 2
    device, minutes = "cpu" if arguments.rehearse else gpu.DEVICE, arguments.minutes or (28.0 if arguments.long else 9.0)
    facts: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit()}
    facts |= {"gpu": None if arguments.rehearse else gpu.describe(), "versions": _info.versions(), "minutes": minutes}
    folder = Path("report/rehearsal") if arguments.rehearse else report.RESULTS / report.slug(facts)
    phases = plan(arguments.family or FAMILIES, folder, device, arguments.case, arguments.long)
    logs = {step.name: step.log for steps in phases for step in steps}
    unchecked = "is not installed: nothing was checked for races and stray accesses"
    without = {} if arguments.long or sanitizer() else {"compute-sanitizer": unchecked}

    def told(results: Mapping[str, str], seconds: Mapping[str, float]) -> None:
        tell(folder, facts, logs, {**results, **without}, seconds)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a limit from outside: what is there is kept, as at Ctrl-C
    results = session(phases, minutes, told)
    for name, result in (results | without).items():
        print(f"{name:24} {result}")
    print(f"all of it: {folder}/summary.txt, index.html, session.json")
    return int(any(result != "ok" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
