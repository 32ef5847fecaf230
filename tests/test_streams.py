"""A screen that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMMAND = f"{sys.executable} -m iexact_runner"
QUICK = "training.epochs=2 model.hidden_channels=4 compression=none hydra.run.dir=run"
# Prints a line to both streams, and says with its exit status whether it was told of a loss.
TALK = """
import os, sys
from iexact_runner.streams import forgiving_streams
with forgiving_streams() as is_lost:
    print("to stdout \\u2713")
    print("to stderr", file=sys.stderr)
    sys.stdout.flush()
    free = os.open(os.devnull, os.O_RDONLY)
    lost = is_lost()
    print("after")
sys.exit(3 * lost + 10 * (free < 3))
"""


def shell(command, cwd, **more):
    return subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, text=True, timeout=300, **more)


@pytest.mark.parametrize(
    ("redirections", "status", "stderr"),
    [
        ("", 0, "to stderr\n"),
        (
            ">/dev/full",
            3,
            "to stderr\niexact: stdout: cannot be written (No space left on device); the records are whole\n",
        ),
        (">&-", 3, "to stderr\niexact: stdout: cannot be written (Bad file descriptor); the records are whole\n"),
        ("2>/dev/full", 3, ""),
        (">/dev/full 2>&1", 3, ""),
        ("<&- >&- 2>&-", 3, ""),
        ("> >(true)", 3, "to stderr\n"),
    ],
    ids=["whole", "full", "closed", "full stderr", "both full", "all closed", "reader left"],
)
def test_loss_of_the_screen_is_told_and_ends_nothing(tmp_path, redirections, status, stderr):
    (tmp_path / "talk.py").write_text(TALK if ">(" not in redirections else "import time; time.sleep(0.3)\n" + TALK)
    result = shell(f"{sys.executable} talk.py {redirections}", tmp_path)
    assert (result.returncode, result.stderr) == (status, stderr)
    assert (result.stdout != "") == (redirections in ("", "2>/dev/full"))


def test_letters_that_the_screen_lacks_are_spelt_out(tmp_path):
    (tmp_path / "talk.py").write_text(TALK)
    result = shell(f"{sys.executable} talk.py", tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and "to stdout \\u2713\nafter\n" == result.stdout


@pytest.mark.parametrize(
    ("arguments", "status"),
    [("--version >/dev/full", 3), ("--help >/dev/full", 3), ("compression.bits=3 2>/dev/full", 2)],
    ids=["version", "help", "bad input"],
)
def test_command_that_cannot_speak(tmp_path, arguments, status):
    result = shell(f"{COMMAND} {arguments}", tmp_path)
    assert result.returncode == status and "Traceback" not in result.stderr and result.stderr.count("\n") <= 1
    assert list(tmp_path.iterdir()) == []


def test_run_on_a_full_screen_is_completed(tmp_path):
    result = shell(f"{COMMAND} {QUICK} >/dev/full", tmp_path)
    assert result.returncode == 3
    assert result.stderr == "iexact: stdout: cannot be written (No space left on device); the records are whole\n"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
