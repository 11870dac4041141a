"""fuse: the same results from fewer steps, whatever a model calls its layers; what it leaves alone, and what it says."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn
from rule import randn


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with running statistics and parameters that make a difference."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, low, high in (("running_mean", -1, 1), ("running_var", 0.5, 2), ("weight", -1.5, 1.5), ("bias", -1, 1)):
                if (t := getattr(module, name)) is not None:
                    t.data.uniform_(low, high, generator=generator)
    return model.eval()


class Residual(nn.Module):
    """ResNet's block, with a projection where the sizes differ"""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.na = nn.BatchNorm2d(outputs)
        self.b = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.nb = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.way: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.way = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(self.relu(self.na(self.a(x)))))
        y += self.way(x)
        return self.relu(y)


class Inverted(nn.Module):
    """MobileNet's block"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 3 * channels
        self.steps = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.steps(x)


def steps(model: nn.Module, *inputs: Any) -> list[str]:
    with torch.no_grad(), fastnn.trace() as calls:
        model(*inputs)
    return [call.op for call in calls]


def check(model: nn.Module, *inputs: Any, fused: list[str], left: list[str] | tuple[str, ...] = ()) -> nn.Module:
    """The copy's results beside the model's own, by the error rule; what was fused, and what was left, as the report has it."""
    before = copy.deepcopy(model.state_dict())
    other, report = fastnn.fuse(model)
    assert [f"{e.name}: {e.reason.removeprefix('with ')}" for e in report.fused] == fused
    assert [f"{e.name}: {e.reason}" for e in report.left] == list(left)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        theirs = model(*inputs).double() - truth
        ours = other(*inputs).double() - truth
    assert ours.abs().max() <= 2 * theirs.abs().max() + 4 * torch.finfo(inputs[0].dtype).eps * truth.abs().max()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model itself was changed"
    return other


def test_residual_blocks() -> None:
    model = settled(nn.Sequential(Residual(5, 7, 2), Residual(7, 7)))
    x = randn(2, 5, 13, 11)
    other = check(model, x, fused=[
        "0.a: BatchNorm2d, relu", "0.b: BatchNorm2d, residual, relu", "0.way.0: BatchNorm2d",
        "1.a: BatchNorm2d, relu", "1.b: BatchNorm2d, residual, relu",
    ])  # fmt: skip
    fastnn.replace(other)
    assert steps(other, x) == ["conv"] * 5
    assert "activation='relu'" in repr(other)
    assert not any("running_mean" in name for name in other.state_dict())


def test_an_inverted_residual_with_relu6() -> None:
    model = settled(nn.Sequential(Inverted(6), Inverted(6)))
    names = [f"{i}.steps.{n}: BatchNorm2d, {what}" for i in (0, 1) for n, what in ((0, "relu6"), (3, "relu6"), (6, "residual"))]
    other = check(model, randn(3, 6, 9, 10) * 4, fused=names)
    assert steps(other, randn(3, 6, 9, 10)) == ["conv"] * 6
    for again in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        torch.testing.assert_close(again(x := randn(1, 6, 8, 8)), other(x))


class Every(nn.Module):
    """Each way to write an activation, after each kind of layer"""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular")
        self.up = nn.ConvTranspose1d(4, 6, 3, 2, groups=2)
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.line = nn.Linear(6, 5, bias=False)
        self.flat = nn.BatchNorm1d(5)
        self.two, self.three, self.four, self.five = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.one(x), approximate="tanh").relu_()
        y = torch.sigmoid(self.norm(self.up(y))).mean(2)
        y = self.flat(self.line(y)).tanh()
        y = F.silu(torch.add(y, self.two(y)), inplace=True)
        return F.hardswish(self.five(F.mish(self.three(y) + self.four(y))) * 2)


def test_every_way_to_write_it() -> None:
    check(settled(Every()), randn(3, 3, 11), fused=[
        "one: gelu_tanh", "up: BatchNorm1d, sigmoid", "line: BatchNorm1d, tanh", "two: residual, silu", "four: residual, mish",
    ])  # fmt: skip


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_folding_in_every_rank(dims: int, transposed: bool) -> None:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    model = settled(nn.Sequential(kind(4, 6, 3, groups=2), getattr(nn, f"BatchNorm{dims}d")(6)))
    other = check(model, randn(2, 4, *[5] * dims), fused=[f"0: BatchNorm{dims}d"])
    assert type(other.get_submodule("0")) is kind  # nothing of it is ours


class Clamps(nn.Module):
    """Other names of relu6, relu and a plain addition"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))
        self.six = nn.Hardtanh(0, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.six(self.a(x))
        x = self.b(x).clamp(0, 6)
        x = torch.clamp(torch.add(self.c(x), x, alpha=1), min=0)
        return torch.clip(self.d(x), max=6, min=0.0) + self.e(x).clamp(0, 5)


def test_other_names() -> None:
    check(Clamps().eval(), 5 * randn(3, 4), fused=["a: relu6", "b: relu6", "c: residual, relu", "d: relu6"])


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.drop, self.norm, self.other = nn.Dropout2d(), nn.BatchNorm2d(4), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.norm(self.drop(self.a(x)))).relu()
        return F.dropout(self.b(x), 0.3, self.training).tanh()


