"""The figures of ``docs/`` are those of the library and of the committed rows."""

from __future__ import annotations

import itertools
import re

import pandas as pd
import pytest

from conftest import REPOSITORY
from iexact_runner.config import BinsConfig, CompressionConfig
from iexact_runner.tasks.bins import best_bins

BINS = (REPOSITORY / "docs" / "bins.md").read_text()


def test_table_of_block_sizes_is_that_of_the_search():
    two, four, eight = (best_bins(BinsConfig(bits=bits)).set_index("d") for bits in (2, 4, 8))
    for d in (16, 64, 128, 256, 1024, 2048):
        row = two.loc[d]
        reductions = " | ".join(f"{100 * table.loc[d, 'reduction']:.1f} %" for table in (two, four, eight))
        figures = f"{row['levels'][1]:.4f} | {row['variance']:.5f} | {row['uniform_variance']:.5f}"
        assert f"| {d} | {figures} | {reductions} |" in BINS


@pytest.mark.parametrize("dataset", ["amazon_computers", "coauthor_physics"])
def test_measured_variances_stand_in_the_committed_rows(dataset):
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "activation_distribution.csv")
    rows = rows[(rows["dataset"] == dataset) & (rows["bits"] == 2) & (rows["setting"] != "exact")].copy()
    rows.loc[rows["layer"].str.startswith("blocks.0.conv"), "map"] += ", layer 1"
    for (setting, kind), group in rows.groupby(["setting", "map"]):
        mean = group.mean(numeric_only=True)
        figures = " | ".join(
            (
                f"{mean.js_uniform:.3f} | {mean.js_clipped_normal:.3f}",
                f"{mean.uniform_predicted:.3f} / {mean.uniform_measured:.3f}",
                f"{mean.optimal_predicted:.3f} / {mean.optimal_measured:.3f}",
                f"{100 * mean.optimal_reduction:.1f} % | {100 * mean.empirical_reduction:.1f} %",
            )
        )
        assert f"| {setting} | {kind} | {figures} |" in BINS


def test_reductions_at_more_bits_stand_in_the_committed_rows():
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "activation_distribution.csv")
    for setting, bits in itertools.product(("iexact", "exact", "not projected"), (2, 4, 8)):
        hidden = rows[(rows["setting"] == setting) & (rows["bits"] == bits) & (rows["dataset"] != "digits")]
        low, high = (100 * figure for figure in hidden["optimal_reduction"].agg(["min", "max"]))
        assert f"| {setting} | {bits} | {low:.1f} % to {high:.1f} % |" in BINS


def test_results_state_the_reduction_of_the_committed_rows():
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "activation_distribution.csv")
    chosen = rows[(rows["setting"] == "iexact") & (rows["bits"] == 2) & (rows["dataset"] == "amazon_computers")]
    low, high = (100 * figure for figure in chosen["optimal_reduction"].agg(["min", "max"]))
    assert f"by {low:.0f} to {high:.0f} %" in (REPOSITORY / "docs" / "results.md").read_text()


RESUME = (REPOSITORY / "docs" / "resume.md").read_text()


def test_costs_of_checkpoints_stand_in_the_committed_rows():
    for _, row in pd.read_csv(REPOSITORY / "benchmarks" / "checkpoint_cpu.csv").iterrows():
        figures = f"{row.seconds:.0f} | {row.checkpoints} | {100 * row.share:.2f} % | {row.bytes:,} |"
        assert f"| {row.job} | {figures}" in RESUME and row.share < 0.01


def test_soak_stands_in_the_committed_rows():
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "soak_cpu.csv")
    epochs, memory, files = (rows.loc[rows["epoch"] >= 100, name] for name in ("epoch", "resident_mib", "files"))
    shown = f"was {memory.iloc[0]:.0f} MiB at epoch {epochs.iloc[0]} and {memory.min():.0f} to {memory.max():.0f}"
    assert shown in RESUME and f"{files.min()} to {files.max()} open files" in RESUME


def test_kill_campaign_stands_in_the_committed_rows():
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "kill_campaign_cpu.csv")
    total = rows[["kills", "in training", "damaged", "tried", "survived", "lost"]].sum()
    killed = f"{total['kills']} kills, {total['in training']} in training, {total['damaged']} damaged checkpoints"
    runs = f"{total['tried']} runs tried, {total['survived']} survived, {total['lost']} lost"
    assert f"{killed}: {runs}" in " ".join(RESUME.split())


