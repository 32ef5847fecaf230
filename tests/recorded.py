"""Run folders as a training or measuring job leaves them, with chosen figures, for tests of what reads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from iexact_runner.runs.records import RunFolder, mean_std

CONFIG: dict[str, Any] = {
    "task": "train",
    "runs": 2,
    "seed": 0,
    "device": "auto",
    "output_dir": "outputs",
    "model": {
        "name": "sage",
        "num_layers": 3,
        "hidden_channels": 128,
        "input_dropout": 0.0,
        "batch_norm": True,
        "residual": False,
    },
    "dataset": {"name": "digits", "root": "data", "inductive": False},
    "compression": {
        "scheme": "projected",
        "bits": 2,
        "kept_frac": 0.125,
        "col_size": 0,
        "alpha": 1.0,
        "levels": "uniform",
        "max_block_size": 1024,
        "share_maps": False,
        "store_dropout_mask": True,
        "backend": "auto",
    },
    "training": {"epochs": 3, "lr": 0.01},
}
FP32 = {"scheme": "none", "bits": None, "kept_frac": 1.0, "max_block_size": None, "store_dropout_mask": False}
ENVIRONMENT = {
    "iexact_runner": "0.1.0",
    "git_commit": "abc",
    "python": "3.11.7",
    "torch": "2.13.0",
    "torch_geometric": "2.8.1",
    "device": "cpu",
    "device_name": "a CPU",
    "cpu_count": 2,
    "torch_threads": 2,
    "compression_backend": "numba",
}
TENSORS = [
    {
        "layer": "blocks.0.conv",
        "op": "LinearBackward",
        "shape": [8, 4],
        "dtype": "int2",
        "bytes_fp32": 128,
        "bytes": 2**20,
    },
    {
        "layer": "blocks.0",
        "op": "LeakyReLUBackward",
        "shape": [8, 4],
        "dtype": "mask",
        "bytes_fp32": 128,
        "bytes": 2**19,
    },
]


def record(
    folder: Path,
    *,
    status: str = "completed",
    scores: tuple[float, ...] = (0.9, 0.92),
    saved_mib: float = 1.5,
    rates: tuple[float, float, float] = (4.0, 3.5, 4.5),
    environment: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Writes a run; ``config`` holds what differs, groups as dictionaries."""
    full = copy.deepcopy(CONFIG)
    for name, value in config.items():
        full[name] = full.get(name, {}) | value if isinstance(value, dict) else value
    run = RunFolder(folder)
    run.write_config(yaml.safe_dump(full))
    train = full["task"] in ("train", "distribution")
    for repeat in range(full["runs"] if train else 0):
        for epoch in range(1, full["training"]["epochs"] + 1):
            score = 0.5 + 0.1 * epoch + 0.01 * repeat
            line = {"run": repeat, "epoch": epoch, "loss": 1 / epoch + 0.1 * repeat, "test": score, "val": score}
            run.append_metrics(line)
    if status == "unfinished":
        return folder
    split = mean_std(scores)
    run.write_summary(
        {
            "schema_version": 1,
            "status": status,
            "error": None if status == "completed" else "the training loss is nan",
            "config": full,
            "environment": ENVIRONMENT | (environment or {}),
            "accuracy": {"metric": "accuracy", "train": split, "val": split, "test": split} if train else None,
            "memory": {"saved_mib": saved_mib, "model_mib": 0.2954, "tensors": TENSORS},
            "throughput": {"epochs_per_second": dict(zip(("median", "p20", "p80"), rates, strict=True))},
        }
    )
    return folder


def observed_map(layer: str, *, js: float, reduction: float) -> dict[str, Any]:
    """A map as ``task=distribution`` records it, with chosen figures."""
    levels = {"predicted": 0.15, "measured": 0.16, "reduction": reduction, "error_reduction": reduction}
    return {
        "layer": layer,
        "op": "Linear",
        "projected": True,
        "shape": [8, 4],
        "d": 16,
        "js_uniform": 2 * js,
        "js_clipped_normal": js,
        "uniform": levels,
        "optimal": levels,
        "empirical": levels,
        "observed": [0.1, 0.4, 0.4, 0.1],
        "clipped_normal": [0.1, 0.4, 0.4, 0.1],
    }


def edit_summary(folder: Path, **fields: Any) -> None:
    """Replaces top-level fields of a summary."""
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
