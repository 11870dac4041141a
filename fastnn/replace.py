"""One line that makes a model use fastnn: `replace(model)`, its inverse `restore(model)`, and the block `use()`."""

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn
from torch._C import _is_torch_function_mode_enabled
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from . import _hugging_face, backends, functional
from .nn import REPLACEMENTS
from .nn._epilogue import Epilogue
from .nn._lookalike import gelu_class, leave_norms, originals, rms_norm_class, serve_norms
from .ops._operator import PLAIN

_ORIGINALS = originals  # which has the classes that are made when a look-alike is found
_ORIGINALS.update((ours, theirs) for theirs, ours in REPLACEMENTS.items())

_WEIGHTS = (
    "weight", "bias", "weight_ih", "weight_hh", "bias_ih", "bias_hh",
    "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v",
)  # fmt: skip


class Entry(NamedTuple):
    name: str
    class_name: str
    reason: str


@dataclass
class Report:
    """What `replace` did: which modules it switched, which it left and why. str() is a readable summary."""

    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        return summary(f"replaced {len(self.replaced)} modules, left {len(self.left)}", self.replaced, self.left)


def summary(head: str, done: list[Entry], left: list[Entry]) -> str:
    """The head, and a line for all modules of a class for which the same was done."""
    lines = [head]
    for entries, mark in ((done, ""), (left, "left: ")):
        for (class_name, reason), count in Counter((e.class_name, e.reason) for e in entries).most_common():
            lines.append(f"  {count:4d} × {class_name:<20} {mark}{reason}".rstrip())
    return "\n".join(lines)


def replace(model: nn.Module, backend: str | None = None) -> Report:
    """Switch every module of exactly a torch.nn class that fastnn has, in place, to fastnn's class.

    Parameters, buffers, hooks, references and state_dicts stay what they are; a shared module is switched once; a
    second call changes nothing more. `backend` names the backend of the replaced modules (ValueError if unknown).
    Root-mean-square norms and gelus of other libraries are switched too, if a trial shows that they are, and the attention
    of transformers' models by their config: for all models that share it, as ``model.set_attn_implementation`` has it, and
    if it is "sdpa", as it is by default. Modules of other classes are left, and the report says why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    if backend is not None:
        backends.validate(backend)
    report = Report()
    for name, module in model.named_modules():
        kind, class_name = type(module), type(module).__name__
        ours = REPLACEMENTS.get(kind)
        if kind in _ORIGINALS:
            report.replaced.append(Entry(name, class_name, "already fastnn's"))
        elif ours is None and (ours := rms_norm_class(module)) is not None:
            module.__class__ = ours
            report.replaced.append(Entry(name, class_name, "root-mean-square norm, by trial"))
        elif ours is None and (ours := gelu_class(module)) is not None:
            module.__class__ = ours
            report.replaced.append(Entry(name, class_name, "gelu, by trial"))
        elif (reason := why_left(module)) is not None:
            report.left.append(Entry(name, class_name, reason))
            continue
        elif ours is not None:
            module.__class__ = ours
            report.replaced.append(Entry(name, class_name, ""))
        else:
            continue
        if backend is not None:
            module.__dict__["backend"] = backend
    for *entry, done in _hugging_face.switch(model, backend):
        (report.replaced if done else report.left).append(Entry(*entry))
    return report


def restore(model: nn.Module) -> nn.Module:
    """Switch every fastnn module of the model back to torch.nn's class; returns the model.

    What `fuse` made stays: torch's layers have no place for the activation or residual.
    """
    for module in model.modules():
        fused = isinstance(module, Epilogue) and "activation" in module.__dict__
        if type(module) in _ORIGINALS and not fused:
            module.__dict__.pop("backend", None)
            module.__class__ = _ORIGINALS[type(module)]
    _hugging_face.restore(model)
    return model


def why_left(module: nn.Module) -> str | None:
    """Why a layer is not switched; None for those that are, and for containers, which compute nothing themselves."""
    kind = _ORIGINALS.get(type(module), type(module))
    if kind in REPLACEMENTS:
        if "forward" in module.__dict__:
            return "its forward is overridden on the instance"
        names = getattr(module, "_flat_weights_names", _WEIGHTS)
        own = [name for name in names if isinstance(module.__dict__.get(name), Tensor)]
        if own:
            return f"its {own[0]} is computed, not a parameter (an old-style parametrisation such as weight_norm)"
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter) not in PLAIN:
                return f"its {name} is a {type(parameter).__name__}, a subclass of Tensor"
        return None
    if hasattr(module, "parametrizations"):
        return "parametrised: its weight is computed at each call"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: its shapes are not known before its first call"
    if "quantized" in kind.__module__ or "torch.ao" in kind.__module__:
        return "quantised"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit"
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return None  # part of a MultiheadAttention, whose forward reads its weight
    base = next((base for base in kind.__mro__[1:] if base in REPLACEMENTS), None)
    if base is not None:
        return f"a subclass of torch.nn.{base.__name__}: only exact types are switched"
    container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or next(module.children(), None)
    return None if container and not module._parameters else f"no fastnn kernel for {kind.__name__}"


# use(): torch's functions and methods, and what serves them here


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(input, weight, bias)


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    pad = None if padding_idx < 0 else padding_idx
    return functional.embedding(indices, weight, pad, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:  # fmt: skip
    return functional.layer_norm(input, normalized_shape, weight, bias, eps)


def _batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Tensor:  # fmt: skip
    return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    use_input_stats: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Tensor:  # fmt: skip
    return functional.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:  # fmt: skip
    return functional.group_norm(input, num_groups, weight, bias, eps)


def _with_indices(pool: Callable[..., Any]) -> Callable[..., Any]:
    """F.max_pool2d with return_indices is a function of its own in torch, whose argument of that name says nothing."""
    return lambda *args, **kwargs: pool(*args, **{**kwargs, "return_indices": True})


def _softmax_method(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.softmax(input, dim, dtype=None) in terms of the functional, which has _stacklevel in between."""

    def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return function(input, dim, dtype=dtype)

    return softmax


