"""Which run ``resume`` goes on with, as a library and as a command."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

import commands
from iexact_runner.cli import compose_config
from iexact_runner.errors import ConfigError
from iexact_runner.runs.files import locked
from iexact_runner.runs.records import RunFolder, to_json
from iexact_runner.runs.resume import check_agreement, newest_unfinished, overridden, place

QUICK = ("training.epochs=4", "model.hidden_channels=8", "dataset=synthetic", "dataset.num_nodes=150")


def begun(folder, *overrides, status=None):
    """A run that was stopped after an epoch."""
    config = asdict(compose_config(*QUICK, *overrides))
    run = RunFolder(folder)
    run.write_config(yaml.safe_dump(config))
    run.append_metrics({"run": 0, "epoch": 1, "loss": 1.0})
    if status is not None:
        run.write_summary({"schema_version": 1, "status": status, "config": json.loads(to_json(config))})
    return folder


def test_newest_unfinished_run_of_the_configuration_is_found(tmp_path):
    found = {status: begun(tmp_path / str(status), status=status) for status in (None, "failed", "interrupted")}
    begun(tmp_path / "other", "seed=1")
    begun(tmp_path / "done", status="completed")
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable" / "metrics.jsonl").touch()
    config = asdict(compose_config(*QUICK, "output_dir=elsewhere", "checkpoint.every=3", "logger=tensorboard"))
    for newest, folder in enumerate(found.values()):
        for path in folder.iterdir():
            os.utime(path, (2e9 + newest, 2e9 + newest))
        assert newest_unfinished(tmp_path, config) == folder
    with locked(found["interrupted"]):  # it runs
        assert newest_unfinished(tmp_path, config) == found["failed"]
    assert newest_unfinished(tmp_path / "nowhere", config) is None


def test_place_of_a_run(tmp_path, caplog):
    fresh = tmp_path / "fresh"
    assert place(compose_config(*QUICK), fresh) == (fresh, False)
    auto = compose_config(*QUICK, "resume=auto", f"output_dir={tmp_path}")
    with caplog.at_level("INFO", logger="iexact_runner"):
        assert place(auto, fresh) == (fresh, False)
    assert "resume=auto: no unfinished run of this configuration" in caplog.text
    begun(tmp_path / "stopped")
    assert place(auto, fresh) == (tmp_path / "stopped", True)
    assert place(compose_config(*QUICK, f"resume={fresh}"), tmp_path / "other") == (fresh, True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("seed=1",), "seed=1: RUN has 0"),
        (("model=gcn",), "model.name=gcn: RUN has sage"),
        (("training.grad_norm=null",), "training.grad_norm=null: RUN has 0.5"),
        (("training.epochs=9", "compression.bits=4"), "compression.bits=4: RUN has 2"),
        (("task=measure",), "task=measure: RUN has train"),
        (("+quick=on",), "runs=2: RUN has 1"),
    ],
)
def test_overrides_that_would_change_the_numbers_are_refused(overrides, message):
    recorded, asked = (asdict(compose_config(*words)) for words in (QUICK, overrides))
    with pytest.raises(ConfigError) as error:
        check_agreement(Path("RUN"), recorded=recorded, asked=asked, overrides=overrides)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        QUICK,
        ("model=sage", "training.lr=1e-2"),
        ("output_dir=elsewhere", "debug=true", "logger=tensorboard", "checkpoint.every=3"),
    ],
)
def test_overrides_that_agree_are_taken(overrides):
    recorded, asked = (asdict(compose_config(*words)) for words in (QUICK, overrides))
    if "model=sage" in overrides:
        recorded["model"]["hidden_channels"] = 128
    check_agreement(Path("RUN"), recorded=recorded, asked=asked, overrides=overrides)


def test_names_of_overrides():
    names = [overridden(override) for override in ("seed=1", "+quick=on", "++a.b=c=d", "~recipe", "model@x=gcn")]
    assert names == ["seed", "quick", "a.b", "recipe", "model"]


def iexact(*arguments, cwd):
    return commands.run("-m", "iexact_runner", *arguments, cwd=cwd)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_command_goes_on_with_the_recorded_configuration(tmp_path):
    assert iexact(*QUICK, "hydra.run.dir=whole", cwd=tmp_path).returncode == 0
    begun(tmp_path / "stopped")
    result = iexact("resume=stopped", "debug=false", cwd=tmp_path)
    assert (
        result.returncode == 0 and result.stderr == "" and "stopped: has no checkpoint: starts again" in result.stdout
    )
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]
    begun(tmp_path / "outputs" / "again")
    result = iexact(*QUICK, "resume=auto", cwd=tmp_path)
    assert result.returncode == 0 and losses(tmp_path / "outputs" / "again") == losses(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["again"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resume=nowhere",), "resume=nowhere: must be the folder of a run; nowhere/config.yaml does not exist"),
        (("resume=run", "seed=3"), "seed=3: run has 0, and goes on as it began"),
        (("resume=auto", "task=measure"), "resume=auto: is for task=train and task=distribution"),
        (("resume=odd",), "resume=odd: odd/config.yaml is not the configuration of a run"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_resumed_is_one_line(tmp_path, arguments, message):
    begun(tmp_path / "run")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.yaml").write_text("model: 3\n")
    result = iexact(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"iexact: {message}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "run"]


def test_what_is_recorded_is_quoted_without_its_escapes():
    with pytest.raises(ConfigError, match=r"has \\x1b\[2J, and goes on as it began"):
        check_agreement(Path("RUN"), recorded={"task": "\x1b[2J"}, asked={"task": "train"}, overrides=["task=train"])
