"""``python -m fastnn warmup``: compile every kernel into the cache now, so that no later call waits for a compiler."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from importlib import import_module
from multiprocessing import get_context, parent_process
from threading import Thread

import torch
from torch import Tensor

from . import functional, verify
from ._checks import CHECKS
from ._info import cache, size
from ._numerics import results


def call(check: verify.Check, dtype: torch.dtype) -> None:
    """One forward and, where there is one, one backward: kernels are built a dtype, not a shape."""
    run = check.ours or check.theirs
    inputs = check.make(dtype)
    out = results(lambda *values: run(functional, *values), inputs, None)[0]
    if any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        results(lambda *values: run(functional, *values), inputs, torch.ones_like(out))


def _jobs(families: list[str], dtypes: list[torch.dtype]) -> list[Callable[[], object]]:
    """What needs all kernels between them: the large ones, which have names from the start, and calls that meet the others."""
    from .kernels.cpu.engine.build import Kernel

    checks = verify.checks(families)
    for family in families or CHECKS:
        import_module(f"fastnn.kernels.cpu.{family}")
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    known = [
        kernel.load
        for name, kernel in Kernel.registry.items()
        if len(dtypes) > 1 or any(part in names for part in name.split("_"))
    ]
    # Special values meet no other kernels than usual ones.
    return known + [
        partial(call, check, dtype)
        for check in checks
        if not check.name.endswith("special values")
        for dtype in dtypes
    ]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_the_parent() -> None:
    """In a process that compiles: if the one that it compiles for is killed, nobody else would end it."""
    parent = parent_process()
    assert parent

    def wait_for_the_end() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait_for_the_end, daemon=True).start()


def main(arguments: Namespace) -> int:
    """Compile what the operators of the named families, or of all, need: each kernel once, in a process a core.

    Every operator is called once a dtype. A call that meets a kernel which is not there has it compiled in another process, and
    is made again when that is done.

    Raises:
        ValueError: an unknown family or dtype; no cache to keep kernels in.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .kernels.cpu.engine.build import Kernel, Missing, compiled_elsewhere
    from .kernels.cpu.engine.overhead import no_rules

    before, begin = cache(), time.perf_counter()
    if not before["folder"]:
        raise ValueError("there is no cache to fill; set FASTNN_CACHE_DIR to a folder")
    jobs = _jobs(arguments.family, verify.dtypes(arguments.dtype))
    console = Console()
    bar = Progress(TextColumn("{task.description:<50}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    task = bar.add_task("", total=len(jobs))
    pool = ProcessPoolExecutor(_cores(), get_context("spawn"), _end_with_the_parent)  # started when there is work for them
    running: dict[Future[bytes], Kernel] = {}
    waiting: dict[str, list[Callable[[], object]]] = {}  # calls, by the kernel that they were ended by

    def attempt(job: Callable[[], object]) -> None:
        try:
            job()
        except Missing as missing:
            kernel = missing.kernel
            if kernel.name not in waiting:
                running[pool.submit(Kernel.compile, kernel)] = kernel
            waiting.setdefault(kernel.name, []).append(job)
        else:
            bar.advance(task)

    try:
        with bar, no_rules(), compiled_elsewhere():
            for job in jobs:
                attempt(job)
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    kernel = running.pop(future)
                    bar.update(task, description=kernel.name)
                    try:
                        future.result()
                        kernel.load()
                    except Exception as problem:
                        problem.add_note(f"{kernel.name} could not be compiled, or not be kept.")
                        raise
                    for job in waiting[kernel.name]:
                        attempt(job)
    finally:
        pool.shutdown(cancel_futures=True)
    kept = cache()
    console.print(
        f"{kept['kernels'] - before['kernels']} kernels compiled, {kept['kernels']} in {kept['folder']} "
        f"({size(kept['bytes'])}), {time.perf_counter() - begin:.1f} s",
        soft_wrap=True,
        highlight=False,
    )
    return 0
