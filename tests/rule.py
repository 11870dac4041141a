"""The error rule, applied to a function of a namespace: ours on the CPU kernels beside torch's, both against
float64."""

import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastnn
import fastnn.functional as ours
from fastnn._numerics import TORCH, Scale, error, results, widen

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: The ulp that are allowed beyond twice torch's error. For float64 torch is the truth, itself up to 50 ulp off (cross
#: entropy with label smoothing over thousands of classes, by mpmath; ours is 3 off).
FLOOR = {torch.float32: 4.0, torch.float64: 128.0, torch.bfloat16: 2.0, torch.float16: 2.0}


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**40)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def lazily(nbytes: int, dtype: torch.dtype) -> Tensor:
    """Address space in which only the pages that are written take memory."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (no_reserve if sys.platform == "linux" else 0)
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=dtype)


def far_apart(near: Tensor) -> Tensor:
    """The matrix with its rows 3 GiB apart: what is not addressed in 64 bits is out of reach."""
    step = (3 << 30) // near.itemsize
    return lazily(near.shape[0] * step * near.itemsize, near.dtype).as_strided(near.shape, (step, 1)).copy_(near)


def check(
    function: Callable[..., Tensor],
    inputs: Sequence[Any],
    scale: Scale | None = None,
    exact: Callable[..., Tensor] | None = None,
) -> None:
    """function(namespace, *inputs) and the gradients of the inputs that require one, on the "cpu" backend and no other.

    Outputs are poisoned where the test uses that fixture; inputs have to stay as they were. ``scale`` gives magnitudes
    at which an ulp is counted, where those of the results would be unfair; ``exact`` is a better formula for float64.
    """
    exact = exact or function
    before = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
    shape = results(lambda *v: function(TORCH, *v), inputs, None)[0].shape
    grads: list[Tensor | None] = [None]
    if any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        dtype = next(t.dtype for t in inputs if isinstance(t, Tensor) and t.requires_grad)
        grads.append(randn(*shape, dtype=dtype, seed=99))
    for grad in grads:
        with fastnn.backend("cpu"):
            mine = results(lambda *v: function(ours, *v), inputs, grad)
        theirs = results(lambda *v: function(TORCH, *v), inputs, grad)
        truth = results(lambda *v: exact(TORCH, *v), [widen(v) for v in inputs], widen(grad))
        sizes = scale(inputs, grad) if scale else [None] * len(truth)
        for a, b, t, s in zip(mine, theirs, truth, sizes, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            our, their = error(a, t, s, b), error(b, t, s)
            assert our.specials <= their.specials, f"{our.specials} special values lost, torch loses {their.specials}"
            assert our.worst <= 2 * their.worst + FLOOR[a.dtype], f"{our.worst:.3g} ulp, torch's own {their.worst:.3g}"
    for now, then in zip(inputs, before, strict=True):
        if isinstance(now, Tensor):
            torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True, msg="an input was changed")



#: Other ways to lie in memory for a tensor of at least two dimensions; the values are the tensor's own.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "rotated": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "stepped": lambda t: t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t),
    "sliced": lambda t: t.new_zeros(t.shape[0], t.shape[1] + 3, *t.shape[2:])[:, 2:-1].copy_(t),
    "offset": lambda t: t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t),
}
