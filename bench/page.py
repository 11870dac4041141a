"""A run as one HTML file that needs nothing else: the machine and the method, then for each family its cases and plots."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from .models import COLUMNS, layer_lines
from .peers import OURS
from .plots import bandwidths
from .report import SHORT, duration, geometric_mean, processor, share
from .run import Record

Header = dict[str, Any]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15em .7em; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid; }
tbody { border-bottom: 1px solid #ccc; }
td.n { text-align: right; white-space: nowrap; }
.ours { font-weight: 600; }
.red { color: #b00020; font-weight: 600; }
.missing, .note { color: #777; }
img { max-width: 100%; }
"""

_COLUMNS = (
    "case", "provider", "time", "p20", "p80", "runs", "speed", "ratio to the best peer", "of the limit",
    "error in ulp (torch’s)", "memory of a call", "notes",
)  # fmt: skip


def _tag(name: str, text: object, kind: str = "") -> str:
    """An element with escaped text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{name}{attribute}>{escape(str(text))}</{name}>"


def _rows(cells: Iterable[tuple[str, object]]) -> str:
    """A table of names and values."""
    lines = (f"<tr>{_tag('th', name)}{_tag('td', value)}</tr>" for name, value in cells)
    return "<table>" + "\n".join(lines) + "</table>"


def _fact(value: object) -> object:
    return ", ".join(f"{name} {v}" for name, v in value.items()) if isinstance(value, dict) else value


def _header(header: Header) -> Iterator[str]:
    """What a reader must know before believing a number."""
    machine, limits, load = header["machine"], header["limits"], header["load_average"]
    one = limits.get("fma_gflops_one_core", {})
    yield _tag("h2", f"{header['threads']} threads, {header['started']}")
    yield _rows(
        [
            ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['os']}"),
            *(
                (name, _fact(machine[name]))
                for name in ("gpu", "cpu_llvm", "simd", "caches", "memory", "features")
                if name in machine
            ),
            ("affinity", f"cores {machine['affinity']}"),
            ("threads", header["threads"]),
            ("load average before", "unknown" if load is None else f"{load:.2f}"),
            ("versions", _fact({name: v for name, v in header["versions"].items() if v})),
            ("providers", _fact(header["providers"])),
            *((f"{name} is missing", why) for name, why in header["missing"].items()),
            ("environment", _fact(header["environment"]) or "nothing set"),
            ("command", " ".join(header["command"])),
            *(
                (f"limit: multiply-add {kind}", f"{rate:.0f} GFLOP/s" + (f", {one[kind]:.0f} one core" if kind in one else ""))
                for kind, rate in limits["fma_gflops"].items()
            ),
            *((f"limit: {name}", f"{rate:.1f} GB/s") for name, rate in bandwidths(header).items()),
            ("method", header["method"]),
        ]
    )  # fmt: skip


def _cells(r: Record) -> str:
    """What follows the case's name in a provider's line: its numbers, or why it has none."""
    notes = _tag("td", "; ".join([*r.notes, *r.remarks, *([r.served_by] if r.served_by else [])]), "note")
    memory = "" if r.memory is None else f"{r.memory / 2**20:.1f} MiB"
    error = "" if r.error_ulp is None else f"{r.error_ulp:.3g} ({r.torch_error_ulp or 0:.3g})"
    if r.median is None:
        if r.correct is False:
            why = f"<td colspan=7 class=red>red, so no speed is reported{': ' * bool(r.missing)}{escape(r.missing or '')}</td>"
        else:
            why = f"<td colspan=7 class=missing>missing: {escape(r.missing or 'not timed')}</td>"
        return _tag("td", r.provider) + why + _tag("td", error, "n") + _tag("td", memory, "n") + notes
    numbers = [
        duration(r.median) + (f", and {duration(r.between)} of PyTorch between" if r.between else ""),
        duration(r.p20),
        duration(r.p80),
        r.runs,
        f"{r.rate:.4g} {r.unit}" if r.rate else "",
        f"{r.ratio:.2f}×" if r.ratio else "",
        share(r),
        error,
        memory,
    ]
    return _tag("td", r.provider, "ours" if r.provider == OURS else "") + "".join(_tag("td", n, "n") for n in numbers) + notes


def _table(records: Sequence[Record]) -> Iterator[str]:
    """One family and number of threads: a block of lines a case, a line a provider."""
    ours = [r for r in records if r.provider == OURS]
    ratios = [r.ratio for r in ours if r.ratio]
    counts = [
        f"{len(ours)} cases",
        f"{sum(r.correct is False for r in ours)} red",
        f"{sum(ratio < 1 for ratio in ratios)} slower than the best peer",
    ]
    if ratios:
        counts.append(f"geometric mean of the ratios to the best peer {geometric_mean(ratios):.2f}×")
    yield _tag("p", "; ".join(counts))
    yield "<table><thead><tr>" + "".join(_tag("th", name) for name in _COLUMNS) + "</tr></thead>"
    for (case, mode, dtype), block in groupby(records, key=lambda r: (r.case, r.mode, r.dtype)):
        lines = [_cells(r) for r in block]
        name = f"{escape(case)}<br>{_tag('span', f'{mode}, {SHORT.get(dtype, dtype)}', 'note')}"
        yield f"<tbody><tr><td rowspan={len(lines)}>{name}</td>" + "</tr>\n<tr>".join(lines) + "</tr></tbody>"
    yield "</table>"


def _layers(name: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Where the time of a model's forward goes."""
    yield _tag("h4", f"{name}: where the time of a forward goes")
    yield "<table><thead><tr>" + "".join(_tag("th", column) for column in COLUMNS) + "</tr></thead>"
    for line in layer_lines(rows):
        yield "<tr>" + "".join(_tag("td", cell, "n" if 2 <= n <= 5 else "") for n, cell in enumerate(line)) + "</tr>"
    yield "</table>"


def html(headers: Sequence[Header], records: Sequence[Record], images: Mapping[str, bytes]) -> str:
    """The page, with the PNGs that ``plots.figures`` made."""
    parts = ["<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>fastnn bench</title>"]
    parts += [f"<style>{_STYLE}</style></head><body>", _tag("h1", f"fastnn bench: {processor(headers[0]['machine'])}")]
    for header in headers:
        parts += _header(header)
        mine = [r for r in records if r.threads == header["threads"] and r.run in ("", header["started"])]
        for family in dict.fromkeys(r.family for r in mine):
            parts.append(_tag("h3", f"{family}, {header['threads']} threads"))
            parts += _table([r for r in mine if r.family == family])
            if family == "models":
                for name, rows in header.get("layers", {}).items():
                    parts += _layers(name, rows)
            start = f"{family}-{header['threads']}threads-"
            for name, png in images.items():
                if name.startswith(start):
                    parts.append(f'<p><img alt="{escape(name)}" src="data:image/png;base64,{b64encode(png).decode()}"></p>')
    return "\n".join([*parts, "</body></html>\n"])
