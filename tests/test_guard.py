"""Configuration files of strangers, through the command line in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from iexact_runner import cli

QUICK = ("training.epochs=1", "model.hidden_channels=4", "model.num_layers=1")


@pytest.fixture
def iexact(tmp_path, monkeypatch, capsys):
    """Runs a command with a stranger's folder of configurations; its exit status and what it says on stderr."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(files, *arguments):
        for name, content in files.items():
            path = tmp_path / "stranger" / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            header = "# @package _global_\n" if name.startswith("experiment/") else ""
            path.write_text(header + yaml.safe_dump(content))
        monkeypatch.setattr(sys, "argv", ["iexact", "--config-dir", "../stranger", *arguments, *QUICK])
        try:
            cli.main()
            status = 0
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr().err

    return run


MAKE = {"_target_": "os.mkdir", "path": "ran"}


@pytest.mark.parametrize(
    ("hydra", "field"),
    [
        ({"callbacks": {"x": MAKE}}, "hydra.callbacks.x._target_='os.mkdir'"),
        ({"launcher": {"_target_": "os.mkdir"}}, "hydra.launcher._target_='os.mkdir'"),
        ({"sweeper": {"_target_": "os.system"}}, "hydra.sweeper._target_='os.system'"),
        ({"job_logging": {"root": {}, "handlers": {"x": {"()": "os.system"}}}}, "hydra.job_logging.handlers.x.()"),
        ({"hydra_logging": {"version": 1, "root": {}}}, "hydra.hydra_logging"),
        ({"job": {"env_set": {"LD_PRELOAD": "x"}}}, "hydra.job.env_set.LD_PRELOAD='x'"),
        ({"job": {"chdir": True}}, "hydra.job.chdir=True"),
        ({"run": {"dir": "elsewhere"}}, "hydra.run.dir='elsewhere'"),
        ({"sweep": {"dir": "../elsewhere"}}, "hydra.sweep.dir='../elsewhere'"),
        ({"sweep": {"subdir": "../${hydra.job.num}"}}, "hydra.sweep.subdir="),
        ({"sweep": {"subdir": "/elsewhere'"}}, "hydra.sweep.subdir="),
        ({"output_subdir": "../elsewhere"}, "hydra.output_subdir='../elsewhere'"),
    ],
)
@pytest.mark.parametrize("mode", ["RUN", "MULTIRUN"])
def test_hydra_is_configured_on_the_command_line_alone(iexact, tmp_path, hydra, field, mode):
    status, error = iexact({"experiment/x": {"hydra": {"mode": mode, **hydra}}}, "+experiment=x")
    assert status == 2 and error.startswith("iexact: hydra.") and error.count("\n") == 1
    assert field in error and "a configuration file may not set this; type it on the command line" in error
    assert not list((tmp_path / "work").iterdir()) and {path.name for path in tmp_path.iterdir()} == {
        "work",
        "stranger",
    }


@pytest.mark.parametrize("folder", ["/elsewhere", "../elsewhere", "a/../../b"])
@pytest.mark.parametrize("name", ["output_dir", "dataset.root"])
def test_folders_of_a_file_lie_below_the_working_folder(iexact, tmp_path, name, folder):
    group, _, field = name.rpartition(".")
    content = {group: {field: folder}} if group else {field: folder}
    status, error = iexact({"experiment/x": content}, "+experiment=x")
    assert status == 2 and error.startswith(f"iexact: {name}=") and "lies outside the working folder" in error
    assert not list((tmp_path / "work").iterdir())


SECRET = "${oc.env:IEXACT_SECRET}"
PLACES = ("seed", "model.dropout", "output_dir", "defaults", "swept", "escaped", "searchpath")
READING = {
    "spaces": "x${ oc.env : IEXACT_SECRET }",
    "default of another": "${oc.select:nowhere,${oc.env:IEXACT_SECRET}}",
    "assembled name": "${oc.${precision}:IEXACT_SECRET}",
    "evaluated": "${oc.decode:'${oc.env:IEXACT_SECRET}'}",
    "machine": "${hydra:runtime.cwd}",
}


