"""What becomes of the benchmark's records: the page, the plots, the comparison, the files, the estimate. Nothing is measured."""

import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fastnn.bench.compare as compare
import fastnn.bench.estimate as estimate
import fastnn.bench.page as page
import fastnn.bench.plots as plots
import fastnn.bench.readme as readme
import fastnn.bench.report as report
import fastnn.bench.test_cases as test_cases
from fastnn.__main__ import main
from fastnn.bench import run
from fastnn.bench.cases import families
from fastnn.bench.command import SECONDS
from fastnn.bench.run import Record

MACHINE = {"cpu": "Some <CPU> & more", "architecture": "x86_64", "os": "Linux", "cores": 2, "affinity": [0, 1],
           "cpu_llvm": "znver5", "simd": {"name": "avx512", "bytes": 64}}  # fmt: skip


def header(threads: int = 2, **machine: Any) -> dict[str, Any]:
    return {
        "started": "2026-01-01T00:00:00+00:00",
        "command": ["bench", "--html", "<b>.html"],
        "machine": MACHINE | machine,
        "versions": {"fastnn": "1", "torch": "2.6", "triton": None},
        "threads": threads,
        "environment": {"OMP_WAIT_POLICY": "passive"},
        "providers": {"fastnn": "1", "torch": "2.6"},
        "missing": {"onnxruntime": "not <installed>"},
        "load_average": 0.25,
        "limits": {
            "fma_gflops_one_core": {"float32": 250.0, "float64": 125.0},
            "fma_gflops": {"float32": 500.0, "float64": 250.0},
            "read_gbs_64MiB": 50.0,
            "copy_gbs_64MiB_new_output": 10.0,
        },
        "method": "Checked & timed.",
    }


def record(case: str = "square/8", provider: str = "fastnn", median: float | None = 1e-3, **more: Any) -> Record:
    more = {"family": "matmul", "dtype": "float32", "threads": 2, "mode": "forward", "correct": True} | more
    if median:
        more = {"p20": 0.98 * median, "p80": 1.02 * median, "runs": 50, "rate": 1.0, "unit": "GFLOP/s",
                "flops": 1_000_000, "bytes": 10_000} | more  # fmt: skip
    return Record(case=case, provider=provider, median=median, **more)


def spread(r: Record, width: float) -> Record:
    assert r.median
    return replace(r, p20=r.median * (1 - width / 2), p80=r.median * (1 + width / 2))


# The page -------------------------------------------------------------------------------------------------------------