@pytest.mark.parametrize("replaced", [False, True])
def test_dropouts_are_left_out(replaced: bool) -> None:
    model = settled(Dropped())
    if replaced:
        fastnn.replace(model)
    other = check(model, randn(2, 3, 7, 6), fused=["a: BatchNorm2d, relu", "b: tanh"])
    assert steps(other, randn(2, 3, 7, 6)) == ["conv"] * 2


def test_synchronised_norms_are_in_the_report() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3)))
    check(model, randn(1, 3, 4, 4), fused=[], left=["1: no fastnn kernel for SyncBatchNorm"])


class Mirrored(nn.Module):
    """A transposed convolution beside a way around it"""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.up = getattr(nn, f"ConvTranspose{dims}d")(4, 4, 4, 2, 1, 1, groups=2, dilation=2)
        self.norm = getattr(nn, f"BatchNorm{dims}d")(4)
        self.way = getattr(nn, f"ConvTranspose{dims}d")(4, 4, 5, 2, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.up(x)) + self.way(x)).relu()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_residuals_of_transposed_convolutions(dims: int) -> None:
    model = settled(Mirrored(dims))
    x = randn(2, 4, *[5] * dims)
    other = check(model, x, fused=[f"up: BatchNorm{dims}d", "way: residual, relu"])
    assert steps(other, x)[-1] == "conv"
    way: Any = other.get_submodule("way")
    with torch.no_grad():
        y = model.get_submodule("way")(x[0])
        torch.testing.assert_close(way(x[0], residual=y), (2 * y).relu(), msg="unbatched")
        torch.testing.assert_close(way(x[0], residual=y.mean()), (y + y.mean()).relu(), msg="another shape")


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.alias = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.b(self.conv(self.a(self.conv(x)))).relu())


def test_a_shared_layer_has_a_copy_for_each_successor() -> None:
    other = check(settled(Shared()), randn(2, 3, 6, 5), fused=["conv: BatchNorm2d", "conv: BatchNorm2d, relu"])
    assert len([n for n, m in other.named_modules() if isinstance(m, nn.Conv2d)]) == 3


class Reads(nn.Module):
    """What must stay apart, because a value in between is used, or changed, elsewhere"""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm, self.relu = nn.BatchNorm2d(3), nn.ReLU()
        self.up = nn.ConvTranspose2d(3, 3, 3, 2)
        self.leaky = nn.LeakyReLU()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        if self.way == "functions":
            y = F.conv2d(x, self.conv.weight, self.conv.bias)
            return F.batch_norm(y, self.norm.running_mean, self.norm.running_var).relu()
        if self.way == "folded before":
            return self.norm(self.norm(self.conv(x)))
        if self.way == "with parameters":
            return self.leaky(self.conv(x))
        if self.way == "twice":
            y = self.conv(x)
            return self.norm(y) + y.relu()
        if self.way == "broadcast":
            return self.conv(x) + x.mean((2, 3), keepdim=True)
        if self.way == "larger":
            return self.conv(x[:1]) + x
        if self.way == "wider":
            return self.conv(x) + x.double()
        if self.way == "changed input":
            y = self.conv(x)
            x.mul_(0.5)
            return y + x
        if self.way == "changed later":
            y = self.conv(x) + x
            x.mul_(0.5)
            return y.relu()
        if self.way == "activated before":
            return (self.conv(x).relu() + x).tanh()
        if self.way == "weight read":
            return self.norm(self.conv(x)) * self.conv.weight.sum()
        if self.way == "changed other":
            x += self.conv(x)
            return x * 2
        if self.way == "doubled":
            y = self.conv(x)
            return y + y
        if self.way == "scaled":
            return torch.add(self.conv(x), x, alpha=3)
        if self.way == "more than an input":
            return self.norm(self.up(x, output_size=[11, 9]))
        return self.norm(x).relu()


