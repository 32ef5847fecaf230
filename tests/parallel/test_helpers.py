"""Processes that a command starts itself: their run is that of one process, and they end with it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import commands
from iexact_runner.cli import compose_config
from iexact_runner.errors import ConfigError, TeamError
from iexact_runner.job import run_job
from iexact_runner.parallel.helpers import beside
from parallel.test_runs import records
from runs.test_parents import group_lives

FIELDS = ("parallel=graph", "parallel.parts=2", "parallel.partition=label_propagation", "compression=none")


@pytest.mark.parametrize("launcher", ["basic", "processes"])
def test_jobs_of_a_sweep_take_as_many_processes_as_they_say(tmp_path, launcher):
    words = ("-m", "iexact_runner", "-m", *FIELDS, "processes=1,2", "training.epochs=4", "hydra.sweep.dir=sweep")
    if launcher != "basic":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        words += (f"hydra/launcher={launcher}", "hydra.launcher.n_jobs=1")
    done = commands.run(*words, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (one, expected), (two, found) = (records(tmp_path / "sweep" / str(job)) for job in range(2))
    assert [len(summary["parallel"]["ranks"]) for summary in (one, two)] == [1, 2]
    assert two["parallel"]["ranks"][1]["sent_mib"] > 0 and two["status"] == "completed"
    for line, other in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


def started(folder, *overrides):
    command = [sys.executable, "-m", "iexact_runner", *FIELDS, "checkpoint.every=1", "training.epochs=3000", *overrides]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def epochs(folder):
    return sum(len(path.read_bytes().splitlines()) for path in folder.glob("outputs/*/metrics.jsonl"))


def test_processes_end_with_the_command_that_started_them(tmp_path):
    """However it ends: interrupted between two epochs, or killed; and its run goes on with another number."""
    before = 0
    for sent, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        command = started(tmp_path, "processes=2", "resume=auto")
        try:
            deadline = time.monotonic() + 120
            while epochs(tmp_path) < before + 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            command.send_signal(sent)
            _, error = command.communicate(timeout=60)
            assert command.returncode == status, error
            if sent == signal.SIGINT:
                assert error.decode().startswith("iexact: interrupted: ") and error.count(b"\n") == 1
            deadline = time.monotonic() + 30
            while group_lives(command.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not group_lives(command.pid)
            assert epochs(tmp_path) >= before + 3
            before = epochs(tmp_path)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)
    (folder,) = (tmp_path / "outputs").iterdir()
    resumed = ("-m", "iexact_runner", f"resume={folder}", "processes=1", "output_dir=other", "sweep.fail_fast=true")
    command = commands.start(*resumed, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while epochs(tmp_path) < before + 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    assert command.wait(60) == 130 and json.loads((folder / "summary.json").read_text())["parallel"]["processes"] == 1


class Second:
    """A job whose second helper ends while it is read."""

    def __init__(self):
        self.read = itertools.count(1)

    def __reduce__(self):
        return (os._exit, (7,)) if next(self.read) == 2 else (Path, ())


def fails(folder):
    raise ConfigError.of("field", folder.is_dir(), "told by the first process alone")


def test_a_context_leaves_environment_and_threads_as_they_were(capfd):
    names = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK")
    before, threads = [os.environ.get(name) for name in names], torch.get_num_threads()
    with beside(2, fails):
        assert [os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")] == ["2", "0", "0"]
        assert 1 <= torch.get_num_threads() <= threads
    assert [os.environ.get(name) for name in names] == before and torch.get_num_threads() == threads
    assert capfd.readouterr().err == ""


def test_a_process_that_cannot_begin_is_told_at_once():
    with pytest.raises(TeamError, match="^process 2 of 3 ended before it began$"), beside(3, Second()):
        raise AssertionError("began")


def test_where_processes_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^processes=2: is for parallel=graph"):
        compose_config("processes=2")
    with pytest.raises(ConfigError, match=r"^processes=0: must be 1 or more"):
        compose_config("processes=0", "parallel=graph")
    parts = ("task=partition", "parallel.parts=2", "parallel.folder=parts")
    with pytest.raises(ConfigError, match=r"^processes=2: task=partition needs one"):
        compose_config("processes=2", "parallel=graph", *parts)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"^processes=2: 3 were started already: use 1"):
        run_job(compose_config("processes=2", "parallel=graph"), tmp_path, "")
