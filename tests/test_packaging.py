"""What is built and installed: the contents of the wheel, what start-up imports, and the bounds of dependencies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile

import pytest

from conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
]
# Packages that take long to import, or that only an extra brings.
SLOW = ("torch", "torch_geometric", "numpy", "scipy", "sklearn", "pandas", "ogb", "numba", "triton", "matplotlib")
OPTIONAL = ("pyarrow", "codecarbon", "tensorboard", "mlflow", "joblib", "submitit", "ray")


@pytest.mark.parametrize("module", ["iexact_runner.cli", "iexact_runner.report.command"])
def test_help_imports_nothing_slow_and_nothing_optional(module, tmp_path):
    code = (
        f"import atexit, json, sys; from {module} import main\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = json.loads(result.stderr)
    assert result.stdout and "iexact_runner" in imported
    assert not {*SLOW, *OPTIONAL}.intersection(imported)


def test_the_front_door_opens_without_torch_until_it_is_used():
    code = """
        import sys
        import iexact_runner
        assert "torch" not in sys.modules and "compress" in dir(iexact_runner)
        from iexact_runner import CompressionConfig, compress, compressed_pass
        from iexact_runner.nn import compress as same
        assert compress is same and "torch" in sys.modules
        try:
            iexact_runner.nothing
        except AttributeError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "module 'iexact_runner' has no attribute 'nothing'\n"


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:3]))


def test_every_requirement_has_a_lower_bound_that_the_pinned_version_keeps():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (REPOSITORY / "constraints.txt").read_text(), flags=re.MULTILINE))
    for requirement in REQUIREMENTS:
        if requirement.startswith("iexact-runner["):
            continue
        bound = re.match(r"([\w-]+)>=([\d.]+)", requirement)
        assert bound, requirement
        assert version(bound[2]) <= version(pins[bound[1]]), requirement


def test_build_is_checked_against_what_git_tracks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "checks"))
    import check_packaging

    checks = check_packaging.Checks()
    wheel = check_packaging.check_build(checks, tmp_path)
    assert checks.failed == [] and wheel is not None
    wanted = {"hydra_plugins/iexact_sweeper.py", "iexact_runner/py.typed", "iexact_runner/conf/config.yaml"}
    with zipfile.ZipFile(wheel) as archive:
        assert wanted <= set(archive.namelist())
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tests/test_x.py", "")
    assert check_packaging.contents(wheel) == "has tests/test_x.py"


def test_lower_bounds_are_pins(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "checks"))
    import check_packaging

    lowest = check_packaging.lowest()
    assert {"torch==2.8", "hydra-core==1.3", "numba==0.61"} <= set(lowest)
    kept = [line for line in check_packaging.lowest_but_torch() if line.startswith("torch==")]
    assert kept == [line for line in check_packaging.pinned() if line.startswith("torch==")]
