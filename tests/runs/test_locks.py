"""Locks across processes: who waits for whom, and what is left when a holder is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from iexact_runner.errors import UserError
from iexact_runner.runs import devices, locks
from iexact_runner.runs.locks import DeviceLock, locked

HOLD = """
import sys
from pathlib import Path
from iexact_runner.runs.locks import DeviceLock
with DeviceLock("cpu", folder=Path(sys.argv[1]), announce=print) as lock:
    if sys.argv[2] == "measure":
        lock.exclude_others(patience=60)
    print("has it", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that holds the lock until it is told or killed."""

    def __init__(self, folder, kind):
        command = [sys.executable, "-c", HOLD, str(folder), kind]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "has it\n"

    def leave(self):
        self.process.communicate("")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def enter(lock, *, measure=False):
    """A thread that takes the lock, and the event that says it has."""
    has_it, leave = threading.Event(), threading.Event()

    def work():
        with lock:
            if measure:
                lock.exclude_others(patience=60)
            has_it.set()
            leave.wait(60)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return has_it, lambda: (leave.set(), thread.join(60))


def device_lock(folder, messages=None):
    return DeviceLock("cpu", folder=folder, announce=[].append if messages is None else messages.append)


def test_work_shares_a_device_and_knows(tmp_path):
    with device_lock(tmp_path) as first:
        assert first.alone
        with device_lock(tmp_path) as second:
            assert not first.alone and not second.alone
    assert not first.alone and not second.alone
    with device_lock(tmp_path) as third:
        pass
    assert third.alone


def test_measurement_waits_for_work_and_keeps_later_work_out(tmp_path):
    messages = []
    holder = Holder(tmp_path, "work")
    measurement = device_lock(tmp_path, messages)
    measures, end_measurement = enter(measurement, measure=True)
    assert not measures.wait(0.5) and messages == ["waiting for cpu: other work is going on there"]
    late = device_lock(tmp_path, messages)
    works, end_late = enter(late)
    assert not works.wait(0.5) and "a measurement is going on there" in messages[1]
    holder.leave()
    assert measures.wait(10) and not works.wait(0.5)
    end_measurement()
    assert works.wait(10)
    end_late()
    assert measurement.alone and late.alone


def test_killed_measurement_leaves_the_device_free(tmp_path):
    holder = Holder(tmp_path, "measure")
    works, end = enter(device_lock(tmp_path))
    assert not works.wait(0.5)
    holder.kill()
    assert works.wait(10)
    end()


def test_two_that_want_to_measure_do_not_wait_for_each_other(tmp_path):
    first, second = device_lock(tmp_path), device_lock(tmp_path)
    with first, second:
        measured = []

        def measure(lock):
            lock.exclude_others(patience=60)
            measured.append(lock)
            lock.__exit__(None, None, None)

        threads = [threading.Thread(target=measure, args=[lock], daemon=True) for lock in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(measured) == 2 and first.alone and second.alone


def test_endless_work_makes_nobody_wait_without_end(tmp_path):
    """The measurement gives up, says so, and lets those in who came after it."""
    messages = []
    holder = Holder(tmp_path, "work")
    measurement, late = device_lock(tmp_path, messages), device_lock(tmp_path)
    with measurement:
        waiting = threading.Thread(target=measurement.exclude_others, kwargs={"patience": 1.0}, daemon=True)
        waiting.start()
        while not messages:
            time.sleep(0.01)
        works, end = enter(late)
        assert not works.wait(0.2) and works.wait(10)
        waiting.join(10)
        # Who came after it may have the gate by then, which it is told to wait for.
        others = [message for message in messages if not message.startswith("waiting for cpu: ")]
        assert others == ["cpu was not free for 1 s: epochs are timed beside other work"]
        assert not measurement.alone and not late.alone
        end()
    holder.leave()


def test_patience_ends(tmp_path):
    with locked(tmp_path / "lock") as mine:
        assert mine
        began = time.monotonic()
        with locked(tmp_path / "lock", patience=0.2) as other:
            assert not other and 0.2 <= time.monotonic() - began < 5
    with locked(tmp_path / "lock", patience=0) as again:
        assert again


def test_lock_folder_is_private(tmp_path, monkeypatch):
    monkeypatch.delenv(locks.FOLDER_VARIABLE)
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    assert locks.lock_folder().stat().st_mode & 0o777 == 0o700
    assert locks.lock_folder().parent == tmp_path
    monkeypatch.setattr(locks.os, "getuid", lambda: os.geteuid() + 1)
    (tmp_path / f"iexact-{os.geteuid() + 1}").mkdir()
    with pytest.raises(UserError, match="belongs to another user"):
        locks.lock_folder()


def test_jobs_take_different_gpus_and_wait_for_a_free_one(tmp_path, monkeypatch):
    chosen, messages = [], []
    monkeypatch.setattr(devices, "lock_folder", lambda: tmp_path)
    monkeypatch.setattr(devices, "_name", lambda device: f"cuda-{device.index}")
    monkeypatch.setattr(devices, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with devices.own_gpu(announce=messages.append):
        with devices.own_gpu(announce=messages.append):
            assert chosen == [0, 1] and messages == []

            def wait():
                with devices.own_gpu(announce=messages.append):
                    pass

            thread = threading.Thread(target=wait)
            thread.start()
            thread.join(0.3)
            assert thread.is_alive() and messages == ["waiting for a GPU: a job is going on on each"]
        thread.join(10)
        assert chosen == [0, 1, 1]


def test_own_gpu_is_nothing_without_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with devices.own_gpu(announce=pytest.fail):
        pass
