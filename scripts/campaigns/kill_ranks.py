"""Loses one of several processes that share a graph, at random moments, and resumes the run.

python scripts/campaigns/kill_ranks.py --trials 30 --seed 7 --csv benchmarks/kill_ranks_cpu.csv

A trial starts two or three processes and, at a random moment, sends SIGKILL or SIGTERM to one of them, or SIGSTOP,
which makes it hang; or the disk of the first one is full, for which its files are limited to a few kilobytes. The trial
survives if all processes have ended within ``parallel.timeout`` and some seconds, the folder holds lines of the run
left alone and no others, and the resumed run has its numbers: to the last bit with as many processes, else up to the
order of sums.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from iexact_runner.measure import environment
from iexact_runner.runs.files import count_lines
from kill_campaign import ENVIRONMENT, metrics, outcome, status, untruth

TIMEOUT, PATIENCE = 8.0, 20.0
RUN = ("dataset=synthetic", "dataset.num_nodes=400", "dataset.num_features=16", "model.hidden_channels=16")
RUN += ("compression=lowrank", "training.epochs=40", "checkpoint.every=3", "parallel=graph", "parallel.parts=6")
RUN += ("parallel.partition=label_propagation", f"parallel.timeout={TIMEOUT}")
FAULTS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP", "disk full")
# Bytes that a file may have where the disk is full: less than a checkpoint, or than a few lines of the record.
SMALL = (2_000, 30_000)
COLUMNS = ("tried", "survived", "lost", "in training", "another number")


def main() -> None:
    """Prints how many processes were lost, and how many runs survived it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=sorted({*FAULTS}), default=FAULTS)
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    rows = campaign(arguments.trials, arguments.faults, random.Random(arguments.seed))
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if arguments.csv:
        facts = environment.describe(torch.device("cpu"), backend="numba")
        table.assign(seed=arguments.seed, **{name: facts[name] for name in ENVIRONMENT}).to_csv(
            arguments.csv, index=False
        )
    sys.exit(int(table["lost"].sum() > 0))


def campaign(trials: int, faults: tuple[str, ...], draws: random.Random) -> list[dict[str, Any]]:
    """A row for each fault: how many trials survived, and the longest that processes took to end."""
    counts = {fault: Counter[str]() for fault in faults}
    longest = dict.fromkeys(counts, 0.0)
    with tempfile.TemporaryDirectory() as place:
        wanted = {}
        for size in (2, 3):
            folder = Path(place, f"alone_{size}")
            wait(begin(size, [*RUN, f"hydra.run.dir={folder}"]), seconds=600)
            wanted[size] = outcome(folder)
        for trial in range(trials):
            fault, count = faults[trial % len(faults)], counts[faults[trial % len(faults)]]
            problem, seconds = one_trial(fault, Path(place, f"trial_{trial}"), wanted, count, draws)
            longest[fault] = max(longest[fault], seconds)
            count.update(("tried", "lost" if problem else "survived"))
            if problem:
                print(f"trial {trial}, {fault}: {problem}", flush=True)
    return [
        {"fault": fault, **{column: count[column] for column in COLUMNS}, "longest_seconds": longest[fault]}
        for fault, count in counts.items()
    ]


def one_trial(
    fault: str, folder: Path, wanted: dict[int, Any], count: Counter[str], draws: random.Random
) -> tuple[str | None, float]:
    """What went wrong, or None, and the seconds from the fault to the end of the last process."""
    size = draws.choice((2, 3))
    lines = wanted[size][0]
    fresh = [*RUN, f"hydra.run.dir={folder}"]
    limit = draws.randrange(*SMALL) if fault == "disk full" else None
    processes = begin(size, fresh, limit=limit)
    victim = processes[0] if limit else draws.choice(processes)
    moment = draws.randrange(len(lines))
    while not limit and count_lines(folder / "metrics.jsonl") <= moment and victim.poll() is None:
        time.sleep(0.005)
    if limit:
        wait([victim], seconds=300)
    elif victim.poll() is None:
        victim.send_signal(signal.Signals[fault])
    start = time.monotonic()
    ended = wait([each for each in processes if fault != "SIGSTOP" or each is not victim], seconds=TIMEOUT + PATIENCE)
    seconds = time.monotonic() - start
    if fault == "SIGSTOP":
        victim.kill()
        victim.wait()
    if not ended:
        return "a process was still there", seconds
    count["in training"] += 0 < len(metrics(folder)) and status(folder) != "completed"
    problem = untruth(folder, lines)
    if problem:
        return problem, seconds
    if status(folder) == "completed":  # it was faster
        return (None if outcome(folder) == wanted[size] else "its numbers differ"), seconds
    again = draws.choice((size, size, 1, 2, 3))
    count["another number"] += again != size
    explicit = [f"resume={folder}"] if (folder / "config.yaml").exists() else fresh
    if not wait(begin(again, explicit), seconds=300) or status(folder) != "completed":
        return f"it did not go on with {again} processes", seconds
    if again == size:
        return (None if outcome(folder) == wanted[size] else "its numbers differ"), seconds
    found, expected = ([line["loss"] for line in each] for each in (metrics(folder), lines))
    same = len(found) == len(expected) and np.allclose(found, expected, rtol=0.02)
    return (None if same else f"with {again} processes its losses differ"), seconds


def begin(size: int, overrides: list[str], *, limit: int | None = None) -> list[subprocess.Popen[bytes]]:
    """Processes of a run, as torchrun starts them; files of the first one may be limited to so many bytes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    contract = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return [
        subprocess.Popen(
            [sys.executable, "-m", "iexact_runner", *overrides],
            env=os.environ | contract | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=full if limit and not rank else None,
        )
        for rank in range(size)
    ]


def wait(processes: list[subprocess.Popen[bytes]], *, seconds: float) -> bool:
    """Whether all have ended within so many seconds; those that have not are killed."""
    deadline, there = time.monotonic() + seconds, True
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            there = False
            process.kill()
            process.wait()
    return there


if __name__ == "__main__":
    main()
