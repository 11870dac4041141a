"""How results are shown and kept: lines as they come, a summary against the goals, JSON."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cases import Case
from .peers import OURS
from .run import Record, dtype_name

SHORT = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}


def duration(seconds: float | None) -> str:
    """Three digits and a unit."""
    if seconds is None:
        return "–"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def span(r: Record) -> str:
    """What one call and four calls in five beat, and of how many samples: 1.96–2.04 ms, 50."""
    if r.p20 is None or r.p80 is None:
        return "–"
    (low, small), (high, large) = (duration(t).split() for t in (r.p20, r.p80))
    return f"{low if small == large else f'{low} {small}'}–{high} {large}, {r.runs}"


def best_peer(records: Iterable[Record]) -> Record | None:
    """The fastest of a case's providers but us."""
    return min((r for r in records if r.provider != OURS and r.median), key=lambda r: r.median or 0, default=None)


def share(r: Record) -> str:
    """How near a record comes to which limit, and its rate in the record's unit: 58% of 50.9 read."""
    if not r.limit_fraction:
        return ""
    at = f"{r.limit_rate:.3g} " if r.limit_rate else ""
    how = f"{r.limit_fraction:.{0 if r.limit_fraction >= 0.01 else 1}%}" if r.limit_fraction >= 0.001 else "<0.1%"
    return f"{how} of {at}{r.limit}"


def minutes(seconds: float) -> str:
    """A time that nobody knows exactly."""
    return f"{max(10, round(seconds, -1)):.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


# The lines of a run ---------------------------------------------------------------------------------------------------


class Lines:
    """One line a case, printed when it is finished."""

    def __init__(self, console: Console, providers: Sequence[str], cases: Sequence[str] = ()) -> None:
        self.console = console
        self.peers = [name for name in providers if name != OURS]
        self._width = [max(map(len, ("case", *cases))), 9, 5, 9, 20, 13, 16, *(max(9, len(p)) for p in self.peers)]
        self._width += [7 + max(map(len, self.peers), default=0), 13]
        self._left_out: list[str] = []
        while self.peers and sum(self._width) + len(self._width) - 1 > console.width:  # the best one is named in any case
            self._left_out.insert(0, self.peers.pop())
            del self._width[-3]

    def head(self) -> None:
        """What the columns mean."""
        names = ["case", "mode", "dtype", OURS, "p20–p80, runs", "rate", "of limit", *self.peers, "best", "ulp (torch)"]
        if self._left_out:
            self.console.print(f"There is no room for columns of {', '.join(self._left_out)}.", style="dim")
        self.console.print(Text(self._row(names), style="bold"), soft_wrap=True)

    def _row(self, cells: Iterable[str]) -> str:
        first, *rest = (
            cell.ljust(w) if n == 0 else cell.rjust(w)
            for n, (cell, w) in enumerate(zip(cells, self._width, strict=False))
        )
        return " ".join([first, *rest])

    def case(self, records: Sequence[Record]) -> None:
        """The line of one case, and one more for each thing that a reader must know of it."""
        by = {r.provider: r for r in records}
        ours = by.get(OURS)
        main = ours or next((r for r in records if r.median), records[0])
        cells = [
            main.case,
            main.mode,
            SHORT.get(main.dtype, main.dtype),
            "red" if ours and ours.correct is False else duration(ours.median if ours else None),
            span(main),
            f"{main.rate:.4g} {main.unit}" if main.rate else "–",
            share(main) or "–",
        ]
        for peer in self.peers:
            r = by.get(peer)
            if r is None or r.median is None:
                cells.append("red" if r and r.correct is False else "missing")
            elif ours and ours.median:
                cells.append(f"{r.median / ours.median:.2f}×")
            else:
                cells.append(duration(r.median))
        best = best_peer(records)
        cells.append(f"{ours.ratio:.2f}× {best.provider}" if ours and ours.ratio and best else "–")
        cells.append(f"{main.error_ulp:.3g} ({main.torch_error_ulp:.3g})" if main.error_ulp is not None else "–")
        red = any(r.correct is False for r in records)
        slower = bool(ours and ours.ratio and ours.ratio < 1)
        self.console.print(Text(self._row(cells), style="red" if red else "yellow" if slower else ""), soft_wrap=True)
        for r in records:
            if r.correct is False:
                why = (
                    r.missing
                    or f"error {r.error_ulp:.4g} ulp where torch has {r.torch_error_ulp:.4g}: no speed is reported"
                )
                self.console.print(Text(f"  RED {r.provider}: {why}", style="red"))
            elif r.missing and r.provider == OURS:
                self.console.print(Text(f"  {r.provider} is missing: {r.missing}", style="yellow"))
        notes, remarks = ({r.provider: said(r) for r in records} for said in (lambda r: r.notes, lambda r: r.remarks))
        for what, said in (("unsteady", notes), ("note", remarks)):
            if any(said.values()):
                self.console.print(Text(f"  {what}: " + "; ".join(_each_once(said)), style="dim"))
        if ours and ours.between:
            alone = by.get("torch")
            self.console.print(
                Text(
                    f"  torch's own call took {duration(ours.between)} between ours"
                    + (f", {duration(alone.between)} between its own" if alone and alone.between else ""),
                    style="dim",
                )
            )
        if ours and ours.served_by and "torch" in ours.served_by:
            self.console.print(Text(f"  served by {ours.served_by}", style="dim"))


