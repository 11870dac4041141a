"""What stands between a call and a GPU kernel: autocast, the words when something is missing, the device."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")

import fastnn.functional as F
import fresh
from fastnn import backends, ops
from fastnn.kernels.gpu.engine import cuda, launch
from fastnn.ops._operator import Operator
from gpu import HERE, end_if_the_gpu_is_lost, lying_alike, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (ops.matmul.matmul, torch.float16),
        (ops.softmax.softmax, torch.float32),
        (ops.norm.layer_norm, torch.float32),
        (ops.norm.rms_norm, None),
        (ops.norm.batch_norm, None),
        (ops.activation.activation, None),
    ],
    ids=lambda x: x.name if isinstance(x, Operator) else str(x),
)
def test_autocast_on_cuda_has_cudas_lists(op: Operator, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to enable it without a GPU, so it is told that it is."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = torch.empty(3, dtype=torch.bfloat16, device="cuda"), torch.empty(3, dtype=torch.float64, device="cuda")
        cpu = torch.empty(3, dtype=torch.bfloat16)
    if op.autocast is None:
        assert expected is None
        return
    low, double, elsewhere = op._cast((*given, cpu))
    assert (low.dtype, double.dtype, elsewhere.dtype) == (expected, torch.float64, torch.bfloat16)


@pytest.mark.skipif(HERE, reason="the words are for where no GPU is")
def test_without_a_gpu_it_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"no gpu kernel takes a tensor on device 'cpu'; .*(install|driver|nvidia-smi)"):
        F.relu(torch.ones(3), backend="gpu")


@pytest.mark.parametrize(("module", "words"), [("triton", "pip install triton"), ("cupy", "pip install cupy-cuda13x")])
def test_a_missing_package_is_named(module: str, words: str, fresh_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=f"{module}.language")

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    kernel, supports, _ = backends.load("gpu", ops.matmul.matmul)
    assert kernel is None
    assert supports is not None
    assert words in str(supports("matmul"))


@pytest.mark.parametrize("words", ["The NVIDIA driver is too old (found version 11040).\nMore.", "Found no NVIDIA driver"])
def test_torchs_own_words_for_a_driver(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert backends.without_gpu() == words.splitlines()[0]


class Recorder:
    """A kernel that notes which device was current when it was launched."""

    def __init__(self, current: list[int]) -> None:
        self.current, self.seen = current, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *args, **options: self.seen.append((grid, self.current[-1], args, options))


def test_a_kernel_is_launched_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = Recorder(current)
    for index in (0, 1):
        launch.run(kernel, 7, torch.device("cuda", index), 3, num_warps=4)
    launch.run(kernel, 0, torch.device("cuda", 0))  # nothing to do is no launch
    assert kernel.seen == [((7,), index, (3,), {"num_warps": 4}) for index in (0, 1)]
    assert current == [0]


def test_a_kernel_that_does_not_fit_says_what_to_do() -> None:
    """Of Triton's own words the numbers stay, and not the advice on block sizes, which are not the user's."""
    from triton.runtime.errors import OutOfResources

    class Greedy:
        __name__ = "product"

        def __getitem__(self, grid: tuple[int]) -> Any:
            raise OutOfResources(300000, 232448, "shared memory")

    words = r"product does not fit on cpu \(shared memory: 300000, .* 232448\); use backend='torch'"
    with pytest.raises(RuntimeError, match=words):
        launch.run(Greedy(), 1, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    x = torch.randn(64, 64, device="cuda:1")
    torch.testing.assert_close(F.matmul(x, x, backend="gpu"), x @ x)


@pytest.mark.skipif(not HERE, reason="needs a GPU")
@pytest.mark.parametrize("stream", [False, True])
def test_capture_in_a_graph(stream: bool) -> None:
    """The kernels are launched on the current stream, and nothing waits for the GPU."""
    x, w = torch.randn(64, 64, device="cuda"), torch.randn(64, 64, device="cuda")

    def step() -> torch.Tensor:
        y = F.linear(x, w, activation="gelu", backend="gpu")
        return F.layer_norm(F.softmax(y, -1, backend="gpu"), (64,), backend="gpu")

    with torch.cuda.stream(torch.cuda.Stream()) if stream else nullcontext():
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()
        x.copy_(torch.randn(64, 64))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(y, step())


def test_a_lost_gpu_ends_its_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Under xdist so that another one begins; the first line of CUDA's words is the reason."""
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …")

    ended: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lost)
        patch.setattr(os, "_exit", ended.append)
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        with pytest.raises(pytest.exit.Exception, match="lost to this process: CUDA error: an illegal memory access"):
            end_if_the_gpu_is_lost()
        patch.setenv("PYTEST_XDIST_WORKER", "gw0")
        patch.setattr(pytest, "exit", lambda *args, **options: None)
        end_if_the_gpu_is_lost()
    assert ended == [3]
    assert "illegal memory access" in capsys.readouterr().err