class _Reader(HTMLParser):
    """Elements that are closed in the wrong order, addresses that are loaded, and the lines of the tables."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.lines: list[list[str]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.lines.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert "script" not in self.open
        if "td" in self.open or "th" in self.open:
            self.lines[-1].append(data)


def _read(records: Sequence[Record], headers: Sequence[dict[str, Any]] = (header(),)) -> _Reader:
    reader = _Reader()
    reader.feed(page.html(headers, records, {"matmul-2threads-ratios": b"\x89PNG", "other-2threads-ratios": b"no"}))
    assert reader.open == []
    return reader


def test_the_page_needs_no_other_file() -> None:
    """Its only picture is in it, and of the families that it shows."""
    (address,) = _read([record()]).addresses
    assert address == "data:image/png;base64,iVBORw=="


def test_the_page_says_what_was_measured_on_what() -> None:
    lines = {line[0]: line[1:] for line in _read([record()]).lines}
    assert lines["machine"] == ["Some <CPU> & more, 2 cores, Linux"]
    assert lines["simd"] == ["name avx512, bytes 64"]
    assert lines["affinity"] == ["cores [0, 1]"]
    assert lines["load average before"] == ["0.25"]
    assert lines["versions"] == ["fastnn 1, torch 2.6"]
    assert lines["limit: multiply-add float32"] == ["500 GFLOP/s, 250 one core"]
    assert lines["limit: copy 64MiB new output"] == ["10.0 GB/s"]
    assert lines["method"] == ["Checked & timed."]
    assert lines["onnxruntime is missing"] == ["not <installed>"]
    assert lines["command"] == ["bench --html <b>.html"]


def test_the_page_has_a_line_a_case_and_provider() -> None:
    records = [
        record(median=2e-3, ratio=1.5, limit="fma", limit_fraction=0.8, limit_rate=154.25, rate=123.4, error_ulp=3.0,
               torch_error_ulp=1.0, notes=["spread <30%>"], served_by="matmul: cpu", memory=3 << 19),
        record(provider="torch", median=3e-3, ratio=1.0, between=1e-3),
        record(provider="numpy", median=None, correct=None, missing="not <here>"),
        record("square/16", median=None, correct=False, error_ulp=9e9, torch_error_ulp=1.0),
    ]  # fmt: skip
    lines = _read(records).lines
    at = lines.index(list(page._COLUMNS))
    assert lines[at + 1] == ["square/8", "forward, f32", "fastnn", "2 ms", "1.96 ms", "2.04 ms", "50", "123.4 GFLOP/s", "1.50×",
                             "80% of 154 fma", "3 (1)", "1.5 MiB", "spread <30%>; matmul: cpu"]  # fmt: skip
    assert lines[at + 2][:2] == ["torch", "3 ms, and 1 ms of PyTorch between"]
    assert lines[at + 3] == ["numpy", "missing: not <here>"]
    assert lines[at + 4] == ["square/16", "forward, f32", "fastnn", "red, so no speed is reported", "9e+09 (1)"]


def test_every_number_of_threads_and_family_has_a_table() -> None:
    records = [record(), record(threads=1), record(family="softmax")]
    reader = _read(records, [header(2), header(1)])
    assert reader.lines.count(list(page._COLUMNS)) == 3


def test_the_page_says_where_the_time_of_a_model_went() -> None:
    linear = {"class": "Linear", "before": 2e-3, "after": 1e-3, "served_by": "linear: cpu"}
    rest = {"module": "", "class": "", "before": 1e-3, "after": 1e-3, "served_by": ""}
    rows = [linear | {"module": "layer.1.<up>"}, linear | {"module": "layer.2.<up>"}, rest]
    lines = _read([record("mlp", family="models")], [header() | {"layers": {"mlp": rows}}]).lines
    assert ["layer.*.<up>", "Linear", "2", "4", "2", "2.00", "linear: cpu"] in lines
    assert ["all", "5", "3", "1.67"] in lines


# The lines of a run ---------------------------------------------------------------------------------------------------


def _printed(*records: Record) -> list[str]:
    console = Console(width=200, record=True, file=StringIO())
    lines = report.Lines(console, ["fastnn", "torch"], [r.case for r in records])
    lines.head()
    lines.case(records)
    report.print_doubts(console, records)
    return console.export_text().splitlines()


def test_a_line_says_how_far_the_samples_lie_apart() -> None:
    head, line = _printed(record(median=2e-3, ratio=1.5), record(provider="torch", median=3e-3))
    assert "p20–p80, runs" in head
    assert head.index("mode") + len("mode") == line.index("forward") + len("forward")
    assert "1.96–2.04 ms, 50" in line
    assert report.span(record(median=1e-3)) == "980 µs–1.02 ms, 50"
    assert report.span(record(median=None)) == "–"


def test_a_share_says_of_what() -> None:
    """In the record's own unit, which for a product that memory limits is not bytes; old records know only the limit's name."""
    assert report.share(record(limit="read", limit_fraction=0.58, limit_rate=50.9)) == "58% of 50.9 read"
    assert report.share(record(limit="read", limit_fraction=0.58)) == "58% of read"
    assert report.share(record(limit="fma", limit_fraction=0.002, limit_rate=460.0)) == "0.2% of 460 fma"
    assert report.share(record(limit="fma", limit_fraction=0.00002, limit_rate=460.0)) == "<0.1% of 460 fma"
    assert report.share(record()) == ""


def test_a_remark_is_no_doubt() -> None:
    """A case is unsteady by its notes; what else must be said of it is said apart."""
    remarked = record(remarks=["no CUDA graph"]), record(provider="torch", remarks=["no CUDA graph"])
    assert _printed(*remarked)[2:] == ["  note: no CUDA graph"]
    _, _, line, doubt, *_ = _printed(record(notes=["spread 30%"]), record(provider="torch"))
    assert line == "  unsteady: fastnn: spread 30%"
    assert doubt.startswith("1 of 1 cases were unsteady")


def test_unsteady_is_what_ours_or_the_best_peer_is() -> None:
    """A third one's spread is said, and no reason to doubt the ratio."""
    others = record(provider="torch", median=2.0), record(provider="numpy", median=9.0, notes=["spread 90%"])
    assert _printed(record(), *others)[2:] == ["  unsteady: numpy: spread 90%"]
    assert _printed(record(), replace(others[0], notes=["spread 30%"]), others[1])[3].startswith("1 of 1 cases were unsteady")