@pytest.mark.parametrize(
    ("place", "written"),
    [*((place, SECRET) for place in PLACES), *(("seed", written) for written in READING.values())],
    ids=[*PLACES, *READING],
)
def test_a_file_reads_nothing_of_the_environment(iexact, monkeypatch, place, written):
    monkeypatch.setenv("IEXACT_SECRET", "swordfish")
    group, _, field = place.rpartition(".")
    hydra = {"mode": "MULTIRUN", "sweeper": {"params": {"seed": written}}}
    if place == "escaped":  # no interpolation to OmegaConf, and one once Hydra has parsed it
        escaped = written.translate({ord(letter): f"\\{letter}" for letter in "{}:,' "})
        hydra["sweeper"]["params"] = {"seed": escaped}
    content = {
        "defaults": {"defaults": [{"override /model": written}]},
        "swept": {"hydra": hydra},
        "escaped": {"hydra": hydra},
        "searchpath": {"defaults": ["config", "_self_"], "hydra": {"searchpath": [written]}},
    }.get(place, {group: {field: written}} if group else {place: written})
    if place == "searchpath":
        status, error = iexact({"mine": content}, "--config-name", "mine")
    else:
        status, error = iexact({"experiment/x": content}, "+experiment=x")
    lines = error.splitlines()
    assert status == 2 and lines and all(line.startswith("iexact: ") for line in lines)
    assert "may not use" in error and "swordfish" not in error
    assert not list(Path().rglob("config.yaml"))


def test_a_file_refers_to_other_fields_and_the_clock(iexact):
    content = {"training": {"epochs": 1}, "seed": "${training.epochs}", "output_dir": "out/${now:%Y}"}
    assert iexact({"experiment/x": content}, "+experiment=x") == (0, "")
    (path,) = Path("out").rglob("config.yaml")
    assert "seed: 1\n" in path.read_text()


def test_what_is_typed_may_read_the_environment(iexact, monkeypatch):
    monkeypatch.setenv("IEXACT_SEED", "7")
    assert iexact({"x": {}}, "seed=${oc.env:IEXACT_SEED}", "hydra.run.dir=run") == (0, "")
    assert "seed: 7\n" in Path("run/config.yaml").read_text()


def test_a_recorded_configuration_reads_nothing(iexact, monkeypatch):
    monkeypatch.setenv("IEXACT_SECRET", "swordfish")
    assert iexact({"x": {}}, "hydra.run.dir=run") == (0, "")
    path = Path("run/config.yaml")
    path.write_text(path.read_text().replace("seed: 0", "seed: ${oc.env:IEXACT_SECRET}"))
    status, error = iexact({"x": {}}, "resume=run")
    assert (status, error.count("\n")) == (2, 1) and "seed=${oc.env:IEXACT_SECRET}: run/config.yaml" in error
    assert "swordfish" not in error


def test_a_link_does_not_lead_out(iexact, tmp_path):
    (tmp_path / "work" / "link").symlink_to(tmp_path)
    assert iexact({"experiment/x": {"output_dir": "link/elsewhere"}}, "+experiment=x")[0] == 2
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_typed_is_trusted(iexact, tmp_path):
    files = {"experiment/x": {"output_dir": "/nowhere", "model": {"dropout": 0.25}}}
    status, error = iexact(files, "+experiment=x", f"output_dir={tmp_path}/out", f"hydra.run.dir={tmp_path}/run")
    assert (status, error) == (0, "")
    assert "dropout: 0.25" in (tmp_path / "run" / "config.yaml").read_text()


def test_files_choose_set_fields_and_sweep(iexact, tmp_path):
    experiment = {
        "defaults": [{"override /model": "gcn"}, {"override /compression": "mine"}],
        "output_dir": "results",
        "hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"seed": "0,1"}}},
    }
    files = {"experiment/x": experiment, "compression/mine": {"defaults": ["int4"], "col_size": 2}}
    assert iexact(files, "+experiment=x") == (0, "")
    written = sorted((tmp_path / "work" / "results").rglob("config.yaml"))
    assert len(written) == 2 and all("col_size: 2" in path.read_text() for path in written)