def test_what_the_projection_costs_stands_in_the_committed_rows():
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "fidelity_amazon_computers_cpu.csv")
    rows = rows[(rows["compression.bits"] == 2) & (rows["compression.col_size"] == 0)].set_index(
        "compression.kept_frac"
    )
    errors = rows[[f"fidelity.after.{epoch}.relative_error_mean" for epoch in (5, 30, 100)]]
    exact, plain = (f"by {errors.loc[kept].min():.2f} to {errors.loc[kept].max():.2f}" for kept in (0.125, 1.0))
    text = " ".join((REPOSITORY / "docs" / "schemes.md").read_text().split())
    assert f"off {exact} of its length, that of `int2`, the same without projection, {plain}." in text


def test_noise_of_the_unbiased_option_stands_in_the_committed_rows():
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "fidelity_residual_cpu.csv").set_index("compression.residual")
    errors = rows[[f"gradient_error_{epoch}_mean" for epoch in (5, 30, 100)]]
    prac = pd.read_csv(REPOSITORY / "benchmarks" / "fidelity_prac_cpu.csv").set_index("compression.residual")
    assert (prac["saved_mib"] == rows["saved_mib"].loc[prac.index]).all()
    (biased, before_few, before_many), (few, many) = (
        [f"{row.min():.2f}"[1:] + " to " + f"{row.max():.2f}"[1:] for _, row in found[errors.columns].iterrows()]
        for found in (rows, prac)
    )
    text = " ".join((REPOSITORY / "docs" / "lowrank.md").read_text().split())
    assert f"relative error of {few} at k = 8 and {many} at k = 32, where the biased scheme has {biased}." in text
    assert f"Rademacher columns have {before_few} and {before_many} at the same bytes." in text


def test_gradients_and_accuracy_of_the_low_rank_scheme_are_those_of_the_rows():
    text = (REPOSITORY / "docs" / "lowrank.md").read_text()
    fidelity = pd.read_csv(REPOSITORY / "benchmarks" / "fidelity_lowrank_cpu.csv")
    errors = [f"gradient_error_{epoch}_mean" for epoch in (5, 30, 100)]
    for _, row in fidelity.iterrows():
        directions = "fresh" if row["compression.refresh"] == 1 else f"{row['compression.refresh'] - 1} epochs old"
        figures = " | ".join(f"{error:.2f}"[1:] for error in row[errors])
        assert f"| {row['dataset.name']} | {row['compression.rank']:.0f} | {directions} | {figures} |" in text
    paired = pd.read_csv(REPOSITORY / "benchmarks" / "paired_accuracy_cpu.csv").dropna(subset=["test_difference_mean"])
    assert len(paired) == 6
    for name, rows in paired.groupby("dataset.name"):
        first, second = (rows[rows["compression.map_bits"].isna() == old].iloc[0] for old in (True, False))
        figures = " | ".join(
            f"{100 * row['test_difference_mean']:.2f} ± {100 * row['test_difference_interval']:.2f}"
            for row in (first, second)
        )
        counts = f"{first['test_difference_repeats']:.0f} | {first['training.epochs']:.0f}"
        assert f"| {name} | {counts} | {figures} |" in text
        assert abs(second["test_difference_mean"]) < second["test_difference_interval"]
    steps = pd.read_csv(REPOSITORY / "benchmarks" / "epoch_cpu.csv").set_index(["model", "preset"])
    step = steps.loc["sage", "lowrank"]
    time, peak = (f"{step[name]:.2f}"[1:] for name in ("ratio_median", "peak_ratio"))
    assert f"takes {time} of the time of plain PyG in FP32 and {peak} of its peak memory" in text
    amazon = fidelity[(fidelity["dataset.name"] == "amazon_computers") & (fidelity["compression.refresh"] == 1)]
    by_rank = amazon.set_index("compression.rank")[errors]
    low, high = (by_rank.agg(extreme, axis=1).map(lambda error: f"{error:.2f}"[1:]) for extreme in ("min", "max"))
    few, many = (f"{low[rank]} to {high[rank]}" for rank in (8, 16))
    assert f"on Amazon Computers {few} of the gradient at rank 8 and {many} at rank 16" in text
    (products,) = pd.read_csv(REPOSITORY / "benchmarks" / "synthetic_products_cpu.csv").to_dict("records")
    for name in ("saved_mib", "saved_mib_fp32", "peak_resident_mib", "data_mib", "step_peak_mib"):
        assert f"{products[name]:.2f}" in text
    assert f"An epoch took {1 / products['epochs_per_second_median']:.0f} seconds" in text