def test_a_line_names_the_best_peer() -> None:
    head, line = _printed(record(ratio=1.11, error_ulp=3.0, torch_error_ulp=1.0), record(provider="torch", median=2.0))
    assert re.search(r" best +ulp \(torch\)$", head)
    assert re.search(r" 1\.11× torch +3 \(1\)$", line)


def test_columns_that_have_no_room_are_left_out() -> None:
    """And said; the best peer is named in any case."""
    names = ["fastnn", "torch", "torch.compile", "onnxruntime"]
    ours = record(ratio=2.0), record(provider="torch", median=3e-3), record(provider="onnxruntime", median=2e-3)
    for width, there in ((200, 3), (140, 1)):
        console = Console(width=width, record=True, file=StringIO())
        lines = report.Lines(console, names, ["square/8"])
        lines.head()
        lines.case(ours)
        *left_out, head, line = console.export_text().splitlines()
        assert [name for name in names[1:] if f" {name} " in head] == names[1 : 1 + there]
        assert max(len(head), len(line)) <= width
        assert "2.00× onnxruntime" in line
        assert left_out == ([] if there == 3 else ["There is no room for columns of torch.compile, onnxruntime."])


# The plots ------------------------------------------------------------------------------------------------------------


def test_the_best_peer_is_drawn_beside_us() -> None:
    ours, slow, fast = record(), record(provider="torch", median=2.0), record(provider="numpy", median=1.0)
    red = record("red/8", median=None, correct=False)
    alone = record("alone/8")
    assert plots.pairs([ours, slow, fast, red, alone]) == [(ours, fast), (alone, None)]


def _drawn(figure: Any) -> set[tuple[float, float]]:
    """The points of a figure's first axes, rounded."""
    lines = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    return {(round(float(x), 6), round(float(y), 6)) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata())}


def _texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_roofline() -> None:
    """Intensity 1000 and a millisecond for a million operations: a GFLOP/s; the peer takes twice as long."""
    figure = plots.roofline(header(), [record(bytes=1000), record(provider="torch", median=2e-3, bytes=1000)])
    assert _drawn(figure) == {(1000.0, 1.0), (1000.0, 0.5)}
    assert _texts(figure) == ["multiply-add f32 500 GFLOP/s"]  # memory limits nothing at this intensity
    figure = plots.roofline(header(), [record(bytes=500_000, dtype="float64"), record(bytes=500_000, dtype="float16")])
    assert sorted(_texts(figure)) == ["copy 64MiB new output 10 GB/s", "multiply-add f32 500 GFLOP/s",
                                      "multiply-add f64 250 GFLOP/s", "read 64MiB 50 GB/s"]  # fmt: skip
    roofs = [line for line in figure.axes[0].get_lines() if line.get_color() == "gray"]
    assert [tuple(line.get_ydata()) for line in roofs] == [(12.5, 200.0), (2.5, 40.0)]  # from intensity 1/4 to 4
    assert plots.roofline(header(), [record(flops=0)]) is None
    assert plots.roofline(header(), [record(median=None, flops=1, bytes=1)]) is None


def test_bandwidth_is_the_roofline_of_cases_without_arithmetic() -> None:
    figure = plots.bandwidth(header(), [record(flops=0, bytes=2_000_000), record("square/9")])
    assert _drawn(figure) == {(2.0, 2.0)}
    assert _texts(figure) == ["read 64MiB 50 GB/s", "copy 64MiB new output 10 GB/s"]
    assert plots.bandwidth(header(), [record()]) is None


def test_speed_against_size() -> None:
    names = ["square/512", "square/8", "square/64", "mv/4096x4096", "linear/up/8", "linear/up/16"]
    records = [record(name, rate=float(n + 1)) for n, name in enumerate(names)] + [record("square/8", "torch", rate=9.0)]
    figure = plots.sizes(header(), records)
    assert figure
    (axes,) = figure.axes  # two sizes are no curve, and 4096x4096 is no number
    assert axes.get_title() == "square/… f32"
    assert {line.get_label(): list(zip(line.get_xdata(), line.get_ydata())) for line in axes.get_lines()} == {
        "fastnn": [(8, 2.0), (64, 3.0), (512, 1.0)],
        "torch": [(8, 9.0)],
    }
    assert plots.sizes(header(), records[3:]) is None


