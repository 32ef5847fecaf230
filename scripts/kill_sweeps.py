"""Kills sweeps at random moments, takes them up again, and compares what they end with to an undisturbed one.

python scripts/kill_sweeps.py --kills 50 --out FOLDER [--launcher processes] [OVERRIDE ...]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from iexact_runner.jobs import jobs_below

JOBS = ("dataset=digits", "model.hidden_channels=8", "training.epochs=100", "seed=0,1,2", "compression=none,iexact")
KILLS_PER_SWEEP = 5
# Fields of metrics.jsonl that tell the time.
TIMES = ("seconds", "time")


def main() -> None:
    """Prints how many kills were tried, and how many sweeps and jobs were lost; exits with 1 if one was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    parser.add_argument("--launcher", help="hydra/launcher=NAME")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweeps")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of the sweep's jobs, after the usual ones")
    arguments = parser.parse_args()
    overrides = [*JOBS, *arguments.overrides]
    overrides += [f"hydra/launcher={arguments.launcher}"] if arguments.launcher else []
    draws = random.Random(arguments.seed)
    began = time.monotonic()
    if start(arguments.out / "undisturbed", overrides).wait() != 0:
        sys.exit("the undisturbed sweep failed")
    duration = time.monotonic() - began
    expected = recorded(arguments.out / "undisturbed")
    tried, lost, sweeps, attempts = 0, 0, 0, 0
    while tried < arguments.kills:
        folder = arguments.out / f"killed_{sweeps}"
        for _ in range(min(KILLS_PER_SWEEP, arguments.kills - tried)):
            process = start(folder, overrides)
            try:
                process.wait(draws.uniform(0, duration))
                break  # it ended before its time
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                tried += 1
        sweeps += 1
        status = start(folder, overrides).wait()
        found = recorded(folder)
        wrong = [name for name in expected if found.get(name) != expected[name]]
        lost += len(wrong)
        lost += status != 0 and not wrong
        again = len(list(folder.rglob("attempt_*")))
        attempts += again
        print(f"{folder.name}: exit status {status}, {len(wrong)} jobs lost, {again} begun again", flush=True)
    print(f"{tried} kills, {sweeps} sweeps of {len(expected)} jobs, {attempts} jobs begun again, {lost} lost")
    sys.exit(1 if lost else 0)


def start(folder: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    """The sweep as a process group of its own, so that a kill reaches the processes of a launcher too."""
    taken_up = [f"hydra.sweep.dir={folder}", "sweep.skip_completed=true"]
    command = [sys.executable, "-m", "iexact_runner", "-m", *overrides, *taken_up]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def recorded(folder: Path) -> dict[str, Any]:
    """Metrics of every completed job, by the hash of its configuration, without the times."""
    found = {}
    for job in jobs_below(folder):
        if job.state == "completed":
            lines = map(json.loads, (job.folder / "metrics.jsonl").read_text().splitlines())
            values = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
            summary = json.loads((job.folder / "summary.json").read_text())
            found[job.status()["config_hash"]] = [values, summary["accuracy"]]
    return found


if __name__ == "__main__":
    main()
