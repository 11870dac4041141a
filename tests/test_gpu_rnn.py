"""Recurrent layers on the GPU against the reference. Without a GPU the same kernels and host code run on the shim, where each
thread of the whole grid is a fiber: three blocks that wait for each other through memory.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnn
from cuda_shim import needs_compiler, nvrtc, shim
from fastnn import backends
from fastnn.functional import _rnn as layers
from fastnn.kernels.cpu.engine import overhead
from fastnn.kernels.gpu import rnn as gpu
from fastnn.kernels.gpu import rnn_half
from fastnn.kernels.gpu.engine import cuda
from fastnn.kernels.reference import rnn as reference
from fastnn.ops import rnn as ops
from gpu import DEVICE, HERE, record, run

pytestmark = [pytest.mark.gpu] if HERE else [pytest.mark.gpu, needs_compiler]
MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
PACKED = torch.tensor([5, 5, 3, 1])


@pytest.fixture(autouse=True)
def device() -> Iterator[Any]:
    """The shim, where there is no GPU"""
    if HERE:
        yield None
    else:
        with shim() as device:
            yield device


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def there(args: Any) -> list[Any]:
    """On the GPU, but for batch sizes"""
    return [a.to(DEVICE) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def double(args: Any) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def same(ours: Any, exact: Any, dtype: torch.dtype = torch.float32, times: float = 32.0) -> None:
    for number, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert a.shape == b.shape
        if b.numel():
            error = float((a.cpu().double() - b).abs().max())
            allowed = times * torch.finfo(dtype).eps * max(1.0, float(b.abs().max()))
            assert error <= allowed, f"result {number}: {error:.3g} of {allowed:.3g}"


def both(
    mode: str,
    units: int,
    batch: int = 3,
    steps: int = 3,
    sizes: Tensor | None = None,
    reverse: bool = False,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    keep: bool = True,
    back: bool = True,
) -> None:
    """One direction of one layer, and its backward, are the reference's in float64."""
    wide, inputs = reference.GATES[mode] * units, 5
    rows, batch = (steps * batch, batch) if sizes is None else (int(sizes.sum()), int(sizes[0]))
    scale = units**-0.5
    cells = randn(batch, units, dtype=dtype) if mode == "lstm" else None
    biases = [randn(wide, dtype=dtype) if bias else None for _ in range(2)]
    given = [randn(rows, inputs, dtype=dtype), randn(batch, units, dtype=dtype), cells,
             *(randn(wide, n, scale=scale, dtype=dtype) for n in (inputs, units)), *biases, None]  # fmt: skip
    rest = [sizes, mode, reverse]
    found = run(ops.recurrent, *there(given), *rest, keep)
    exact = reference.recurrent(*double(given), *rest, keep)
    same(found[:3], exact[:3], dtype)
    if keep and dtype == torch.float32:
        same(found[3:], exact[3:])
    if not back:
        return
    grads = [randn(*t.shape, dtype=dtype) for t in exact[:3]]
    needs = [t is not None for t in given]
    back = run(ops.recurrent_backward, *there(grads), *there(given), found[0], found[3], *rest, needs)
    same(back, reference.recurrent_backward(*double([*grads, *given]), exact[0], exact[3], *rest, needs), dtype, 64)


