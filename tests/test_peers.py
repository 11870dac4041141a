"""The benchmark's peers that must be told how to do their best: ONNX Runtime and max-autotune."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnn.bench.cases as cases
import fastnn.bench.limits as limits
import fastnn.bench.peers as peers
import fastnn.bench.run as run
from fastnn.bench.cases import Case, random, together
from fastnn.bench.peers import Job
from fastnn.bench.run import Record


def _linear(rows: int, columns: int, **changes: Any) -> Case:
    makers = (random(*shape, seed=n) for n, shape in enumerate([(rows, 64), (columns, 64), (columns,)]))
    return Case(
        "matmul", "test/linear/64", together(*makers), theirs=lambda F, x, w, b: F.linear(x, w, b), parameters=(1, 2)
    ).on(**changes)


def _measure(case: Case, *names: str, dtype: torch.dtype = torch.float32) -> dict[str, Record]:
    providers, missing = run.available_peers(names)
    assert not missing
    found = run.measure_case(case, dtype, 1, providers, limits.Limits(1, seconds=0.01), seconds=0.01)
    return {record.provider: record for record in found}


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sessions of ONNX Runtime that the test makes."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnx", reason="torch's exporter needs onnx")
    made: list[Any] = []

    make = onnxruntime.InferenceSession

    def keep(*arguments: Any, **options: Any) -> Any:
        made.append(make(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(onnxruntime, "InferenceSession", keep)
    return made


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (1024, 512)])  # a small output is ONNX Runtime's, a large torch's
def test_onnx_runtime_has_the_weights_in_its_graph(sessions: list[Any], rows: int, columns: int) -> None:
    case = _linear(rows, columns)
    job = Job(case, case.make(torch.float32), None, threads=2)
    with torch.no_grad():
        work = peers.OnnxRuntime().prepare(job)
        (first,), (second,) = work(), work()
        true = case.theirs(peers.TORCH, *job.inputs)
    (session,) = sessions
    assert len(session.get_inputs()) == 1  # a weight that is an input cannot be packed beforehand
    assert session.get_session_options().intra_op_num_threads == 2
    torch.testing.assert_close(torch.as_tensor(first), true, rtol=1e-4, atol=1e-4)
    assert torch.as_tensor(first).data_ptr() != torch.as_tensor(second).data_ptr(), "the output is not allocated anew"


def test_onnx_runtime_takes_part(sessions: list[Any]) -> None:
    found = _measure(_linear(8, 16), "onnxruntime", "torch")["onnxruntime"]
    assert found.correct
    assert found.median
    assert found.missing is None


def test_onnx_runtime_is_given_what_the_case_uses(sessions: list[Any]) -> None:
    """The exporter drops other inputs, here the second of three."""
    makers = (random(32, 16, seed=n) for n in range(3))
    case = _linear(8, 16, parameters=(), make=together(*makers), theirs=lambda F, x, unused, y: x - 2 * y)
    found = _measure(case, "onnxruntime", "torch")["onnxruntime"]
    assert (found.missing, found.correct) == (None, True)
    assert len(sessions[0].get_inputs()) == 2


def test_what_onnx_runtime_cannot_do_is_said(sessions: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    gradients = _linear(8, 16, mode="train")
    job_inputs = together(*(random(*shape, grad=True) for shape in [(8, 64), (16, 64), (16,)]))
    assert "no gradients" in (_measure(gradients.on(make=job_inputs), "onnxruntime")["onnxruntime"].missing or "")

    def unknown(F: Any, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)

    case = _linear(8, 16, parameters=(), make=together(random(4, 4)), theirs=unknown)
    found = _measure(case, "onnxruntime", "torch")
    assert "bessel" in (found["onnxruntime"].missing or "")
    assert "graph" not in capfd.readouterr().out, "in the middle of the table"
    assert found["onnxruntime"].median is found["onnxruntime"].correct is None
    assert found["torch"].median
    product = next(c for c in cases.cases("matmul") if c.name == "small/8")
    assert "NOT_IMPLEMENTED" in (_measure(product, "onnxruntime", dtype=torch.bfloat16)["onnxruntime"].missing or "")


@pytest.mark.parametrize("package", ["onnxruntime", "onnx"])
def test_onnx_runtime_that_is_not_installed_is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    there, missing = run.available_peers(["torch", "onnxruntime"])
    assert [peer.name for peer in there] == ["torch"]
    assert package in missing["onnxruntime"]


def test_max_autotune_wants_constant_weights() -> None:
    peer = peers.MaxAutotune()
    for case in (_linear(8, 16, parameters=()), _linear(8, 16, mode="train")):
        assert "constant weights" in (peer.missing(case, torch.float32, 2) or "")
    assert peer.missing(_linear(8, 16), torch.float32, 2) is None
    model = next(c for c in cases.cases("models") if c.mode == "forward")
    assert "whole models" in (peer.missing(model, torch.float32, 2) or ""), "its weights are constant: that is not the reason"


def test_numpys_version_names_its_blas() -> None:
    """It is that which is timed."""
    numpy, blas, *_ = peers.NumPy().version.split()
    assert numpy[0].isdigit()
    assert blas[0].isalpha()


def test_a_quick_run_leaves_out_what_is_slow_to_prepare() -> None:
    there, missing = run.available_peers(quick=True)
    assert "max-autotune" not in [peer.name for peer in there]
    assert "too slow" in missing["max-autotune"]
    assert "max-autotune-no-cudagraphs" in missing
    assert "max-autotune-no-cudagraphs" not in run.available_peers(quick=True, device="cpu")[1], "it is for GPUs"
    there, missing = run.available_peers(["max-autotune"], quick=True)
    assert [peer.name for peer in there] == ["max-autotune"]


def test_max_autotune_takes_part() -> None:
    found = _measure(_linear(8, 16), "max-autotune", "torch")["max-autotune"]
    assert found.correct
    assert found.median


def test_cases_name_their_weights() -> None:
    """A parameter is an input, and never the first: that one passes between the layers."""
    for family in cases.families():
        for case in cases.cases(family):
            if case.parameters and sum(map(sum, case.passes)) < 3_000_000:
                assert 0 < min(case.parameters) <= max(case.parameters) < len(case.make(torch.float32)), case.name
    groups = {c.group for c in cases.cases("matmul") if c.parameters}
    assert groups >= {"linear", "linear_gelu", "mlp", "call"}
