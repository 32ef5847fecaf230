"""The scripts run as they are documented, on small inputs."""

from __future__ import annotations

import ast
import math
import os
import tempfile
import time
import types

import pandas as pd
import pytest
import torch

import commands
from conftest import REPOSITORY
from iexact_runner.kernels import reference
from iexact_runner.report import tables
from iexact_runner.report.reading import read_report
from recorded import edit_summary, record


def script(name, *arguments, cwd):
    (path,) = (REPOSITORY / "scripts").glob(f"*/{name}")
    return commands.run(path, *arguments, cwd=cwd)


def test_epoch_benchmark_takes_ratios_within_rounds(tmp_path):
    result = script("bench_epoch.py", "--dataset", "digits", "--rounds", 3, "--csv", "epoch.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv(tmp_path / "epoch.csv").set_index("preset")
    assert set(rows.index) >= {"baseline", "none", "exact", "iexact"}
    assert rows.loc["baseline", "ratio_median"] == 1.0
    assert (rows["ratio_p20"] <= rows["ratio_p80"]).all() and (rows["seconds_median"] > 0).all()
    assert rows.loc["baseline", "peak_ratio"] == 1.0
    assert (rows["peak_mib"] > rows["resident_mib"] + rows["saved_mib"]).all()
    assert rows.loc["lowrank", "saved_mib"] < rows.loc["iexact", "saved_mib"] < rows.loc["baseline", "saved_mib"] / 10
    assert rows["torch"].nunique() == 1 and rows["device_name"].notna().all()


def test_low_rank_benchmark_runs_on_digits(tmp_path):
    """All but the step on synthetic_arxiv, in small: gradients fresh and stale, paired repeats, and their tables."""
    options = ("--parts", "gradient", "accuracy", "--scale", 0.05, "--epochs", 1, 2, "--out", "out")
    result = script("bench_lowrank.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "refresh 5" in result.stdout and "difference to" in result.stdout
    assert len(list(tmp_path.glob("out/*/*/summary.json"))) == 10


@pytest.mark.parametrize("model", ["gcn", "gcn2", "gat"])
def test_epoch_benchmark_has_a_baseline_for_every_model(tmp_path, model):
    result = script("bench_epoch.py", "--dataset", "digits", "--model", model, "--rounds", 2, cwd=tmp_path)
    assert result.returncode == 0 and "baseline" in result.stdout, result.stderr


def test_kernel_benchmark_prints_the_promised_ratio(tmp_path):
    pytest.importorskip("numba")
    result = script("bench_kernels.py", "--rows", 1000, "--repeats", 2, "--csv", "kernels.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "INT2 quantize + decode" in result.stdout
    rows = pd.read_csv(tmp_path / "kernels.csv").set_index("kernel")
    assert rows.loc["copy to existing", "ratio_to_copy_existing"] == 1.0 and "relu_dropout" in rows.index


def test_distribution_of_activations_is_compared_map_by_map(tmp_path):
    options = ("--epochs", 3, "--bits", 2, "--csv", "maps.csv")
    result = script("activation_distribution.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv(tmp_path / "maps.csv")
    assert rows["setting"].value_counts().to_dict() == {
        "exact": 8,
        "iexact": 8,
        "not projected": 6,
        "adaptive directions": 2,
    }
    assert set(rows["map"]) == {"layer input", "aggregated map", "BatchNorm input", "coefficients"}
    hidden = rows[(rows["setting"] == "iexact") & ~rows["layer"].str.startswith("blocks.0")]
    assert (hidden["js_clipped_normal"] < hidden["js_uniform"]).all() and (hidden["optimal_reduction"] > 0).all()
    assert rows["scipy"].notna().all()


def test_level_benchmark_times_the_search_and_the_kernels(tmp_path):
    result = script("bench_levels.py", "--rows", 1000, "--repeats", 2, "--csv", "levels.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv(tmp_path / "levels.csv").set_index("what")
    assert rows.loc["copy of the map", "ratio_to_copy"] == 1 and (rows["milliseconds_median"] > 0).all()
    assert {"levels int2, d 4 to 2048", "levels int8, one d", "quantize int8, best"} <= set(rows.index)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU is told")
def test_gpu_suite_says_at_once_what_is_missing(tmp_path):
    pytest.importorskip("triton")
    result = script("gpu_suite.py", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == "gpu_suite: no CUDA device was found\n"


def test_gpu_suite_notices_a_difference(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    import gpu_suite

    device = torch.device("cpu")
    assert gpu_suite.check_parity(reference, device, tmp_path, max_seconds=0.0)
    rows = pd.read_csv(tmp_path / "gpu_parity.csv")
    assert rows.loc[0, "differences"] == 0 and 0 < rows.loc[0, "compared"] < rows.loc[0, "of"]
    exact = reference.dropout
    monkeypatch.setattr(reference, "dropout", lambda x, **options: exact(x, **options) if x.numel() != 111 else x + 1)
    broken = types.ModuleType("broken")
    vars(broken).update({name: value for name, value in vars(reference).items() if not name.startswith("__")})
    monkeypatch.setattr(reference, "dropout", exact)
    assert not gpu_suite.check_parity(broken, device, tmp_path, max_seconds=0.0)


def test_a_step_that_differs_between_devices_is_named(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    import gpu_steps

    agreeing = {"loss_gpu": 2.5, "loss_cpu": 2.50001, "gradient_difference": 1e-6}
    agreeing |= {"gradient_error_gpu": 0.5, "gradient_error_cpu": 0.45}
    assert gpu_steps.problem_of(agreeing) == ""
    differing = {"loss_gpu": 2.51, "gradient_difference": 0.01, "gradient_error_gpu": 0.7}
    for name, value in differing.items():
        for wrong in (value, float("nan")):
            assert gpu_steps.problem_of(agreeing | {name: wrong})
    epoch = {"loss_gpu": 2.5, "loss_cpu": 2.50001}
    assert gpu_steps.problem_of(epoch) == "" and gpu_steps.problem_of(epoch | {"loss_gpu": 2.51})


def test_steps_and_epochs_of_mini_batches_are_compared_between_devices(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    import gpu_steps

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_steps, "COMPARED", {name: gpu_steps.COMPARED[name] for name in ("recompute, offloaded",)})
    monkeypatch.setattr(gpu_steps, "SAMPLERS", ("cluster",))
    monkeypatch.setattr(gpu_steps, "BATCH_PRESETS", ("exact",))
    device = torch.device("cpu")
    rows = gpu_steps.compare_steps(device, models=["sage"]) + gpu_steps.compare_epochs(device)
    assert [(row["preset"], row["problem"]) for row in rows] == [("recompute, offloaded", ""), ("exact, cluster", "")]
    assert all(math.isfinite(row["loss_gpu"]) for row in rows)


def test_gpu_suite_times_epochs_until_its_deadline(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    import gpu_suite

    for deadline in (time.monotonic() + 600, 0.0):
        options = {"rounds": 2, "deadline": deadline, "datasets": ("digits",), "models": ("sage",)}
        gpu_suite.time_epochs(torch.device("cpu"), tmp_path / str(deadline), **options)
    assert "left out, the time is up" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/gpu_epochs.csv")
    rows = pd.read_csv(path)
    assert "iexact" in rows["preset"].tolist() and rows["ratio_median"].notna().all()


def test_check_of_the_tables_notices_a_wrong_cell(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "checks"))
    import quick_experiments

    for job, scheme in enumerate(({}, {"col_size": 64})):
        edit_summary(record(tmp_path / str(job), compression=scheme, saved_mib=1.5 + job), fidelity=None)
    text = tables.markdown(read_report([tmp_path]).grids(title="results")[0])
    assert list(quick_experiments.differences(text, tmp_path)) == []
    for right, wrong in (("91.00 ± 1.41", "91.01 ± 1.41"), ("| 2.50 |", "| 2.51 |"), ("4.00 (3.50", "4.01 (3.50")):
        assert right in text
        found = list(quick_experiments.differences(text.replace(right, wrong), tmp_path))
        assert found and all("the runs say" in problem for problem in found)
    fewer = "\n".join(line for line in text.splitlines() if "G = 64" not in line)
    assert list(quick_experiments.differences(fewer, tmp_path))[0] == "1 rows for 2 configurations"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
def test_killed_runs_end_with_the_numbers_of_those_left_alone(tmp_path):
    variants = ("--variants", "FP32", "lowrank")
    result = script("kill_campaign.py", "--kills", 6, "--seed", 3, *variants, "--csv", "kills.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = pd.read_csv(tmp_path / "kills.csv")
    assert rows["kills"].sum() >= 6 and rows["lost"].sum() == 0 and (rows["survived"] == rows["tried"]).all()
    assert (rows["in training"] > 0).all()


def test_soak_watches_memory_and_files(tmp_path):
    result = script("soak.py", "--epochs", 60, "--every", 10, "--compression", "none", "--csv", "s.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "open files" in result.stdout and (pd.read_csv(tmp_path / "s.csv")["resident_mib"] > 50).all()


def test_ranks_benchmark_has_a_row_for_each_process(tmp_path):
    fields = ("dataset=digits", "model=gcn", "compression=lowrank", "parallel.partition=label_propagation")
    result = script("bench_ranks.py", "--processes", 1, 2, "--epochs", 3, "--csv", "r.csv", *fields, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv(tmp_path / "r.csv")
    assert list(rows["processes"]) == [1, 2, 2] and list(rows["parts"]) == [2, 2, 2]
    assert rows["halo"][0] == 0 and (rows["halo"][1:] > 0).all()
    # What is kept is counted exactly; the resident peak of so small a graph is mostly the allocator's.
    assert (rows["saved_mib"][1:] < rows["saved_mib"][0]).all() and (rows["peak_of_one"] > 0).all()


def test_messages_benchmark_compares_gradients(tmp_path):
    fields = ("dataset=digits", "model=gcn", "parallel.partition=label_propagation")
    words = (REPOSITORY / "scripts" / "bench" / "bench_messages.py", "--epochs", "2", "--draws", "2", "--csv", "m.csv")
    for command in commands.start_ranks(2, *words, *fields, cwd=tmp_path):
        _, stderr = command.communicate(timeout=300)
        assert command.returncode == 0, stderr
    rows = pd.read_csv(tmp_path / "m.csv")
    half, tenth = (rows[rows["halo_sample"] == share].iloc[0] for share in (0.5, 0.1))
    assert 0 < half["relative_error"] < tenth["relative_error"] and tenth["share_of_fp32"] < half["share_of_fp32"] < 0.6
    whole = rows["halo_sample"] == 1.0
    delta = rows[whole & rows["delta"]].set_index(["forward", "backward"])
    rows = rows[whole & ~rows["delta"]].set_index(["forward", "backward"])
    both = ("int4", "int4")
    assert 0 < delta["relative_error"][both] < 2 and delta["sent_mib"][both] == rows["sent_mib"][both]
    assert rows.loc[("fp32", "fp32"), "relative_error"] == 0
    error, sent = rows["relative_error"], rows["sent_mib"]
    assert 0 < error["int8", "int8"] < error["int4", "int4"] < error["int2", "int2"] < 2
    assert sent["int2", "int2"] < sent["int4", "int4"] < sent["int8", "int8"] < sent["bf16", "bf16"]
    assert sent["bf16", "bf16"] == sent["fp32", "fp32"] / 2 and 0 < error["lowrank", "int4"] < 2


def test_message_accuracy_benchmark_pairs_repeats(tmp_path):
    fields = ("dataset=digits", "model=gcn", "parallel.partition=label_propagation", "--epochs", 3, "--runs", 2)
    options = ("--csv", "a.csv", "--messages", "fp32/fp32", "int8/int8/delta")
    result = script("bench_message_accuracy.py", *fields, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv(tmp_path / "a.csv").set_index(["forward", "backward"])
    assert rows["difference_mean"]["fp32", "fp32"] == pytest.approx(0, abs=0.01) and len(rows) == 2
    assert list(rows["delta"]) == [False, True]
    assert (rows["repeats"] == 2).all() and rows["one_process_mean"].nunique() == 1


def test_growth_benchmark_fits_exponents(tmp_path):
    result = script("bench_growth.py", "--powers", 10, 12, "--steps", 1, "--csv", "g.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv(tmp_path / "g.csv")
    assert list(rows["nodes"]) == [1024, 2048, 4096] and rows["peak_mib"].is_monotonic_increasing
    (slope,) = rows["peak_mib_exponent"].unique()
    assert 0.5 < slope < 1.2 and "exponent" in result.stdout


def test_checkpoint_benchmark_measures_the_share(tmp_path):
    result = script("bench_checkpoint.py", "--jobs", "digits", "--epochs", 30, "--csv", "c.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    row = pd.read_csv(tmp_path / "c.csv").loc[0]
    assert 0 <= row["checkpoint_seconds"] < row["seconds"] and row["job"] == "digits"


def test_rows_measured_again_are_held_to_the_spread_of_the_committed_ones(tmp_path):
    committed = REPOSITORY / "benchmarks" / "epoch_cpu.csv"
    rows = pd.read_csv(committed)

    def compared(changed):
        changed.to_csv(tmp_path / "again.csv", index=False)
        return script("compare_rows.py", committed, "again.csv", cwd=tmp_path)

    same = compared(rows.assign(seconds_median=2 * rows["seconds_median"], git_commit="another").iloc[::-1])
    assert same.returncode == 0 and same.stdout == f"{5 * len(rows)} figures of {len(rows)} rows compared, 0 off\n"
    within = compared(rows.assign(ratio_median=rows["ratio_median"] * 1.09))
    assert within.returncode == 0, within.stdout
    for change, word in (
        ({"saved_mib": rows["saved_mib"] * 1.001}, "saved_mib"),
        ({"ratio_median": rows["ratio_median"] + rows["ratio_p80"] - rows["ratio_p20"] + 0.12}, "ratio_median"),
        ({"model": "other"}, "is not committed"),
    ):
        off = compared(rows.assign(**change).iloc[3:4])
        assert off.returncode == 1 and word in off.stdout and off.stdout.endswith("1 off\n")


def test_every_script_has_its_line():
    text = (REPOSITORY / "scripts" / "README.md").read_text()
    for path in (REPOSITORY / "scripts").glob("*/*.py"):
        first = ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0]
        assert f"| `{path.parent.name}/{path.name}` | {first} |" in text
    assert text.count("| `") == len(list((REPOSITORY / "scripts").glob("*/*.py")))
