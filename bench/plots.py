"""Plots of a run, a few for each family and number of threads: ratios, roofline, bandwidth, speed against size.

Figures are made without pyplot: no window, no global state, nothing to close.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .peers import OURS
from .report import SHORT, processor
from .run import Record

#: A line through fewer sizes says nothing.
SIZES = 3

Header = dict[str, Any]


def label(r: Record) -> str:
    """Case, mode if it is not the usual one, dtype."""
    return " ".join([r.case, *([r.mode] if r.mode != "forward" else []), SHORT.get(r.dtype, r.dtype)])


def pairs(records: Sequence[Record]) -> list[tuple[Record, Record | None]]:
    """Our timed records, each with the fastest peer's of the same case."""
    peers: dict[tuple[str, str, str], list[Record]] = {}
    for r in records:
        if r.provider != OURS and r.median:
            peers.setdefault((r.case, r.mode, r.dtype), []).append(r)
    ours = (r for r in records if r.provider == OURS and r.median)
    return [
        (r, min(peers.get((r.case, r.mode, r.dtype), []), key=lambda peer: peer.median or 0, default=None))
        for r in ours
    ]


def bandwidths(header: Header) -> dict[str, float]:
    """The measured limits of memory in GB/s, by name: read l2, copy memory, …"""
    limits = header["limits"]
    found = {f"{what} {where}": v for what, rates in limits.get("bandwidth_gbs", {}).items() for where, v in rates.items()}
    parts = ((key.partition("_gbs_"), value) for key, value in limits.items())
    return found | {f"{what} {where.replace('_', ' ')}": value for (what, _, where), value in parts if where}


def _drawn(header: Header) -> dict[str, float]:
    """Those that the plots show: reading from each level, and a copy, which is an operator without arithmetic; of a GPU all."""
    found = bandwidths(header)
    shown = {name: rate for name, rate in found.items() if name.startswith("read") or name.endswith("new output")}
    return shown or found


# The plots ------------------------------------------------------------------------------------------------------------


