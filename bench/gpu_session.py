"""All that a machine with a GPU is asked for, in one command and bounded time: ``make gpu``.

The tests of the GPU kernels, compute-sanitizer on a few of them if it is there, then the benchmark family by family. Each is a
process of its own, with its share of the time; one that is out of time is interrupted, and what it has finished is kept. Nothing
has to be installed: this runs from a checkout with the machine's own Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastnn import backends

from . import gpu, report

#: Families in the order of how much there is to learn from them: what comes last may not be reached.
FAMILIES = ("matmul", "attention", "conv", "rnn", "softmax", "norm", "pool", "activation", "embedding")
TESTS, SANITIZER = 0.35, 0.1  # the most of the time that they may take
GRACE = 20.0  # seconds for a process that was interrupted to save what it has


@dataclass(frozen=True)
class Step:
    """A process, the file that its output goes to, and the most of the whole time that it may take, if it is limited."""

    name: str
    command: list[str]
    log: Path
    share: float | None = None


def plan(families: Sequence[str], folder: Path, device: str, only: str | None = None) -> list[Step]:
    """What is run, in its order. ``only``: a pattern of cases, for a rehearsal."""
    python = sys.executable
    several = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    tests = [python, "-m", "pytest", "tests", "-m", "gpu", "-q", *several]
    steps = [Step("tests", tests, folder / "tests.txt", TESTS)]
    if shutil.which("compute-sanitizer"):
        few = [python, "-m", "pytest", "tests", "-m", "gpu", "-q", "-k", "sizes or long or cut", "-p", "no:xdist"]
        command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *few]
        steps.append(Step("compute-sanitizer", command, folder / "sanitizer.txt", SANITIZER))
    for family in families:
        command = [python, "-m", "fastnn", "bench", family, "--quick", "--device", device, "--save"]
        command += ["--json", str(folder / f"{family}-last.json"), "--html", str(folder / f"{family}.html")]
        steps.append(Step(family, [*command, *(["--case", only] if only else [])], folder / f"{family}.txt"))
    return steps


def _interruptible() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(step: Step, seconds: float) -> str:
    """"ok", "failed (status)" or "out of time": what was finished until then is in its files."""
    step.log.parent.mkdir(parents=True, exist_ok=True)
    with step.log.open("w") as log:
        process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_interruptible)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return "out of time"
    return "ok" if status == 0 else f"failed ({status})"


def session(steps: Sequence[Step], minutes: float) -> dict[str, str]:
    """Run all steps within the time; a family has an equal share of what is left when its turn comes."""
    end = time.monotonic() + 60 * minutes
    results: dict[str, str] = {}
    for at, step in enumerate(steps):
        left = end - time.monotonic() - GRACE
        if left <= 0:
            results[step.name] = "not reached"
        else:
            seconds = left / (len(steps) - at) if step.share is None else min(left, step.share * 60 * minutes)
            begin = time.monotonic()
            results[step.name] = run(step, seconds)
            print(f"{step.name}: {results[step.name]}, {time.monotonic() - begin:.0f} s, {step.log}", flush=True)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all went well, 1 if a step failed or was not reached, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"families to measure (default: {' '.join(FAMILIES)})")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--case", metavar="PATTERN", help="measure only cases whose name contains this")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same steps on the CPU")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.family) - set(FAMILIES):
        parser.error(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    if not arguments.rehearse and not torch.cuda.is_available():
        print(f"make gpu: {backends.without_gpu()}", file=sys.stderr)
        return 2
    device = "cpu" if arguments.rehearse else gpu.DEVICE
    folder = Path("report/rehearsal") if arguments.rehearse else report.RESULTS / report.slug({"gpu": gpu.describe()})
    results = session(plan(arguments.family or FAMILIES, folder, device, arguments.case), arguments.minutes)
    for name, result in results.items():
        print(f"{name:20} {result}")
    return int(any(result != "ok" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
