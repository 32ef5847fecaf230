from __future__ import annotations

import pytest

from iexact_runner.report.grouping import group
from iexact_runner.report.metrics import METRICS, metrics_named
from iexact_runner.report.published import FIGURES
from iexact_runner.runs.records import read_run
from recorded import ENVIRONMENT, FP32, edit_summary, record


def results(tmp_path, *runs, by=(), metrics=()):
    read = [read_run(record(tmp_path / str(index), **run)) for index, run in enumerate(runs)]
    return group(read, metrics_named(metrics, read), by=by)


def test_repeats_are_pooled_over_folders(tmp_path):
    found = results(tmp_path, {"seed": 0, "scores": (0.8, 0.9)}, {"seed": 1, "scores": (1.0,), "output_dir": "other"})
    (row,) = found.rows
    cell = row.cells["test"]
    assert (cell.value, cell.std, cell.repeats) == (pytest.approx(0.9), pytest.approx(0.1), 3)
    assert found.warnings == []


def test_a_sweep_that_was_taken_up_has_no_rows_of_its_own(tmp_path):
    first = {"sweep": {"skip_completed": False}, "checkpoint": {"every": "auto"}, "advise": {"nodes": 16384}}
    again = {"sweep": {"skip_completed": True}, "checkpoint": {"every": 5}, "advise": {"nodes": 20000}, "seed": 1}
    (row,) = results(tmp_path, first, again).rows
    assert list(row.labels) == ["dataset", "model", "compression"]


def test_rows_carry_the_fields_that_tell_them_apart_and_no_others(tmp_path):
    found = results(tmp_path, {"training": {"lr": 0.1}}, {"training": {"lr": 0.2}}, {"compression": FP32})
    assert [row.labels["training.lr"] for row in found.rows] == [0.1, 0.2, 0.01]
    assert list(found.rows[0].labels) == ["dataset", "model", "compression", "training.lr"]
    models = results(tmp_path / "b", {"training": {"lr": 0.1}}, {"training": {"lr": 0.2}, "model": {"name": "gcn"}})
    assert list(models.rows[0].labels) == ["dataset", "model", "compression"]


def test_rates_keep_their_percentiles_and_kept_bytes_have_no_spread(tmp_path):
    (row,) = results(tmp_path, {"rates": (4.0, 3.0, 5.0)}, {"rates": (6.0, 5.0, 7.0), "seed": 1}).rows
    rate, kept = row.cells["epochs_per_second"], row.cells["saved_mib"]
    assert (rate.value, rate.p20, rate.p80) == (5.0, 4.0, 6.0)
    assert (kept.value, kept.std) == (1.5, None)


def test_figures_of_several_tasks_share_a_row(tmp_path):
    measured = {"task": "measure", "runs": 1, "rates": (8.0, 7.0, 9.0)}
    (row,) = results(tmp_path, {}, measured).rows
    assert row.cells["test"].repeats == 2 and row.cells["epochs_per_second"].value == 6.0


def test_a_task_with_epochs_of_its_own_joins_the_row_that_was_trained(tmp_path):
    taken = {"task": "fidelity", "training": {"epochs": 500}}
    (row,) = results(tmp_path, taken, {"training": {"epochs": 50}}).rows
    assert len(row.runs) == 2 and list(row.labels) == ["dataset", "model", "compression"]
    found = results(tmp_path / "b", {"training": {"epochs": 50}}, {"training": {"epochs": 60}}, taken)
    assert [row.labels["training.epochs"] for row in found.rows] == [50, 60, None] and found.warnings == []
    auto = {"compression": {"scheme": "auto"}}  # which spends a share of these epochs on trials
    found = results(tmp_path / "c", taken | auto, {"training": {"epochs": 50}} | auto)
    assert [row.labels["training.epochs"] for row in found.rows] == [500, 50]


def test_rows_of_a_dataset_and_of_a_model_on_it_stand_together(tmp_path):
    runs = [
        {"dataset": {"name": dataset}, "model": {"name": model}, "compression": compression}
        for compression in ({}, FP32)
        for dataset in ("reddit", "arxiv")
        for model in ("sage", "gcn")
    ]
    found = [(row.labels["dataset"], row.labels["model"]) for row in results(tmp_path, *runs).rows]
    pairs = [("reddit", "sage"), ("reddit", "gcn"), ("arxiv", "sage"), ("arxiv", "gcn")]
    assert found == [pair for pair in pairs for _ in range(2)]


@pytest.mark.parametrize("name", ["torch", "device_name", "git_commit", "torch_threads", "iexact_runner"])
def test_mixed_environment_is_flagged(tmp_path, name):
    found = results(tmp_path, {}, {"environment": {name: "another"}, "seed": 1})
    assert found.warnings == [f"mixed {name}: {ENVIRONMENT[name]} (1 of 2 runs), another (1 of 2 runs)"]


def test_row_that_mixes_configurations_is_flagged(tmp_path):
    found = results(tmp_path, {}, {"training": {"lr": 0.5}}, by=["model"])
    assert len(found.rows) == 1
    assert found.warnings == ["one row (sage) mixes training.lr: 0.01, 0.5"]


def test_seed_that_counts_twice_is_flagged(tmp_path):
    (warning,) = results(tmp_path, {"seed": 3}, {"seed": 3}).warnings
    assert "the same seed twice" in warning and str(tmp_path / "0") in warning and str(tmp_path / "1") in warning


