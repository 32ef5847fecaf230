"""Times the search for the best levels, and quantizing with them against uniform levels, on one core.

python scripts/bench/bench_levels.py --csv benchmarks/levels_cpu.csv
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from iexact_runner.compression.bins import ClippedNormal, normal_levels, normal_sigma, optimal_levels
from iexact_runner.kernels import backends
from iexact_runner.measure import environment

SIZES = np.arange(4, 2049)
BLOCK_SIZE = 1024
ENVIRONMENT = ("device_name", "torch_threads", "python", "torch", "numba", "numpy", "scipy", "git_commit")


def main() -> None:
    """Prints one table and writes its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=169_343, help="nodes of the map (ogbn-arxiv)")
    parser.add_argument("--columns", type=int, default=128, help="features of the map")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    kernels = backends.select("auto", device)
    x = torch.randn(arguments.rows, arguments.columns)
    existing = torch.empty_like(x)

    runs: dict[str, Callable[[], object]] = {"copy of the map": lambda: existing.copy_(x)}
    for bits in (2, 4, 8):
        sigma = normal_sigma(SIZES, bits=bits)
        best = optimal_levels(bits, distribution=ClippedNormal(BLOCK_SIZE))
        form = {"bits": bits, "block_size": BLOCK_SIZE, "seed": 0}
        runs |= {
            f"levels int{bits}, d 4 to 2048": lambda bits=bits, sigma=sigma: normal_levels(bits, sigma=sigma),  # type: ignore[misc]
            f"levels int{bits}, one d": lambda bits=bits: optimal_levels.__wrapped__(  # type: ignore[misc]
                bits, distribution=ClippedNormal(BLOCK_SIZE)
            ),
            f"quantize int{bits}, uniform": lambda form=form: kernels.quantize(x, **form, levels=None),  # type: ignore[misc]
            f"quantize int{bits}, best": lambda form=form, best=best: kernels.quantize(x, **form, levels=best),  # type: ignore[misc]
        }
    seconds = {name: _median(run, arguments.repeats) for name, run in runs.items()}
    copy = seconds["copy of the map"]
    console = Console()
    table = Table(title=f"{arguments.rows} x {arguments.columns} float32, blocks of {BLOCK_SIZE}, one thread")
    for heading in ("what", "median [ms]", "x copy"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, median in seconds.items():
        table.add_row(name, f"{1e3 * median:.2f}", "" if name.startswith("levels") else f"{median / copy:.1f}")
    console.print(table)
    if arguments.csv:
        backend = backends.resolve("auto", device)
        facts = environment.describe(device, backend=backend)
        rows = [
            {
                "what": name,
                "milliseconds_median": 1e3 * median,
                "ratio_to_copy": None if name.startswith("levels") else median / copy,
                "rows": arguments.rows,
                "columns": arguments.columns,
                "repeats": arguments.repeats,
                "backend": backend,
                **{key: facts[key] for key in ENVIRONMENT},
            }
            for name, median in seconds.items()
        ]
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(arguments.csv, index=False)


def _median(run: Callable[[], object], repeats: int) -> float:
    """Median seconds, after one run that is not counted because it may compile."""
    times = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        run()
        if repeat:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
