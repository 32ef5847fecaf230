"""Jobs of a sweep: their status, who runs them, and what survives a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

import commands
from iexact_runner.errors import ConfigError
from iexact_runner.runs import jobs, sweeps
from iexact_runner.runs.jobs import JOB_LOCK, Ended, Job, jobs_below
from iexact_runner.runs.locks import locked
from iexact_runner.runs.records import config_hash, run_folders
from iexact_runner.runs.sweeps import Sweep

KEPT = ("loss", "train", "val", "test", "run", "epoch")


def make_sweep(folder, *, skip_completed=False, fail_fast=False):
    return Sweep(folder, title="sweep", skip_completed=skip_completed, fail_fast=fail_fast)


def place(sweep, *hashes):
    """Jobs with these hashes, and those of them that are to be launched."""
    with sweep.placing():
        placed = [sweep.place([f"seed={name}"], config_hash=name, subfolder=str) for name in hashes]
    return [job for job, _ in placed], [job for job, new in placed if new]


def work(sweep, job, error=None, *, fail_fast=False):
    """Does a job; whether it was this call's to do."""
    with job.attempt(sweep.folder, fail_fast=fail_fast) as mine:
        if mine:
            status = "completed" if error is None else "failed"
            (job.folder / "summary.json").write_text(json.dumps({"status": status}))
            if error is not None:
                raise error
    return mine


def die(job, *, state="running"):
    """Leaves a job as a killed process does."""
    status = job.status() | {"state": state, "started": time.time()}
    (job.folder / "status.json").write_text(json.dumps(status))


@pytest.fixture(autouse=True)
def any_summary_is_whole(monkeypatch):
    """Lets the jobs of these tests make do with a summary of one field."""
    real = jobs.read_run

    def read(folder):
        path = folder / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else {"config": None}
        return real(folder) if "config" in summary else type("Run", (), {"status": summary["status"]})

    monkeypatch.setattr(jobs, "read_run", read)


