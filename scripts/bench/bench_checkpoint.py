"""Measures which share of training goes into checkpoints, at the default cadence.

python scripts/bench/bench_checkpoint.py --csv benchmarks/checkpoint_cpu.csv
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from iexact_runner import tasks
from iexact_runner.cli import compose_config
from iexact_runner.experiment import Experiment
from iexact_runner.kernels import backends
from iexact_runner.measure import environment
from iexact_runner.runs.checkpoint import Checkpoints
from iexact_runner.runs.records import RunFolder
from iexact_runner.tasks.context import Context

# Short epochs of a small model, and long ones of one with the weights of the published models.
JOBS = {
    "digits": ("dataset=digits", "training.epochs=800"),
    "synthetic, 40,000 nodes": ("dataset=synthetic", "dataset.num_nodes=40000", "training.epochs=20"),
    "digits, 16 layers of 256": ("dataset=digits", "model=gcn2", "model.num_layers=16", "model.hidden_channels=256")
    + ("training.epochs=60",),
}
ENVIRONMENT = ("device_name", "torch_threads", "python", "torch", "numba", "git_commit")


def main() -> None:
    """Prints the shares and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--epochs", type=int, help="of every job, in place of its own")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    more = () if arguments.epochs is None else (f"training.epochs={arguments.epochs}",)
    table = pd.DataFrame([{"job": name, **measured((*JOBS[name], *more))} for name in arguments.jobs])
    print(table.to_string(index=False))
    if arguments.csv:
        facts = environment.describe(torch.device("cpu"), backend=backends.resolve("auto", torch.device("cpu")))
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        table.assign(**{name: facts[name] for name in ENVIRONMENT}).to_csv(arguments.csv, index=False)


def measured(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Seconds of training and of the checkpoints in it, how many, and the bytes of one."""
    seconds, spent, sizes = [0.0], [0.0], [0]
    write, train = Checkpoints.write, tasks.TASKS["train"]

    def timed_write(checkpoints: Checkpoints, state: Any) -> None:
        start = time.perf_counter()
        write(checkpoints, state)
        spent.append(time.perf_counter() - start)
        sizes.append((folder / "checkpoint.pt").stat().st_size)

    def timed_train(context: Context) -> None:
        start = time.perf_counter()
        train(context)
        seconds.append(time.perf_counter() - start)

    Checkpoints.write = timed_write  # type: ignore[method-assign]
    tasks.TASKS["train"] = timed_train
    try:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "run")
            Experiment(compose_config(*overrides), RunFolder(folder), Console(file=io.StringIO())).run("")
    finally:
        Checkpoints.write, tasks.TASKS["train"] = write, train  # type: ignore[method-assign]
    return {
        "seconds": sum(seconds),
        "checkpoints": len(spent) - 1,
        "checkpoint_seconds": sum(spent),
        "share": sum(spent) / sum(seconds),
        "bytes": sizes[-1],
    }


if __name__ == "__main__":
    main()
