"""What a call costs before the GPU has anything to do: Python, checks and the launch. ``python -m fastnn.bench.launches FILE``

``--stand-in`` in the file's place: without a GPU, by a driver that does nothing; a real one takes some 2 µs a launch besides.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import fastnn.functional as F

from . import gpu, stand_in

#: Calls of a sample: fewer than a stream holds, so that none of them waits.
NUMBER, SAMPLES = 200, 15
GOAL = 12e-6


def calls(device: str) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Small calls without a gradient, ours and torch's"""
    x, w, b = (torch.randn(*shape, device=device) for shape in ((8, 64), (64, 64), (64,)))
    x16, w16, b16 = (torch.randn(*shape, device=device).bfloat16() for shape in ((512, 512), (512, 512), (512,)))
    image, filters = (torch.randn(*shape, device=device).bfloat16() for shape in ((1, 64, 8, 8), (64, 64, 3, 3)))
    heads = torch.randn(1, 4, 64, 64, device=device).bfloat16()
    their = torch.nn.functional
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "relu": (lambda: F.relu(x, backend="gpu"), lambda: their.relu(x)),
        "linear": (lambda: F.linear(x, w, b, backend="gpu"), lambda: their.linear(x, w, b)),
        "linear by maps": (lambda: F.linear(x16, w16, b16, backend="gpu"), lambda: their.linear(x16, w16, b16)),
        "softmax": (lambda: F.softmax(x, -1, backend="gpu"), lambda: their.softmax(x, -1)),
        "layer_norm": (lambda: F.layer_norm(x, (64,), backend="gpu"), lambda: their.layer_norm(x, (64,))),
        "attention": (
            lambda: F.scaled_dot_product_attention(heads, heads, heads, backend="gpu"),
            lambda: their.scaled_dot_product_attention(heads, heads, heads),
        ),
        "conv2d": (lambda: F.conv2d(image, filters, padding=1, backend="gpu"), lambda: their.conv2d(image, filters, padding=1)),
    }
    if device == gpu.DEVICE:  # kernels in CUDA C, which are not Triton's to launch
        pairs["max_pool2d"] = (lambda: F.max_pool2d(image, 2, backend="gpu"), lambda: their.max_pool2d(image, 2))
    return pairs


def seconds(call: Callable[[], object], wait: Callable[[], object]) -> float:
    """Of a call, until it returns; the GPU is waited for between samples only."""
    for _ in range(20):
        call()
    samples = []
    for _ in range(SAMPLES):
        wait()
        begin = time.perf_counter()
        for _ in range(NUMBER):
            call()
        samples.append((time.perf_counter() - begin) / NUMBER)
    wait()
    return median(samples)


def without_gpu() -> int:
    """Prints a line an op: a call that comes again, and one that is thought through."""
    stand_in.begin()
    print("without a GPU, a driver that does nothing: again, and as at first")
    with torch.no_grad():
        for name, (ours, _) in calls("cpu").items():
            again = seconds(ours, lambda: None)
            with stand_in.forgetful():
                first = seconds(ours, lambda: None)
            print(f"{name:16} {again * 1e6:6.1f} µs {first * 1e6:6.1f} µs", flush=True)
    return 0


def main(path: Path) -> int:
    """Prints a line an op and writes them; an op that fails is named and costs nobody else's line. 1 if one failed."""
    found: dict[str, dict[str, object]] = {}
    for name, (ours, theirs) in calls(gpu.DEVICE).items():
        try:
            with torch.no_grad():
                found[name] = {
                    "ours": seconds(ours, torch.cuda.synchronize), "torch": seconds(theirs, torch.cuda.synchronize), "goal": GOAL,
                }  # fmt: skip
            print(f"{name:16} {found[name]['ours'] * 1e6:6.1f} µs, torch {found[name]['torch'] * 1e6:6.1f} µs")  # type: ignore[operator]
        except Exception as problem:
            found[name] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
            print(f"{name:16} {found[name]['failed']}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds a call until it returns": found}, indent=1) + "\n")
    return int(any("failed" in one for one in found.values()))


if __name__ == "__main__":
    sys.exit(without_gpu() if sys.argv[1] == "--stand-in" else main(Path(sys.argv[1])))
