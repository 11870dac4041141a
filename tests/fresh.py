"""A program in a process of its own, as ``python`` starts one, but forked from one that has imported torch and done no more: that
import is most of what such a test costs.

What must not have torch, or sets what torch reads when it is imported (OpenMP's variables), needs ``subprocess``.
"""

import multiprocessing
import os
import runpy
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["torch"])


def _main(program: list[str], env: Mapping[str, str], cwd: str, outputs: list[str]) -> None:
    for number, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    first, *sys.argv = program
    if first == "-c":
        sys.argv.insert(0, "-c")
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(program[1], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv.insert(0, first)
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def python(*program: str, env: Mapping[str, str], cwd: Path, timeout: float = 300) -> "CompletedProcess[str]":
    """``python -c CODE``, ``python -m MODULE ARGUMENTS`` or ``python FILE ARGUMENTS`` in the folder and environment: its exit
    status (negative: the signal that ended it) and what it wrote."""
    with TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("out", "err")]
        process = _forks.Process(target=_main, args=(list(program), dict(env), str(cwd), [str(o) for o in outputs]))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(program, timeout)
        return CompletedProcess(program, process.exitcode, *(o.read_text() for o in outputs))