def _each_once(said: dict[str, list[str]]) -> Iterable[str]:
    """What is said of every provider, and of one with its name."""
    return dict.fromkeys(
        note if all(note in notes for notes in said.values()) else f"{provider}: {note}"
        for provider, mine in said.items()
        for note in mine
    )


def print_header(console: Console, header: dict[str, Any]) -> None:
    """The machine, its limits, and how the numbers are made."""
    m, limits = header["machine"], header["limits"]
    console.print(
        f"[bold]{processor(m)}[/], {m['cores']} cores, {header['threads']} threads; "
        + ", ".join(f"{name} {v}" for name, v in header["versions"].items() if v),
        highlight=False,
    )
    print_limits(console, header)
    for what, rates in limits.get("bandwidth_gbs", {}).items():
        console.print(
            f"{what}: " + ", ".join(f"{level} {rate:.0f}" for level, rate in rates.items()) + " GB/s", highlight=False
        )
    if m["affinity"] is not None and len(m["affinity"]) != m["cores"]:
        console.print(f"This process may use only cores {m['affinity']}.", style="yellow")
    console.print(header["method"], style="dim")
    if header["load_average"] is not None and header["load_average"] > 0.5:
        console.print(
            f"The machine is not idle: load average {header['load_average']:.2f} before the run.", style="yellow"
        )
    for name, why in header["missing"].items():
        console.print(f"{name} is missing: {why}", style="yellow")


def print_limits(console: Console, header: dict[str, Any], title: str = "limits") -> None:
    """Arithmetic, and memory at 64 MiB."""
    limits = header["limits"]
    one = limits.get("fma_gflops_one_core", {})
    fma = ", ".join(
        f"{SHORT[k]} {v:.0f}" + (f" ({one[k]:.0f} one core)" if k in one else "")
        for k, v in limits["fma_gflops"].items()
    )
    memory = (
        f"copy {limits['copy_gbs_memory']:.0f}"
        if "gpu" in header["machine"]
        else f"64 MiB: read {limits['read_gbs_64MiB']:.0f}, copy {limits['copy_gbs_64MiB_new_output']:.0f}, "
        f"copy into new pages {limits['copy_gbs_64MiB_new_pages']:.1f}"
    )
    console.print(f"{title}: multiply-add {fma} GFLOP/s; {memory} GB/s", highlight=False)


# The summary ----------------------------------------------------------------------------------------------------------


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean of logarithms."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _reached(
    goal: str, ours: Record, peers: dict[str, Record], all_ours: dict[tuple[str, str, str], Record]
) -> float | None:
    """What a case reached of one goal; None where the run did not measure it."""
    if goal == "limit":
        return ours.limit_fraction
    if goal == "seconds":
        return ours.median
    if goal in ("best", "mean"):
        return ours.ratio
    if goal == "float32":
        other = all_ours.get((ours.case, ours.mode, "float32"))
    else:
        other = peers.get(goal)
    return other.median / ours.median if other and other.median and ours.median else None