def test_gradients_of_the_low_rank_presets_are_those_of_the_rows():
    text = (REPOSITORY / "docs" / "lowrank.md").read_text()
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "fidelity_presets_cpu.csv")
    errors = [f"gradient_error_{epoch}_mean" for epoch in (5, 30, 100)]
    presets = {32: "lowrank_small", 48: "lowrank", 80: "lowrank_fine"}
    assert len(rows) == 4 * len(rows[["dataset.name", "model.name"]].drop_duplicates())
    for _, row in rows.iterrows():
        preset = "lowrank_v1" if pd.isna(row["compression.map_bits"]) else presets[row["compression.map_bits"]]
        figures = " | ".join("-" if pd.isna(error) else f"{error:.2f}"[1:] for error in row[errors])
        assert f"| {row['dataset.name']} | {row['model.name']} | {preset} | {row.saved_mib:.3f} | {figures} |" in text


def test_figures_of_a_gpu_are_those_of_the_rows():
    text = (REPOSITORY / "docs" / "gpu.md").read_text()
    rows = REPOSITORY / "benchmarks"
    epochs = pd.read_csv(rows / "gpu_epochs.csv")
    for _, row in epochs[~epochs["preset"].str.contains("refresh")].iterrows():
        times = f"{1e3 * row.seconds_median:.1f} | {row.ratio_median:.2f} ({row.ratio_p20:.2f} to {row.ratio_p80:.2f})"
        sizes = f"{row.saved_mib:.1f} | {row.peak_mib:.0f} | {row.evaluation_peak_mib:.0f} | {row.peak_ratio:.2f}"
        assert f"| {row.model} | {row.preset} | {times} | {sizes} |" in text
    parity = pd.read_csv(rows / "gpu_parity.csv").iloc[0]
    assert f"{parity.compared} of {parity.of} cases" in text and f": {parity.differences} differences" in text
    shared = pd.read_csv(rows / "gpu_parallel.csv")
    exact = shared[(shared["preset"] == "none") & (shared["forward"] == "fp32")]
    most = exact["gradient_error"].max(), shared[shared["preset"] != "none"]["gradient_error"].max()
    assert shared["problem"].isna().all() and len(exact) == 5
    assert f"{most[0]:.1e} of their norm without compression, {most[1]:.1e} under" in " ".join(text.split())
    steps = pd.read_csv(rows / "gpu_steps.csv")
    epochs = steps["gradient_difference"].isna()
    assert (len(steps), epochs.sum(), steps["preset"][~epochs].nunique()) == (100, 15, 17)
    assert steps["problem"][~epochs].isna().all()
    assert f"at most {steps.gradient_difference.max():.1e} of their norm" in text
    apart = (steps["loss_gpu"] / steps["loss_cpu"] - 1).abs()
    assert apart[~steps["preset"].str.startswith("lowrank, ")].max() < 1e-4 and 0.01 < apart.max() < 0.02
    kernels = pd.read_csv(rows / "gpu_kernels.csv")
    large = kernels[kernels["rows"] == kernels["rows"].max()]
    shown = [row for _, row in large.iterrows() if f"| {row.kernel} |" in text]
    assert len(shown) > 20
    for row in shown:
        assert f"| {row.kernel} | {row.microseconds_median:.0f} | {row.share_of_copy_bandwidth:.2f} |" in text
    profile = pd.read_csv(rows / "gpu_profile.csv")
    for (model, preset), found in profile.groupby(["model", "preset"], sort=False):
        figures = [(f"{row.launches}", f"{row.copies_from_host}", f"{row.waits}") for _, row in found.iterrows()]
        assert f"| {model} | {preset} | " + " | ".join(" -> ".join(each) for each in zip(*figures, strict=True)) in text
    captured = pd.read_csv(rows / "gpu_graph.csv")
    assert captured["problem"].isna().all()
    for _, row in captured.iterrows():
        means = [
            row.baseline_milliseconds,
            row.milliseconds,
            row.captured_milliseconds,
            row.captured_milliseconds_median,
        ]
        times = " | ".join(f"{mean:.1f}" for mean in means) + f" | {means[2] / means[0]:.2f}"
        assert f"| {row.model} | {row.preset} | {times} | {row.replays}/{row.epochs} |" in text
    words = " ".join(text.split())
    columns = [f"gradient_error_{epoch}_mean" for epoch in (5, 30, 100)]
    refreshed = pd.read_csv(rows / "fidelity_refresh_cpu.csv")
    fresh = refreshed["compression.refresh"] == 1
    errors = [refreshed[of].groupby("model.name")[columns].first() for of in (~fresh, fresh)]
    for name in ("sage", "gcn", "gcn2", "gat"):
        aged, found = ("/".join(f"{error:.2f}".lstrip("0") for error in of.loc[name]) for of in errors)
        assert f"{name} {aged} in place of {found}" in words
    oldest = [CompressionConfig(scheme="lowrank").oldest_directions("cuda", passes=epoch) for epoch in (5, 30, 100)]
    assert "{}, {} and {} epochs".format(*oldest) in words
    for name, row in captured[captured["preset"] == "lowrank"].set_index("model").iterrows():
        usual, mean = row["captured_milliseconds_median"], row["captured_milliseconds"]
        finding = 7 / 500 / (2 / 20)  # at passes 10, 30, ... 450, where 2 of 20 epochs were measured
        predicted = (usual + finding * (mean - usual)) / row["baseline_milliseconds"]
        assert f"{predicted:.2f}".lstrip("0") + f" of PyG's time in {name}" in words