def _layers_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.lstm and its like, which also take a PackedSequence's data, with batch sizes in second place."""

    def layers(input: Tensor, second: Any, *args: Any) -> Any:
        if isinstance(args[0], (Tensor, tuple)) or (isinstance(args[0], list) and isinstance(args[1], list)):
            return function(input, *args, batch_sizes=second)
        return function(input, second, *args)

    return layers


def _served() -> dict[Callable[..., Any], Callable[..., Any]]:
    served: dict[Callable[..., Any], Callable[..., Any]] = {}
    for name in functional.__all__:
        ours = getattr(functional, name)
        if hasattr(torch_functional, name):
            served[getattr(torch_functional, name)] = ours
    for name in ("matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "relu", "sigmoid", "tanh", "prelu"):
        ours = getattr(functional, name)
        served[getattr(torch, name)] = ours
        served[getattr(Tensor, name)] = ours
    for name in ("softmax", "log_softmax"):
        ours = _softmax_method(getattr(functional, name))
        served[getattr(torch, name)] = ours
        served[getattr(Tensor, name)] = ours
    served[torch.embedding] = _embedding
    served[torch.layer_norm] = _layer_norm
    served[torch.rms_norm] = functional.rms_norm
    served[torch.batch_norm] = _batch_norm
    served[torch.instance_norm] = _instance_norm
    served[torch.group_norm] = _group_norm
    for name in ("max_pool1d", "max_pool2d", "max_pool3d"):
        served[getattr(torch, name)] = getattr(functional, name)
        for kind in (name, f"adaptive_{name}"):
            served[getattr(torch_functional, f"{kind}_with_indices")] = _with_indices(getattr(functional, kind))
    served[torch.max_pool1d_with_indices] = _with_indices(functional.max_pool1d)
    served[torch.adaptive_max_pool1d] = _with_indices(functional.adaptive_max_pool1d)
    for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
        served[getattr(torch, name)] = getattr(functional, name)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        served[getattr(torch, name)] = _layers_of(getattr(functional, name))
    served[Tensor.__matmul__] = functional.matmul
    served[Tensor.__rmatmul__] = lambda other, input: functional.matmul(input, other)
    served[torch_functional.linear] = _linear
    return served


_inside_use: ContextVar[bool] = ContextVar("fastnn_inside_use", default=False)


class use(TorchFunctionMode):
    """``with fastnn.use():`` torch's own calls inside (torch.matmul, @, F.linear, F.gelu, Tensor.softmax, …) are served
    by fastnn.functional, in this thread. Dropout too: see fastnn.functional.dropout for what it draws. A form of call that
    only torch has (an ``out=`` of torch.tanh, ``x.addmm(2, a, b)``) goes to torch as it is. Root-mean-square norms of other
    libraries (LlamaRMSNorm, T5LayerNorm, …) call no function that is a norm: here they are known by their class, which has "norm"
    in its name, is there when the block begins, and is tried once."""

    _table: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {}

    def __enter__(self) -> Self:
        if not use._table:
            use._table.update(_served())
        serve_norms(_in_use)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        leave_norms()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours = _find(func)
        if ours is None or _inside_use.get():
            return func(*args, **kwargs) if kwargs else func(*args)
        token = _inside_use.set(True)  # torch switches off this mode here, but not another use() around it
        try:
            return ours(*args, **(kwargs or {}))
        except TypeError:  # arguments that ours does not have, which is known before anything is computed
            backends.torch_serves(func.__name__, args, None, "only torch takes these arguments")
            return func(*args, **(kwargs or {}))  # raises what torch does if it takes them no more than ours
        finally:
            _inside_use.reset(token)


_find = use._table.get


def _in_use() -> bool:
    """Whether a call is made in a block of use() of this thread, and not by what serves one there."""
    on = _is_torch_function_mode_enabled() and not _inside_use.get()
    return on and any(isinstance(mode, use) for mode in _get_current_function_mode_stack())
