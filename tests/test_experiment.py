"""Whole runs on the embedded graph: what is recorded, also when a run fails or is interrupted."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from conftest import tiny_dataset
from iexact_runner import experiment
from iexact_runner.cli import compose_config
from iexact_runner.errors import ConfigError, TrainingError
from iexact_runner.experiment import Experiment, resolve_device
from iexact_runner.runs import devices
from iexact_runner.runs.records import RunFolder
from iexact_runner.tasks import train

QUICK = ("training.epochs=4", "model.hidden_channels=16", "measure.timed_epochs=3", "measure.warmup_epochs=1")


def run(path, *overrides, terminal=False):
    screen = io.StringIO()
    config = compose_config(*QUICK, *overrides)
    Experiment(config, RunFolder(path), Console(file=screen, force_terminal=terminal, width=160)).run("the: config\n")
    return read(path), screen.getvalue()


def read(path):
    summary = json.loads((path / "summary.json").read_text())
    metrics = path / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return summary, lines


@pytest.mark.parametrize("model", ["sage", "gcn", "gcn2", "gat"])
def test_every_model_trains_in_fp32(tmp_path, model):
    (summary, lines), _ = run(tmp_path, f"model={model}", "compression=plain", "model.num_layers=2")
    assert summary["status"] == "completed" and len(lines) == 4
    assert summary["memory"]["saved_mib"] == summary["memory"]["saved_mib_fp32"] > 0


def test_records_of_a_training_run(tmp_path):
    (summary, lines), screen = run(tmp_path, "runs=3", "seed=5")
    assert (tmp_path / "config.yaml").read_text() == "the: config\n"
    assert set(summary) == {
        "schema_version",
        "status",
        "error",
        "resumed",
        "config",
        "environment",
        "accuracy",
        "memory",
        "throughput",
        "fp32",
        "batches",
        "fidelity",
        "energy",
        "distribution",
        "inspection",
        "advice",
        "plans",
        "parallel",
    }
    assert (summary["schema_version"], summary["status"], summary["error"]) == (1, "completed", None)
    assert summary["config"]["compression"]["bits"] == 2 and summary["config"]["seed"] == 5

    assert [(line["run"], line["epoch"]) for line in lines] == [(r, e) for r in range(3) for e in range(1, 5)]
    assert set(lines[0]) == {"run", "epoch", "loss", "train", "val", "test", "seconds", "time"}
    accuracy = summary["accuracy"]
    assert accuracy["metric"] == "accuracy" and len(accuracy["test"]["values"]) == 3
    for index in range(3):  # the test score at the best validation epoch, the first of equals
        epochs = [line for line in lines if line["run"] == index]
        best = max(epochs, key=lambda line: line["val"])
        assert accuracy["test"]["values"][index] == best["test"]
        assert accuracy["val"]["values"][index] == best["val"]
    mean = sum(accuracy["test"]["values"]) / 3
    assert accuracy["test"]["mean"] == pytest.approx(mean)
    assert lines[0]["loss"] != lines[4]["loss"]  # runs differ in their seed

    memory = summary["memory"]
    assert set(memory) == {
        "saved_mib",
        "offloaded_mib",
        "saved_mib_fp32",
        "loss_mib",
        "step_peak_mib",
        "evaluation_peak_mib",
        "data_mib",
        "model_mib",
        "peak_allocated_mib",
        "peak_reserved_mib",
        "peak_resident_mib",
        "reference_activation_mib",
        "tensors",
    }
    assert sum(tensor["bytes"] for tensor in memory["tensors"]) / 2**20 == pytest.approx(memory["saved_mib"])
    assert set(memory["tensors"][0]) == {"layer", "op", "shape", "dtype", "bytes_fp32", "bytes", "host_bytes"}
    if not torch.cuda.is_available():
        assert memory["peak_allocated_mib"] is memory["reference_activation_mib"] is None
    parameters = 2 * 64 * 16 + 16 + 2 * 16 * 16 + 16 + 2 * 16 * 10 + 10 + 2 * 2 * 16
    buffers = 4 * (2 * 2 * 16) + 2 * 8
    assert memory["model_mib"] == pytest.approx((4 * parameters + buffers) / 2**20)
    assert memory["loss_mib"] == 0.0  # nothing but the output

    fp32 = summary["fp32"]
    assert fp32["step_peak_mib"] > memory["saved_mib_fp32"] and 1 <= fp32["timed_epochs"] <= 5
    assert fp32["evaluation_peak_mib"] == pytest.approx(memory["evaluation_peak_mib"], rel=0.05)

    throughput = summary["throughput"]
    assert throughput["timed_epochs"] == 3 * (4 - 1) and throughput["warmup_epochs"] == 1
    rates = throughput["epochs_per_second"]
    assert 0 < rates["p20"] <= rates["median"] <= rates["p80"]
    environment = summary["environment"]
    assert environment["torch"] == torch.__version__ and environment["compression_backend"]
    assert {"python", "torch_geometric", "triton", "git_commit", "device_name", "cpu_count"} <= set(environment)
    assert "run 3/3" in screen and "saved" in screen and "epochs/s" in screen


def test_memory_of_a_job_does_not_show_the_jobs_before_it(tmp_path, monkeypatch):
    (alone, _), _ = run(tmp_path / "alone")
    (large, _), _ = run(tmp_path / "large", "model.hidden_channels=256")
    monkeypatch.setattr(train, "record", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "failed", "model.hidden_channels=256")
    monkeypatch.undo()
    (after, _), _ = run(tmp_path / "after")
    for name in ("step_peak_mib", "peak_allocated_mib", "peak_reserved_mib", "saved_mib", "tensors"):
        assert after["memory"][name] == alone["memory"][name]
    assert large["memory"]["step_peak_mib"] > 4 * alone["memory"]["step_peak_mib"] > 0


@pytest.mark.parametrize("task", ["train", "measure"])
def test_record_says_whether_others_used_the_device(tmp_path, monkeypatch, task):
    monkeypatch.setattr(devices, "lock_folder", lambda: tmp_path)
    (alone, _), _ = run(tmp_path / "alone", f"task={task}")
    other = devices.device_lock(resolve_device("auto"), announce=pytest.fail)

    def make_way(device, *, announce, helper):
        return devices.device_lock(device, announce=lambda line: (announce(line), other.__exit__(None, None, None)))

    monkeypatch.setattr(experiment, "device_lock", make_way)
    with other:
        (shared, _), screen = run(tmp_path / "shared", f"task={task}")
    assert alone["throughput"]["alone"] is True
    assert shared["throughput"]["alone"] is (task == "measure")
    assert ("waiting for" in screen) is (task == "measure")


def test_same_seed_same_numbers(tmp_path):
    def losses(name, *overrides):
        return [line["loss"] for line in run(tmp_path / name, *overrides)[0][1]]

    assert losses("a") == losses("b") != losses("c", "seed=1")
    assert losses("d", "compression=none") == losses("e", "compression=none")


def test_the_caller_keeps_its_random_state(tmp_path):
    state = torch.random.get_rng_state()
    run(tmp_path, "compression=none")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_measure_lists_tensors_and_times_epochs(tmp_path):
    (summary, lines), screen = run(tmp_path, "task=measure")
    assert summary["status"] == "completed" and summary["accuracy"] is None and not lines
    assert summary["throughput"]["timed_epochs"] == 3
    assert "saved for the backward pass" in screen and "BatchNorm" in screen and "int2" in screen


def test_terminal_gets_a_live_bar_and_a_pipe_plain_lines(tmp_path):
    _, live = run(tmp_path / "live", terminal=True)
    _, plain = run(tmp_path / "plain")
    assert "\x1b[" in live and "━" in live
    assert "\x1b[" not in plain and "epoch 4/4" in plain


def test_loss_that_explodes_is_recorded_as_failed(tmp_path, monkeypatch):
    finite = train.train_epochs

    def explodes(*args, **kwargs):
        yield from list(finite(*args, **kwargs))[:2]
        raise TrainingError(f"the training loss is {math.nan} at epoch 3")

    monkeypatch.setattr(train, "train_epochs", explodes)
    with pytest.raises(TrainingError):
        run(tmp_path)
    summary, lines = read(tmp_path)
    assert summary["status"] == "failed" and summary["error"] == "the training loss is nan at epoch 3"
    assert len(lines) == 2 and summary["memory"]["saved_mib"] > 0
    assert summary["accuracy"]["test"] == {"mean": None, "std": None, "values": []}


def test_learning_rate_that_explodes_ends_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"(at|after) epoch \d+"):
        run(tmp_path, "training.lr=1e30", "training.grad_norm=null", "compression=none", "model.batch_norm=false")
    assert read(tmp_path)[0]["status"] == "failed"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), "interrupted", "interrupted by the user"),
        (ZeroDivisionError("x"), "failed", "ZeroDivisionError: x"),
    ],
    ids=["interrupt", "bug"],
)
def test_what_was_recorded_before_the_end_is_kept(tmp_path, monkeypatch, error, status, text):
    finite = train.train_epochs
    calls = []

    def stops_in_the_second_run(*args, **kwargs):
        calls.append(1)
        epochs = list(finite(*args, **kwargs))
        yield from epochs if len(calls) == 1 else epochs[:2]
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(train, "train_epochs", stops_in_the_second_run)
    with pytest.raises(type(error)):
        run(tmp_path, "runs=3")
    summary, lines = read(tmp_path)
    assert (summary["status"], summary["error"]) == (status, text)
    assert len(lines) == 6 and len(summary["accuracy"]["test"]["values"]) == 1


def test_last_step_that_ruins_the_weights_is_not_completed(tmp_path):
    with pytest.raises(TrainingError, match="after epoch 1"):
        run(tmp_path, "training.lr=1e30", "training.epochs=1", "training.grad_norm=null", "model.batch_norm=false")
    assert read(tmp_path)[0]["status"] == "failed"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("compression.share_maps=true",),
        ("model.dropout=0",),
        ("model.input_dropout=.3",),
        ("compression.share_maps=true", "model.num_layers=1"),
        ("compression.store_dropout_mask=false", "dataset.inductive=true"),
    ],
    ids=lambda overrides: " ".join(overrides) or "published layout",
)
def test_fp32_figure_of_a_compressed_run_is_what_fp32_keeps(tmp_path, overrides):
    plain = [override for override in overrides if not override.startswith("compression.")]
    (compressed, _), _ = run(tmp_path / "a", "task=measure", *overrides)
    (fp32, _), _ = run(tmp_path / "b", "task=measure", "compression=plain", *plain)
    assert compressed["memory"]["saved_mib_fp32"] == fp32["memory"]["saved_mib"] > 0


def test_multilabel_data_refuse_a_loss_that_would_be_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "load_dataset", lambda _: tiny_dataset(multilabel=True))
    with pytest.raises(ConfigError, match="training.loss=log_cross_entropy"):
        run(tmp_path, "training.loss=log_cross_entropy")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"device={name}: no CUDA device was found"):
            resolve_device(name)
    for name in ("tpu", "cuda:x", "cuda:-1", ""):
        with pytest.raises(ConfigError, match="must be auto, cpu, cuda or cuda:N"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda" and resolve_device("cuda:1").index == 1
    with pytest.raises(ConfigError, match="device=cuda:2: 2 CUDA devices were found"):
        resolve_device("cuda:2")


def test_offloading_stands_beside_fp32_on_the_device(tmp_path):
    (summary, _), screen = run(tmp_path, "compression=offload", "model.hidden_channels=64")
    memory = summary["memory"]
    assert memory["saved_mib"] < 0.2 * memory["offloaded_mib"] and summary["fp32"]["step_peak_mib"] > 0
    (there, _), _ = run(tmp_path / "there", "compression=none", "model.hidden_channels=64")
    assert memory["saved_mib"] + memory["offloaded_mib"] == pytest.approx(there["memory"]["saved_mib"])
    assert "offloaded" in screen


@pytest.mark.parametrize("override", ["measure.fp32=false", "compression=none", "task=fidelity"])
def test_fp32_is_left_out_where_it_is_not_asked_for(tmp_path, override):
    quick = ("fidelity.epochs=[1]", "fidelity.draws=2")
    (summary, _), _ = run(tmp_path, override, *(quick if override == "task=fidelity" else ()))
    assert summary["fp32"] is None and summary["memory"]["evaluation_peak_mib"] > 0


@pytest.mark.parametrize("sampler", ["cluster", "saint_node", "neighbor"])
@pytest.mark.parametrize("task", ["train", "measure", "fidelity", "inspect", "advise", "distribution"])
def test_every_task_works_on_mini_batches(tmp_path, monkeypatch, task, sampler):
    monkeypatch.chdir(tmp_path)  # where a partition is kept
    small = ("model.hidden_channels=16", "training.epochs=2", "measure.timed_epochs=3", "fidelity.epochs=[1]")
    config = compose_config("dataset=digits", f"task={task}", f"sampler={sampler}", *small, "fidelity.draws=3")
    screen = io.StringIO()
    summary = Experiment(config, RunFolder(tmp_path / "run"), Console(file=screen, width=200)).run("the: config\n")
    assert summary["status"] == "completed"
    batches = summary["batches"]
    if task in ("inspect", "advise"):
        assert batches is None
        return
    assert batches["nodes"]["p50"] <= batches["nodes"]["p95"] <= batches["nodes"]["max"] <= 1797
    assert summary["memory"]["saved_mib"] == pytest.approx(batches["saved_mib"]["max"])
    assert (batches["partition"] is not None) == (sampler == "cluster")
    if sampler == "cluster":  # edges within a part are in an epoch, and some of those between parts
        assert 1 - batches["partition"]["edge_cut"] < batches["edges_share"] < 1
    if task in ("train", "measure"):
        assert 0 <= batches["waiting_share"] <= 1 and batches["nodes_per_second"] > 0
        assert summary["fp32"]["step_peak_mib"] > summary["memory"]["step_peak_mib"]
        assert "an epoch" in screen.getvalue() and "nodes/s" in screen.getvalue()
    if task == "fidelity":
        assert {"sampling", "both"} < set(summary["fidelity"]["after"]["1"])
        assert "sampling and compression" in screen.getvalue()


def test_a_module_of_the_users_trains_on_mini_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose_config(
        "dataset=digits", "sampler=neighbor", "compression=lowrank", "training.epochs=8", "model=module",
        "model.target=torch_geometric.nn:GraphSAGE", "model.hidden_channels=16", "model.num_layers=2",
    )  # fmt: skip
    summary = Experiment(config, RunFolder(tmp_path / "run"), Console(file=io.StringIO())).run("the: config\n")
    assert summary["status"] == "completed" and summary["accuracy"]["test"]["mean"] > 0.5
