"""`fuse(model)`: for inference, batch norm folded into the layer before it, activation and residual into its last step, zeros
around an image into the convolution's padding.

What may be fused is found in the graph that torch.fx traces, so it does not matter what layers are called or whether an
activation is a module, a function or a method. What cannot be traced is not entered; what is inside it is fused by itself.
"""

import copy
import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, fx, nn

from . import functional
from .nn import REPLACEMENTS
from .nn._epilogue import WithDims
from .replace import Entry, summary, why_left

_THEIRS = {ours: theirs for theirs, ours in REPLACEMENTS.items()} | {theirs: theirs for theirs in REPLACEMENTS}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # which their owner may index

# Activations without parameters, as modules, functions (in torch, in torch.nn.functional, ours) and methods
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.GELU: "gelu", nn.SiLU: "silu", nn.Mish: "mish", nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh", nn.Hardswish: "hardswish", nn.Hardsigmoid: "hardsigmoid",
}  # fmt: skip
_FUNCTIONS = {
    getattr(space, name + tail): name
    for space in (torch, torch_functional, functional)
    for name in _MODULES.values()
    for tail in ("", "_")
    if hasattr(space, name + tail)
}
_METHODS = {name + tail: name for name in _MODULES.values() for tail in ("", "_") if hasattr(Tensor, name + tail)}
_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_DROPOUTS = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_DROPOUT_FUNCTIONS = {
    getattr(space, name)
    for space in (torch_functional, functional)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    if hasattr(space, name)
}
_PARAMETRISED = (nn.LeakyReLU, nn.ELU, nn.Hardtanh, nn.PReLU, nn.Softplus)
_WEIGHTED = {
    getattr(space, name)
    for space in (torch, torch_functional, functional)
    for name in ("linear", "batch_norm", *(f"conv{how}{dims}d" for how in ("", "_transpose") for dims in (1, 2, 3)))
    if hasattr(space, name)
}
_CLAMPS = (torch.clamp, torch.clamp_, torch.clip, torch.clip_, "clamp", "clamp_", "clip", "clip_")
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass
class Fusion:
    """What `fuse` did: the layers that took something over, and what was left and why. str() is a readable summary."""

    fused: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        return summary(f"fused {len(self.fused)} layers, left {len(self.left)}", self.fused, self.left)


def fuse(model: nn.Module) -> tuple[nn.Module, Fusion]:
    """A copy of the model for inference, with fewer steps and the same results, and a report; the model stays as it is.

    A batch norm directly after a convolution, a transposed one or a linear layer is folded into its weights. Activations
    without parameters and the addition of a residual become part of such a layer's last step; these layers are fastnn's
    then. Zeros that F.pad or a module adds for a convolution alone become its
    padding, where that can be said: as much on both sides, or as "same" divides it. Dropouts, which do nothing in eval mode, are
    left out. Convolutions called as functions with weights of their own stay. `fastnn.replace` switches the others of the copy.

    The copy is what torch.fx makes of the model; its state_dict has no entries for what was folded. Layers with hooks and
    what follows them stay apart. Modules that cannot be traced, or have hooks, keep their class, and the modules inside them
    are fused by themselves, but for the layers of a Sequential, which may be called one by one: the report says why. Arguments
    of the model's forward whose default is None, a bool or a string are fixed to it, because control flow may depend on them:
    another value raises AssertionError. As always in torch.fx, side effects of a forward happen once, when it is traced.

    Raises RuntimeError if a module is in training mode, TypeError if `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training:
            where = f"its module {name!r} is" if name else "it is"
            raise RuntimeError(f"fuse(): the model must be in eval mode, but {where} in training mode; call model.eval() first")
    report = Fusion()
    fused = _fuse(copy.deepcopy(model), "", report, {})
    place = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    for entries in (report.fused, report.left):
        entries.sort(key=lambda entry: place[entry.name])
    return fused, report


def _fuse(module: nn.Module, name: str, report: Fusion, done: dict[nn.Module, nn.Module], whole: bool = True) -> nn.Module:
    """The module of that name with everything fused that can be; what is shared is done once. ``whole``: it is known to be
    called as it is, and no part of it by itself."""
    if module not in done:
        done[module] = module
        if _is_entered(module):
            done[module] = _fuse_inside(module, name, report, done, whole)
    return done[module]


def _fuse_inside(
    module: nn.Module, name: str, report: Fusion, done: dict[nn.Module, nn.Module], whole: bool
) -> nn.Module:
    inner = (name + "." if name else "").__add__
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        try:
            graph, opaque = _trace(module, root=not name)
            for path in opaque:
                alone = not any(node.op == "call_module" and str(node.target).startswith(path + ".") for node in graph.nodes)
                module.set_submodule(path, _fuse(module.get_submodule(path), inner(path), report, done, alone))
            if not isinstance(module, nn.Sequential) or not (name or _hooked(module)):
                return _rewritten(module, graph, inner, report)
            if _is_chain(graph):  # hooks hang on it: the layers stay where they are
                found = Fusion()
                rewritten = _rewritten(module, graph, inner, found)
                if found.fused and not whole and type(module) is nn.Sequential:
                    reason = "the module that it is in cannot be traced, and may call its layers one by one"
                    report.left.append(Entry(name, type(module).__name__, reason))
                    return module
                report.fused += found.fused
                report.left += found.left
                kept = {str(node.target) for node in rewritten.graph.nodes if node.op == "call_module"}
                for path in [str(node.target) for node in graph.nodes if node.op == "call_module"]:
                    module.set_submodule(path, rewritten.get_submodule(path) if path in kept else nn.Identity().eval())
                return module
        except _Untraceable as error:
            report.left.append(Entry(name, type(module).__name__, error.reason))
            whole = False
    whole = whole and type(module) is nn.Sequential  # which calls each of its modules as it is
    for child, inside in list(module.named_children()):
        module.set_submodule(child, _fuse(inside, inner(child), report, done, whole))
    return module


# Tracing


class _Untraceable(Exception):
    """A module whose forward torch.fx cannot follow, by its path, and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path, self.reason = path, reason


