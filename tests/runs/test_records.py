from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from iexact_runner.cli import compose_config
from iexact_runner.errors import UserError
from iexact_runner.runs.files import write_atomically
from iexact_runner.runs.records import (
    SCHEMA_VERSION,
    WITHOUT_EFFECT,
    DamagedRecord,
    RunFolder,
    config_hash,
    mean_std,
    read_run,
    run_folders,
    to_json,
)
from recorded import CONFIG, record

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


def without_infinities(value):
    """A JSON value with null for what is no number to other readers."""
    if isinstance(value, dict):
        return {name: without_infinities(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_a_run_does_not_go_on_from_a_pipe(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DamagedRecord, match=f"{name}: is not a regular file"):
        RunFolder(tmp_path, resumed=True)
    with pytest.raises(UserError, match=f"already holds {name}"):
        RunFolder(tmp_path)


def test_unwritable_folder_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(UserError, match=r"output_dir=.*file.*cannot be written"):
        RunFolder(blocked / "run")


def test_mean_and_sample_deviation():
    assert mean_std([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0, "values": [1.0, 2.0, 3.0]}
    assert mean_std([0.5]) == {"mean": 0.5, "std": 0.0, "values": [0.5]}
    assert mean_std([]) == {"mean": None, "std": None, "values": []}


def test_runs_are_found_in_the_order_of_their_jobs(tmp_path):
    for job in (10, 2, 1):
        record(tmp_path / "sweep" / str(job))
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("defaults: [a, b]\n")  # somebody else's
    assert [folder.name for folder in run_folders([tmp_path, tmp_path / "sweep"])] == ["1", "2", "10"]


def test_run_is_read_back(tmp_path):
    run = read_run(record(tmp_path / "run", saved_mib=2.5))
    assert (run.status, run.lookup("memory.saved_mib"), run.lookup("memory.no.such")) == ("completed", 2.5, None)
    assert [(line["run"], line["epoch"]) for line in run.metrics()] == [(r, e) for r in (0, 1) for e in (1, 2, 3)]


def test_run_without_a_summary_is_unfinished(tmp_path):
    run = read_run(record(tmp_path / "run", status="unfinished"))
    assert run.status == "unfinished" and run.lookup("config.compression.bits") == 2 and run.epochs == 6
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text((tmp_path / "run" / "config.yaml").read_text())
    assert begun in run_folders([tmp_path]) and read_run(begun).metrics() == []


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("summary.json", lambda text: text[: len(text) // 2], "is not JSON"),
        ("summary.json", lambda text: "[1, 2]", "is not the summary of a run"),
        (
            "summary.json",
            lambda text: text.replace('"epochs": 3', '"epochs": "3"'),
            'config.training.epochs="3": expected int',
        ),
        ("summary.json", lambda text: text.replace('"schema_version": 1', '"schema_version": 9'), "schema_version=9"),
        ("summary.json", lambda text: text.replace('"completed"', '"fine"'), 'status="fine": must be one of completed'),
        ("metrics.jsonl", lambda text: text[:-20], "its last line is cut off"),
        ("metrics.jsonl", lambda text: text[: text.rfind("{")], "has 5 lines, a completed run 6"),
        ("metrics.jsonl", lambda text: text[:-2] + "\n", "is not JSON"),
    ],
)
def test_damage_is_noticed_and_the_file_named(tmp_path, name, damage, reason):
    path = record(tmp_path / "run") / name
    path.write_text(damage(path.read_text()))
    with pytest.raises(DamagedRecord) as error:
        read_run(tmp_path / "run")
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value) and "\n" not in str(error.value)


def test_damage_in_the_middle_is_noticed_when_the_lines_are_read(tmp_path):
    path = record(tmp_path / "run") / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"run": 0, "epoch": 2', '{"run": 0, "epoch" 2'))
    with pytest.raises(DamagedRecord, match=r"metrics.jsonl: line 2: is not JSON"):
        read_run(tmp_path / "run").metrics()


def test_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    run = record(tmp_path / "run")
    (run / "summary.json").unlink()
    (run / "summary.json").mkdir()
    with pytest.raises(DamagedRecord, match=r"summary.json: cannot be read \(Is a directory\)"):
        read_run(run)


def test_unreadable_config_of_an_unfinished_run_is_named(tmp_path):
    path = record(tmp_path / "run", status="unfinished") / "config.yaml"
    path.write_text("model: [")
    with pytest.raises(DamagedRecord, match=r"config.yaml: is not YAML"):
        read_run(tmp_path / "run")


def test_a_field_that_is_newer_than_a_record_had_its_default(tmp_path):
    folder = RunFolder(tmp_path / "old")
    compression = {"scheme": "projected", "bits": 2}
    config = {"task": "measure", "runs": 1, "training": {"epochs": 1}, "compression": compression, "model": {}}
    config |= {"dataset": {}, "seed": 0}
    folder.write_summary({"schema_version": SCHEMA_VERSION, "status": "completed", "config": config})
    found = read_run(tmp_path / "old").summary["config"]["compression"]
    assert (found["bits"], found["refresh"], found["levels"]) == (2, None, "uniform")


def test_hash_of_a_configuration_is_the_same_wherever_it_is_read_from():
    config = asdict(compose_config("compression.alpha=1", "training.lr=1e-3"))
    expected = config_hash(config)
    assert expected == config_hash(json.loads(to_json(config))) == config_hash(yaml.safe_load(yaml.safe_dump(config)))
    assert expected == config_hash(asdict(compose_config("compression.alpha=1.0", "training.lr=0.001")))
    assert len(expected) == 16 and set(expected) <= set("0123456789abcdef")


def test_hash_leaves_out_only_what_changes_no_number():
    expected = config_hash(asdict(compose_config()))
    for override in ("output_dir=elsewhere", "debug=true", "logger=tensorboard"):
        assert config_hash(asdict(compose_config(override))) == expected
    for override in ("seed=1", "runs=2", "training.lr=0.02", "model.dropout=0.4", "dataset.split_seed=1"):
        assert config_hash(asdict(compose_config(override))) != expected


def test_references_and_devices_are_refused(tmp_path):
    path = record(tmp_path / "run", status="unfinished") / "config.yaml"
    path.write_text("a: &a [1]\nb: *a\n")
    with pytest.raises(DamagedRecord, match="has references"):
        read_run(tmp_path / "run")
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DamagedRecord, match="is not a regular file"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("loss", '"words"', 'loss="words": expected float | null, got str'),
        ("loss", "NaN", "is not JSON (NaN is no number of JSON)"),
        ("loss", "1e400", "loss=inf: must be a finite number"),
        ("loss", "[1]", "loss=[1]: expected float | null, got array"),
        ("loss", "true", "loss=true: expected float | null, got bool"),
        ("test", "1.5", "test=1.5: expected float <= 1.0"),
        ("epoch", '1, "seconds": "a while"', 'seconds="a while": must be a number or null'),
        ("epoch", '1, "epoch": 1', 'is not JSON (has "epoch" twice)'),
    ],
)
def test_what_is_not_the_line_of_an_epoch_is_named_when_the_lines_are_read(tmp_path, field, value, reason):
    path = record(tmp_path / "run") / "metrics.jsonl"
    path.write_text(re.sub(f'"{field}": [^,}}]*', f'"{field}": {value}', path.read_text(), count=1))
    with pytest.raises(DamagedRecord) as error:
        read_run(tmp_path / "run").metrics()
    assert str(error.value) == f"{path}: line 1: {reason}"


def test_deeply_nested_json_is_damage(tmp_path):
    path = record(tmp_path / "run") / "summary.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(DamagedRecord, match="is not JSON"):
        read_run(tmp_path / "run")


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.sampled_from(["completed", "failed", "interrupted"]))
def test_any_summary_is_read_back_as_it_was_written(extra, status):
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        config = CONFIG | {"task": "measure", "extra": extra}
        folder.write_summary({"schema_version": SCHEMA_VERSION, "status": status, "config": config, "extra": extra})
        run = read_run(folder.path)
    assert run.status == status and run.epochs == 0
    assert run.summary["extra"] == run.summary["config"]["extra"] == without_infinities(extra)