def test_sizes_are_any_number_of_a_name_or_the_work() -> None:
    """A panel along each number in which names differ alone; the others of a group along their work."""
    steps = [record(f"cell/step/B1_H{n}") for n in (64, 256, 512)] + [record("cell/step/B2_H64")]
    layers = [record(f"conv/net_{n}_{m}/1x{n}x7", flops=f * 10**9) for n, m, f in ((64, 128, 3), (128, 64, 1), (128, 128, 2))]
    copies = [record(f"copy/{n}x{n}", flops=0, bytes=n * 10**6) for n in (1, 2, 3)]
    figure = plots.sizes(header(), [*steps, *layers, *copies])
    assert figure
    assert {axes.get_title(): (axes.get_xlabel(), sorted(axes.get_lines()[0].get_xdata())) for axes in figure.axes} == {
        "cell/step/B1_H… f32": ("", [64, 256, 512]),
        "conv f32": ("GFLOP a call", [1, 2, 3]),
        "copy f32": ("MB a call", [1, 2, 3]),
    }
    assert plots.sizes(header(), [*steps[1:], *layers[1:], *copies[1:]]) is None


def test_limits_of_every_level_are_known() -> None:
    """The plots show reading from each, and the copy that makes a new output."""
    levels = header()
    levels["limits"]["bandwidth_gbs"] = {"read": {"l1": 900.0, "memory": 40.0}, "copy": {"l1": 700.0}}
    assert set(plots.bandwidths(levels)) == {"read l1", "read memory", "copy l1", "read 64MiB", "copy 64MiB new output"}
    figure = plots.bandwidth(levels, [record(flops=0)])
    assert _texts(figure) == ["read l1 900 GB/s", "read memory 40 GB/s", "read 64MiB 50 GB/s", "copy 64MiB new output 10 GB/s"]


def test_a_gpu_has_a_memory_roof_and_its_name() -> None:
    there = header(gpu={"name": "Some GPU"})
    there["limits"] = {"fma_gflops": {"float32": 500.0}, "copy_gbs_memory": 4000.0}
    figure = plots.roofline(there, [record(bytes=10_000_000_000)])
    assert _texts(figure) == ["multiply-add f32 500 GFLOP/s", "copy memory 4000 GB/s"]
    assert "<h1>fastnn bench: Some GPU</h1>" in page.html([there], [record()], {})
    assert "<h1>fastnn bench: Some &lt;CPU&gt;" in page.html([header()], [record()], {})


def test_figures_are_named_and_drawn() -> None:
    from PIL import Image

    records = [record(f"square/{n}", p, ratio=1.0, threads=t) for n in (1, 2, 3) for p in ("fastnn", "torch") for t in (1, 2)]
    records.append(record("relu/8", family="activation", flops=0))
    images = dict(plots.figures([header(1), header(2)], records))
    assert sorted(images) == [
        "activation-2threads-bandwidth", "activation-2threads-ratios",
        *(f"matmul-{t}threads-{plot}" for t in (1, 2) for plot in ("ratios", "roofline", "sizes")),
    ]  # fmt: skip
    grid = plots.sizes(header(), [record(f"{group}/{n}") for group in "abcd" for n in (1, 2, 3)])
    assert grid
    assert sum(axes.get_visible() for axes in grid.axes) == 4  # of two rows of three
    for png in images.values():
        with Image.open(BytesIO(png)) as image:
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10


# compare --------------------------------------------------------------------------------------------------------------


def _verdict(old: Sequence[Record], new: Sequence[Record]) -> str:
    (change,) = compare.compare(old, new)
    return change.verdict


OLD = [record(median=1.0), record(provider="torch", median=2.0)]


@pytest.mark.parametrize(
    ("ours", "peer", "verdict"),
    [(1.3, 2.0, "slower"), (0.7, 2.0, "faster"), (1.03, 2.0, "same"),
     (1.3, 2.6, "same"),  # a slower day of the machine
     (1.3, 2.1, "slower"),  # a slightly slower day, and a regression
     (1.0, 1.5, "same"),  # the peer got faster
     (0.8, 1.6, "same"),  # a faster day
     (1.0, 1.0, "same")],
)  # fmt: skip
def test_a_regression_is_told_from_a_slow_machine(ours: float, peer: float, verdict: str) -> None:
    assert _verdict(OLD, [record(median=ours), record(provider="torch", median=peer)]) == verdict


