"""The environment that every record carries."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from iexact_runner.measure import environment


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit, from which the module seems to run."""
    module = tmp_path / "src/iexact_runner/measure/environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("old")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "rows.csv").write_text("old")
    monkeypatch.setattr(environment, "__file__", str(module))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return module


def test_commit_is_that_of_the_checkout_and_changes_show(checkout: Path, tmp_path: Path) -> None:
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert environment.git_commit() == commit
    (tmp_path / "untracked").touch()
    assert environment.git_commit() == commit
    (tmp_path / "benchmarks" / "rows.csv").write_text("new")  # what a script is writing
    assert environment.git_commit() == commit
    checkout.write_text("new")
    assert environment.git_commit() == f"{commit}-dirty"


def test_away_from_a_checkout_there_is_no_commit(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / ".git").rename(tmp_path / "moved")
    assert environment.git_commit() is None


def test_a_checkout_without_a_commit_or_without_git_has_none(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment.git_commit() is None
    monkeypatch.undo()
    monkeypatch.setattr(environment, "__file__", str(checkout))
    git(tmp_path, "update-ref", "-d", "HEAD")
    assert environment.git_commit() is None


def test_description_is_plain_json_and_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    facts = environment.describe(torch.device("cpu"), backend="numba")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["no_such_package"] is None
    assert facts["device"] == "cpu" and facts["compression_backend"] == "numba" and facts["device_name"]
    assert facts["torch_threads"] == torch.get_num_threads()


def test_processor_is_named_by_its_model_where_the_system_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    table = "processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nprocessor\t: 1\nmodel name\t: Another\n"
    monkeypatch.setattr(Path, "read_text", lambda _: table)
    assert environment._cpu_name() == "Some CPU: 3 GHz"
    monkeypatch.setattr(Path, "read_text", lambda _: "processor\t: 0\n")
    monkeypatch.setattr(environment.platform, "machine", lambda: "riscv64")
    assert environment._cpu_name() == "riscv64"
    monkeypatch.setattr(environment.platform, "processor", lambda: "a processor")

    def missing(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert environment._cpu_name() == "a processor"
