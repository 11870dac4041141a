"""Threads and processes: many callers at once, forked children, torch's number of threads, the fallback without libgomp."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnn.functional as F
import fresh
from fastnn.kernels.cpu.engine import build, packed, threads

CHECKOUT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("threads")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def operands(kind: int) -> tuple[Callable[[], Tensor], Tensor]:
    """One of several calls that take different kernels, and what it must give."""
    g = torch.Generator().manual_seed(kind)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    a, b, w, x = randn(200, 300), randn(300, 400), randn(500, 300), randn(64, 300)
    match kind % 4:
        case 0:
            return lambda: F.matmul(a, b, backend="cpu"), a @ b
        case 1:
            return lambda: F.linear(x, w, activation="relu", backend="cpu"), (x @ w.t()).relu()
        case 2:
            v = randn(300)
            return lambda: F.mv(w, v, backend="cpu"), w @ v
        case _:
            p, q = randn(16, 40, 50), randn(16, 50, 60)
            return lambda: F.bmm(p, q, backend="cpu"), p @ q


def right(result: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(result, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pool", [1, 2, 5])
def test_four_python_threads_at_once(pool: int) -> None:
    torch.set_num_threads(pool)
    start = threading.Barrier(4)

    def work(kind: int) -> list[bool]:
        torch.set_num_threads(pool)  # a thread's own, in libgomp
        call, wanted = operands(kind)
        start.wait()
        with torch.no_grad():
            return [right(call(), wanted) for _ in range(60)]

    with ThreadPoolExecutor(4) as executor:
        for kind, results in enumerate(executor.map(work, range(4))):
            assert all(results), f"kind {kind}: {results.count(False)} of {len(results)} wrong"


def test_one_weight_met_by_many_threads_is_counted_once() -> None:
    packed.clear()
    torch.set_num_threads(1)
    x = torch.randn(33, 400)
    for seed in range(10):
        w = torch.nn.Parameter(torch.randn(500, 400))
        wanted = x @ w.detach().t()
        start = threading.Barrier(4)

        def work(_: int, start: threading.Barrier = start, w: Tensor = w, wanted: Tensor = wanted) -> bool:
            start.wait()
            with torch.no_grad():
                return all(right(F.linear(x, w, backend="cpu"), wanted) for _ in range(5))

        with ThreadPoolExecutor(4) as executor:
            assert all(executor.map(work, range(4))), seed
        assert 0 < packed.held() < 2 * w.nbytes, "the same packing is counted twice"
        del w, work
        packed.clear()
        assert packed.held() == 0


def test_backward_in_several_threads() -> None:
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(70, 90, generator=g), torch.randn(110, 90, generator=g)
    grad = torch.randn(70, 110, generator=g)

    def gradients(linear: Callable[..., Tensor], **backend: Any) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        return torch.autograd.grad(linear(*leaves, **backend), leaves, grad)

    wanted = gradients(torch.nn.functional.linear)
    with ThreadPoolExecutor(4) as executor:
        for got in executor.map(lambda _: [gradients(F.linear, backend="cpu") for _ in range(20)], range(4)):
            assert all(right(a, b) for pair in got for a, b in zip(pair, wanted, strict=True))


def teams(n: int) -> set[int]:
    """How many threads really take part in a region for n."""
    from fastnn.kernels.cpu.engine.build import Kernel

    def make() -> Callable[..., Any]:
        from fastnn.kernels.cpu.engine.region import parallel
        from fastnn.kernels.cpu.engine.simd import INT64, inline, store_scalar

        @inline
        def body(thread, threads, out):  # type: ignore[no-untyped-def]
            store_scalar(INT64, out + 8 * thread, threads)

        def run(n, out):  # type: ignore[no-untyped-def]
            parallel(n, body, (out,))

        return run

    out = torch.zeros(16, dtype=torch.int64)
    Kernel("test_team_v1", "ii", make).load()(n, out.data_ptr())
    assert out.count_nonzero() == out.max(), "each thread of the team ran the body"
    return set(out.tolist()) - {0}


def test_torchs_number_of_threads_is_obeyed_and_left_alone() -> None:
    for n in (1, 2, 4):
        torch.set_num_threads(n)
        assert threads.count() == n
        assert teams(threads.count()) == {n}
        operands(0)[0]()
        assert torch.get_num_threads() == n


def test_one_thread_starts_no_other() -> None:
    """With torch.set_num_threads(1) a process stays single."""
    code = """
import os, torch
torch.set_num_threads(1)
import fastnn.functional as F
a, b = torch.randn(300, 400), torch.randn(400, 500)
before = len(os.listdir("/proc/self/task"))
with torch.no_grad():
    for _ in range(3):
        F.matmul(a, b, backend="cpu"), F.linear(a, b.t().contiguous(), backend="cpu")
print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())
"""
    python(code)  # compiles the kernels: Numba brings SciPy, whose BLAS has a thread of its own
    assert python(code) == "0 1\n"


def python(code: str, **environment: str) -> str:
    done = fresh.python("-c", code, env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environment}, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_launcher_without_libgomp() -> None:
    code = """