def test_figures_of_a_gpu_in_the_results_are_those_of_the_rows():
    text = " ".join((REPOSITORY / "docs" / "results.md").read_text().split())
    epochs = pd.read_csv(REPOSITORY / "benchmarks" / "gpu_epochs.csv").set_index(["model", "preset"])
    shares = [f"{100 * epochs.loc[(model, 'iexact'), 'peak_ratio']:.0f}%" for model in ("gat", "gcn2")]
    times = [f"{epochs.loc[(model, 'iexact'), 'ratio_median']:.2f}".lstrip("0") for model in ("gat", "gcn2", "sage")]
    assert f"GAT takes {shares[0]} and GCN2 {shares[1]} of the peak memory" in text
    assert f"at {times[0]} and {times[1]} of its time" in text
    slow = f"{epochs.loc[('sage', 'lowrank'), 'ratio_median']:.2f}"
    graph = pd.read_csv(REPOSITORY / "benchmarks" / "gpu_graph.csv").set_index(["model", "preset"])
    ratios = (graph["captured_milliseconds"] / graph["baseline_milliseconds"]).map(
        lambda ratio: f"{ratio:.2f}".lstrip("0")
    )
    captured = " and ".join(ratios["sage", preset] for preset in ("iexact", "lowrank"))
    assert f"takes {times[2]} of the time under `iexact`, {slow} under `lowrank`, and {captured} where" in text
    plain, lowrank = (epochs.loc[("deepergcn", preset)] for preset in ("baseline", "lowrank"))
    peaks = [f"{row.peak_mib / 1024:.1f}".lstrip("0") for row in (plain, lowrank)]
    time = f"{lowrank.ratio_median:.2f}".lstrip("0")
    assert f"needs {peaks[0]} GiB in plain PyG, and {peaks[1]} GiB and {time} of the time" in text


