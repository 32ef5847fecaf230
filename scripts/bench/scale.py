"""Predicts memory and time of a graph that no machine at hand holds, by a model that measured rows are held against.

python scripts/bench/scale.py

SAGE, whose step holds two maps of hidden width (docs/architecture.md). A process with n of N nodes, e edges that end in
them, a halo of H rows, F features and hidden width D has

- data: 4 n F for features and as much for their product with the adjacency, which is kept, 4 e for edges, 16 n for row
  offsets, scales and labels, and 8 H for the numbers of rows that are sent,
- maps: 8 n D, and what is kept,
- messages on their way: four of c columns of H rows, c the multiple of 8 that 8 MiB hold, 8 at least.

A training step of L layers exchanges L - 1 times forward and as often backward, for the first product is kept. Each
product reads a row of D numbers for each edge.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from iexact_runner.parallel.halo import COLUMNS, MESSAGE_BYTES

ROOT = Path(__file__).resolve().parents[2]
MIB, GIB = 2**20, 2**30
# Features and hidden width of the published models that were measured.
SHAPES = {"synthetic_arxiv": (128, 128), "synthetic_products": (100, 256)}
# Nodes, edges in both directions and features of ogbn-papers100M; width and layers of the published SAGE on products.
PAPERS, WIDTH, LAYERS = (111_059_956, 3_228_124_712, 128), 256, 3
# Bytes a second of the memory of an H100, and of its NVLink and of a link of 400 Gbit/s, in one direction.
MEMORY_RATE, LINKS = 3.35e12, {"NVLink": 450e9, "400 Gbit/s": 50e9}
# Bytes a row of D numbers takes, forward and backward.
FORMS = {"fp32 / fp32": (4.0, 4.0), "int8 / int8": (1.0, 1.0), "lowrank / int4": (32 / WIDTH, 0.5)}
HALOS = (0.3, 0.66)


@dataclass(frozen=True)
class Rank:
    """One process of several.

    Args:
        nodes: n.
        edges: e.
        halo: H.
        features: F.
        width: D.
        kept_bytes: for the backward pass.
    """

    nodes: float
    edges: float
    halo: float
    features: int
    width: int
    kept_bytes: float

    @property
    def data(self) -> float:
        """Bytes of the graph."""
        return 8 * self.nodes * self.features + 4 * self.edges + 16 * self.nodes + 8 * self.halo

    @property
    def peak(self) -> float:
        """Bytes of a training step beside the data."""
        columns = max(COLUMNS, MESSAGE_BYTES // max(1, int(4 * self.halo)) // COLUMNS * COLUMNS)
        messages = 4 * 4 * min(columns, self.width) * self.halo
        return 8 * self.nodes * self.width + self.kept_bytes + messages


def measured() -> pd.DataFrame:
    """Rows of SAGE under ``lowrank``, with what the model says of them, in MiB."""
    files = (ROOT / "benchmarks" / f"{name}_cpu.csv" for name in ("ranks", "ranks_products"))
    rows = pd.concat([pd.read_csv(file) for file in files], ignore_index=True)
    rows = rows[(rows["model"] == "sage") & (rows["scheme"] == "lowrank")].copy()
    rows["measured"] = rows["data_mib"] + rows["step_peak_mib"]
    for index, row in rows.iterrows():
        features, width = SHAPES[row.dataset]
        rank = Rank(row.nodes, row.edges, row.halo, features, width, row.saved_mib * MIB)
        rows.loc[index, "modelled"] = (rank.data + rank.peak) / MIB
    return rows.loc[rows.groupby(["dataset", "processes"])["measured"].idxmax()]


def papers(halo: float, *, processes: int = 8) -> Rank:
    """A process of ogbn-papers100M, that reads so large a share of all nodes from others."""
    nodes, edges, features = PAPERS
    products = pd.read_csv(ROOT / "benchmarks" / "ranks_products_cpu.csv")
    kept = (products["saved_mib"] / products["nodes"]).max() * MIB  # a node, at the same width and number of layers
    own = nodes / processes
    return Rank(own, edges / processes, halo * nodes, features, WIDTH, kept * own)


def seconds(rank: Rank, forward: float, backward: float, rate: float) -> tuple[float, float]:
    """Seconds of a step that the products take, and that the messages take."""
    products = 2 * (LAYERS - 1) * 4 * rank.edges * rank.width / MEMORY_RATE
    return products, (LAYERS - 1) * (forward + backward) * rank.halo * rank.width / rate


def lines() -> list[str]:
    """The tables of docs/scale.md."""
    shown = ["| dataset | processes | measured [MiB] | model [MiB] | model / measured |", "|---|---:|---:|---:|---:|"]
    for row in measured().itertuples():
        ratio = row.modelled / row.measured
        shown.append(f"| {row.dataset} | {row.processes} | {row.measured:.0f} | {row.modelled:.0f} | {ratio:.2f} |")
    shown += ["", "| halo / all nodes | data [GiB] | step [GiB] | sum [GiB] |", "|---:|---:|---:|---:|"]
    for halo in HALOS:
        rank = papers(halo)
        parts = (rank.data / GIB, rank.peak / GIB, (rank.data + rank.peak) / GIB)
        shown.append(f"| {halo:.2f} | " + " | ".join(f"{part:.1f}" for part in parts) + " |")
    shown += ["", "| link | messages | products [s] | messages [s] |", "|---|---|---:|---:|"]
    for link, rate in LINKS.items():
        for name, form in FORMS.items():
            times = [seconds(papers(halo), *form, rate) for halo in HALOS]
            sent = " to ".join(f"{messages:.2f}" for _, messages in times)
            shown.append(f"| {link} | {name} | {times[0][0]:.2f} | {sent} |")
    return shown


def main() -> None:
    """Prints the tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("\n".join(lines()))


if __name__ == "__main__":
    main()
