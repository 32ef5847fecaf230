"""How well the clipped normal describes the maps that are quantized, and what the best levels bring, map by map.

python scripts/bench/activation_distribution.py --dataset digits --csv benchmarks/activation_distribution.csv

Trains SAGE with i-EXACT, then looks at the maps of one more step as EXACT and i-EXACT would quantize them, as they are
without the random projection, and at adaptive directions: the leading principal components of BatchNorm's input.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from iexact_runner.analysis.distribution import CapturedMap, captured_maps, map_figures
from iexact_runner.cli import compose_config
from iexact_runner.config import Config
from iexact_runner.data import load_dataset
from iexact_runner.kernels import backends
from iexact_runner.measure import environment
from iexact_runner.nn import Model, build_model
from iexact_runner.problem import Problem, prepare
from iexact_runner.training import Optimization, train_epochs

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"col_size": 0},
    "iexact": {},
    "not projected": {"kept_frac": 1.0},
}
DIRECTIONS, DIRECTION_ROWS = 16, 64
ENVIRONMENT = ("device_name", "torch_threads", "python", "torch", "numpy", "scipy", "compression_backend", "git_commit")


def main() -> None:
    """Prints one table and writes its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--root", default="data", help="where the files of the dataset lie")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of training before the maps are looked at")
    parser.add_argument("--bits", type=int, nargs="+", default=[2], choices=(1, 2, 4, 8))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    arguments = parser.parse_args()
    overrides = (f"dataset={arguments.dataset}", f"dataset.root={arguments.root}", f"seed={arguments.seed}")
    config = compose_config(*overrides, f"training.epochs={arguments.epochs}", "device=cpu", "compression=iexact")
    model, problem, score = trained(config)
    facts = environment.describe(torch.device("cpu"), backend=backends.resolve("auto", torch.device("cpu")))
    rows = [
        {
            "dataset": arguments.dataset,
            "epochs": arguments.epochs,
            "val": score,
            "setting": setting,
            "layer": captured.layer,
            "map": kind,
            "rows": captured.values.size(0),
            "columns": captured.values.size(1),
            "bits": bits,
            **flat(dataclasses.asdict(map_figures(captured.values, block_size=captured.block_size, bits=bits))),
            **{name: facts[name] for name in ENVIRONMENT},
        }
        for setting, kind, captured in maps(model, problem, config)
        for bits in arguments.bits
    ]
    table = pd.DataFrame(rows)
    show(table, Console())
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(arguments.csv, mode="a", header=not arguments.csv.exists(), index=False)


def trained(config: Config) -> tuple[Model, Problem, float]:
    """A trained model, its problem and the last validation score."""
    problem = prepare(load_dataset(config.dataset), config.model, inductive=False, device=torch.device("cpu"))
    torch.manual_seed(config.seed)
    model = build_model(
        config.model,
        in_channels=problem.in_channels,
        out_channels=problem.num_classes,
        compression=config.compression,
    )
    *_, last = train_epochs(model, problem, Optimization(model, config.training), seed=config.seed)
    return model, problem, last.scores.val


def maps(model: Model, problem: Problem, config: Config) -> Iterator[tuple[str, str, CapturedMap]]:
    """Setting, kind and map."""
    for setting, fields in SETTINGS.items():
        model.compression = dataclasses.replace(config.compression, **fields)
        for captured in captured_maps(model, problem, seed=config.seed):
            # BatchNorm's input is the same whether maps are projected or not.
            if captured.op == "BatchNorm" and setting == "not projected":
                coefficients = adaptive_directions(captured.values)
                block_size = DIRECTION_ROWS * coefficients.size(1)
                sketch = dataclasses.replace(captured, values=coefficients, block_size=block_size)
                yield "adaptive directions", "coefficients", sketch
            else:
                yield setting, kind_of(captured), captured


def kind_of(captured: CapturedMap) -> str:
    """What a map of SAGE is."""
    if captured.op == "BatchNorm":
        return "BatchNorm input"
    return "aggregated map" if captured.layer.endswith("lin_l") else "layer input"


def adaptive_directions(x: Tensor) -> Tensor:
    """The leading principal components (N, 16) of a map (N, D) normalised by column, each of unit variance."""
    normal = (x - x.mean(dim=0)) / x.std(dim=0).clamp_min(1e-5)
    _, directions = torch.linalg.eigh(normal.T @ normal)
    coefficients = normal @ directions[:, -DIRECTIONS:]
    scaled: Tensor = coefficients / coefficients.std(dim=0).clamp_min(1e-5)
    return scaled


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures as columns: ``optimal_reduction``."""
    columns: dict[str, float] = {}
    for name, value in figures.items():
        columns |= flat(value, f"{prefix}{name}_") if isinstance(value, dict) else {prefix + name: value}
    return columns


def show(table: pd.DataFrame, console: Console) -> None:
    """Prints the rows that belong together below each other."""
    screen = Table(title=f"{table['dataset'].iloc[0]} after {table['epochs'].iloc[0]} epochs", title_justify="left")
    for heading in ("setting", "layer", "map", "bits", "d"):
        screen.add_column(heading)
    for heading in ("JS uniform", "JS normal", "predicted", "measured", "best: predicted", "measured"):
        screen.add_column(heading, justify="right")
    for heading in ("reduction", "with its histogram"):
        screen.add_column(heading, justify="right")
    variances = ("uniform_predicted", "uniform_measured", "optimal_predicted", "optimal_measured")
    for _, row in table.iterrows():
        screen.add_row(
            *(str(row[name]) for name in ("setting", "layer", "map", "bits", "d")),
            *(f"{row[name]:.3f}" for name in ("js_uniform", "js_clipped_normal")),
            *(f"{row[name]:.4f}" for name in variances),
            *(f"{100 * row[name]:.1f} %" for name in ("optimal_reduction", "empirical_reduction")),
        )
    console.print(screen)


if __name__ == "__main__":
    main()
