"""The worked examples of docs/extending.md, followed to the letter in a copy of the repository.

Of the tests that the page runs, those run here that know what is new; all kernels in all backends take minutes.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import REPOSITORY
from documents import commands, follow
from test_documented_commands import SMALL

PAGE = REPOSITORY / "docs" / "extending.md"
COMMANDS = [shlex.split(command) for command in commands(PAGE)]
NEW = "gin-3 or relu6 or reach or every_operator or quick"
# Runs one command line after another, and says how each ended.
IN_ONE_PROCESS = """
import json, sys
from iexact_runner.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code
    print(f"exit status {status}: {' '.join(words)}", file=sys.stderr)
"""
NUMBA_EQUALS_THE_REFERENCE = """
import torch
from iexact_runner.kernels import parity
from iexact_runner.kernels import numba as numba_kernels

calls = [case for case in parity.cases(quick=True) if case.function == "relu6"]
assert len(calls) > 1 and not parity.mismatches(numba_kernels, torch.device("cpu"), calls)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with all that the page says."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("conf", "docs", "src", "tests"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    follow(PAGE, folder)
    return folder


def python(copy, *arguments, cwd):
    # A proxy that refuses at once: no test reaches the network.
    dead = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | dead | {"PYTHONPATH": str(copy / "src")},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_what_is_added_runs(copy, tmp_path):
    # NUMBA_EQUALS_THE_REFERENCE runs the new kernel; compiling all others anew in the copy takes most of a minute.
    settings = [*(f"{field}={value}" for field, value in SMALL.items()), "compression.backend=torch"]
    lines = [[word.replace("DIR", str(tmp_path)) for word in words[1:]] for words in COMMANDS if words[0] == "iexact"]
    program = IN_ONE_PROCESS + NUMBA_EQUALS_THE_REFERENCE
    result = python(copy, "-c", program, json.dumps([[*line, *settings] for line in lines]), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for line in lines:
        missing = "dataset=roman_empire" in line
        assert f"exit status {int(missing)}: {' '.join(line)}" in result.stderr, result.stdout + result.stderr
    assert "roman_empire.npz" in result.stderr and "https://" in result.stderr


def test_tests_of_what_is_added_pass(copy):
    called = [words for words in COMMANDS if words[:3] == ["python", "-m", "pytest"]]
    paths = [word for words in called for word in words if word.startswith("tests/")]
    assert len(called) == len(paths) == len(COMMANDS) - sum(words[0] == "iexact" for words in COMMANDS)
    result = python(copy, "-m", "pytest", "-v", *paths, "-k", NEW, cwd=copy)
    assert result.returncode == 0, result.stdout[-5000:]
    for name in ("gin-3-directed", "relu6-1", "reach", "quick", "test_operator_is_registered_soundly[relu6]"):
        assert name in result.stdout