FUNCTION = "called as a function, with weights of its own: only modules are fused"
APART = "the output of the layer before it is used elsewhere"


@pytest.mark.parametrize(("way", "fused", "left"), [
    ("twice", [], [f"norm: {APART}"]), ("broadcast", ["conv: residual"], []), ("larger", ["conv: residual"], []),
    ("wider", ["conv: residual"], []), ("changed later", ["conv: residual, relu"], []), ("activated before", ["conv: relu"], []),
    ("weight read", ["conv: BatchNorm2d"], []), ("changed input", [], []), ("changed other", [], []), ("doubled", [], []),
    ("scaled", [], []), ("first", [], ["norm: no convolution or linear layer is directly before it"]),
    ("functions", [], [f": {FUNCTION}", f": {FUNCTION}"]),
    ("folded before", ["conv: BatchNorm2d"], ["norm: another batch norm was folded into the layer before it"]),
    ("with parameters", [], ["leaky: an activation with parameters is no part of a layer's last step"]),
    ("more than an input", [], ["norm: the layer before it is called with more than an input"]),
])  # fmt: skip
def test_what_stays_apart(way: str, fused: list[str], left: list[str]) -> None:
    other = check(settled(Reads(way)), randn(2, 3, 5, 4), fused=fused, left=left)
    again, _ = fastnn.fuse(other)
    torch.testing.assert_close(again(x := randn(2, 3, 5, 4)), other(x.clone()), msg="fused a second time")


def test_hooks_stay_and_see_what_they_saw() -> None:
    model = settled(nn.Sequential(Residual(4, 4), Residual(4, 4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())))
    seen: list[Tensor] = []
    model.get_submodule("0.a").register_forward_hook(lambda m, x, y: seen.append(y))
    model.get_submodule("1.nb").register_forward_hook(lambda m, x, y: seen.append(y))
    model.get_submodule("2").register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    check(model, randn(1, 4, 6, 6), fused=["0.b: BatchNorm2d, residual, relu", "1.a: BatchNorm2d, relu", "2.0: relu"], left=[
        "0.na: the layer before it has hooks", "1.nb: it has hooks",
    ])  # fmt: skip
    truth, theirs, ours = (seen[i : i + 3] for i in (0, 3, 6))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert truth[0].dtype == torch.float64


class Branching(nn.Module):
    """What torch.fx cannot trace, around what it can"""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual(3, 3)
        self.row = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Tanh())
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), Residual(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if x.sum() > 1e9:
            return x
        for layer in self.row:
            x = layer(x)
        for layer in self.blocks:
            x = layer(x)
        return x


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = Branching()
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, double: bool = False, mask: Tensor | None = None) -> Tensor:
        x = self.last(self.inside(x)).sigmoid()
        if mask is not None:
            x = x * mask
        return 2 * x if double else x


def test_what_cannot_be_traced_is_left_and_its_parts_are_fused() -> None:
    model = settled(Owner())
    x = randn(2, 3, 5, 6)
    other = check(model, x, fused=[
        "inside.block.a: BatchNorm2d, relu", "inside.block.b: BatchNorm2d, residual, relu",
        "inside.blocks.1.a: BatchNorm2d, relu", "inside.blocks.1.b: BatchNorm2d, residual, relu", "last: sigmoid",
    ], left=[
        "inside: torch.fx cannot trace it: symbolically traced variables cannot be used as inputs to control flow",
        *(f"inside.{row}: the module that it is in cannot be traced, and may call its layers one by one"
          for row in ("row", "blocks.0")),
    ])  # fmt: skip
    assert type(other.get_submodule("inside")) is Branching
    assert len(list(other.get_submodule("inside.row").children())) == 3
    torch.testing.assert_close(other(x, double=False, mask=None), model(x))
    with pytest.raises(AssertionError, match="double"):
        other(x, double=True)
    with pytest.raises(AssertionError, match="mask"):
        other(x, mask=torch.ones(1))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(3)


