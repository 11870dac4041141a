"""Our stopwatch against somebody else's: torch.utils.benchmark times the same calls and must read the same."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.benchmark import Timer

from fastnn.bench.cases import Case, cases
from fastnn.bench.peers import Job, Peer
from fastnn.bench.run import available_peers
from fastnn.bench.timing import Times, measure

#: p20 to p80 of the two must overlap when both ends are moved outwards by so much. Theirs calls without a pause, ours in
#: blocks: the clock and the caches are not quite the same.
TOLERANCE = 0.1
SECONDS = 0.3
#: A neighbour that comes or goes between the two is no disagreement; three times in a row it would be.
ATTEMPTS = 3

CASES = [
    ("matmul", "square/512"),
    ("matmul", "small/64"),
    ("matmul", "linear_gelu/bert_up/8"),
    ("activation", "gelu/bert_base/4096x768"),
    ("softmax", "softmax/bert_scores/96x128x128"),
]


def agree(a: Times, b: Times) -> bool:
    """Within the printed spread, widened by TOLERANCE."""
    return a.p20 <= b.p80 * (1 + TOLERANCE) and b.p20 <= a.p80 * (1 + TOLERANCE)


def _theirs(work: Callable[[], object]) -> Times:
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return Times.of(timer.blocked_autorange(min_run_time=SECONDS).times)


def test_agreement_is_more_than_nothing() -> None:
    assert agree(Times(1.0, 0.98, 1.02, 9), Times(1.1, 1.08, 1.12, 9))
    assert not agree(Times(1.0, 0.98, 1.02, 9), Times(1.2, 1.18, 1.22, 9))
    assert not agree(Times(1.2, 1.18, 1.22, 9), Times(1.0, 0.98, 1.02, 9))
    assert agree(Times(1.2, 1.0, 1.5, 9), Times(1.0, 0.98, 1.02, 9))


@pytest.mark.parametrize("peer", available_peers(["fastnn", "torch"])[0], ids=lambda peer: peer.name)
@pytest.mark.parametrize(("family", "name"), CASES, ids=[name for _, name in CASES])
def test_torch_utils_benchmark_reads_the_same(family: str, name: str, peer: Peer) -> None:
    case: Case = next(c for c in cases(family) if (c.name, c.mode) == (name, "forward"))
    with torch.no_grad():
        work = peer.prepare(Job.of(case, torch.float32, torch.get_num_threads()))
        read = []
        for _ in range(ATTEMPTS):
            read.append((measure({peer.name: work}, SECONDS)[peer.name], _theirs(work)))
            if agree(*read[-1]):
                return
    pytest.fail("\n".join(f"ours {ours}, theirs {theirs}" for ours, theirs in read))
