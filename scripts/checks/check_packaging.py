"""Builds the sdist and the wheel, and uses the wheel in empty environments away from the checkout.

python scripts/checks/check_packaging.py --csv benchmarks/packaging_cpu.csv
python scripts/checks/check_packaging.py --environments pinned --extras --python python3.12
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from iexact_runner.measure import environment

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
VERSIONS = ("torch", "torch_geometric", "hydra-core", "pandas", "numpy")
RUN = ("iexact", "training.epochs=2", "model.hidden_channels=8", "output_dir=runs")
SWEEP = ("iexact", "-m", "training.epochs=2", "model.hidden_channels=8", "seed=0,1")
# What the wheel does on its own.
JOURNEYS = {
    "version": ("iexact", "--version"),
    "help": ("iexact", "--help"),
    "help of the report": ("iexact-report", "--help"),
    "iexact on digits": RUN,
    "lowrank on digits": (*RUN, "compression=lowrank"),
    "sweep of two": (*SWEEP, "output_dir=sweeps"),
    "report": ("iexact-report", "runs", "sweeps", "--format", "csv", "--output", "report.csv"),
    "page": ("iexact-report", "runs", "sweeps", "--format", "html", "--output", "report.html"),
}
# What an extra is for; without the extra the same command must name it.
EXTRAS = {
    "cpu": (*RUN, "compression.backend=numba"),
    "energy": (*RUN, "task=measure", "measure.energy=true", "measure.timed_epochs=2"),
    "figures": ("iexact-report", "../runs", "--figures", "figures"),
    "parquet": ("iexact-report", "../runs", "--format", "parquet", "--output", "report.parquet"),
    "tensorboard": (*RUN, "logger=tensorboard"),
    "mlflow": (*RUN, "logger=mlflow"),
    "joblib": (*SWEEP, "hydra/launcher=processes"),
    "slurm": (*SWEEP, "hydra/launcher=submitit_local"),
    "ray": (*SWEEP, "hydra/launcher=ray_cluster", "hydra.launcher.ray.remote.num_gpus=0"),
}
PIP_CHECK = ("python", "-m", "pip", "check")
TIMEOUT = 1800.0


def pinned() -> list[str]:
    """The versions that the project is tested with."""
    return (REPOSITORY / "constraints.txt").read_text().splitlines()


def lowest() -> list[str]:
    """The lower bounds of all dependencies, extras included."""
    extras = (requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra)
    bounds = (re.match(r"([\w-]+)>=([\d.]+)", requirement) for requirement in (*PROJECT["dependencies"], *extras))
    return sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound})


def lowest_but_torch() -> list[str]:
    """The lower bounds with the torch and triton that are pinned: of these there may be a build for the CPU alone."""
    versions = [line for line in lowest() if not re.match("(torch|triton)==", line)]
    return versions + [line for line in pinned() if re.match("(torch|triton)==", line)]


def highest() -> list[str]:
    """Nothing: the newest of all that fits."""
    return []


CONSTRAINTS = {function.__name__: function for function in (pinned, lowest, lowest_but_torch, highest)}


def main() -> None:
    """Prints a line a check and writes the rows; exits with 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", nargs="*", choices=list(CONSTRAINTS), default=list(CONSTRAINTS))
    parser.add_argument("--extras", nargs="*", choices=list(EXTRAS), default=list(EXTRAS))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    checks = Checks()
    with tempfile.TemporaryDirectory() as folder:
        wheel = check_build(checks, Path(folder))
        for name in arguments.environments if wheel else ():
            where = Path(folder, name)
            check_environment(checks, name, wheel, where, python=arguments.python, extras=arguments.extras)
            shutil.rmtree(where)  # one with CUDA takes gigabytes
            if arguments.csv:
                checks.write(arguments.csv)
    sys.exit("\n".join(checks.failed) if checks.failed else 0)


