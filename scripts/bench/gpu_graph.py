"""Training steps that are captured in a CUDA graph against the same steps without: the losses, and the times of both.

python scripts/bench/gpu_graph.py --model sage --csv benchmarks/gpu_graph.csv

Plain PyG FP32, each preset and its captured twin take turns, epoch by epoch, from the same weights with the same seeds.
The mean is over all epochs after the first few, so that those which find directions and capture anew count.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench_epoch import append_rows, seeded_model, subjects
from gpu_profile import provenance
from iexact_runner.cli import compose_config
from iexact_runner.config import Config
from iexact_runner.data import load_dataset
from iexact_runner.problem import Problem, prepare
from iexact_runner.training import Optimization, clock, stepper

EPOCHS, WARM_UP = 24, 4
PRESETS = ("none", "exact", "iexact", "lowrank_v1", "lowrank")
# Labels that are fed and edges that are dropped are so many as the seed says, which a graph cannot be.
FIXED = {"gat": ("model.label_input=false", "model.edge_dropout=0")}
# Sums over neighbours have no fixed order: losses of the same steps taken twice differ, more with every step. Those of
# captured steps may by so many times as much, and by so much beside it, relative.
LARGEST_RATIO, LOSS_TOLERANCE = 5.0, 1e-5
Row = dict[str, Any]


def main() -> None:
    """Prints the rows of a model and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic_arxiv")
    parser.add_argument("--model", default="sage")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = compare_captured(arguments.dataset, arguments.model, device, arguments.presets, epochs=arguments.epochs)
    show(rows)
    if arguments.csv:
        append_rows(rows, arguments.csv)


def compare_captured(
    dataset: str, model: str, device: torch.device, presets: Sequence[str], *, epochs: int = EPOCHS
) -> list[Row]:
    """A row for each preset; ``problem`` says what is wrong with the captured steps and is empty if nothing is."""
    shared = (f"dataset={dataset}", f"model={model}", *FIXED.get(model, ()))
    configs = {name: compose_config(*shared, f"compression={name}") for name in presets}
    first = next(iter(configs.values()))
    problem = prepare(load_dataset(first.dataset), first.model, inductive=False, device=device)
    baseline = subjects(dataset, model, device, presets={presets[0]: shared[2:]})["baseline"].step
    takes: dict[str, Callable[..., float]] = {"baseline": lambda *, seed, epoch: baseline(epoch)}
    for name, config in configs.items():
        takes[name] = _take(config, problem, cuda_graph=False)
        takes[f"{name}, again"] = _take(config, problem, cuda_graph=False)
        takes[f"{name}, captured"] = _take(config, problem, cuda_graph=True)
    losses: dict[str, list[float]] = {name: [] for name in takes}
    seconds: dict[str, list[float]] = {name: [] for name in takes}
    for epoch in range(1, epochs + 1):
        for name, take in takes.items():
            start = clock(device)
            losses[name].append(take(seed=epoch, epoch=epoch))
            seconds[name].append(clock(device) - start)
    timed = {name: each[WARM_UP:] for name, each in seconds.items()}
    rows = []
    for name in presets:
        captured = f"{name}, captured"
        difference, usual = (_difference(losses[name], losses[other]) for other in (captured, f"{name}, again"))
        replays = getattr(takes[captured], "replays", 0)
        row = {
            "dataset": dataset,
            "model": model,
            "preset": name,
            "epochs": epochs,
            "replays": replays,
            "loss_difference": difference,
            "loss_difference_uncaptured": usual,
            "baseline_milliseconds": 1e3 * statistics.fmean(timed["baseline"]),
            "milliseconds": 1e3 * statistics.fmean(timed[name]),
            "captured_milliseconds": 1e3 * statistics.fmean(timed[captured]),
            "captured_milliseconds_median": 1e3 * statistics.median(timed[captured]),
        }
        # The dropout of FP32 is PyTorch's own, whose numbers a graph draws in another order.
        apart = name != "none" and not difference <= LARGEST_RATIO * usual + LOSS_TOLERANCE
        row["problem"] = "not captured" if not replays else f"losses differ by {difference:.1e}" if apart else ""
        rows.append(row | provenance(device))
    return rows


def _difference(losses: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(first - second) / abs(first) for first, second in zip(losses, others, strict=True))


def show(rows: Sequence[Row]) -> None:
    """Prints a line for each preset."""
    for row in rows:
        times = " ".join(f"{row[f'{name}milliseconds']:8.2f}" for name in ("baseline_", "", "captured_"))
        median = f"{row['captured_milliseconds_median']:8.2f}"
        print(
            f"{row['model']:<10} {row['preset']:<12} PyG, as it is, captured, its median [ms] {times} {median}  "
            f"replays {row['replays']}/{row['epochs']}  losses {row['loss_difference']:.1e}, "
            f"uncaptured {row['loss_difference_uncaptured']:.1e}  {row['problem'] or 'agrees'}",
            flush=True,
        )


def _take(config: Config, problem: Problem, *, cuda_graph: bool) -> Callable[..., float]:
    model = seeded_model(config, problem, problem.whole.x.device)
    training = dataclasses.replace(config.training, cuda_graph=cuda_graph)
    return stepper(model, Optimization(model, training), problem)


if __name__ == "__main__":
    main()