def test_a_change_within_the_noise_is_no_regression() -> None:
    peer = record(provider="torch", median=2.0)
    slower = record(median=1.3)
    assert _verdict(OLD, [slower, peer]) == "slower"
    assert _verdict(OLD, [spread(slower, 0.4), peer]) == "same"
    assert _verdict([spread(OLD[0], 0.4), peer], [slower, peer]) == "same"
    assert _verdict(OLD, [slower, spread(peer, 0.4)]) == "same"  # then the machine's change is not known so well
    assert _verdict(OLD, [spread(record(median=2.0), 0.4), peer]) == "slower"


def test_the_machine_is_told_by_the_same_peer_in_both_files() -> None:
    """A new rival, or one that is fast now because it was wrong before, must not look like a change of the machine."""
    rival = record(provider="onnxruntime", median=0.1)
    assert _verdict(OLD, [record(median=1.3), record(provider="torch", median=2.0), rival]) == "slower"
    assert _verdict([*OLD, rival], [record(median=1.3), record(provider="torch", median=2.0)]) == "slower"
    (change,) = compare.compare([*OLD, record(provider="numpy", median=1.5)], [*OLD, record(provider="numpy", median=1.8)])
    assert change.machine == pytest.approx(1.2)  # numpy was the faster of the two


def test_without_a_peer_the_other_cases_tell_the_machine() -> None:
    slow_day = [record(median=1.3), record("alone/8", median=1.3), record(provider="torch", median=2.6)]
    changes = compare.compare([*OLD, record("alone/8", median=1.0)], slow_day)
    assert {c.key[1]: c.verdict for c in changes} == {"square/8": "same", "alone/8": "same"}
    assert _verdict([record(median=1.0)], [record(median=1.3)]) == "slower"


@pytest.mark.parametrize(
    ("was", "now", "verdict", "regression"),
    [({}, {"median": None, "correct": False}, "red", True),
     ({}, {"median": None, "correct": None, "missing": "no kernel"}, "missing", True),
     ({"median": None, "correct": None}, {"median": None, "correct": False}, "red", True),
     ({"median": None, "correct": False}, {}, "repaired", False),
     ({"median": None, "correct": False}, {"median": None, "correct": False}, "same", False)],
)  # fmt: skip
def test_what_was_right_must_stay_right(was: dict[str, Any], now: dict[str, Any], verdict: str, regression: bool) -> None:
    (change,) = compare.compare([record(**was)], [record(**now)])
    assert (change.verdict, change.regression) == (verdict, regression)


def test_cases_are_paired_by_all_that_makes_them() -> None:
    old = [record(), record(dtype="bfloat16"), record(threads=1), record(mode="train"), record(family="softmax")]
    new = [replace(old[0], median=9.0), *old[1:-1], record("square/16")]
    found = {c.key: c.verdict for c in compare.compare(old, new)}
    assert sorted(found.values()) == ["new", "same", "same", "same", "slower", "vanished"]
    assert found["matmul", "square/8", "float32", 2, "forward", "warm"] == "slower"
    assert found["softmax", "square/8", "float32", 2, "forward", "warm"] == "vanished"
    assert found["matmul", "square/16", "float32", 2, "forward", "warm"] == "new"


def test_a_gpu_that_times_otherwise_is_still_compared() -> None:
    """From graphs, which had their inputs in L2, to events: the same case, and no vanished one beside a new one."""
    old, new = record(method="gpu, in CUDA graphs with inputs in L2"), record(method="gpu", median=5e-3)
    (change,) = compare.compare([old], [new])
    assert change.verdict == "slower"
    console = Console(width=200, record=True, file=StringIO())
    compare._print(console, [change])
    assert "timed otherwise" in console.export_text()


def _file(path: Path, records: Sequence[Record], *headers: dict[str, Any]) -> str:
    report.save_json(path, headers or [header()], records)
    return str(path)


def _compare(*files: str) -> int:
    return main(["bench", "compare", *files])


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = _file(tmp_path / "old.json", [*OLD, record("gone/8")])
    new = _file(tmp_path / "new.json", [record(median=1.3), OLD[1]])
    assert _compare(old, old) == 0
    assert "2 same: no regression" in capsys.readouterr().out
    assert _compare(old, new) == 1
    out = capsys.readouterr().out
    assert re.search(r"square/8 .*1 s .*1\.3 s .*1\.30× .*1\.00× .*1\.30× .*slower", out)
    assert re.search(r"gone/8 .*vanished", out)
    assert "1 slower, 1 vanished: 1 regressions" in out
    red = _file(tmp_path / "red.json", [record(median=None, correct=False, missing="[boom]"), OLD[1]])
    assert _compare(old, red) == 1
    assert "red: [boom]" in capsys.readouterr().out


