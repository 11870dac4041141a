"""Our stopwatch against somebody else's: torch.utils.benchmark times the same calls and must read the same."""

from contextlib import ExitStack

import pytest
import torch
from torch.utils.benchmark import Timer

from fastnn.bench.cases import Case, cases
from fastnn.bench.peers import Job, Work
from fastnn.bench.run import available_peers
from fastnn.bench.timing import Times, measure, pause

#: Seconds a provider.
SECONDS = 0.3
#: A neighbour that comes or goes between the two is no disagreement; so many times in a row it would be.
ATTEMPTS = 4
TOLERANCE = 1.03
#: Not ONNX Runtime, whose calls beside busy neighbours take two to three times as long in a long row as in our blocks.
PROVIDERS = ("fastnn", "torch", "numpy")

CASES = [
    ("matmul", "square/512"),
    ("matmul", "small/64"),
    ("matmul", "linear_gelu/bert_up/8"),
    ("activation", "gelu/bert_base/4096x768"),
    ("softmax", "softmax/bert_scores/96x128x128"),
]


def agree(a: Times, b: Times) -> bool:
    """Whether the printed spreads, p20 to p80, have a time in common, but for what a pause does to clock and caches."""
    return a.p20 <= b.p80 * TOLERANCE and b.p20 <= a.p80 * TOLERANCE


def _theirs(work: Work) -> Times:
    pause()  # else the threads of another's pool would still be spinning
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return Times.of(timer.blocked_autorange(min_run_time=SECONDS).times)


def test_agreement_is_more_than_nothing() -> None:
    assert agree(Times(1.0, 0.98, 1.02, 9), Times(1.03, 1.01, 1.05, 9))
    assert not agree(Times(1.0, 0.98, 1.02, 9), Times(1.08, 1.06, 1.1, 9))
    assert not agree(Times(1.08, 1.06, 1.1, 9), Times(1.0, 0.98, 1.02, 9))
    assert agree(Times(1.2, 1.0, 1.5, 9), Times(1.0, 0.98, 1.02, 9))


@pytest.mark.parametrize(("family", "name"), CASES, ids=[name for _, name in CASES])
def test_torch_utils_benchmark_reads_the_same(family: str, name: str) -> None:
    """All providers in one measurement, as in a run: what it reads of each must be what another reads of it alone."""
    case: Case = next(c for c in cases(family) if (c.name, c.mode) == (name, "forward"))
    threads = torch.get_num_threads()
    with torch.no_grad(), ExitStack() as settings:
        works = {}
        for peer in available_peers(PROVIDERS)[0]:
            if peer.missing(case, torch.float32, threads) is None:
                settings.enter_context(peer.settings(threads))
                works[peer.name] = peer.prepare(Job.of(case, torch.float32, threads))
        assert len(works) >= 2
        read: dict[str, list[tuple[Times, Times]]] = {name: [] for name in works}
        for _ in range(ATTEMPTS):
            ours = measure(works, SECONDS)
            for provider in [name for name, both in read.items() if not (both and agree(*both[-1]))]:
                read[provider].append((ours[provider], _theirs(works[provider])))
            if all(agree(*both[-1]) for both in read.values()):
                break
    apart = {provider: both for provider, both in read.items() if not agree(*both[-1])}
    assert not apart, "\n".join(f"{name}: ours {ours}, theirs {theirs}" for name, both in apart.items() for ours, theirs in both)