# What is too large to be averaged is refused when it is read, as words are.
NUMBERS = st.floats(-1e299, 1e299) | st.just(math.nan) | st.just(-math.inf) | st.integers(-(2**60), 2**60)


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.text(max_size=5), NUMBERS, max_size=3), max_size=5))
def test_any_metrics_are_read_back_as_they_were_written(lines):
    epochs = [line | {"run": 0, "epoch": number, "loss": 1.0, "test": None} for number, line in enumerate(lines)]
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        folder.write_config(yaml.safe_dump(CONFIG))
        for line in epochs:
            folder.append_metrics(line)
        assert folder.metrics_lines() == len(epochs)
        run = read_run(folder.path)
        assert run.epochs == len(epochs) and run.metrics() == [without_infinities(line) for line in epochs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A completed run, and one that was killed after its last epoch."""
    place = tmp_path_factory.mktemp("whole")
    return {status: record(place / status, status=status) for status in ("completed", "unfinished")}


@pytest.mark.parametrize("status", ["completed", "unfinished"])
@settings(max_examples=50)
@given(st.sampled_from(["summary.json", "metrics.jsonl", "config.yaml"]), st.floats(0, 1, exclude_max=True))
def test_a_record_cut_at_any_byte_is_noticed_or_harmless(whole, status, name, place):
    before = read_run(whole[status])
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(shutil.copytree(whole[status], copy, dirs_exist_ok=True))
        path = folder / name
        content = path.read_bytes() if path.exists() else b""  # an unfinished run has no summary
        cut = content[: int(place * len(content))]
        if content:
            path.write_bytes(cut)
        try:
            after = read_run(folder)
            lines = after.metrics()
        except DamagedRecord as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            assert name != "metrics.jsonl" or status == "completed"
            return
    assert after.status == before.status
    if name == "metrics.jsonl":  # what was being written when the process was killed does not count
        assert status == "unfinished" and after.epochs == cut.count(b"\n")
        assert lines == before.metrics()[: after.epochs]
    elif status == "completed":  # its summary lacks nothing but the end of the line, or its configuration is not read
        assert after.summary == before.summary and (name != "summary.json" or cut == content[:-1])


def shuffled(value, draws):
    """The same mapping with its keys in another order, all the way down."""
    if not isinstance(value, dict):
        return value
    return {name: shuffled(value[name], draws) for name in draws.sample(list(value), len(value))}


@given(st.randoms(use_true_random=False), st.sampled_from(WITHOUT_EFFECT), JSON)
def test_hash_knows_no_order_and_is_blind_to_what_changes_no_number(draws, name, value):
    expected = config_hash(CONFIG)
    assert config_hash(shuffled(CONFIG, draws)) == expected
    resumed = name == "processes"  # which tell the jobs of a sweep apart
    assert config_hash(CONFIG | {name: value}, resumed=resumed) == expected
    assert config_hash({other: field for other, field in CONFIG.items() if other != name}) == expected


LEAVES = [(group, name) for group, value in CONFIG.items() if isinstance(value, dict) for name in value]


@given(st.sampled_from(LEAVES), JSON)
def test_hash_tells_any_two_values_of_a_field_apart(leaf, value):
    group, name = leaf
    old = CONFIG[group][name]
    same = type(old) is type(value) and old == value
    numbers = {type(old), type(value)} <= {int, float} and old == value
    changed = CONFIG | {group: CONFIG[group] | {name: value}}
    assert (config_hash(changed) == config_hash(CONFIG)) is (same or numbers)


def test_processes_tell_jobs_apart_but_not_runs_that_go_on():
    one, old, two = ({"seed": 1, **processes} for processes in ({"processes": 1}, {}, {"processes": 2}))
    assert config_hash(one) == config_hash(old) != config_hash(two)
    assert config_hash(one, resumed=True) == config_hash(two, resumed=True) == config_hash(one)
