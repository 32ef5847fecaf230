"""Models of PyG and torch without twins: what is kept, the peak, the gradient error and the time of a compressed step.

python scripts/bench/bench_modules.py --root DIR --csv benchmarks/modules_cpu.csv

Beside FP32 and ``compress`` at 4 and 8 bits stands ``torch.utils.checkpoint`` around every layer. Graph models of three
layers of 128 train on Amazon Computers, an encoder of four layers on noise. Dropout is off, so that gradients compare.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric import nn as pyg

from bench_epoch import append_rows
from iexact_runner import compress
from iexact_runner.cli import compose_config
from iexact_runner.data import load_dataset
from iexact_runner.kernels import backends
from iexact_runner.measure import MIB, SavedTensors, environment
from iexact_runner.measure.peak import PeakMemory
from iexact_runner.training import clock

HIDDEN, LAYERS, CLASSES = 128, 3, 10
AGGREGATORS, SCALERS = ("mean", "min", "max", "std"), ("identity", "amplification", "attenuation")
WAYS = ("none", "int8", "int4", "lowrank", "checkpoint")
Make = Callable[[int, int], nn.Module]


class Chain(nn.Module):
    """Layers with a norm and ReLU between them; ``features`` are given to each layer beside the graph.

    With ``jump`` a linear map of all layers' outputs follows (jumping knowledge).
    """

    def __init__(
        self, inputs: int, make: Make, norm: Callable[[int], nn.Module] = nn.BatchNorm1d, *, jump: bool = False
    ):
        super().__init__()
        widths = [inputs, *[HIDDEN] * (LAYERS - 1), HIDDEN if jump else CLASSES]
        self.layers = nn.ModuleList(make(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(norm(HIDDEN) for _ in range(LAYERS - 1))
        self.head = nn.Linear(LAYERS * HIDDEN, CLASSES) if jump else None
        self.checkpointed = False

    def forward(self, x: Tensor, *graph: Any) -> Tensor:
        """Maps (N, D) to (N, classes)."""
        outputs = []
        for index, layer in enumerate(self.layers):
            x = checkpoint(layer, x, *graph, use_reentrant=False) if self.checkpointed else layer(x, *graph)
            x = F.relu(self.norms[index](x)) if index < LAYERS - 1 else x
            outputs.append(x)
        return x if self.head is None else self.head(torch.cat(outputs, dim=1))


class Embedded(nn.Module):
    """A linear map, layers of one width, a linear map."""

    def __init__(self, inputs: int, layers: list[nn.Module], outputs: int) -> None:
        super().__init__()
        self.first, self.layers, self.last = (
            nn.Linear(inputs, HIDDEN),
            nn.ModuleList(layers),
            nn.Linear(HIDDEN, outputs),
        )
        self.checkpointed = False

    def forward(self, x: Tensor, *graph: Any) -> Tensor:
        """Maps (..., D) to (..., outputs)."""
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, *graph, use_reentrant=False) if self.checkpointed else layer(x, *graph)
        out: Tensor = self.last(x)
        return out


class Relations(nn.Module):
    """SAGE over the edges and over their reverse."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = pyg.HeteroConv({("a", kind, "a"): pyg.SAGEConv(inputs, outputs) for kind in ("to", "from")})

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Maps (N, D) to (N, C)."""
        out: Tensor = self.conv({"a": x}, {("a", "to", "a"): edge_index, ("a", "from", "a"): edge_index.flip(0)})["a"]
        return out


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Two linear maps with ReLU between them."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))


def models(inputs: int, degrees: Tensor) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    pna = dict(aggregators=[*AGGREGATORS], scalers=[*SCALERS], deg=degrees)
    encoder = dict(dim_feedforward=2 * HIDDEN, dropout=0.0, batch_first=True)
    return {
        "GATv2": lambda: Chain(inputs, pyg.GATv2Conv),
        "TransformerConv": lambda: Chain(inputs, pyg.TransformerConv),
        "SAGE, LayerNorm, JK": lambda: Chain(inputs, pyg.SAGEConv, nn.LayerNorm, jump=True),
        "GIN": lambda: Chain(inputs, lambda *widths: pyg.GINConv(mlp(*widths))),
        "GINE": lambda: Chain(inputs, lambda *widths: pyg.GINEConv(mlp(*widths), edge_dim=8)),
        "HeteroConv SAGE": lambda: Chain(inputs, Relations),
        "GPS": lambda: Embedded(
            inputs,
            [
                pyg.GPSConv(HIDDEN, pyg.GINConv(mlp(HIDDEN, HIDDEN)), heads=4, attn_type="performer")
                for _ in range(LAYERS)
            ],
            CLASSES,
        ),
        "PNA": lambda: Chain(inputs, lambda *widths: pyg.PNAConv(*widths, **pna)),
        "TransformerEncoder": lambda: Embedded(
            HIDDEN, [nn.TransformerEncoderLayer(HIDDEN, 4, **encoder) for _ in range(4)], CLASSES
        ),
    }


def main() -> None:
    """Prints a line for each model and way, and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--dataset", default="amazon_computers")
    parser.add_argument("--models", nargs="+", help="all but PNA, which takes 20 GiB in FP32")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    arguments = parser.parse_args()
    data = load_dataset(compose_config(f"dataset={arguments.dataset}", f"dataset.root={arguments.root}").dataset)
    device = torch.device(arguments.device)
    edges = data.edge_index.long()
    known = models(data.x.size(1), torch.bincount(torch.bincount(edges[1], minlength=data.num_nodes)))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 64, HIDDEN, generator=generator)
    words, sorts = noise, torch.randint(CLASSES, (64 * 64,), generator=generator)
    features = torch.randn(edges.size(1), 8, generator=generator)
    for name in arguments.models or [name for name in known if name != "PNA"]:
        graph = (edges, features) if name == "GINE" else (edges,)
        inputs, labels = ((words,), sorts) if name == "TransformerEncoder" else ((data.x, *graph), data.y)
        inputs, labels = tuple(part.to(device) for part in inputs), labels.to(device)
        rows = [measured(known[name], way, inputs, labels, arguments.rounds) for way in arguments.ways]
        for row in compared(rows):
            row = {"model": name, "dataset": arguments.dataset} | row
            print(
                "  ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()),
                flush=True,
            )
            if arguments.csv:
                facts = environment.describe(device, backend=backends.resolve("auto", device))
                kept = ("device_name", "torch_threads", "python", "torch", "torch_geometric", "git_commit")
                append_rows([row | {key: facts[key] for key in kept}], arguments.csv)


