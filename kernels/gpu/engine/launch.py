"""How a Triton kernel is started: on the device of its tensors and torch's current stream there.

What the configuration of a kernel may depend on is `chip`: a family's table is keyed by that and by bucketed sizes, and nothing
is tuned as a program runs. Host code calls `launch.run` and `launch.chip` through the module, so that tests can put a recorder in
their place: that is how every kernel is compiled for chips that are not there.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastnn import backends

from . import replay

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class Chip(NamedTuple):
    """What a configuration depends on."""

    name: str  # "sm_90", "gfx942"
    shared: int  # bytes of shared memory that a program may use
    processors: int

    @property
    def nvidia(self) -> int:
        """The compute capability, 90 for 9.0; 0 on other vendors' chips."""
        return int(self.name[3:]) if self.name.startswith("sm_") else 0

    @property
    def descriptors(self) -> bool:
        """Whether a copy engine reads and writes whole tiles (TMA)."""
        return self.nvidia >= 90


#: What the interpreter counts as: few processors, so that a program that goes through several tiles has to.
STAND_IN = Chip("interpreter", 227 << 10, 3)


def chip(device: torch.device) -> Chip:
    """The chip that tensors on this device are computed on."""
    return STAND_IN if device.type == "cpu" else _chip(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _chip(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Chip(found.gcnArchName.split(":")[0], 64 << 10, found.multi_processor_count)
    # What a program may ask for beyond 48 KiB; torch before 2.7 does not say.
    shared = getattr(found, "shared_memory_per_block_optin", 99 << 10)
    return Chip(f"sm_{found.major}{found.minor}", shared, found.multi_processor_count)


def warps(elements: int, device: torch.device) -> int:
    """Of a program that holds so many elements of rows in its registers"""
    return max(4, min(32 if chip(device).nvidia else 16, elements // 1024))


def refuses(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel takes these tensors, in a sentence; None if one may."""
    first = next(t for t in tensors if t is not None)
    if first.dtype not in DTYPES:
        return f"the Triton kernels are for float32, bfloat16 and float16, not {str(first.dtype).removeprefix('torch.')}"
    if any(t is not None and t.device != first.device for t in tensors):
        return "the tensors are on different devices: move them to one with .to()"
    terms = backends.float32_precision == "tf32x3" and first.dtype is torch.float32
    if terms and first.is_cuda and not chip(first.device).nvidia:
        return "products in terms of tf32 are NVIDIA's alone: set_float32_precision() knows bf16x3"
    if first.is_cuda and 0 < chip(first.device).nvidia < 80:
        return f"the Triton kernels need compute capability 8.0, and this GPU is {chip(first.device).name}"
    return None


def run(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Start so many programs of a kernel. Options: its constants by name, num_warps, num_stages.

    Triton itself uses torch's current device and its current stream, so another device than that is made current meanwhile.
    """
    if programs == 0:
        return
    try:
        if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
            compiled = kernel[(programs,)](*args, **options)
        else:
            with torch.cuda.device(device):
                compiled = kernel[(programs,)](*args, **options)
    except OutOfResources as error:
        needs = f"{error.name}: {error.required}, there are {error.limit}"
        raise RuntimeError(f"fastnn: {kernel.__name__} does not fit on {device} ({needs}); use backend='torch'") from error
    tape = replay.tape()
    if tape is not None:
        given = dict(zip(kernel.arg_names, args)) | options
        tape.launched(compiled, programs, [given[name] for name in kernel.arg_names])


def allow_descriptors() -> None:
    """Let kernels make tensor descriptors: they need a little memory, which is torch's."""
    triton.set_allocator(_scratch)


def _scratch(size: int, align: int, stream: int | None) -> Tensor:
    return replay.empty_on_gpu((size,), (1,), torch.int8)


# Numbers as kernels want them ---------------------------------------------------------------------------------------------------


def power_of_two(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that holds n, within bounds."""
    return min(most, max(least, 1 << max(0, n - 1).bit_length()))


def signed(bits: int) -> int:
    """32 bits as the number that Triton takes for an int32"""
    return (bits + (1 << 31) & 0xFFFFFFFF) - (1 << 31)
