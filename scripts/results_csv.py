"""Turns the summaries of runs into tidy CSV rows, one a run folder, with the environment that they were made in.

python scripts/results_csv.py outputs/sweep_x [FOLDER ...] > benchmarks/NAME.csv
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

CONFIG = (
    "task",
    "model.name",
    "model.num_layers",
    "model.hidden_channels",
    "dataset.name",
    "compression.scheme",
    "compression.bits",
    "compression.kept_frac",
    "compression.col_size",
    "compression.alpha",
    "compression.levels",
    "compression.max_block_size",
    "compression.share_maps",
    "compression.store_dropout_mask",
    "runs",
    "seed",
    "training.epochs",
)
ENVIRONMENT = (
    "device_name",
    "cpu_count",
    "torch_threads",
    "python",
    "torch",
    "torch_geometric",
    "compression_backend",
    "git_commit",
)


def main() -> None:
    """Reads every summary below the folders and writes the rows to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    folders = parser.parse_args().folders
    paths = sorted(path for folder in folders for path in folder.rglob("summary.json"))
    if not paths:
        parser.error(f"no summary.json below {', '.join(map(str, folders))}")
    pd.DataFrame([row_of(json.loads(path.read_text())) for path in paths]).to_csv(sys.stdout, index=False)


def row_of(summary: dict[str, Any]) -> dict[str, Any]:
    """One tidy row of a summary."""
    row = {"status": summary["status"]}
    for name in CONFIG:
        value: Any = summary["config"]
        for part in name.split("."):
            value = value[part]
        row[name] = value
    accuracy, memory, throughput = summary["accuracy"], summary["memory"], summary["throughput"]
    if accuracy:
        row |= {
            "metric": accuracy["metric"],
            "test_mean": accuracy["test"]["mean"],
            "test_std": accuracy["test"]["std"],
        }
    if memory:
        row |= {name: memory[name] for name in ("saved_mib", "saved_mib_fp32", "loss_mib", "data_mib", "model_mib")}
    if throughput:
        row |= {f"epochs_per_second_{name}": value for name, value in throughput["epochs_per_second"].items()}
    return row | {name: summary["environment"][name] for name in ENVIRONMENT}


if __name__ == "__main__":
    main()
