"""``task=bins``: the best quantization levels for all block sizes, as a table, a CSV file and a figure."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from iexact_runner.compression.bins import normal_levels, normal_sigma, normal_variances
from iexact_runner.config import BinsConfig, Config
from iexact_runner.measure import environment
from iexact_runner.runs.files import write_atomically
from iexact_runner.runs.records import SCHEMA_VERSION, RunFolder

# The block sizes and the sigmas that the reference searches; its sigmas are those of 2-bit codes.
BLOCK_SIZES = np.arange(4, 2049)
SIGMAS = np.arange(10, 5001) / 1000
SIGMAS_TOP = 3
SHOWN_SIZES = tuple(2**power for power in range(2, 12))
SHOWN_SIGMAS = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 2.0, 5.0)


def run(config: Config, folder: RunFolder, console: Console, resolved_yaml: str) -> dict[str, Any]:
    """Computes the table, writes and shows it, and returns the summary; a failure is recorded, then raised again."""
    folder.write_config(resolved_yaml)
    status, error, found = "completed", None, None
    try:
        start = time.perf_counter()
        table = best_bins(config.bins)
        found = {"rows": len(table), "seconds": time.perf_counter() - start}
        write_atomically(folder.path / "bins.csv", to_csv(table))
        show(console, table, config.bins)
        if importlib.util.find_spec("matplotlib") is None:
            message = "bins.png, bins.svg: not drawn without matplotlib: pip install 'iexact-runner[figures]'"
            console.print(message, highlight=False, soft_wrap=True, markup=False)
        else:
            draw(folder.path, table, config.bins)
    except BaseException as failure:
        interrupted = isinstance(failure, KeyboardInterrupt)
        status = "interrupted" if interrupted else "failed"
        error = "interrupted by the user" if interrupted else f"{type(failure).__name__}: {failure}"
        raise
    finally:
        summary = {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "error": error,
            "config": asdict(config),
            "environment": environment.describe(torch.device("cpu"), backend="none"),
            "accuracy": None,
            "memory": None,
            "throughput": None,
            "bins": found,
        }
        folder.write_summary(summary)
    console.print(f"written to {folder.path}", highlight=False, markup=False, soft_wrap=True)
    return summary


def best_bins(config: BinsConfig) -> pd.DataFrame:
    """The best levels for each block size d of 4 to 2048, or for each sigma of the reference's grid.

    Returns:
        A row each: ``d`` (empty for the grid), ``sigma`` in units of the code, ``levels`` (an array), expected
        ``variance`` at them and at uniform ones (``uniform_variance``), and the ``reduction``, a share of the latter.
    """
    top = 2**config.bits - 1
    sigma = normal_sigma(BLOCK_SIZES, bits=config.bits) if config.use_d_key else SIGMAS * top / SIGMAS_TOP
    levels = normal_levels(config.bits, sigma=sigma)
    uniform = np.broadcast_to(np.arange(top + 1.0), levels.shape)
    variance, at_uniform = (
        normal_variances(chosen, sigma=sigma, clipped=config.clipped) for chosen in (levels, uniform)
    )
    return pd.DataFrame(
        {
            "d": BLOCK_SIZES if config.use_d_key else None,
            "sigma": sigma,
            "levels": list(levels),
            "variance": variance,
            "uniform_variance": at_uniform,
            "reduction": 1 - variance / at_uniform,
        }
    )


def to_csv(table: pd.DataFrame) -> str:
    """The table as CSV; the levels of a row stand in one field, separated by spaces."""
    joined = [" ".join(f"{level:.9g}" for level in levels) for levels in table["levels"]]
    text: str = table.assign(levels=joined).to_csv(index=False)
    return text


def show(console: Console, table: pd.DataFrame, config: BinsConfig) -> None:
    """Prints some rows."""
    key, shown = ("d", SHOWN_SIZES) if config.use_d_key else ("sigma", _sigmas(config))
    screen = Table(title=_title(config), title_justify="left")
    for heading in (key, "first bin", "middle bin", "variance", "uniform levels", "reduction"):
        screen.add_column(heading, justify="right")
    for value in shown:
        row = table.loc[(table[key] - value).abs().idxmin()]
        first, middle = _widths(np.array([row["levels"]]))
        figures = (first[0], middle[0], row["variance"], row["uniform_variance"])
        screen.add_row(f"{value:g}", *(f"{figure:.5f}" for figure in figures), f"{100 * row['reduction']:.2f} %")
    console.print(screen)


def draw(folder: Path, table: pd.DataFrame, config: BinsConfig) -> None:
    """Draws the widths of the first and the middle bin, and the variance, over d or sigma: bins.png and bins.svg."""
    from matplotlib.figure import Figure

    key = "d" if config.use_d_key else "sigma"
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(_title(config))
    left, right = figure.subplots(1, 2)
    first, middle = _widths(np.stack(list(table["levels"])))
    left.plot(table[key], first, label="first and last bin")
    left.plot(table[key], middle, label="middle bin")
    left.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    left.set_ylabel("best width [codes]")
    right.plot(table[key], table["uniform_variance"], label="uniform levels")
    right.plot(table[key], table["variance"], label="best levels")
    right.set_ylabel("expected variance [codes squared]")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("elements of a block, d" if config.use_d_key else "standard deviation, sigma [codes]")
        axes.legend()
    for kind in ("png", "svg"):
        figure.savefig(folder / f"bins.{kind}", dpi=150)


def _widths(levels: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Widths (K,) of the first and the middle bin of levels (K, L)."""
    half = levels.shape[1] // 2
    return levels[:, 1] - levels[:, 0], levels[:, half] - levels[:, half - 1]


def _sigmas(config: BinsConfig) -> list[float]:
    return [sigma * (2**config.bits - 1) / SIGMAS_TOP for sigma in SHOWN_SIGMAS]


def _title(config: BinsConfig) -> str:
    return f"best levels of {config.bits} bits, {'clipped' if config.clipped else 'truncated'} normal"
