"""The worked examples of docs/extending.md, followed to the letter in a copy of the repository."""

from __future__ import annotations

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
COMMANDS = commands(PAGE)
SETTINGS = [f"{field}={value}" for field, value in SMALL.items()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with all that the page says."""
    folder = tmp_path_factory.mktemp("extended")
    # Compiled kernels are kept in __pycache__, by the time and size of their file.
    for name in ("conf", "docs", "src", "tests"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    follow(PAGE, folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_command_works_in_the_extended_copy(command, copy, tmp_path):
    program, *words = shlex.split(command)
    if program == "iexact":
        words = ["-m", "iexact_runner", *(word.replace("DIR", str(tmp_path)) for word in words), *SETTINGS]
    # A proxy that refuses at once: no test reaches the network.
    dead = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, *words],
        cwd=copy if program == "python" else tmp_path,
        env=os.environ | dead | {"PYTHONPATH": str(copy / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "roman_empire" in command:
        assert result.returncode == 1 and "roman_empire.npz" in result.stderr and "https://" in result.stderr
    else:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