@dataclass
class Checks:
    """The outcome of every check, as rows."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def check(self, where: str, name: str, act: Callable[..., str], *arguments: Any, **facts: Any) -> bool:
        """Carries a check out and keeps its row.

        Args:
            where: the environment, or what was built.
            name: what is checked.
            act: returns what is wrong; nothing if all is well.
            arguments: of ``act``.
            facts: further columns.
        """
        began = time.monotonic()
        problem = act(*arguments)
        seconds = time.monotonic() - began
        self.rows.append({"environment": where, "check": name, "seconds": round(seconds, 2)} | facts)
        self.rows[-1]["passed"] = not problem
        if problem:
            self.failed.append(f"{where}: {name}: {problem}")
        print(f"{where}: {name}: {problem or 'passed'} ({seconds:.1f} s)", flush=True)
        return not problem

    def write(self, csv: Path) -> None:
        """Writes the rows so far."""
        facts = environment.describe(torch.device("cpu"), backend="none")
        kept = {name: facts[name] for name in ("device_name", "git_commit")}
        pd.DataFrame(self.rows).assign(**kept).to_csv(csv, index=False)


class Environment:
    """A virtual environment and the folder that its commands run in.

    Args:
        folder: where it is made.
        python: the interpreter it is made with.
        constraints: versions that pip keeps to.
        below: an environment whose packages this one also sees.
    """

    def __init__(
        self, folder: Path, *, python: str, constraints: Iterable[str] = (), below: Environment | None = None
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        self.constraints = folder / "constraints.txt"
        self.constraints.write_text("\n".join(constraints) + "\n")
        self.scripts = below.scripts if below else folder / "venv" / "bin"
        self.packages = Path(self.output("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
        if below is not None:
            (self.packages / "below.pth").write_text(f"{below.packages}\n")

    def install(self, requirement: str) -> str:
        """Installs with the constraints; what pip complained of."""
        return self.wrong("python", "-m", "pip", "install", "--quiet", "-c", str(self.constraints), requirement)

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment where no checkout is in sight."""
        python = self.folder / "venv" / "bin" / "python"
        return subprocess.run(
            [python, *arguments] if command == "python" else [python, self.scripts / command, *arguments],
            cwd=self.folder,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )

    def wrong(self, command: str, *arguments: str) -> str:
        """What a command says if it fails."""
        result = self.run(command, *arguments)
        return f"exit status {result.returncode}: {result.stderr[-2000:].strip()}" if result.returncode else ""

    def output(self, command: str, *arguments: str) -> str:
        """What a command prints."""
        return self.run(command, *arguments).stdout.strip()


def check_build(checks: Checks, folder: Path) -> Path | None:
    """Builds the sdist from the checkout and the wheel from the sdist; the wheel, if it is as it should be."""
    dist = folder / "dist"
    if not checks.check("sdist", "is built", build, REPOSITORY, "sdist", dist):
        return None
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    if not checks.check("wheel", "is built from the sdist", build, unpacked, "wheel", dist):
        return None
    (wheel,) = dist.glob("*.whl")
    return wheel if checks.check("wheel", "has what it should and no more", contents, wheel) else None


def build(source: Path, target: str, dist: Path) -> str:
    """Builds a distribution; what was said if that failed."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(dist)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    return result.stderr.strip() if result.returncode else ""


def contents(wheel: Path) -> str:
    """What is missing from a wheel or should not be in it."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "conf", "src"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    wanted = {re.sub(r"^(conf)/", r"iexact_runner/\1/", name).removeprefix("src/") for name in tracked}
    lacking, foreign = sorted(wanted - packed), sorted(packed - wanted)
    return " ".join([*(f"lacks {name}" for name in lacking), *(f"has {name}" for name in foreign)])


def check_environment(
    checks: Checks, name: str, wheel: Path, folder: Path, *, python: str, extras: Iterable[str]
) -> None:
    """Installs the wheel and runs it, then each extra in a layer of its own above it."""
    base = Environment(folder, python=python, constraints=CONSTRAINTS[name]())
    facts = {"python": base.output("python", "-c", "import platform; print(platform.python_version())")}
    if not checks.check(name, "is installed", base.install, str(wheel), python=facts["python"]):
        return
    for package in VERSIONS:
        asked = f"import importlib.metadata as m; print(m.version('{package}'))"
        facts[package.replace("-", "_")] = base.output("python", "-c", asked)
    checks.rows[-1] |= facts
    checks.check(name, "pip check", base.wrong, *PIP_CHECK, **facts)
    for journey, command in JOURNEYS.items():
        checks.check(name, journey, base.wrong, *command, **facts)
    for extra in extras:
        layer = Environment(folder / extra, python=python, constraints=CONSTRAINTS[name](), below=base)
        checks.check(name, f"without [{extra}]", unnamed, layer, extra, **facts)
        if checks.check(name, f"[{extra}] is installed", layer.install, f"{wheel}[{extra}]", **facts):
            checks.check(name, f"[{extra}] pip check", layer.wrong, *PIP_CHECK, **facts)
            checks.check(name, f"[{extra}] works", layer.wrong, *EXTRAS[extra], **facts)


def unnamed(layer: Environment, extra: str) -> str:
    """What is wrong with how a command without its extra ends: in one line that names the extra."""
    result = layer.run(*EXTRAS[extra])
    named = result.returncode and result.stderr.count("\n") == 1 and f"iexact-runner[{extra}]" in result.stderr
    return "" if named else f"exit status {result.returncode} does not name the extra: {result.stderr[-2000:].strip()}"


if __name__ == "__main__":
    main()
