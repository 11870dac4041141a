"""The benchmark's cases as pytest-benchmark tests: ``python -m pytest bench``, a part of them with ``-k "square and 512"``.

One test a case, dtype and provider; pytest-benchmark's own options compare and save. Each result is checked against
float64 before it is timed, and a wrong one fails instead of having a speed. The method is pytest-benchmark's: one
provider after the other, where ``python -m fastnn bench`` rotates them; the pause before each is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from fastnn.bench import memory
from fastnn.bench.cases import Case, families
from fastnn.bench.peers import OURS, Job, Peer
from fastnn.bench.run import available_peers, check, dtype_name, select
from fastnn.bench.timing import pause

pytestmark = pytest.mark.skipif(
    find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed: pip install pytest-benchmark"
)

_PROVIDERS, _ = available_peers()
# What only a new process can show (family startup) has no call to be timed here.
_CASES = [(case, dtype) for case, dtype in select(families()) if not case.programs]


def _parameters() -> Iterator[Any]:
    """Every case with every provider, by a readable name."""
    for case, dtype in _CASES:
        for peer in _PROVIDERS:
            if not peer.takes_part(case, "cpu"):
                continue
            yield pytest.param(case, dtype, peer, id=f"{case.family}/{case.name}-{case.mode}-{dtype_name(dtype)}-{peer.name}")


@pytest.fixture(autouse=True, scope="module")
def kept_memory() -> Iterator[None]:
    """Outputs lie in memory that is there already, as in ``python -m fastnn bench``."""
    with memory.kept():
        yield


@pytest.mark.parametrize(("case", "dtype", "peer"), list(_parameters()))
def test_case(case: Case, dtype: torch.dtype, peer: Peer, benchmark: Any) -> None:
    threads = torch.get_num_threads()
    if reason := peer.missing(case, dtype, threads):
        pytest.skip(reason)
    try:
        job = Job.of(case, dtype, threads)
    except (ImportError, NotImplementedError) as problem:  # a whole model that is not there, or has one dtype only
        pytest.skip(str(problem))
    with torch.set_grad_enabled(case.mode != "forward"), ExitStack() as settings:
        settings.enter_context(peer.settings(threads))
        try:
            work = peer.prepare(job)
            work()
        except Exception as problem:
            if peer.name == OURS:
                raise
            pytest.skip(f"{peer.name} cannot: {type(problem).__name__}: {problem}")
        torch_error, errors = check(job, {peer.name: work})
        error = errors[peer.name]
        assert error.within(torch_error, dtype), f"error {error.worst:.4g} ulp where torch has {torch_error.worst:.4g}"
        benchmark.group = f"{case.family}/{case.name} {case.mode} {dtype_name(dtype)}"
        benchmark.extra_info.update(threads=threads, flops=case.flops, bytes=case.bytes(dtype), error_ulp=error.worst)
        pause()  # thread pools that have just worked go on spinning: see timing.py
        benchmark(work)
