"""Test scores of runs over two processes by how their messages travel, paired with the run of one process.

python scripts/bench/bench_message_accuracy.py --csv message_accuracy.csv dataset=amazon_computers model=sage

Each repeat of a run draws the weights and the masks of the same repeat of the others, so that what is left
between two of them is the messages. A row is a pair of messages: the mean of the differences and its 95% interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from bench_epoch import append_rows
from bench_ranks import run, setting
from iexact_runner.report.paired import interval

MESSAGES = ("fp32/fp32", "int8/int8", "int8/int4", "int4/int4", "lowrank/int4", "int4/int4/delta", "lowrank/int4/delta")


def main() -> None:
    """Prints a line for each pair of messages, and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--messages", nargs="+", default=MESSAGES, help="forward/backward[/delta]")
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    parser.add_argument("overrides", nargs="*", help="of the configuration: dataset=NAME model=NAME ...")
    arguments = parser.parse_args()
    size = arguments.processes
    fixed = [f"parallel.parts={size}", f"training.epochs={arguments.epochs}", f"runs={arguments.runs}"]
    alone = run(1, [*arguments.overrides, *fixed])["accuracy"]["test"]["values"]
    rows: list[dict[str, Any]] = []
    for name in arguments.messages:
        forward, backward, *delta = name.split("/")
        messages = [f"messages.forward={forward}", f"messages.backward={backward}"]
        messages.append(f"messages.delta={str(delta == ['delta']).lower()}")
        summary = run(size, [*arguments.overrides, *fixed, *messages])
        rows.append(row(summary, alone))
        found = rows[-1]
        print(
            f"{name}  {100 * found['test_mean']:.2f} %, against one process "
            f"{100 * found['difference_mean']:+.2f} ± {100 * found['difference_interval']:.2f} points",
            flush=True,
        )
    if arguments.csv:
        append_rows(rows, arguments.csv)


def row(summary: dict[str, Any], alone: list[float]) -> dict[str, Any]:
    """Scores of a run beside those of one process."""
    config, environment = summary["config"], summary["environment"]
    scores = summary["accuracy"]["test"]["values"]
    differences = [score - other for score, other in zip(scores, alone, strict=True)]
    return {
        **setting(summary),
        "rank": config["messages"]["rank"],
        "delta": config["messages"]["delta"],
        "processes": summary["parallel"]["processes"],
        "partition": summary["parallel"]["method"],
        "epochs": config["training"]["epochs"],
        "repeats": len(scores),
        "test_mean": mean(scores),
        "one_process_mean": mean(alone),
        "difference_mean": mean(differences),
        "difference_interval": interval(differences),
        **{key: environment[key] for key in ("python", "torch", "cpu_count", "torch_threads", "git_commit")},
    }


if __name__ == "__main__":
    main()
