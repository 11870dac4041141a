"""Other libraries' root-mean-square norms (Hugging Face's LlamaRMSNorm, T5LayerNorm and their many copies) and gelus (its
GELUActivation, NewGELUActivation, …), known by what they do in a trial."""

import copy
import math
from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .. import functional as F
from ..ops._operator import PLAIN, usual

_classes: dict[type[nn.Module], type[nn.Module] | None] = {}  # theirs: ours, or None if it computes something else
_gelus: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}  # (theirs, torch's name of the formula): ours
originals: dict[type[nn.Module], type[nn.Module]] = {}  # ours: theirs
_PLAIN = frozenset(nn.Module().__dict__)


def _eps_of(module: nn.Module) -> str | None:
    """The name of its epsilon, if a vector ``weight`` and one small positive float are all that the module has."""
    if type(module._parameters) is not dict:  # as a module compiled by torch.jit
        return None
    own = {name for name, value in module.__dict__.items() if name not in _PLAIN and not (name[0] == "_" and type(value) is bool)}
    weight = module._parameters.get("weight")
    if len(own) != 1 or set(module._parameters) != {"weight"} or module._buffers or module._modules:
        return None
    name, fits = own.pop(), type(weight) in PLAIN and weight is not None and weight.dim() == 1 and weight.numel() > 1
    eps = module.__dict__[name]
    return name if fits and type(eps) is float and 0 < eps < 1 else None


def _is_rms_norm(module: nn.Module, eps: str) -> bool:
    """Whether a copy of the module, with random weights, has rms_norm's results: for large rows, for some where eps decides, for
    a row of zeros, and for another eps; in training and evaluation; differentiably."""
    generator = torch.Generator().manual_seed(0)
    trial: Any = copy.deepcopy(module).float().cpu()
    n = trial.weight.requires_grad_().numel()
    for training, value in ((True, getattr(module, eps)), (False, 0.03)):
        trial.train(training).__dict__[eps] = value
        with torch.no_grad():
            trial.weight.copy_(torch.randn(n, generator=generator, dtype=torch.float32))
        sizes = torch.tensor([1e3, 1.0, math.sqrt(value), 0.0], dtype=torch.float32).view(1, 4, 1)
        x = ((torch.randn(2, 4, n, generator=generator, dtype=torch.float32) + 1) * sizes).requires_grad_()
        try:
            found = type(trial).forward(trial, x)  # without hooks, which are others' business
            expected = torch.nn.functional.rms_norm(x, (n,), trial.weight, value)
            if type(found) is not Tensor or found.shape != x.shape or not torch.allclose(found, expected, 1e-4, 1e-5):
                return False
            slopes = (torch.autograd.grad(y.square().sum(), (x, trial.weight)) for y in (found, expected))
            if not all(torch.allclose(a, b, 1e-3, 1e-3 * float(b.abs().max())) for a, b in zip(*slopes, strict=True)):
                return False
        except Exception:
            return False
    return True


