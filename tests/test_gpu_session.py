"""``make gpu`` without a GPU: what it would run, in which order, and that it keeps what is finished."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnn.bench.cases as cases
import fastnn.bench.gpu_session as session
from fastnn.bench.gpu_session import Step


def program(code: str, name: str, folder: Path, share: float | None = None) -> Step:
    return Step(name, [sys.executable, "-c", code], folder / f"{name}.txt", share)


def test_tests_come_first_then_the_sanitizer_then_every_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(session.shutil, "which", lambda name: f"/bin/{name}")
    steps = session.plan(session.FAMILIES, tmp_path, "cuda")
    assert [s.name for s in steps] == ["tests", "compute-sanitizer", *session.FAMILIES]
    assert set(session.FAMILIES) == set(cases.families()) - {"startup", "models"}
    assert steps[0].command[1:6] == ["-m", "pytest", "tests", "-m", "gpu"]
    assert steps[1].command[0] == "compute-sanitizer"
    for step in steps[2:]:
        assert {"--device", "cuda", "--save", "--json", "--html"} <= set(step.command)
    monkeypatch.setattr(session.shutil, "which", lambda name: None)
    assert [s.name for s in session.plan(["conv"], tmp_path, "cuda")] == ["tests", "conv"]


def test_what_is_out_of_time_is_interrupted_and_keeps_what_it_has(tmp_path: Path) -> None:
    """As ``bench`` does: at Ctrl-C it saves."""
    slow = f"""
import time, pathlib
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({str(tmp_path / 'kept')!r}).write_text('kept')
"""
    steps = [
        program("print('fine')", "first", tmp_path),
        program(slow, "slow", tmp_path),
        program("raise SystemExit(3)", "bad", tmp_path),
    ]
    results = {step.name: session.run(step, 5.0) for step in steps}
    assert results == {"first": "ok", "slow": "out of time", "bad": "failed (3)"}
    assert (tmp_path / "kept").read_text() == "kept"
    assert (tmp_path / "first.txt").read_text() == "fine\n"


def test_time_is_shared_and_what_is_not_reached_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, given = [0.0], []

    def run(step: Step, seconds: float) -> str:
        given.append(seconds)
        clock[0] += {"hog": 1000.0}.get(step.name, 10.0)
        return "ok"

    monkeypatch.setattr(session.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(session, "run", run)
    steps = [program("", name, tmp_path, share) for name, share in (("tests", 0.35), ("a", None), ("hog", None), ("late", None))]
    assert session.session(steps, 9.0) == {"tests": "ok", "a": "ok", "hog": "ok", "late": "not reached"}
    assert given == pytest.approx([0.35 * 540, (540 - 10 - 20) / 3, (540 - 20 - 20) / 2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert session.main([]) == 2
    assert "make gpu: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        session.main(["nothing"])
    assert "there are matmul, attention" in capsys.readouterr().err


def test_a_rehearsal_measures_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real command of one family, as far as it goes without a GPU, into files."""
    steps = session.plan(["embedding"], tmp_path, "cpu", "no such case")
    done = subprocess.run(steps[-1].command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no case matches 'no such case' in: embedding" in done.stderr
