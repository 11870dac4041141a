"""Other libraries' root-mean-square norms (Hugging Face's LlamaRMSNorm, T5LayerNorm and their many copies) and gelus (its
GELUActivation, NewGELUActivation, …), known by what they do in a trial."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..ops._operator import PLAIN

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
    n = trial.weight.numel()
    for training, value in ((True, getattr(module, eps)), (False, 0.03)):
        trial.train(training).__dict__[eps] = value
        with torch.no_grad():
            trial.weight.copy_(torch.randn(n, generator=generator))
        sizes = torch.tensor([1e3, 1.0, math.sqrt(value), 0.0]).view(1, 4, 1)
        x = ((torch.randn(2, 4, n, generator=generator) + 1) * sizes).requires_grad_()
        try:
            found = trial(x)
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
        with torch.random.fork_rng(devices=()), torch.enable_grad():
            _classes[kind] = _norm(kind, eps) if _is_rms_norm(module, eps) else None
    return _classes[kind]