def test_compare_says_what_else_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = header() | {"versions": {"fastnn": "1", "torch": "2.7", "triton": None}}
    other["method"] = "Cold."
    old, new = _file(tmp_path / "old.json", OLD), _file(tmp_path / "new.json", OLD, other, header(1))
    assert _compare(old, new) == 0
    out = capsys.readouterr().out
    assert "torch was 2.6 and is 2.7" in out
    assert "Only one of the files has 1 threads." in out
    assert "Measured in different ways. OLD: Checked & timed.\nNEW: Cold." in out
    assert "a call" not in out  # an old file does not say for how long
    quick, full = (_file(tmp_path / f"{s}.json", OLD, header() | {"seconds": s}) for s in (0.2, 1.0))
    assert _compare(quick, full) == 0
    assert "Timed for 0.2 s a call in OLD, 1 s in NEW (quick and full runs)." in capsys.readouterr().out
    assert _compare(full, full) == 0
    assert "a call" not in capsys.readouterr().out


def test_files_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = _file(tmp_path / "good.json", OLD)
    for name, text in (("text", "no json"), ("list", "[]"), ("keys", '{"headers": [], "records": [{"case": "x"}]}')):
        (tmp_path / name).write_text(text)
    bad = {
        _file(tmp_path / "machine.json", OLD, header(cores=64)): "different machines, zen5-avx512-2cores and zen5-avx512-64cores",
        _file(tmp_path / "threads.json", OLD, header(1)): "different numbers of threads, [2] and [1]",
        _file(tmp_path / "cases.json", [record("else/8")]): "no case in common",
        _file(tmp_path / "both.json", OLD, header(), header(cores=64)): "results of 2 machines",
        _file(tmp_path / "none.json", []).replace("none", "nowhere"): "is not a result of bench --json: FileNotFoundError",
        str(tmp_path / "text"): "is not a result of bench --json: JSONDecodeError",
        str(tmp_path / "list"): "is not a result of bench --json: TypeError",
        str(tmp_path / "keys"): "is not a result of bench --json: TypeError",
    }
    for file, message in bad.items():
        assert _compare(good, file) == 2, file
        assert message in capsys.readouterr().err
    assert _compare(good) == 2
    assert "compare needs two files" in capsys.readouterr().err


# Files and the estimate -----------------------------------------------------------------------------------------------


def test_a_machine_is_named_by_what_decides_its_speed() -> None:
    assert report.slug(MACHINE) == "zen5-avx512-2cores"
    assert report.slug(MACHINE | {"cpu_llvm": "skylake-avx512", "simd": {"name": "avx2"}}) == "skylake-avx512-avx2-2cores"
    assert report.slug({"architecture": "arm64", "cores": 8}) == "arm64-8cores"


def test_committed_results_lie_where_they_belong_and_can_be_read() -> None:
    files = sorted((Path(__file__).parents[1] / report.RESULTS).glob("*/*.json"))
    assert files
    for file in files:
        headers, records = report.load(file)
        assert {report.slug(h["machine"]) for h in headers} == {file.parent.name}
        assert {r.family for r in records} == {file.stem}
        assert {r.run for r in records} == {h["started"] for h in headers}
        for r in records:
            assert r.median is None or r.correct, f"{file.name}: {r.case} is red and has a speed"


def test_the_estimate_counts_who_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate._info, "cache", lambda: {"kernels": 1})
    cases = run.select(["matmul", "activation"], quick=True)
    everyone, _ = run.available_peers(["fastnn", "torch", "torch.compile", "numpy"])

    def total(names: Sequence[str], seconds: float = 1.0, cases: Any = cases) -> float:
        return estimate.estimate(cases, [p for p in everyone if p.name in names], seconds, header())

    one, two = total(["torch"]), total(["fastnn", "torch"])
    assert one < two < 2 * one  # the check is made once
    assert total(["torch"], 2.0) > one + len(cases) * 0.99
    (square,) = run.select(["matmul"], pattern="square/512")
    assert total(["torch", "numpy"], cases=[square]) > total(["torch"], cases=[square])
    relu, *_ = run.select(["activation"], pattern="relu/bert_base/*")
    assert total(["torch", "numpy"], cases=[relu]) == total(["torch"], cases=[relu])  # NumPy has no relu
    flash, _ = run.available_peers(["sdpa.flash"])
    assert estimate.estimate([square], flash, 1.0, header()) == total([], cases=[square])  # which is for a GPU
    compiled = total(["torch.compile"], cases=[square]) - total(["torch"], cases=[square])
    assert compiled == pytest.approx(estimate.PREPARE["torch.compile"])
    large, *_ = run.select(["matmul"], pattern="square/4096")
    call = 2 * 4096**3 / 500e9  # longer than a block, and each of five blocks has one at least
    assert total(["torch", "numpy"], 0.1, [large]) > total(["torch"], 0.1, [large]) + 5 * call


