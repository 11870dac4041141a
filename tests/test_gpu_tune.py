"""The tuner: off unless asked, the fastest of few, kept and read again. A stand-in is the stopwatch."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.grad import conv2d_weight

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")

from fastnn.kernels.gpu import attention, conv, matmul
from fastnn.kernels.gpu.engine import launch, tune
from fastnn.ops import attention as attention_ops
from fastnn.ops import conv as conv_ops
from fastnn.ops import matmul as matmul_ops
from gpu import DEVICE, HERE, run
from rule import randn

CHIP = launch.Chip("sm_90", 227 << 10, 132)


class Tile(NamedTuple):
    m: int
    warps: int = 4


FEW = [Tile(128), Tile(64), Tile(32)]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[float]]:
    """Tuning is on; a call takes as long as it says it does: the times of all that was called."""
    times: list[float] = []

    def timer(call: Callable[[], Any]) -> float:
        took = call()
        times.append(float("nan") if took is None else float(took))
        return times[-1]

    monkeypatch.setattr(tune, "ON", True)
    monkeypatch.setattr(tune, "timer", timer)
    monkeypatch.setenv("FASTNN_CACHE_DIR", str(tmp_path / "cache"))
    tune._found.clear()
    yield times
    tune._found.clear()


def choose(
    seconds: dict[int, float], sizes: tuple[int, ...] = (100, 200), options: Any = (torch.bfloat16,), few: Any = FEW
) -> Any:
    def call(tile: Tile) -> float:
        if tile.m not in seconds:
            raise RuntimeError("out of shared memory")
        return seconds[tile.m]

    return tune.choose("kernel", CHIP, options, sizes, Tile(16), few, call)


def test_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the environment's word nothing is timed and the table decides."""
    for value, on in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("FASTNN_TUNE", value)
        assert tune._asked() is on
    monkeypatch.delenv("FASTNN_TUNE")
    assert not tune._asked()
    monkeypatch.setattr(tune, "ON", False)
    monkeypatch.setattr(tune, "timer", lambda call: pytest.fail("timed"))
    assert choose({128: 3.0, 64: 1.0, 32: 2.0}) == Tile(16)


