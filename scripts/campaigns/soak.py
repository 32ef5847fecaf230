"""Trains for long with many checkpoints and watches the memory and the open files of the process.

python scripts/campaigns/soak.py --epochs 2000 --every 10 --csv benchmarks/soak_cpu.csv

Resident memory and file handles are those of the process at every tenth epoch or so. The last line compares the peak
after epoch 100 with the figure at epoch 100.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from iexact_runner.kernels import backends
from iexact_runner.measure import MIB, environment
from iexact_runner.runs.files import count_lines

SETTLED = 100
ENVIRONMENT = ("device_name", "python", "torch", "numba", "git_commit")


def main() -> None:
    """Prints the figures and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--every", default="10", help="checkpoint.every")
    parser.add_argument("--compression", default="iexact")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    overrides = [f"training.epochs={arguments.epochs}", f"checkpoint.every={arguments.every}"]
    overrides.append(f"compression={arguments.compression}")
    with tempfile.TemporaryDirectory() as place:
        samples = watched(overrides, Path(place, "run"))
        summary = json.loads(Path(place, "run", "summary.json").read_text())
    if summary["status"] != "completed":
        sys.exit(f"soak: the run {summary['status']}: {summary['error']}")
    table = pd.DataFrame(samples).groupby("epoch", as_index=False).max()
    settled = table[table["epoch"] >= min(SETTLED, table["epoch"].max())]
    first, peak, handles = settled.iloc[0], settled["resident_mib"].max(), settled["files"]
    print(table.iloc[:: max(1, len(table) // 12)].to_string(index=False))
    print(
        f"resident {first.resident_mib:.1f} MiB at epoch {first.epoch:.0f}, at most {peak:.1f} after it "
        f"({peak / first.resident_mib - 1:+.1%}); open files {handles.min()} to {handles.max()}"
    )
    if arguments.csv:
        facts = environment.describe(torch.device("cpu"), backend=backends.resolve("auto", torch.device("cpu")))
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        given = {"compression": arguments.compression, "checkpoint_every": arguments.every}
        rows = table[table["epoch"] % SETTLED < SETTLED // 10].groupby(table["epoch"] // SETTLED).first()
        rows.assign(**given, **{name: facts[name] for name in ENVIRONMENT}).to_csv(arguments.csv, index=False)


def watched(overrides: list[str], folder: Path) -> list[dict[str, float]]:
    """Runs ``iexact``; resident MiB and open files of the process with the epoch that it had recorded."""
    command = [sys.executable, "-m", "iexact_runner", *overrides, f"hydra.run.dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    about, samples = Path("/proc", str(process.pid)), []
    while process.poll() is None:
        try:
            pages = int((about / "statm").read_text().split()[1])
            files = len(os.listdir(about / "fd"))
        except (OSError, IndexError):  # it ends
            break
        epoch = count_lines(folder / "metrics.jsonl") if folder.exists() else 0
        if epoch:
            samples.append({"epoch": epoch, "resident_mib": pages * os.sysconf("SC_PAGESIZE") / MIB, "files": files})
        time.sleep(0.05)
    process.wait()
    return samples


if __name__ == "__main__":
    main()
