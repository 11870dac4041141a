"""Fixtures that every test may use."""

import gc
import os
import re
from collections.abc import Iterator

import hypothesis
import pytest
import torch

import fastnn
from fastnn import backends
from fastnn.kernels.cpu.engine.overhead import no_rules

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, by the first test of a GPU kernel

hypothesis.settings.register_profile("fastnn", deadline=None, print_blob=True, max_examples=60)
hypothesis.settings.load_profile("fastnn")


def pytest_configure(config: pytest.Config) -> None:
    """Kernels are compiled once for all tests and all runs, away from the user's own cache; the Makefile knows the folder."""
    os.environ.setdefault("FASTNN_CACHE_DIR", str(config.rootpath / ".pytest_cache/kernels"))


def pytest_collection_finish() -> None:
    """What is there by now stays: each full collection would walk some million objects of imports and test items."""
    gc.collect()
    gc.freeze()


#: What `make test-quick` leaves out: files whose tests start processes, measure, trace or go through whole models; tests of other
#: dtypes than float32, which run the same code and have kernels of their own to compile.
SLOW_FILES = re.compile(
    r"test_(bench|bench_gpu|cache|cli|compile|examples|gpu_\w+|guard|models|outsider|packaging|peers|style|threads|verify)\.py"
)
OTHER_DTYPES = re.compile("float64|float16|gradcheck|autocast|half|sixteen")
#: Single tests that take long. They come first, so that at the end no process is left alone with one of them.
LONG = re.compile("test_(every_kernel_compiles|nothing_outside_is|style|narrower_vectors|more_than_two_to_the_31_outputs)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.match(item.name) is None)
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        others = any(OTHER_DTYPES.search(text) for text in (item.name, *map(str, parameters)))
        if others or SLOW_FILES.fullmatch(item.path.name):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(20)


@pytest.fixture(autouse=True)
def kernels_themselves() -> Iterator[None]:
    """The kernels are tested, however small their work, and not the rules that leave some of it to torch."""
    with no_rules():
        yield


@pytest.fixture(autouse=torch.cuda.is_available())
def lost_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a kernel does wrong is its own test's failure, and not that of all after it."""
    yield
    if request.node.get_closest_marker("gpu"):
        from gpu import end_if_the_gpu_is_lost

        end_if_the_gpu_is_lost()


@pytest.fixture
def calls() -> Iterator[list[backends.Call]]:
    """The calls that the test makes, as fastnn.trace() lists them."""
    with fastnn.trace() as traced:
        yield traced


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    """Kernel modules are looked up anew in the test, and again after it."""
    backends.forget()
    yield
    backends.forget()


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that torch hands out uninitialised is full of NaN: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009  # torch has no stub for it
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever number of threads a test sets, the next test has the old one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