def test_make_bench_quick_takes_less_than_three_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the estimate, on two slow cores with nothing compiled: an estimate and not a measurement."""
    everyone, _ = run.available_peers(quick=True, device="cpu")
    cases = run.select(families(), quick=True)
    slow = header()
    slow["limits"] |= {"fma_gflops": {"float32": 230.0, "float64": 115.0}, "copy_gbs_64MiB_new_output": 5.0}
    monkeypatch.setattr("fastnn._info.cache", lambda: {"kernels": 50})
    warm = estimate.estimate(cases, everyone, SECONDS["quick"], slow)
    monkeypatch.setattr("fastnn._info.cache", lambda: {"kernels": 0})
    assert warm + 30 < estimate.estimate(cases, everyone, SECONDS["quick"], slow) < 180


def test_minutes() -> None:
    assert [report.minutes(s) for s in (1, 44, 130, 1000)] == ["10 seconds", "40 seconds", "2 minutes", "17 minutes"]


# The README's table ---------------------------------------------------------------------------------------------------


def test_the_readmes_table_is_what_the_records_make() -> None:
    checkout = Path(__file__).resolve().parents[1]
    text = (checkout / readme.README).read_text(encoding="utf-8")
    made = readme.renewed(text, checkout / report.RESULTS)
    assert text.splitlines() == made.splitlines(), "python -m fastnn.bench.readme makes it anew"


def test_every_case_has_a_place_in_the_readmes_table() -> None:
    known = {(case.family, case.name, case.mode, run.dtype_name(dtype)) for case, dtype in run.select(families())}
    placed = set()
    for row in readme.ROWS:
        for group in row.groups:
            keys = group.keys(row.family, known)
            assert keys, f"{row.label}: no case of {row.family} is {group}"
            placed.update(keys)
    assert sorted(known - placed) == []


def _folder(results: Path, *records: Record, machine: int = 0) -> None:
    report.save_json(results / readme.MACHINES[machine].folder / "matmul.json", [header()], records)


def _numbers(results: Path, *patterns: str) -> list[str]:
    """The cells of a row about these cases of both machines."""
    row = readme.row("matmul", "work", *patterns)
    machines = [readme.read(results / machine.folder) for machine in readme.MACHINES]
    text = readme.line(row, {key for records in machines for key in records}, machines)
    assert text is not None
    assert text.startswith("| work | ")
    assert text.endswith(" |")
    return text.removesuffix(" |").split(" | ")[1:]


def _compared(case: str, share: float = 0.5, limit: str = "fma", **others: float | None) -> list[Record]:
    """Ours takes a millisecond, others so many; None is a wrong result."""
    theirs = [
        record(case, name.replace("_", "."), ms * 1e-3 if ms else None, correct=ms is not None) for name, ms in others.items()
    ]
    return [record(case, limit=limit, limit_fraction=share), *theirs]


def test_the_readmes_table_tells_few_cases_one_by_one_and_more_as_a_range(tmp_path: Path) -> None:
    _folder(
        tmp_path,
        *_compared("few/1", torch=1.2, torch_compile=1.1, onnxruntime=0.9),
        *_compared("few/2", 0.25, torch=12.34, numpy=11.0, onnxruntime=None),
        *(r for n in (1, 2, 4, 8) for r in _compared(f"many/{n}", n / 10, "copy", torch=n, onnxruntime=2 if n < 4 else None)),
    )
    _folder(tmp_path, *_compared("few/2", torch=0.5), *_compared("many/1", torch=3.0), machine=1)
    assert _numbers(tmp_path, "few/1 few/2", "many/*") == [
        "1.10×, 11.0× · 1.00–8.00×, geometric mean 2.83×",
        "0.90×, wrong · 2.00× (2 of 4)",
        "50%, 25% of FMA · 10–80% of copy",
        "–, 0.50× · 3.00× (1 of 4)",
        "–",
        "–, 50% · 50% of FMA",
    ]
    assert readme.line(readme.row("matmul", "work", "none"), {("matmul", "none", "forward", "float32")}, [{}, {}]) is None


def test_the_readmes_table_tells_torch_where_it_is_far_behind(tmp_path: Path) -> None:
    _folder(tmp_path, *_compared("near", torch=1.25, torch_compile=1.0), *_compared("far", torch=1.3, torch_compile=1.0))
    assert _numbers(tmp_path, "near", "far")[0] == "1.00× · 1.00× (torch 1.30×)"


def test_the_readmes_table_leaves_out_what_is_no_comparison(tmp_path: Path) -> None:
    """Cold caches, other threads, a wrong result of ours, a limit of memory that was disturbed; Winograd is above its limit."""
    cold = [record("cold", name, 1e-3, method="cold") for name in ("fastnn", "torch")]
    alone = [record("alone", name, 1e-3, threads=1) for name in ("fastnn", "torch")]
    wrong = [record("wrong", "fastnn", None, correct=False), record("wrong", "torch", 1e-3)]
    _folder(
        tmp_path, *cold, *alone, *wrong,
        *_compared("memory", 3.0, "read", torch=1.0), *_compared("winograd", 1.4, torch=2.0),
    )  # fmt: skip
    ratios, over_onnxruntime, shares, *_ = _numbers(tmp_path, "cold", "alone", "wrong", "memory", "winograd")
    assert ratios == "– · – · red · 1.00× · 2.00×"
    assert over_onnxruntime == "– · – · red · – · –"
    assert shares == "– · – · – · – · 140% of FMA"


def test_the_readme_is_written_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    spread_out = record("square/512", "torch", 2e-3, notes=["spread 30%"])
    _folder(tmp_path / report.RESULTS, record("square/512"), spread_out, record("square/1024"))
    readme.README.write_text(f"before\n{readme.BEGIN}\n| old |\n{readme.END}\nafter\n", encoding="utf-8")
    assert readme.main(["--check"]) == 1
    assert "python -m fastnn.bench.readme" in capsys.readouterr().err
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
    text = readme.README.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| old |" not in text
    assert "1 of 2 cases were marked unsteady" in text
    (tmp_path / report.RESULTS / readme.MACHINES[0].folder / "broken.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json is not a result"):
        readme.main([])
    with pytest.raises(ValueError, match="must have"):
        readme.renewed(f"{readme.BEGIN} and no end", tmp_path)


# The cases as pytest-benchmark tests ----------------------------------------------------------------------------------


class _Benchmark:
    """What a test uses of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.group, self.extra_info, self.timed = "", dict[str, Any](), 0

    def __call__(self, work: Any) -> None:
        work()
        self.timed += 1


