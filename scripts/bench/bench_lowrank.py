"""Every figure that the low-rank scheme is judged by, in one process, against plain PyG FP32.

python scripts/bench/bench_lowrank.py --root DIR --out outputs/lowrank --csv benchmarks

1. A step on synthetic_arxiv: memory and time of SAGE under every preset (bench_epoch.py).
2. The gradient against the exact one after 5, 30 and 100 epochs, of the models of --models under every low-rank preset,
   at the same weights and masks; of SAGE also with directions 4 epochs old.
3. Test accuracy against FP32 over repeats of the same seeds, with the interval of the paired differences.

Parts 2 and 3 are runs of the tool; their records stay under --out, from which iexact-report makes rows. Datasets other
than digits are read from --root.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

import yaml
from rich.console import Console

from bench_epoch import append_rows, time_presets
from bench_epoch import show as show_steps
from iexact_runner.cli import compose_config
from iexact_runner.experiment import Experiment, resolve_device
from iexact_runner.report.command import show
from iexact_runner.report.reading import read_report
from iexact_runner.runs.records import RunFolder

PARTS = ("step", "gradient", "accuracy")
SAGE = ("model=sage", "model.num_layers=3", "model.hidden_channels=128", "model.dropout=0.5", "training.lr=0.01")
PRESETS = ("lowrank_v1", "lowrank", "lowrank_small", "lowrank_fine")
MODELS = ("sage", "gcn", "gcn2", "gat")


@dataclasses.dataclass(frozen=True)
class Course:
    """How long a dataset is trained on, how often for a narrow interval, and how many draws its gradients take."""

    epochs: int
    runs: int
    draws: int


COURSES = {
    "digits": Course(epochs=100, runs=30, draws=20),
    "amazon_computers": Course(epochs=200, runs=12, draws=20),
    "coauthor_physics": Course(epochs=20, runs=5, draws=5),
}


def main() -> None:
    """Runs the parts one after the other and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--datasets", nargs="+", choices=COURSES, default=["digits"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["sage"], help="of the gradients")
    parser.add_argument("--root", default="data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each preset")
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 30, 100], help="of the gradients")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of epochs, repeats and draws, for a try")
    parser.add_argument("--out", type=Path, default=Path("outputs/lowrank"))
    parser.add_argument("--csv", type=Path, help="file to append the rows of the first part to")
    arguments = parser.parse_args()
    if "step" in arguments.parts:
        rows = time_presets("synthetic_arxiv", "sage", resolve_device(arguments.device), rounds=arguments.rounds)
        show_steps(rows, Console())
        if arguments.csv:
            append_rows(rows, arguments.csv)
    for name in arguments.datasets:
        if "gradient" in arguments.parts:
            compare_gradients(name, arguments)
        if "accuracy" in arguments.parts:
            compare_accuracy(name, arguments)
    for part in arguments.parts:
        if part != "step":
            show(read_report([arguments.out / part]), Console(), title=f"{part}, low rank")


def compare_gradients(name: str, arguments: argparse.Namespace) -> None:
    """Records the gradient errors on a dataset, model by model and preset by preset."""
    draws = max(2, round(arguments.scale * COURSES[name].draws))
    for model, preset, refresh in itertools.product(arguments.models, PRESETS, (1, 5)):
        if refresh > 1 and model != "sage":
            continue
        run(
            arguments.out / "gradient" / f"{name}_{model}_{preset}_refresh_{refresh}",
            *_shared(name, model, arguments),
            "task=fidelity",
            f"compression={preset}",
            f"compression.refresh={refresh}",
            f"fidelity.epochs=[{','.join(map(str, arguments.epochs))}]",
            f"fidelity.draws={draws}",
        )


def compare_accuracy(name: str, arguments: argparse.Namespace) -> None:
    """Records repeats under the low-rank scheme and in FP32, of the same seeds."""
    course, scale = COURSES[name], arguments.scale
    for compression in ("lowrank", "none"):
        run(
            arguments.out / "accuracy" / f"{name}_{compression}",
            *_shared(name, "sage", arguments),
            f"compression={compression}",
            f"training.epochs={max(2, round(scale * course.epochs))}",
            f"runs={max(2, round(scale * course.runs))}",
        )


def run(folder: Path, *overrides: str) -> None:
    """One run of the tool, its records in ``folder``."""
    config = compose_config(*overrides)
    Experiment(config, RunFolder(folder), Console()).run(yaml.safe_dump(dataclasses.asdict(config)))


def _shared(name: str, model: str, arguments: argparse.Namespace) -> list[str]:
    shape = SAGE if model == "sage" else (f"model={model}",)
    return [f"dataset={name}", f"dataset.root={arguments.root}", f"device={arguments.device}", *shape]


if __name__ == "__main__":
    main()
