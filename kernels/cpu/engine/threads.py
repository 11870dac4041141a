"""One parallel region a call, in the thread pool that torch already runs.

``parallel(n, body, args)`` inside a kernel runs ``body(thread, threads, *args)`` on up to n threads at once and returns when
all have; body reads the true number of threads from its second argument. With n = 1 nothing but a call happens: no
pool is touched, which is what a forked child relies on.

On Linux torch's pool is libgomp's: a region entered through ``GOMP_parallel`` costs about a microsecond, several Python threads
may enter at once, and no second pool competes with torch's for the cores. Elsewhere a pool of Python threads serves.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import torch

#: "gomp" or "python": how parallel regions are launched on this platform. ``FASTNN_LAUNCHER`` overrides.
LAUNCHER = os.environ.get("FASTNN_LAUNCHER") or ("gomp" if sys.platform == "linux" else "python")
if LAUNCHER not in ("gomp", "python"):
    raise ValueError(f"FASTNN_LAUNCHER is {LAUNCHER!r}; allowed: 'gomp', 'python'")

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def forked() -> bool:
    """Whether this process was forked from one that used the pool: its threads do not exist here."""
    return _forked


def count() -> int:
    """Threads that a kernel may use now: torch's number; 1 in a process that was forked from one that used the pool."""
    return 1 if _forked else torch.get_num_threads()


def _torch_gomp() -> ctypes.CDLL:
    """The libgomp that torch has loaded (a second copy would be a second pool)."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}
    torch_own = [p for p in paths if "torch" in p] or sorted(paths)
    return ctypes.CDLL(torch_own[0] if torch_own else "libgomp.so.1")


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def _run_in_python_threads(body: int, data: int, n: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    function = _BODY(body)  # ctypes releases the GIL around the call
    with ThreadPoolExecutor(n) as pool:
        for job in [pool.submit(function, data, t, n) for t in range(n)]:
            job.result()


_alive: list[Any] = []


def symbols() -> dict[str, int | None]:
    """The addresses of the functions that launch parallel regions, by the names that compiled kernels use."""
    functions: dict[str, Any]
    if LAUNCHER == "gomp":
        gomp = _torch_gomp()
        functions = {s: getattr(gomp, s) for s in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")}
    else:
        functions = {"python_parallel": ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
            _run_in_python_threads)}
    functions["give_way"] = ctypes.CDLL("kernel32").SwitchToThread if os.name == "nt" else ctypes.CDLL(None).sched_yield
    _alive.extend(functions.values())
    return {name: ctypes.cast(f, ctypes.c_void_p).value for name, f in functions.items()}
