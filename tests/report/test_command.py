"""The report as a user meets it: every format against a golden file, damage among good runs, wrong options."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

import commands
from conftest import REPOSITORY
from iexact_runner.config.presets import preset
from iexact_runner.report import command as report
from iexact_runner.report.figures.looks import Looks
from iexact_runner.report.figures.tradeoffs import draw_cost, draw_pareto
from iexact_runner.report.figures.training import draw_curves
from iexact_runner.report.reading import read_report
from recorded import FP32, edit_summary, observed_map, record

GOLDEN = REPOSITORY / "tests" / "golden"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two repeats of EXACT in the sizes of a published figure, FP32 on another machine, and two that did not end."""
    monkeypatch.chdir(tmp_path)
    arxiv = {"name": "synthetic_arxiv"}
    record(tmp_path / "runs" / "0", dataset=arxiv, compression=FP32, saved_mib=909.56, environment={"torch": "2.8.0"})
    record(tmp_path / "runs" / "1", dataset=arxiv, saved_mib=29.72)
    record(tmp_path / "runs" / "2", dataset=arxiv, saved_mib=29.72, seed=1, scores=(0.88,), rates=(6.0, 5.5, 6.5))
    record(tmp_path / "runs" / "3", status="failed", training={"lr": 10.0})
    record(tmp_path / "runs" / "4", status="unfinished", training={"lr": 1.0})
    return tmp_path / "runs"


