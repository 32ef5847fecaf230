"""Time and peak memory of a training step and an evaluation as the graph grows, and the exponents of both.

python scripts/bench/bench_growth.py --model sage --compression lowrank --csv benchmarks/growth_cpu.csv

Graphs of 2^15 to 2^21 nodes of one average degree; the time is the median of a few steps, the peak counts data and
model.
An exponent is the slope of a line through the logarithms: 1 is a cost in proportion to the nodes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench_epoch import PRESETS, append_rows, memory_of, subject_of, timed
from iexact_runner.cli import compose_config
from iexact_runner.data import load_dataset
from iexact_runner.experiment import resolve_device
from iexact_runner.kernels import backends
from iexact_runner.measure import environment
from iexact_runner.problem import prepare


def main() -> None:
    """Prints the figures and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sage")
    parser.add_argument("--compression", choices=PRESETS, default="lowrank")
    parser.add_argument("--powers", type=int, nargs=2, default=(15, 21), help="least and largest power of two of nodes")
    parser.add_argument("--degree", type=int, default=14)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    rows = [row(2**power, arguments, device) for power in range(arguments.powers[0], arguments.powers[1] + 1)]
    for figure in ("seconds", "peak_mib", "evaluation_peak_mib"):
        slope = exponent([each["nodes"] for each in rows], [each[figure] for each in rows])
        for each in rows:
            each[f"{figure}_exponent"] = slope
    show(rows, Console())
    if arguments.csv:
        append_rows(rows, arguments.csv)


def row(nodes: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Figures of a graph of so many nodes."""
    config = compose_config(
        "dataset=synthetic",
        f"dataset.num_nodes={nodes}",
        f"dataset.average_degree={arguments.degree}",
        "dataset.num_features=128",
        f"model={arguments.model}",
        "model.num_layers=3",
        "model.hidden_channels=128",
        *PRESETS[arguments.compression],
    )
    problem = prepare(load_dataset(config.dataset), config.model, inductive=False, device=device)
    subject = subject_of(config, problem)
    memory = memory_of(subject, device)
    seconds = [timed(functools.partial(subject.step, epoch), device) for epoch in range(3, 3 + arguments.steps)]
    facts = environment.describe(device, backend=backends.resolve("auto", device))
    return {
        "model": arguments.model,
        "preset": arguments.compression,
        "nodes": nodes,
        "average_degree": arguments.degree,
        "seconds": statistics.median(seconds),
        **memory,
        **{key: facts[key] for key in ("device_name", "torch_threads", "python", "torch", "torch_geometric")},
        "backend": facts["compression_backend"],
        "git_commit": facts["git_commit"],
    }


def exponent(sizes: list[int], figures: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(figures), 1)[0])


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints a line a graph, and the exponents."""
    first = rows[0]
    columns = {
        "seconds a step": "seconds",
        "step peak [MiB]": "peak_mib",
        "evaluation peak [MiB]": "evaluation_peak_mib",
    }
    table = Table(title=f"{first['model']} under {first['preset']}, {first['device_name']}", title_justify="left")
    table.add_column("nodes", justify="right")
    for heading in columns:
        table.add_column(heading, justify="right")
    for each in rows:
        table.add_row(f"{each['nodes']:,}", *(f"{each[name]:.3f}" for name in columns.values()))
    table.add_section()
    table.add_row("exponent", *(f"{first[f'{name}_exponent']:.3f}" for name in columns.values()))
    console.print(table)


if __name__ == "__main__":
    main()
