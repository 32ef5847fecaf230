"""The first moments of a run: its folder has its configuration in it, or is not there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hydra._internal import hydra as hydra_application

from iexact_runner import cli
from iexact_runner.runs.records import read_run

QUICK = ("training.epochs=1", "model.hidden_channels=4", "compression=none")


class Killed(BaseException):
    """Nothing of the program takes it."""


@pytest.fixture
def iexact(tmp_path, monkeypatch):
    """Runs a command in this process; its exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["iexact", *arguments, *QUICK])
        try:
            cli.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


def stop(*arguments, **options):
    raise Killed


def test_folder_comes_with_its_configuration_and_can_be_resumed(iexact, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hydra_application, "run_job", stop)  # which would make the folder
        with pytest.raises(Killed):
            iexact("seed=5", "hydra.run.dir=outputs/run")
    assert [str(path) for path in Path().rglob("*")] == ["outputs", "outputs/run", "outputs/run/config.yaml"]
    assert Path("outputs/run").stat().st_mode & 0o777 == 0o777 & ~(os.umask(0o022) or os.umask(0o022))
    monkeypatch.setattr(sys, "argv", ["iexact", "resume=outputs/run"])
    cli.main()
    run = read_run(Path("outputs/run"))
    assert run.status == "completed" and run.lookup("config.seed") == 5


def test_configuration_is_there_before_torch_is(iexact, monkeypatch):
    """A folder that somebody else has made first, as a job of a sweep has one."""
    monkeypatch.setitem(sys.modules, "iexact_runner.experiment", None)  # importing it fails
    assert iexact("hydra.run.dir=run") == 1
    assert {path.name for path in Path("run").iterdir()} == {"config.yaml"}
    Path("taken").mkdir()
    Path("taken/notes").touch()
    assert iexact("hydra.run.dir=taken") == 1
    assert {path.name for path in Path("taken").iterdir()} == {"config.yaml", "notes"}


def test_folder_of_a_command_that_is_wrong_does_not_appear(iexact, monkeypatch):
    monkeypatch.setattr(hydra_application, "run_job", stop)
    for wrong in ("runs=0", "seed=${nowhere}", "resume=nowhere"):
        with pytest.raises(Killed):
            iexact(wrong, "hydra.run.dir=run")
    assert list(Path().iterdir()) == []


def test_run_that_goes_on_makes_no_folder_of_its_own(iexact, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hydra_application, "run_job", stop)
        for _ in range(2):
            with pytest.raises(Killed):
                iexact("resume=auto")
    (folder,) = Path("outputs").iterdir()
    assert iexact("resume=auto") == 0
    assert list(Path("outputs").iterdir()) == [folder] and read_run(folder).status == "completed"


def test_folder_that_cannot_be_made_whole_is_not_left(iexact, monkeypatch):
    monkeypatch.setattr(hydra_application, "run_job", stop)
    monkeypatch.setattr("iexact_runner.runs.files.os.fsync", lambda file: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(Killed):
        iexact("hydra.run.dir=outputs/run")
    assert list(Path("outputs").iterdir()) == []
