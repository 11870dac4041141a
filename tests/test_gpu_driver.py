"""Launches that come again: what reaches the driver, whose place a function in Python takes here. (Triton's kernels, beside
what its own launcher does: test_gpu_compile.py.)
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastnn.kernels.cpu.engine import build
from fastnn.kernels.gpu.engine import driver

START = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)
Again = Callable[..., int]


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> tuple[Again, list[Any]]:
    """The function, and what it told the driver: grid and block, shared memory, stream, function, and five words of the first
    parameter. The driver answers with the block's size over 64."""
    seen: list[Any] = []

    @START
    def launch(function: int, x: int, y: int, z: int, block: int, v: int, w: int, shared: int, stream: int, parameters: Any,
               extra: Any) -> int:  # fmt: skip
        words = list((ctypes.c_longlong * 5).from_address(parameters[0]))
        seen.append(((x, y, z, block, v, w), shared, stream, function, extra, words))
        return block // 64

    made = build.load("fastnn_launch_again", driver._code())
    monkeypatch.setattr(driver, "again", lambda: made)
    monkeypatch.setattr(driver, "_library", lambda: SimpleNamespace(cuLaunchKernel=launch))
    return made, seen


def test_words(again: tuple[Again, list[Any]]) -> None:
    launch, seen = again
    x, y, empty = torch.zeros(4), torch.zeros(2), torch.zeros(0)
    found = driver.of_words(2**63 + 5, 3, 32, 1024, [x, 7, -1, empty, y])
    assert found is not None
    assert [t is other for t, other in zip(found.addresses, (x, y), strict=True)] == [True, True]
    assert launch(found.where, 9, x.data_ptr(), y.data_ptr()) == 0
    assert seen == [((3, 1, 1, 32, 1, 1), 1024, 9, 2**63 + 5, None, [x.data_ptr(), 7, -1, empty.data_ptr() and 1, y.data_ptr()])]
    assert launch(found.where, 0, 11, 12) == 0
    assert seen[1][2] in (0, None)
    assert seen[1][5][::4] == [11, 12]
    assert found.words[7] == 0  # what stays is not written to


def test_the_drivers_error_comes_back(again: tuple[Again, list[Any]]) -> None:
    launch, _ = again
    found = driver.of_words(1, 1, 448, 0, [0] * 5)
    assert found is not None
    assert launch(found.where, 0) == 7


def test_what_is_no_number_is_an_error(again: tuple[Again, list[Any]]) -> None:
    launch, seen = again
    found = driver.of_words(1, 1, 32, 0, [torch.zeros(1), 0, 0, 0, 0])
    assert found is not None
    with pytest.raises(TypeError):
        launch(found.where, 0, "address")
    assert not seen


def test_threads_do_not_share_a_launch(again: tuple[Again, list[Any]]) -> None:
    launch, seen = again
    x = torch.zeros(1)
    found = driver.of_words(1, 1, 32, 0, [x] * 5)
    assert found is not None

    def many(address: int) -> None:
        for _ in range(200):
            launch(found.where, 0, *[address] * 5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many, range(1, 9)))
    assert len(seen) == 1600
    assert all(len(set(words)) == 1 for *_, words in seen)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver, "_library", nothing)
    driver.again.cache_clear()
    try:
        assert driver.again() is None
        assert driver.of_words(1, 1, 32, 0, [1]) is None
    finally:
        driver.again.cache_clear()
