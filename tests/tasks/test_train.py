"""Training that is stopped and resumed ends with the numbers of training that was not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
from dataclasses import asdict

import pytest
import torch
import yaml
from rich.console import Console

from iexact_runner import training
from iexact_runner.cli import compose_config
from iexact_runner.errors import ConfigError, UserError
from iexact_runner.experiment import Experiment
from iexact_runner.runs import checkpoint
from iexact_runner.runs.files import TEMPORARY
from iexact_runner.runs.records import DamagedRecord, RunFolder, UnwritableFolder, read_run
from iexact_runner.tasks import progress, train

EPOCHS, RUNS = 6, 2
SMALL = (f"training.epochs={EPOCHS}", f"runs={RUNS}", "model.hidden_channels=8", "checkpoint.every=2")
SMALL += ("dataset=synthetic", "dataset.num_nodes=150", "dataset.num_features=12", "measure.warmup_epochs=1")


class Killed(BaseException):
    """Ends a run where a signal would."""


def run(path, *overrides, resumed=False):
    folder, config = RunFolder(path, resumed=resumed), compose_config(*SMALL, *overrides)
    Experiment(config, folder, Console(file=io.StringIO())).run(yaml.safe_dump(asdict(config)))


def killed_after(monkeypatch, path, lines, *overrides, error=Killed, resumed=False):
    """A run that ends right after it has recorded so many epochs more."""
    record, left = train.record, iter(range(lines - 1, -1, -1))

    def records(*arguments):
        record(*arguments)
        if not next(left):
            raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(train, "record", records)
        run(path, *overrides, resumed=resumed)


def numbers(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    clock = re.compile("seconds$|^time$")
    kept = [{name: value for name, value in line.items() if not clock.search(name)} for line in lines]
    summary = json.loads((path / "summary.json").read_text())
    return kept, summary["accuracy"], summary["distribution"]


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


@pytest.mark.parametrize(
    "overrides",
    [
        ("compression=none",),
        ("compression=iexact",),
        ("compression=lowrank", "compression.refresh=3"),
        ("compression=exact", "precision=bfloat16", "model=gcn2", "model.num_layers=2"),
        ("compression=none", "precision=float16"),
        ("compression=none", "model=gat", "model.label_input=true", "training.optimizer=rmsprop")
        + ("training.warmup_epochs=5",),
        ("compression=int4", "dataset.inductive=true", "task=distribution"),
        ("compression=lowrank", "compression.refresh=3", "sampler=cluster", "sampler.parts=8", "sampler.batch_parts=2")
        + ("sampler.partition=label_propagation",),
        ("compression=lowrank", "compression.refresh=3", "model=module", "model.target=torch_geometric.nn:GraphSAGE")
        + ("model.num_layers=2",),
        ("compression=iexact", "sampler=saint_rw", "sampler.roots=40", "model=gcn"),
        ("compression=none", "sampler=neighbor", "sampler.batch_size=20"),
    ],
    ids=" ".join,
)
def test_resumed_run_ends_with_the_same_numbers(tmp_path, monkeypatch, overrides):
    monkeypatch.chdir(tmp_path)  # where a partition is kept
    run(tmp_path / "whole", *overrides)
    killed_after(monkeypatch, tmp_path / "killed", EPOCHS + 3, *overrides)  # past a checkpoint of the second run
    (tmp_path / "killed" / f"{TEMPORARY}checkpoint.pt.x").touch()  # of a kill while it was written
    run(tmp_path / "killed", *overrides, resumed=True)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert (summary_of(tmp_path / "killed")["resumed"], summary_of(tmp_path / "whole")["resumed"]) == (1, 0)
    assert read_run(tmp_path / "killed").status == "completed"
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
    ]


@pytest.mark.parametrize("steps", [1, 6, 11])
def test_a_run_killed_in_the_middle_of_an_epoch_draws_its_batches_again(tmp_path, monkeypatch, steps):
    sampler = ("compression=lowrank", "compression.refresh=3", "sampler=neighbor", "sampler.batch_size=20")
    run(tmp_path / "whole", *sampler)
    assert json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])["batches"] > 3
    left, step = iter(range(steps, -1, -1)), training.step

    def steps_until_killed(*arguments, **options):
        if not next(left):
            raise Killed
        return step(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "step", steps_until_killed)
        run(tmp_path / "killed", *sampler)
    run(tmp_path / "killed", *sampler, resumed=True)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


# Before, at and after a checkpoint; at the end of a run, at the beginning of the next, at the very end.
@pytest.mark.parametrize("lines", [1, 2, 5, 6, 7, 12])
def test_any_epoch_can_be_the_last(tmp_path, monkeypatch, lines, whole):
    killed_after(monkeypatch, tmp_path / "run", lines)
    assert summary_of(tmp_path / "run")["status"] == "failed"
    run(tmp_path / "run", resumed=True)
    assert numbers(tmp_path / "run") == whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    run(path)
    return numbers(path)


def test_cadence_does_not_change_the_numbers(tmp_path, whole):
    for every in ("1", "null", "auto"):
        run(tmp_path / every, f"checkpoint.every={every}")
        assert numbers(tmp_path / every) == whole


def test_a_run_can_be_resumed_again_and_again(tmp_path, monkeypatch, whole):
    path = tmp_path / "run"
    killed_after(monkeypatch, path, 3)
    for _ in range(3):
        killed_after(monkeypatch, path, 3, resumed=True)
    run(path, resumed=True)
    assert numbers(path) == whole and summary_of(path)["resumed"] == 4


def test_resumed_run_has_not_ended_until_it_does(tmp_path, monkeypatch):
    path = tmp_path / "run"
    killed_after(monkeypatch, path, 3)
    assert read_run(path).status == "failed"
    seen = []

    def looks(*_, **__):
        seen.append(read_run(path).status)
        raise Killed

    monkeypatch.setattr(train, "train_epochs", looks)
    with pytest.raises(Killed):
        run(path, resumed=True)
    assert seen == ["unfinished"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:],
        lambda data: b"",
        lambda data: b"something else",
    ],
    ids=["cut off", "a bit flipped", "empty", "no checkpoint"],
)
def test_damaged_checkpoint_falls_back_to_the_one_before_it(tmp_path, monkeypatch, caplog, whole, damage):
    path = tmp_path / "run"
    killed_after(monkeypatch, path, 5)
    newest = path / checkpoint.CURRENT
    newest.write_bytes(damage(newest.read_bytes()))
    with caplog.at_level("INFO", logger="iexact_runner"):
        run(path, resumed=True)
    assert f"{newest}: is " in caplog.text and "goes on after epoch 2 of run 1" in caplog.text
    assert numbers(path) == whole


def test_without_any_whole_checkpoint_the_run_starts_again(tmp_path, monkeypatch, caplog, whole):
    path = tmp_path / "run"
    killed_after(monkeypatch, path, 5)
    for name in (checkpoint.CURRENT, checkpoint.PREVIOUS):
        (path / name).write_bytes(b"")
    with caplog.at_level("INFO", logger="iexact_runner"):
        run(path, resumed=True)
    assert "has no checkpoint: starts again" in caplog.text and numbers(path) == whole


def test_checkpoints_wait_until_rows_travel_whole(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        checkpoint.Checkpoints, "write", lambda self, state: written.append((state["run"], state["epoch"]))
    )
    delta = ("parallel=graph", "messages.forward=int4", "messages.delta=true", "messages.delta_interval=3")
    run(tmp_path / "run", *delta)
    assert written == [(0, 3), (0, 6), (1, 3), (1, 6)]


def test_lines_that_are_lost_take_the_checkpoint_with_them(tmp_path, monkeypatch, whole):
    path = tmp_path / "run"
    killed_after(monkeypatch, path, 5)
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:10])  # a power failure
    run(path, resumed=True)
    assert numbers(path) == whole


def test_checkpoint_of_another_configuration_is_refused(tmp_path, monkeypatch):
    killed_after(monkeypatch, tmp_path / "run", 3)
    with pytest.raises(ConfigError, match=r"resume=.*run: its checkpoint is of another configuration"):
        run(tmp_path / "run", "training.lr=0.5", resumed=True)


@pytest.mark.parametrize(
    "other", [{"model": {"other": torch.zeros(1)}}, {"machine": torch.zeros(3)}, {"machine": {}}, {"best": 3}], ids=str
)
def test_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch, other):
    killed_after(monkeypatch, tmp_path / "run", 3)
    folder = RunFolder(tmp_path / "run", resumed=True)
    checkpoints = checkpoint.Checkpoints(folder, 1)
    state = checkpoints.read(lines=3)
    checkpoints.write(state | other)
    with pytest.raises(DamagedRecord, match="does not fit this version"):
        run(tmp_path / "run", resumed=True)


def test_another_machine_is_noticed(tmp_path, monkeypatch, caplog):
    killed_after(monkeypatch, tmp_path / "run", 3)
    killed_after(monkeypatch, tmp_path / "other", 3)
    here = progress._machine

    def there(**fields):
        monkeypatch.setattr(progress, "_machine", lambda context: here(context) | fields)

    there(torch="9.9")
    run(tmp_path / "run", resumed=True)
    assert f"resume: torch was {torch.__version__}, is 9.9: the last bits of numbers may differ" in caplog.text
    there(device="cuda")
    with pytest.raises(ConfigError, match="device=auto: the run began on cpu, and goes on there"):
        run(tmp_path / "other", resumed=True)


def test_completed_run_is_left_alone(tmp_path, whole):
    run(tmp_path / "run")
    with pytest.raises(UserError, match="its run is completed; there is nothing to resume"):
        run(tmp_path / "run", resumed=True)
    assert numbers(tmp_path / "run") == whole


def test_second_process_is_refused(tmp_path, monkeypatch):
    with RunFolder(tmp_path / "run").in_use(), pytest.raises(UserError, match="another process runs in it"):
        run(tmp_path / "run", resumed=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("every", ["1000", "auto"])
def test_interrupt_writes_a_checkpoint_first(tmp_path, monkeypatch, whole, number, every):
    record, path = train.record, tmp_path / "run"

    def records(folder, run, epoch):
        record(folder, run, epoch)
        if (run, epoch.number) == (0, 3):
            os.kill(os.getpid(), number)

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "record", records)
            run(path, f"checkpoint.every={every}")
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert summary_of(path)["status"] == "interrupted" and len(numbers(path)[0]) == 3
    assert checkpoint.Checkpoints(RunFolder(path, resumed=True), 1).read(lines=3)["epoch"] == 3
    run(path, resumed=True)
    assert numbers(path) == whole


def test_without_checkpoints_an_interrupt_does_not_wait(tmp_path, monkeypatch):
    killed_after(monkeypatch, tmp_path / "run", 3, "checkpoint.every=null", error=KeyboardInterrupt)
    assert not (tmp_path / "run" / checkpoint.CURRENT).exists()


def test_resumed_throughput_counts_the_timed_epochs_of_all_sessions(tmp_path, monkeypatch):
    killed_after(monkeypatch, tmp_path / "run", 4)  # epochs 2 to 4 timed, the checkpoint holds those of 2
    run(tmp_path / "run", resumed=True)
    # Then 3 and 4 again, the first of which warms up; two of the others warm up too.
    assert summary_of(tmp_path / "run")["throughput"]["timed_epochs"] == 1 + (EPOCHS - 3) + (EPOCHS - 1)


@pytest.mark.parametrize("what", ["metrics.jsonl", "checkpoint.pt", "summary.json"])
def test_full_disk_ends_the_run_in_one_line_and_can_be_resumed(tmp_path, monkeypatch, whole, what):
    path, write, append = tmp_path / "run", RunFolder.write, train.record

    def full(folder, name, content, **options):
        if name == what and folder.metrics_lines() >= 4:
            with folder._writing(name):
                raise OSError(28, "No space left on device")
        write(folder, name, content, **options)

    def full_record(folder, run, epoch):
        if what == "metrics.jsonl" and epoch.number == 5:
            with folder._writing(what):
                raise OSError(28, "No space left on device")
        append(folder, run, epoch)

    with monkeypatch.context() as patch, pytest.raises(UnwritableFolder) as error:
        patch.setattr(RunFolder, "write", full)
        patch.setattr(train, "record", full_record)
        run(path)
    message = f"{path}: {what} cannot be written (No space left on device); make room, then go on with resume={path}"
    assert str(error.value) == message
    run(path, resumed=True)
    assert numbers(path) == whole


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_disk_that_is_really_full(small_disk, monkeypatch, whole):
    path, record = small_disk / "run", train.record

    def fills_the_disk(folder, run, epoch):
        record(folder, run, epoch)
        if epoch.number == 3:
            with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    with monkeypatch.context() as patch, pytest.raises(UnwritableFolder, match="No space left on device"):
        patch.setattr(train, "record", fills_the_disk)
        run(path)
    assert read_run(path).status == "unfinished" and read_run(path).metrics() == whole_lines(path)
    assert checkpoint.Checkpoints(RunFolder(path, resumed=True), 1).read(lines=9)["epoch"] == 2
    (small_disk / "filler").unlink()
    run(path, resumed=True)
    assert numbers(path) == whole


def whole_lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_epochs_without_an_evaluation_have_no_scores_and_change_nothing_else(tmp_path, monkeypatch):
    """Also after a kill in between: the last epoch has one, and the best is the best of those there were."""
    run(tmp_path / "every")
    run(tmp_path / "some", "training.eval_every=4")
    every, some = (whole_lines(tmp_path / name) for name in ("every", "some"))
    evaluated = [line["epoch"] in (4, 6) for line in some]
    assert [line["val"] is not None for line in some] == evaluated
    for line, other, there in zip(some, every, evaluated, strict=True):
        kept = {name for name in line if name not in ("seconds", "time")}
        assert {name: other[name] for name in kept if there or name not in ("train", "val", "test")} == {
            name: line[name] for name in kept if there or name not in ("train", "val", "test")
        }
    values = json.loads((tmp_path / "some" / "summary.json").read_text())["accuracy"]["val"]["values"]
    assert values == [
        max(line["val"] for line in some if line["run"] == index and line["val"] is not None) for index in range(RUNS)
    ]
    killed_after(monkeypatch, tmp_path / "killed", 3, "training.eval_every=4")
    run(tmp_path / "killed", "training.eval_every=4", resumed=True)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "some")
