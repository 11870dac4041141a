"""CPU kernels between unreadable pages: one read or write past either end of an argument or a result is a crash.

``Placed`` puts a tensor there. Run as a program (``python guard.py FAMILY FIRST DTYPE…``) it takes every kernel of a family
through its cases and prints one line before and one after each, so that whoever started it knows which case a crash was.
"""

import ctypes
import faulthandler
import importlib
import itertools
import mmap
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE


def extent(t: Tensor) -> int:
    """Elements from the first to the last that a tensor reaches, gaps included."""
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


def distinct(t: Tensor) -> Tensor:
    """Without the repetitions of expanded dimensions: what can be written."""
    return t[tuple(slice(0, 1 if s == 0 else n) for n, s in zip(t.shape, t.stride(), strict=True))]


class Placed:
    """A copy of a tensor, strides and all, whose first ("front") or last ("back") byte touches an unreadable page.

    All memory around the elements is 0xFF, which is NaN in every floating dtype.
    """

    def __init__(self, source: Tensor, end: str) -> None:
        size = extent(source) * source.itemsize
        room = max(PAGE, -(-size // PAGE) * PAGE)
        memory = mmap.mmap(-1, room + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (start, start + PAGE + room):
            if _libc.mprotect(page, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.readable = torch.frombuffer(memory, dtype=torch.uint8, offset=PAGE, count=room)  # keeps the mapping alive
        self.readable.fill_(0xFF)
        self.shape, self.stride, self.dtype = source.shape, source.stride(), source.dtype
        self.first = 0 if end == "front" else (room - size) // source.itemsize
        self.tensor = self._elements(self.readable)
        distinct(self.tensor).copy_(distinct(source))
        self.before = self.readable.clone()

    def _elements(self, memory: Tensor) -> Tensor:
        return memory.view(self.dtype).as_strided(self.shape, self.stride, self.first)

    def poison(self) -> None:
        """Forget the values: an output that has not been written."""
        self.readable.fill_(0xFF)
        self.before.fill_(0xFF)

    def changed(self) -> bool:
        return not torch.equal(self.readable, self.before)

    def changed_outside(self) -> bool:
        """Whether anything but the tensor's own elements has changed."""
        now, before = self.readable.clone(), self.before.clone()
        for memory in (now, before):
            distinct(self._elements(memory)).zero_()
        return not torch.equal(now, before)


class Case(NamedTuple):
    op: str
    args: tuple[Any, ...]
    calls: int = 1  # a weight is packed for keeps at the second call

    def __str__(self) -> str:
        return f"{self.op}({', '.join(f'{tuple(a.shape)}{a.stride()}' if isinstance(a, Tensor) else repr(a) for a in self.args)})"


# Layouts: the same shape with other strides.


def plain(t: Tensor) -> Tensor:
    return t.contiguous()


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t


def stepped(t: Tensor) -> Tensor:
    return t.new_empty(*t.shape[:-1], 2 * t.shape[-1] + 1)[..., 1::2].copy_(t)


LAYOUTS = (plain, transposed, stepped)
PAIRS = ((plain, plain), (plain, transposed), (transposed, plain), (stepped, transposed), (plain, stepped))


def matmul_cases(random: Callable[..., Tensor]) -> Iterator[Case]:
    sizes = [
        (1, 1, 1),
        (1, 33, 17),
        (1, 300, 5),
        (2, 31, 65),
        (3, 7, 129),
        (5, 64, 1),
        (67, 19, 1),
        (7, 2, 3),
        (8, 16, 48),
        (9, 17, 49),
        (13, 33, 97),
        (66, 5, 7),
        (6, 4099, 11),
        (70, 521, 391),
        (4, 0, 3),
    ]
    for (m, k, n), left, right in itertools.product(sizes, LAYOUTS, LAYOUTS):
        yield Case("matmul", (left(random(m, k)), right(random(k, n))))
    for left, right in itertools.product(LAYOUTS, LAYOUTS):
        yield Case("matmul", (left(random(3, 5, 9)), right(random(3, 9, 17))))
        yield Case("matmul", (left(random(2, 1, 6, 5)), right(random(1, 3, 5, 18))))
        yield Case("matmul", (left(random(2, 6, 5)), right(random(5, 33))))
        yield Case("matmul", (left(random(6, 5)), right(random(2, 5, 33))))
        yield Case("matmul", (left(random(19)), right(random(19, 33))))
        yield Case("matmul", (left(random(33, 19)), right(random(19))))
        yield Case("matmul", (left(random(37)), right(random(37))))
    for m, k, n in [(1, 65, 65), (3, 129, 67), (9, 71, 67), (17, 65, 99), (33, 130, 49)]:
        for bias, residual, activation in itertools.product((False, True), (None, *LAYOUTS), (None, "relu", "gelu")):
            yield Case(
                "linear",
                (
                    random(m, k),
                    random(n, k),
                    random(n) if bias else None,
                    residual(random(m, n)) if residual else None,
                    activation,
                ),
                3,
            )
    for left, right, added in itertools.product(LAYOUTS, LAYOUTS, LAYOUTS):
        yield Case("addmm", (added(random(9, 50)), left(random(9, 17)), right(random(17, 50)), 0.5, 2.0))
        yield Case("addmm", (added(random(1, 50)).expand(9, 50), left(random(9, 17)), right(random(17, 50)), 0.5, 2.0))
        yield Case("addmm", (added(random(2, 5, 18)), left(random(2, 5, 7)), right(random(2, 7, 18)), 1.0, -1.0))


SHAPES = [(1,), (15,), (16,), (17,), (64,), (67,), (3, 33), (5, 7, 9), (2, 3, 4, 5), (129, 67)]


def activation_cases(random: Callable[..., Tensor]) -> Iterator[Case]:
    from fastnn.kernels.cpu.engine.activation_codes import PARAMETERS

    numbers = {"leaky_relu": [0.1], "elu": [1.5], "hardtanh": [-0.5, 0.7], "softplus": [2.0, 3.0]}
    for shape, name, (layout, other) in itertools.product(SHAPES, PARAMETERS, PAIRS):
        yield Case("activation", (layout(random(*shape)), name, numbers.get(name, [])))
        yield Case("activation_backward", (other(random(*shape)), layout(random(*shape)), name, numbers.get(name, [])))
    for shape, (layout, other) in itertools.product(SHAPES, PAIRS):
        for channels in {1, shape[1] if len(shape) > 1 else 1}:
            yield Case("prelu", (layout(random(*shape)), random(channels)))
            yield Case("prelu_backward", (other(random(*shape)), layout(random(*shape)), random(channels)))
        yield Case("dropout", (layout(random(*shape)), 0.3, 17))
        for dim in range(len(shape)):
            double = [n * (1 + (d == dim)) for d, n in enumerate(shape)]
            yield Case("glu", (layout(random(*double)), dim))
            yield Case("glu_backward", (other(random(*shape)), layout(random(*double)), dim))


def softmax_cases(random: Callable[..., Tensor]) -> Iterator[Case]:
    for shape, (layout, other) in itertools.product(SHAPES, PAIRS):
        x, g = random(*shape), random(*shape)
        for dim in range(len(shape)):
            yield Case("softmax", (layout(x), dim))
            yield Case("log_softmax", (layout(x), dim))
            yield Case("softmax_backward", (other(g), layout(x.softmax(dim)), dim))
            yield Case("log_softmax_backward", (other(g), layout(x.log_softmax(dim)), dim))
        for reduction in ("none", "mean", "sum"):
            yield Case("mse_loss", (layout(x), other(g), reduction))
            grad = random(*shape) if reduction == "none" else random()
            yield Case("mse_loss_backward", (grad, layout(x), other(g), reduction))
    for shape, layout in itertools.product([(1,), (17,), (1, 1), (3, 5), (9, 67), (2, 33, 7), (2, 5, 3, 3)], LAYOUTS):
        x = random(*shape)
        classes = shape[min(1, len(shape) - 1)]
        target = (random(*shape).abs() * 1e4).long().select(min(1, len(shape) - 1), 0) % classes
        weights = random(classes).abs()
        for reduction, weight in itertools.product(("none", "mean", "sum"), (None, weights)):
            grad = random(*target.shape) if reduction == "none" else random()
            soft = random(*shape).softmax(min(1, len(shape) - 1))
            top = x.double().amax(min(1, len(shape) - 1), keepdim=True)
            lse = torch.stack([top.squeeze(min(1, len(shape) - 1)), (x.double() - top).logsumexp(min(1, len(shape) - 1))])
            for wanted, ignored, smoothing in ((target, -100, 0.0), (target, 0 if classes > 1 else -100, 0.1), (soft, -100, 0.1)):
                args = (layout(x), wanted, weight)
                yield Case("cross_entropy", (*args, ignored, reduction, smoothing))
                yield Case("cross_entropy_backward", (grad, *args, lse, ignored, reduction, smoothing))
            if len(shape) > 1:
                yield Case("nll_loss", (layout(x), target, weight, -100, reduction))
                yield Case("nll_loss_backward", (grad, layout(x), target, weight, -100, reduction))
    yield from linear_loss_cases(random)


def linear_loss_cases(random: Callable[..., Tensor]) -> Iterator[Case]:
    sizes = [(1, 1, 1), (3, 17, 5), (70, 33, 67)]
    for (rows, features, classes), layout, biased in itertools.product(sizes, LAYOUTS, (False, True)):
        x, w = layout(random(rows, features)), layout(0.2 * random(classes, features))
        target = (random(rows).abs() * 1e4).long() % classes
        bias, weight = (random(classes), random(classes).abs()) if biased else (None, None)
        for reduction in ("none", "mean", "sum"):
            args = (x, w, bias, target, weight, -100, reduction, 0.1 if biased else 0.0)
            yield Case("linear_cross_entropy", (*args, False))
            yield Case("linear_cross_entropy", (*args, reduction != "none"))
            yield Case("linear_cross_entropy_backward", (random(rows) if reduction == "none" else random(), *args))


def rnn_cases(random: Callable[..., Tensor]) -> Iterator[Case]:
    gates = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
    lengths = [torch.tensor(sizes) for sizes in ([3, 3, 1], [2], [4, 3, 2, 1])]
    for (mode, count), units, reverse, layout in itertools.product(gates.items(), (1, 7, 8, 33), (False, True), LAYOUTS):
        for sizes, projection in ((None, 0), (lengths[units % 3], 0), *([(None, 5)] if mode == "lstm" else [])):
            out, batch, wide = projection or units, 3 if sizes is None else int(sizes[0]), count * units
            rows = 2 * batch if sizes is None else int(sizes.sum())
            weights = [0.1 * random(*shape) for shape in ((wide, 5), (wide, out), (wide,), (wide,))]
            projector = 0.1 * random(projection, units) if projection else None
            args = (layout(random(rows, 5)), layout(random(batch, out)), layout(random(batch, units)) if mode == "lstm" else None,
                    *(layout(w) for w in weights), projector, sizes, mode, reverse)  # fmt: skip
            yield Case("recurrent", (*args, True))
            yield Case("recurrent", (*args, False), 3)
            *_, reserve = out_ = torch.ops.fastnn.recurrent(*args, True, backend="reference")
            grads = [layout(random(*t.shape)) for t in out_[:3]]
            needs = [isinstance(t, Tensor) for t in args[:8]]
            yield Case("scan", (layout(random(rows, 3, units)), random(rows, 3, units), layout(random(3, units)), reverse))
            yield Case("recurrent_backward", (*grads, *args[:8], out_[0], reserve, *args[8:], needs))


def last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def pool_cases(random: Callable[..., Tensor]) -> Iterator[Case]:
    shapes = [(2, 3, 17), (1, 2, 131), (2, 3, 7, 9), (1, 19, 6, 5), (1, 2, 4, 75), (1, 3, 5, 6, 19)]
    windows = [(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 1, 1), (3, 3, 1, 1), (2, 1, 0, 2), (4, 5, 2, 1)]
    for shape, (layout, other) in itertools.product(shapes, ((plain, plain), (last, last), (stepped, transposed))):
        dims = len(shape) - 2
        x = layout(random(*shape))
        calls: list[Any] = [(False, *([v] * dims for v in window)) for window in windows]
        adaptive: bool
        size: list[int]
        stride: list[int]
        padding: list[int]
        dilation: list[int]
        for adaptive, size, stride, padding, dilation in [*calls, *((True, [o] * dims, [], [], []) for o in (1, 2, 5))]:
            if any(n + 2 * p < d * (k - 1) + 1 for n, k, p, d in zip(shape[2:], size, padding, dilation)):
                continue
            window = (adaptive, size, stride, padding, dilation, False)
            y, codes = torch.ops.fastnn.max_pool(x, *window, True, backend="torch")
            grad = other(random(*y.shape))
            yield Case("max_pool", (x, *window, False))
            yield Case("max_pool", (x, *window, True))
            yield Case("max_pool_with_indices", (x, *window))
            yield Case("max_pool_backward", (grad, codes, x, *window))
            if adaptive or (size[0] <= stride[0] and dilation[0] == 1):  # else an index may be there twice
                largest, places = torch.ops.fastnn.max_pool_with_indices(x, *window, backend="torch")
                yield Case("max_unpool", (other(largest), other(places), list(shape[2:])))
                yield Case("max_unpool_backward", (x, other(places), list(shape[2:])))
            if not dilation or dilation[0] == 1:
                if x.itemsize == 2 and dims == 3 and not adaptive:
                    continue  # torch has none
                average = (adaptive, size, stride, padding, False, False, 0)
                yield Case("avg_pool", (x, *average))
                yield Case("avg_pool_backward", (grad, x, *average))


def norm_cases(random: Callable[..., Tensor]) -> Iterator[Case]:
    shapes = [(5, 3), (70, 33), (3, 4, 17), (2, 6, 5, 7), (1, 34, 3, 11), (2, 4, 2, 3, 4)]
    layouts = ((plain, plain), (last, last), (stepped, transposed))
    for shape, (layout, other), affine in itertools.product(shapes, layouts, (0, 1)):
        x, grad, c = layout(random(*shape)), other(random(*shape)), shape[1]
        weight, bias = (random(c), random(c)) if affine else (None, None)
        mean, var = random(c), random(c).abs() + 0.5
        for given in ((None, None), (mean, var)):
            yield Case("batch_norm", (x, weight, bias, *given, 1e-5))
            moments = torch.ops.fastnn.batch_norm(x, weight, bias, *given, 1e-5, backend="torch")[1]
            yield Case("batch_norm_backward", (grad, x, weight, moments, given[0] is None, 1e-5))
        for groups in {1, c // 2 if c % 2 == 0 else c}:
            if x.numel() > shape[0] * groups:
                yield Case("group_norm", (x, weight, bias, groups, 1e-5))
                moments = torch.ops.fastnn.group_norm(x, weight, bias, groups, 1e-5, backend="torch")[1]
                yield Case("group_norm_backward", (grad, x, weight, moments, groups, 1e-5))


    rows = [(1, 1), (5, 3), (3, 40), (2, 3, 33), (33, 67), (2, 2100)]
    for shape, layout, affine, name in itertools.product(rows, LAYOUTS, (0, 1), ("layer_norm", "rms_norm")):
        n = shape[-1]
        weight, bias = (random(n), random(n)) if affine else (None, None)
        x, r = layout(random(*shape)), layout(random(*shape))
        yield Case(name, (x, weight, bias, [n], 1e-5))
        yield Case(f"add_{name}", (x, plain(r), weight, bias, [n], 1e-5))
        stats = getattr(torch.ops.fastnn, name)(x, None, None, [n], 1e-5, backend="torch")[1]
        for more in (None, layout(random(*shape))):
            yield Case(f"{name}_backward", (r, x, weight, stats, more, [n], 1e-5))


def embedding_cases(random: Callable[..., Tensor]) -> Iterator[Case]:
    sizes, kinds = (1, 2, 7, 8, 33, 67, 131), (torch.int64, torch.int32)
    for size, n, layout, kind in itertools.product(sizes, (1, 5, 70), LAYOUTS[::2], kinds):
        table = random(11, 2 * size)[:, :size] if layout is stepped else random(11, size)
        indices = (random(n).abs() * 1e4).to(kind) % 11
        yield Case("embedding", (table, indices, -1, False))
        yield Case("embedding_backward", (layout(random(n, size)), indices, 11, 3, n == 5))


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 3 else t


def conv_cases(random: Callable[..., Tensor]) -> Iterator[Case]:
    """(input, weight, stride, padding, dilation, transposed, output_padding, groups)"""
    problems: list[tuple[Any, ...]] = [
        ((2, 3, 9, 7), (5, 3, 3, 3), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        ((1, 3, 11, 37), (9, 3, 3, 2), [2, 3], [1, 0], [1, 2], False, [0, 0], 1),
        ((2, 17, 5, 5), (26, 17, 1, 1), [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        ((2, 4, 5, 9), (6, 2, 3, 3), [2, 2], [2, 2], [1, 1], False, [0, 0], 2),
        ((1, 130, 3, 9), (5, 130, 3, 3), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        ((2, 11, 7, 43), (11, 1, 3, 5), [1, 2], [1, 2], [1, 1], False, [0, 0], 11),
        ((1, 3, 5, 9), (6, 1, 3, 3), [1, 1], [1, 1], [2, 1], False, [0, 0], 3),
        ((2, 3, 50), (7, 3, 6), [3], [4], [1], False, [0], 1),
        ((1, 2, 3, 4, 5), (3, 2, 2, 3, 3), [1, 2, 1], [1, 1, 1], [1, 1, 1], False, [0, 0, 0], 1),
        ((1, 19, 9, 7), (5, 19, 1, 1), [2, 2], [0, 0], [1, 1], False, [0, 0], 1),
        ((2, 3, 4, 5), (3, 5, 3, 4), [2, 3], [1, 0], [1, 1], True, [1, 2], 1),
        ((2, 9, 4, 5), (9, 1, 3, 3), [2, 2], [1, 1], [1, 1], True, [1, 1], 9),
        ((2, 3, 7, 13), (3, 1, 3, 3), [1, 1], [1, 1], [1, 1], False, [0, 0], 3),
        ((1, 2, 9, 35), (2, 1, 5, 5), [2, 2], [2, 2], [1, 1], False, [0, 0], 2),
        ((2, 3, 7, 7), (3, 1, 3, 3), [1, 1], [1, 1], [1, 1], True, [0, 0], 3),
        ((17, 3, 9), (16, 3, 33), [2], [16], [1], False, [0], 1),
    ]
    for (x, w, *options), (layout, other) in itertools.product(
        problems, [(plain, plain), (channels_last, channels_last), (stepped, transposed)]
    ):
        input, weight = layout(random(*x)), other(random(*w))
        out = torch.convolution(input, weight, None, *options)
        for more, activation in ((False, None), (True, "silu")):
            bias, residual = (random(out.shape[1]), random(*out.shape)) if more else (None, None)
            yield Case("conv", (input, weight, bias, residual, *options, activation), 3)
        stride, padding, dilation, transposed_, _, groups = options
        grad = other(random(*out.shape))
        pair = (input, grad) if transposed_ else (grad, input)
        yield Case("conv_weight", (*pair, list(w[2:]), stride, padding, dilation, groups))


def attention_cases(random: Callable[..., Tensor]) -> Iterator[Case]:
    """(query, key, value, mask, slopes, offsets) and (dropout, seed, scale, left, right, bottom_right, prefix, softcap)"""
    plain_ = (0.0, 0, 0.4, -1, -1, False, 0, 0.0)
    shapes = [(2, 3, 3, 1, 37, 8, 8), (1, 4, 2, 2, 150, 5, 9), (1, 2, 1, 13, 29, 17, 3), (2, 1, 1, 53, 70, 16, 33),
              (1, 2, 2, 7, 1, 1, 1)]  # fmt: skip
    for (b, h, hk, lq, lk, d, dv), (layout, other) in itertools.product(shapes, PAIRS):
        q, k = layout(random(b, h, lq, d)), other(random(b, hk, lk, d))
        v, grad = layout(random(b, hk, lk, dv)), other(random(b, h, lq, dv))
        masks = [None, layout(random(lq, lk)), other(random(b, 1, 1, lk)), random(h, lq, 1), layout(random(b, 1, lq, lk)) > -1]
        for n, mask in enumerate(masks):
            options = [plain_, (0.3, 9, 0.4, -1, -1, False, 0, 0.0), (0.0, 0, 0.4, 11, 5, True, 2, 3.0)][n % 3]
            slopes = random(h).abs() if n == 2 else None
            args = (q, k, v, mask, slopes, None, None, *options)
            yield Case("attention_lse", args)
            out, stats = torch.ops.fastnn.attention(*args, backend="reference")
            needs = mask is not None and mask.is_floating_point()
            yield Case("attention_backward", (grad, *args[:7], out, stats, None, needs, *options))
    offsets = torch.tensor([0, 5, 5, 13]), torch.tensor([0, 9, 12, 29])
    yield Case("attention", (random(2, 13, 8), random(2, 29, 8), random(2, 29, 8), None, None, *offsets, *plain_))


CASES = {
    "attention": attention_cases,
    "matmul": matmul_cases,
    "activation": activation_cases,
    "softmax": softmax_cases,
    "conv": conv_cases,
    "pool": pool_cases,
    "norm": norm_cases,
    "rnn": rnn_cases,
    "embedding": embedding_cases,
}


def cases(family: str, dtype: torch.dtype) -> Iterator[tuple[torch.dtype, Case]]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return ((dtype, case) for case in CASES[family](random))


def run(family: str, first: int, dtypes: list[torch.dtype]) -> None:
    """The cases from number ``first`` on, each between pages at both ends: all of the first dtype, and a third of them, each time
    another one, of the others, which run the same code."""
    kernels = importlib.import_module(f"fastnn.kernels.cpu.{family}")
    importlib.import_module(f"fastnn.ops.{family}")
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    thirds = (itertools.islice(cases(family, dtype), k, None, 3) for k, dtype in enumerate(dtypes[1:]))
    all_cases = itertools.chain(cases(family, dtypes[0]), *thirds)
    for number, (dtype, case) in enumerate(all_cases):
        coarse = 0.1 if family == "norm" else 0.05  # torch sums a norm's gradients in 16 bits
        tolerance = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: coarse, torch.float16: 0.01}[dtype]
        if number < first:
            continue
        print("case", number, dtype, case, flush=True)
        by_torch = getattr(torch.ops.fastnn, case.op)(*case.args, backend="torch")
        wanted = by_torch if isinstance(by_torch, tuple) else (by_torch,)
        for end in ("front", "back"):
            placed = [Placed(a, end) if isinstance(a, Tensor) else a for a in case.args]
            outs = [Placed(w, end) for w in wanted]
            results = [o.tensor for o in outs]
            for _ in range(case.calls):
                for o in outs:
                    o.poison()
                args = [p.tensor if isinstance(p, Placed) else p for p in placed]
                kernels.KERNELS[case.op](tuple(results) if isinstance(by_torch, tuple) else results[0], *args)
                for result, want in zip(results, wanted, strict=True):
                    if case.op != "dropout" and not torch.allclose(result.double(), want.double(), tolerance, tolerance, True):
                        print("wrong", number, "result", end, flush=True)
                    if case.op == "dropout" and result.isnan().any():
                        print("wrong", number, "unwritten", end, flush=True)
            if any(o.changed_outside() for o in outs):
                print("wrong", number, "wrote outside the output", end, flush=True)
            if any(p.changed() for p in placed if isinstance(p, Placed)):
                print("wrong", number, "wrote into an argument", end, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    run(sys.argv[1], int(sys.argv[2]), [getattr(torch, name) for name in sys.argv[3:]])