def test_figures_of_models_without_twins_are_those_of_the_rows():
    text = (REPOSITORY / "docs" / "guides" / "own.md").read_text()
    gpu = pd.read_csv(REPOSITORY / "benchmarks" / "modules_gpu.csv").set_index("way")
    error, times, others = (
        gpu.loc[way, name]
        for way, name in (("int8", "gradient_error"), ("int8", "time_ratio"), ("checkpoint", "time_ratio"))
    )
    words = " ".join((REPOSITORY / "docs" / "guides" / "own.md").read_text().split())
    assert f"errors of {error.min():.3f} to {error.max():.3f} under `int8`" in words
    assert f"take {times.min():.1f} to {times.max():.1f} times as long as FP32's" in words
    assert f"checkpoint`'s {others.min():.1f} to {others.max():.1f} times" in words
    four, eight = (row for _, row in gpu[gpu["model"] == "GPS"].loc[["int4", "int8"]].iterrows())
    shares = [f"{row.saved_share:.2f}"[1:] for row in (four, eight)]
    assert f"keeps {shares[0]} of FP32 under `int4` with an error of {four.gradient_error:.3f}" in words
    assert f"{shares[1]} under `int8` with {eight.gradient_error:.3f}" in words
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "modules_cpu.csv")
    shown = 0
    for model, ways in rows.groupby("model", sort=False):
        found = ways.set_index("way")
        if not {"none", "int4", "int8"} <= set(found.index):
            continue
        shares = [f"{found.loc[way, 'saved_share']:.2f}"[1:] for way in ("int4", "int8")]
        errors = [f"{found.loc[way, 'gradient_error']:.3f}" for way in ("int4", "int8")]
        line = next(line for line in text.splitlines() if line.startswith(f"| {model} |"))
        assert line.startswith(f"| {model} | {found.loc['none', 'saved_mib']:.1f} | {' | '.join(shares)} |")
        assert line.endswith(f"| {' | '.join(errors)} |")
        shown += 1
    assert shown >= 5


def test_mini_batches_stand_in_the_committed_rows():
    text = (REPOSITORY / "docs" / "guides" / "minibatch.md").read_text()
    lines = [re.sub(r"[`|]", " ", line).split() for line in text.splitlines() if line.startswith("| `")]
    schemes = {"none": "FP32", "lowrank": "lowrank", "projected": "iexact"}
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "minibatch_amazon_computers_cpu.csv")
    assert len(rows) == 8
    for _, row in rows.iterrows():
        sampling = ["-"]
        if row["sampler.name"] != "none":
            sampling = [f"{100 * row['sampling_share']:.1f},", f"{100 * row['waiting_share']:.1f}"]
        expected = [
            *(row["sampler.name"], schemes[row["compression.scheme"]], f"{row['training.epochs']}"),
            *(f"{100 * row['test_mean']:.2f}", "±", f"{100 * row['test_std']:.2f}", f"{row['saved_mib']:.2f}"),
            *(f"{row['step_peak_mib']:.2f}", f"{row['seconds_to_best_mean']:.1f}", *sampling),
        ]
        assert expected in lines, expected
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "minibatch_fidelity_cpu.csv")
    assert len(rows) == 6
    for _, row in rows.iterrows():
        errors = [f"{row[f'fidelity.after.20.{part}relative_error_mean']:.2f}" for part in ("", "sampling.", "both.")]
        assert [row["sampler.name"], schemes[row["compression.scheme"]], *errors] in lines
    low, plain = pd.read_csv(REPOSITORY / "benchmarks" / "minibatch_products_cpu.csv").to_dict("records")
    speeds = f"{low['nodes_per_second']:,.0f} nodes/s under `lowrank` and {plain['nodes_per_second']:,.0f} in FP32"
    assert speeds in text and f"peaks at {low['step_peak_mib']:.2f} MiB, FP32 at {plain['step_peak_mib']:.2f}" in text
    assert f"needs {low['peak_resident_mib']:.2f} MiB" in text


def option_cells(row, *, error, seconds):
    """The cells of an option in a table of alternatives."""
    host = f" ({row['offloaded_mib']:.2f} on the host)" if row["offloaded_mib"] else ""
    return [
        "`" + row["option"].replace(", ", "`, `") + "`",
        f"{100 * row['test_mean']:.2f} ± {100 * row['test_std']:.2f}",
        f"{error:.3f}",
        f"{row['saved_mib']:.2f}{host}",
        *(f"{row[name]:.1f}" for name in ("step_peak_mib", "evaluation_peak_mib")),
        seconds,
    ]