def test_cases_for_pytest_benchmark_are_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    small, dtype = next(iter(run.select(["matmul"], pattern="small/8")))
    ours, theirs, numpy = run.available_peers(["fastnn", "torch", "numpy"])[0]
    for peer in (ours, theirs, numpy):
        benchmark = _Benchmark()
        test_cases.test_case(small, dtype, peer, benchmark)
        assert benchmark.timed == 1
        assert benchmark.group == "matmul/small/8 forward float32"
        assert benchmark.extra_info["flops"] == 1024
    wrong = small.on(ours=lambda F, a, b: F.matmul(a, b) + 1)
    with pytest.raises(AssertionError, match="ulp where torch has"):
        test_cases.test_case(wrong, dtype, ours, benchmark := _Benchmark())
    assert benchmark.timed == 0
    broken = small.on(ours=lambda F, a, b: F.nothing(a, b), numpy=lambda a, b: a.nothing)
    with pytest.raises(AttributeError):
        test_cases.test_case(broken, dtype, ours, _Benchmark())
    with pytest.raises(pytest.skip.Exception, match="numpy cannot: AttributeError"):
        test_cases.test_case(broken, dtype, numpy, _Benchmark())
    with pytest.raises(pytest.skip.Exception, match="NumPy has no gradients"):
        test_cases.test_case(small.on(mode="backward"), dtype, numpy, _Benchmark())


def test_every_case_and_provider_is_a_test_for_pytest_benchmark() -> None:
    names = [parameters.id or "" for parameters in test_cases._parameters()]
    assert len(set(names)) == len(names)
    assert "matmul/square/1024-forward-bfloat16-torch.compile" in names
    assert not any(name.startswith("startup") for name in names)
    assert not any("sdpa" in name or "no-cudagraphs" in name for name in names), "they are for GPUs: here they would be torch"
