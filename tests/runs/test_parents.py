"""Workers of a launcher that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from iexact_runner.runs.parents import end_with_parent

LAUNCHER = """
import multiprocessing, os, time
from iexact_runner.runs.parents import end_with_parent

def work(late):
    os.write(1, f"{os.getpid()}\\n".encode())  # at one blow
    if late:
        while os.getppid() == multiprocessing.parent_process().pid:
            time.sleep(0.01)
    end_with_parent()
    end_with_parent()
    time.sleep(60)

if __name__ == "__main__":
    for late in (False, True):
        multiprocessing.get_context("spawn").Process(target=work, args=[late]).start()
    time.sleep(60)
"""


def is_alive(process):
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def test_workers_end_with_a_launcher_that_is_killed(tmp_path):
    """One that has looked before, and one that comes to it when the launcher is gone."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    launcher = subprocess.Popen([sys.executable, "launcher.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    workers = [int(launcher.stdout.readline()) for _ in range(2)]
    time.sleep(0.5)
    assert all(map(is_alive, workers))
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


def test_process_that_no_launcher_started_goes_on():
    end_with_parent()


def test_sweep_of_several_processes_that_is_killed_leaves_none(tmp_path):
    """Neither one that is at work nor one that has no job."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = [sys.executable, "-m", "iexact_runner", "-m", "training.epochs=100000", "seed=0", "compression=none"]
    launching = ["hydra.sweep.dir=sweep", "hydra/launcher=processes", "hydra.launcher.n_jobs=2"]
    sweep = subprocess.Popen([*command, *launching], cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "sweep" / "0" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        sweep.kill()
        sweep.wait()
        deadline = time.monotonic() + 30
        # The workers are in the group of the process that launched them.
        while group_lives(sweep.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not group_lives(sweep.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(sweep.pid, signal.SIGKILL)


def group_lives(group):
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False
