"""Every Triton kernel, compiled for NVIDIA's and AMD's chips: spills, shared memory, and the matrix instruction."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_shim import needs_compiler
from gpu_builds import BUILDS

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")


def test_every_kernel_compiles_within_the_chips_limits(pytestconfig: pytest.Config) -> None:
    """One test, because it is one process: an error inside LLVM ends it, and to start it costs as much as ten kernels."""
    kept = pytestconfig.cache.mkdir("triton")
    env = {**os.environ, "TRITON_CACHE_DIR": str(kept), "CUDA_VISIBLE_DEVICES": ""}
    script = str(Path(__file__).with_name("gpu_compile.py"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = []
    for build in BUILDS:
        for chip in build.chips:
            mine = [line for line in lines if line["build"] == build.name and line["chip"] == chip]
            if not mine or not set(build.matrix) <= {line["kernel"] for line in mine}:
                wrong.append(f"{build.name} launches on {chip} only {[line['kernel'] for line in mine]}")
            for line in mine:
                matrix = line["kernel"] not in build.matrix or line["best" if build.best else "matrix"]
                copied = line["copied"] or line["kernel"] not in build.copied or chip not in ("sm_90", "sm_100")
                large = line["spills"] > build.spills or line["shared"] > line["limit"]
                if large or line["serialized"] or not matrix or not copied:
                    wrong.append(str(line))
    assert not wrong, "\n".join(wrong)


@needs_compiler
def test_replayed_calls_launch_what_the_calls_do(pytestconfig: pytest.Config) -> None:
    """Through Triton's own launcher, to a driver that does nothing but look"""
    env = {**os.environ, "TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton")), "CUDA_VISIBLE_DEVICES": ""}
    script = str(Path(__file__).with_name("gpu_launches.py"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 11
    assert not [line for line in found if line[1] != "ok"]