def stack(mode: str, layers: int, bidirectional: bool, bias: bool, keep: bool, sizes: Tensor | None, batch: int = 5,
          units: int = 8, steps: int = 3, dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
    """Layers on layers, and their backward, are the reference's in float64."""
    inputs, directions = 6, 2 if bidirectional else 1
    batch = batch if sizes is None else int(sizes[0])
    rows = steps * batch if sizes is None else int(sizes.sum())
    wide = reference.GATES[mode] * units
    count = sum((inputs if layer == 0 else directions * units) + units + 2 * bias for layer in range(layers)) * wide * directions
    states = (layers * directions, batch, units)
    given = [randn(rows, inputs, dtype=dtype), randn(*states, dtype=dtype),
             randn(*states, dtype=dtype) if mode == "lstm" else None, randn(count, scale=0.3, dtype=dtype)]  # fmt: skip
    rest = [sizes, mode, layers, bidirectional, bias]
    found = run(ops.recurrent_stack, *there(given), *rest, keep)
    exact = reference.recurrent_stack(*double(given), *rest, keep)
    same(found, exact, dtype)
    grads = [randn(*t.shape, dtype=dtype) for t in exact[:3]]
    needs = [t is not None for t in given]
    back = run(ops.recurrent_stack_backward, *there(grads), *there(given), found[0], found[3], *rest, needs)
    same(back, reference.recurrent_stack_backward(*double([*grads, *given]), exact[0], exact[3], *rest, needs), dtype, 64)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_one_layer(mode: str, reverse: bool) -> None:
    both(mode, 12, reverse=reverse)
    both(mode, 13, batch=1, reverse=reverse)  # no 16-byte reads; the last units of a block missing
    both(mode, 8, sizes=PACKED, reverse=reverse, bias=False)


def test_a_state_that_begins_anywhere() -> None:
    """Dense, but not on a boundary of 16 bytes"""
    given = [randn(6, 5), randn(3, 12), None, randn(36, 5), randn(36, 12), None, None, None, None, "gru", False, False]
    args = there(given)
    args[1] = torch.empty(1 + 3 * 12, device=DEVICE)[1:].view(3, 12).copy_(args[1])
    assert args[1].data_ptr() % 16
    same(run(ops.recurrent, *args)[:3], reference.recurrent(*double(given))[:3])


@pytest.mark.parametrize("mode", MODES)
def test_wide_and_many(mode: str) -> None:
    """More than 128 columns; more rows than a tile; more than shared memory takes at once; gates made again"""
    both(mode, 40, batch=11, steps=2, keep=False)
    if not HERE:
        units = {"lstm": 16, "gru": 16}.get(mode, 136)
        with shim(multiprocessors=4, shared=48 << 10) as device:
            how = gpu.cut(gpu.KINDS[mode], True, device.has, 1, 19, units, False)
            assert isinstance(how, gpu.Cut)
            both(mode, units, batch=19, steps=2)


@pytest.mark.parametrize(("layers", "bidirectional", "bias", "keep", "sizes"), [
    (3, False, True, True, None), (2, True, False, True, PACKED), (1, True, True, True, None), (2, False, True, False, PACKED),
], ids=["three", "two-packed-ways", "ways", "packed-again"])  # fmt: skip
@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh"])
def test_layers_side_by_side(mode: str, layers: int, bidirectional: bool, bias: bool, keep: bool, sizes: Tensor | None) -> None:
    """All jobs of a launch wait for each other; the gradients of one vector of weights"""
    with shim(multiprocessors=2 * layers * (2 if bidirectional else 1)) if not HERE else nullcontext():
        stack(mode, layers, bidirectional, bias, keep, sizes)


@pytest.mark.parametrize("mode", MODES)
def test_layers_of_the_functions(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the functions make of recurrent_stack is what torch makes of its layers; here the op's plain maths serve it."""
    if not HERE:
        monkeypatch.setattr(layers, "_side_by_side", lambda input: True)
        monkeypatch.setattr(layers, "_no_stack", lambda *args: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default
    kind: Any = {"lstm": nn.LSTM, "gru": nn.GRU}.get(mode, nn.RNN)
    options: dict[str, Any] = {"nonlinearity": "relu"} if mode == "rnn_relu" else {}
    for more in ({"num_layers": 2}, {"num_layers": 2, "bidirectional": True, "bias": False}, {"batch_first": True}):
        module = kind(4, 6, **options, **more).to(DEVICE)
        ours = copy.deepcopy(module)
        fastnn.replace(ours)
        x = torch.randn(3, 5, 4, device=DEVICE)
        packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 4, device=DEVICE), torch.tensor([5, 3, 3]))
        for input in (x, x[0], packed):
            results = []
            for m in (ours, module):
                y, last = m(input)
                leaves = [y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y, *(last if mode == "lstm" else (last,))]
                m.zero_grad()
                weighted = [(t * torch.arange(t.numel(), device=DEVICE).view(t.shape).cos()).sum() for t in leaves]
                torch.stack(weighted).sum().backward()
                results.append([*(t.detach() for t in leaves), *(p.grad for p in m.parameters())])
            torch.testing.assert_close(*results)


def test_a_parameter_of_the_wrong_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_side_by_side", lambda input: True)
    monkeypatch.setattr(layers, "_no_stack", lambda *args: None)
    params = [randn(24, 4), randn(24, 5), randn(24), randn(24)]
    with pytest.raises(RuntimeError, match=r"w_hh of layer 0 must have shape \(24, 6\), got \(24, 5\)"):
        fastnn.functional.lstm(randn(3, 2, 4), (randn(1, 2, 6), randn(1, 2, 6)), params, True, 1, 0.0, False, False)


def test_gradients_of_gradients() -> None:
    shapes = ((4, 3), (2, 2, 3), (2 * (9 + 9 + 6),))
    given = [randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]

    def stack(x: Tensor, h: Tensor, w: Tensor) -> Any:
        return ops.recurrent_stack(x, h, None, w, None, "rnn_tanh", 2, False, True, True)[0]

    assert torch.autograd.gradcheck(stack, given)
    assert torch.autograd.gradgradcheck(stack, given)


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.mark.parametrize(("mode", "dtype"), [  # what is rounded to 0 by a ReLU, or not, has none of a gradient, or all
    *((mode, torch.float16) for mode in MODES), *((mode, torch.bfloat16) for mode in MODES[:3]),
], ids=str)  # fmt: skip
def test_16_bits(mode: str, dtype: torch.dtype, device: Any) -> None:
    both(mode, 12, dtype=dtype)
    both(mode, 16, batch=9, steps=2, reverse=True, dtype=dtype, keep=False)  # 16 bytes at a time; two passes; gates made again
    both(mode, 8, sizes=PACKED, bias=False, dtype=dtype)
    if not HERE:
        assert all(name.startswith("forward<") == ("_t" in name) for name in device.launched)


@HALVES
def test_16_bits_in_layers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch a layer, of both directions, or a launch each; their lower states are kept in float32"""
    if not HERE:
        monkeypatch.setattr(gpu, "cycles", lambda *of: 0)
    for mode in ("lstm", "gru", "rnn_tanh"):
        stack(mode, 2, True, True, True, PACKED, dtype=dtype)
    stack("lstm", 2, False, False, False, None, dtype=dtype)
    if not HERE:
        with shim(multiprocessors=1) as device:
            stack("gru", 1, True, True, True, None, dtype=dtype)
            assert len([name for name in device.launched if name.startswith("forward<")]) == 2


@pytest.mark.parametrize("mode", MODES)
def test_16_bits_cut_in_every_way(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warps that share a tile's columns; rows in groups; rows that shared memory takes eight at a time; more columns a warp"""
    if HERE:
        pytest.skip("the device has room for more")
    ways: list[tuple[int, int, int, int, Callable[[gpu.Cut], bool]]] = [
        (5, 96 << 10, 72, 19, lambda how: how.parts == 2 and how.share > 8 and how.blocks > 1),
        (3, 96 << 10, 72, 3, lambda how: how.kv == 8),
        (6, 96 << 10, 8, 19, lambda how: how.groups == 3),
        (1, 3500, 16, 19, lambda how: how.staged < how.share),
    ]
    for multiprocessors, shared, units, batch, wanted in ways:
        with shim(multiprocessors=multiprocessors, shared=shared) as device:
            how = next(filter(wanted, rnn_half._cuts(mode, device.has, 1, batch, units)))
            monkeypatch.setattr(rnn_half, "plan", lambda *args, how=how: (1, how))
            both(mode, units, batch=batch, steps=2, dtype=torch.float16, keep=False)


def test_16_bits_that_are_widened() -> None:
    """What does not fit, or finds no such matrix units"""
    big = randn(4, 2000)
    assert "sm_80" in str(rnn_half.cut("lstm", H200._replace(matrix=False), 1, 8, 256))
    assert "do not fit" in str(rnn_half.cut("lstm", H200, 1, 8, 2048))
    nothing = torch.zeros(1, 2, 0)
    assert "units" in str(gpu.supports("recurrent_stack", big, nothing, None, None, None, "gru", 1, False, True))
    with shim(**H200._asdict()):  # layers side by side are faster, one after the other not
        half = big.half()
        assert [gpu._half("lstm", half, layers, 1, 10, 256) is None for layers in (1, 2, 6)] == [False, True, True]
        assert gpu._half("lstm", half, 1, 2, 10, 256) is not None
        assert gpu._half("lstm", half, 6, 1, 64, 1024) is not None
    for units, batch in ((256, 16), (512, 32), (1024, 64), (1056, 128)):
        how = rnn_half.cut("lstm", H200, 1, batch, units)
        assert isinstance(how, gpu.Cut)
        assert how.blocks * how.groups <= 132
    if not HERE:
        with shim(matrix=False) as device:
            both("lstm", 12, dtype=torch.float16)
            assert {name.count("_t") for name in device.launched} == {0}


def test_what_would_take_longer_than_steps_goes_step_by_step() -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")
    with shim(**H200._asdict()):
        for units, batch, back, steps in ((1150, 10, True, False), (1024, 64, True, False), (1150, 256, True, True),
                                          (1280, 64, True, True), (1500, 4, False, False)):  # fmt: skip
            s = gpu.Stack("lstm", 3 * batch, batch, units, 1, 1, (False,), None, torch.float32)
            assert isinstance(gpu.plan("lstm", back, H200, 1, 1, batch, units), tuple)
            assert isinstance(gpu._planned(s, torch.device("cpu"), back), str) == steps


def test_staged_in_pieces() -> None:
    """A batch of which shared memory takes eight rows at a time"""
    if HERE:
        pytest.skip("the device has more shared memory than a test would fill")
    for mode, units in (("lstm", 12), ("rnn_tanh", 16)):
        with shim(multiprocessors=1, shared=6656) as device:
            for back in (False, True):
                how = gpu.cut(gpu.KINDS[mode], back, device.has, 1, 13, units, False)
                assert isinstance(how, gpu.Cut)
                assert how.staged == 8
            both(mode, units, sizes=torch.tensor([13, 9, 2]))
    with shim(multiprocessors=2, shared=8800) as device:  # a layer's inputs are staged beside its states
        for mode in ("lstm", "gru"):
            for back in (False, True):
                how = gpu.cut(gpu.KINDS[mode], back, device.has, 2, 13, 8, True)
                assert isinstance(how, gpu.Cut)
                assert how.staged == 8
            stack(mode, 2, False, True, True, torch.tensor([13, 9, 2]))


@pytest.mark.parametrize("mode", MODES)
def test_eight_rows_and_two_more(mode: str) -> None:
    """What is summed over the lanes by fewer shuffles, in the first pass and in the second"""
    with shim(multiprocessors=2) if not HERE else nullcontext():
        for batch in (10, 17):
            stack(mode, 2, False, True, True, None, batch=batch, steps=2)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every layer has weights in shared memory; on a GPU those have that are large enough."""
    real = gpu._held

    def held(back: bool, stacked: bool, depth: int) -> Iterator[tuple[int, int, int]]:
        yield from ((kv, more, parts) for kv, more, parts in real(back, stacked, depth) if more)

    if not HERE:
        monkeypatch.setattr(gpu, "_held", held)
    for remembers in (gpu.cut, gpu.plan):
        remembers.cache_clear()
    yield
    for remembers in (gpu.cut, gpu.plan):
        remembers.cache_clear()


@pytest.mark.parametrize("mode", MODES)
def test_weights_in_shared_memory(mode: str, split: None) -> None:
    """Where registers have no room for all; more columns than one group; fewer rows of the batch at a time than are multiplied"""
    if HERE:
        both(mode, 1150, steps=2)
        both(mode, 1149, batch=11, reverse=True)
        return
    with shim(multiprocessors=60) as device:
        both(mode, 520, steps=2)
        both(mode, 516, batch=11, steps=1, reverse=True)
        assert all(name.endswith(", false, true>") for name in device.launched)
    with shim(multiprocessors=60, shared={"lstm": 27000, "gru": 22500}.get(mode, 16500)) as device:
        how = gpu.cut(gpu.KINDS[mode], False, device.has, 1, 5, 516, False)
        assert isinstance(how, gpu.Cut)
        assert how.staged == 3
        both(mode, 516, batch=5, steps=2, keep=False, back=False)


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh"])
def test_weights_of_layers_in_shared_memory(mode: str, split: None) -> None:
    """Those of the layer below too"""
    units = 260 if not HERE else 650
    with shim(multiprocessors=60) if not HERE else nullcontext() as device:
        stack(mode, 2, False, True, True, torch.tensor([4, 3]), units=units)
    if device is not None:
        assert all(name.endswith(", true, true>") for name in device.launched)


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_relu"])
def test_groups_of_a_batch(mode: str) -> None:
    """Rows of a batch in blocks of their own, some of which run out of rows early, or have none for a while"""
    if HERE:
        pytest.skip("the device has room for more")
    for reverse in (False, True):
        with shim(multiprocessors=3) as device:
            how = gpu.cut(gpu.KINDS[mode], False, device.has, 1, 11, 4, False)
            assert isinstance(how, gpu.Cut)
            assert (how.groups, how.share) == (3, 4)
            both(mode, 4, sizes=torch.tensor([11, 9, 9, 3, 1]), reverse=reverse)
    with shim(multiprocessors=12) as device:
        for back in (False, True):
            how = gpu.cut(gpu.KINDS[mode], back, device.has, 2, 11, 8, True)
            assert isinstance(how, gpu.Cut)
            assert how.groups == 3
        stack(mode, 2, False, True, True, torch.tensor([11, 9, 9, 3, 1]))


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh"])
def test_layers_one_launch_after_another(mode: str) -> None:
    """Three layers where two have room; two in both directions, which have a launch each, or one a direction"""
    if HERE:
        pytest.skip("the device has room for more")
    for number, bidirectional, multiprocessors, launches in ((3, False, 2, 2), (2, True, 2, 2), (2, True, 1, 4)):
        with shim(multiprocessors=multiprocessors) as device:
            stack(mode, number, bidirectional, True, True, PACKED, units=12)
            for name in ("forward", "backward"):
                assert len([each for each in device.launched if each.startswith(name)]) == launches


H200 = cuda.Limits(132, 227 << 10)


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    big = randn(4, 2000)
    with shim(**H200._asdict()):
        def asked(mode: str, units: int, layers: int = 1, directions: int = 1, batch: int = 10, keep: bool = True) -> str | None:
            return gpu._Asked(big, False, mode, layers, directions, batch, units, keep).too_large()

        for mode in ("lstm", "gru"):
            for fits in ((256, 6), (1024,), (1024, 6), (1024, 1, 2), (650, 2, 2), (16, 13), (1150, 3), (1500,)):
                assert asked(mode, *fits) is None
            assert "do not fit in 132 multiprocessors" in str(asked(mode, 2048))
        assert asked("lstm", 1024, batch=400, keep=False) is None
        assert gpu._Asked(big.half(), False, "lstm", 1, 1, 4, 1056, False).too_large() is None
        assert "do not fit" in str(gpu._Asked(big.half(), False, "lstm", 1, 1, 4, 1600, False).too_large())
        assert "do not fit" in str(asked("lstm", 1024, batch=2000))
        assert "projection" in str(gpu.refusal(big, True, None))
        assert "float32" in str(gpu.refusal(big.double(), False, None))
        w = torch.zeros(1).expand(8000, 2000)
        call = "recurrent", big, big, big, w, w, None, None, None, None, "lstm", False, True
        assert gpu.supports(*call) is None  # step by step, if that is asked for
        assert gpu.TORCH_IS_FASTER["recurrent"](*call[1:]) is None  # which tests do
        monkeypatch.setattr(overhead, "RULES", True)
        assert "do not fit" in str(gpu.TORCH_IS_FASTER["recurrent"](*call[1:]))
        input, hx = randn(6, 2, 2000), randn(1, 2, 2000)
        assert "taken to be faster" in str(ops.gpu_refusal(input, hx, "gru", 1, 1, "auto"))
        assert ops.gpu_refusal(input, hx, "gru", 1, 1, "gpu") is None
        for batch, reason in ((32, None), (1024, "with a batch of 1024 torch's library is taken to be faster")):
            assert ops.gpu_refusal(randn(6, batch, 4), randn(1, batch, 256), "lstm", 1, 1, "auto") == reason
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
        assert "do not fit" in str(gpu.supports(*call))
        assert "pip install triton" in str(gpu.supports(*call))


@pytest.fixture
def no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything goes step by step, as it does where something does not fit."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")
    monkeypatch.setattr(gpu.cuda, "refusal", lambda: "there is no CuPy")
    monkeypatch.setattr(gpu, "_launch", lambda *args: pytest.fail("launched at once"))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_step_by_step(mode: str, reverse: bool, no_cupy: None) -> None:
    both(mode, 13, batch=2, steps=2, reverse=reverse)
    both(mode, 8, sizes=PACKED, reverse=reverse, bias=False)


def test_layers_step_by_step(no_cupy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More numbers than a program takes; layers on layers in both directions; 16 bits; nothing kept"""
    from fastnn.kernels.gpu import rnn_steps

    monkeypatch.setattr(rnn_steps, "_BLOCK", 16)
    for mode, sizes, keep in (("lstm", PACKED, True), ("gru", None, False)):
        stack(mode, 2, True, True, keep, sizes, batch=3, units=6, steps=2)
    both("lstm", 12, batch=2, steps=2, dtype=torch.bfloat16)


def test_budget_of_the_documented_cases() -> None:
    """docs/gpu-rnn.md: layers of 256 units on 132 multiprocessors, a batch of 10"""
    def asked(back: bool, layers: int, directions: int = 1, batch: int = 10) -> Any:
        found = gpu.plan("lstm", back, H200, layers, directions, batch, 256)
        assert not isinstance(found, str)
        return found[0], found[1]._asdict()

    deep: dict[str, Any] = {"kv": 4, "warps": 12, "blocks": 22, "groups": 1, "share": 10, "staged": 10,
                            "more": 0}  # fmt: skip
    jobs, forward = asked(False, 6)
    assert (jobs, forward) == (6, {**deep, "work": 212, "parts": 1, "shared": 4 * (10 * 512 + 12 * 10)})
    jobs, backward = asked(True, 6)
    assert (jobs, backward) == (6, {**deep, "work": 212, "parts": 4, "shared": 4 * (10 * 1024 + 6 * 12 * 10)})
    assert asked(False, 12)[0] == 6
    jobs, ways = asked(False, 3, 2)
    assert (jobs, ways["kv"], ways["warps"], ways["blocks"], ways["groups"]) == (2, 2, 8, 32, 2)
    assert asked(False, 1, batch=32)[1]["groups"] == 4


@pytest.mark.skipif(nvrtc.library() is None, reason="NVRTC is missing: the extra gpu-check has it")
def test_layers_on_layers_compile_within_their_budget() -> None:
    """What holds the most in registers"""
    split = "forward<LSTM, 4, true, true>"  # a few numbers of the step around it are not in registers
    names = ["forward<LSTM, 4, true>", "forward<LSTM, 8, true>", "backward<LSTM, 4, true>", "backward<GRU, 8, true>", split,
             "forward<LSTM, 4, false, true>", "backward<LSTM, 4, true, true>"]  # fmt: skip
    assert set(names) <= set(gpu.SOURCE.instances())
    for arch in ("80", "90"):
        log, found = nvrtc.compile(gpu.SOURCE.text, arch, names)
        assert "warning" not in log, log
        for name, usage in found.items():
            most = 65536 // (32 * gpu.WARPS[int(name.split(", ")[1])]) // 8 * 8
            assert usage.shared == 0, f"{name}: {usage}"
            assert usage.spilled <= 80 * (name == split), f"{name}: {usage}"
            assert usage.local <= usage.spilled, f"{name}: {usage}"
            assert usage.registers <= min(most, 255), f"{name}: {usage}"


@pytest.mark.parametrize("op", [ops.recurrent_stack, ops.recurrent_stack_backward], ids=lambda op: op.name)
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_replayed(mode: str, op: Any) -> None:
    """A call that comes again is its launches with other addresses."""
    units, layers, batch = 8, 2, 3
    wide = reference.GATES[mode] * units
    cells = randn(layers, batch, units) if mode == "lstm" else None
    given: list[Any] = [randn(6, 5), randn(layers, batch, units), cells, randn(wide * (5 + units + 2 + units + units + 2))]
    options = [None, mode, layers, False, True]
    if op is ops.recurrent_stack:
        args = there([*given, *options, True])
    else:
        y, _, _, reserve = run(ops.recurrent_stack, *there(given), *options, True)
        grads = [torch.randn_like(y), *there([randn(layers, batch, units), cells if cells is not None else randn(0)])]
        args = [*grads, *there(given), y, reserve, *options, [True, True, cells is not None, True]]
    expected = run(op, *args)
    kernel = backends.load("gpu", op)[0]
    assert kernel is not None
    changed = [a.clone().mul_(0.5) if isinstance(a, Tensor) else a for a in args]
    _, again = record(lambda *own: op._launch(kernel, op.check(*own), own), changed, len(op.tensors))
    assert again is not None
    found = again(*(a.clone() if isinstance(a, Tensor) else None for a in args[: len(op.tensors)]))
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


@pytest.mark.skipif(not HERE, reason="needs a GPU")
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_a_large_barrier(mode: str) -> None:
    """The documented case, all multiprocessors that wait for each other 512 times: right, the same again, and in a CUDA graph"""
    layers, batch, units, steps = 6, 10, 256, 512
    wide, scale = reference.GATES[mode] * units, units**-0.5
    states = (layers, batch, units)
    given = [randn(steps * batch, units), randn(*states), randn(*states) if mode == "lstm" else None,
             randn(layers * wide * (2 * units + 2), scale=scale)]  # fmt: skip
    rest: list[Any] = [None, mode, layers, False, True]
    args = there(given)
    first = run(ops.recurrent_stack, *args, *rest, True)
    exact = reference.recurrent_stack(*(a.double() if a is not None else None for a in args), *rest, True)
    same(first[:3], [t.cpu() for t in exact[:3]], times=256)
    grads = [torch.randn_like(t) for t in first[:3]]
    needs = [a is not None for a in args]

    def back() -> Any:
        return run(ops.recurrent_stack_backward, *grads, *args, first[0], first[3], *rest, needs)

    made = back()
    inner = *(g.double() for g in grads), *(a.double() if a is not None else None for a in args), exact[0], exact[3], *rest, needs
    same(made, [t.cpu() for t in reference.recurrent_stack_backward(*inner)], times=1024)
    for _ in range(5):
        for a, b in zip((*run(ops.recurrent_stack, *args, *rest, True), *back()), (*first, *made), strict=True):
            assert torch.equal(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(ops.recurrent_stack, *args, *rest, False)
    args[0].neg_()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    expected = run(ops.recurrent_stack, *args, *rest, False)
    assert all(torch.equal(a, b) for a, b in zip(captured[:3], expected[:3], strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_scan(dtype: torch.dtype, reverse: bool) -> None:
    for steps in (1, 8, 13, 27):
        f, u, c = torch.rand(steps, 3, 7).to(dtype), randn(steps, 3, 7, dtype=dtype), randn(3, 7, dtype=dtype)
        found = run(ops.scan, *there([f, u, c]), reverse)
        same([found], [reference.scan(*double([f, u, c]), reverse)], dtype, 4)
