"""What ``scripts/campaigns/mutation_check.py`` changes, and that it tells who notices."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap

import pytest

from conftest import REPOSITORY

SOURCE = '''
"""A module of 1."""
LIMIT: int = 3

def work(x: int | None, *, deep: bool = False):
    """Two + three."""
    if not x or x > LIMIT:
        raise ValueError(f"x={x + 1}: must be at most {LIMIT - 1}")
    total = 0
    while deep:
        total += min(x, key=len)
        break
    return -x if 0 <= x < 2 else total
'''


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "campaigns"))
    import mutation_check

    return mutation_check


def test_a_mutant_is_one_small_mistake(check):
    found = {mutant.mutation.partition(" -> ")[2] for mutant in check.mutants("a.py", SOURCE)}
    assert found == {
        "LIMIT: int = (4)",
        "def work(x: int | None, *, deep: bool = (True)):",
        "if (not x and x > LIMIT):",
        "if (not (not x or x > LIMIT)):",
        "if (x) or x > LIMIT:",
        "if not x or (x >= LIMIT):",
        "pass",  # the error; the sum has its own place below
        "total = (1)",
        "while (not deep):",
        "total -= min(x, key=len)",
        "total += (min(x))",
        "return",
        "return (total if 0 <= x < 2 else -x)",
        "return (x) if 0 <= x < 2 else total",
        "return -x if (0 < x < 2) else total",
        "return -x if (0 <= x <= 2) else total",
        "return -x if (1) <= x < 2 else total",
        "return -x if 0 <= x < (3) else total",
    }
    lines = SOURCE.splitlines()
    for mutant in check.mutants("a.py", SOURCE):
        changed = [
            number
            for number, pair in enumerate(zip(lines, mutant.source.splitlines(), strict=True), 1)
            if pair[0] != pair[1]
        ]
        assert changed == [mutant.line] and ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(SOURCE))


def test_draws_are_seeded_and_reach_every_module(check):
    package = REPOSITORY / check.PACKAGE
    drawn = check.draw(package, count=110, seed=0)
    assert drawn == check.draw(package, count=110, seed=0) != check.draw(package, count=110, seed=1)
    assert {mutant.module for mutant in drawn} == set(check.TESTS)
    assert 100 <= len(drawn) <= 125
    assert all(ast.parse(mutant.source) for mutant in drawn)
    assert {
        f"{folder}/{path.name}"
        for folder in ("compression", "kernels", "measure")
        for path in (package / folder).glob("*.py")
        if path.name != "__init__.py"
    } <= set(check.TESTS)
    for tests in check.TESTS.values():
        assert all((REPOSITORY / "tests" / name).exists() for name in tests)
    for (module, mutation), reason in check.EQUIVALENT.items():
        before = mutation.partition(" -> ")[0]
        assert reason and before in {" ".join(line.split()) for line in (package / module).read_text().splitlines()}


def test_who_notices_is_told_and_the_module_is_put_back(tmp_path):
    """In a process of its own, for it imports from a checkout that is not this one."""
    package, tests = tmp_path / "checkout/src/iexact_runner", tmp_path / "checkout/tests"
    package.mkdir(parents=True)
    tests.mkdir()
    source = "def noticed(x):\n    return x + 1\n\n\ndef missed(x):\n    return x * 2\n"
    (package / "loss.py").write_text(source)
    (package / "__init__.py").touch()
    (tests / "test_loss.py").write_text(
        "from iexact_runner.loss import noticed\n\n\ndef test_one():\n    assert noticed(1) == 2\n"
    )
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import mutation_check as check
        from pathlib import Path
        check.IMPORTED, check.TESTS = ("numba",), {"loss.py": ("test_loss.py",)}
        trials = check.Trials(Path("checkout").resolve())
        found = check.mutants("loss.py", Path("checkout/src/iexact_runner/loss.py").read_text())
        for mutant in {mutant.line: mutant for mutant in found}.values():
            row = trials.run(mutant)
            print(mutant.line, row["outcome"], row["noticed_by"])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), REPOSITORY / "scripts" / "campaigns"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["2 killed test_loss.py::test_one", "6 survived "]
    assert (package / "loss.py").read_text() == source