class _Proxy(fx.Proxy):
    """With operators that change a tensor in place as such: torch.fx takes ``x += y`` for ``x = x + y``."""


def _in_place(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name in _IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Enters all modules but torch's, ours, those with hooks, and those that turned out to be opaque."""

    def __init__(self, opaque: set[str] | None = None) -> None:  # without, when what it traced is unpickled
        super().__init__(autowrap_modules=(math, functional))  # type: ignore[arg-type]
        self.opaque = set() if opaque is None else opaque
        self.entered = [""]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in _THEIRS or type(m) is WithDims or super().is_leaf_module(m, module_qualified_name):
            return True
        if _hooked(m):
            self.opaque.add(module_qualified_name)
        return module_qualified_name in self.opaque

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.entered.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        except _Untraceable:
            raise
        except Exception as error:
            raise _Untraceable(path, _because(error)) from error
        finally:
            self.entered.pop()

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not any(a is b for b in self.root.buffers()):
            raise _Untraceable(self.entered[-1], "its forward makes a tensor, which tracing would keep for all calls")
        return super().create_arg(a)


def _because(error: Exception) -> str:
    text = str(error).strip()
    return "torch.fx cannot trace it: " + (text.splitlines()[0] if text else type(error).__name__)


def _trace(module: nn.Module, root: bool) -> tuple[fx.Graph, set[str]]:
    """The module's graph, and the modules inside that could not be entered. Only the root's arguments may be fixed: the
    others' callers are not known."""
    if _hooked(module) and not isinstance(module, nn.Sequential):
        raise _Untraceable("", "it has hooks")
    if isinstance(module, torch.jit.ScriptModule):
        raise _Untraceable("", "compiled by torch.jit")
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError) as error:
        raise _Untraceable("", _because(error)) from error
    fixed = {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, (bool, str))}
    if fixed and not root:
        raise _Untraceable("", f"its argument {next(iter(fixed))!r} may decide what it computes")
    opaque: set[str] = set()
    while True:
        try:
            graph = _Tracer(opaque).trace(module, fixed or None)
            break
        except _Untraceable as found:
            if not found.path or found.path in opaque:
                raise
            opaque.add(found.path)
        except Exception as error:
            raise _Untraceable("", _because(error)) from error
    for node in graph.nodes:  # torch.fx numbers the fixed arguments' names
        if node.op == "placeholder" and node.target.removesuffix("_1") in fixed:
            node.target = node.target.removesuffix("_1")
    return graph, opaque


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_entered(module: nn.Module) -> bool:
    """Whether there may be something to fuse inside: a container or a class of the user's."""
    ours = type(module) in _THEIRS or type(module).__module__.startswith(("torch.nn", "torch.ao"))
    return next(module.children(), None) is not None and (not ours or isinstance(module, _CONTAINERS))