def test_tensors_of_tests_lie_on_the_gpu_as_they_were_made() -> None:
    base = torch.arange(24.0)
    for t in (base[1:19].view(3, 6)[:, ::2], base[:4].view(4, 1).expand(4, 3), base.view(4, 6).t(), base[5]):
        moved = lying_alike(t, "cpu")
        assert torch.equal(moved, t)
        assert (moved.stride(), moved.storage_offset()) == (t.stride(), t.storage_offset())
        assert moved.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


FAR = (1 << 30) + 16  # elements: the third of what lies so far apart is beyond 2³¹


def far(t: torch.Tensor) -> torch.Tensor:
    """The same, the rows, or whatever the first dimension counts, far apart: most of the memory between is never touched."""
    room = torch.empty(FAR * (len(t) - 1) + t[0].numel(), dtype=t.dtype, device=t.device)
    return room.as_strided(t.shape, (FAR, *t[0].contiguous().stride())).copy_(t)


_X = torch.randn(3, 20, generator=torch.Generator().manual_seed(1)).bfloat16()
_IMAGE = torch.randn(3, 17, 4, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
_FILTER = torch.randn(3, 17, 3, 3, generator=torch.Generator().manual_seed(3)).bfloat16()
_HEADS = torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
_WINDOW: tuple[Any, ...] = ([1, 1], [1, 1], [1, 1])


@pytest.mark.skipif(HERE, reason="a GPU's memory is not for the asking")
@pytest.mark.parametrize(
    ("op", "args"),
    [
        (ops.matmul.matmul, (_X, _X.mT.contiguous())),
        (ops.matmul.linear, (_X, _X, None, torch.ones(3, 3).bfloat16(), "relu")),
        (ops.activation.activation, (_X, "gelu", [])),
        (ops.softmax.softmax, (_X, 1)),
        (ops.softmax.cross_entropy, (_X, torch.tensor([3, 0, 19]), None, -100, "none", 0.1)),
        (ops.norm.layer_norm, (_X, None, None, [20], 1e-5)),
        (ops.norm.batch_norm, (_IMAGE, None, None, None, None, 1e-5)),
        (ops.conv.conv, (_IMAGE, _FILTER, None, None, *_WINDOW, False, [0, 0], 1, None)),
        (ops.conv.conv_weight, (_IMAGE[:, :3], _IMAGE, [3, 3], *_WINDOW, 1)),
        (ops.embedding.embedding, (_X, torch.tensor([2, 1]), -1, False)),
        (ops.attention.attention, (_HEADS, _HEADS, _HEADS, None, None, None, None, 0.0, 0, 0.25, -1, -1, True, 0, 0.0)),
    ],
    ids=lambda x: x.name if isinstance(x, Operator) else "",
)
def test_addresses_have_64_bits(op: Operator, args: tuple[Any, ...]) -> None:
    """The same numbers more than 2³¹ elements from the first are the same result."""
    apart = [far(a) if isinstance(a, torch.Tensor) and a.is_floating_point() and len(a) == 3 else a for a in args]
    near, distant = run(op, *args), run(op, *apart)
    for a, b in zip(near, distant, strict=True) if isinstance(near, tuple) else [(near, distant)]:
        assert torch.equal(a, b)


@pytest.mark.skipif(HERE, reason="a GPU's memory is not for the asking")
def test_rows_of_heads_far_apart() -> None:
    """Within a block addresses have 32 bits only where that is enough."""
    q = _HEADS[0, :1, :3].contiguous()
    rest = (None, None, None, None, 0.0, 0, 0.25, -1, -1, True, 0, 0.0)
    away = far(q[0])[None]
    near, distant = (run(ops.attention.attention, t, t, t, *rest) for t in (q, away))
    assert torch.equal(near[0], distant[0])
    back = [run(ops.attention.attention_backward, t, t, t, t, *rest[:4], *near, None, False, *rest[4:]) for t in (q, away)]
    for a, b in zip(*back, strict=True):
        assert torch.equal(a, b)


class Cupy:
    """Stands in for the package: its kernels, or what it raises as it compiles one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Exception | None = None) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.current = [0]
        kernel = SimpleNamespace(kernel=SimpleNamespace(ptr=7))

        def compiled(**given: Any) -> Any:
            if fails is not None:
                raise fails
            return SimpleNamespace(get_function=lambda expression: kernel)

        def occupancy(*key: int) -> int:
            self.asked.append((self.current[-1], *key))
            return 2

        @contextmanager
        def device(index: int) -> Iterator[None]:
            self.current.append(index)
            yield
            self.current.pop()

        def bind(index: int) -> None:
            self.current[-1] = index

        runtime = SimpleNamespace(Device=device, runtime=SimpleNamespace(setDevice=bind))
        driver = SimpleNamespace(occupancyMaxActiveBlocksPerMultiprocessor=occupancy)
        for name, module in {
            "cupy": SimpleNamespace(cuda=runtime, RawModule=compiled), "cupy.cuda": runtime,
            "cupy_backends": SimpleNamespace(), "cupy_backends.cuda": SimpleNamespace(),
            "cupy_backends.cuda.api": SimpleNamespace(driver=driver),
        }.items():  # fmt: skip
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(cuda.CuPy, "limits", lambda self, device: cuda.Limits(132, cuda.STATIC))


def test_a_cupy_that_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a process, at the first call: torch serves, with a reason that says what to do."""
    Cupy(monkeypatch)
    assert cuda.CuPy().refusal() is None
    Cupy(monkeypatch, ImportError("libnvrtc.so.12: cannot open shared object file"))
    launcher = cuda.CuPy()
    reason = str(launcher.refusal())
    for words in ("libnvrtc.so.12", "pip install 'cupy-cuda13x[ctk]'", "CUPY_CACHE_DIR"):
        assert words in reason
    Cupy(monkeypatch)
    assert launcher.refusal() == reason


def test_cupy_gets_a_folder_where_home_is_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTNN_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("CUPY_CACHE_DIR", "mine")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    cuda._somewhere_to_keep_kernels()
    assert os.environ.pop("CUPY_CACHE_DIR") == "mine"
    cuda._somewhere_to_keep_kernels()
    assert os.environ["CUPY_CACHE_DIR"] == str(tmp_path / "kept" / "cupy")
    monkeypatch.delenv("CUPY_CACHE_DIR")
    monkeypatch.setattr(os, "access", lambda path, mode: path == str(tmp_path))
    cuda._somewhere_to_keep_kernels()
    assert "CUPY_CACHE_DIR" not in os.environ


def test_what_fits_is_asked_once_and_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, launcher = Cupy(monkeypatch), cuda.CuPy()
    for _ in range(2):
        assert launcher.resident((7, None), torch.device("cuda", 1), 384, 1000) == 2 * 132
    assert cupy.asked == [(1, 7, 384, 1000)]
    assert cupy.current == [0]


def test_importing_fastnn_imports_no_triton() -> None:
    code = "import sys, fastnn, fastnn.functional; sys.exit('triton' in sys.modules or 'cupy' in sys.modules)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fresh.python("-c", code, env=os.environ, cwd=Path(__file__).parent).returncode == 0


def test_offsets_on_a_gpu_are_not_waited_for() -> None:
    """A fake tensor has no values: to ask for them raises, as it would break a CUDA graph's capture."""
    with FakeTensorMode():
        q, offsets = torch.empty(2, 8, 16, device="cuda"), torch.empty(3, dtype=torch.int64, device="cuda")
        ops.attention._inspect(q, q, q, None, None, offsets, offsets)
        with pytest.raises(RuntimeError):
            offsets.tolist()
