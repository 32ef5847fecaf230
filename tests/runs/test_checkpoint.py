"""Files of state: when they are written, and that reading one runs nothing."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from functools import partial

import pytest
import torch

from iexact_runner.runs import checkpoint
from iexact_runner.runs.checkpoint import Checkpoints
from iexact_runner.runs.records import RunFolder, UnwritableFolder


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(checkpoint.time, "monotonic", lambda: self.now)


def test_state_is_read_back(tmp_path):
    checkpoints = Checkpoints(RunFolder(tmp_path), 1)
    assert checkpoints.read(lines=9) is None
    for epoch in (1, 2):
        checkpoints.write({"lines": epoch, "weights": torch.full((3,), epoch), "scores": [0.5, None], "word": "x"})
    state = checkpoints.read(lines=9)
    assert state["lines"] == 2 and torch.equal(state["weights"], torch.full((3,), 2)) and state["scores"] == [0.5, None]
    assert checkpoints.read(lines=1)["lines"] == 1  # metrics.jsonl lacks the second epoch
    checkpoint.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_number_of_epochs():
    every = Checkpoints.__new__(Checkpoints)
    every._every = 3
    assert [epoch for epoch in range(1, 10) if every.due(epoch)] == [3, 6, 9]
    every._every = None
    assert not every.enabled and not any(every.due(epoch) for epoch in range(1, 10))


def test_auto_spends_half_a_percent_of_the_time(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    checkpoints = Checkpoints(RunFolder(tmp_path), "auto")
    write = RunFolder.write
    spent = 0.0

    def slow(*arguments, **options):
        nonlocal spent
        clock.now, spent = clock.now + 0.2, spent + 0.2
        write(*arguments, **options)

    monkeypatch.setattr(RunFolder, "write", slow)
    started, writes = clock.now, []
    for epoch in range(1, 2001):
        clock.now += 0.3
        if checkpoints.due(epoch):
            checkpoints.write({"lines": epoch})
            writes.append(epoch)
    assert writes[0] * 0.3 == pytest.approx(checkpoint.LEAST_SECONDS, abs=0.3) and len(writes) > 10
    assert spent / (clock.now - started) < 0.01


class Attack:
    """Would make a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, partial(pickle.dump, protocol=2)], ids=["torch", "pickle"])
def test_reading_runs_nothing(tmp_path, caplog, save):
    buffer = io.BytesIO()
    save({"lines": 0, "attack": Attack(tmp_path / "made")}, buffer)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest().encode()
    (tmp_path / checkpoint.CURRENT).write_bytes(checkpoint.MAGIC + digest + b"\n" + data)
    assert Checkpoints(RunFolder(tmp_path), 1).read(lines=9) is None
    assert not (tmp_path / "made").exists() and "checkpoint.pt: " in caplog.text
    torch.load(io.BytesIO(data), weights_only=False) if save is torch.save else pickle.loads(data)
    assert (tmp_path / "made").exists()  # the attack is one


def test_a_write_that_fails_leaves_the_one_before_it(tmp_path, monkeypatch):
    checkpoints = Checkpoints(RunFolder(tmp_path), 1)
    checkpoints.write({"lines": 1})
    for name in ("fsync", "replace", "chmod"):
        with monkeypatch.context() as patch, pytest.raises(UnwritableFolder):
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            checkpoints.write({"lines": 2})
        assert checkpoints.read(lines=9) == {"lines": 1}
        assert [path.name for path in tmp_path.iterdir()] == [checkpoint.CURRENT]


def test_a_kill_between_the_two_renames_leaves_the_one_before_it(tmp_path, monkeypatch):
    checkpoints = Checkpoints(RunFolder(tmp_path), 1)
    checkpoints.write({"lines": 1})
    replace, calls = os.replace, []

    def stops_at_the_second(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stops_at_the_second)
        checkpoints.write({"lines": 2})
    assert checkpoints.read(lines=9) == {"lines": 1}