def _is_chain(graph: fx.Graph) -> bool:
    """Whether the graph is a row of modules, each called once."""
    nodes = list(graph.nodes)
    steps = [str(node.target) for node in nodes[1:-1]]
    return len(set(steps)) == len(steps) and all(
        node.op == "call_module" and node.args == (before,) and not node.kwargs and len(before.users) == 1
        for before, node in pairwise(nodes[:-1])
    )


# Rewriting


def _rewritten(module: nn.Module, graph: fx.Graph, inner: Callable[[str], str], report: Fusion) -> fx.GraphModule:
    """The traced module with its layers fused, the last ones first: of two that meet in an addition, the later adds."""
    traced = fx.GraphModule(module, copy.deepcopy(graph), type(module).__name__)
    modules = dict(module.named_modules(remove_duplicate=False))
    for node in reversed(list(traced.graph.nodes)):
        if _does_nothing(node, modules):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    for node in reversed(list(traced.graph.nodes)):
        if node.op == "call_module" and _is_layer(modules[node.target]):
            _fuse_layer(traced, node, modules, inner, report)
    for node in traced.graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                reason = _why_apart(node, modules) or "another batch norm was folded into the layer before it"
                report.left.append(Entry(inner(node.target), type(module).__name__, reason))
            elif _THEIRS.get(type(module)) in _PARAMETRISED and _follows_a_layer(node, modules):
                reason = "an activation with parameters is no part of a layer's last step"
                report.left.append(Entry(inner(node.target), type(module).__name__, reason))
        elif node.op == "call_function" and node.target in _WEIGHTED:
            reason = "called as a function, with weights of its own: only modules are fused"
            report.left.append(Entry(inner("").removesuffix("."), node.target.__name__, reason))
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    for name, value in module.__dict__.items():  # plain attributes, which the owner may read
        traced.__dict__.setdefault(name, value)
    return traced.eval()


def _is_layer(module: nn.Module) -> bool:
    return _THEIRS.get(type(module)) in _LAYERS and why_left(module) is None and not _hooked(module)


