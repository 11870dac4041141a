"""A call that comes again is not thought through again: what it did is replayed on the new tensors.

Checks, strides, tiles and Triton's own launcher take 40 to 170 µs of Python, and follow from shapes, strides, dtypes and options
alone. So a call is recorded as a tape: torch's operators, by a dispatch mode, and the launches, which tell of themselves. The
tape is written out as a function of the call's tensors, which allocates, launches with addresses, and does what else torch did.
Views are only offsets where nothing but launches reads them. Triton's launch hooks, a profiler's, do not see what is replayed.

What is recorded has to follow from the options, by which the caller looks it up (``fastnn.ops._operator``), from what is
compared here, and from nothing else: a call that reads a number from a tensor, or touches one that came from elsewhere, has no
tape.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnn import backends

from . import driver

# What Inductor's generated code allocates with: half of what torch.empty takes.
empty_on_gpu: Callable[..., Tensor] = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
_empty_on_cpu: Callable[..., Tensor] = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
_EMPTY = {f"aten::{name}" for name in ("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like")}
_here = threading.local()


class Unrepeatable(Exception):
    """Why a call has no tape."""


class Tape(TorchDispatchMode):
    """What a call does with its tensors. Inside ``with tape:`` everything is done, and noted."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.problem: str | None = None
        self._names: dict[int, str] = {}
        self._roots: dict[int, tuple[str, int]] = {}  # whose memory a tensor is in, and how many bytes behind its address
        self._alive: list[Any] = []  # as long as they are, no other tensor has their id
        # (line, names it makes, names it reads, whether it must stay)
        self._steps: list[tuple[str, list[str], set[str], bool]] = []
        self._constants: dict[str, Any] = {}
        for n, t in enumerate(inputs):
            if t is not None:
                self._new(t, f"x{n}")
        self._device = self._alive[0].device
        if any(t.device != self._device for t in self._alive):
            self.problem = "a tensor of the CPU takes part, whose values may have been read"

    # Noting ------------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Tape:
        _here.tape = self
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        _here.tape = None
        super().__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.problem is None:
            try:
                self._note(func, args, kwargs or {}, result)
            except Unrepeatable as problem:
                self.problem = str(problem)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        made = list(result) if isinstance(result, list | tuple) else [result]
        values = (v for a in (*args, *kwargs.values()) for v in (a if isinstance(a, list | tuple) else [a]))
        inputs = [v for v in values if isinstance(v, Tensor)]
        if not inputs and not any(isinstance(t, Tensor) for t in made):
            return  # about dtypes
        if not all(isinstance(t, Tensor) and t.device == self._device for t in made):
            raise Unrepeatable(f"{func} reads a value, or makes something else than a tensor here")
        if func._schema.name in _EMPTY:
            name = self._new(result)
            given = f"{tuple(result.shape)}, {result.stride()}, {self._constant(result.dtype)}"
            self._steps.append((f"{name} = empty({given})", [name], set(), False))
            return
        reads: set[str] = set()
        call = ", ".join([self._text(a, reads) for a in args] + [f"{k}={self._text(v, reads)}" for k, v in kwargs.items()])
        call = f"{self._constant(func)}({call})"
        if func._schema.is_mutable:
            for t in made:
                self._name(t)  # it is an argument
            self._steps.append((call, [], reads, True))
            return
        names = []
        for t in made:
            seen = next((g for g in inputs if _memory(g) == _memory(t)), None)
            if seen is not None and t is result and _lies(t) == _lies(seen):  # detached, say: the same by another name
                self._alive.append(t)
                self._names[id(t)], self._roots[id(t)] = self._name(seen), self._roots[id(seen)]
                return
            names.append(self._new(t) if seen is None else self._view(t, seen))
        left = ", ".join(names) + ("," if isinstance(result, list | tuple) else "")
        self._steps.append((f"{left} = {call}", names, reads, False))

    def launched(self, compiled: Any, programs: int, args: Sequence[Any]) -> None:
        """A kernel of Triton's was started, with all arguments in their order."""
        if compiled is None:
            self.problem = "an interpreter has no compiled kernel"
        if self.problem is not None:
            return
        try:
            reads: set[str] = set()
            run, function, packed = (self._constant(k) for k in (compiled.run, compiled.function, compiled.packed_metadata))
            given = ", ".join(self._address(a, reads) for a in args)
            line = f"{run}({programs}, 1, 1, stream, {function}, {packed}, None, None, None, {given})"
            if compiled.metadata.global_scratch_size:
                line = f"allow_descriptors(); {line}"
            self._launched(line, reads, driver.of_triton(compiled, programs, args))
        except Exception as problem:  # the kernel runs: that it cannot be written down is no reason for the call to fail
            self.problem = str(problem) or type(problem).__name__

    def launched_words(self, launch: Callable[..., None], where: Sequence[Any], words: Sequence[int | Tensor], cooperative: bool,
                       handle: int | None) -> None:  # fmt: skip
        """A kernel in CUDA C was started: function, device, grid, block and shared memory, then its words. handle: the driver's
        name of the function."""
        try:
            if isinstance(words, array):
                raise Unrepeatable("its words are addresses already")
            reads: set[str] = set()
            given = ", ".join(self._address(w, reads) for w in words)
            line = f"{self._constant(launch)}(*{self._constant(tuple(where))}, array('q', [{given}]), {cooperative})"
            found = None if handle is None or cooperative else driver.of_words(handle, where[2], where[3], where[4], words)
            self._launched(line, reads, found)
        except Exception as problem:
            self.problem = self.problem or str(problem) or type(problem).__name__

    def _launched(self, line: str, reads: set[str], found: driver.Launch | None) -> None:
        """found: what the driver is told itself; ``line`` says it again where it refuses, and raises what is wrong."""
        if found is not None:
            addresses = [self._address(t, reads) for t in found.addresses]
            if found.scratch:
                name = f"s{len(self._steps)}"
                given = f"({found.scratch},), (1,), {self._constant(torch.int8)}"
                self._steps.append((f"{name} = empty({given})", [name], set(), False))
                addresses.append(f"{name}.data_ptr()")
                reads.add(name)
            self._constant(found.words)  # which live as long as the function does
            again = self._constant(driver.again())
            line = f"if {again}({', '.join([str(found.where), 'stream', *addresses])}): {line}"
        self._steps.append((line, [], reads, True))

    def _new(self, t: Tensor, name: str | None = None) -> str:
        name = name or f"t{len(self._alive)}"
        self._alive.append(t)
        self._names[id(t)], self._roots[id(t)] = name, (name, 0)
        return name

    def _view(self, t: Tensor, of: Tensor) -> str:
        root, behind = self._roots[id(of)]
        name = self._new(t)
        self._roots[id(t)] = root, behind + t.data_ptr() - of.data_ptr()
        return name

    def _name(self, t: Tensor) -> str:
        if id(t) not in self._names:
            raise Unrepeatable("a tensor from elsewhere takes part")
        return self._names[id(t)]

    def _constant(self, value: Any) -> str:
        name = next((n for n, known in self._constants.items() if known is value), f"k{len(self._constants)}")
        self._constants[name] = value
        return name

    def _text(self, value: Any, reads: set[str]) -> str:
        if isinstance(value, Tensor):
            name = self._name(value)
            reads.add(name)
            return name
        if isinstance(value, list | tuple):
            inner = ", ".join(self._text(v, reads) for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
        return repr(value) if value is None or type(value) in (bool, int, str) else self._constant(value)

    def _address(self, value: Any, reads: set[str]) -> str:
        if not isinstance(value, Tensor):
            return self._text(value, reads)
        self._name(value)
        if value.numel() == 0:
            return str(value.data_ptr() and 1)  # nobody reads there; some look whether it is 0
        root, behind = self._roots[id(value)]
        reads.add(root)
        return (f"p{root[1:]}" if root[0] == "x" else f"{root}.data_ptr()") + (f" + {behind}" if behind else "")

    # Writing out -------------------------------------------------------------------------------------------------------------

    def functions(self, result: Tensor | tuple[Tensor, ...], inputs: Sequence[Any], alike: Callable[..., bool], now: Any,
                  separate: bool) -> backends.Replay:  # fmt: skip
        """What ``backends.record_call`` finds; Unrepeatable, with the reason, if there is no tape."""
        if self.problem is not None:
            raise Unrepeatable(self.problem)
        outputs: set[str] = set()
        returned = self._text(result, outputs)
        needed, lines = set(outputs), [f"    return {returned}"]
        slots = [f"{'_' if t is None else 'x'}{n}" for n, t in enumerate(inputs)]
        used = outputs | set(slots)  # by what comes later
        for line, makes, reads, stays in reversed(self._steps):
            if stays or needed & set(makes):
                needed |= reads
                if last := sorted((reads | set(makes)) - used):  # memory goes back as early as it does in the call itself
                    lines.append(f"    del {', '.join(last)}")
                    used |= set(last)
                lines.append(f"    {line}")
        given, there = ", ".join(slots), {n: t for n, t in enumerate(inputs) if t is not None}
        firsts = {n: next(m for m, other in there.items() if other is t) for n, t in there.items()}
        fits = [f"alike({', '.join(f'x{n}' for n, m in firsts.items() if n == m)})"]
        fits += [f"x{n} is x{m}" for n, m in firsts.items() if n != m]
        fits += [f"(p{n} := x{n}.data_ptr()) & 15 == {t.data_ptr() & 15}" for n, t in there.items()]
        fits += ["settings() == now"] * (now is not None)
        if separate:
            head = [f"def fits({given}):", f"    return {' and '.join(fits)}", f"def replay({given}, *options):"]
            head += [f"    p{n} = x{n}.data_ptr()" for n in there]
        else:
            head = [f"def replay({given}, *options):", f"    if not ({' and '.join(fits)}):", "        return None"]
        source = "\n".join([*head, f"    stream = current_stream({self._device.index or 0})", *reversed(lines)])
        namespace = {**self._constants, "alike": alike, "now": now, "settings": backends.settings, "array": array,
                     **_means(self._device)}  # fmt: skip
        exec(compile(source, "<fastnn call again>", "exec"), namespace)
        return namespace.get("fits"), namespace["replay"]


def _memory(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _lies(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.storage_offset(), t.dtype, t.is_neg()


def _means(device: torch.device) -> dict[str, Any]:
    """What the functions use on such a device."""
    from . import launch

    if device.type == "cuda":
        stream: Any = torch._C._cuda_getCurrentRawStream
        return {"empty": empty_on_gpu, "current_stream": stream, "allow_descriptors": launch.allow_descriptors}
    return {"empty": _empty_on_cpu, "current_stream": lambda index: 0, "allow_descriptors": lambda: None}


def tape() -> Tape | None:
    """The one that notes what this thread does."""
    return getattr(_here, "tape", None)


def record(run: Callable[..., Any], args: Sequence[Any], count: int, alike: Callable[..., bool], now: Any, separate: bool,
           ) -> tuple[Any, backends.Replay | None]:  # fmt: skip
    """What ``backends.record_call`` says"""
    # Each is a tensor of its own for the tape, also where one is given twice: the next call may give two.
    own = [None if t is None else t.detach() for t in args[:count]]
    tape = Tape(own)
    with tape:
        result = run(*own, *args[count:])
    try:
        return result, tape.functions(result, args[:count], alike, now, separate)
    except Unrepeatable:
        return result, None