def test_made_tensors_are_not_frozen() -> None:
    model = Noisy().eval()
    other, report = fastnn.fuse(model)
    assert [e.reason for e in report.left] == ["its forward makes a tensor, which tracing would keep for all calls"]
    assert type(other) is Noisy
    assert not torch.equal(other(x := torch.zeros(3)), other(x))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_vector_norm_after_a_linear_layer_of_sequences_is_an_error(hooked: bool) -> None:
    model = settled(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU()))
    if hooked:  # then the layers keep their places
        model.register_forward_hook(lambda *_: None)
    other = check(model, randn(3, 4), fused=["0: BatchNorm1d, relu"])
    with pytest.raises(RuntimeError, match=r"0: a batch norm was folded into this layer .* 2 dimensions, got 3"):
        other(randn(2, 5, 4))
    again, report = fastnn.fuse(other)
    assert report.left == []
    torch.testing.assert_close(again(x := randn(2, 4)), other(x))


def test_training_mode_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"eval mode, but it is in training mode; call model\.eval\(\) first"):
        fastnn.fuse(Residual(3, 3))
    model = settled(Residual(3, 3))
    model.get_submodule("na").train()
    with pytest.raises(RuntimeError, match="its module 'na' is in training mode"):
        fastnn.fuse(model)
    with pytest.raises(TypeError, match=r"argument 'model' must be torch\.nn\.Module, not list"):
        fastnn.fuse([model])  # type: ignore[arg-type]


def test_replaced_models_and_restore() -> None:
    """What was replaced before is fused alike; restore leaves the layers that torch has no class for."""
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)))
    fastnn.replace(model)
    x = randn(1, 3, 7, 7)
    other, report = fastnn.fuse(model)
    assert str(report) == "fused 1 layers, left 0\n     1 × Conv2d               with BatchNorm2d, relu"
    torch.testing.assert_close(other(x), model(x))
    fastnn.restore(other)
    assert [type(m) for m in other.children()] == [fastnn.nn.Conv2d, nn.Conv2d]
    torch.testing.assert_close(other(x), model(x))


def test_sixteen_bits() -> None:
    dtype = torch.bfloat16
    other, _ = fastnn.fuse(model := settled(Residual(4, 4)).to(dtype))
    x = randn(2, 4, 6, 6, dtype=dtype)
    truth = copy.deepcopy(model).double()(x.double())
    worst = [(m(x).double() - truth).abs().max() for m in (other, model)]
    assert worst[0] <= 2 * worst[1] + 4 * torch.finfo(dtype).eps * truth.abs().max()


class Pads(nn.Module):
    """Zeros around the input of a convolution"""

    def __init__(self, conv: nn.Module, pad: Any) -> None:
        super().__init__()
        self.conv, self.pad = conv, pad

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x * 2)).relu()


def by(*sizes: int, **how: Any) -> Any:
    return lambda x: F.pad(x, sizes, **how)


