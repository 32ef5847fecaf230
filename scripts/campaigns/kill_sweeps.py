"""Kills sweeps at random moments, takes them up again, and compares what they end with to an undisturbed one.

python scripts/campaigns/kill_sweeps.py --kills 50 --out FOLDER --csv benchmarks/kill_sweeps_cpu.csv
python scripts/campaigns/kill_sweeps.py --kills 20 --out FOLDER --launcher processes resume=auto checkpoint.every=10

With a launcher half of the kills are of the launching process alone: its workers must end by themselves, and those that
do not are counted as outlived.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from multiprocessing import get_context
from multiprocessing.context import ForkProcess as Process
from pathlib import Path
from typing import Any

import pandas as pd
import torch

# What a sweep needs, imported once: a forked process starts at once.
from iexact_runner import cli, experiment, report  # noqa: F401
from iexact_runner.measure import environment
from iexact_runner.runs.jobs import jobs_below

JOBS = ("dataset=digits", "model.hidden_channels=8", "training.epochs=100", "seed=0,1,2", "compression=none,iexact")
KILLS_PER_SWEEP = 5
# Share of the kills that are of the launching process alone, and the seconds that its workers have to end.
ALONE, GRACE_SECONDS = 0.5, 10.0
ENVIRONMENT = ("device_name", "python", "torch", "git_commit")
# Fields of metrics.jsonl that tell the time.
TIMES = ("seconds", "time")


def main() -> None:
    """Prints how often jobs began again and how many were lost; exits with 1 if one was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    parser.add_argument("--launcher", help="hydra/launcher=NAME")
    parser.add_argument("--csv", type=Path, help="file to write a row a sweep to")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweeps")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of the sweep's jobs, after the usual ones")
    arguments = parser.parse_args()
    overrides = [*JOBS, *arguments.overrides]
    overrides += [f"hydra/launcher={arguments.launcher}"] if arguments.launcher else []
    draws = random.Random(arguments.seed)
    start(arguments.out / "undisturbed", overrides).join()
    began = time.monotonic()  # a second time, with the kernels compiled
    start(arguments.out / "timed", overrides).join()
    duration = time.monotonic() - began
    expected = recorded(arguments.out / "undisturbed")
    rows: list[dict[str, Any]] = []
    while (tried := sum(row["kills"] for row in rows)) < arguments.kills:
        folder, kills, outlived = arguments.out / f"killed_{len(rows)}", 0, 0
        for _ in range(min(KILLS_PER_SWEEP, arguments.kills - tried)):
            process = start(folder, overrides)
            process.join(draws.uniform(0, duration))
            if process.exitcode is not None:
                break
            if arguments.launcher and draws.random() < ALONE:
                process.kill()
                process.join()
                outlived += lives(process)
            kill(process)
            kills += 1
        process = start(folder, overrides)
        process.join()
        found = recorded(folder)
        wrong = [name for name in expected if found.get(name) != expected[name]]
        counts = {"kills": kills, "begun_again": len(list(folder.rglob("attempt_*"))), "jobs": len(expected)}
        rows.append(counts | {"lost": len(wrong), "outlived": outlived, "exit_status": process.exitcode})
        print(f"{folder.name}: {rows[-1]}", flush=True)
    table = pd.DataFrame(rows)
    if arguments.csv:
        facts = environment.describe(torch.device("cpu"), backend="none")
        options = {"launcher": arguments.launcher, "overrides": " ".join(overrides), "seed": arguments.seed}
        table.assign(**options, **{name: facts[name] for name in ENVIRONMENT}).to_csv(arguments.csv, index=False)
    totals = table[["kills", "begun_again", "jobs", "lost", "outlived"]].sum()
    print(f"{len(rows)} sweeps: " + ", ".join(f"{name} {total}" for name, total in totals.items()))
    sys.exit(1 if table[["lost", "outlived", "exit_status"]].any(axis=None) else 0)


def start(folder: Path, overrides: list[str]) -> Process:
    """The sweep as a process group of its own, so that a kill reaches the processes of a launcher too."""
    process = get_context("fork").Process(target=sweep, args=[folder, overrides])
    process.start()
    return process


def kill(process: Process) -> None:
    """Kills a sweep with the processes of its launcher."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        process.kill()
    process.join()


def lives(process: Process) -> bool:
    """Whether a process of a sweep's group is left some time after the sweep was killed."""
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    except ProcessLookupError:
        return False
    return True


def sweep(folder: Path, overrides: list[str]) -> None:
    """What the process does."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.argv = ["iexact", "-m", *overrides, f"hydra.sweep.dir={folder}", "sweep.skip_completed=true"]
    status: Any = 0
    try:
        cli.main()
    except SystemExit as end:
        status = end.code
    os._exit(status)  # at once: a forked process would wait for idle workers of a launcher


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