def _subclass(theirs: type[nn.Module], what: str, forward: Any, make: Any) -> type[nn.Module]:
    """theirs with our forward. Pickle finds classes by name, and ours may not be made yet in its process: make(theirs, what)."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _unpickled, (make, theirs, what), self.__getstate__()

    own = {"forward": forward, "__reduce_ex__": reduce, "backend": None, "__module__": __name__}
    ours = type(theirs.__name__, (theirs,), own)
    originals[ours] = theirs
    return ours


def _unpickled(make: Any, theirs: type[nn.Module], what: str) -> nn.Module:
    """A module of our class, still empty."""
    ours = make(theirs, what)
    return ours.__new__(ours)


def _norm(theirs: type[nn.Module], eps: str) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype is not self.weight.dtype:  # what comes out then differs from class to class
            found: Tensor = theirs.forward(self, hidden_states)
            return found
        shape = self.weight.shape
        out: Tensor = F.rms_norm(hidden_states, shape, self.weight, self.__dict__[eps], backend=self.backend)
        return out

    ours = _classes[theirs] = _classes.get(theirs) or _subclass(theirs, eps, forward, _norm)
    return ours


def _gelu(theirs: type[nn.Module], approximate: str) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1:  # what else a class may take was not tried
            return theirs.forward(self, *args, **kwargs)
        return F.gelu(args[0], approximate, backend=self.backend)

    key = theirs, approximate
    if key not in _gelus:
        _gelus[key] = _subclass(theirs, approximate, forward, _gelu)
    return _gelus[key]


def gelu_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that serves a module called gelu that has no parameters, if a trial shows that it is one of torch's two; else
    None."""
    kind = type(module)
    if "gelu" not in kind.__name__.lower() or type(module._parameters) is not dict or kind.__module__.startswith("torch."):
        return None
    if module._parameters or module._buffers or module._modules or "forward" in module.__dict__:
        return None
    x = torch.cat((torch.linspace(-8, 8, 101), torch.tensor((-300.0, 30.0, 300.0)))).requires_grad_()
    try:
        with torch.enable_grad():
            found = kind.forward(module, x)
            slope = torch.autograd.grad(found.sum(), x)[0]
            for approximate in ("none", "tanh"):  # which differ by 5e-4
                expected = torch.nn.functional.gelu(x, approximate=approximate)
                same = torch.allclose(found, expected, 1e-5, 1e-6)
                if same and torch.allclose(slope, torch.autograd.grad(expected.sum(), x)[0], 1e-4, 1e-5):
                    return _gelu(kind, approximate)
    except Exception:  # another library's code: whatever it does with a trial, it is no plain gelu then, and stays as it is
        return None
    return None


def rms_norm_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that serves a module of another library's root-mean-square norm; None if the module is none."""
    kind, eps = type(module), _eps_of(module)
    if eps is None or module._parameters["weight"].is_meta:  # type: ignore[union-attr]
        return None
    if kind not in _classes:
        with torch.random.fork_rng(devices=()), torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.enable_grad():
            _classes[kind] = _norm(kind, eps) if _is_rms_norm(module, eps) else None
    return _classes[kind]


# In a block of use(): norms of this kind do their arithmetic in several calls of torch's, none of which is a norm. While there is
# such a block, in whatever thread, their classes' forward asks whether it runs in one.

_served: dict[type[nn.Module], tuple[Any, Any]] = {}  # their own forward, and the one that asks
_blocks = 0
_lock = Lock()


def serve_norms(inside: Callable[[], bool]) -> None:
    """Where ``inside()``, serve norms whose class derives from torch.nn.Module, has "norm" in its name and passes the trial."""
    global _blocks
    with _lock:
        _blocks += 1
        for kind in nn.Module.__subclasses__():
            named = "norm" in kind.__name__.lower() and not kind.__module__.startswith(("torch.", "fastnn."))
            if named and kind not in _served and callable(forward := kind.__dict__.get("forward")):
                kind.forward = ask = _asking(kind, forward, inside)
                _served[kind] = forward, ask


def leave_norms() -> None:
    """The end of what ``serve_norms`` began; after the last one all classes are as they were."""
    global _blocks
    with _lock:
        _blocks -= 1
        while not _blocks and _served:
            kind, (forward, ask) = _served.popitem()
            if kind.__dict__.get("forward") is ask:  # and nobody has put another in its place
                kind.forward = forward


def _asking(kind: type[nn.Module], forward: Callable[..., Any], inside: Callable[[], bool]) -> Callable[..., Any]:
    @wraps(forward)
    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_dynamo_compiling() and type(self) is kind and len(args) == 1 and not kwargs and inside():
            with torch._C.DisableTorchFunction():  # the mode would be asked about each property of a tensor
                found = _by_ours(self, args[0])
            if found is not None:
                return found
        return forward(self, *args, **kwargs)

    return ask


def _by_ours(module: nn.Module, x: Any) -> Tensor | None:
    """Its result, if it is a norm of this kind, and x of its weight's dtype."""
    weight = module._parameters.get("weight")
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or x.dtype is not weight.dtype:
        return None
    if type(module) not in _classes and not usual((x, weight)):  # others would have a say in the trial
        return None
    eps = _eps_of(module)
    if eps is None or rms_norm_class(module) is None:
        return None
    out: Tensor = F.rms_norm(x, weight.shape, weight, module.__dict__[eps])
    return out
