"""Every experiment composes in each of its jobs, says how it is launched, and ends with its table."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import commands
from conftest import REPOSITORY
from iexact_runner.cli import compose_config, config_dir, register_schema, spell_out

FILES = sorted((REPOSITORY / "conf" / "experiment").glob("*.yaml"))
NAMES = [path.stem for path in FILES]


def sweep_of(name):
    """The sweep of an experiment, by what it varies, and what it adds."""
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose("config", overrides=[f"+experiment={name}"], return_hydra_config=True)
    assert composed.hydra.mode.name == "MULTIRUN"
    found = {key: str(values).split(",") for key, values in composed.hydra.sweeper.params.items()}
    also = [dict(word.split("=") for word in line.split()) for line in composed.hydra.sweeper.also or ()]
    return found, [{key: values.split(",") for key, values in line.items()} for line in also]


def axes(name):
    """The combinations that an experiment sweeps over."""
    return sweep_of(name)[0]


def jobs(name):
    """Overrides that take each value of each axis at least once."""
    sweep, also = sweep_of(name)
    for block in (sweep, *(sweep | line for line in also)):
        first = {key: values[0] for key, values in block.items()}
        for key, values in block.items():
            for value in values:
                yield [f"{k}={v}" for k, v in (first | {key: value}).items()]


@pytest.mark.parametrize("name", NAMES)
def test_every_job_composes(name):
    dataset = compose_config(f"+experiment={name}").dataset.name
    kinds = ("table1", "models", "minibatch")
    assert name in (*(f"{kind}_{dataset}" for kind in kinds), "alternatives", "pareto", "table2_distribution")
    for job in jobs(name):
        config = compose_config(*job, f"+experiment={name}")
        assert config.dataset.name == dataset
        quick = compose_config(*job, f"+experiment={name}", "quick=true")
        assert quick.dataset.name == "digits" and quick.training.epochs <= 20 and quick.model.hidden_channels <= 16
        assert type(quick.model) is type(config.model) and quick.compression == config.compression


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_launch_command_stands_on_top(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_" and lines[1].startswith(f"# iexact -m +experiment={path.stem}")
    assert re.fullmatch(r"# \w.*\.", lines[2])


def test_table1_has_the_rows_of_the_paper():
    assert list(axes("table1_arxiv")) == ["compression"]
    rows = [compose_config(f"compression={preset}").compression for preset in axes("table1_arxiv")["compression"]]
    assert [row.col_size for row in rows] == [0, 0, 2, 4, 8, 16, 32, 64, 64]
    assert rows[0].scheme == "none" and {(row.bits, row.kept_frac) for row in rows[1:]} == {(2, 0.125)}
    assert [row.alpha for row in rows] == [1.0] * 8 + ["auto"]
    for name, dataset, epochs in (("table1_arxiv", "arxiv", 500), ("table1_flickr", "flickr", 400)):
        config = compose_config(f"+experiment={name}")
        assert (config.dataset.name, config.model.name, config.runs) == (dataset, "sage", 10)
        assert config.training.epochs == epochs


def test_models_are_swept_over_bits_and_projection():
    for name, dataset in (("models_arxiv", "arxiv"), ("models_flickr", "flickr")):
        sweep = axes(name)
        assert sweep["model"] == ["gcn", "sage", "gcn2", "gat"] and sweep["compression.bits"] == ["1", "2", "4", "8"]
        assert [float(kept) for kept in sweep["compression.kept_frac"]] == [1.0, 0.5, 0.125]
        config = compose_config(f"+experiment={name}", "model=gcn2")
        assert (config.dataset.name, config.runs, config.model.hidden_channels) == (dataset, 10, 256)


def test_a_choice_of_the_user_beats_the_experiment():
    config = compose_config("+experiment=pareto", "dataset=coauthor_physics", "runs=2", "training.epochs=7")
    assert (config.dataset.name, config.runs, config.training.epochs) == ("coauthor_physics", 2, 7)
    quick = compose_config("+experiment=pareto", "quick=true", "dataset=synthetic", "runs=3")
    assert (quick.dataset.name, quick.runs, quick.model.hidden_channels) == ("synthetic", 3, 16)
    assert compose_config("+experiment=pareto", "quick=false") == compose_config("+experiment=pareto")
    assert spell_out(["-m", "quick=true", "seed=1"]) == ["-m", "+quick=on", "seed=1"]
    assert spell_out(["advise", "seed=1"]) == ["task=advise", "seed=1"]
    assert spell_out(["-m", "fidelity", "train"]) == ["-m", "task=fidelity", "train"]
    assert spell_out(["seed=1", "advise"]) == ["seed=1", "advise"] and spell_out(["-m"]) == ["-m"]


def test_sweep_ends_with_the_table_of_its_runs(tmp_path):
    arguments = ("-m", "+experiment=pareto", "quick=true", "training.epochs=3", "compression=none,int2")
    result = commands.run("-m", "iexact_runner", *arguments, cwd=tmp_path, env=os.environ | {"COLUMNS": "200"})
    assert result.returncode == 0 and result.stderr == "", result.stderr
    table = result.stdout[result.stdout.rindex("\npareto") :]
    summaries = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    assert len(summaries) == 4
    for summary in summaries:
        if summary["config"]["task"] == "train":
            scores = summary["accuracy"]["test"]
            assert f"{100 * scores['mean']:.2f} ± {100 * scores['std']:.2f}" in table
        else:
            errors = summary["fidelity"]["after"]["8"]["relative_error"]
            assert f"{sum(errors) / 2:.3f} ± " in table
    (command,) = re.findall(r"iexact-report (\S+) --format html", table)
    arguments = ["", command, "--format", "csv"]
    code = f"import sys; from iexact_runner.report import command; sys.argv = {arguments!r}; command.main()"
    again = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [row["task"] for row in csv.DictReader(io.StringIO(again.stdout))] == ["train | fidelity"] * 2


def test_sweep_without_rows_ends_without_a_table(tmp_path):
    result = commands.run("-m", "iexact_runner", "-m", "task=bins", "bins.bits=1,2", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "" and "iexact-report" not in result.stdout
