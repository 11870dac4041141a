"""``python -m fastnn bench compare OLD.json NEW.json``: has our code become slower, or was it the machine, or chance?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .peers import OURS
from .report import SHORT, duration, load, slug
from .run import Record

#: No change smaller than this is called one: runs of the same code differ by as much on a quiet machine.
TOLERANCE = 0.05

#: (family, case, dtype, threads, mode, method)
Key = tuple[str, str, str, int, str, str]


@dataclass(frozen=True)
class Change:
    """What became of one case.

    Attributes:
        verdict: "slower", "red" or "missing" (regressions); "same", "faster", "repaired"; "vanished", "new".
        time: our new time over our old one; ``machine``: the same of the peer that tells the machine's speed.
        noise: changes up to this cannot be told from chance.
    """

    key: Key
    verdict: str
    old: Record | None = None
    new: Record | None = None
    time: float | None = None
    machine: float | None = None
    noise: float | None = None

    @property
    def regression(self) -> bool:
        return self.verdict in ("slower", "red", "missing")


def _spread(*records: Record) -> float:
    """How much a quotient of their times varies: spreads of independent factors add as squares."""
    return math.hypot(*(((r.p80 or 0) - (r.p20 or 0)) / (r.median or 1) for r in records))


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """What became of every case of ours.

    The rule: a case is slower if *both* our time and our time relative to a peer's have grown by more than the noise.
    The peer is the one that was fastest in OLD among those that both files timed; the same in both, so that a new rival
    is no regression. A slower day of the machine moves our time but not the quotient, a peer that got faster (or a
    disturbed one) moves the quotient but not our time; neither is called a regression. Where the files have no peer of a
    case in common, the median change of the peers of all other cases stands in. The noise is the root of the sum of
    squares of the spreads (p80 - p20) / median of the four times, and at least ``TOLERANCE``. Faster is the
    same the other way round. What was right and is red or missing now is a regression, whatever the times.
    """
    before, after = _by_case(old), _by_case(new)
    shared = {key: _machine(before[key], after[key]) for key in before.keys() & after.keys()}
    typical = statistics.median([b.median / a.median for a, b in filter(None, shared.values()) if a.median and b.median] or [1.0])
    changes = []
    for key in dict.fromkeys([*before, *after]):
        was, now = before.get(key, {}).get(OURS), after.get(key, {}).get(OURS)
        if was is None and now is None:
            continue
        if was is None or now is None:
            changes.append(Change(key, "new" if was is None else "vanished", was, now))
        elif not (was.median and now.median):
            changes.append(Change(key, _state(was, now), was, now))
        else:
            peers = shared[key]
            machine = peers[1].median / peers[0].median if peers and peers[0].median and peers[1].median else typical
            time, noise = now.median / was.median, max(TOLERANCE, _spread(was, now, *(peers or ())))
            relative = time / machine
            if min(time, relative) > 1 + noise:
                verdict = "slower"
            elif max(time, relative) < 1 / (1 + noise):
                verdict = "faster"
            else:
                verdict = "same"
            changes.append(Change(key, verdict, was, now, time, machine, noise))
    return changes


def _by_case(records: Sequence[Record]) -> dict[Key, dict[str, Record]]:
    found: dict[Key, dict[str, Record]] = {}
    for r in records:
        method = r.method.split(",")[0]  # a GPU's events or graphs: as the run chose
        found.setdefault((r.family, r.case, r.dtype, r.threads, r.mode, method), {})[r.provider] = r
    return found


def _machine(old: dict[str, Record], new: dict[str, Record]) -> tuple[Record, Record] | None:
    """The old and new record of the peer that tells how the machine's speed has changed."""
    both = [(r, new[name]) for name, r in old.items() if name != OURS and r.median and name in new and new[name].median]
    return min(both, key=lambda pair: pair[0].median or 0, default=None)


def _state(was: Record, now: Record) -> str:
    """The verdict where one of the two has no time."""
    if now.correct is False:
        return "red" if was.correct is not False else "same"
    if now.median is None:
        return "missing" if was.median else "same"
    return "repaired"


# The command ----------------------------------------------------------------------------------------------------------

_STYLES = {"slower": "red", "red": "red", "missing": "red", "faster": "green", "repaired": "green", "same": "dim"}


def main(console: Console, arguments: Sequence[str]) -> int:
    """Print what changed; 1 if there is a regression, else 0.

    Raises:
        ValueError: not two files, or files that cannot be compared: of different machines, or with no case in common.
    """
    if len(arguments) != 2:
        raise ValueError("compare needs two files: OLD.json NEW.json")
    (old_headers, old), (new_headers, new) = (load(Path(name)) for name in arguments)
    machines = [slug(headers[0]["machine"]) for headers in (old_headers, new_headers)]
    if machines[0] != machines[1]:
        raise ValueError(f"the files are of different machines, {machines[0]} and {machines[1]}: their times say nothing")
    threads = [{h["threads"] for h in headers} for headers in (old_headers, new_headers)]
    if not threads[0] & threads[1]:
        raise ValueError(f"the files have different numbers of threads, {sorted(threads[0])} and {sorted(threads[1])}")
    changes = compare(old, new)
    if not any(c.old and c.new for c in changes):
        raise ValueError("the files have no case in common")
    for n in sorted(threads[0] ^ threads[1]):
        console.print(f"Only one of the files has {n} threads.", style="yellow")
    for name, version in old_headers[0]["versions"].items():
        if (now := new_headers[0]["versions"].get(name)) != version:
            console.print(f"{name} was {version} and is {now}", style="yellow", highlight=False)
    lasted = [{h["seconds"] for h in headers if "seconds" in h} for headers in (old_headers, new_headers)]
    if lasted[0] and lasted[1] and lasted[0] != lasted[1]:
        old_seconds, new_seconds = (", ".join(f"{s:g}" for s in sorted(found)) for found in lasted)
        console.print(f"Timed for {old_seconds} s a call in OLD, {new_seconds} s in NEW (quick and full runs).", style="yellow")
    if old_headers[0]["method"] != new_headers[0]["method"]:
        console.print(f"Measured in different ways. OLD: {old_headers[0]['method']}", style="yellow", highlight=False)
        console.print(f"NEW: {new_headers[0]['method']}", style="yellow", highlight=False)
    _print(console, changes)
    return int(any(c.regression for c in changes))


def _print(console: Console, changes: Sequence[Change]) -> None:
    table = Table("case", "mode", "dtype", "threads", "old", "new", "time", "machine", "relative", "noise", "")
    for column in table.columns[3:10]:
        column.justify = "right"
    for c in changes:
        _, case, dtype, threads, mode, _ = c.key
        quotients = [c.time, c.machine, c.time / c.machine if c.time and c.machine else None]
        why = f": {c.new.missing}" if c.regression and c.new and c.new.missing else ""
        if c.old and c.new and c.old.method != c.new.method:
            why += f" (timed otherwise: {c.old.method}; now {c.new.method})"
        cells = [
            case,
            mode,
            SHORT.get(dtype, dtype),
            str(threads),
            *(duration(r.median if r else None) for r in (c.old, c.new)),
            *(f"{q:.2f}×" if q else "–" for q in quotients),
            f"±{c.noise:.0%}" if c.noise else "–",
            c.verdict + why,
        ]
        table.add_row(*map(Text, cells), style=_STYLES.get(c.verdict, "yellow"))
    console.print(table)
    verdicts = [c.verdict for c in changes]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    bad = sum(c.regression for c in changes)
    console.print(f"{counts}: {f'{bad} regressions' if bad else 'no regression'}", style="red" if bad else "green")
