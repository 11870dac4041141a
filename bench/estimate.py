"""How long a run will take, said before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastnn import _info

from . import gpu
from .cases import Case
from .limits import fma_dtype
from .peers import OURS, Peer
from .run import dtype_name
from .timing import PAUSE

#: Seconds that a provider takes to prepare a case, where that is not nothing; measured on two cores of a Zen 5 server.
#: torch.compile's are those of an empty cache, so a second run is shorter.
PREPARE = {"torch.compile": 2.0, "max-autotune": 20.0, "max-autotune-no-cudagraphs": 20.0}
#: Seconds of a new process that imports torch, and of one that compiles a kernel with nothing cached.
PROCESS, COLD_PROCESS = 2.5, 10.0
#: Seconds in which our kernels of a family, mode and dtype are compiled, where the cache has none; measured at 4 to 9 each.
COMPILE = 7.0
_ROUNDS = 5


def estimate(
    chosen: Sequence[tuple[Case, torch.dtype]], providers: Sequence[Peer], seconds: float, header: dict[str, Any]
) -> float:
    """About how many seconds the cases take on this machine, limits as in ``header``."""
    kinds = {(case.family, case.mode, dtype) for case, dtype in chosen if not case.programs}
    compiled = OURS not in {p.name for p in providers} or bool(_info.cache()["kernels"])
    return sum(_case(case, dtype, providers, seconds, header) for case, dtype in chosen) + COMPILE * len(kinds) * (not compiled)


def _case(case: Case, dtype: torch.dtype, providers: Sequence[Peer], seconds: float, header: dict[str, Any]) -> float:
    if case.programs:
        count = len({p.name for p in providers} & case.programs.keys())
        return count * (2 * COLD_PROCESS if case.cold else 3 * PROCESS)
    device = gpu.DEVICE if "gpu" in header["machine"] else "cpu"
    there = [p.name for p in providers if p.takes_part(case, device) and p.missing(case, dtype, header["threads"]) is None]
    limits = header["limits"]
    rates = limits["fma_gflops"]
    call = (
        case.flops / rates.get(dtype_name(fma_dtype(dtype)), rates["float32"])
        + case.bytes(dtype) / limits.get("copy_gbs_64MiB_new_output", limits.get("copy_gbs_memory"))
    ) / 1e9
    # Warm-up and, in each round, a pause, discarded calls, and the block itself, which is one call at least.
    block = max(seconds / _ROUNDS, call) + PAUSE + min(3 * call, 0.1)
    timed = min(seconds, 0.5) + _ROUNDS * block
    # The check calculates in float64, of which a call takes twice as long, twice where there are magnitudes.
    check = 5 * call + case.bytes(dtype) / 1e9
    return check + sum(timed + PREPARE.get(name, 0.0) for name in there)
