"""``python -m fastnn bench``: from the arguments to the files."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastnn.verify import dtypes

from . import report
from .cases import Case, families
from .limits import Limits
from .run import Record, available_peers, header, run, select

SECONDS = {"quick": 0.25, "full": 1.0}


def main(arguments: Namespace) -> int:
    """Run the benchmark; 0 if every result was right, 1 if one was red, 130 if interrupted.

    Raises:
        ValueError: an unknown family, dtype or number of threads, or no case is left.
    """
    chosen = select(arguments.family or families(), dtypes(arguments.dtype)[0] if arguments.dtype else None, arguments.case, arguments.quick)
    threads = arguments.threads or [torch.get_num_threads()]
    if wrong := [n for n in threads if n < 1]:
        raise ValueError(f"--threads is {wrong[0]}; it must be 1 or more")
    if arguments.json:
        Path(arguments.json).resolve().parent.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if os.isatty(1) else 170)
    seconds = SECONDS["quick" if arguments.quick else "full"]
    providers, missing = available_peers(arguments.providers)
    headers, records, interrupted = [], [], False
    for count in threads:
        limits = Limits(count)
        headers.append(header(limits, providers, missing))
        report.print_header(console, headers[-1])
        lines = report.Lines(console, [p.name for p in providers])
        lines.head()
        mine: list[Record] = []
        bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       console=console, transient=True, auto_refresh=False)  # a refreshing thread would disturb the clock
        with bar:
            task = bar.add_task(chosen[0][0].name, total=len(chosen))
            bar.refresh()
            position = iter([*(case.name for case, _ in chosen[1:]), ""])

            def done(case: Case, dtype: torch.dtype, new: list[Record]) -> None:
                mine.extend(new)
                records.extend(new)
                lines.case(new)
                if arguments.json:
                    report.save_json(Path(arguments.json), headers, records)
                bar.update(task, advance=1, description=next(position))
                bar.refresh()

            try:
                run(chosen, count, seconds, providers, done, limits)
            except KeyboardInterrupt:
                interrupted = True
        report.print_summary(console, report.summary(chosen, mine))
        if interrupted:
            console.print(f"Interrupted: {len(mine)} of {len(chosen) * len(providers)} results"
                          + (f", saved in {arguments.json}" if arguments.json else ""), style="yellow")
            break
    if arguments.plot:
        for path in report.plot(Path(arguments.plot), headers[-1], records):
            console.print(f"plotted {path}")
    if arguments.json and records:
        console.print(f"saved {arguments.json}")
    return 130 if interrupted else int(any(r.correct is False for r in records))