def summary(chosen: Sequence[tuple[Case, torch.dtype]], records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each group of cases and goal: the wish, what was reached (worst and geometric mean), and the worst case."""
    all_ours = {(r.case, r.mode, r.dtype): r for r in records if r.provider == OURS}
    rows: dict[tuple[str, str, str, str, float], list[tuple[float, str]]] = {}
    for case, dtype in chosen:
        ours = all_ours.get((case.name, case.mode, dtype_name(dtype)))
        if ours is None:
            continue
        peers = {r.provider: r for r in records if (r.case, r.mode, r.dtype) == (ours.case, ours.mode, ours.dtype)}
        for goal, wish in case.goals.items():
            value = _reached(goal, ours, peers, all_ours)
            if value is not None:
                rows.setdefault((case.group, case.mode, ours.dtype, goal, wish), []).append((value, case.name))
    result = []
    for (group, mode, dtype_, goal, wish), values in rows.items():
        mean = geometric_mean([v for v, _ in values])
        worst, where = max(values) if goal == "seconds" else min(values)
        result.append(
            {
                "group": group,
                "mode": mode,
                "dtype": dtype_,
                "goal": goal,
                "wish": wish,
                "mean": mean,
                "worst": worst,
                "worst_case": where,
                "cases": len(values),
                "reached": worst <= wish if goal == "seconds" else (mean if goal == "mean" else worst) >= wish,
            }
        )
    return result


_GOALS = {
    "limit": "of the limit",
    "best": "× the best peer",
    "mean": "× the best peer, geometric mean",
    "float32": "× our float32",
    "seconds": "s",
}


def print_summary(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table(title="What was reached", title_justify="left")
    for name in ("group", "mode", "dtype", "goal", "geometric mean", "worst", "worst case", ""):
        table.add_column(name, justify="right" if name in ("geometric mean", "worst") else "left")
    for r in rows:
        table.add_row(
            f"{r['group']} ({r['cases']})",
            r["mode"],
            r["dtype"],
            f"{'≤' if r['goal'] == 'seconds' else '≥'} {r['wish']:.3g} {_GOALS.get(r['goal'], '× ' + r['goal'])}",
            f"{r['mean']:.2f}",
            f"{r['worst']:.2f}",
            r["worst_case"],
            "[green]reached[/]" if r["reached"] else "[red]not yet[/]",
        )
    console.print(table)


def unsteady(records: Sequence[Record]) -> tuple[int, int]:
    """How many cases have a note, on our record or the best peer's, that makes their ratio doubtful; and how many there are."""
    cases: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        cases.setdefault((r.family, r.case, r.mode, r.dtype), []).append(r)
    doubtful = 0
    for mine in cases.values():
        best = best_peer(mine)
        doubtful += any(r.notes for r in mine if r.provider == OURS or r is best)
    return doubtful, len(cases)


def print_doubts(console: Console, records: Sequence[Record]) -> None:
    """Say it if the machine was not quiet enough to quote the numbers."""
    doubtful, cases = unsteady(records)
    if doubtful:
        console.print(
            f"{doubtful} of {cases} cases were unsteady: the machine was busy, or its clock changed. "
            "Repeat the run on a quiet machine before quoting them.",
            style="yellow",
        )


def print_missing(console: Console, records: Sequence[Record]) -> None:
    """Why peers did not take part: a line a reason."""
    for (provider, why), count in Counter((r.provider, r.missing) for r in records if r.missing).items():
        console.print(Text(f"{provider} is missing in {count} cases: {why}", style="dim"))


# Files ----------------------------------------------------------------------------------------------------------------


#: Committed results: a folder a machine, in it a file a family.
RESULTS = Path("bench/results")


def save_json(path: Path, headers: Sequence[dict[str, Any]], records: Sequence[Record]) -> None:
    """Write all results so far; the file is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(
        json.dumps(
            {"headers": list(headers), "records": [r.asdict() for r in records]},
            indent=1,
            allow_nan=False,
            ensure_ascii=False,
        )
        + "\n"
    )
    os.replace(temporary, path)


def processor(machine: dict[str, Any]) -> str:
    """The name of what was measured: the GPU, if there was one, or the CPU."""
    name: str = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    return name


def slug(machine: dict[str, Any]) -> str:
    """A machine's name in bench/results: LLVM's name of the CPU, the vectors that the kernels use, the number of cores.

    ``zen5-avx512-2cores``: what decides a speed, and nothing that changes from boot to boot; or the GPU's, if it was measured.
    """
    if "gpu" in machine:
        return machine["gpu"]["name"].lower().replace(" ", "-")
    cpu = machine.get("cpu_llvm", machine["architecture"]).replace("znver", "zen")
    vectors = machine.get("simd", {}).get("name", "")
    return "-".join(part for part in (cpu, vectors, f"{machine['cores']}cores") if part)


def load(path: Path) -> tuple[list[dict[str, Any]], list[Record]]:
    """The headers and records of a file.

    Raises:
        ValueError: it cannot be read, or is not a benchmark's result.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        headers, records = saved["headers"], [Record(**r) for r in saved["records"]]
        machines = {slug(h["machine"]) for h in headers}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path} is not a result of bench --json: {type(problem).__name__}: {problem}") from problem
    if len(machines) != 1:
        raise ValueError(f"{path} has results of {len(machines)} machines; it must have those of one")
    return headers, records


def merge(
    headers: list[dict[str, Any]], records: list[Record], new_headers: list[dict[str, Any]], new: list[Record]
) -> tuple[list[dict[str, Any]], list[Record]]:
    """Results with those of a later run in the place of the same cases'; a run of which nothing is left goes."""

    def case(r: Record) -> tuple[Any, ...]:
        return r.case, r.mode, r.dtype, r.threads, r.method.split(",")[0]  # a GPU's events or graphs: as it chose

    again = {case(r) for r in new}
    kept = [r for r in records if case(r) not in again]
    runs = {r.run for r in kept}
    return [h for h in headers if h["started"] in runs] + new_headers, kept + new
