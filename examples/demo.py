"""Real models before and after ``fastnn.replace``: the same numbers, and the time of both. Run by ``make demo``.

Prints a table, writes ``report/demo.md`` and its plots, and exits with 1 if a check on the numbers fails.
"""

import copy
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import cnn
import crepe
import digits
import embeddings
import fastnn
import voices
from fastnn._info import machine
from fastnn.bench.report import duration
from fastnn.bench.timing import Neighbours, Times, measure
from fastnn.replace import Report

PROVIDERS = TORCH, COMPILED, FASTNN = "torch", "torch.compile", "fastnn"
REPORT = Path(__file__).resolve().parents[1] / "report"
STEPS = 50
#: examples/cnn.py's networks: steps of training, and the score that they reach by then
NETWORKS = {"lenet": (300, 0.8), "resnet": (80, 0.9), "mobilenet": (80, 0.85), "autoencoder": (200, 0.6)}

Step = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """A statement about the numbers that must hold."""

    what: str
    value: str
    limit: str
    holds: bool


@dataclass
class Result:
    """What one model showed."""

    model: str
    report: Report
    checks: list[Check] = field(default_factory=list)
    times: dict[str, Mapping[str, Times]] = field(default_factory=dict)  # by work, then by provider
    notes: list[str] = field(default_factory=list)

    def time(self, work: str, calls: Mapping[str, Callable[[], object]], seconds: float) -> None:
        """Time the calls in turn, so many seconds each, and note when the machine had other work."""
        neighbours = Neighbours()
        self.times[work] = measure(calls, seconds)
        share = neighbours.share()
        if share is not None and share > 0.1:
            self.notes.append(f"{work}: other processes used {share:.0%} of the cores, so these times say little.")


def run_digits(step: Step) -> tuple[Result, dict[str, list[float]]]:
    """Train the classifier twice from the same seed; the result and both loss curves."""
    step("digits: training with torch.nn")
    data = digits.digits()
    fresh = {TORCH: digits.classifier(), FASTNN: digits.classifier()}
    result = Result("digits MLP", fastnn.replace(fresh[FASTNN]))
    trained = copy.deepcopy(fresh)
    losses = {TORCH: digits.train(trained[TORCH], data)}
    step("digits: training with fastnn (the first time, kernels are built)")
    losses[FASTNN] = digits.train(trained[FASTNN], data)

    apart = max(abs(a - b) for a, b in zip(losses[TORCH][:STEPS], losses[FASTNN][:STEPS]))
    result.checks.append(Check(f"loss curves apart, first {STEPS} steps", f"{apart:.1e}", "≤ 1e-4", apart <= 1e-4))
    for name, model in trained.items():
        share = digits.accuracy(model, data)
        result.checks.append(Check(f"test accuracy, {name}", f"{share:.2%}", "≥ 97%", share >= 0.97))

    step("digits: timing")

    def training(name: str) -> Callable[[], object]:
        return lambda: digits.train(copy.deepcopy(fresh[name]), data, epochs=5)

    def inference(name: str) -> Callable[[], object]:
        model = trained[name].eval()
        return torch.inference_mode()(lambda: model(data.train_x))

    result.time("digits: 5 epochs of training", {name: training(name) for name in fresh}, seconds=3.0)
    result.time("digits: inference, 1,437 images", {name: inference(name) for name in fresh}, seconds=1.0)
    return result, losses


