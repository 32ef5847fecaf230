from __future__ import annotations

import json
import math
import os
import stat

import pytest

from iexact_runner.errors import UserError
from iexact_runner.records import RunFolder, mean_std, to_json, write_atomically


def test_metrics_are_on_disk_line_by_line(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for epoch in range(3):
        folder.append_metrics({"epoch": epoch, "loss": 0.5})
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == {"epoch": epoch, "loss": 0.5} and len(lines) == epoch + 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_files_are_as_readable_as_the_user_asked(tmp_path):
    previous = os.umask(0o022)
    try:
        write_atomically(tmp_path / "file", "text")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_summary_is_strict_json(tmp_path):
    RunFolder(tmp_path).write_summary({"a": math.nan, "b": [math.inf, 1.5], "c": {"d": (1, None)}})
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": [1, None]},
    }
    assert to_json(-math.inf) == "null"


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_records_of_another_run_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("old")
    with pytest.raises(UserError, match=f"already holds {name} of another run"):
        RunFolder(tmp_path)
    assert (tmp_path / name).read_text() == "old"


def test_unwritable_folder_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(UserError, match=r"output_dir=.*file.*cannot be written"):
        RunFolder(blocked / "run")


def test_mean_and_sample_deviation():
    assert mean_std([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0, "values": [1.0, 2.0, 3.0]}
    assert mean_std([0.5]) == {"mean": 0.5, "std": 0.0, "values": [0.5]}
    assert mean_std([]) == {"mean": None, "std": None, "values": []}
