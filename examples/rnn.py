"""Recurrent layers at work: a stream with its latencies, a character model and a time series trained by torch and by
fastnn, and how far back the gradient of a last state reaches.

    python examples/rnn.py            # all four parts; a minute or two, plots in report/
    python examples/rnn.py stream     # one of: stream, text, series, reach
"""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastnn

REPORT = Path("report")
KINDS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
TRAINED: dict[str, Any] = {**KINDS, "QRNN": fastnn.nn.QRNN}  # which torch does not have: its operations, step by step


def milliseconds(call: Callable[[], Any]) -> list[float]:
    """The times of sixty calls, sorted, after ten that do not count"""
    times = []
    for _ in range(70):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times[10:])


def stream() -> None:
    """One step at a time with carried state: the bits of the whole sequence, and what a step costs."""
    print("One step at a time, batch 1: milliseconds a step (median, 95th percentile)\n")
    print(f"{'layer':<6} {'units':>5}   {'torch':>15}   {'fastnn':>15}   as the whole sequence")
    with torch.no_grad():
        for (name, kind), units in ((k, u) for k in TRAINED.items() for u in (128, 512)):
            torch.manual_seed(0)
            theirs = kind(64, units)
            ours = copy.deepcopy(theirs)
            fastnn.replace(ours)
            theirs.backend = "torch"  # heeded by a QRNN only
            x = torch.randn(60, 1, 64)
            columns = []
            for module in (theirs, ours):
                step = getattr(module, "stream", module)  # a QRNN's window needs the last inputs besides the cells
                time.sleep(0.05)
                state = step(x[:1])[1]
                times = milliseconds(partial(step, x[:1], state))
                columns.append(f"{times[30]:7.3f} {times[57]:7.3f}")
            state, steps = None, []
            for t in range(60):
                y, state = step(x[t : t + 1], state)
                steps.append(y)
            found, whole = torch.cat(steps), ours(x)[0]
            near = "but for rounding" if found.allclose(whole, atol=1e-5) else "NOT"
            same = "the same bits" if torch.equal(found, whole) else near
            print(f"{name:<6} {units:>5}   {columns[0]:>15}   {columns[1]:>15}   {same}")


class Model(nn.Module):
    """A recurrent layer between an embedding (or nothing) and a linear layer"""

    def __init__(self, kind: Any, symbols: int, units: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 32) if symbols else None
        self.layer = kind(32 if symbols else 1, units, batch_first=True)
        self.head = nn.Linear(units, symbols or 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x) if self.embedding is not None else x)[0])


def train(
    model: nn.Module, batches: Iterator[tuple[Any, Tensor]], loss_of: Callable[..., Tensor]
) -> tuple[list[float], float]:
    """The losses, and the seconds that it took"""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    start = time.perf_counter()
    for x, y in batches:
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


def compare(title: str, symbols: int, units: int, batches: Callable[[], Iterator[tuple[Tensor, Tensor]]], loss: Any) -> None:
    """The same training by torch and by fastnn, for each kind of layer, and their curves in one plot"""
    print(f"\n{title}: first and last loss, seconds")
    curves = {}
    for name, kind in TRAINED.items():
        torch.manual_seed(0)
        model: Any = Model(kind, symbols, units)
        ours = copy.deepcopy(model)
        fastnn.replace(ours)
        model.layer.backend = "torch"  # heeded by a QRNN only
        for who, module in (("torch", model), ("fastnn", ours)):
            x, y = next(batches())
            loss(module(x), y).backward()  # kernels are compiled, or loaded
            time.sleep(0.1)
            losses, seconds = train(module, batches(), loss)
            curves[name, who] = losses
            print(f"  {name:<5} {who:<7} {losses[0]:.4f} → {losses[-1]:.4f}   {seconds:.2f} s")
    plot(title, curves)


def plot(title: str, curves: dict[tuple[str, str], list[float]], x: str = "step", y: str = "loss") -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    names = list(dict.fromkeys(name for name, _ in curves))
    for (name, who), losses in curves.items():
        axes.plot(losses, color=f"C{names.index(name)}", linestyle="--" if who == "torch" else "-",
                  linewidth=2.5 if who == "torch" else 1, label=f"{name}, {who}")  # fmt: skip
    axes.set(title=title, xlabel=x, ylabel=y, yscale="log")
    axes.legend()
    REPORT.mkdir(exist_ok=True)
    file = REPORT / f"rnn_{title.split()[-1]}.png"
    figure.savefig(file, dpi=110, bbox_inches="tight")
    print(f"  plot: {file}")


def text() -> None:
    """A character model of what ships with every Python: its help topics."""
    from pydoc_data.topics import topics

    words = "".join(topics[name] for name in sorted(topics))[:200_000].encode("ascii", "ignore").decode()
    alphabet = sorted(set(words))
    data = torch.tensor([alphabet.index(c) for c in words])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(60):
            at = torch.randint(0, len(data) - 65, (32,), generator=generator)
            rows = torch.stack([data[i : i + 65] for i in at.tolist()])
            yield rows[:, :-1], rows[:, 1:]

    compare(f"A character model of {len(data)} characters of text", len(alphabet), 192, batches,
            lambda out, y: nn.functional.cross_entropy(out.flatten(0, 1), y.flatten()))  # fmt: skip


def series() -> None:
    """The monthly prices of shares from 1990 on, which ship with matplotlib: each month's from those before."""
    import matplotlib.cbook
    import numpy

    file = matplotlib.cbook.get_sample_data("Stocks.csv", asfileobj=False)
    table = numpy.genfromtxt(file, delimiter=",", skip_header=2)[:, 1:]
    table = table[~numpy.isnan(table).all(1)]
    whole = table[:, ~numpy.isnan(table).any(0)]  # the shares that existed throughout
    prices = torch.tensor(whole.T).float().log()
    prices = (prices - prices.mean(1, keepdim=True)) / prices.std(1, keepdim=True)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(2)
        for _ in range(60):
            at = torch.randint(0, prices.shape[1] - 121, (16,), generator=generator).tolist()
            rows = torch.stack([prices[n % len(prices), i : i + 121] for n, i in enumerate(at)]).unsqueeze(2)
            yield rows[:, :-1], rows[:, 1:]

    compare(f"The prices of {len(prices)} shares, {prices.shape[1]} months of a series", 0, 64, batches, nn.functional.mse_loss)


def reach() -> None:
    """|∂ h_T / ∂ x_t|, from fastnn's own backward: how fast it vanishes with the distance T - t."""
    steps, units = 100, 64
    curves = {}
    print("\nThe gradient of the last state after 1, 10, 50 and 99 steps back, relative to the last step")
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        module: Any = kind(16, units)
        if name != "RNN":
            with torch.no_grad():
                module.bias_ih_l0[units : 2 * units] = 2.0  # LSTM's forget gate, GRU's update gate: what keeps the state is open
        fastnn.replace(module, backend="cpu")
        x = torch.randn(steps, 8, 16, requires_grad=True)
        (grad,) = torch.autograd.grad(module(x)[0][-1].sum(), x)
        size = grad.norm(dim=2).mean(1).flip(0)
        curves[name, "fastnn"] = (size / size[0]).clamp_min(1e-12).tolist()
        print(f"  {name:<5}" + "".join(f"{curves[name, 'fastnn'][n]:12.2e}" for n in (1, 10, 50, 99)))
    plot("How far back the gradient of a state reaches", curves, "steps back", "gradient, relative to the last step's")


if __name__ == "__main__":
    parts = {"stream": stream, "text": text, "series": series, "reach": reach}
    for part in sys.argv[1:] or parts:
        parts[part]()