PADS: list[tuple[nn.Module, Any, Any]] = [  # the convolution, what adds zeros before it, the padding that it has then
    (nn.Conv1d(4, 5, 3), by(1, 1), (1,)),
    (nn.Conv1d(4, 5, 8, padding=2), by(7, 7, mode="constant", value=0), (9,)),
    (nn.Conv1d(4, 5, 8), by(3, 4), "same"),
    (nn.Conv1d(4, 5, 4, dilation=3, padding="valid"), nn.ConstantPad1d((4, 5), 0.0), "same"),
    (nn.Conv2d(4, 5, (8, 1)), by(0, 0, 3, 4), "same"),
    (nn.Conv2d(4, 5, (16, 1), (4, 1)), by(0, 0, 6, 6), (6, 0)),
    (nn.Conv2d(4, 5, 3, 2, padding=(1, 0), groups=1), by(2, 2, 1, 1, 0, 0), (2, 2)),
    (nn.Conv2d(4, 8, (3, 2), groups=2), nn.ZeroPad2d((0, 1, 1, 1)), "same"),
    (nn.Conv2d(4, 5, 3, padding="valid"), nn.ZeroPad2d(2), (2, 2)),
    (nn.Conv3d(4, 5, (2, 3, 1)), by(0, 0, 1, 1, 0, 1), "same"),
    (nn.Conv3d(4, 5, 3, dilation=(1, 2, 1)), nn.ZeroPad3d((1, 1, 2, 2, 1, 1)), (1, 2, 1)),
]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("number", range(len(PADS)))
def test_zeros_become_a_convolutions_padding(number: int, replaced: bool) -> None:
    conv, pad, padding = PADS[number]
    model = Pads(copy.deepcopy(conv), pad).eval()
    if replaced:
        fastnn.replace(model)
    x = randn(2, 4, *[13, 11, 12][: len(conv.kernel_size)])  # type: ignore[arg-type]
    other = check(model, x, fused=["conv: padding, relu"])
    assert other.get_submodule("conv").padding == padding
    assert len(steps(other, x)) == 1
    torch.testing.assert_close(other(x[0]), model(x[0]))
    assert fastnn.fuse(other)[1].fused == []


APART_PADS: list[tuple[nn.Module, Any]] = [
    (nn.Conv2d(4, 5, 3), by(1, 1, 1, 1, value=0.5)), (nn.Conv2d(4, 5, 3), nn.ConstantPad2d(1, 1.0)),
    (nn.Conv2d(4, 5, 3), by(1, 1, 1, 1, mode="reflect")), (nn.Conv2d(4, 5, 3), nn.ReflectionPad2d(1)),
    (nn.Conv2d(4, 5, 3), by(1, 1, -1, -1)), (nn.Conv2d(4, 5, 3), by(1, 2, 1, 2)), (nn.Conv2d(4, 5, 3, 2), by(0, 1, 0, 1)),
    (nn.Conv2d(4, 5, 2, padding=1), by(0, 1, 0, 1)), (nn.Conv2d(4, 5, 2), by(1, 0, 1, 0)),
    (nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), by(1, 1, 1, 1)),
    (nn.Conv2d(4, 5, 3, padding="same"), by(1, 1, 1, 1)),
    (nn.Conv2d(6, 5, 3), by(1, 1, 1, 1, 1, 1)), (nn.ConvTranspose2d(4, 5, 3), by(1, 1, 1, 1)), (nn.Linear(12, 5), by(1, 1)),
    (nn.Conv2d(4, 5, 3), lambda x: [x := F.pad(y := x * 1, (1, 1, 1, 1)), y.mul_(2)][0]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(APART_PADS)))
def test_zeros_that_stay(number: int) -> None:
    conv, pad = APART_PADS[number]
    other = check(Pads(conv, pad).eval(), randn(2, 4, 9, 10), fused=["conv: relu"])
    assert getattr(other.get_submodule("conv"), "padding", None) == getattr(conv, "padding", None)


def test_zeros_that_two_read() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.pad(x, (1, 1, 1, 1))
            return self.conv(y) * y.mean()

    check(Twice().eval(), randn(2, 3, 5, 4), fused=[])


def test_a_row_of_paddings_with_hooks() -> None:
    """Its layers keep their places."""
    first = nn.ZeroPad1d((1, 2)), nn.Conv1d(3, 4, 4), nn.BatchNorm1d(4)
    model = settled(nn.Sequential(*first, nn.ZeroPad1d(1), nn.Conv1d(4, 3, 3)))
    model.register_forward_hook(lambda *_: None)
    other = check(model, randn(2, 3, 9), fused=["1: padding, BatchNorm1d", "4: padding"])
    assert type(other.get_submodule("0")) is nn.Identity
    assert type(other.get_submodule("1")) is fastnn.nn.Conv1d
    assert type(other.get_submodule("4")) is nn.Conv1d
    fastnn.restore(other)
    assert type(other.get_submodule("1")) is nn.Conv1d