def iexact_report(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["iexact-report", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    return stopped.value.code, *capsys.readouterr()


@pytest.mark.parametrize("name", ["table", "csv", "markdown", "latex"])
def test_format_is_the_golden_one(runs, monkeypatch, capsys, name):
    status, shown, _ = iexact_report(monkeypatch, capsys, "runs", "--format", name, "--title", "golden")
    assert status == 0 and shown == (GOLDEN / f"report.{name}").read_text()


def test_page_holds_the_golden_table_and_inlined_figures(runs, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    status, shown, _ = iexact_report(monkeypatch, capsys, "runs", "--format", "html", "--title", "golden <1>")
    assert status == 0 and "<title>golden &lt;1&gt;</title>" in shown and "golden <1>" not in shown
    assert (GOLDEN / "report.html").read_text() in shown and shown.count("golden &lt;1&gt;") == 2
    assert shown.count("<svg") == 4 and "<img" not in shown and 'src="' not in shown and "<link" not in shown


def test_parquet_holds_the_rows_of_the_csv(runs, monkeypatch, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert iexact_report(monkeypatch, capsys, "runs", "--format", "parquet", "--output", "rows.parquet")[0] == 0
    _, text, _ = iexact_report(monkeypatch, capsys, "runs", "--format", "csv")
    rows = parquet.read_table("rows.parquet").to_pylist()
    for kept, written in zip(rows, csv.DictReader(io.StringIO(text)), strict=True):
        assert {name: "" if value is None else str(value) for name, value in kept.items()} == written
    status, _, error = iexact_report(monkeypatch, capsys, "runs", "--format", "parquet")
    assert status == 2 and error == "iexact-report: --output=null: --format=parquet writes a file: name it\n"


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("pyarrow", ("--format", "parquet", "--output", "x")),
        ("matplotlib", ("--figures", "x")),
    ],
)
def test_missing_extra_is_one_line(runs, monkeypatch, capsys, package, arguments):
    monkeypatch.setitem(sys.modules, package, None)
    status, shown, error = iexact_report(monkeypatch, capsys, "runs", *arguments)
    assert status == 1 and shown == "" and error.count("\n") == 1 and not (runs.parent / "x").exists()
    assert f"needs {package}" in error.replace("figures need ", "needs ") and "pip install 'iexact-runner[" in error


def test_page_without_matplotlib_has_its_tables_and_says_what_figures_need(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, shown, error = iexact_report(monkeypatch, capsys, "runs", "--format", "html", "--title", "golden")
    assert status == 0 and (GOLDEN / "report.html").read_text() in shown and "<svg" not in shown
    assert "<p>figures need matplotlib; pip install &#x27;iexact-runner[figures]&#x27;</p>" in shown
    needed = "figures need matplotlib; pip install 'iexact-runner[figures]'"
    assert error == f"iexact-report: a page without figures: {needed}\n"


def test_figures_are_written_twice(runs, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert iexact_report(monkeypatch, capsys, "runs", "--figures", "figures")[0] == 0
    names = sorted(path.name for path in (runs.parent / "figures").iterdir())
    assert names == sorted(
        f"{name}.{kind}" for name in ("curves", "memory", "pareto", "throughput") for kind in ("png", "svg")
    )


def test_distributions_of_activations_have_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    run = record(tmp_path / "run", task="distribution")
    repeats = [[observed_map("head", js=js, reduction=js)] for js in (0.02, 0.04)]
    edit_summary(run, distribution=repeats)
    status, shown, _ = iexact_report(
        monkeypatch, capsys, run, "--format", "markdown", "--figures", tmp_path / "figures"
    )
    heading, line = (row for row in shown.splitlines() if "head" in row or "JS" in row)
    cells = dict(zip(heading.split(" | "), line.split(" | "), strict=True))
    assert status == 0 and (cells["JS uniform"], cells["JS clipped normal"]) == ("0.060", "0.030")
    assert (cells["d"], cells["reduction [%]"]) == ("16", "3.0")
    assert "JS 0.020" in (tmp_path / "figures" / "activations.svg").read_text()


def test_processes_that_shared_a_graph_have_a_table(tmp_path, monkeypatch, capsys):
    figures = {"edges": 70, "saved_mib": 0.5, "step_peak_mib": 3.0, "data_mib": 1.0, "waiting_seconds": 0.25}
    ranks = [{"nodes": nodes, "halo": nodes // 4, "sent_mib": 2.0} | figures for nodes in (4000, 3000)]
    run = record(tmp_path / "run", parallel={"name": "graph"})
    edit_summary(run, parallel={"parts": 2, "ranks": ranks})
    status, shown, _ = iexact_report(monkeypatch, capsys, run, "--format", "markdown")
    assert status == 0 and "### processes" in shown
    assert "| 0 | 4,000 | 1,000 | 70 | 0.50 | 3.0 | 1.0 | 2.0 | 0.2 |" in shown and "| 1 | 3,000 | 750 |" in shown
    edit_summary(run, parallel={"parts": 2, "ranks": [ranks[0] | {"halo": "many"}]})
    status, _, error = iexact_report(monkeypatch, capsys, run)
    assert status == 1 and "parallel.ranks" in error and error.count("\n") <= 2


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_damaged_run_among_a_hundred_is_named_and_the_others_shown(tmp_path, monkeypatch, capsys, name):
    for seed in range(100):
        record(tmp_path / str(seed), seed=seed, scores=(seed / 100,), runs=1)
    path = record(tmp_path / "bad", seed=100, scores=(0.0,), runs=1) / name
    path.write_text(path.read_text()[:-9])
    status, shown, error = iexact_report(monkeypatch, capsys, tmp_path, "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(shown))
    assert status == 1 and row["test_repeats"] == "100" and float(row["test_mean"]) == pytest.approx(0.495)
    assert error.count("\n") == 1 and str(path) in error


HOSTILE = "x [/nope] \x1b[2J\u202e\n\\input{x} <img src=x> | [a](http://b) $\\frac$ =1"


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A whole record with text that acts somewhere, in a folder whose name is markup, beside one that is damaged."""
    monkeypatch.chdir(tmp_path)
    words = {"name": HOSTILE}
    environment = {"git_commit": HOSTILE, "torch": "=1+1", "device_name": "-1"}
    record(tmp_path / "runs" / "a[b]", dataset=words, environment=environment)
    record(tmp_path / "runs" / "2")
    record(tmp_path / "runs" / "c[d]", status="failed", dataset={"name": "\x1b[31m"})
    edit_summary(record(tmp_path / "runs" / "\x1b[e]\n"), memory={"saved_mib": HOSTILE})
    return tmp_path / "runs"


@pytest.mark.parametrize("form", ["table", "csv", "markdown", "latex", "html"])
def test_text_of_records_acts_nowhere(hostile, monkeypatch, capsys, form):
    status, shown, error = iexact_report(monkeypatch, capsys, "runs", "--format", form, "--title", HOSTILE)
    assert status == 1 and "runs/\\x1b[e]\\n/summary.json: memory.saved_mib=" in error
    for text in (shown, error):
        assert {sign for sign in text if not sign.isprintable()} <= {"\n"}
    bare = shown.replace("{[}", "[").replace("\n", "")
    if form in ("table", "markdown", "latex", "html"):
        assert "c[d]" in bare
    if form == "table":
        assert "[/nope]" in shown and "[points]" not in shown
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(shown)))
        assert {row["torch"] for row in rows} == {"'=1+1", "2.13.0"} and "'-1" in {row["device_name"] for row in rows}
        assert "runs/c[d]: failed" in error
    if form == "markdown":
        assert "<" not in shown and "](" not in shown.replace("\\](", "") and "://" not in shown.replace("\\://", "")
    if form == "latex":
        assert all(
            line.lstrip().startswith(("\\", "%")) or line.endswith("\\\\") for line in shown.splitlines() if line
        )
        assert "\\input" not in shown.replace("% ", "%").split("%")[0]
    if form == "html":
        assert "<img" not in shown


def test_text_of_records_is_no_formula_of_a_figure(hostile, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    status, _, error = iexact_report(monkeypatch, capsys, "runs", "--figures", "figures")
    assert status == 1 and all(line.startswith("iexact-report: ") for line in error.splitlines())
    assert r"$\frac$" in (hostile.parent / "figures" / "curves.svg").read_text()


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "config.yaml"])
@pytest.mark.parametrize("kind", ["pipe", "hundreds of megabytes", "folder"])
def test_what_is_no_file_of_a_run_is_named_at_once(runs, monkeypatch, capsys, name, kind):
    bad = record(runs / "5", seed=9, status="unfinished" if name == "config.yaml" else "completed")
    (bad / name).unlink()
    if kind == "pipe":
        os.mkfifo(bad / name)
    elif kind == "folder":
        (bad / name).mkdir()
    else:
        (bad / name).touch()
        os.truncate(bad / name, 2**29)
    status, shown, error = iexact_report(monkeypatch, capsys, "runs")
    assert status == 1 and error.count("\n") == 1 and f"runs/5/{name}: " in error and "synthetic_arxiv" in shown


def test_parquet_takes_columns_of_several_types(runs, monkeypatch, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    for index, value in enumerate((1, 2.5, "x", [1], True, {"a": 1})):
        record(runs / f"1{index}", model={"odd": value, "mixed": (1, 2.5)[index % 2]}, dataset={"name": "flickr"})
    assert iexact_report(monkeypatch, capsys, "runs", "--format", "parquet", "--output", "rows.parquet")[0] == 0
    rows = parquet.read_table("rows.parquet").to_pylist()
    assert {"1", "2.5", "x", "[1]", "True", "{'a': 1}", None} == {row["model.odd"] for row in rows}
    assert {1.0, 2.5, None} == {row["model.mixed"] for row in rows}


def test_screen_without_the_letters_of_a_name_is_written_all_the_same(tmp_path):
    record(tmp_path / "run", dataset={"name": "caf\u00e9"})
    code = "from iexact_runner.report.command import main; main()"
    command, environment = [sys.executable, "-c", code, str(tmp_path)], os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert r"caf\xe9" in result.stdout and result.stderr == ""


def test_a_thousand_runs_take_seconds(tmp_path):
    one = record(tmp_path / "0", training={"epochs": 200})
    for seed in range(1, 1000):
        (tmp_path / str(seed)).mkdir()
        for path in one.iterdir():
            (tmp_path / str(seed) / path.name).write_bytes(
                path.read_bytes().replace(b'"seed": 0', b'"seed": %d' % seed)
            )
    code = "import sys; from iexact_runner.report.command import main; main(); assert 'torch' not in sys.modules"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--where", "compression.bitz=2"), "--where=compression.bitz: no such field; did you mean compression.bits?"),
        (("--where", "bits"), "--where=bits: must be FIELD=VALUE"),
        (("--group-by", "modell"), "--group-by=modell: no such field; did you mean model?"),
        (("--metric", "accuracy"), "--metric=accuracy: must be one of test, val"),
    ],
)
def test_wrong_option_is_one_line(runs, monkeypatch, capsys, arguments, words):
    status, shown, error = iexact_report(monkeypatch, capsys, "runs", *arguments)
    assert status == 2 and shown == "" and error.count("\n") == 1 and words in error


def test_nothing_found_is_one_line(runs, monkeypatch, capsys):
    for arguments, words in (
        (["nowhere"], "no run at or below nowhere"),
        (["runs", "--where", "model=gat"], "no run with model=gat at or below runs"),
    ):
        status, _, error = iexact_report(monkeypatch, capsys, *arguments)
        assert status == 1 and error == f"iexact-report: {words}\n"


def test_table_of_bins_is_no_row(runs, monkeypatch, capsys):
    record(runs / "5", task="bins", dataset={"name": "bins"})
    assert "bins" not in iexact_report(monkeypatch, capsys, "runs")[1]
    status, _, error = iexact_report(monkeypatch, capsys, "runs/5")
    assert status == 1 and error.startswith("iexact-report: no run with a dataset at or below runs/5")


def test_conditions_select_runs(runs, monkeypatch, capsys):
    def tests(*arguments):
        _, shown, _ = iexact_report(monkeypatch, capsys, "runs", "--format", "csv", *arguments)
        return [row["compression.scheme"] for row in csv.DictReader(io.StringIO(shown))]

    assert tests() == ["none", "projected"]
    assert tests("--where", "compression.bits=2.0") == ["projected"]
    assert tests("--where", "compression.bits=null", "--where", "compression.share_maps=false") == ["none"]
    assert tests("--where", "environment.torch=2.8.0", "--where", "dataset=synthetic_arxiv") == ["none"]


def test_rows_of_real_runs_hold_figures_and_environment(tmp_path):
    swept = commands.run("-m", "iexact_runner", "-m", "compression=none,iexact", "training.epochs=2", cwd=tmp_path)
    assert swept.returncode == 0, swept.stderr
    code = "from iexact_runner.report.command import main; main()"
    command = [sys.executable, "-c", code, "outputs", "--format", "csv"]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["compression.scheme"] for row in rows] == ["none", "projected"]
    for row in rows:
        assert float(row["saved_mib"]) > 0 and 0 < float(row["test_mean"]) <= 1 and row["torch"] and row["device_name"]


def test_report_of_python_is_that_of_the_command(runs):
    found = read_report([runs], metrics=["saved_mib"], by=["dataset"])
    (row,) = found.results.rows
    assert row.cells["saved_mib"].value == pytest.approx((909.56 + 2 * 29.72) / 3)
    assert [run.status for run in found.incomplete] == ["failed", "unfinished"] and len(found.completed) == 3
    assert json.loads((runs / "0" / "summary.json").read_text())["config"]["compression"]["scheme"] == "none"


def test_curves_have_points_where_there_was_an_evaluation_and_losses_at_every_epoch(tmp_path):
    pytest.importorskip("matplotlib")
    folder = record(tmp_path / "a", runs=2)
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if line["epoch"] == 2:
            line["test"] = line["val"] = None
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_report([folder], epochs=True).results.rows
    losses, scores = draw_curves({"a": rows}).axes[:2]
    assert list(losses.lines[0].get_xdata()) == [1, 2, 3]
    assert list(losses.lines[0].get_ydata()) == pytest.approx([1.05, 0.55, 1 / 3 + 0.05])
    assert list(scores.lines[0].get_xdata()) == [1, 3]
    assert list(scores.lines[0].get_ydata()) == pytest.approx([60.5, 80.5])


def test_cost_shows_time_and_peak_with_the_error_of_the_gradient(tmp_path):
    pytest.importorskip("matplotlib")
    peaks, rates, errors = (10.0, 4.0, 6.0), (2.0, 1.0, 0.5), (0.0, 0.2, 3.0)
    for number, (peak, rate, error) in enumerate(zip(peaks, rates, errors, strict=True)):
        compression = asdict(preset(("none", "recompute", "iexact")[number]))
        folder = record(tmp_path / f"{number}", compression=compression, rates=(rate, rate, rate))
        memory = json.loads((folder / "summary.json").read_text())["memory"] | {"step_peak_mib": peak}
        figures_of = {"relative_error": [error, error]} | ({"both": {"relative_error": [9.0]}} if number == 2 else {})
        after = {"5": {"relative_error": [1.0]}, "30": figures_of}
        edit_summary(folder, memory=memory, fidelity={"draws": 2, "after": after})
    figure = draw_cost({"a": read_report([tmp_path]).results.rows})
    axes = figure.axes[0]
    front, *points = axes.lines
    assert [(*point.get_xdata(), *point.get_ydata()) for point in points] == [(10.0, 0.5), (4.0, 1.0), (6.0, 2.0)]
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(4.0, 1.0), (10.0, 0.5)]
    scale, norm = figure.axes[1]._colorbar.cmap, figure.axes[1]._colorbar.norm
    shades = [point.get_markerfacecolor() for point in points]
    assert shades == [scale(norm(error)) for error in (1e-3, 0.2, 9.0)]
    assert [text.get_text() for text in axes.texts] == ["none", "recompute", "iexact"]
    record(tmp_path / "alone")
    assert draw_cost({"a": read_report([tmp_path / "alone"]).results.rows}) is None


def test_names_stand_beside_their_points_and_apart(tmp_path):
    pytest.importorskip("matplotlib")
    names = ("none", "iexact", "int4", "lowrank", "actnn", "velora", "dropit", "prac")
    for number, name in enumerate(names):
        close = 10 * 1.05**number, (0.9 + 0.001 * number,)
        record(tmp_path / name, compression=asdict(preset(name)), saved_mib=close[0], scores=close[1], runs=1)
    record(tmp_path / "offload", compression=asdict(preset("offload")), saved_mib=0.0, runs=1)  # has no place there
    (axes, *_) = draw_pareto({"a": read_report([tmp_path]).results.rows}).axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert {text.get_text() for text in axes.texts} == set(names)
    assert not [one for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
    panel = axes.get_window_extent()
    assert all(panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1 for box in boxes)


def test_a_compression_looks_the_same_in_every_figure(tmp_path):
    names = ("lowrank", "lowrank_v1", "none", "iexact", "exact")
    for name in names:
        record(tmp_path / name, compression=asdict(preset(name)))
    record(tmp_path / "rank", compression=asdict(preset("lowrank_v1", rank=16)))
    rows = read_report([tmp_path]).results.rows
    once, again = Looks(), Looks()
    assert [once.of(row) for row in rows] == [again.of(row) for row in reversed(rows)][::-1]
    low_rank = [once.of(row) for row in rows if row.labels["compression"].startswith("low rank")]
    assert len(low_rank) == 3 and len(set(low_rank)) == 3 and len({look.colour for look in low_rank}) == 1
    slow, fast = ({"training": {"lr": rate}} for rate in (0.1, 0.2))
    for number, fields in enumerate((slow, fast)):
        record(tmp_path / "b" / str(number), **fields)
    other = Looks()
    assert len({other.of(row) for row in read_report([tmp_path / "b"]).results.rows}) == 2
