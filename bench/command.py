"""``python -m fastnn bench``: from the arguments to the files."""

from __future__ import annotations

import os
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastnn.verify import dtypes

from . import compare, gpu, memory, models, report
from .cases import Case, families
from .estimate import estimate
from .limits import Limits
from .peers import OURS, PEERS, Peer
from .run import Record, available_peers, header, refill, run, select

SECONDS = {"quick": 0.2, "full": 1.0}


def main(arguments: Namespace) -> int:
    """Run the benchmark; 0 if all our results were right, 1 if one was red, 130 if interrupted.

    A peer's red result is shown, and has no speed, but is nothing that we could mend.

    ``bench compare`` compares two results instead: see ``compare.main``.

    Raises:
        ValueError: an unknown family, dtype or number of threads, no case is left, or a CPU's method on a GPU.
        ImportError: matplotlib is not installed, and a plot or page is wanted.
    """
    if arguments.device != gpu.DEVICE:
        with memory.kept():
            return _main(arguments)
    gpu.require()
    if arguments.cold or arguments.interleaved:
        option = "--cold" if arguments.cold else "--interleaved"
        raise ValueError(f"{option} is a way to time a CPU; on a GPU every call finds its L2 cache flushed, or comes in a graph")
    with gpu.session():
        return _main(arguments)


def _main(arguments: Namespace) -> int:
    console = Console(width=None if os.isatty(1) else 200)
    if arguments.family[:1] == ["compare"]:
        return compare.main(console, arguments.family[1:])
    chosen = select(
        arguments.family or families(),
        dtypes(arguments.dtype)[0] if arguments.dtype else None,
        arguments.case,
        arguments.quick,
        arguments.device,
    )
    on_gpu = arguments.device == gpu.DEVICE
    threads = [torch.get_num_threads()] if on_gpu else arguments.threads or [torch.get_num_threads()]
    if wrong := [n for n in threads if n < 1]:
        raise ValueError(f"--threads is {wrong[0]}; it must be 1 or more")
    if arguments.plot or arguments.html:
        import_module("matplotlib")  # said now if it is missing, not after the run
    seconds = SECONDS["quick" if arguments.quick else "full"]
    method = "cold" if arguments.cold else "interleaved" if arguments.interleaved else "warm"
    providers, missing = available_peers(arguments.providers, arguments.quick, arguments.device)
    if not arguments.providers:  # who has nothing to do with any of the cases need not be told of
        providers = [p for p in providers if any(p.takes_part(case, arguments.device) for case, _ in chosen)]
    else:
        missing |= {p.name: "not asked for" for p in PEERS if p.name not in arguments.providers
                    and arguments.device in p.devices
                    and (not p.families or {case.family for case, _ in chosen} & set(p.families))}  # fmt: skip
    headers: list[dict[str, Any]] = []
    records: list[Record] = []
    save = _Saver(arguments, headers, records)
    interrupted = False
    for count in threads:
        limits: Limits | gpu.Limits = gpu.Limits() if on_gpu else Limits(count)
        headers.append(header(limits, providers, missing, method, seconds))
        report.print_header(console, headers[-1])
        if count == threads[0]:
            left = report.minutes(estimate(chosen, providers, seconds, headers[-1]) * len(threads))
            written = arguments.json or arguments.save or arguments.html or arguments.plot
            kept = "Ctrl-C keeps what is finished" if written else "nothing is written without --json FILE or --save"
            console.print(f"{len(chosen)} cases: about {left} if nothing else runs; {kept}.")
        mine, interrupted = _run(console, chosen, count, seconds, providers, limits, method, save)
        refill(chosen, mine, limits)
        headers[-1]["limits"] |= limits.known()
        report.print_limits(console, headers[-1], "limits, the best of the whole run")
        interrupted = interrupted or not _layer_tables(console, headers[-1], mine)
        report.print_summary(console, report.summary(chosen, mine))
        report.print_missing(console, mine)
        report.print_doubts(console, mine)
        if interrupted:
            console.print(
                f"Interrupted after {len({(r.case, r.mode, r.dtype) for r in mine})} of {len(chosen)} cases",
                style="yellow",
            )
            break
    if records:
        save([], limits)  # with what has come after the last case
        for path in [*save.files(), *save.pictures()]:
            console.print(f"saved {path}")
    return 130 if interrupted else int(any(r.correct is False for r in records if r.provider == OURS))


