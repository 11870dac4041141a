"""The numerics report: every operator, dtype and gradient against a reference, beside PyTorch's own error.

The reference is computed in float64; for pointwise functions by mpmath with forty digits, because a float64 formula
such as x·(1 + erf(x/√2))/2 has itself no correct digit far out on the negative side; for products and softmax with a
more careful sum than any BLAS or PyTorch has. What is left in float64 (prelu, glu, dropout, nll_loss, mse_loss) can only
be compared with PyTorch's own: there the floor of the error rule is doubled. Recurrent layers too, whose many steps take
PyTorch's own float64 further from the truth: there it is forty ulp more.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._checks import DTYPES, Check, checks, dtypes
from ._numerics import CAREFUL, FLOOR, TORCH, Error, error, results, widen


@dataclass
class Line:
    """One line of the report.

    Attributes:
        what: "forward" or "grad of …".
        ours, theirs: the errors; PyTorch's is None where PyTorch is the reference or cannot do this.
        served_by: the backend that did the work.
        repeats: the same call gave the same bits again.
        threads: with one thread instead of all the bits were the "same", or they "differ": a fact, not a fault. Empty
            where there is only one thread.
        problem: what went wrong, if no number can say it.
    """

    family: str
    name: str
    dtype: str
    what: str
    ours: Error = field(default_factory=Error)
    theirs: Error | None = None
    served_by: str = ""
    repeats: bool = True
    threads: str = ""
    problem: str = ""

    @property
    def good(self) -> bool:
        if self.problem or not self.repeats:
            return False
        # Where PyTorch is the reference, its own error is unknown and may be as large as ours.
        unknown = 20.0 if self.family == "rnn" else FLOOR / 2
        return self.ours.within(self.theirs or Error(worst=unknown), DTYPES[self.dtype])

    @property
    def verdict(self) -> str:
        if self.good:
            return "good"
        if self.problem:
            return self.problem
        if not self.repeats:
            return "RED: not the same bits twice"
        return "RED: special values" if self.ours.specials else "RED: error"

    def cells(self) -> tuple[str, ...]:
        """What the report shows, under the names of `_HEAD`."""
        return (
            self.name,
            self.dtype,
            self.what,
            *_number(self.ours),
            *_number(self.theirs),
            self.threads,
            self.served_by,
            self.verdict,
        )


# Running a check ------------------------------------------------------------------------------------------------------


def _bits(t: Tensor) -> Tensor:
    return t.detach().reshape(-1).contiguous().view(torch.uint8)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(_bits(a), _bits(b))


def _with_one_thread(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...] | None:
    """What one thread computes; None if there never was another."""
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    torch.set_num_threads(1)
    try:
        return compute()
    finally:
        torch.set_num_threads(threads)


#: From here on slopes are constant: the float64 formula knows them.
_SATURATED = 1e4


def _slope(f: Callable[[Any], Any], mpmath: Any, x: float) -> float:
    """f'(x) by a central difference so fine, in so many digits, that float64 loses nothing (x is not 0)."""
    with mpmath.workdps(120 + 2 * max(0, -math.frexp(x)[1])):
        at, h = mpmath.mpf(x), abs(mpmath.mpf(x)) * mpmath.mpf(10) ** -40
        return float((f(at + h) - f(at - h)) / (2 * h))


def _exact(function: Callable[[Any, Any], Any], x: Tensor, slope: bool, fallback: Tensor) -> Tensor:
    """A pointwise function or its derivative by mpmath; at NaN and Inf, kinks and saturated slopes ``fallback``."""
    import mpmath

    f = partial(function, mpmath)
    known: dict[float, float] = {}
    values = []
    for n, value in enumerate(x.flatten().tolist()):
        if value not in known:
            if not math.isfinite(value) or (slope and (abs(value) > _SATURATED or value in _KINKS)):
                values.append(float(fallback.flatten()[n]))
                continue
            with mpmath.workdps(40):
                known[value] = _slope(f, mpmath, value) if slope else float(f(mpmath.mpf(value)))
        formula = float(fallback.flatten()[n])
        values.append(formula if known[value] == formula == 0 else known[value])  # mpmath's zero has no sign
    return torch.tensor(values, dtype=torch.float64).reshape(x.shape)


