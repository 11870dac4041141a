"""What a call costs before the GPU has anything to do: Python, checks and the launch. ``python -m fastnn.bench.launches FILE``"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import fastnn.functional as F

from .gpu import DEVICE

#: Calls of a sample: fewer than a stream holds, so that none of them waits.
NUMBER, SAMPLES = 200, 15
GOAL = 12e-6


def calls() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Small calls without a gradient, ours and torch's"""
    x, w, b = (torch.randn(*shape, device=DEVICE) for shape in ((8, 64), (64, 64), (64,)))
    image = torch.randn(1, 8, 8, 8, device=DEVICE)
    their = torch.nn.functional
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "relu": (lambda: F.relu(x, backend="gpu"), lambda: their.relu(x)),
        "linear": (lambda: F.linear(x, w, b, backend="gpu"), lambda: their.linear(x, w, b)),
        "softmax": (lambda: F.softmax(x, -1, backend="gpu"), lambda: their.softmax(x, -1)),
        "layer_norm": (lambda: F.layer_norm(x, (64,), backend="gpu"), lambda: their.layer_norm(x, (64,))),
        "max_pool2d": (lambda: F.max_pool2d(image, 2, backend="gpu"), lambda: their.max_pool2d(image, 2)),
    }
    return pairs


def seconds(call: Callable[[], object]) -> float:
    """Of a call, until it returns; the GPU is waited for between samples only."""
    for _ in range(20):
        call()
    samples = []
    for _ in range(SAMPLES):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(NUMBER):
            call()
        samples.append((time.perf_counter() - begin) / NUMBER)
    torch.cuda.synchronize()
    return median(samples)


def main(path: Path) -> int:
    """Prints a line an op and writes them; an op that fails is named and costs nobody else's line. 1 if one failed."""
    found: dict[str, dict[str, object]] = {}
    for name, (ours, theirs) in calls().items():
        try:
            with torch.no_grad():
                found[name] = {"ours": seconds(ours), "torch": seconds(theirs), "goal": GOAL}
            print(f"{name:12} {found[name]['ours'] * 1e6:6.1f} µs, torch {found[name]['torch'] * 1e6:6.1f} µs")  # type: ignore[operator]
        except Exception as problem:
            found[name] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
            print(f"{name:12} {found[name]['failed']}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds a call until it returns": found}, indent=1) + "\n")
    return int(any("failed" in one for one in found.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
