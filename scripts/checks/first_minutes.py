"""Times what a newcomer does, in a fresh clone with an environment of its own.

python scripts/checks/first_minutes.py --out FOLDER --csv benchmarks/first_minutes_cpu.csv
python scripts/checks/first_minutes.py --out FOLDER --without-tests
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from iexact_runner.measure import environment

REPOSITORY = Path(__file__).resolve().parents[2]
IEXACT, REPORT = ".venv/bin/iexact", ".venv/bin/iexact-report"
LONG = (IEXACT, "training.epochs=300", "output_dir=interrupted")
# Commands with the exit status that they should end with, in the order in which a newcomer gives them.
JOURNEYS: dict[str, tuple[tuple[str, ...], int]] = {
    "iexact --help": ((IEXACT, "--help"), 0),
    "iexact --help again": ((IEXACT, "--help"), 0),
    "a second run": ((IEXACT,), 0),
    "a mistyped option": ((IEXACT, "--epochs", "3"), 2),
    "a mistyped field": ((IEXACT, "compression.bitz=3"), 2),
    "a missing dataset": ((IEXACT, "dataset=amazon_photo", "dataset.root=data"), 1),
    "an interrupted run": (LONG, 130),
    "resumed": ((*LONG, "resume=auto"), 0),
    "a sweep of six runs and its table": ((IEXACT, "-m", "compression=none,exact,iexact", "seed=0,1"), 0),
    "iexact-report, a table": ((REPORT, "outputs"), 0),
    "iexact-report, a page": ((REPORT, "outputs", "--format", "html", "--output", "report.html"), 0),
    "the page in a browser": (
        ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,2400")
        + ("--screenshot=report.png", "report.html"),
        0,
    ),
}
# A proxy that refuses at once, so that a download fails the same way with and without a network.
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
EPOCHS_BEFORE_INTERRUPT = 20
TIMEOUT = 4 * 3600.0


def main() -> None:
    """Prints and writes a row a journey; exits with 1 if one ended otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the clone, which must not exist")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    parser.add_argument("--without-tests", action="store_true", help="leave the README's second command out")
    arguments = parser.parse_args()
    # A background job of a shell ignores Ctrl-C, and so would the command that is to be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, arguments.out], check=True)
    first, second = readme_commands()
    rows.append(timed("clone to first result", ("bash", "-euc", first), 0, folder=arguments.out, began=began))
    for name, (command, status) in JOURNEYS.items():
        if command[0] != "chromium" or shutil.which("chromium"):
            rows.append(timed(name, command, status, folder=arguments.out))
    if not arguments.without_tests:
        rows.append(timed("to green tests", ("bash", "-euc", second), 0, folder=arguments.out))
    if arguments.csv:
        facts = environment.describe(torch.device("cpu"), backend="none")
        kept = {name: facts[name] for name in ("device_name", "cpu_count", "python")}
        tried = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=arguments.out, capture_output=True, text=True, check=True
        )
        pd.DataFrame(rows).assign(**kept, git_commit=tried.stdout.strip()).to_csv(arguments.csv, index=False)
    sys.exit(0 if all(row["exit_status"] == row["expected"] for row in rows) else 1)


def readme_commands() -> list[str]:
    """The two commands of the README."""
    section = (REPOSITORY / "README.md").read_text().partition("## Two commands")[2].partition("\n## ")[0]
    return re.findall(r"^```bash\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def timed(
    name: str, command: tuple[str, ...], expected: int, *, folder: Path, began: float | None = None
) -> dict[str, Any]:
    """Gives one command and waits for its end.

    Args:
        name: of the row.
        command: with its arguments; the one that is to be interrupted is, once it has trained for some epochs.
        expected: the exit status it should have.
        folder: where it runs.
        began: when the journey began, if before the command.
    """
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    began = time.monotonic() if began is None else began
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=variables | (NO_NETWORK if "dataset=amazon_photo" in command else {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if expected == 128 + signal.SIGINT:
        wait_for_epochs(process, folder / "interrupted")
        process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=TIMEOUT)
    seconds = time.monotonic() - began
    last = (shown if process.returncode == 0 else said).strip().splitlines()[-1:]
    print(f"{name}: {seconds:.1f} s, exit status {process.returncode}: {''.join(last)}", flush=True)
    return {"journey": name, "seconds": round(seconds, 2), "exit_status": process.returncode, "expected": expected}


def wait_for_epochs(process: subprocess.Popen[str], folder: Path) -> None:
    """Waits until a run has recorded some epochs, or has ended."""
    while process.poll() is None:
        if sum(path.read_text().count("\n") for path in folder.glob("*/metrics.jsonl")) >= EPOCHS_BEFORE_INTERRUPT:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    main()