def test_alternatives_stand_in_the_committed_rows():
    text = (REPOSITORY / "docs" / "guides" / "alternatives.md").read_text()
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if " | " in line]
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "alternatives_amazon_computers_cpu.csv")
    assert len(rows) == 18 and rows["option"].is_unique
    for _, row in rows.iterrows():
        errors = [row[f"fidelity.after.30.{part}relative_error_mean"] for part in ("both.", "")]
        error = next(error for error in errors if error == error)
        expected = option_cells(row, error=error, seconds=f"{1 / row['epochs_per_second_median']:.2f}")
        assert expected in lines, expected
    on_gpu = {
        name: pd.read_csv(REPOSITORY / "benchmarks" / f"alternatives_{name}_gpu.csv")
        for name in ("synthetic_arxiv", "coauthor_physics")
    }
    assert [rows["option"].nunique() for rows in on_gpu.values()] == [18, 17]
    for _, row in pd.concat(on_gpu).iterrows():
        milliseconds = f"{1000 / row['epochs_per_second_median']:.1f}"
        expected = option_cells(row, error=row["gradient_error_30_mean"], seconds=milliseconds)
        assert expected in lines, expected
    shown = [line[1:] for line in lines if len(line) == 5 and line[0].startswith(("plain PyG", "`compression="))]
    for device, left_out in (("cpu", ()), ("gpu", ("exact", "iexact", "_v1", "_small", "_fine", "refresh"))):
        rows = pd.read_csv(REPOSITORY / "benchmarks" / f"alternatives_by_hand_{device}.csv")
        for row in rows[[not any(name in preset for name in left_out) for preset in rows["preset"]]].itertuples():
            expected = [
                *(f"{row.saved_mib:.2f}", f"{row.peak_mib:.1f}", f"{row.peak_ratio:.2f}"),
                f"{row.ratio_median:.2f} ({row.ratio_p20:.2f} - {row.ratio_p80:.2f})",
            ]
            assert shown.pop(0) == expected
    assert not shown