def run_network(step: Step, name: str) -> tuple[Result, dict[str, list[float]]]:
    """Train a convolutional network twice from the same seed; the result and both loss curves."""
    data, (steps, least) = digits.digits(), NETWORKS[name]
    models = {TORCH: cnn.make(name, TORCH), FASTNN: cnn.make(name, TORCH)}
    result = Result(f"digits, {name}", fastnn.replace(models[FASTNN]))
    fresh, losses, exact = copy.deepcopy(models), dict[str, list[float]](), list[list[float]]()
    double = digits.Digits(data.train_x.double(), data.train_y, data.test_x.double(), data.test_y)
    for by, model in models.items():
        step(f"digits: {name} by {by}")
        with fastnn.backend("cpu"):  # and not torch's kernels, where they are faster
            exact.append(cnn.train(name, copy.deepcopy(model).double(), double, cnn.FIRST))
        losses[by] = cnn.train(name, model, data, steps)
    for what, gap, limit in (("float64", cnn.apart(exact), 1e-9), ("float32", cnn.apart(losses.values()), cnn.CLOSE)):
        what = f"loss curves apart, first {cnn.FIRST} steps in {what}"
        result.checks.append(Check(what, f"{gap:.1e}", f"≤ {limit:g}", gap <= limit))
    what = "noise taken away" if name == "autoencoder" else "test accuracy"
    for by, model in models.items():
        share = cnn.score(name, model, data)
        result.checks.append(Check(f"{what} after {steps} steps, {by}", f"{share:.1%}", f"≥ {least:.0%}", share >= least))
    if name == "autoencoder":
        REPORT.mkdir(exist_ok=True)
        cnn.draw(models[FASTNN], data, REPORT / "denoised.png")

    def training(by: str) -> Callable[[], object]:
        return lambda: cnn.train(name, copy.deepcopy(fresh[by]), data, 10)

    step(f"digits: timing {name}")
    result.time(f"{name}: 10 steps of training", {by: training(by) for by in fresh}, seconds=1.5)
    return result, losses


def run_sentences(step: Step) -> Result:
    """Embed the sentences with the pretrained model as it comes, compiled, and replaced."""
    step("sentences: loading the model")
    model, tokens = embeddings.embedder()
    replaced = copy.deepcopy(model)
    models: dict[str, Callable[..., torch.Tensor]] = {TORCH: model, FASTNN: replaced}
    sentences, length = tokens["input_ids"].shape
    result = Result("MiniLM sentence embeddings", fastnn.replace(replaced))
    step("sentences: embedding")
    expected = embeddings.embed(model, tokens)
    with fastnn.trace() as traced:
        apart = (embeddings.embed(replaced, tokens) - expected).abs().max().item()
    ours = Counter(call.op for call in traced if call.backend == "cpu")
    result.notes.append(f"MiniLM: served by fastnn in one call: {', '.join(f'{n} × {op}' for op, n in ours.items())}.")
    result.checks.append(Check("largest difference of embeddings", f"{apart:.1e}", "≤ 1e-5", apart <= 1e-5))

    step("sentences: torch.compile")
    compiled = torch.compile(copy.deepcopy(model))
    try:
        embeddings.embed(compiled, tokens)
        models[COMPILED] = compiled
    except Exception as error:  # it needs a C++ compiler, which fastnn does not
        result.notes.append(f"torch.compile could not serve here: {str(error).splitlines()[0]}")

    step("sentences: timing")
    calls = {name: (lambda m=m: embeddings.embed(m, tokens)) for name, m in models.items()}
    result.time(f"sentences: {sentences} × {length} tokens", calls, seconds=6.0)
    return result


