"""Memory of each process that shares a graph, and how long an epoch takes, against one process with the same parts.

python scripts/bench/bench_ranks.py --csv ranks.csv dataset=synthetic_arxiv model=sage compression=lowrank

Each number of processes is a run of its own by torchrun. A row is a process: its nodes, the halo that it reads of
others, what it keeps, the peak of its step and of its evaluation beside its data, and what it sent.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_epoch import append_rows


def main() -> None:
    """Runs all, prints a line for each process, and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    parser.add_argument("overrides", nargs="*", help="of the configuration: dataset=NAME model=NAME ...")
    arguments = parser.parse_args()
    parts = max(arguments.processes)
    rows: list[dict[str, Any]] = []
    for size in arguments.processes:
        summary = run(size, [*arguments.overrides, f"parallel.parts={parts}", f"training.epochs={arguments.epochs}"])
        rows += [row(summary, rank) for rank in range(size)]
        for each in rows[-size:]:
            kept, peak, data = each["saved_mib"], each["step_peak_mib"], each["data_mib"]
            print(
                f"{size} processes, rank {each['rank']}: halo {each['halo_share']:.2f}, kept {kept:.2f}, "
                f"step peak {peak:.1f}, data {data:.1f} MiB, {each['epoch_seconds']:.2f} s an epoch",
                flush=True,
            )
    for each in rows:
        each["peak_of_one"] = (each["step_peak_mib"] + each["data_mib"]) / (
            rows[0]["step_peak_mib"] + rows[0]["data_mib"]
        )
    if arguments.csv:
        append_rows(rows, arguments.csv)


def run(size: int, overrides: list[str]) -> dict[str, Any]:
    """The summary of a run over so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
        command = [*launcher, "-m", "iexact_runner", "parallel=graph", f"hydra.run.dir={folder}/run", *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        summary: dict[str, Any] = json.loads(Path(folder, "run", "summary.json").read_text())
    return summary


def setting(summary: dict[str, Any]) -> dict[str, Any]:
    """What rows of runs over several processes begin with."""
    config = summary["config"]
    return {
        "dataset": config["dataset"]["name"],
        "model": config["model"]["name"],
        "scheme": config["compression"]["scheme"],
        "forward": config["messages"]["forward"],
        "backward": config["messages"]["backward"],
    }


def row(summary: dict[str, Any], rank: int) -> dict[str, Any]:
    """What the record of a run says of one process."""
    parallel, environment = summary["parallel"], summary["environment"]
    own = parallel["ranks"][rank]
    nodes = sum(each["nodes"] for each in parallel["ranks"])
    return {
        **setting(summary),
        "processes": parallel["processes"],
        "parts": parallel["parts"],
        "partition": parallel["method"],
        "edge_cut": parallel["edge_cut"],
        "rank": rank,
        **own,
        "node_share": own["nodes"] / nodes,
        "halo_share": own["halo"] / nodes,
        "epoch_seconds": 1 / summary["throughput"]["epochs_per_second"]["median"],
        **{key: environment[key] for key in ("python", "torch", "cpu_count", "torch_threads", "git_commit")},
    }


if __name__ == "__main__":
    main()