def test_job_is_done_once_however_often_it_is_launched(tmp_path):
    sweep = make_sweep(tmp_path)
    (job,), _ = place(sweep, "a")
    done = []
    threads = [threading.Thread(target=lambda: done.append(work(sweep, job))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [False] * 7 + [True] and job.state == "completed"


def test_failure_is_recorded_with_its_traceback_and_set_aside(tmp_path):
    sweep = make_sweep(tmp_path)
    (job,), _ = place(sweep, "a")
    with pytest.raises(RuntimeError):
        work(sweep, job, RuntimeError("the reason\nin two lines"))
    status = job.status()
    assert (status["state"], status["error"]) == ("failed", "RuntimeError: the reason")
    assert "in work" in status["traceback"] and status["ended"] >= status["started"] >= status["queued"]
    for number in (1, 2):
        (again,), ready = place(make_sweep(tmp_path, skip_completed=True), "a")
        assert ready == [again] and again.folder == job.folder and again.state == "queued"
        assert not (job.folder / "summary.json").exists()
        aside = Job(job.folder / f"attempt_{number}")
        assert aside.status() == status and (aside.folder / "summary.json").exists()
        with pytest.raises(RuntimeError):
            work(sweep, job, RuntimeError("the reason\nin two lines"))
        status = job.status()
    assert run_folders([tmp_path]) == [job.folder] and [job.folder for job in jobs_below(tmp_path)] == [job.folder]


def test_completed_jobs_are_known_by_their_hash_whatever_their_number(tmp_path):
    first = make_sweep(tmp_path)
    jobs, _ = place(first, "a", "b")
    for job in jobs:
        work(first, job)
    more = make_sweep(tmp_path, skip_completed=True)
    placed, ready = place(more, "c", "b", "a", "a")
    assert [job.folder.name for job in placed] == ["2", "1", "0", "3"] and [job.folder.name for job in ready] == [
        "2",
        "3",
    ]
    assert not more.completed
    for job in ready:
        work(more, job)
    assert more.completed
    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    more.show(console)
    text = console.export_text()
    assert text.count("completed before") == 2 and "seed=c" in text


DAMAGES = {
    "empty": b"",
    "binary": b"\x80\x02\xff",
    "a list": b"[]",
    "no fields": b"{}",
    "one field": b'{"state": "completed"}',
    "deep": b"[" * 100_000,
    "a hash that is none": {"config_hash": {}},
    "an unknown state": {"state": "done"},
}


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_job_with_a_damaged_status_runs_once_under_its_own_number(tmp_path, content):
    first = make_sweep(tmp_path)
    jobs, _ = place(first, "a", "b", "c")
    for job in jobs:
        work(first, job)
    path = jobs[1].folder / "status.json"
    damaged = content if isinstance(content, bytes) else json.dumps(jobs[1].status() | content).encode()
    path.write_bytes(damaged)
    told = []
    again = make_sweep(tmp_path, skip_completed=True)
    with again.placing(announce=told.append):
        placed = [again.place([], config_hash=name, subfolder=str) for name in "abc"]
    assert [job.folder for job, _ in placed] == [job.folder for job in jobs]
    assert [new for _, new in placed] == [False, True, False]
    assert (line := "".join(told)).startswith(f"{path}: ") and line.endswith("; set aside, and the job runs again")
    assert {file.name for file in (jobs[1].folder / "attempt_1").iterdir()} == {"status.json", "summary.json"}
    assert (jobs[1].folder / "attempt_1" / "status.json").read_bytes() == damaged
    assert work(again, jobs[1]) and again.completed
    assert len(jobs_below(tmp_path)) == 3


def test_damaged_job_is_known_by_its_records_whatever_its_number(tmp_path):
    sweep = make_sweep(tmp_path)
    config = {"task": "train", "model": {}, "dataset": {}, "compression": {}, "seed": 3}
    (job, other), _ = place(sweep, config_hash(config), "b")
    (job.folder / "config.yaml").write_text(json.dumps(config))
    for damage in (json.dumps(job.status() | {"config_hash": "0" * 16}), "{}"):
        (job.folder / "status.json").write_text(damage)
        placed, _ = place(make_sweep(tmp_path, skip_completed=True), "b", config_hash(config))
        assert [found.folder for found in placed] == [other.folder, job.folder]
        (job.folder / "config.yaml").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop"])
def test_status_that_is_no_file_is_set_aside(tmp_path, kind):
    (job,), _ = place(make_sweep(tmp_path), "a")
    path = job.folder / "status.json"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    placed, ready = place(make_sweep(tmp_path, skip_completed=True), "a")
    assert placed == ready and placed[0].folder == job.folder and job.state == "queued"
    assert os.path.lexists(job.folder / "attempt_1" / "status.json")


def test_completed_records_of_a_lost_job_are_not_continued(tmp_path):
    sweep = make_sweep(tmp_path)
    (job,), _ = place(sweep, "a")
    work(sweep, job)
    (job.folder / "status.json").write_text("{}")
    resuming = Sweep(tmp_path, title="sweep", skip_completed=True, fail_fast=False, keep_records=True)
    assert place(resuming, "a")[1] and not (job.folder / "summary.json").exists()


def test_status_damaged_while_a_sweep_goes_on_ends_no_other_job(tmp_path):
    sweep = make_sweep(tmp_path, fail_fast=True)
    jobs, ready = place(sweep, "a", "b")
    (jobs[0].folder / "status.json").write_text("{}")

    def launch(jobs):
        for job in jobs:
            work(sweep, job, fail_fast=True)

    sweep.run(ready, launch)
    assert [job.state for job in jobs] == ["lost", "completed"] and not sweep.completed
    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    sweep.show(console)
    assert "status.json: lacks state" in console.export_text()


def test_nothing_in_a_status_acts_on_the_terminal(tmp_path):
    sweep = make_sweep(tmp_path)
    (job,), _ = place(sweep, "a")
    (job.folder / "status.json").write_text(json.dumps(job.status() | {"error": "x\x1b[2J[/no]\ud800"}))
    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    sweep.show(console)
    assert "x\\x1b[2J[/no]\\ud800" in console.export_text()


def test_lost_records_are_made_again(tmp_path):
    sweep = make_sweep(tmp_path)
    (job,), _ = place(sweep, "a")
    work(sweep, job)
    (job.folder / "summary.json").unlink()
    assert place(make_sweep(tmp_path, skip_completed=True), "a")[1] != []


@pytest.mark.parametrize("state", ["running", "failed"])
def test_kill_between_the_last_two_files_costs_nothing(tmp_path, state):
    sweep = make_sweep(tmp_path)
    (job,), _ = place(sweep, "a")
    work(sweep, job)
    die(job, state=state)
    assert place(make_sweep(tmp_path, skip_completed=True), "a")[1] == [] and job.state == "completed"


def test_job_at_work_elsewhere_is_left_alone_and_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 0.1)
    monkeypatch.setattr(sweeps, "PATIENCE", 0.1)
    first, second, messages = make_sweep(tmp_path), make_sweep(tmp_path, skip_completed=True), []
    (job,), _ = place(first, "a")
    with job.attempt(tmp_path, fail_fast=False):
        assert place(second, "a")[1] == []
        waiting = threading.Thread(target=second.wait, args=[messages.append])
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and messages == ["waiting for job 0: another sweep is at work on it"]
    waiting.join(10)
    assert not waiting.is_alive() and second.completed


def test_sweeps_of_one_folder_take_different_places(tmp_path):
    names, placed = [f"job{number}" for number in range(20)], []
    threads = [threading.Thread(target=lambda: placed.append(place(make_sweep(tmp_path), *names)[1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folders = [job.folder for jobs in placed for job in jobs]
    assert len(folders) == len(set(folders)) == 80


def test_place_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "file").touch()
    sweep = make_sweep(tmp_path)
    with sweep.placing(), pytest.raises(ConfigError, match="hydra.sweep.subdir"):
        sweep.place([], config_hash="a", subfolder=lambda number: "same")


def test_fail_fast_begins_no_further_job(tmp_path):
    sweep = make_sweep(tmp_path, fail_fast=True)
    jobs, ready = place(sweep, "a", "b", "c")

    def launch(jobs):
        for job in jobs:
            with suppress(RuntimeError):
                work(sweep, job, RuntimeError("no") if job is ready[1] else None, fail_fast=True)

    sweep.run(ready, launch)
    assert [job.state for job in jobs] == ["completed", "failed", "queued"]
    other = make_sweep(tmp_path, fail_fast=True)  # whose jobs did not fail
    _, ready = place(other, "d")
    assert work(other, ready[0], fail_fast=True)


def test_killed_job_takes_no_other_with_it(tmp_path):
    """As joblib does it: one process dies, all others are killed, and the launcher gives up."""
    sweep = make_sweep(tmp_path)
    jobs, ready = place(sweep, *"abcdef")
    launches = []

    def launch(jobs):
        launches.append([job.folder.name for job in jobs])
        for first, second in zip(jobs[::2], [*jobs[1::2], None], strict=False):
            if ready[2] in (first, second):
                for job in filter(None, (first, second)):
                    die(job)
                raise RuntimeError("a process was killed")
            for job in filter(None, (first, second)):
                work(sweep, job)

    sweep.run(ready, launch)
    assert [job.state for job in jobs] == ["completed"] * 2 + ["failed"] + ["completed"] * 3
    assert jobs[2].status()["error"].startswith("Ended: the job's process was killed")
    assert launches == [["0", "1", "2", "3", "4", "5"], ["4", "5"], ["2"], ["3"]]


def test_launcher_that_begins_nothing_is_an_error(tmp_path):
    sweep = make_sweep(tmp_path)
    _, ready = place(sweep, "a")
    with pytest.raises(Ended):
        sweep.run(ready, lambda jobs: None)
    with pytest.raises(OSError, match="no such queue"):
        sweep.run(ready, lambda jobs: (_ for _ in ()).throw(OSError("no such queue")))


def start(*arguments, cwd):
    return commands.start(*COMMAND, *arguments, cwd=cwd, env=ONE_THREAD)


COMMAND = ("-m", "iexact_runner", "-m", "dataset=digits", "model.hidden_channels=8")
# A launcher of several processes gives each fewer threads, and sums over others differ in the last bit.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*arguments, cwd):
    return commands.run(*COMMAND, *arguments, cwd=cwd, env=ONE_THREAD)


def states(folder):
    return {job.folder.name: job.state for job in jobs_below(folder)}


def metrics(folder):
    """What every job recorded, by its configuration, without the times."""
    found = {}
    for job in jobs_below(folder):
        lines = []
        if job.state == "completed":
            lines = (job.folder / "metrics.jsonl").read_text().splitlines()
            summary = json.loads((job.folder / "summary.json").read_text())
            assert job.status()["config_hash"] == config_hash(summary["config"])
        assert job.status()["config_hash"] not in found
        found[job.status()["config_hash"]] = [[json.loads(line)[name] for name in KEPT] for line in lines]
    return found


SWEEP = ("training.epochs=60", "seed=0,1,2", "hydra.sweep.dir=sweep", "sweep.skip_completed=true")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the jobs of SWEEP record if nothing goes wrong."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(*SWEEP, cwd=folder).returncode == 0
    found = metrics(folder / "sweep")
    assert [len(lines) for lines in found.values()] == [60, 60, 60]
    return found


def test_killed_sweep_ends_as_an_undisturbed_one(tmp_path, undisturbed):
    """The first kill is followed by a new attempt, the second by one that goes on from a checkpoint."""
    draws = random.Random(0)
    for job in ("0", "1"):
        process = start(*SWEEP, "checkpoint.every=5", cwd=tmp_path)
        deadline = time.monotonic() + 120
        while states(tmp_path / "sweep").get(job) != "running" and time.monotonic() < deadline:
            time.sleep(0.02)
        while not (tmp_path / "sweep" / job / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draws.uniform(0.1, 0.3))
        process.kill()
        process.wait()
        assert states(tmp_path / "sweep")["2"] == "queued"
    result = run(*SWEEP, "resume=auto", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert "completed before" in result.stdout
    assert metrics(tmp_path / "sweep") == undisturbed
    first, second = (tmp_path / "sweep" / job for job in ("0", "1"))
    assert {path.name for path in (first / "attempt_1").iterdir()} > {"status.json", "metrics.jsonl"}
    assert [path.name for path in (second / "attempt_1").iterdir()] == ["status.json"]
    assert json.loads((second / "summary.json").read_text())["resumed"] == 1


def test_lines_of_also_add_their_own_choices(tmp_path):
    """With all choices of the fields that they do not name; as one sweep, whose jobs are known from its beginning."""
    also = "hydra.sweeper.also=['compression=none precision=bfloat16', 'compression=int8']"
    folder = "hydra.sweep.dir=sweep"
    result = run("compression=none,int4", "seed=0,1", also, "training.epochs=1", folder, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    swept = [job.status()["overrides"] for job in jobs_below(tmp_path / "sweep")]
    chosen = [{word.split("=")[0]: word.split("=")[1] for word in overrides} for overrides in swept]
    found = [(each["compression"], each.get("precision"), each["seed"]) for each in chosen]
    first = [(compression, None, seed) for compression in ("none", "int4") for seed in "01"]
    assert found == [*first, *[("none", "bfloat16", seed) for seed in "01"], *[("int8", None, seed) for seed in "01"]]
    assert {job.state for job in jobs_below(tmp_path / "sweep")} == {"completed"}


def test_two_sweeps_at_once_share_a_folder(tmp_path, undisturbed):
    processes = [start(*SWEEP, cwd=tmp_path) for _ in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    assert metrics(tmp_path / "sweep") == undisturbed
    assert not list(tmp_path.rglob("attempt_*"))


@pytest.mark.parametrize(
    ("launcher", "plugin", "seeds"),
    [("processes", "hydra_joblib_launcher", (0, 1)), ("submitit_local", "hydra_submitit_launcher", (0,))],
    ids=["joblib", "submitit"],
)
def test_launcher_of_several_processes(tmp_path, undisturbed, launcher, plugin, seeds):
    if importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip(f"{plugin} is not installed")
    swept = f"seed={','.join(map(str, seeds))}", "device=auto,cuda:99"
    result = run("training.epochs=60", "hydra.sweep.dir=sweep", *swept, f"hydra/launcher={launcher}", cwd=tmp_path)
    assert result.returncode == 1
    assert list(states(tmp_path / "sweep").values()) == ["completed", "failed"] * len(seeds)
    table = result.stdout[result.stdout.index("sweep: jobs") :]
    assert table.count("ConfigError: device=cuda:99") == len(seeds) and "test accuracy" in table
    completed = {name: lines for name, lines in metrics(tmp_path / "sweep").items() if lines}
    assert completed.items() <= undisturbed.items() and len(completed) == len(seeds)


def test_launcher_without_its_plugin_names_the_extra(tmp_path):
    if importlib.util.find_spec("ray") is not None:
        pytest.skip("ray is installed")
    result = run("hydra/launcher=ray_cluster", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "iexact: hydra/launcher/ray: is not installed: pip install 'iexact-runner[ray]'\n"


def test_every_kind_of_failure_has_a_status_and_stops_no_other(tmp_path):
    arguments = ("training.epochs=3", "compression=iexact,nothing", "compression.bits=2,3", "hydra.sweep.dir=sweep")
    result = run(*arguments, "runs=1,2", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 6
    found = states(tmp_path / "sweep")
    assert [number for number, state in found.items() if state == "completed"] == ["0", "1"] and len(found) == 8
    errors = [job.status()["error"] for job in jobs_below(tmp_path / "sweep")]
    assert errors[2].startswith("ConfigError: compression.bits=3") and "compression/nothing" in errors[4]
    assert all(job.status()["traceback"] for job in jobs_below(tmp_path / "sweep") if job.state == "failed")
    assert "hydra.sweep.dir=sweep sweep.skip_completed=true runs what is missing" in result.stdout
    stopped = run(*arguments, "sweep.fail_fast=true", cwd=tmp_path)
    assert stopped.returncode == 2 and states(tmp_path / "sweep")["8"] == "queued"


def test_sweep_to_take_up_has_a_name(tmp_path):
    result = run("sweep.skip_completed=true", "seed=0,1", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "iexact: sweep.skip_completed=true: name the sweep's folder with hydra.sweep.dir=FOLDER\n"


def test_lock_of_a_job_is_not_one_of_its_records(tmp_path):
    sweep = make_sweep(tmp_path)
    (job,), _ = place(sweep, "a")
    with locked(job.folder / JOB_LOCK):
        assert Path(job.folder, JOB_LOCK).stat().st_size == 0
    assert run_folders([tmp_path]) == []