def run_pitch(step: Step, size: str) -> Result:
    """Track the pitch of tones that are known, with the pretrained model as it comes and fused and replaced."""
    step(f"pitch: CREPE {size} (the first time, kernels are built)")
    model = crepe.crepe(size)
    fused, fusion = fastnn.fuse(model)
    result = Result(f"CREPE {size}", fastnn.replace(fused))
    x = torch.empty(0)
    for name, (audio, pitch) in crepe.signals().items():
        x = crepe.frames(audio)[:: 4 if size == "full" else 1]
        true = crepe.truth(pitch)[:: 4 if size == "full" else 1]
        with torch.inference_mode():
            before, after = crepe.cents(model(x)), crepe.cents(fused(x))
        apart, off = (after - before).abs().max().item(), (after - true).abs()
        near, theirs = ((t - true).abs().le(10).double().mean() for t in (after, before))
        result.checks += [
            Check(f"{name}: pitch tracks apart, cents", f"{apart:.1e}", "≤ 1", apart <= 1),
            Check(f"{name}: median error, cents", f"{off.median():.1f}", "≤ 10", bool(off.median() <= 10)),
            Check(f"{name}: within 10 cents", f"{near:.0%}", f"torch's {theirs:.0%}", bool(near >= theirs - 1 / len(x))),
        ]
    step(f"pitch: timing CREPE {size}")
    calls = {name: torch.inference_mode()(lambda m=m: m(x)) for name, m in ((TORCH, model), (FASTNN, fused))}
    result.time(f"CREPE {size}: {len(x)} windows", calls, seconds=2.0 if size == "tiny" else 6.0)
    result.notes.append(f"CREPE {size}: {str(fusion).splitlines()[0]}; its batch norms follow an activation, so they stay.")
    return result


