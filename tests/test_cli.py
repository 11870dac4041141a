"""python -m fastnn: the commands say what they should, and fail when they should."""

import errno
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import fastnn
import fresh
from fastnn import _info
from fastnn.__main__ import main
from fastnn.kernels.cpu.engine.build import Kernel

CHECKOUT = Path(__file__).resolve().parents[1]


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return fresh.python("-m", "fastnn", *arguments, cwd=CHECKOUT, env=os.environ | environment)


def test_info_has_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"fastnn {fastnn.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}\n")
    for row in ("system", "CPU", "caches", "SIMD", "features", "threads", "GPU", "cache", "environment"):
        assert re.search(rf"^{row}: +\S", text, re.MULTILINE), row
    assert f"threads:     {torch.get_num_threads()} " in text
    assert os.environ["FASTNN_CACHE_DIR"] in text


def test_info_says_what_missing_packages_would_bring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_info, "installed", lambda package: "1.2.3" if package != "matplotlib" else None)
    assert main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.split("Optional packages\n")[1].splitlines())
    assert set(rows) == set(_info.EXTRAS)
    assert rows["matplotlib"].split(maxsplit=1) == ["missing", _info.EXTRAS["matplotlib"]]
    assert rows["triton"].split(maxsplit=1) == ["1.2.3", _info.EXTRAS["triton"]]


def test_info_knows_every_optional_package() -> None:
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {re.match(r"[\w-]+", requirement)[0] for name in ("demo", "bench") for requirement in extras[name]}  # type: ignore[index]
    assert named <= set(_info.EXTRAS)


def test_info_tells_of_a_setting_that_the_machine_cannot_follow() -> None:
    done = _run("info", FASTNN_SIMD="mmx")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^SIMD: +FASTNN_SIMD is 'mmx', but this host allows only: ", done.stdout, re.MULTILINE)
    assert "Optional packages" in done.stdout


def test_info_shows_the_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTNN_CACHE_DIR", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "off (FASTNN_CACHE_DIR is empty)" in text
    assert "OMP_NUM_THREADS=7" in text


def test_info_of_a_cache_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(folder: Path, pattern: str) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "rglob", refuse)
    monkeypatch.setenv("FASTNN_CACHE_DIR", str(tmp_path))
    assert main(["info"]) == 0
    assert f"{tmp_path}: cannot be read (Permission denied)" in capsys.readouterr().out
    monkeypatch.setenv("FASTNN_CACHE_DIR", "~nosuchuser/x")
    with pytest.warns(UserWarning, match="~nosuchuser/x cannot be used"):
        assert main(["info"]) == 0
    assert "off (~nosuchuser/x: no such home folder)" in capsys.readouterr().out


def test_sizes_are_for_people() -> None:
    assert [_info.size(n) for n in (0, 1000, 48 << 10, 3 << 19, 24 << 30)] == [
        "0 B",
        "1000 B",
        "48 KiB",
        "1.5 MiB",
        "24 GiB",
    ]


def test_the_module_runs() -> None:
    done = _run("info")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fastnn ")
    nothing = _run()
    assert nothing.returncode == 2
    assert "verify" in nothing.stdout + nothing.stderr


def test_help_loads_no_more_than_it_needs() -> None:
    """The list of commands is there at once."""
    program = "import sys, fastnn.__main__ as m; m._parser(); print('rich' in sys.modules, 'numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_missing_package_is_named() -> None:
    program = """
import sys
sys.modules["rich"] = None
from fastnn.__main__ import main
from fastnn.kernels.cpu.engine.build import Kernel
print(*(main([command]) for command in ("verify", "warmup", "bench")))
"""
    done = fresh.python("-c", program, cwd=CHECKOUT, env=os.environ)
    assert done.stdout.split() == ["2"] * 3
    assert done.stderr.splitlines() == ["rich is needed for this: pip install rich"] * 3


def test_warmup_leaves_nothing_to_compile(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    first = _run("warmup", "embedding", "--dtype", "float32", FASTNN_CACHE_DIR=str(tmp_path))
    assert first.returncode == 0, first.stderr
    found = re.search(r"(\d+) kernels compiled, (\d+) in ", first.stdout)
    assert found
    assert int(found[1]) == int(found[2]) > 1
    again = _run("warmup", "embedding", "--dtype", "float32", FASTNN_CACHE_DIR=str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert f"0 kernels compiled, {found[2]} in {tmp_path}" in again.stdout
    # What a user calls afterwards finds everything there.
    used = _run("verify", "embedding", "--dtype", "float32", "--failures", FASTNN_CACHE_DIR=str(tmp_path))
    assert used.returncode == 0, used.stdout + used.stderr
    assert sum(1 for _ in tmp_path.rglob("*.o")) == int(found[2])


def test_warmup_names_a_kernel_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Kernel("test_broken_float32", "i", partial(divmod, 1, 0))  # what another process is to call
    monkeypatch.setattr(Kernel, "registry", {"test_broken_float32": broken})
    with pytest.raises(ZeroDivisionError) as caught:
        main(["warmup", "embedding", "--dtype", "float32"])
    assert caught.value.__notes__ == ["fastnn_test_broken_float32 could not be compiled, or not be kept."]


def test_warmup_needs_a_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTNN_CACHE_DIR", "")
    assert main(["warmup"]) == 2
    assert "set FASTNN_CACHE_DIR to a folder" in capsys.readouterr().err


def test_warmup_names_a_wrong_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--dtype", "int4"]) == 2
    assert "dtype is 'int4'; allowed: float32, float64, bfloat16, float16" in capsys.readouterr().err
