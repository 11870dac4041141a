"""The wheel: what is in it, and that it works away from the checkout and beside PyPI's own `kernels`."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "bench")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no earlier build can add files and the checkout stays as it is."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    for name in ("fastnn", *ROOMS):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(built), str(source))
    (file,) = built.glob("fastnn_kernels-*.whl")
    return file


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip("install", "--target", str(target), str(wheel))
    return target


def pip(command: str, *arguments: str) -> None:
    line = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--no-index", *arguments]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def python(code: str, path: Path, cwd: Path) -> str:
    """What an interpreter in ``cwd`` that finds fastnn in ``path`` prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(path), "PATH": "", "HOME": str(cwd), "HF_HUB_OFFLINE": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_every_source_under_fastnn(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert {n.split("/")[0] for n in names} == {"fastnn"}, "a top-level `kernels` would break transformers"
    sources = {p.relative_to(CHECKOUT).as_posix() for p in (CHECKOUT / "fastnn").rglob("*.py")}
    for room in ROOMS:
        files = [p for suffix in ("py", "cu", "cuh") for p in (CHECKOUT / room).rglob(f"*.{suffix}")]
        sources |= {f"fastnn/{p.relative_to(CHECKOUT).as_posix()}" for p in files}
    assert names == sources | {"fastnn/py.typed"}


IMPORT_KERNELS = """
import importlib, pkgutil
import fastnn.kernels.cpu, fastnn.kernels.reference, fastnn.bench
for package in (fastnn.kernels.cpu, fastnn.kernels.reference, fastnn.bench):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        print(importlib.import_module(module.name).__file__)
print(fastnn.__file__)
"""


def test_wheel_imports_from_its_own_files(installed: Path, tmp_path: Path) -> None:
    files = python(IMPORT_KERNELS, installed, tmp_path).split()
    assert f"{installed}/fastnn/kernels/cpu/engine/build.py" in files
    assert [f for f in files if not f.startswith(f"{installed}/fastnn/")] == []


def test_checkout_imports_from_its_own_files(tmp_path: Path) -> None:
    files = python(IMPORT_KERNELS, CHECKOUT, tmp_path).split()
    assert f"{CHECKOUT}/kernels/cpu/engine/build.py" in files
    assert [f for f in files if not f.startswith(tuple(f"{CHECKOUT}/{room}/" for room in ("fastnn", *ROOMS)))] == []


def test_transformers_beside_the_kernels_package(installed: Path, tmp_path: Path) -> None:
    """transformers probes for Hugging Face's `kernels`; it must find that one, with ours in use in the same process."""
    out = python(
        """
import fastnn.kernels.cpu, kernels
from transformers import LlamaConfig, LlamaModel
import torch
print(kernels.__file__, fastnn.__file__, hasattr(kernels, "get_kernel"))
tiny = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
print(LlamaModel(tiny)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape)
""",
        installed,
        tmp_path,
    )
    first, second = out.splitlines()
    theirs, ours, whole = first.split()
    assert not theirs.startswith((str(installed), str(CHECKOUT / "kernels")))
    assert ours.startswith(str(installed))
    assert whole == "True"
    assert second == "torch.Size([1, 3, 8])"