def run_voices(step: Step) -> Result:
    """Embed synthesised voices with the pretrained encoder (three LSTM layers) as it comes, and replaced."""
    step("voices: synthesising")
    model, parts = voices.encoder(), voices.utterances()
    replaced = copy.deepcopy(model)
    result = Result("Resemblyzer voice encoder", fastnn.replace(replaced))
    expected, found = voices.embed(model, parts), voices.embed(replaced, parts)
    apart = (found - expected).abs().max().item()
    result.checks.append(Check("largest difference of embeddings", f"{apart:.1e}", "≤ 1e-5", apart <= 1e-5))
    alike = (found @ found.T).fill_diagonal_(0).argmax(1).roll(len(found) // 2)
    known = int((alike == torch.arange(len(found))).sum())
    result.checks.append(Check("voices known by other words", f"{known} of {len(found)}", "all", known == len(found)))
    step("voices: timing")
    calls = {name: (lambda m=m: voices.embed(m, parts)) for name, m in ((TORCH, model), (FASTNN, replaced))}
    result.time(f"voices: {parts.shape[0]} of 4 s", calls, seconds=4.0)
    one = parts[:1]
    calls = {name: (lambda m=m: voices.embed(m, one)) for name, m in ((TORCH, model), (FASTNN, replaced))}
    result.time("voices: one of 4 s", calls, seconds=2.0)
    return result


def kinds(modules: list[str]) -> str:
    """'Linear × 36, GELU'"""
    return ", ".join(f"{name} × {n}" if n > 1 else name for name, n in Counter(modules).most_common())


def replaced_and_left(result: Result) -> str:
    """One line: what fastnn serves in this model, what it does not, and why."""
    left: dict[str, list[str]] = {}
    for entry in result.report.left:
        left.setdefault(entry.reason, []).append(entry.class_name)
    why = "; ".join(f"{kinds(classes)} ({reason})" for reason, classes in left.items())
    done = kinds([entry.class_name for entry in result.report.replaced])
    return f"{result.model}: replaced {done or 'nothing'}; left {why or 'nothing'}."


def speed_table(results: list[Result]) -> Table:
    table = Table(title="Time: median, and how far the 20th and the 80th percentile are apart", title_justify="left")
    table.add_column("work")
    for column in (*PROVIDERS, "over torch", "over compile"):
        table.add_column(column, justify="right")
    for result in results:
        for work, times in result.times.items():
            cells = [f"{duration(t.median)} ±{t.spread / 2:.0%}" if (t := times.get(n)) else "–" for n in PROVIDERS]
            ours = times[FASTNN].median
            ratios = [f"{t.median / ours:.2f}×" if (t := times.get(n)) else "–" for n in PROVIDERS if n != FASTNN]
            table.add_row(work, *cells, *ratios)
    return table


def check_table(results: list[Result]) -> Table:
    table = Table(title="Numbers", title_justify="left")
    for column in ("model", "check", "value", "limit", ""):
        table.add_column(column)
    for result in results:
        for c in result.checks:
            mark = "[green]holds" if c.holds else "[bold red]FAILS"
            table.add_row(result.model, c.what, c.value, c.limit, mark)
    return table


def plot(results: list[Result], losses: dict[str, list[float]], file: Path) -> None:
    """Loss curves, their difference, and a group of bars for each piece of work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    works = [(work, times) for result in results for work, times in result.times.items()]
    across = 6
    down = -(-(2 + len(works)) // across)
    fig, axes = plt.subplots(down, across, figsize=(4 * across, 4 * down), layout="constrained")
    curves, gap, *bars = axes.flat
    for unused in bars[len(works) :]:
        unused.remove()
    curves.plot(losses[TORCH], color="tab:gray", lw=3, label=TORCH)
    curves.plot(losses[FASTNN], color="tab:orange", lw=1, label=FASTNN)
    curves.set(title="digits: training loss", xlabel="step", yscale="log")
    curves.legend()
    apart = [abs(a - b) for a, b in zip(losses[TORCH], losses[FASTNN])]
    gap.plot(apart, color="tab:orange")
    gap.plot([0, STEPS], [1e-4, 1e-4], color="tab:red", label=f"limit, first {STEPS} steps")
    gap.set(title="difference of the losses", xlabel="step", yscale="log")
    gap.legend()
    colors = {TORCH: "tab:gray", FASTNN: "tab:orange", COMPILED: "tab:blue"}
    for axis, (work, times) in zip(bars, works):
        heights = [t.median * 1e3 for t in times.values()]
        spread = [
            [(t.median - t.p20) * 1e3 for t in times.values()],
            [(t.p80 - t.median) * 1e3 for t in times.values()],
        ]
        drawn = axis.bar(list(times), heights, yerr=spread, color=[colors[name] for name in times], capsize=4)
        axis.bar_label(drawn, fmt="%.3g", label_type="center")
        axis.set(title=work, ylabel="ms, less is better")
    fig.savefig(file, dpi=110)


def main() -> int:
    console = Console(record=True)
    console.width = max(console.width, 110)  # the saved report is as wide, also when the output is a pipe
    console.print(
        f"fastnn {fastnn.__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{machine()['cpu']}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    shown = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=shown, transient=True, refresh_per_second=1) as progress:
        task = progress.add_task("starting")

        def step(text: str) -> None:
            progress.update(task, description=text)

        trained, losses = run_digits(step)
        networks = {name: run_network(step, name) for name in NETWORKS}
        results = [trained, *(result for result, _ in networks.values()), run_sentences(step)]
        more: list[Callable[[Step], Result]] = [*(partial(run_pitch, size=size) for size in crepe.SIZES), run_voices]
        for run in more:
            try:
                results.append(run(step))
            except ModuleNotFoundError as missing:  # the Makefile installs their weights, without what they depend on
                trained.notes.append(f"Left out: {missing}")

    console.print(speed_table(results), check_table(results), sep="\n")
    for result in results:
        console.print(replaced_and_left(result), *result.notes, sep="\n")
    REPORT.mkdir(exist_ok=True)
    plot(results, losses, REPORT / "demo.png")
    pictures = ["plot", "demo.png"], ["loss curves of the convolutional networks", "cnn.png"], ["denoised digits", "denoised.png"]
    cnn.plot({name: curves for name, (_, curves) in networks.items()}, REPORT / "cnn.png")
    text = console.export_text()
    shown_below = "".join(f"\n![{title}]({file})\n" for title, file in pictures)
    (REPORT / "demo.md").write_text(f"# fastnn demo\n\n```\n{text}```\n{shown_below}", encoding="utf-8")
    console.print(f"\nReport: {REPORT / 'demo.md'}, plots: {', '.join(str(REPORT / file) for _, file in pictures)}")
    return 0 if all(check.holds for result in results for check in result.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
