# ruff: noqa: E402
"""What a call that comes again hands to the driver, beside what the same call does at first. Run as a script, in a process of its
own: Triton must not be in its interpreter. A line of JSON a call: "ok", or what differs."""

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch
from torch import Tensor

import fastnn.bench.stand_in as stand_in
from fastnn import ops

driver = stand_in.begin()

from fastnn.kernels.gpu.engine.replay import Tape

LAUNCHES, GRID, EXPECTED = (ctypes.c_int.in_dll(driver, name) for name in ("launches", "grid", "expected"))
WORDS = (ctypes.c_longlong * 128).in_dll(driver, "words")
kinds: list[str] = []  # of the parameters of the last kernel that was recorded


def look(call: Callable[[], Any], count: int) -> tuple[int, int, list[int], list[Tensor]]:
    """(launches, grid and so many parameters of the last one, results)"""
    before, EXPECTED.value = LAUNCHES.value, count
    found = call()
    EXPECTED.value = 0
    masks = [2**64 - 1 if kind[0] == "*" or kind == "i64" else 2**32 - 1 for kind in kinds[:count]]
    results = list(found) if type(found) is tuple else [found]
    return LAUNCHES.value - before, GRID.value, [w & m for w, m in zip(WORDS, masks)], results


def fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def compare(op: Any, args: tuple[Any, ...]) -> str:
    right, counts = Tape.launched, []

    def launched(self: Tape, compiled: Any, programs: int, given: Any) -> None:
        right(self, compiled, programs, given)
        kinds[:] = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
        counts.append(len(kinds))

    Tape.launched = launched
    for memory in (op._met, op._replays):
        memory.clear()
    for _ in range(2):  # the second one is recorded
        op.call(*fresh(args), None)
    Tape.launched = right
    replays = dict(op._replays)
    assert len(replays) == 1, replays
    assert all(replays.values()), "not recorded"
    given = fresh(args)
    again = look(lambda: op.call(*given, None), min(counts))
    op._replays.clear()
    first = look(lambda: op.call(*given, None), min(counts))
    if again[:2] != first[:2]:
        return f"launches and grid: {again[:2]}, {first[:2]}"
    inputs = {a.data_ptr() for a in given if isinstance(a, Tensor)}
    for at, (kind, mine, theirs) in enumerate(zip(kinds, again[2], first[2])):
        same = mine == theirs
        if kind[0] == "*" and not same:  # results and what lies between are somewhere else each time
            same = not {mine, theirs} & inputs
            for m, t in zip(again[3], first[3], strict=True):
                begins = mine - m.data_ptr(), theirs - t.data_ptr()
                same = same and (begins[0] == begins[1] or not any(0 <= b < m.nbytes for b in begins))
        if not same:
            return f"parameter {at}, {kind}: {mine:x}, {theirs:x}"
    return "ok"


def r(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


HEADS, ATTEND = r(1, 2, 200, 64), (None, None, None, None, 0.0, 0, 0.25, -1, 0, True, 0, 0.0)
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (ops.activation.activation, (r(6, 40)[:, ::2], "gelu", [])),
    (ops.matmul.linear, (r(256, 512), r(512, 512), r(512), None, "relu")),
    (ops.matmul.linear, (r(8, 4096), r(256, 4096), None, None, None)),
    (ops.matmul.matmul, (r(5, 7, dtype=torch.float32), r(7, 9, dtype=torch.float32))),
    (ops.softmax.softmax, (r(5, 1000), -1)),
    (ops.norm.add_layer_norm, (r(5, 64), r(5, 64), r(64), r(64), [64], 1e-5)),
    (ops.attention.attention, (HEADS, HEADS, HEADS, *ATTEND)),
    (ops.conv.conv, (r(2, 64, 8, 8), r(64, 64, 3, 3), r(64), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, "relu")),
    (ops.embedding.embedding, (r(100, 64), torch.arange(12), -1, False)),
]

if __name__ == "__main__":
    with torch.no_grad():
        for op, args in CALLS:
            print(json.dumps([op.name, compare(op, args)]), flush=True)