#: Where a pointwise function may have a kink: there the float64 formula says which side's slope PyTorch takes.
_KINKS = (0.0, -0.75, 2.5, 3.0, -3.0, 6.0, 10.0)


def _reference(check: Check, inputs: Sequence[Any], grad: Tensor | None) -> tuple[Tensor, ...]:
    def run(g: Tensor | None) -> tuple[Tensor, ...]:
        return results(lambda *values: check.theirs(CAREFUL, *values), inputs, g)

    if check.exact is None:
        return run(grad)
    x = inputs[0].detach()
    if grad is None:
        return (_exact(check.exact, x, False, run(None)[0]),)
    return (grad * _exact(check.exact, x, True, run(torch.ones_like(grad))[0]),)


#: In float64, for want of a better one.
_TORCH_IS_THE_REFERENCE = ("prelu", "glu", "dropout", "nll_loss", "mse_loss", "lstm", "gru", "rnn")


def run_check(check: Check, dtype: torch.dtype) -> Iterator[Line]:
    """The lines of one check: the forward, then every gradient."""
    from . import backends, functional

    ours = check.ours or check.theirs
    inputs = check.make(dtype)
    wide = [widen(v) for v in inputs]
    with torch.no_grad():
        shape = check.theirs(TORCH, *wide).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    leaves = [name for name, t in zip(check.names, inputs, strict=False) if isinstance(t, Tensor) and t.requires_grad]
    stages: list[tuple[Tensor | None, list[str]]] = [(None, ["forward"])]
    if leaves:
        stages.append((grad, [f"grad of {name}" for name in leaves]))
    whole = check.family == "rnn"  # its forward, too, starts from what was rounded to 16 bits: the states
    finer = dtype != torch.float64 or not check.name.startswith(_TORCH_IS_THE_REFERENCE)
    for g, names in stages:
        compute = partial(results, lambda *values: ours(functional, *values), inputs, g)
        lines = [Line(check.family, check.name, str(dtype).removeprefix("torch."), name) for name in names]
        try:
            with backends.trace() as calls:
                first = compute()
            second = compute()
            alone = _with_one_thread(compute)
        except Exception as problem:  # an operator that raises is a red line, not the end of the report
            for line in lines:
                line.problem = (
                    f"RED: {type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem) else ''}"
                )
            yield from lines
            continue
        true = _reference(check, wide, widen(g))
        scales = check.scale(wide, widen(g)) if check.scale else (None,) * len(true)
        try:
            yardstick = results(lambda *values: check.theirs(TORCH, *values), inputs, g) if finer else None
        except (RuntimeError, NotImplementedError):  # torch has no kernel for the dtype: the floor alone judges
            yardstick = None
        for n, line in enumerate(lines):
            line.served_by = "+".join(dict.fromkeys(c.backend for c in calls)) or "torch"
            other = yardstick[n] if yardstick else None
            if first[n].dtype != dtype or first[n].shape != true[n].shape:
                line.problem = (
                    f"RED: {first[n].dtype} of shape {tuple(first[n].shape)} instead of {dtype}, {tuple(true[n].shape)}"
                )
            else:
                line.ours = error(first[n], true[n], scales[n], other, forward=g is None and not whole)
                line.repeats = _same_bits(first[n], second[n])
                line.threads = "" if alone is None else "same" if _same_bits(first[n], alone[n]) else "differ"
            line.theirs = error(other, true[n], scales[n], forward=g is None and not whole) if other is not None else None
            yield line


