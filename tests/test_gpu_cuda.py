"""CUDA C: sources compile for three architectures within their budgets; the engine around them; the shim that runs them."""

import functools
import importlib.util
from array import array
from typing import Any

import pytest
import torch

from cuda_shim import kernels_of, needs_compiler, nvrtc, shim
from fastnn.kernels.gpu import pool, rnn, rnn_half
from fastnn.kernels.gpu.engine import cuda
from gpu import HERE

CPU = torch.device("cpu")
needs_nvrtc = pytest.mark.skipif(nvrtc.library() is None, reason="NVRTC is missing: the extra gpu-check has it")

#: Kernels that are compiled in every run, by source: the most demanding ones of each kind. tests/cuda_shim/nvrtc.py takes all.
POOL = ["forward<float, 4, true, 3, 2, 1, ARGMAX>", "forward<bfloat_t, 8, false, 3, 1, 1, ARGMAX>",
        "forward<half_t, 1, false, 0, 0, 0, MAX>", "backward<bfloat_t, 8, true, 3, 1, 1, false>",
        "reduce<double, AVERAGE>", "unpool<unsigned, true>"]  # fmt: skip
RNN = ["forward<LSTM, 4>", "backward<GRU, 4>", "backward<RNN, 2>", "scan<half_t>"]
HALF = ["forward<half_t, GRU, 12>", "forward<bfloat_t, RNN, 12>", "forward<bfloat_t, LSTM, 8>"]
FEW = {"80": (POOL[:1], RNN[:1], HALF[:1]), "90": (POOL, RNN, HALF), "100": (POOL[3:4], RNN[1:2], HALF[:1])}


