"""``make gpu`` without a GPU: what it would run, in which order, that it keeps what is finished and tells of it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import fastnn.bench.cases as cases
import fastnn.bench.gpu_session as session
import fastnn.bench.launches as launches
from fastnn.bench import report
from fastnn.bench.gpu_session import Step
from fastnn.bench.run import Record, select


def program(code: str, name: str, folder: Path, share: float | None = None, round: int = 0) -> Step:
    return Step(name, [sys.executable, "-c", code], folder / f"{name}.txt", share, round)


def test_tests_come_first_then_the_sanitizer_then_every_family_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(session.shutil, "which", lambda name, path: f"/bin/{name}")
    phases = session.plan(session.FAMILIES, tmp_path, "cuda")
    info, tests, sanitizer, launches, *benchmarks = phases
    assert set(session.FAMILIES) == set(cases.families()) - {"startup", "models"}
    assert {s.name for s in tests} >= {f"tests of {name}" for name in ("matmul", "rnn", "pool", "cuda", "glue", "norm")}
    assert [s.name for s in (*info, *sanitizer, *launches)] == ["info", "memcheck", "racecheck", "launches"]
    assert all(s.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] for s in sanitizer)
    assert [s.name for [s] in benchmarks] == [*session.FAMILIES, *(f"{f}, compiled" for f in session.FAMILIES)]
    for [step] in benchmarks:
        assert {"--device", "cuda", "--save", "--quick"} <= set(step.command)
        assert ("torch" in step.command) == (step.round == 1)  # torch.compile takes its time in the second round
    assert len({s.log for steps in phases for s in steps}) == sum(map(len, phases))
    monkeypatch.setattr(session.shutil, "which", lambda name, path: None)
    assert not any("memcheck" in s.name for steps in session.plan(["conv"], tmp_path, "cuda") for s in steps)


def test_a_long_session_has_no_tests_and_all_cases_of_a_gpu(tmp_path: Path) -> None:
    [info], *benchmarks = session.plan(session.FAMILIES, tmp_path, "cuda", long=True)
    assert info.name == "info"
    assert [s.name for [s] in benchmarks][1:][: len(session.FAMILIES)] == [*session.FAMILIES]
    assert not any("--quick" in s.command for [s] in benchmarks)
    for family in session.FAMILIES:
        chosen, few = ({(c.name, c.mode, d) for c, d in select([family], quick=q, device="cuda")} for q in (False, True))
        assert few <= chosen
        assert all(case.devices == ("cuda",) for case, _ in select([family], device="cuda"))


def test_what_the_sanitizer_is_given_exists() -> None:
    for test in {test for tests in session._SANITIZED.values() for test in tests}:
        file, name = test.split("::")
        assert f"def {name}(" in Path("tests", file).read_text(), test


def test_a_gpu_is_asked_for_cases_of_its_own() -> None:
    """Those of a CPU are too small for it. All make what they are made of: `bench/test_cases.py` goes through what a CPU runs."""
    for family in session.FAMILIES:
        chosen = select([family], quick=True, device="cuda")
        assert 2 <= len(chosen) <= 14
        assert all(case.devices == ("cuda",) for case, _ in chosen)
        assert all(case.devices == ("cpu",) or case.quick for case, _ in select([family], quick=True) if case.quick)
        assert not any(case.devices == ("cuda",) for case, _ in select([family], quick=True))
        names = [(case.name, case.mode, dtype) for case, dtype in select([family], device="cuda")]
        assert len(names) == len(set(names))


SLOW = """
import time, pathlib, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "{mark}"])
try:
    print("begun")
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({kept!r}).write_text("kept")
"""


def test_what_is_out_of_time_is_interrupted_keeps_what_it_has_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """As ``bench`` does: at Ctrl-C it saves. What it started, and what hears of no Ctrl-C, is ended."""
    mark = f"left-behind-{os.getpid()}"
    steps = [
        program("print('fine')", "first", tmp_path),
        program(SLOW.format(mark=mark, kept=str(tmp_path / "kept")), "slow", tmp_path),
        program("raise SystemExit(3)", "bad", tmp_path),
        Step("nobody", [str(tmp_path / "nobody")], tmp_path / "nobody.txt"),
    ]
    assert session.run(steps, 2.0) == ["ok", "out of time", "failed (3)", "failed (No such file or directory)"]
    assert (tmp_path / "kept").read_text() == "kept"
    assert (tmp_path / "first.txt").read_text() == "fine\n"
    assert (tmp_path / "slow.txt").read_text() == "begun\n"
    assert mark not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_what_is_deaf_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "GRACE", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    begin = time.monotonic()
    assert session.run([program(deaf, "deaf", tmp_path)], 1.0) == ["out of time"]
    assert time.monotonic() - begin < 30


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], list[float]]:
    """Sets how long steps take, or what they raise; gives the list of what they are given."""

    def set_up(takes: Mapping[str, Any]) -> list[float]:
        now, given = [0.0], []

        def run(steps: Any, seconds: float) -> list[str]:
            given.append(seconds)
            took = takes.get(steps[0].name, 10.0)
            if isinstance(took, BaseException):
                raise took
            now[0] += took
            return ["ok"] * len(steps)

        monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(session, "run", run)
        return given

    return set_up


def test_time_is_shared_and_what_is_not_reached_is_said(clock: Any, tmp_path: Path) -> None:
    given = clock({"hog": 1000.0})
    phases = [[program("", "tests", tmp_path, 0.35), program("", "more", tmp_path, 0.35)]]
    phases += [[program("", name, tmp_path, None, n)] for name, n in (("a", 1), ("b", 1), ("hog", 2), ("late", 2))]
    found = session.session(phases, 9.0)
    assert found == {**dict.fromkeys(("tests", "more", "a", "b", "hog"), "ok"), "late": "not reached"}
    left = 540 - session.GRACE
    assert given == pytest.approx([0.35 * 540, (left - 10) / 2, left - 20, (left - 30) / 2])


def test_an_interruption_and_a_table_that_cannot_be_written_cost_no_results(clock: Any, tmp_path: Path, capsys: Any) -> None:
    clock({"b": KeyboardInterrupt()})
    told: list[dict[str, str]] = []

    def tell(results: Mapping[str, str], seconds: Mapping[str, float]) -> None:
        told.append(dict(results))
        raise OSError("the disk is full")

    found = session.session([[program("", name, tmp_path)] for name in "abc"], 9.0, tell)
    assert found == {"a": "ok", "b": "interrupted", "c": "not reached"}
    assert told[-1] == found
    assert "the disk is full" in capsys.readouterr().err


def test_the_summary_has_what_is_there(tmp_path: Path) -> None:
    """Results of two runs of one family, a damaged file of another, the last line of the tests."""
    header = {
        "started": "early", "machine": {"gpu": {"name": "Stand In"}, "cpu": "a CPU", "cores": 2, "os": "an OS", "affinity": None},
        "limits": {"fma_gflops": {"float32": 1.0}, "copy_gbs_memory": 1.0}, "threads": 1, "versions": {"torch": "2"},
        "providers": {}, "missing": {}, "environment": {}, "command": [], "method": "by hand", "load_average": None,
    }  # fmt: skip
    def record(case: str, provider: str, median: float, ratio: float, run: str) -> Record:
        return Record("conv", case, "bfloat16", 1, "forward", provider, correct=True, median=median, p20=median, p80=median,
                      ratio=ratio, error_ulp=1.0, torch_error_ulp=1.0, run=run)  # fmt: skip

    records = [record("3x3/one", "fastnn", 1e-3, 2.0, "early"), record("3x3/one", "torch", 2e-3, 0.5, "early"),
               record("3x3/two", "fastnn", 4e-3, 0.25, "late"), record("3x3/two", "numpy", 1e-3, 1.0, "late")]  # fmt: skip
    report.save_json(tmp_path / "conv.json", [header, header | {"started": "late"}], records)
    (tmp_path / "norm.json").write_text("{")
    log = tmp_path / "tests.txt"
    log.write_text("dots\n==== 7 passed in 3 s ====\n")
    session.tell(tmp_path, {"gpu": "Stand In"}, {"tests": log}, {"tests": "ok", "conv": "out of time"}, {"tests": 3.21})
    text = (tmp_path / "summary.txt").read_text()
    assert "gpu: Stand In" in text
    assert re.search(r"tests +ok +3\.2 s +7 passed in 3 s\n", text)
    assert re.search(r"conv +out of time", text)
    assert re.search(r"3x3/one .* 1 ms .* 2\.00× +missing", text)
    assert "norm.json is not a result of bench" in text
    page = (tmp_path / "index.html").read_text()
    assert page.count("3x3/one") == page.count("3x3/two") == 1
    assert 'alt="conv-1threads-ratios" src="data:image/png' in page
    assert json.loads((tmp_path / "session.json").read_text())["steps"][0]["last line"] == "7 passed in 3 s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert session.main([]) == 2
    assert "make gpu: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        session.main(["nothing"])
    assert "there are matmul, attention" in capsys.readouterr().err


def test_the_whole_of_it_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """A rehearsal: its parts are a process in the place of the tests and a benchmark that finds no case."""
    plan = session.plan
    monkeypatch.setattr(session, "plan", lambda *args: plan(*args)[1:])  # without `info`
    monkeypatch.setattr(session, "sanitizer", lambda: None)
    monkeypatch.setattr(session, "_tests", lambda folder: [program("print('1 passed')", "tests of one", folder)])
    where = Path.cwd()
    monkeypatch.setattr(session, "Path", lambda path: tmp_path / path if path == "report/rehearsal" else Path(path))
    assert session.main(["embedding", "--rehearse", "--case", "no such case"]) == 1
    folder = tmp_path / "report/rehearsal"
    assert Path.cwd() == where
    assert "no case matches 'no such case' in: embedding" in (folder / "embedding.txt").read_text()
    text = (folder / "summary.txt").read_text()
    assert re.search(r"tests of one +ok .*1 passed", text)
    assert re.search(r"embedding +failed \(2\)", text)
    assert "compute-sanitizer        is not installed" in text
    assert "compute-sanitizer        is not installed" in capsys.readouterr().out


def test_launches_are_timed_and_a_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def fails() -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    pairs = {"bad": (fails, fails), "good": (lambda: time.sleep(1e-4), lambda: None)}
    monkeypatch.setattr(launches, "calls", lambda device: pairs)
    monkeypatch.setattr(launches, "NUMBER", 3)
    assert launches.main(tmp_path / "launches.json") == 1
    found = json.loads((tmp_path / "launches.json").read_text())["seconds a call until it returns"]
    assert "no such kernel" in found["bad"]["failed"]
    assert 1e-4 <= found["good"]["ours"] < 1e-2
    assert "bad" in capsys.readouterr().out
