"""Every Triton kernel, compiled for NVIDIA's and AMD's chips: spills, shared memory, and the matrix instruction."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_builds import BUILDS

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fastnn-kernels[gpu-check]'")
FAMILIES = list(dict.fromkeys(build.family for build in BUILDS))


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """What tests/gpu_compile.py says of all builds; one process for all of them."""
    kept = pytestconfig.cache.mkdir("triton")
    env = {**os.environ, "TRITON_CACHE_DIR": str(kept), "CUDA_VISIBLE_DEVICES": ""}
    script = str(Path(__file__).with_name("gpu_compile.py"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_within_the_chips_limits(family: str, compiled: list[dict[str, Any]]) -> None:
    lines = [line for line in compiled if line["family"] == family]
    for build in (b for b in BUILDS if b.family == family):
        for chip in build.chips:
            mine = [line for line in lines if line["build"] == build.name and line["chip"] == chip]
            assert mine, f"{build.name} launches nothing on {chip}"
            for line in mine:
                assert line["spills"] <= build.spills, line
                assert line["shared"] <= line["limit"], line
                if line["kernel"] in build.matrix:
                    assert line["best" if build.best else "matrix"], line
            assert {line["kernel"] for line in mine} >= set(build.matrix)
