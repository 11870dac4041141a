"""The numerics report as files: one self-contained HTML page, and JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from . import _info
from ._checks import CHECKS

if TYPE_CHECKING:
    from .verify import Line

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #1b1f24;
       background: #fff; }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em } code { font-size: 0.95em }
.banner { padding: 0.6em 1em; border-radius: 6px; font-weight: 600 }
table { border-collapse: collapse; font-size: 13px; width: 100%; margin: 0.5em 0 }
th, td { padding: 0.2em 0.6em; text-align: left; border-bottom: 1px solid #d9dee3; vertical-align: top }
th { position: sticky; top: 0; background: #f3f5f7 }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.red { background: #ffd7d5 } .worse { background: #fff3c4 } .better { background: #dcf5e0 } .equal { background: none }
summary { cursor: pointer; padding: 0.3em 0 } .key span { padding: 0.1em 0.5em; border-radius: 4px }
"""


def colour(line: Line) -> str:
    """red; else how our largest error compares with PyTorch's: better, equal or worse ("equal" where it is unknown)."""
    if not line.good:
        return "red"
    if line.theirs is None or line.ours.worst == line.theirs.worst:
        return "equal"
    return "better" if line.ours.worst < line.theirs.worst else "worse"


def facts() -> dict[str, str]:
    """The machine and the versions, for people."""
    m = _info.machine()
    simd = m.get("simd")
    return {
        "CPU": f"{m['cpu']}, {m['cores']} cores, {_info.size(m['memory'])} of memory",
        "system": m["os"],
        "SIMD": (f"{simd['name']}, vectors of {simd['bytes']} bytes; " if simd else "") + f"torch: {m['torch_cpu_capability']}",
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{name} {v}" for name, v in _info.versions().items() if v),
        "made": datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def _cells(values: Sequence[str], tag: str = "td", numbers: Sequence[int] = ()) -> str:
    return "".join(f"<{tag}{' class=n' if n in numbers else ''}>{escape(v)}</{tag}>" for n, v in enumerate(values))


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], numbers: Sequence[int]) -> str:
    """rows: a colour and the cells; numbers: the columns that hold them."""
    body = "\n".join(f"<tr class={kind}>{_cells(cells, numbers=numbers)}</tr>" for kind, cells in rows)
    return f"<table><thead><tr>{_cells(head, 'th', numbers)}</tr></thead><tbody>\n{body}\n</tbody></table>"


def page(lines: Sequence[Line], rule: str, summary: str, head: Sequence[str], command: str) -> str:
    """The report as HTML that needs nothing from elsewhere.

    Args:
        rule, summary: in words.
        head: the names of what `Line.cells` gives.
        command: how the report was asked for.
    """
    red = any(not line.good for line in lines)
    numbers = range(3, 7)
    parts = [
        f"<!DOCTYPE html><html lang=en><meta charset=utf-8><title>fastnn: numerics report</title><style>{_STYLE}</style>",
        f"<h1>fastnn: numerics report</h1><p class='banner {'red' if red else 'better'}'>{escape(summary)}</p>",
        "<table>" + "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts().items()),
        f"<tr><th>command</th><td><code>{escape(command)}</code></td></tr></table><h2>The rule</h2><p>{escape(rule)}</p>",
        "<p class=key>Colours: <span class=red>red: breaks the rule</span> <span class=worse>good, with a larger error than "
        "PyTorch's</span> <span class=better>smaller than PyTorch's</span> <span>equal, or PyTorch is the reference</span></p>",
        "<h2>Summary</h2>",
        _table(
            ("family", "dtype", "lines", "red", "worse than torch", "equal", "better", "other bits with one thread"),
            [row for family in CHECKS for row in _counts(family, lines)],
            range(2, 8),
        ),
    ]
    for family in CHECKS:
        mine = [line for line in lines if line.family == family]
        if not mine:
            continue
        parts.append(f"<h2>{escape(family)}</h2>")
        failed = [("red", line.cells()) for line in mine if not line.good]
        if failed:
            parts.append(_table(head, failed, numbers))
        for dtype in dict.fromkeys(line.dtype for line in mine):
            rows = [(colour(line), line.cells()) for line in mine if line.dtype == dtype]
            parts.append(f"<details><summary>{escape(dtype)}: {len(rows)} lines</summary>{_table(head, rows, numbers)}</details>")
    return "\n".join(parts) + "\n</html>\n"


def _counts(family: str, lines: Sequence[Line]) -> list[tuple[str, list[str]]]:
    rows = []
    for dtype in dict.fromkeys(line.dtype for line in lines if line.family == family):
        mine = [line for line in lines if (line.family, line.dtype) == (family, dtype)]
        kinds = [colour(line) for line in mine]
        counts = [kinds.count(kind) for kind in ("red", "worse", "equal", "better")]
        differ = sum(line.threads == "differ" for line in mine)
        rows.append(("red" if counts[0] else "equal", [family, dtype, *map(str, (len(mine), *counts, differ))]))
    return rows


def as_json(lines: Sequence[Line], rule: str, command: str) -> str:
    """The same for programs; numbers that JSON does not have are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    records = []
    for line in lines:
        record = asdict(line) | {"good": line.good, "verdict": line.verdict}
        for side, e in (("ours", line.ours), ("theirs", line.theirs)):
            record[side] = None if e is None else {"max_ulp": e.worst, "rms_ulp": e.rms, "specials_lost": e.specials}
        records.append(plain(record))
    header = {"command": command, "rule": rule, "machine": _info.machine(), "versions": _info.versions()}
    return json.dumps(
        {"header": header | {"threads": torch.get_num_threads()}, "lines": records}, indent=1, ensure_ascii=False, allow_nan=False
    ) + "\n"  # fmt: skip
