"""``task=inspect``: facts about the graph, and what training on it would keep under each preset; nothing is trained."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from iexact_runner.measure import MIB, out_of_memory, total_bytes
from iexact_runner.tasks.context import Context

# Presets of ``conf/compression`` that are compared, in the order of the table.
PRESETS = ("plain", "none", "int8", "int4", "int2", "exact", "iexact", "lowrank_fine", "lowrank", "lowrank_small")
NAMES = {
    "nodes": "nodes",
    "edges": "edges, directed, without repeats",
    "self_loops": "self-loops",
    "reciprocal": "edges whose reverse is there",
    "isolated": "isolated nodes",
    "features": "features",
    "feature_zeros": "features that are zero",
    "constant_features": "features that are constant",
    "labels_a_node": "labels of a node",
    "classes": "classes",
    "largest_class": "nodes of the largest class",
    "smallest_class": "nodes of the smallest class",
    "unlabelled": "nodes without a label",
    "homophily": "edges within a class",
    "train": "training nodes",
    "val": "validation nodes",
    "test": "test nodes",
}
SHARES = ("reciprocal", "feature_zeros", "homophily")


def run(context: Context) -> None:
    """Shows both tables and leaves their figures for the summary."""
    found, problem, config = context.findings.inspection, context.problem, context.config
    assert found is not None
    with context.console.status("counting saved tensors"):
        kept, widest = out_of_memory.kept_by_preset(context.largest_step(), config, PRESETS)
    available = out_of_memory.available_bytes(context.device)
    found["data_mib"] = total_bytes(problem.tensors()) / MIB
    found["available_mib"] = None if available is None else available / MIB
    found["presets"] = {
        name: {"saved_mib": size / MIB, "fits": out_of_memory.fits(size, widest, available=available)}
        for name, size in kept.items()
    }
    context.console.print(_facts(config.dataset.name, found))
    if kept:
        context.console.print(_presets(config.model.name, found))
    else:
        context.console.print(f"what {config.model.name} saves is known after a step: task=measure", soft_wrap=True)


def _facts(name: str, found: dict[str, Any]) -> Table:
    table = Table(title=name, show_header=False, title_justify="left")
    for key, label in NAMES.items():
        value = found[key]
        if key in SHARES:
            value = "-" if value is None else f"{100 * value:.1f} %"
        table.add_row(label, value if isinstance(value, str) else f"{value:,}")
    degrees = found["degree"]
    table.add_row(f"degree, percentiles {', '.join(degrees)}", ", ".join(f"{degree:,}" for degree in degrees.values()))
    table.add_row("data in memory", f"{found['data_mib']:,.1f} MiB")
    return table


def _presets(model: str, found: dict[str, Any]) -> Table:
    free = found["available_mib"]
    title = f"saved by {model} for the backward pass" + ("" if free is None else f"; {free:,.0f} MiB are free")
    table = Table(title=title, title_justify="left")
    table.add_column("compression")
    table.add_column("saved [MiB]", justify="right")
    table.add_column("fits", justify="right")
    for name, row in found["presets"].items():
        fits = {True: "yes", False: "no", None: "not known"}[row["fits"]]
        table.add_row(name, f"{row['saved_mib']:,.2f}", fits)
    return table
