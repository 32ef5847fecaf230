"""``task=partition``: a graph in parts, in a folder of which each process of a later run reads its own alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from iexact_runner.config import Config, ParallelConfig
from iexact_runner.data import load_dataset
from iexact_runner.data.part_files import check_free, write_parts
from iexact_runner.errors import ConfigError
from iexact_runner.measure.peak import peak_mib
from iexact_runner.parallel.team import Team
from iexact_runner.sampling.parallel import in_parts


def run(config: Config, console: Console, team: Team) -> dict[str, Any]:
    """Finds the parts, writes and shows them, and returns the record.

    Raises:
        ConfigError: if several processes were started, or the folder is not a new one.
    """
    parallel = config.parallel
    assert isinstance(parallel, ParallelConfig) and parallel.folder is not None
    if team.size > 1:
        raise ConfigError.of("task", config.task, f"works in one process, and {team.size} were started")
    folder = Path(parallel.folder)
    check_free(folder)  # before minutes are spent
    with console.status(f"loading {config.dataset.name}"):
        dataset = load_dataset(config.dataset)
    with console.status("finding the parts"):
        graph = in_parts(dataset, config, team)
    with console.status(f"writing {folder}"):
        written = list(write_parts(graph, folder, config.dataset))
    record = {"parts": graph.facts.num_parts, **graph.facts.partition, "written": written}
    record |= {name: value for name, value in peak_mib(torch.device("cpu")).items() if value is not None}
    show(console, record, folder=folder)
    return record


def show(console: Console, record: dict[str, Any], *, folder: Path) -> None:
    """A row for each part, and where they are."""
    title = f"{record['parts']} parts by {record['method']}, {100 * record['edge_cut']:.1f} % of the edges cut"
    table = Table(title=title, title_justify="left")
    for name in ("part", "nodes", "halo", "edges", "file [MiB]"):
        table.add_column(name, justify="right")
    for number, part in enumerate(record["written"]):
        counts = (f"{part[name]:,}" for name in ("nodes", "halo", "edges"))
        table.add_row(str(number), *counts, f"{part['bytes'] / 2**20:,.1f}")
    console.print(table)
    way_on = f"torchrun --nproc-per-node N -m iexact_runner ... parallel=graph parallel.folder={folder}"
    console.print(f"written to {folder}; train on it with {way_on}", soft_wrap=True, markup=False, highlight=False)