import torch, fastnn.functional as F
from concurrent.futures import ThreadPoolExecutor
from fastnn.kernels.cpu.engine import threads
assert threads.LAUNCHER == "python"
a, b, w = torch.randn(200, 300), torch.randn(300, 400), torch.randn(500, 300)
def work(n):
    torch.set_num_threads(n)
    for left, right in ((a, b), (a, w.t()), (w, a[3]), (a[:2], b)):
        torch.testing.assert_close(F.matmul(left, right, backend="cpu"), left @ right, rtol=1e-4, atol=1e-3)
    return n
for n in (1, 2, 5):
    work(n)
with ThreadPoolExecutor(4) as pool:
    print(sum(pool.map(work, (1, 2, 3, 4))))
"""
    assert python(code, FASTNN_LAUNCHER="python") == "10\n"


def test_an_unknown_launcher_is_refused() -> None:
    with pytest.raises(AssertionError, match="FASTNN_LAUNCHER is 'pthreads'; allowed: 'gomp', 'python'"):
        python("import fastnn.kernels.cpu.engine.threads", FASTNN_LAUNCHER="pthreads")


# Forks ----------------------------------------------------------------------------------------------------------------


def in_a_child(work: Callable[[], bool], seconds: float = 60) -> None:
    """Fork, run in the child, and expect a clean exit in time."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 3
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_by_itself() -> None:
    torch.set_num_threads(4)
    calls = [operands(kind) for kind in range(4)]

    def child() -> bool:
        if threads.count() != 1 or torch.get_num_threads() != 4:
            return False
        results = [call() for call, _ in calls * 3]
        torch.set_num_threads(1)  # to compare: torch's own operations on several threads hang in a forked child
        return all(right(result, wanted) for result, (_, wanted) in zip(results, calls * 3, strict=True))

    with torch.no_grad():
        for call, wanted in calls * 3:
            assert right(call(), wanted)
        in_a_child(child)
        assert threads.count() == 4
        assert all(right(call(), wanted) for call, wanted in calls)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_a_forked_child_differentiates_a_convolution(op: str, form: torch.memory_format) -> None:
    """Its bias too, whose gradient is a sum: torch's, by several threads, would hang."""
    torch.set_num_threads(4)
    x, w = torch.randn(4, 32, 64, 64).contiguous(memory_format=form), torch.randn(32, 32, 3, 3, requires_grad=True)
    b = torch.randn(32, requires_grad=True)
    (x + 1).sum()  # torch's pool is there

    def gradients() -> list[Tensor]:
        y = getattr(F, op)(x, w, b, padding=1, backend="cpu")
        return list(torch.autograd.grad(y, (w, b), x))

    wanted = gradients()

    def child() -> bool:
        results = gradients()
        torch.set_num_threads(1)
        return all(right(result, other) for result, other in zip(results, wanted, strict=True))

    in_a_child(child, 20)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_parent_and_child_have_scratch_memory_of_their_own() -> None:
    torch.set_num_threads(1)
    a, b = torch.randn(300, 500), torch.randn(500, 400)
    c, d = torch.randn(300, 500) + 7, torch.randn(500, 400)
    F.matmul(a, b, backend="cpu")  # packs b: in scratch memory that the child inherits
    wanted, childs = a @ b, c @ d
    go = os.pipe()

    # The scratch memory belongs to the Python thread that forks, so this thread has to be at work at the same time.
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.read(go[0], 1)
            status = 0 if all(right(F.matmul(c, d, backend="cpu"), childs) for _ in range(150)) else 3
        finally:
            os._exit(status)
    os.write(go[1], b"x")
    results = [right(F.matmul(a, b, backend="cpu"), wanted) for _ in range(150)]
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child's products are wrong"
    assert all(results), "the parent's products are wrong"


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_can_load_and_pack_though_a_thread_of_the_parent_was_at_it() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with packed._lock, build._lock:
            held.set()
            done.wait()

    def child() -> bool:
        packed.clear()
        return build.Kernel.registry["product_float32"].load() is not None

    holder = threading.Thread(target=hold)
    F.matmul(torch.randn(300, 300), torch.randn(300, 300), backend="cpu")  # the kernel is there
    holder.start()
    held.wait()
    try:
        in_a_child(child, 10)
    finally:
        done.set()
        holder.join()


class Products(torch.utils.data.Dataset[Tensor]):
    """Each item is a product, made in the worker."""

    def __init__(self) -> None:
        self.a, self.b = torch.randn(8, 150, 200), torch.randn(200, 300)

    def __len__(self) -> int:
        return len(self.a)

    def __getitem__(self, index: int) -> Tensor:
        return F.matmul(self.a[index], self.b, backend="cpu")


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_dataloader_worker_after_the_parent_used_the_pool() -> None:
    torch.set_num_threads(2)
    products = Products()
    wanted = products.a @ products.b
    assert right(F.matmul(products.a, products.b, backend="cpu"), wanted)
    loader = torch.utils.data.DataLoader(products, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    for _ in range(2):
        assert right(torch.cat(list(loader)), wanted)
        assert right(F.matmul(products.a, products.b, backend="cpu"), wanted)