def measured(
    make: Callable[[], Any], way: str, inputs: tuple[Tensor, ...], labels: Tensor, rounds: int
) -> dict[str, Any]:
    """Figures of a step, and its gradient."""
    torch.manual_seed(0)
    device = labels.device
    model = make().train().to(device)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.0)
    if way == "checkpoint":
        model.checkpointed = True
    elif way != "none":
        compress(model, way)

    def step() -> None:
        F.cross_entropy(model(*inputs).flatten(0, -2), labels).backward()

    with SavedTensors(model, excluded=inputs) as saved:
        out = model(*inputs)
        kept = sum(record.bytes for record in saved.kept(out))
    del out
    step()
    gradient = torch.cat([part.grad.flatten() for part in model.parameters() if part.grad is not None])
    model.zero_grad()
    seconds = []
    with PeakMemory(device) as peak:
        step()
    for _ in range(rounds):
        model.zero_grad()
        start = clock(device)
        step()
        seconds.append(clock(device) - start)
    return {
        "way": way,
        "saved_mib": kept / MIB,
        "step_peak_mib": peak.bytes / MIB,
        "seconds_median": statistics.median(seconds),
        "gradient": gradient,
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their ratios to the first and the relative errors of their gradients."""
    plain = rows[0]
    for row in rows:
        for name, ratio in (
            ("saved_mib", "saved_share"),
            ("step_peak_mib", "peak_share"),
            ("seconds_median", "time_ratio"),
        ):
            row[ratio] = row[name] / plain[name]
        row["gradient_error"] = ((row["gradient"] - plain["gradient"]).norm() / plain["gradient"].norm()).item()
    return [{name: value for name, value in row.items() if name != "gradient"} for row in rows]


if __name__ == "__main__":
    main()
