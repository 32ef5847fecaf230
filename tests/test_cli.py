"""The command as a user meets it: its own process, its exit status, its screen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import commands
from conftest import REPOSITORY
from iexact_runner import __version__

# A proxy that refuses at once: no test reaches the network.
DEAD = "http://127.0.0.1:9"
QUICK = ("training.epochs=3", "model.hidden_channels=8", "dataset=digits")


def iexact(*arguments, cwd, env=None):
    return commands.run("-m", "iexact_runner", *arguments, cwd=cwd, env=os.environ | (env or {}))


def only_run(folder):
    (run,) = (path for path in (folder / "outputs").iterdir())
    return run


def test_default_job_in_its_own_folder(tmp_path):
    result = iexact(*QUICK, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    run = only_run(tmp_path)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "metrics.jsonl", "summary.json"]
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    assert "test accuracy" in result.stdout and run.name in result.stdout
    assert "hidden_channels: 8" in (run / "config.yaml").read_text()


def test_help_reads_as_documentation_and_is_quick(tmp_path):
    start = time.perf_counter()
    command = [sys.executable, "-m", "iexact_runner", "--help"]  # a new interpreter, which imports what it needs
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0 and time.perf_counter() - start < 10
    for word in (
        "compression=NAME and its fields",
        "lowrank",
        "kept_frac",
        "task=measure",
        "-m seed=0,1",
        "hidden_channels: 128",
    ):
        assert word in result.stdout
    code = "import sys, iexact_runner.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compression.bitz=3", "compression.bitz: no such field; did you mean bits? valid: scheme, format, bits"),
        ("compression.bits=3", "compression.bits=3: must be one of 1, 2, 4, 8"),
        ("compression.bits=two", "compression.bits=two: Value 'two' of type 'str' could not be converted"),
        ("+compression.bitz=3", "compression.bitz: no such field; did you mean bits?"),
        ("modell.name=x", "modell"),
        ("epochs=3", "epochs: no such field; did you mean training.epochs or fidelity.epochs?"),
        ("+heads=3", "heads: no such field; did you mean model.heads?"),
        ("epochs", "'epochs': must be FIELD=VALUE; iexact --help lists the fields"),
        (
            "model=sagee",
            "model=sagee: no such choice; did you mean sage? valid: deepergcn, gat, gcn, gcn2, graphconv, module, sage",
        ),
        ("dataset=corra", "dataset=corra: no such choice; did you mean cora?"),
        ("model.heads=2", "model.heads: no such field; valid: name"),
        ("training.lr=[1", "no viable alternative at input"),
        ("seed=0,1", "Ambiguous value for argument 'seed=0,1'"),
        ("compression.backend=triton", "compression.backend=triton"),
        ("device=cuda:7", "device=cuda:7"),
        ("model=null", "GROUP=null: a group needs a choice"),
        ("recipe=null", "~recipe"),
        ("model.name=foo", "model.name=foo: choose one with model=NAME"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, override, words):
    result = iexact(override, cwd=tmp_path)
    assert result.returncode == 2
    assert words in result.stderr and result.stderr.startswith("iexact: ")
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_table_of_bins_needs_no_dataset(tmp_path):
    result = iexact("task=bins", "dataset=arxiv", "dataset.root=nowhere", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    run = only_run(tmp_path)
    files = ["bins.csv", "bins.png", "bins.svg", "config.yaml", "summary.json"]
    assert sorted(path.name for path in run.iterdir()) == files
    assert "1.04996" in result.stdout and run.name in result.stdout


def test_debug_shows_the_traceback(tmp_path):
    result = iexact("compression.bits=3", "debug=true", cwd=tmp_path)
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("iexact: compression.bits=3")


def test_empty_output_folder_is_not_the_root(tmp_path):
    result = iexact(*QUICK, "output_dir=", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == "iexact: output_dir='': must be a folder\n"


def test_version(tmp_path):
    assert iexact("--version", cwd=tmp_path).stdout == f"iexact {__version__}\n"


def test_reader_that_leaves_does_not_end_the_run(tmp_path):
    command = f"{sys.executable} -m iexact_runner {' '.join(QUICK)} | head -n 1"
    subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, timeout=300, check=False)
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("completed", None)
    assert len((only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()) == 3


def test_runs_never_share_a_folder(tmp_path):
    assert iexact(*QUICK, "hydra.run.dir=same", cwd=tmp_path).returncode == 0
    again = iexact(*QUICK, "hydra.run.dir=same", cwd=tmp_path)
    assert again.returncode == 1 and "already holds metrics.jsonl and summary.json" in again.stderr
    assert len((tmp_path / "same" / "metrics.jsonl").read_text().splitlines()) == 3


def test_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    result = iexact(*QUICK, "output_dir=file", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "output_dir" in result.stderr and "cannot be written" in result.stderr


def test_missing_dataset_fails_with_one_line_and_a_record(tmp_path):
    result = iexact(
        "dataset=amazon_photo", "dataset.root=nowhere", cwd=tmp_path, env={"http_proxy": DEAD, "https_proxy": DEAD}
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "amazon_electronics_photo.npz" in result.stderr
    assert json.loads((only_run(tmp_path) / "summary.json").read_text())["status"] == "failed"


def test_sweep_runs_all_jobs_and_reports_the_bad_one(tmp_path):
    result = iexact("-m", *QUICK, "compression.bits=3,2", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("iexact: job 0 (") and "): compression.bits=3: must be" in result.stderr
    summaries = list(tmp_path.rglob("summary.json"))
    assert len(summaries) == 1 and json.loads(summaries[0].read_text())["status"] == "completed"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_run_keeps_what_it_had(tmp_path, sent):
    process = commands.start("-m", "iexact_runner", "training.epochs=100000", "model.hidden_channels=8", cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    way_on = "the same command with resume=auto goes on"
    assert process.returncode == 130
    assert stderr == f"iexact: interrupted: what was recorded so far is kept; {way_on}\n"
    run = only_run(tmp_path)
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, len(lines) + 1))


def test_wheel_runs_away_from_the_checkout(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    packed = {name.removeprefix("iexact_runner/") for name in names if name.startswith("iexact_runner/conf/")}
    assert packed == {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "conf").rglob("*.yaml")}
    assert "iexact_runner/py.typed" in names
    result = iexact(*QUICK, "hydra.verbose=false", cwd=work, env={"PYTHONPATH": str(site)})
    assert result.returncode == 0, result.stderr
    assert json.loads((only_run(work) / "summary.json").read_text())["environment"]["git_commit"] is None
    where = subprocess.run(
        [sys.executable, "-c", "import iexact_runner; print(iexact_runner.__file__)"],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