def test_epochs_per_second_of_a_shared_device_are_flagged(tmp_path):
    throughput = {"epochs_per_second": {"median": 5.0, "p20": 4.0, "p80": 6.0}}
    runs = []
    for seed, alone in enumerate((True, False, False)):
        folder = record(tmp_path / str(seed), seed=seed)
        edit_summary(folder, throughput=throughput | {"alone": alone})
        runs.append(read_run(folder))
    assert group(runs, [METRICS["epochs_per_second"]], by=["model"]).warnings == [
        "one row (sage) was timed beside other jobs, in 2 of 3 runs"
    ]
    assert group(runs, [METRICS["saved_mib"]], by=["model"]).warnings == []
    assert group(runs[:1], [METRICS["epochs_per_second"]], by=["model"]).warnings == []


def test_any_number_of_a_summary_is_a_metric(tmp_path):
    (row,) = results(tmp_path, {}, metrics=["memory.model_mib", "config.training.lr"]).rows
    assert row.cells["memory.model_mib"].value == 0.2954 and row.cells["config.training.lr"].value == 0.01


def test_gradient_error_has_a_metric_for_each_epoch(tmp_path):
    run = record(tmp_path / "run", task="fidelity")
    edit_summary(run, fidelity={"after": {"30": {"relative_error": 3.0}, "5": {"relative_error": 2.5}}})
    metrics = metrics_named([], [read_run(run)])
    assert [metric.name for metric in metrics][-2:] == ["gradient_error_5", "gradient_error_30"]


@pytest.mark.parametrize(
    "odd", ["x", ["x"], [True], [1e301], {"median": 1.0}, {"median": "a", "p20": 1, "p80": 2}, None, True, 1e301]
)
def test_what_is_no_figure_has_no_cell(tmp_path, odd):
    """Of a path that somebody names any may stand there, in one run this and in the next another."""
    runs = []
    for seed, value in enumerate((2.0, odd, 4)):
        edit_summary(record(tmp_path / str(seed), seed=seed), notes={"n": value})
        runs.append(read_run(tmp_path / str(seed)))
    (row,) = group(runs, metrics_named(["notes.n"], runs), by=()).rows
    assert (row.cells["notes.n"].value, row.cells["notes.n"].repeats) == (3.0, 2)


# Specification, section 5: what the reference logs, and what its layout keeps.
@pytest.mark.parametrize(
    ("col_size", "logged", "formula"),
    [(0, 30.47, 29.72), (2, 27.89, 27.13), (4, 26.59, 25.84), (8, 25.95, 25.19), (16, 25.72, 24.95), (32, 25.60, 24.83),
     (64, 25.56, 24.77)],
)  # fmt: skip
def test_published_memory_stands_beside_the_measured(tmp_path, col_size, logged, formula):
    run = {"dataset": {"name": "arxiv"}, "compression": {"col_size": col_size}}
    (row,) = results(tmp_path, run).rows
    assert row.cells["saved_mib"].published == {"published": logged, "formula": formula}


@pytest.mark.parametrize(("device", "figure"), [("cpu", 910.0), ("cuda:0", 786.0)])
def test_published_fp32_memory_is_that_of_the_device(tmp_path, device, figure):
    run = {"dataset": {"name": "arxiv"}, "compression": FP32, "environment": {"device": device}}
    assert results(tmp_path, run).rows[0].cells["saved_mib"].published == {"formula": figure}


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": {"name": "flickr"}},
        {"model": {"hidden_channels": 64}},
        {"compression": {"bits": 4}},
        {"compression": {"share_maps": True}},
        {"compression": {"col_size": 128}},
    ],
)
def test_published_memory_stands_beside_nothing_else(tmp_path, change):
    run = {"dataset": {"name": "arxiv"}} | change
    assert results(tmp_path, run).rows[0].cells["saved_mib"].published == {}


def test_every_published_figure_is_one_of_a_metric():
    assert {figure.metric for figure in FIGURES} <= set(METRICS)


def test_mini_batches_are_told_apart_by_their_sampler_in_words(tmp_path):
    cluster = {"name": "cluster", "parts": 100, "batch_parts": 10, "partition": "auto"}
    neighbor = {"name": "neighbor", "num_neighbors": [15, 10], "batch_size": 64}
    samplers = {"old": None, "none": {"name": "none"}, "cluster": cluster, "neighbor": neighbor}
    samplers["metis"] = cluster | {"partition": "metis"}
    folders = [
        record(tmp_path / name, seed=seed, **({} if sampler is None else {"sampler": sampler}))
        for seed, (name, sampler) in enumerate(samplers.items())
    ]
    rows = group([read_run(folder) for folder in folders], [METRICS["test"]], by=["sampler", "sampler.partition"]).rows
    assert [row.labels["sampler"] for row in rows] == [
        "full batch",
        "cluster, 10 of 100 parts",
        "neighbor, 64 nodes, [15, 10]",
        "cluster, 10 of 100 parts",
    ]
    two = group([read_run(folders[2]), read_run(folders[4])], [METRICS["test"]], by=[]).rows
    assert [list(row.labels.items())[3:] for row in two] == [
        [("sampler", "cluster, 10 of 100 parts"), ("sampler.partition", method)] for method in ("auto", "metis")
    ]
    (plain,) = group([read_run(folders[1])], [METRICS["test"]], by=[]).rows
    assert "sampler" not in plain.labels
