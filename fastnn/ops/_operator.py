"""The one mechanism that makes an operator: what is said about an op here, once, serves eager calls, autograd,
torch.compile, export, torch.func and autocast.

An eager call on plain tensors goes straight to a kernel, because the dispatcher costs more than a small product.
Whatever traces (torch.compile, export, fake tensors, dispatch modes) meets the same op as ``torch.ops.fastnn.*``.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import (
    DisableTorchFunction,  # noqa: F401  (in _CALL)
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _get_deterministic_algorithms,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
    is_grad_enabled,
)
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from fastnn import backends

FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
PLAIN = frozenset({Tensor, Parameter})  # types whose memory a kernel may touch: nothing is overridden
_ON_CPU = frozenset({"batch_sizes"})  # a PackedSequence has them there whatever its data's device
_library = torch.library.Library("fastnn", "DEF")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
# What Inductor's generated code allocates with: half of what torch.empty takes. (It fills nothing, as
# deterministic algorithms ask for: they go the general way.)
empty_matrix = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
current_device = getattr(torch._C, "_cuda_getDevice", None)  # (in _CALL)
# Whether tensors are alike in all but where they are and what is in them: type, sizes, strides, dtype, device, what wants a
# gradient, and the modes and transforms that have a say (Dynamo's own guards, a tenth of what asking from here takes).
TensorGuards = torch._C._dynamo.guards.TensorGuards
_MOST, _EACH = 1024, 8  # kinds of calls that an operator remembers, and how many of some shapes and options it can do again
_REPLAYED = object()  # in place of a plan: the kernel is a whole call
_PRODUCTS = frozenset({"matmul", "conv", "attention", "rnn", "softmax"})  # families that have some

# What `Operator.call` runs, written out for the op's own arguments: a loop over them would cost as much as a small
# kernel. It holds the usual cases and nothing else; `Operator.general` is the whole truth, and has the same result. On a GPU a
# call that comes again is replayed, if its shapes and options have been met and all else fits: `kernels.gpu.engine.replay`.
_CALL = """\
def make(
    op, mode_is_on, by_torch, check, allocate, inspect, differentiable, context, traces, table, load, dense, may_be_written,
    replays,
):
    def {name}({args}, backend=None, out=None):
        if not is_dynamo_compiling() and {all_plain}:
            if mode_is_on():  # use(), a default device: it would be asked about each property of a tensor
                with DisableTorchFunction():
                    return op.call({args}, backend, out)
            if (
                (backend or context()) is None
                and not traces
                and {all_on_cpu}
                and not _len_torch_dispatch_stack()
                and _get_tracing_state() is None
            ):
                kernel, supports, torch_is_faster = table.get("{name}") or load("cpu", op)
                if torch_is_faster is not None and torch_is_faster({args}):
                    try:
                        return by_torch({args})
                    except Exception as error:
                        op.refuse(({args},), error)
                if not (
                    _are_functorch_transforms_active()
                    or forward_ad._current_level >= 0
                    or _get_deterministic_algorithms()
                    {or_autocast}
                ):
                    plan = check({args})
                    try:
                        if (
                            type(plan) is not str
                            and {none_negated}
                            and (supports is None or supports("{name}", {args}) is None)
                        ):
                            if is_grad_enabled() and ({any_requires_grad}):
                                return {differentiable}
                            {inspect}
                            result = {allocate}
                            if out is not None and may_be_written(out, result, ({tensors},)):
                                result = out
                            kernel(result, {args})
                            return result{visible}
                    except RuntimeError:  # a sparse tensor has no address; looking for one beforehand would cost every call
                        if all(t is None or dense(t) for t in ({tensors},)):
                            raise
            elif (
                {first}.is_cuda
                and {first}.get_device() == current_device()
                and out is None
                and not traces
                and forward_ad._current_level < 0
                and not _get_deterministic_algorithms()
            ):
                its_key = ({key}, backend or context(), is_grad_enabled())
                for fits, again in replays.get(its_key, ()):
                    if fits is None:  # again() looks itself
                        result = again({tensors})
                        if result is not None:
                            return result{visible}
                    elif fits({tensors}):
                        return differentiable({args}, op, again, _REPLAYED, backend or context()){visible}
                return op.general(({args},), backend, None, its_key)
        return op.general(({args},), backend, out)
    return {name}
