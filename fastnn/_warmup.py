"""``python -m fastnn warmup``: compile every kernel into the cache now, so that no later call waits for a compiler."""

from __future__ import annotations

import time
from argparse import Namespace

import torch
from torch import Tensor

from . import functional, verify
from ._info import cache, size
from ._numerics import results


def call(check: verify.Check, dtype: torch.dtype) -> None:
    """One forward and, where there is one, one backward: kernels are built a dtype, not a shape."""
    run = check.ours or check.theirs
    inputs = check.make(dtype)
    out = results(lambda *values: run(functional, *values), inputs, None)[0]
    if any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        results(lambda *values: run(functional, *values), inputs, torch.ones_like(out))


def main(arguments: Namespace) -> int:
    """Call every operator of the named families, or of all, once a dtype, with a progress bar, and say what is in the cache.

    Raises:
        ValueError: an unknown family or dtype.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .kernels.cpu.engine.build import Kernel
    from .kernels.cpu.engine.overhead import no_rules

    dtypes = verify.dtypes(arguments.dtype)
    console = Console()
    # Special values meet no other kernels than usual ones.
    jobs = [
        (check, dtype)
        for check in verify.checks(arguments.family)
        if not check.name.endswith("special values")
        for dtype in dtypes
    ]
    before, begin = cache()["kernels"], time.perf_counter()
    with Progress(
        TextColumn("{task.description:<50}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bar, no_rules():
        task = bar.add_task("", total=len(jobs))
        for check, dtype in jobs:
            bar.update(task, description=f"{check.name}, {str(dtype).removeprefix('torch.')}")
            call(check, dtype)
            bar.advance(task)
        # Kernels that no small example reaches, such as those for large sizes only.
        names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
        rest = [
            k
            for name, k in Kernel.registry.items()
            if len(dtypes) > 1 or any(part in names for part in name.split("_"))
        ]
        task = bar.add_task("the remaining kernels", total=len(rest))
        for kernel in rest:
            kernel.load()
            bar.advance(task)
    kept = cache()
    console.print(
        f"{kept['kernels'] - before} kernels compiled, {kept['kernels']} in {kept['folder'] or 'memory only'} "
        f"({size(kept['bytes'])}), {time.perf_counter() - begin:.1f} s",
        soft_wrap=True,
        highlight=False,
    )
    return 0