def budget(name: str) -> int:
    """Registers a thread may have: twice 256 threads on a multiprocessor for pooling, rnn.py's blocks for recurrences."""
    if name.startswith(("forward<LSTM", "forward<GRU", "forward<RNN", "backward<LSTM", "backward<GRU", "backward<RNN")):
        kv = int(name.rstrip(">").split(", ")[1])
        return min(255, 65536 // (32 * rnn.WARPS[kv]) // 8 * 8)
    return 255 if name in HALF else 128


@needs_nvrtc
@pytest.mark.parametrize("family", [0, 1, 2], ids=["pool", "rnn", "rnn_half"])
@pytest.mark.parametrize("arch", FEW)
def test_compiles_within_its_budget(arch: str, family: int) -> None:
    source, names = (pool.SOURCE, rnn.SOURCE, rnn_half.SOURCE)[family], FEW[arch][family]
    assert set(names) <= set(source.instances())
    log, found = nvrtc.compile(source.text, arch, names)
    assert "warning" not in log, log
    for name, usage in found.items():
        assert usage.local == usage.spilled == 0, f"{name}: {usage}"
        assert usage.shared == 0, f"{name}: shared memory is dynamic here"
        assert 16 <= usage.registers <= budget(name), f"{name}: {usage.registers} registers"


@needs_nvrtc
def test_the_compiler_is_asked() -> None:
    with pytest.raises(AssertionError, match="identifier"):
        nvrtc.compile("__global__ void kernel() { nobody(); }", "90", ["kernel"])
    greedy = """__global__ void __launch_bounds__(1024, 2) kernel(float* p) {
        float v[200];
        #pragma unroll
        for (int i = 0; i < 200; i++) v[i] = p[i * threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 200; i++) p[i + threadIdx.x] = v[i] * v[199 - i];
    }"""
    assert nvrtc.compile(greedy, "90", ["kernel"])[1]["kernel"].spilled > 0


def test_headers_are_part_of_the_source() -> None:
    for source in (pool.SOURCE, rnn.SOURCE, rnn_half.SOURCE):
        assert "#include" not in source.text
        assert "struct bfloat_t" in source.text
        assert len(set(source.instances())) == len(source.instances())
        assert set(kernels_of(source)) <= set(source.instances())


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cuda.CuPy()
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "NVIDIA" in str(cuda.CuPy.refusal.__wrapped__(real))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install cupy" in str(cuda.CuPy.refusal.__wrapped__(real))
    if not HERE:
        monkeypatch.setattr(cuda, "launcher", real)
        with pytest.raises(RuntimeError, match=r"pool\.cu could not be compiled and loaded for cpu .*backend='torch'"):
            pool.SOURCE.launch("unpool<i64, true>", CPU, 1, 32, array("q", [0]))


class Driver:
    """Stands in for the launcher: what a call of the engine comes to."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.calls: list[Any] = []

    def function(self, source: cuda.Source, expression: str, device: torch.device) -> str:
        self.compiled.append(expression)
        return expression

    def launch(self, *call: Any) -> None:
        self.calls.append(call)


def test_a_kernel_is_compiled_once_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(cuda, "launcher", driver)
    source, words = cuda.Source("pool", list), array("q", [1])
    for device in (CPU, CPU, torch.device("meta")):
        source.threads("kernel<1>", device, 1000, words)
    assert driver.compiled == ["kernel<1>"] * 2
    assert driver.calls[0] == ("kernel<1>", CPU, 4, 256, 0, words, False)


# The shim

PROBE = """
struct Probe { long long value, out; };
__global__ void sum(const Probe p) {
    float* shared = (float*)shim::memory();
    shared[threadIdx.x] = (float)threadIdx.x;
    __syncthreads();
    ((float*)p.out)[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x] + __shfl_sync(~0u, (float)threadIdx.x, 1);
}
__global__ void some_wait(const Probe p) { if (threadIdx.x < p.value) __syncthreads(); }
__global__ void two_places(const Probe p) { if (threadIdx.x < p.value) __syncthreads(); else __syncthreads(); }
__global__ void some_shuffle(const Probe p) { if (threadIdx.x % 2) ((float*)p.out)[0] = __shfl_sync(~0u, 1.0f, 0); }
__global__ void past_the_end(const Probe p) { ((float*)shim::memory())[p.value + threadIdx.x] = 1; __syncthreads(); }
__global__ void stuck(const Probe p) { while (*(volatile int*)p.out != 5) __nanosleep(1); }
__global__ void all_blocks(const Probe p) {
    atomicAdd((int*)p.out, 1);
    while (*(volatile int*)p.out < gridDim.x * blockDim.x) __nanosleep(1);
}
"""


@functools.cache
def probe() -> cuda.Source:
    names = ["sum", "some_wait", "two_places", "some_shuffle", "past_the_end", "stuck", "all_blocks"]
    source = cuda.Source("probe", lambda: names)
    source.__dict__["text"] = PROBE
    return source


@needs_compiler
def test_the_shim_runs_and_finds() -> None:
    out = torch.zeros(64)

    def launch(name: str, value: int, shared: int = 0, grid: int = 1, cooperative: bool = False) -> None:
        probe().launch(name, CPU, grid, 64, array("q", [value, out.data_ptr()]), shared, cooperative)

    with shim():
        launch("sum", 0, shared=256)
        lanes = torch.arange(64.0)
        assert torch.equal(out, lanes.flip(0) + 1 + lanes // 32 * 32)
        for name, value, shared, message in (
            ("some_wait", 40, 0, "threads left before a barrier"), ("two_places", 33, 0, "threads at different barriers"),
            ("some_shuffle", 0, 0, "lanes left before a shuffle"), ("past_the_end", 1, 256, "past the end of shared memory"),
            ("stuck", 0, 0, "nobody gets on"),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=message):
                launch(name, value, shared)
        launch("past_the_end", 0, 256)
        launch("some_wait", 64)
        out.zero_()
        launch("all_blocks", 0, grid=3, cooperative=True)
        assert out.view(torch.int32)[0] == 3 * 64
        out.zero_()
        with pytest.raises(RuntimeError, match="nobody gets on"):  # block after block: each waits for the others
            launch("all_blocks", 0, grid=3)
