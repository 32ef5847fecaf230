"""Times a training step under compression presets against plain PyG FP32 in the same process.

python scripts/bench_epoch.py --dataset synthetic_arxiv --model sage --csv benchmarks/epoch_cpu.csv

Baseline and presets take turns, round by round, and a ratio is taken within its round, so that a busy machine slows
both alike; the median of the ratios and their 20th and 80th percentile are printed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from iexact_runner import environment
from iexact_runner.cli import compose_config
from iexact_runner.compression import backends
from iexact_runner.config import Config
from iexact_runner.data import load_dataset
from iexact_runner.experiment import resolve_device
from iexact_runner.loss import loss_per_node
from iexact_runner.nn import build_model
from iexact_runner.nn.baseline import PyGBaseline, baseline_graph
from iexact_runner.training import Optimization, Problem, clock, prepare, step, training_input

PRESETS = {
    "none": ("compression=none",),
    "exact": ("compression=exact",),
    "iexact": ("compression=iexact",),
    "iexact, one map, no dropout mask": (
        "compression=iexact",
        "compression.share_maps=true",
        "compression.store_dropout_mask=false",
    ),
    "lowrank": ("compression=lowrank",),
}

Step = Callable[[int], float]


def main() -> None:
    """Prints the ratios and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic_arxiv")
    parser.add_argument("--model", default="sage")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    rows = time_presets(arguments.dataset, arguments.model, device, rounds=arguments.rounds, backend=arguments.backend)
    show(rows, Console())
    if arguments.csv:
        append_rows(rows, arguments.csv)


def time_presets(
    dataset: str, model: str, device: torch.device, *, rounds: int, backend: str = "auto"
) -> list[dict[str, Any]]:
    """One row a preset: epoch seconds and their ratio to the baseline's."""
    configs = {
        name: compose_config(f"dataset={dataset}", f"model={model}", *overrides, f"compression.backend={backend}")
        for name, overrides in PRESETS.items()
    }
    first = configs["none"]
    problem = prepare(load_dataset(first.dataset), first.model, inductive=False, device=device)
    steps: dict[str, Step] = {"baseline": _baseline_step(first, problem)}
    steps |= {name: _preset_step(config, problem) for name, config in configs.items()}
    seconds = _take_turns(steps, rounds, device)
    facts = environment.describe(device, backend=backends.resolve(backend, device))
    return [
        {
            "dataset": dataset,
            "model": model,
            "preset": name,
            "seconds_median": statistics.median(seconds[name]),
            **_ratio_figures(seconds[name], seconds["baseline"]),
            "rounds": rounds,
            **{key: facts[key] for key in ("device_name", "torch_threads", "python", "torch", "torch_geometric")},
            "triton": facts["triton"],
            "cuda": facts["cuda"],
            "backend": facts["compression_backend"],
            "git_commit": facts["git_commit"],
        }
        for name in seconds
    ]


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints one table."""
    first = rows[0]
    table = Table(title=f"{first['model']} on {first['dataset']}, {first['device_name']}, {first['backend']}")
    for name in ("preset", "seconds an epoch", "ratio to PyG FP32", "p20", "p80"):
        table.add_column(name, justify="left" if name == "preset" else "right")
    for row in rows:
        figures = (row["seconds_median"], row["ratio_median"], row["ratio_p20"], row["ratio_p80"])
        table.add_row(row["preset"], *(f"{figure:.3f}" for figure in figures))
    console.print(table)


def append_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Adds rows to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, mode="a", header=not path.exists(), index=False)


def _preset_step(config: Config, problem: Problem) -> Step:
    torch.manual_seed(0)
    model = build_model(
        config.model,
        in_channels=problem.in_channels,
        out_channels=problem.num_classes,
        compression=config.compression,
    ).to(problem.whole.x.device)
    optimization = Optimization(model, config.training)
    return lambda epoch: step(model, optimization, problem, seed=epoch, epoch=epoch)


def _baseline_step(config: Config, problem: Problem) -> Step:
    torch.manual_seed(0)
    model = PyGBaseline(config.model, in_channels=problem.in_channels, out_channels=problem.num_classes)
    model.to(problem.whole.x.device).train()
    optimization = Optimization(model, config.training)
    operator = baseline_graph(problem.training.graph)

    def run(epoch: int) -> float:
        features, nodes = training_input(problem, seed=epoch)
        scores = model(features, operator)[nodes]
        loss = loss_per_node(scores, problem.training.y[nodes], kind=config.training.loss).mean()
        optimization.update(model, loss, epoch=epoch)
        return loss.item()

    return run


def _take_turns(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    for run in steps.values():  # compiles, allocates, fills caches
        run(1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name, run in steps.items():
            seconds[name].append(_timed(functools.partial(run, 2 + index), device))
    return seconds


def _timed(run: Callable[[], object], device: torch.device) -> float:
    start = clock(device)
    run()
    return clock(device) - start


def _ratio_figures(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    ratios = [own / other for own, other in zip(seconds, baseline, strict=True)]
    cuts = statistics.quantiles(ratios, n=10, method="inclusive")
    return {"ratio_median": statistics.median(ratios), "ratio_p20": cuts[1], "ratio_p80": cuts[7]}


if __name__ == "__main__":
    main()