"""


class Operator:
    """One op. Calling it runs it, differentiably where an input requires a gradient.

    schema    arguments and results in torch.library's language, the tensors first; `backend` is added to it.
    family    the file in kernels/<backend>/ that has its kernels, and in kernels/reference/ its plain maths.
    check     (*args) raises torch's error types for bad arguments; returns a str, why only torch can serve them, or
              what `allocate` needs: by default the shape of the output.
    allocate  (plan, *args): the outputs, not yet written: what a kernel writes into, and what tracing sees.
    torch     torch's own implementation.
    save      (ctx, args, out) keeps what backward needs. Only where the op has a backward.
    backward  (ctx, *grads): a gradient or None for each argument, made of operators.
    autocast  "lower" (to autocast's dtype), "float32", "float32 on cuda" (whose list is the longer one), or None: as torch's own
              lists say.
    inspect   raises for bad values inside the tensors (a check that has to read them), before any kernel runs.
    explain   the same, for kernels that see bad values themselves: says what torch's own error, or plain maths', does not.
    extra     outputs after the visible ones exist for the backward only: computes it, or a tuple, where torch serves the others.
    visible   how many outputs are differentiable, and all that the caller sees if there are extra ones.
    public    (*args): the name that the caller knows, for errors; by default the op's own.
    """

    def __init__(
        self,
        schema: str,
        family: str,
        *,
        check: Callable[..., Any],
        torch: Callable[..., Any],
        allocate: Callable[..., Any] | None = None,
        save: Callable[..., None] | None = None,
        backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
        autocast: str | None = None,
        inspect: Callable[..., None] | None = None,
        explain: Callable[..., None] | None = None,
        extra: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
        visible: int = 1,
        public: Callable[..., str] | None = None,
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.family = family
        self.check = check
        self.allocate = allocate or _by_shape
        self.torch = torch
        self.save = save
        self.backward = backward
        self.autocast = autocast
        self.inspect = inspect
        self.explain = explain
        self.extra = extra
        self.visible = visible
        self.public = public
        self.overload = self._register(schema)
        self.arguments = [a.name for a in self.overload._schema.arguments if not a.kwarg_only]
        self.tensors = [  # (name, may be None): the leading arguments
            (a.name, "Optional" in str(a.type)) for a in self.overload._schema.arguments if "Tensor" in str(a.type)
        ]
        self._met: dict[Any, bool] = {}  # what calls on a GPU were like, and whether they were recorded, if they can be
        self._replays: dict[Any, list[backends.Replay]] = {}  # by what the call compares first
        self.call = self._write_call(allocate is None)

    def __call__(self, *args: Any, backend: str | None = None, out: Tensor | None = None) -> Any:
        """The result; written into `out` where a kernel can do so, else apart from it."""
        return self.call(*args, backend, out)

    def into(self, out: Tensor, *args: Any, backend: str | None = None) -> Tensor:
        """Write the result into `out`, which torch's rules for `out=` may resize. Never aliased to an argument."""
        if not isinstance(out, Tensor):
            raise TypeError(f"{self.name}(): argument 'out' must be Tensor, not {type(out).__name__}")
        if out.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{self.name}(): out is an inference tensor, which can be written in inference mode only")
        if is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (*args, out)):
            raise RuntimeError(
                f"{self.name}(): functions with out=... arguments don't support automatic differentiation, "
                "but one of the arguments requires grad."
            )
        result = self.call(*args, backend, out)
        if result is out:
            increment_version(out)  # autograd sees that what it may have saved is no longer there
            return out
        if result.dtype != out.dtype or result.device != out.device:
            raise RuntimeError(
                f"{self.name}(): out must have dtype {result.dtype} on {result.device}, got {out.dtype} on {out.device}"
            )
        return torch.mul(result, 1, out=out)  # resizes, and warns, by torch's own rule; a sum with 0 would lose the sign of -0

    def general(self, args: tuple[Any, ...], backend: str | None, out: Tensor | None = None, key: Any = None) -> Any:
        """A call in any circumstances. key: under which it may be remembered."""
        if is_dynamo_compiling():  # an opaque op in the graph, or torch's own
            if _are_functorch_transforms_active() or backend == "torch":
                return self.torch(*args)
            return self._visible(self.overload(*args, backend=backend))
        if _are_functorch_transforms_active() or forward_ad._current_level >= 0 or _get_tracing_state() is not None:
            return self._by_torch(args, backend, "torch.func, forward-mode AD and torch.jit need torch's own ops")
        for tensor, (argument, optional) in zip(args, self.tensors):
            kind = type(tensor)
            if kind in PLAIN or (tensor is None and optional):
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{self.name}(): argument '{argument}' must be Tensor, not {kind.__name__}")
            if kind.__module__.startswith("torch._subclasses"):  # a tracer's tensor
                return self._visible(self.overload(*args, backend=backend))
            return self._by_torch(args, backend, f"{kind.__name__} is a subclass of Tensor")
        if _len_torch_dispatch_stack():
            return self._visible(self.overload(*args, backend=backend))
        self._same_device(args)
        if self.autocast and _is_any_autocast_enabled():
            args, key = self._cast(args), None
        plan = self.check(*args)
        if type(plan) is str:
            return self._by_torch(args, backend, plan)
        differentiate = is_grad_enabled() and any(t is not None and t.requires_grad for t in args[: len(self.tensors)])
        if differentiate and self.backward is None:
            return self._by_reference(args, "the gradient of a gradient is plain maths")
        kernel = backends.select(self, args, backend)
        if kernel is None:
            return self._torch(args)
        call = key is not None and self._may_be_replayed(args, kernel, backend) and self._kind(key, args)
        if call and self._comes_again(call):
            each = {id(t): t for t in args[: len(self.tensors)] if t is not None}.values()
            alike = TensorGuards(*each, dynamic_dims_sizes=[], dynamic_dims_strides=[]).check
            kernel, plan = partial(self._recorded, call, alike, differentiate, kernel, plan), _REPLAYED
        if differentiate:
            return self._visible(_Differentiable.apply(*args, self, kernel, plan, backend or backends.context()))
        return self._visible(self._launch(kernel, plan, args, out))

    def _may_be_replayed(self, args: tuple[Any, ...], kernel: backends.Kernel, backend: str | None) -> bool:
        """Not the reference's maths, not what a seed makes new each time, nor where a rule that may be switched off has a say."""
        found, _, rule = backends.tables["gpu"].get(self.name) or (None, None, None)
        chosen = rule is None or backends.chosen(backend) == "gpu"
        return kernel is found and chosen and not ("seed" in self.arguments and args[self.arguments.index("seed")])

    def _kind(self, key: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All that a call has to share with another to be done again as that was: what it is looked up by, its tensors, the
        settings, modes."""
        tensors = [t for t in args[: len(self.tensors)] if t is not None]
        firsts = [next(n for n, other in enumerate(tensors) if other is t) for t in tensors]
        like = tuple(
            (t.stride(), t.dtype, t.data_ptr() & 15, t.requires_grad, t.is_inference(), t.get_device(), type(t), first)
            for t, first in zip(tensors, firsts, strict=True)
        )
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        return key, like, self._settings(args), modes

    def _comes_again(self, kind: tuple[Any, ...]) -> bool:
        """Whether a call of this kind is to be recorded: the second one, if it is not one of many that are looked up alike."""
        came_again = self._met.get(kind)
        if came_again is None and len(self._met) >= _MOST:  # sizes that never come again, say of a growing sequence
            self.forget()
        if came_again is None:
            self._met[kind] = False
        return came_again is False and len(self._replays.get(kind[0], ())) < _EACH

    def forget(self) -> None:
        """What is remembered of calls on a GPU"""
        self._met.clear()
        self._replays.clear()

    def _settings(self, args: tuple[Any, ...]) -> Any:
        """What kernels of products look at beside their arguments, which recurrent layers widen."""
        products = self.family in _PRODUCTS and (args[0].dtype is torch.float32 or self.family == "rnn")
        return backends.settings() if products else None

    def _recorded(self, kind: tuple[Any, ...], alike: Callable[..., bool], differentiate: bool, kernel: backends.Kernel,
                  plan: Any, *args: Any) -> Any:  # fmt: skip
        """The result of a call that is remembered from now on."""
        result, found = backends.record_call(
            lambda *own: self._launch(kernel, plan, own), args, len(self.tensors), alike, kind[2], differentiate
        )
        self._met[kind] = True
        if found is not None:
            self._replays.setdefault(kind[0], []).append(found)
        return result

    def _same_device(self, args: tuple[Any, ...]) -> None:
        """Torch lets some tensors of other devices through to memory that is not theirs. Single numbers may come from the CPU."""
        first, device = self.tensors[0][0], args[0].device
        for tensor, (argument, _) in zip(args, self.tensors):
            if tensor is not None and tensor.device != device and tensor.dim() and argument not in _ON_CPU:
                raise RuntimeError(f"{self.name}(): {argument} must be on {first}'s device, {device}, got {tensor.device}")

    def fake(self, *args: Any, backend: str | None = None) -> Any:
        """The outputs' shapes, dtypes and strides: what tracing computes with."""
        plan = self.check(*args)
        return self._all_by_torch(args) if type(plan) is str else self.allocate(plan, *args)

    def execute(self, *args: Any, backend: str | None = None) -> Any:
        """The op below autograd, for the dispatcher: outputs have the strides that `fake` promised."""
        plan = self.check(*args)
        if type(plan) is str:
            backends.torch_serves(self, args, backend, plan)
            return self._all_by_torch(args)
        kernel = backends.select(self, args, backend)
        if kernel is not None:
            return self._launch(kernel, plan, args)
        promised, result = self.allocate(plan, *args), self._all_by_torch(args)
        if isinstance(result, tuple):
            return tuple(_with_strides_of(p, r, args) for p, r in zip(promised, result, strict=True))
        return _with_strides_of(promised, result, args)

    def differentiable(self, *args: Any, backend: str | None = None) -> Any:
        """The op with autograd, for the dispatcher."""
        if type(self.check(*args)) is str:
            return self._all_by_torch(args)
        if is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            if self.backward is None:
                return backends.reference(self)(*args)
            return _Differentiable.apply(*args, self, None, None, backend)
        with _AutoDispatchBelowAutograd():
            return self.overload(*args, backend=backend)

    def autocasting(self, *args: Any, backend: str | None = None) -> Any:
        """The op under autocast, for the dispatcher."""
        args = self._cast(args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return self.overload(*args, backend=backend)

    def _launch(self, kernel: Callable[..., Any], plan: Any, args: tuple[Any, ...], out: Tensor | None = None) -> Any:
        if plan is _REPLAYED:
            return kernel(*args)
        if self.inspect is not None:
            self.inspect(*args)
        result = self.allocate(plan, *args)
        if out is not None and _may_be_written(out, result, args):
            result = out
        way = kernel(result, *args)
        if way is not None and backends.traces:
            backends.took(way)
        return result

    def _visible(self, out: Any) -> Any:
        return out if self.extra is None else out[0] if self.visible == 1 else out[: self.visible]

    def _torch(self, args: tuple[Any, ...]) -> Any:
        try:
            return self.torch(*args)
        except IndexError as error:
            return self.refuse(args, error)

    def refuse(self, args: tuple[Any, ...], error: Exception) -> NoReturn:
        """Raise what torch raised, or an error that says more about the same."""
        self.check(*args)
        if self.explain is not None:
            self.explain(*args)
        raise error

    def _all_by_torch(self, args: tuple[Any, ...]) -> Any:
        if self.extra is None:
            return self._torch(args)
        seen = self._torch(args)
        more = self.extra(*args)
        return (*(seen if self.visible > 1 else (seen,)), *(more if isinstance(more, tuple) else (more,)))

    def _by_torch(self, args: tuple[Any, ...], backend: str | None, reason: str) -> Any:
        if backends.chosen(backend) == "reference":
            return self._by_reference(args, reason)
        backends.torch_serves(self, args, backend, reason)
        return self._torch(args)

    def _by_reference(self, args: tuple[Any, ...], reason: str) -> Any:
        backends.record_reference(self, args, reason)
        return self._visible(backends.reference(self)(*args))

    def _cast(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What autocast does to the arguments of torch's op of this kind."""
        dtypes = {
            device: torch.get_autocast_dtype(device) if self.autocast == "lower" else torch.float32
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device) and (device == "cuda" or self.autocast != "float32 on cuda")
        }
        return tuple(
            a.to(dtypes[a.device.type])
            if isinstance(a, Tensor) and a.device.type in dtypes and a.dtype in FLOATING and a.dtype != torch.float64
            else a
            for a in args
        )

    def _register(self, schema: str) -> Any:
        """Make the op known to torch's dispatcher, for everything that traces."""
        _library.define(schema.replace(")", ", *, str? backend=None)", 1), tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self.execute, "CompositeExplicitAutograd")
        _library.impl(self.name, self.differentiable, "Autograd")
        if self.autocast:
            for key in ("AutocastCPU", "AutocastCUDA"):
                _library.impl(self.name, self.autocasting, key)
        torch.library.register_fake(f"fastnn::{self.name}", self.fake, lib=_library)
        return getattr(torch.ops.fastnn, self.name).default

    def _write_call(self, by_shape: bool) -> Callable[..., Any]:
        """The function of `_CALL` for this op."""
        args, tensors = ", ".join(self.arguments), self.tensors

        def each(condition: str, absent: str, join: str) -> str:
            return join.join(
                f"({name} is None or {condition.format(name)})" if optional and absent == "True"
                else f"({name} is not None and {condition.format(name)})" if optional
                else condition.format(name)
                for name, optional in tensors
            )  # fmt: skip

        seen = "" if self.extra is None else "[0]" if self.visible == 1 else f"[:{self.visible}]"
        source = _CALL.format(
            name=self.name,
            args=args,
            tensors=", ".join(name for name, _ in tensors),
            or_autocast="or _is_any_autocast_enabled()" if self.autocast else "",
            all_plain=each("type({}) in PLAIN", "True", " and "),
            all_on_cpu=each("{}.is_cpu", "True", " and "),
            none_negated=each("not {}.is_neg()", "True", " and "),
            any_requires_grad=each("{}.requires_grad", "False", " or "),
            differentiable=f"differentiable({args}, op, kernel, plan, None){seen}"
            if self.backward
            else f"op.general(({args},), backend, out)",
            first=tensors[0][0],
            key=", ".join(self._in_key(argument) for argument in self.overload._schema.arguments if not argument.kwarg_only),
            inspect=f"inspect({args})" if self.inspect else "",
            allocate=f"empty_matrix(plan, (plan[1] or 1, 1), {tensors[0][0]}.dtype) if len(plan) == 2 else "
            f"allocate(plan, {args})"
            if by_shape
            else f"allocate(plan, {args})",
            visible=seen,
        )
        filename = f"<fastnn operator {self.name}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        namespace: dict[str, Any] = {}
        exec(compile(source, filename, "exec"), globals(), namespace)
        return namespace["make"](
            op=self,
            mode_is_on=_is_torch_function_mode_enabled,
            by_torch=self.torch,
            check=self.check,
            allocate=self.allocate,
            inspect=self.inspect,
            differentiable=_Differentiable.apply,
            context=backends.context,
            traces=backends.traces,
            table=backends.tables["cpu"],
            load=backends.load,
            dense=backends.dense,
            may_be_written=_may_be_written,
            replays=self._replays,
        )

    @staticmethod
    def _in_key(argument: Any) -> str:
        """What of an argument a call is looked up by."""
        name, kind = argument.name, str(argument.type)
        plain = f"{name}.shape" if "Tensor" in kind else f"tuple({name})" if "List" in kind else name
        return f"None if {name} is None else {plain}" if "Optional" in kind and plain != name else plain


def asks_directly(t: Tensor) -> bool:
    """Whether memory like this tensor's may be had by `empty_matrix`, without the dispatcher."""
    return type(t) in PLAIN and t.is_cpu and not _get_deterministic_algorithms() and not _len_torch_dispatch_stack()


def usual(tensors: Iterable[Any]) -> bool:
    """Whether nothing but a kernel has a say in a call with these tensors: no tracer, transform, mode, autocast or subclass."""
    return (
        not is_dynamo_compiling()
        and all(type(t) in PLAIN and t.is_cpu and backends.dense(t) for t in tensors)
        and not _len_torch_dispatch_stack()
        and _get_tracing_state() is None
        and not _are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not _is_any_autocast_enabled()
    )


def _by_shape(shape: Any, first: Tensor, *rest: Any) -> Tensor:
    return first.new_empty(*shape) if shape else first.new_empty(())


def _may_be_written(out: Tensor, expected: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether a kernel can write into the caller's `out`: laid out as expected, and no argument's memory."""
    return (
        type(out) in PLAIN
        and out.dtype == expected.dtype
        and out.device == expected.device
        and out.shape == expected.shape
        and out.stride() == expected.stride()
        and backends.dense(out)
        and all(not isinstance(a, Tensor) or a.untyped_storage()._cdata != out.untyped_storage()._cdata for a in args)
    )


def _with_strides_of(promised: Tensor, result: Tensor, args: tuple[Any, ...]) -> Tensor:
    """An op's result must have the strides that its fake had, and may be no argument's alias."""
    if result.stride() == promised.stride() and not any(result is a for a in args):
        return result
    return promised.copy_(result)


class _Differentiable(torch.autograd.Function):
    """Any operator with a backward. One old-style forward: a separate setup_context costs 12 µs a call."""

    @staticmethod
    def forward(ctx: Any, *packed: Any) -> Any:
        *args, op, kernel, plan, backend = packed
        if kernel is not None:
            out = op._launch(kernel, plan, tuple(args))
        else:  # the dispatcher's route: the op below autograd chooses the kernel
            with _AutoDispatchBelowAutograd():
                out = op.overload(*args, backend=backend)
        ctx.op, ctx.backend = op, backend
        op.save(ctx, args, out)
        if isinstance(out, tuple):
            ctx.mark_non_differentiable(*out[op.visible :])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (*ctx.op.backward(ctx, *grads[: ctx.op.visible]), None, None, None, None)
