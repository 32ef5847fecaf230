"""Every code block of README, CONTRIBUTING and docs/ does what it says; none is of a kind that nothing here runs.

The rule for commands, by the program:

- ``iexact`` is composed and checked as it stands, then run, smaller: on the digits where its graph needs files or has
  more than 20,000 nodes, for two epochs, two jobs of a sweep, in this process instead of a launcher's. A command line
  of an experiment is composed only: CI runs all experiments in their quick variants.
- ``iexact-report`` runs on what the commands before it on its page have recorded.
- ``python scripts/NAME.py`` has its arguments parsed by the script; ``test_scripts`` runs the scripts.
- Anything else sets up or checks a checkout. It stands in ``.ci/run``, which runs the README too, or names
  extras and tools that exist.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import signal
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY
from documents import PAGES, blocks, commands, name
from iexact_runner import cli
from iexact_runner.cli import compose_config
from iexact_runner.report import command
from iexact_runner.runs.records import RunFolder

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CI = (REPOSITORY / ".ci" / "run").read_text()
LARGEST = 20_000
SMALL = {
    "training.epochs": "2",
    "model.hidden_channels": "16",
    "measure.warmup_epochs": "0",
    "measure.timed_epochs": "3",
    "fidelity.epochs": "[1,2]",
    "fidelity.draws": "2",
}
# Its blocks change the code: tests/test_extending.py.
RUNNABLE = [page for page in PAGES if page.name != "extending.md" and blocks(page)]


class Parsed(Exception):
    """A script took its arguments."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def run(main, words):
    """Runs an entry point in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(words))
        try:
            main()
        except SystemExit as end:
            assert not end.code, f"{' '.join(words)}: exit status {end.code}"


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_every_command_works(page, here, monkeypatch):
    if any(line.startswith("iexact-report") for line in commands(page)):
        run(cli.main, ["iexact", *small([])])
    for line in commands(page):
        # What stands behind > is where the shell puts it.
        for part in re.split(" && ", line.partition(" > ")[0]):
            words = shlex.split(part, comments=True)
            match words[0]:
                case "iexact":
                    check_iexact(words[1:], here)
                case "iexact-report":
                    run(command.main, ["iexact-report", *map(recorded, words[1:])])
                case "torchrun" if "iexact_runner" in words:
                    check_iexact(words[words.index("iexact_runner") + 1 :], here)
                case "torchrun":
                    check_arguments(words[3:], monkeypatch)
                case "python" if words[1].startswith("scripts/"):
                    check_arguments(words[1:], monkeypatch)
                case _:
                    check_set_up(part, words)


def check_iexact(words, here):
    """Composes a command line as it stands, and runs it small."""
    sweep, overrides = "-m" in words, [filled(word, here) for word in words if "=" in word or word.startswith("~")]
    overrides = [word for word in overrides if not re.match(r"hydra[./]", word)]
    resumed = [word.removeprefix("resume=") for word in overrides if re.match(r"resume=(?!auto)", word)]
    if resumed:
        stopped(here / resumed[0])
    if not resumed and not any(word.startswith("-") and word not in ("-m", "--cfg") for word in words):
        config = compose_config(*(last_choice(word) if sweep else word for word in overrides))
        if not is_small(config.dataset):
            overrides = [word for word in overrides if not word.startswith("dataset=")] + ["dataset=digits"]
    if any(word.startswith("+experiment=") for word in words):
        return
    others = [filled(word, here) for word in words if "=" not in word and not word.startswith("~")]
    folder = [filled(word, here) for word in words if word.startswith("hydra.sweep.dir=")]
    run(cli.main, ["iexact", *others, *folder, *(overrides if resumed else small(two_jobs(overrides)))])


def is_small(dataset):
    return dataset.source == "digits" or getattr(dataset, "num_nodes", LARGEST + 1) <= LARGEST


def small(overrides):
    """Overrides with those of a small run behind them, where they leave the field open, and two repeats at most."""
    overrides = [re.sub(r"^runs=\d+$", "runs=2", word) for word in overrides]
    given = {word.partition("=")[0] for word in overrides}
    return [*overrides, *(f"{field}={value}" for field, value in SMALL.items() if field not in given)]


def two_jobs(overrides):
    """The first two choices of the first list of a sweep, and the first of the others."""
    kept = 2
    for place, word in enumerate(overrides):
        field, _, values = word.partition("=")
        choices = values.split(",")
        if len(choices) > 1 and not values.startswith("["):
            overrides[place] = f"{field}={','.join(choices[:kept])}"
            kept = 1
    return overrides


def last_choice(word):
    return word if "=[" in word else re.sub(r"=.*,", "=", word)


def filled(word, here):
    """A word with what the reader puts in place of its capitals."""
    return re.sub(r"\b(DIR|FOLDER|NAME)\b", lambda found: found[1].lower(), word).replace("=dir", f"={here / 'data'}")


def recorded(word):
    """A word of a report that means what has been run here."""
    return re.sub(r"^dataset=\w+", "dataset=digits", word).replace("/FOLDER", "")


def stopped(folder):
    """Leaves a run that was killed before its first epoch ended."""
    overrides = [f"{field}={value}" for field, value in SMALL.items()]
    RunFolder(folder).write_config(yaml.safe_dump(asdict(compose_config(*overrides))))


def check_arguments(words, monkeypatch):
    """Parses a script's arguments as the script does, and goes no further."""

    def parse(self, *args, **options):
        parse_known(self, *args, **options)
        raise Parsed

    parse_known = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", list(words))
        patch.syspath_prepend(str((REPOSITORY / words[0]).parent))
        runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")


def check_set_up(command, words):
    """Holds a command against what CI runs and what the project declares."""
    extras = re.findall(r"-e '\.\[([\w,]+)\]'", command)
    if words[0] == "pip":
        assert extras and "-c constraints.txt" in command
        assert set(extras[0].split(",")) <= set(PROJECT["optional-dependencies"]), command
    elif words[0] in ("python3", "."):
        assert command in (REPOSITORY / "README.md").read_text().partition("## What it does")[0]
    elif words[0] == "pre-commit":
        assert any(dependency.startswith("pre-commit") for dependency in PROJECT["optional-dependencies"]["dev"])
    elif words[:2] == ["python", "-m"]:
        assert words[2] == "pytest" and all(Path(word).exists() for word in words[3:] if "/" in word)
    elif "/" not in words[0]:
        assert " ".join(words) in CI, f"{command}: .ci/run does not run it"


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_python_blocks_run(page, here):
    shared: dict[str, object] = {"__name__": "block"}
    for block in blocks(page):
        if block.kind == "python":
            exec(compile(block.text, name(page), "exec"), shared)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_block_is_of_a_kind_that_nothing_runs(page):
    kinds = {block.kind for block in blocks(page)}
    changes = {"diff", "yaml"} if page.name == "extending.md" else set()
    assert kinds <= {"bash", "python", "text"} | changes
