"""What a user waits for before the first result: the import, and the first linear layer without and with the kernels
on disk.

Each sample is a new process. ``import torch`` has happened before the clock starts, since every peer needs it.
"""

from __future__ import annotations

from . import Case

_IMPORT = """
import time, torch
begin = time.perf_counter()
import fastnn
print(time.perf_counter() - begin, True)
"""

_LINEAR = """
import time, torch
{imports}
x, w, b = torch.randn(32, 768), torch.randn(3072, 768), torch.randn(3072)
with torch.no_grad():
    begin = time.perf_counter()
    {imports_timed}
    y = linear(x, w, b)
    seconds = time.perf_counter() - begin
    true = torch.nn.functional.linear(x.double(), w.double(), b.double())
print(seconds, bool((y - true).abs().max() < 1e-3))
"""
_OURS = _LINEAR.format(imports="", imports_timed="from fastnn.functional import linear")
_TORCH = _LINEAR.format(imports="from torch.nn.functional import linear", imports_timed="")
_COMPILED = _LINEAR.format(imports="", imports_timed="linear = torch.compile(torch.nn.functional.linear)")


def _nothing(dtype: object) -> tuple[()]:
    return ()


def _process(name: str, seconds: float, programs: dict[str, str], cold: bool = False) -> Case:
    return Case(
        "startup",
        name,
        _nothing,
        theirs=lambda F: F.zeros(()),
        goals={"seconds": seconds},
        programs=programs,
        cold=cold,
        devices=("cpu",),
        quick=len(programs) == 1,  # a dozen processes that import torch take half a minute
    )


CASES = [
    _process("import/fastnn_after_torch", 0.15, {"fastnn": _IMPORT}),
    _process("first_linear/warm", 0.3, {"fastnn": _OURS, "torch": _TORCH}),
    _process("first_linear/cold", 10.0, {"fastnn": _OURS, "torch": _TORCH, "torch.compile": _COMPILED}, cold=True),
]