def _does_nothing(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the step's result is its input: identities, and dropouts where they are not in training."""
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        module = modules[str(node.target)]
        return _THEIRS.get(type(module), type(module)) in _DROPOUTS and not _hooked(module)
    if node.op != "call_function" or node.target not in _DROPOUT_FUNCTIONS or not node.args:
        return False
    return bool(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("training") is False)  # type: ignore[arg-type]


def _follows_a_layer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    before = node.args[0] if node.args else None
    return isinstance(before, fx.Node) and before.op == "call_module" and _is_layer(modules[str(before.target)])


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _fuse_layer(
    traced: fx.GraphModule, node: fx.Node, modules: dict[str, nn.Module], inner: Callable[[str], str], report: Fusion
) -> None:
    """Let the layer that `node` calls take over the steps that follow."""
    graph, layer = traced.graph, modules[str(node.target)]
    if len(node.args) != 1 or node.kwargs or getattr(layer, "activation", None) is not None:
        return
    kind = _THEIRS[type(layer)]
    taken, parts, place = [node], [], node
    norm = residual = activation = None
    pad, padding = _zeros_before(node, layer, modules)
    if pad is not None:
        parts.append("padding")
    after = _only_user(node)
    if after is not None and after.op == "call_module" and after.args == (node,) and _why_apart(after, modules) is None:
        norm = modules[str(after.target)]
        taken.append(after)
        parts.append(type(norm).__name__)
        after = _only_user(after)
    if after is not None and (residual := _residual(after, taken, modules)) is not None:
        taken.append(place := after)
        parts.append("residual")
        after = _only_user(after)
    if after is not None and (activation := _activation(after, taken[-1], modules)) is not None:
        taken.append(after)
        parts.append(activation)
    if not parts:
        return

    fused = copy.copy(layer)
    fused._parameters = dict(layer._parameters)  # a layer called twice has two successors
    if residual is not None or activation is not None:
        fused.__class__ = REPLACEMENTS[kind]
        fused.__dict__["activation"] = activation
    if pad is not None:
        fused.__dict__["padding"] = padding
        if padding == "same":  # which torch's own convolutions make a copy for, with a warning
            fused.__class__ = REPLACEMENTS[kind]
    if norm is not None:
        _fold(fused, norm)
    path = str(node.target)
    while path in modules and (path != node.target or traced.get_submodule(path) is not layer or _uses(graph, path) > 1):
        path += "_again"
    traced.add_submodule(path, fused)
    modules[path] = fused
    with graph.inserting_before(place):
        inputs = node.args if pad is None else (pad.all_input_nodes[0],)
        new = graph.call_module(path, inputs, {} if residual is None else {"residual": residual})
    if isinstance(norm, nn.BatchNorm1d):
        check = str(taken[1].target)
        while _uses(graph, check) > (check == taken[1].target):
            check += "_again"
        modules[check] = WithDims(2 if kind is nn.Linear else 3, path)
        traced.add_submodule(check, modules[check])
        with graph.inserting_after(new):
            new = graph.call_module(check, (new,))
    taken[-1].replace_all_uses_with(new)
    for step in reversed(taken if pad is None else [pad, *taken]):
        graph.erase_node(step)
    report.fused.insert(0, Entry(inner(str(node.target)), kind.__name__, "with " + ", ".join(parts)))


def _zeros_before(
    node: fx.Node, layer: Any, modules: dict[str, nn.Module]
) -> tuple[fx.Node, tuple[int, ...] | str] | tuple[None, None]:
    """The step that adds zeros around the input of the convolution that `node` calls, for it alone, and the convolution's
    padding in its place; two None where there is none or the convolution cannot say so."""
    pad = node.args[0]
    if isinstance(layer, (nn.Linear, *_TRANSPOSED)) or layer.padding_mode != "zeros" or layer.padding == "same":
        return None, None
    if not isinstance(pad, fx.Node) or _only_user(pad) is not node or (zeros := _zeros(pad, modules)) is None:
        return None, None
    between = node.prev
    while between is not pad:
        if _changes(between, modules):
            return None, None  # the input may be another one by now
        between = between.prev
    dims = len(layer.kernel_size)
    zeros += [0] * (2 * dims - len(zeros))
    sides = list(zip(zeros[::2], zeros[1::2]))  # of the last dimension first
    if min(zeros) < 0 or any(map(any, sides[dims:])):
        return None, None
    sides = sides[dims - 1 :: -1]
    before = (0,) * dims if layer.padding == "valid" else layer.padding
    if all(left == right for left, right in sides):
        return pad, tuple(p + left for p, (left, _) in zip(before, sides, strict=True))
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
    same = all(side == (t // 2, t - t // 2) for side, t in zip(sides, total, strict=True))
    return (pad, "same") if same and not any(before) and all(s == 1 for s in layer.stride) else (None, None)


def _zeros(node: fx.Node, modules: dict[str, nn.Module]) -> list[int] | None:
    """How many zeros `node` adds around a tensor, as F.pad has it; None if it does something else."""
    value: Any = None
    sizes: Any = None
    mode = "constant"
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        module: Any = modules[str(node.target)]
        if type(module) in _PADS and not _hooked(module) and "forward" not in module.__dict__:
            sizes, value = module.padding, module.value
    elif node.op == "call_function" and node.target is torch_functional.pad:
        bound = inspect.signature(torch_functional.pad).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        _, sizes, mode, value = bound.args
    if not isinstance(sizes, (tuple, list)) or len(sizes) % 2 or any(type(n) is not int for n in sizes):
        return None
    return list(sizes) if mode == "constant" and (value is None or (type(value) in (int, float) and value == 0)) else None


def _uses(graph: fx.Graph, path: str) -> int:
    """Calls of the module at that path, and looks at its parameters."""
    return sum(
        node.target == path if node.op == "call_module" else node.op == "get_attr" and str(node.target).startswith(path + ".")
        for node in graph.nodes
    )


def _why_apart(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Why the batch norm that `node` calls is not folded into the layer before it."""
    norm = modules[str(node.target)]
    if _THEIRS.get(type(norm)) not in _NORMS:
        return why_left(norm) or "not a batch norm"
    if _hooked(norm):
        return "it has hooks"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if why := why_left(norm):
        return why
    before = node.args[0] if node.args else None
    if not isinstance(before, fx.Node) or before.op != "call_module" or (
            _THEIRS.get(type(layer := modules[str(before.target)])) not in _LAYERS):
        return "no convolution or linear layer is directly before it"
    if not _is_layer(layer):
        return "the layer before it has hooks" if _hooked(layer) else f"the layer before it: {why_left(layer)}"
    if len(before.args) != 1 or before.kwargs:
        return "the layer before it is called with more than an input"
    if len(before.users) > 1:
        return "the output of the layer before it is used elsewhere"
    if getattr(layer, "activation", None) is not None:
        return "the layer before it has an activation"
    if (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels) != norm.num_features:
        return "it has another number of channels than the layer before it"
    return None


def _residual(node: fx.Node, taken: list[fx.Node], modules: dict[str, nn.Module]) -> fx.Node | None:
    """What `node` adds to the last of the steps taken, if that can be done with it."""
    if node.op == "call_module" or node.target not in _ADD or node.kwargs not in ({}, {"alpha": 1}):
        return None
    if len(node.args) != 2 or len(set(node.args)) != 2:
        return None
    if node.target in (operator.iadd, "add_") and node.args[0] is not taken[-1]:
        return None  # it is the other one that changes
    (other,) = (a for a in node.args if a is not taken[-1])
    between, inside = node.prev, []
    while between is not taken[0]:
        inside.append(between)
        between = between.prev
    if any(_changes(step, modules) for step in inside if step not in taken):
        return None  # what is computed later may have another input
    return other if isinstance(other, fx.Node) else None


def _changes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the step may change a tensor in place."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        known = type(module) in _THEIRS or type(module).__module__.startswith("torch.nn.")
        return getattr(module, "inplace", False) or not known
    if node.op in ("call_method", "call_function"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        space = getattr(node.target, "__module__", None) or "torch"
        return (
            (name.endswith("_") and not name.endswith("__"))
            or name in (*_IN_PLACE, "setitem")
            or any(a is True for a in node.args)  # an activation's second argument
            or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
            or not space.startswith(("torch", "_operator", "math", "fastnn"))
        )  # fmt: skip
    return False


def _activation(node: fx.Node, before: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The name of the activation that `node` is, of the step before alone."""
    if not node.args or node.args[0] is not before:
        return None
    options: dict[str, Any] = dict(node.kwargs)
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        kind = _THEIRS.get(type(module))
        name = _MODULES.get(kind)  # type: ignore[arg-type]
        if kind is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6):
            name = "relu6"
        if name is None or _hooked(module) or options:
            return None
        options["approximate"] = getattr(module, "approximate", "none")
    elif node.target in _CLAMPS:
        bounds: dict[str, Any] = {**dict(zip(("min", "max"), node.args[1:])), **node.kwargs}
        names: dict[Any, str] = {(0, 6): "relu6", (0, None): "relu"}
        return names.get((bounds.get("min"), bounds.get("max")))
    elif node.op in ("call_function", "call_method"):
        name = _METHODS.get(node.target) if isinstance(node.target, str) else _FUNCTIONS.get(node.target)
        if name is None or len(node.args) > (1 if name == "gelu" else 2) or options.keys() - {"inplace", "approximate"}:
            return None
    else:
        return None
    return "gelu_tanh" if name == "gelu" and options.get("approximate", "none") == "tanh" else name


def _fold(layer: Any, norm: Any) -> None:
    """(z - mean) / sqrt(var + eps) · weight + bias, as a part of the layer that computes z; in float64, rounded once."""
    weight, bias = layer.weight, layer.bias
    mean, var, eps = norm.running_mean, norm.running_var, norm.eps
    with torch.no_grad():
        scale = (var.double() + eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = ((0 if bias is None else bias.double()) - mean.double()) * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        if isinstance(layer, _TRANSPOSED):  # (inputs, outputs of a group, …)
            each = weight.unflatten(0, (layer.groups, -1))
            folded = (each.double() * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).view(weight.shape)
        else:
            folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        layer.weight = nn.Parameter(folded.to(weight.dtype), requires_grad=weight.requires_grad)
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