def run(chosen: Iterable[Check], kinds: Sequence[torch.dtype], backend: str | None = None) -> Iterator[Line]:
    """All lines of the checks in each dtype. With ``backend``, calls that it cannot serve turn red."""
    from . import backends
    from .kernels.cpu.engine.overhead import no_rules

    with ExitStack() as stack:
        stack.enter_context(no_rules())  # the examples are small, and it is the kernels that are examined
        if backend:
            stack.enter_context(backends.backend(backend))
        for check in chosen:
            for dtype in kinds:
                yield from run_check(check, dtype)


# The command ----------------------------------------------------------------------------------------------------------

RULE = (
    f"At most twice PyTorch's largest error plus {FLOOR:.0f} ulp ({FLOOR / 2:.0f} in 16 bits), both against a float64 or "
    "finer reference; special values as the reference or PyTorch has them; and the same bits when called again. An ulp is "
    "the distance of neighbouring numbers of the dtype, for sums at the sum of the terms' magnitudes. Whether one thread "
    "gives the same bits as all is stated, and no fault."
)
_HEAD = ("operator", "dtype", "what", "max ulp", "rms", "torch max", "rms", "one thread", "by", "verdict")
_FORM = "{:<46} {:<9} {:<18} {:>9} {:>9} {:>10} {:>9}  {:<10} {:<9} {}"


def _number(e: Error | None) -> tuple[str, str]:
    return ("reference", "") if e is None else (f"{e.worst:.3g}", f"{e.rms:.2g}")


def summary(lines: Sequence[Line]) -> str:
    """What was found, in a sentence or two."""
    red = sum(not line.good for line in lines)
    compared = [line for line in lines if line.good and line.theirs]
    better = sum(line.ours.worst < line.theirs.worst for line in compared if line.theirs)
    equal = sum(line.ours.worst == line.theirs.worst for line in compared if line.theirs)
    threaded = [line.threads for line in lines if line.threads]
    across = (
        f"One thread gives the same bits as {torch.get_num_threads()} in {threaded.count('same')} of {len(threaded)}."
        if threaded
        else "There is only one thread."
    )
    return (
        f"{len(lines)} lines: {len(lines) - red} good, {red} red. Of {len(compared)} compared with PyTorch's error, "
        f"ours is smaller in {better}, equal in {equal}. {across}"
    )


def main(arguments: Namespace) -> int:
    """``python -m fastnn verify``: print the report and write its files; 0 if all is well, 1 if a line is red.

    Raises:
        ValueError: an unknown family, dtype or backend, or a file that cannot be written.
    """
    from rich.console import Console
    from rich.text import Text

    from . import _verify_page, backends

    if arguments.backend:
        backends.validate(arguments.backend)
    chosen = checks(arguments.family)
    files = [Path(name) for name in (arguments.html, arguments.json) if name]
    for file in files:  # not after minutes of work
        if not file.parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no folder {file.parent}")
    console = Console()
    console.print(Text(_FORM.format(*_HEAD), style="bold"), soft_wrap=True)
    lines = []
    for line in run(chosen, dtypes(arguments.dtype), arguments.backend):
        lines.append(line)
        if not (line.good and arguments.failures):
            console.print(Text(_FORM.format(*line.cells()), style="" if line.good else "red"), soft_wrap=True)
    red = any(not line.good for line in lines)
    console.print(f"\n{summary(lines)} The rule: {RULE}", soft_wrap=True, style="red" if red else "green", markup=False)
    given = [*arguments.family, *(f"--{k} {getattr(arguments, k)}" for k in ("dtype", "backend") if getattr(arguments, k))]
    command = " ".join(["python -m fastnn verify", *given])
    if arguments.html:
        Path(arguments.html).write_text(_verify_page.page(lines, RULE, summary(lines), _HEAD, command), "utf-8")
    if arguments.json:
        Path(arguments.json).write_text(_verify_page.as_json(lines, RULE, command), "utf-8")
    for file in files:
        console.print(f"written: {file}", soft_wrap=True, highlight=False, markup=False)
    return int(red)