def test_figures_of_alternatives_are_those_of_the_rows(monkeypatch):
    """What stands under the pointer: the option, its peak, its time, its error."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "docs"))
    import figures

    text = (REPOSITORY / "docs" / "guides" / "alternatives.md").read_text()
    for place, dataset in (("cpu", "amazon_computers"), ("gpu", "coauthor_physics"), ("gpu", "synthetic_arxiv")):
        drawn = figures.cost_figure(REPOSITORY / "benchmarks" / f"alternatives_{dataset}_{place}.csv")
        shown = (REPOSITORY / "docs" / "figures" / f"cost_{dataset}.svg").read_text()
        found, expected = (re.findall(r"<title>(.*)</title>", figure) for figure in (shown, drawn))
        assert found == expected and len(found) > 15
        assert f"](../figures/cost_{dataset}.svg)" in text


def test_budgets_are_those_of_the_rows():
    """Each row of ``auto``, beside the best preset of at most as many bytes; all rows of the table are some."""
    text = (REPOSITORY / "docs" / "guides" / "budget.md").read_text()
    shown = [line for line in text.splitlines() if line.startswith("| ") and " / " in line and "error" not in line]
    for path in sorted((REPOSITORY / "benchmarks").glob("budget_*.csv")):
        rows = pd.read_csv(path)
        for (dataset, model), found in rows.groupby(["dataset.name", "model.name"]):
            planned = found["compression.scheme"] == "auto"
            for row in found[planned].to_dict("records"):
                budget = row["compression.budget"] * row["saved_mib_fp32"]
                assert row["saved_mib"] <= budget
                fixed = found[~planned & (found["saved_mib"] <= budget)]
                errors = [f"gradient_error_{epochs}_mean" for epochs in (5, 30)]
                own, best = (
                    " / ".join(f"{each:.4f}" for each in part) for part in (map(row.get, errors), fixed[errors].min())
                )
                best = "none fits / none fits" if fixed.empty else best
                share = f"{100 * row['compression.budget']:.0f}"
                line = f"| {dataset} | {model} | {share} | {budget:.2f} | {row['saved_mib']:.2f} | {own} | {best} |"
                assert line in shown, line
                shown.remove(line)
    assert not shown
    planning = pd.read_csv(REPOSITORY / "benchmarks" / "planning_cpu.csv").iloc[0]
    assert f"Planning took {100 * planning.share:.1f} % of the time of {planning.epochs} epochs of GCN" in text


def test_predictions_for_a_larger_graph_are_those_of_the_model(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    import scale

    text = (REPOSITORY / "docs" / "scale.md").read_text().splitlines()
    assert not [line for line in scale.lines() if line not in text]
    rows = scale.measured()
    ratios = rows["modelled"] / rows["measured"]
    assert len(rows) == 4 and 0.9 < ratios.min() and ratios.max() < 1.1


def test_tables_of_several_processes_are_those_of_the_rows():
    lines = (REPOSITORY / "docs" / "guides" / "parallel.md").read_text().splitlines()
    words = " ".join(" ".join(lines).split())
    ranks = pd.read_csv(REPOSITORY / "benchmarks" / "ranks_cpu.csv")
    for (model, scheme, processes), found in ranks.groupby(["model", "scheme", "processes"]):
        assert len(found) == processes
        most = found.loc[found["peak_of_one"].idxmax()]
        figures = f"{most.saved_mib:.2f} | {most.step_peak_mib:.1f} | {most.data_mib:.1f} | {most.peak_of_one:.2f}"
        assert f"| {model} | `{scheme}` | {processes} | {figures} |" in lines
        # The share of the rows and of the halo, with a margin for what every process has.
        assert most.peak_of_one <= 1.15 * (1 / processes + found["halo_share"].max())
    large, parts = (
        pd.read_csv(REPOSITORY / "benchmarks" / f"{name}_products_cpu.csv") for name in ("ranks", "partition")
    )
    found = f"found four parts in {parts.seconds[0]:.0f} seconds and {parts.peak_resident_mib[0] / 1024:.1f} GiB"
    resident, loading = (large[f"{name}peak_resident_mib"].max() / 1024 for name in ("", "loading_"))
    assert found in words and f"more than {resident:.1f} GiB resident, {loading:.1f} GiB while it loaded" in words
    assert 0.6 < large["halo_share"].max() < 0.7 and resident < 3.5
    kills = pd.read_csv(REPOSITORY / "benchmarks" / "kill_ranks_cpu.csv")
    tried, survived, lost = (kills[name].sum() for name in ("tried", "survived", "lost"))
    assert f"{tried} runs tried, {survived} survived, {lost} lost; after" in words
    assert f"others had ended in {kills['longest_seconds'].max():.0f} seconds" in words
    for row in pd.read_csv(REPOSITORY / "benchmarks" / "message_accuracy_cpu.csv").itertuples():
        difference = f"{100 * row.difference_mean:+.2f} ± {100 * row.difference_interval:.2f}"
        kind = f"{row.forward} / {row.backward}{', differences' if row.delta else ''}"
        assert f"| {kind} | {100 * row.test_mean:.2f} | {difference} |" in lines
        assert abs(row.difference_mean) < row.difference_interval
    for row in pd.read_csv(REPOSITORY / "benchmarks" / "network_cpu.csv").itertuples():
        ratio = f"{row.ratio:.2f} ({row.ratio_least:.2f} to {row.ratio_most:.2f})"
        figures = f"{row.epoch_seconds:.2f} | {ratio} | {row.waiting_seconds:.1f}"
        assert f"| {row.forward} / {row.backward} | {figures} |" in lines
    messages = pd.read_csv(REPOSITORY / "benchmarks" / "messages_cpu.csv")
    kinds = ["dropout", "forward", "backward", "halo_sample", "delta"]
    place = lines.index("Without dropout:")
    known = {0.5: set(lines[:place]), 0.0: set(lines[place : lines.index("```bash", place)])}
    unsaid = 0
    for (dropout, forward, backward, share, delta), found in messages.groupby(kinds):
        cells = []
        for _, rows in found.groupby("processes"):
            early, late = (rows.loc[rows["epoch"] == epoch].iloc[0] for epoch in (5, 30))
            cells += [f"{early.relative_error:.3f} / {late.relative_error:.3f}", f"{early.sent_mib:.2f}"]
        part = (", differences" if delta else "") + ("" if share == 1.0 else f", {share:g} of the halo")
        line = f"| {forward} / {backward}{part} | {' | '.join(cells)} |"
        assert line in known[dropout] or dropout == 0.0, line
        unsaid += line not in known[dropout]
    assert sum(line.startswith("| ") and "forward" not in line for line in known[0.0]) == 15 - unsaid