def test_the_fastest_is_kept_and_read_again(timed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose({128: 3.0, 64: 1.0, 32: 2.0}) == Tile(64)
    assert timed == [3.0, 1.0, 2.0]
    assert choose({}, sizes=(128, 129)) == Tile(64)  # sizes that round up to the same
    tune._found.clear()  # another process
    assert choose({}) == Tile(64)
    assert choose({128: 1.0, 64: 2.0, 32: 3.0}, sizes=(100, 300)) == Tile(128)
    assert choose({128: 2.0, 64: 2.5, 32: 1.0}, options=(torch.float16,)) == Tile(32)
    assert len(timed) == 9
    file = tune._file(CHIP)
    assert file is not None
    assert file.parent.stat().st_mode & 0o77 == 0
    assert set(map(tuple, json.loads(file.read_text()).values())) == {(64, 4), (128, 4), (32, 4)}
    monkeypatch.setattr(tune, "_digest", lambda: "other sources")
    assert choose({128: 1.0, 64: 2.0, 32: 3.0}) == Tile(128)


def test_what_fails_is_left_out_and_what_is_not_in_the_table_is_not_believed(timed: list[float]) -> None:
    assert choose({32: 5.0}) == Tile(32)
    assert choose({}, sizes=(1, 1)) == Tile(16)  # all fail: the table's, which will say why
    assert choose({64: 1.0}, few=[Tile(64), Tile(48)]) == Tile(64)  # Tile(32), known, is no longer one of the few


@pytest.mark.parametrize("damage", ["{", "[1]", '{"%s": 7}', '{"%s": [1, 2, 3]}', "\x00"])
def test_a_damaged_file_is_ignored_and_mended(timed: list[float], damage: str) -> None:
    key = json.dumps(["kernel", "torch.bfloat16", 128, 256])
    file = tune._file(CHIP)
    assert file is not None
    file.parent.mkdir(parents=True)
    file.write_text(damage.replace("%s", key.replace('"', '\\"')))
    assert choose({128: 3.0, 64: 1.0, 32: 2.0}) == Tile(64)
    assert json.loads(file.read_text())[key] == [64, 4]


def test_two_processes_keep_both_results(timed: list[float]) -> None:
    choose({64: 1.0}, sizes=(1, 1))
    mine = dict(tune._found)
    tune._found.clear()
    choose({32: 1.0}, sizes=(2, 2))
    tune._found.update(mine)  # the first one again, which has not seen the second one's
    choose({128: 1.0}, sizes=(4, 4))
    file = tune._file(CHIP)
    assert file is not None
    assert len(json.loads(file.read_text())) == 3


def test_no_disk_and_no_time(timed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNN_CACHE_DIR", "")
    assert choose({64: 1.0}) == Tile(64)
    assert choose({}) == Tile(64)  # in this process
    torch.use_deterministic_algorithms(True)
    try:
        assert choose({64: 1.0}) == Tile(16)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose({32: 1.0}, sizes=(9, 9)) == Tile(16)  # while a graph is captured nothing can be timed
    assert choose({}) == Tile(64)  # what is known is taken


def test_every_kernel_with_a_table_asks_and_takes_what_it_is_told(timed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of the few is chosen, and the result is the same. Outputs that are operands too are not written while timing."""
    seen: dict[str, Any] = {}

    def last(kernel: str, chip: Any, options: Any, sizes: Any, shipped: Any, few: Any, run: Any) -> Any:
        assert shipped in few
        assert len(set(few)) == len(few)
        few = [f for f in few if f != conv._COLUMNS]
        run(few[0])
        seen[kernel] = few[-1]
        return few[-1]

    monkeypatch.setattr(tune, "choose", last)
    small = (conv.Tile(32, 32, 16, 4, 1), conv.Tile(16, 16, 16, 4, 1))
    monkeypatch.setattr(conv, "_tiles", lambda tiles, t: small)
    tiles = [matmul.Tile(32, 32, 32, 4, 2), matmul.Tile(16, 16, 16, 4, 2)]
    monkeypatch.setattr(matmul, "_tiles", lambda kind, chip: tiles)
    a, b, total = (randn(*shape, seed=n).to(DEVICE) for n, shape in enumerate(((24, 40), (40, 20), (24, 20))))
    torch.testing.assert_close(run(matmul_ops.matmul, a, b), a @ b, rtol=1e-5, atol=1e-5)
    expected = total + a @ b
    matmul.multiply(total, a, b, matmul.Epilogue(residual=total))
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    x, w = randn(1, 17, 6, 5).to(DEVICE), randn(3, 17, 3, 3, seed=1).to(DEVICE)
    y = run(conv_ops.conv, x, w, None, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, None)
    torch.testing.assert_close(y, torch.conv2d(x, w, padding=1), rtol=1e-5, atol=1e-4)
    dw = run(conv_ops.conv_weight, y, x, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    torch.testing.assert_close(dw, conv2d_weight(x, w.shape, y, padding=1), rtol=1e-5, atol=1e-4)
    q, k, v, g = (randn(1, 2, 20, 16, seed=n).to(DEVICE) for n in range(4))
    rest = (None, None, None, None, 0.0, 0, 0.25, -1, -1, True, 0, 0.0)
    out, stats = run(attention_ops.attention, q, k, v, *rest)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], scale=0.25)
    torch.testing.assert_close(out, exact.detach(), rtol=1e-5, atol=1e-5)
    found = run(attention_ops.attention_backward, g, q, k, v, *rest[:4], out, stats, None, False, *rest[4:])
    for mine, theirs in zip(found, torch.autograd.grad(exact, leaves, g), strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    blocks = [seen.pop(name) for name in ("attention", "attention backward, queries", "attention backward, keys")]
    assert HERE or blocks == [attention.Blocks(32, 32, 4, 1)] * 3  # half of the stand-in's keys
    assert seen == {"product": (tiles[-1], 1), "convolution": small[-1], "weight_gradient": small[-1]}