def _layer_tables(console: Console, header: dict[str, Any], records: list[Record]) -> bool:
    """Where the time of each whole model goes; False if the user has interrupted: what is finished stays."""
    try:
        for name in dict.fromkeys(r.case for r in records if r.family == "models" and r.provider == OURS and r.median):
            rows = models.layer_table(name)
            header.setdefault("layers", {})[name] = rows
            models.print_layers(console, name, rows)
    except KeyboardInterrupt:
        return False
    return True


class _Saver:
    """Keeps all records of all runs, and the files up to date.

    A family's file among the committed results keeps what this run did not measure again.
    """

    def __init__(self, arguments: Namespace, headers: list[dict[str, Any]], records: list[Record]) -> None:
        self.arguments, self.headers, self.records = arguments, headers, records
        self._earlier: dict[Path, tuple[list[dict[str, Any]], list[Record]]] = {}

    def files(self) -> dict[Path, list[Record]]:
        """Which records are written where."""
        found = {Path(self.arguments.json): self.records} if self.arguments.json else {}
        if self.arguments.save:
            folder = report.RESULTS / report.slug(self.headers[0]["machine"])
            for r in self.records:
                found.setdefault(folder / f"{r.family}.json", []).append(r)
        return found

    def __call__(self, new: list[Record], limits: Limits | gpu.Limits) -> None:
        for r in new:
            r.run = self.headers[-1]["started"]
        self.records += new
        # The limits are those of the whole run: the best that was measured in it.
        self.headers[-1]["limits"] |= limits.known()
        for path, records in self.files().items():
            if str(path) != self.arguments.json and path not in self._earlier:
                self._earlier[path] = report.load(path) if path.exists() else ([], [])
            report.save_json(path, *report.merge(*self._earlier.get(path, ([], [])), self.headers, records))

    def pictures(self) -> list[Path]:
        """Draw the plots and write the page of whatever is there; the files written."""
        if not (self.arguments.plot or self.arguments.html):
            return []
        from . import page, plots

        images = dict(plots.figures(self.headers, self.records))
        files: dict[Path, bytes] = {}
        if self.arguments.plot:
            files = {Path(self.arguments.plot, f"{name}.png"): png for name, png in images.items()}
        if self.arguments.html:
            files[Path(self.arguments.html)] = page.html(self.headers, self.records, images).encode()
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return list(files)


def _run(
    console: Console,
    chosen: list[tuple[Case, torch.dtype]],
    threads: int,
    seconds: float,
    providers: list[Peer],
    limits: Limits | gpu.Limits,
    method: str,
    save: _Saver,
) -> tuple[list[Record], bool]:
    """The records of one number of threads, and whether the user has interrupted."""
    lines = report.Lines(console, [p.name for p in providers], [case.name for case, _ in chosen])
    lines.head()
    mine: list[Record] = []
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        auto_refresh=False,
    )  # a refreshing thread would disturb the clock
    with bar:
        task = bar.add_task(chosen[0][0].name, total=len(chosen))
        bar.refresh()
        following = iter([*(case.name for case, _ in chosen[1:]), ""])

        def done(case: Case, dtype: torch.dtype, new: list[Record]) -> None:
            mine.extend(new)
            lines.case(new)
            save(new, limits)
            bar.update(task, advance=1, description=next(following))
            bar.refresh()

        try:
            run(chosen, threads, seconds, providers, done, limits, method)
        except KeyboardInterrupt:
            return mine, True
    return mine, False
