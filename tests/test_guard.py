"""No kernel touches memory outside its arguments and results; see guard.py."""

import os
import signal
from importlib import import_module, util
from pathlib import Path

import pytest
import torch

import fresh
from fastnn._checks import CHECKS
from guard import CASES, LAYOUTS, PAGE, Placed, cases

HERE = Path(__file__).resolve().parent
DTYPES = ("float32", "float64", "bfloat16", "float16")


def guarded(family: str) -> list[str]:
    """What went wrong, one line a case; after a crash the cases behind it run too."""
    wrong: list[str] = []
    first = finished = 0
    while len(wrong) < 10:
        program = (str(HERE / "guard.py"), family, str(first), *DTYPES)
        done = fresh.python(*program, env={**os.environ, "PYTHONPATH": str(HERE.parent)}, cwd=HERE, timeout=900)
        lines = done.stdout.splitlines()
        started = [line for line in lines if line.startswith("case ")]
        names = {line.split()[1]: line for line in started}
        wrong += [f"{line} of {names[line.split()[1]]}" for line in lines if line.startswith("wrong ")]
        finished += len(started)
        if done.returncode == 0 and lines[-1] == "done":
            break
        if done.returncode >= 0 or not started:  # not a crash: the cases themselves are wrong
            return [f"exit {done.returncode}\n{done.stderr[-3000:]}"]
        wrong.append(f"exit {done.returncode} in {started[-1]}\n{done.stderr[:1000]}")
        first = int(started[-1].split()[1]) + 1
    assert finished > 100, "hardly a case was run"
    return wrong


@pytest.mark.parametrize("family", CASES)
def test_nothing_outside_is_touched(family: str) -> None:
    assert guarded(family) == []


@pytest.mark.parametrize("family", CASES)
def test_every_kernel_has_cases(family: str) -> None:
    kernels = import_module(f"fastnn.kernels.cpu.{family}").KERNELS
    assert {case.op for _, case in cases(family, torch.float32)} == set(kernels)


def test_every_family_has_cases() -> None:
    assert set(CASES) == {family for family in CHECKS if util.find_spec(f"fastnn.kernels.cpu.{family}")}


TOUCH = """
import ctypes, os, sys, torch
sys.path.insert(0, {here!r})
from guard import Placed
for end, offset in [("front", -1), ("front", 0), ("back", 20), ("back", 19)]:
    child = os.fork()
    if not child:
        t = Placed(torch.arange(5.0), end).tensor
        os.write(1, b"touching ")
        ctypes.memmove(ctypes.create_string_buffer(4), t.data_ptr() + offset, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def test_the_pages_are_unreadable() -> None:
    """The number before each end of a tensor, and the first and last that are its own"""
    done = fresh.python("-c", TOUCH.format(here=str(HERE)), env=os.environ, cwd=HERE)
    crashed = f"touching -{signal.SIGSEGV}"
    assert done.stdout.splitlines() == [crashed, "touching 0", crashed, "touching 0"], done.stderr


@pytest.mark.parametrize("end", ["front", "back"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_placed_keeps_values_and_strides(layout, end) -> None:  # type: ignore[no-untyped-def]
    t = layout(torch.randn(5, 7))
    placed = Placed(t, end)
    assert torch.equal(placed.tensor, t)
    assert placed.tensor.stride() == t.stride()
    border = placed.tensor.data_ptr() if end == "front" else placed.tensor[-1, -1].data_ptr() + 4
    assert border % PAGE == 0
    assert not placed.changed_outside()
    placed.tensor[2, 3] = 0.0
    assert placed.changed()
    assert not placed.changed_outside()
    placed.readable[len(placed.readable) // 2] = 0
    assert placed.changed_outside()
