"""What TensorBoard and MLflow are told equals the records of the run."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from iexact_runner import loggers
from iexact_runner.cli import compose_config
from iexact_runner.config import LOGGERS
from iexact_runner.errors import ConfigError
from iexact_runner.experiment import Experiment
from iexact_runner.runs.records import RunFolder
from iexact_runner.training import Epoch, Scores


def run(path, *overrides):
    config = compose_config("training.epochs=3", "model.hidden_channels=8", "runs=2", *overrides)
    Experiment(config, RunFolder(path), Console(file=io.StringIO())).run("a: b\n")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((path / "summary.json").read_text())


def test_by_default_there_are_only_the_records(tmp_path):
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl", "summary.json"]


def test_tensorboard_has_every_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines, summary = run(tmp_path, "logger=tensorboard")
    for repeat in (0, 1):
        events = EventAccumulator(str(tmp_path / "tensorboard" / f"run_{repeat}")).Reload()
        for name in ("loss", "train", "val", "test"):
            logged = {event.step: event.value for event in events.Scalars(name)}
            recorded = {line["epoch"]: line[name] for line in lines if line["run"] == repeat}
            assert logged == pytest.approx(recorded)
        assert events.Scalars("saved_mib")[0].value == pytest.approx(summary["memory"]["saved_mib"])


def test_tensorboard_has_the_epochs_of_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for session, epochs in enumerate((range(1, 6), range(4, 8))):
        logger = loggers.TensorBoardLogger(tmp_path)
        for number in epochs:
            logger.log(0, Epoch(number, loss=10.0 * session + number, seconds=0.1, scores=Scores(0.5, 0.5, 0.5)))
        logger.close({"memory": None, "throughput": None})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run_0")).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6, 7]
    assert [event.value for event in events] == [1, 2, 3, 14, 15, 16, 17]


def test_mlflow_has_every_epoch_and_the_configuration(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines, summary = run(tmp_path / "out" / "run", "logger=mlflow", f"output_dir={tmp_path / 'out'}")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("iexact").experiment_id
    found = {logged.info.run_name: logged for logged in client.search_runs([experiment])}
    assert sorted(found) == ["run/0", "run/1"]
    for repeat in (0, 1):
        logged = found[f"run/{repeat}"]
        assert logged.info.status == "FINISHED" and logged.data.params["compression.bits"] == "2"
        losses = {metric.step: metric.value for metric in client.get_metric_history(logged.info.run_id, "loss")}
        assert losses == pytest.approx({line["epoch"]: line["loss"] for line in lines if line["run"] == repeat})
        assert logged.data.metrics["saved_mib"] == pytest.approx(summary["memory"]["saved_mib"])


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow"), ("mlflow", "alembic")]
)
def test_missing_package_is_one_line_before_anything_runs(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as error:
        run(tmp_path, f"logger={name}")
    assert f"logger={name}: needs " in str(error.value) and package in str(error.value)
    assert f"pip install 'iexact-runner[{name}]'" in str(error.value) and list(tmp_path.iterdir()) == []


def test_every_logger_says_what_it_needs():
    assert set(loggers.NEEDS) == set(LOGGERS)
