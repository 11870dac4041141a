"""`import fastnn` in a bare environment: light, alone, and without side effects."""

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]

# A finder that refuses what an installation may lack, or what would make the import slow.
BARE = """
import os, sys, threading

class Refuse:
    names = {"numba", "llvmlite", "triton", "cupy", "matplotlib", "rich", "sklearn", "transformers", "onnxruntime"}
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r} (refused by the test)", name=name)

def threads():
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else threading.active_count()

import torch
sys.meta_path.insert(0, Refuse())
Refuse.asked.clear()
before = set(sys.modules), threads(), dict(os.environ), torch.get_num_threads()
import fastnn
"""


def run(code: str) -> str:
    """What a fresh interpreter prints; its error output when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", BARE + code],
        env={"PYTHONPATH": str(CHECKOUT), "PATH": "", "HOME": "/nonexistent"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_refusal_works() -> None:
    assert "refused by the test" in run(
        "try:\n import numba.core\nexcept ModuleNotFoundError as error:\n print(error, Refuse.asked)"
    )


def test_import_needs_torch_alone() -> None:
    assert run("print(Refuse.asked, fastnn.__version__)").startswith("[] 0.")


def test_import_loads_nothing_heavy() -> None:
    new = set(run("print(*(set(sys.modules) - before[0]))").split())
    assert "fastnn" in new
    heavy = ("sympy", "torch._dynamo", "torch._inductor", "torch.testing", "fastnn.kernels.cpu", "fastnn.bench")
    assert not [name for name in new if name.startswith(heavy)]


def test_import_starts_no_threads_and_changes_no_settings() -> None:
    assert run("print(threads() - before[1], os.environ == before[2], torch.get_num_threads() == before[3])") == (
        "0 True True\n"
    )


def test_public_names_without_numba() -> None:
    """All that fastnn offers is there before any kernel is."""
    assert run("print([name for name in fastnn.__all__ if not hasattr(fastnn, name)], Refuse.asked)") == "[] []\n"