def ratios(header: Header, records: Sequence[Record]) -> Figure | None:
    """For each case, how many times faster we are than each peer."""
    ours = [r for r in records if r.provider == OURS and r.median]
    if not ours:
        return None
    times = {(r.case, r.mode, r.dtype, r.provider): r.median for r in records if r.median}
    names = list(dict.fromkeys(r.provider for r in records if r.provider != OURS))
    height = 0.8 / max(1, len(names))
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(ours)), layout="constrained")
    axes = figure.subplots()
    for n, name in enumerate(names):
        at, values = [], []
        for row, r in enumerate(ours):
            peer = times.get((r.case, r.mode, r.dtype, name))
            if peer and r.median:
                at.append(row + (n - (len(names) - 1) / 2) * height)
                values.append(peer / r.median - 1)
        axes.barh(at, values, height, left=1, label=name)
    axes.axvline(1.0, color="black", linewidth=1)
    limits = (f"  {r.limit_fraction:.0%} of {r.limit}" if r.limit_fraction else "" for r in ours)
    axes.set_yticks(range(len(ours)), [label(r) + limit for r, limit in zip(ours, limits)], fontsize=8)
    axes.set_ylim(len(ours) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlabel("times faster than the peer (median of the same run)")
    if names:
        axes.legend(fontsize=8)
    return figure


def _points(
    axes: Axes, records: Sequence[Record], x: Callable[[Record], float], y: Callable[[Record], float]
) -> list[float]:
    """Draw us (filled) and the best peer (hollow) at the same x, one colour a group; returns the x that were drawn."""
    found = pairs(records)
    groups = list(dict.fromkeys(ours.case.split("/")[0] for ours, _ in found))
    for ours, peer in found:
        color = f"C{groups.index(ours.case.split('/')[0]) % 10}"
        if peer:
            axes.plot([x(ours)] * 2, [y(ours), y(peer)], color=color, linewidth=0.7)
            axes.plot(x(ours), y(peer), "o", color=color, markerfacecolor="white", markersize=6)
        axes.plot(x(ours), y(ours), "o", color=color, markersize=5)
    handles = [Line2D([], [], marker="o", linestyle="", color=f"C{n % 10}", label=g) for n, g in enumerate(groups)]
    handles += [
        Line2D([], [], marker="o", linestyle="", color="black", label=OURS),
        Line2D([], [], marker="o", linestyle="", color="black", markerfacecolor="white", label="best peer"),
    ]
    axes.legend(handles=handles, fontsize=7)
    return [x(ours) for ours, _ in found]


def roofline(header: Header, records: Sequence[Record]) -> Figure | None:
    """Operations a second against operations a byte, under what this run measured of arithmetic and memory."""
    mine = [r for r in records if r.flops and r.bytes]
    if not pairs(mine):
        return None
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    xs = _points(axes, mine, lambda r: r.flops / r.bytes, lambda r: r.flops / (r.median or 1) / 1e9)
    low, high = min(xs) / 8, max(xs) * 2  # room for the roofs' names
    fma = header["limits"]["fma_gflops"]
    # Arithmetic on float16 is done in float32, and on bfloat16 where the CPU has no instructions for it.
    roofs = {kind: fma[kind] for r in mine for kind in [r.dtype if r.dtype in fma else "float32"] if kind in fma}
    for kind, rate in roofs.items():
        axes.axhline(rate, color="black", linewidth=1)
        axes.annotate(f"multiply-add {SHORT.get(kind, kind)} {rate:.0f} GFLOP/s", (low, rate), fontsize=7, va="bottom")
    top = max(roofs.values(), default=float("inf"))
    for name, rate in _drawn(header).items():
        ridge = min(high, top / rate)
        if ridge > low:  # else memory limits nothing that is drawn
            axes.plot([low, ridge], [rate * low, rate * ridge], color="gray", linewidth=1)
            axes.annotate(f"{name} {rate:.0f} GB/s", (low, rate * low), fontsize=7, color="gray")
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP / byte (least traffic)", ylabel="GFLOP/s")
    return figure


def bandwidth(header: Header, records: Sequence[Record]) -> Figure | None:
    """The roofline of cases that do next to no arithmetic: bytes a second against bytes moved, under memory's limits."""
    mine = [r for r in records if r.bytes and not r.flops]
    if not pairs(mine):
        return None
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    xs = _points(axes, mine, lambda r: r.bytes / 1e6, lambda r: r.bytes / (r.median or 1) / 1e9)
    for name, rate in _drawn(header).items():
        axes.axhline(rate, color="gray", linewidth=1)
        axes.annotate(f"{name} {rate:.0f} GB/s", (min(xs) / 2, rate), fontsize=7, color="gray", va="bottom")
    axes.set(xscale="log", yscale="log", xlim=(min(xs) / 2, max(xs) * 2))
    axes.set(xlabel="MB read and written (least traffic)", ylabel="GB/s")
    return figure


def _along(records: Sequence[Record]) -> Iterator[tuple[str, str, dict[str, float]]]:
    """For each panel: its title, what is along x, and where each case is. Cases whose names differ in one number alone share a
    panel, along that number; what is left of a group shares one, along the work."""
    groups: dict[str, dict[str, Record]] = {}
    for r in records:
        groups.setdefault(r.case.split("/")[0], {})[r.case] = r
    for group, cases in groups.items():
        alike: dict[str, dict[str, float]] = {}
        for name in cases:
            for number in re.finditer(r"\d+", name):
                alike.setdefault(f"{name[: number.start()]}…{name[number.end() :]}", {})[name] = int(number[0])
        lines = {title: places for title, places in alike.items() if len(places) >= SIZES}
        yield from ((title, "", places) for title, places in lines.items())
        rest = [r for name, r in cases.items() if not any(name in places for places in lines.values())]
        counted = all(r.flops for r in rest)
        works = {r.case: r.flops / 1e9 if counted else r.bytes / 1e6 for r in rest}
        if len(set(works.values())) >= SIZES:
            yield group, "GFLOP a call" if counted else "MB a call", works


def sizes(header: Header, records: Sequence[Record]) -> Figure | None:
    """Speed against size."""
    kinds: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        if r.rate:
            kinds.setdefault((r.mode, r.dtype), []).append(r)
    panels: dict[tuple[str, str, str, str], dict[str, list[tuple[float, Record]]]] = {}
    for (mode, dtype), mine in kinds.items():
        for title, unit, places in _along(mine):
            lines = panels.setdefault((title, unit, mode, dtype), {})
            for r in mine:
                if r.case in places:
                    lines.setdefault(r.provider, []).append((places[r.case], r))
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns + 1, 3 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    providers = list(dict.fromkeys(r.provider for r in records))
    for ((title, unit, mode, dtype), lines), axes in zip(panels.items(), grid):
        for provider, points in lines.items():
            at, drawn = zip(*sorted(points, key=lambda point: point[0]))
            color = f"C{providers.index(provider) % 10}"
            low, high = ([r.rate * r.median / edge for r, edge in zip(drawn, edges)]
                         for edges in ([r.p80 for r in drawn], [r.p20 for r in drawn]))
            axes.plot(at, [r.rate for r in drawn], "o" if unit else "o-", markersize=3, color=color, label=provider)
            if unit:  # unlike cases: nothing lies between them
                axes.vlines(at, low, high, color=color, alpha=0.3)
            else:
                axes.fill_between(at, low, high, color=color, alpha=0.2)
        axes.set_xscale("log", base=10 if unit else 2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(drawn[0].unit)
        mode = "" if mode == "forward" else f" {mode}"
        axes.set_title(f"{title}{mode} {SHORT.get(dtype, dtype)}", fontsize=9)
        axes.set_xlabel(unit)
        axes.legend(fontsize=7)
    for axes in grid:
        axes.set_visible(False)
    return figure


PLOTS = (ratios, roofline, bandwidth, sizes)


# All of them ----------------------------------------------------------------------------------------------------------


def figures(headers: Sequence[Header], records: Sequence[Record]) -> Iterator[tuple[str, bytes]]:
    """Every plot that the records allow: its name, ``family-Nthreads-plot``, and the PNG."""
    for family, threads in dict.fromkeys((r.family, r.threads) for r in records):
        header = next(h for h in headers if h["threads"] == threads)
        mine = [r for r in records if (r.family, r.threads) == (family, threads)]
        for draw in PLOTS:
            figure = draw(header, mine)
            if figure is None:
                continue
            machine, versions = header["machine"], header["versions"]
            figure.suptitle(f"{family}: {processor(machine)}, {threads} threads, torch {versions['torch']}", fontsize=9)
            png = BytesIO()
            figure.savefig(png, dpi=140, format="png")
            yield f"{family}-{threads}threads-{draw.__name__}", png.getvalue()