@pytest.mark.parametrize(
    "parameters", [{"+hydra.job.env_set.A": "b"}, {"output_dir": "../elsewhere"}, {"+experiment": "evil"}]
)
def test_jobs_of_a_sweep_are_checked_like_runs(iexact, tmp_path, parameters):
    files = {
        "experiment/evil": {"hydra": {"output_subdir": "../../../../elsewhere"}},
        "more/x": {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": parameters}}},
    }
    status, error = iexact(files, "+more@_global_=x")
    assert status != 0 and "may not set this; type it on the command line" in error
    assert not (tmp_path / "elsewhere").exists() and not list(Path("outputs").rglob("summary.json"))


def test_a_launcher_of_a_file_cannot_be_chosen(iexact):
    files = {"hydra/launcher/mine": MAKE, "experiment/x": {"defaults": [{"override /hydra/launcher": "mine"}]}}
    for arguments in (("+experiment=x",), ("-m", "hydra/launcher=mine")):
        status, error = iexact(files, *arguments)
        assert status == 2 and error.startswith("iexact: hydra/launcher=mine: must be one of basic"), error
    assert not Path("ran").exists()


def test_a_file_cannot_pass_for_one_of_hydra(iexact):
    status, error = iexact({"hydra/launcher/basic": {"_target_": "os.mkdir"}}, "-m", "seed=0")
    assert status == 2 and error.startswith("iexact: hydra.launcher._target_='os.mkdir': a configuration file may not")
    status, error = iexact({"hydra/callbacks/mine": {"x": MAKE}}, "hydra/callbacks=mine")
    assert status == 2 and not Path("ran").exists() and error.count("\n") == 1


def test_a_primary_file_builds_on_ours(iexact):
    status, error = iexact({"mine": {"a": 1}}, "--config-name", "mine")
    assert status == 2 and error.count("\n") == 1
    status, error = iexact({"mine": {"defaults": ["config", "_self_"], "output_dir": "mine"}}, "--config-name", "mine")
    assert (status, error) == (0, "") and list(Path("mine").iterdir())


@pytest.mark.parametrize("option", ["--experimental-rerun", "--experimental"])
def test_pickled_configurations_are_refused(iexact, option):
    status, error = iexact({"x": {}}, option, "config.pickle")
    assert status == 2 and error.startswith("iexact: --experimental-rerun=config.pickle: is a pickle")


def test_unknown_option_is_one_line(iexact):
    problem = "--nonsense: no such option; fields are FIELD=VALUE, and iexact --help lists them"
    assert iexact({"x": {}}, "--nonsense") == (2, f"iexact: {problem}\n")


def test_trust_is_typed(iexact):
    files = {"experiment/x": {"dataset": {"trust_pickle": True}}}
    status, error = iexact(files, "+experiment=x")
    assert status == 2 and error.startswith("iexact: dataset.trust_pickle=true: a configuration file may not set this")
    assert iexact(files, "+experiment=x", "dataset.trust_pickle=true") == (0, "")


@pytest.mark.parametrize("target", ["mine:Net", "os:system"])
def test_code_is_named_on_the_command_line_alone(iexact, target):
    files = {"experiment/x": {"defaults": [{"override /model": "module"}], "model": {"target": target}}}
    status, error = iexact(files, "+experiment=x")
    assert status == 2 and error.startswith(f"iexact: model.target={target}: a configuration file may not set this")


def test_a_file_from_elsewhere_reads_no_graph_outside_of_the_working_folder(iexact):
    files = {"experiment/x": {"defaults": [{"override /dataset": "file"}], "dataset": {"path": "/etc/passwd"}}}
    status, error = iexact(files, "+experiment=x")
    assert status == 2 and error.startswith("iexact: dataset.path=/etc/passwd: lies outside the working folder")


def test_a_resumed_run_does_not_bring_trust_along(iexact):
    assert iexact({"x": {}}, "hydra.run.dir=run", "dataset.trust_pickle=true") == (0, "")
    status, error = iexact({"x": {}}, "resume=run")
    assert status == 2 and error.startswith("iexact: dataset.trust_pickle=true: a configuration file may not set this")
