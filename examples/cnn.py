"""Convolutional networks on scikit-learn's digits: three classifiers and a denoising autoencoder, trained by torch or fastnn.

    python examples/cnn.py                            # both trainers, the curves side by side; plots in report/
    python examples/cnn.py --by fastnn resnet         # one of them; any of lenet, resnet, mobilenet, autoencoder

Exits with 1 if the curves of both part in their first steps.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import digits
import fastnn

REPORT = Path(__file__).resolve().parents[1] / "report"
BY = ("torch", "fastnn")
FIRST, CLOSE = 10, 0.05  # so far the first losses may lie apart in float32; in float64 it is some 1e-14


def lenet() -> nn.Module:
    """LeNet-5 (LeCun et al. 1998), for images of 16 × 16."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """He et al. 2015, figure 2, with batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.way: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.way = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(y + self.way(x))


def resnet(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


class Inverted(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018): wide, depthwise, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int, wider: int = 4) -> None:
        super().__init__()
        wide = wider * inputs
        self.steps = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.whole = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.steps(x) if self.whole else self.steps(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        Inverted(16, 16, 1), Inverted(16, 24, 2), Inverted(24, 24, 1), Inverted(24, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def autoencoder() -> nn.Module:
    """Down to 4 × 4 by convolutions with a stride, up again by transposed ones."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lenet": lenet, "resnet": resnet, "mobilenet": mobilenet, "autoencoder": autoencoder,
}  # fmt: skip


def images(rows: Tensor) -> Tensor:
    """The digits' rows of 64 as images of 16 × 16."""
    return F.interpolate(rows.view(-1, 1, 8, 8), scale_factor=2, mode="bilinear")


def noisy(clean: Tensor, seed: int = 0) -> Tensor:
    return clean + 0.3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def make(name: str, by: str, seed: int = 0) -> nn.Module:
    """The model, with the same weights for the same seed, to be trained by torch or by fastnn."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    if by == "fastnn":
        fastnn.replace(model)
    return model


def train(name: str, model: nn.Module, data: digits.Digits, steps: int, batch: int = 64, seed: int = 0) -> list[float]:
    """Train in place; the loss of every step. The order of the images depends on the seed alone.

    Batch norm and ReLU part any two roundings after some dozen steps: torch's float32 from its own float64 as far as ours.
    """
    x, y, shuffle = images(data.train_x), data.train_y, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    given = noisy(x) if name == "autoencoder" else x
    losses: list[float] = []
    model.train()
    while len(losses) < steps:
        for rows in torch.randperm(len(x), generator=shuffle).split(batch)[: steps - len(losses)]:
            optimizer.zero_grad()
            out = model(given[rows])
            loss = 5 * F.mse_loss(out, x[rows]) if name == "autoencoder" else F.cross_entropy(out, y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def apart(curves: Iterable[list[float]]) -> float:
    """How far two curves lie apart at most, in their first steps."""
    return max(abs(a - b) for a, b in zip(*(losses[:FIRST] for losses in curves)))


@torch.no_grad()
def score(name: str, model: nn.Module, data: digits.Digits) -> float:
    """The share of the test images that are told right; for the autoencoder, of the noise that is taken away (by its power)."""
    x = images(data.test_x)
    model.eval()
    if name != "autoencoder":
        return (model(x).argmax(1) == data.test_y).float().mean().item()
    before = noisy(x, 1)
    return 1 - (F.mse_loss(model(before), x) / F.mse_loss(before, x)).item()


@torch.no_grad()
def draw(model: nn.Module, data: digits.Digits, file: Path) -> None:
    """Ten test digits: clean, noisy, denoised."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    clean = images(data.test_x[:10])
    before = noisy(clean, 1)
    fig, axes = plt.subplots(3, 10, figsize=(10, 3.4), layout="constrained")
    for title, row, pictures in zip(("clean", "noisy", "denoised"), axes, (clean, before, model(before))):
        row[0].set_title(title, loc="left")
        for axis, picture in zip(row, pictures[:, 0]):
            axis.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set_axis_off()
    fig.savefig(file, dpi=110)
    plt.close(fig)


def plot(curves: dict[str, dict[str, list[float]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.5), layout="constrained", squeeze=False)
    for axis, (name, lines) in zip(axes[0], curves.items()):
        for (by, losses), (color, width) in zip(lines.items(), (("tab:gray", 3), ("tab:orange", 1))):
            axis.plot(losses, color=color, lw=width, label=by)
        axis.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        axis.legend()
    fig.savefig(file, dpi=110)
    plt.close(fig)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--by", choices=[*BY, "both"], default="both", help="what trains")
    parser.add_argument("--steps", type=int, default=300)
    chosen = parser.parse_args()
    data, curves, same = digits.digits(), dict[str, dict[str, list[float]]](), True
    REPORT.mkdir(exist_ok=True)
    print(f"{'model':<12} {'by':<7} {'last loss':>10} {'score':>7} {'seconds':>8}")
    for name in chosen.models:
        curves[name] = {}
        for by in BY if chosen.by == "both" else (chosen.by,):
            model = make(name, by)
            train(name, make(name, by), data, 2)  # kernels are built
            start = time.perf_counter()
            curves[name][by] = train(name, model, data, chosen.steps)
            seconds = time.perf_counter() - start
            print(f"{name:<12} {by:<7} {curves[name][by][-1]:10.4f} {score(name, model, data):7.2%} {seconds:8.2f}")
            if name == "autoencoder":
                draw(model, data, REPORT / "denoised.png")
        if len(curves[name]) == 2:
            gap = apart(curves[name].values())
            same = same and gap <= CLOSE
            print(f"{'':<12} the losses of the first {FIRST} steps are at most {gap:.1e} apart; the limit is {CLOSE}")
    plot(curves, REPORT / "cnn.png")
    print(f"plots: {REPORT / 'cnn.png'}" + (f", {REPORT / 'denoised.png'}" if "autoencoder" in chosen.models else ""))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
