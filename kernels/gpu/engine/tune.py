"""Which of the few configurations of a kernel a call gets: by default the one that the family's own table says.

With FASTNN_TUNE=1 they are timed, by CUDA events, at the first call of each kind: a kernel, a dtype, options, and sizes rounded
up to powers of two. The fastest is kept, in the process and in the cache folder, in a file for the chip and these sources.
Nothing is timed while a CUDA graph is captured, and where torch is asked for deterministic algorithms the table decides: what
is fastest may be another one in another process, and with it the order of a sum.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from . import replay
from .launch import Chip, power_of_two


def _asked() -> bool:
    return os.environ.get("FASTNN_TUNE", "") not in ("", "0")


ON = _asked()
Config = TypeVar("Config", bound=tuple[Any, ...])
_found: dict[Path | None, dict[str, Any]] = {}  # by file: what is known of each key
_lock = threading.Lock()


def timer(call: Callable[[], object]) -> float:
    """Milliseconds of a call"""
    return float(triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median"))


@cache
def _digest() -> str:
    """Of the kernels' sources and of the compiler: what makes a time old."""
    digest = hashlib.sha256(triton.__version__.encode())
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _file(chip: Chip) -> Path | None:
    """Where the results for a chip are kept; None if nothing is to be."""
    from fastnn.kernels.cpu.engine.build import cache_dir

    folder = cache_dir()
    return folder / f"tuned-{chip.name}-{_digest()}.json" if folder else None


def _read(file: Path | None) -> dict[str, Any]:
    """What a file says; nothing if it is not there, or damaged."""
    if file is not None:
        with suppress(OSError, ValueError):
            found = json.loads(file.read_text())
            if isinstance(found, dict):
                return found
    return {}


def _keep(file: Path | None, key: str, config: Sequence[Any]) -> None:
    """Beside what other processes have found since; without a disk, in this process alone."""
    _found.setdefault(file, {})[key] = list(config)
    if file is None:
        return
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        temporary.write_text(json.dumps(_read(file) | _found[file], indent=1))
        temporary.replace(file)


def _seconds(run: Callable[[Config], object], config: Config) -> float:
    try:
        return timer(lambda: run(config))
    except Exception:  # too much shared memory for this chip, say: the others are still there
        return float("inf")


def choose(kernel: str, chip: Chip, options: Sequence[object], sizes: Sequence[int], shipped: Config, few: Sequence[Config],
           run: Callable[[Config], object]) -> Config:  # fmt: skip
    """A configuration, of the ``few``, for calls of this kind; ``shipped`` is the table's.

    run(config): the call, into outputs of its own: it is made many times.
    """
    if not ON or len(few) < 2 or torch.are_deterministic_algorithms_enabled():
        return shipped
    key = json.dumps([kernel, *map(str, options), *(power_of_two(n) for n in sizes)])
    with _lock:
        file = _file(chip)
        if file not in _found:
            _found[file] = _read(file)
        known = _found[file].get(key)
        config = next((c for c in few if list(c) == known), None)  # else it is of another table, or nobody's
        if config is None:
            tape = replay.tape()
            if tape is not None:
                tape.problem = "its tiles are not chosen yet"  # and what is timed would be replayed
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return shipped
            times = [_seconds(run, c) for c in few]
            config = few[times.index(min(times))] if min(times) < float("inf") else shipped
            _keep(file, key, config)
        return config
