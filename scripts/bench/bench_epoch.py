"""Time and memory of a training step under compression presets against plain PyG FP32 in the same process.

python scripts/bench/bench_epoch.py --dataset synthetic_arxiv --model sage --csv benchmarks/epoch_cpu.csv

Baseline and presets take turns, round by round, and a ratio is taken within its round, so that a busy machine slows
both alike; the median of the ratios and their 20th and 80th percentile are printed. The peaks of a step and of an
evaluation count the data and the model with what is allocated beside them; their ratio is that of the larger one.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from iexact_runner.cli import compose_config
from iexact_runner.config import Config
from iexact_runner.data import load_dataset
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.graph import Adjacency
from iexact_runner.experiment import resolve_device
from iexact_runner.kernels import backends
from iexact_runner.loss import loss_per_node
from iexact_runner.measure import MIB, SavedTensors, environment, total_bytes
from iexact_runner.measure.peak import PeakMemory
from iexact_runner.nn import Model, build_model
from iexact_runner.nn.baseline import PyGBaseline, baseline_graph, build_baseline
from iexact_runner.problem import Problem, evaluation_input, prepare, training_input
from iexact_runner.training import Optimization, clock, evaluate, forward, stepper

PRESETS = {
    "none": ("compression=none",),
    "exact": ("compression=exact",),
    "iexact": ("compression=iexact",),
    "iexact, one map, no dropout mask": (
        "compression=iexact",
        "compression.share_maps=true",
        "compression.store_dropout_mask=false",
    ),
    "lowrank_v1": ("compression=lowrank_v1",),
    "lowrank": ("compression=lowrank",),
    "lowrank_small": ("compression=lowrank_small",),
    "lowrank_fine": ("compression=lowrank_fine",),
    "recompute": ("compression=recompute",),
    "offload": ("compression=offload",),
    "lowrank, offloaded": ("compression=lowrank", "compression.offload=true"),
}
# What users of plain PyG do by hand.
BY_HAND = {
    "PyG, torch.utils.checkpoint": "checkpoint",
    "PyG, torch.autograd.graph.save_on_cpu": "save_on_cpu",
}

Step = Callable[[int], float]


@dataclass(frozen=True)
class Subject:
    """A training step to measure: what takes it, its model, the scores of its forward pass, and the data it needs.

    ``evaluate`` computes the scores of the whole graph in evaluation mode.
    """

    step: Step
    model: nn.Module
    scores: Callable[[], Tensor]
    evaluate: Callable[[], object]
    data: list[Tensor]


def main() -> None:
    """Prints the ratios and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic_arxiv")
    parser.add_argument("--model", default="sage")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS)[:8])
    parser.add_argument("--by-hand", action="store_true", help="also plain PyG with checkpointing and with offloading")
    parser.add_argument("--cached", action="store_true", help="keep the product of the features with A as data")
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    rows = time_presets(
        arguments.dataset,
        arguments.model,
        device,
        rounds=arguments.rounds,
        backend=arguments.backend,
        presets={name: PRESETS[name] for name in arguments.presets},
        cached=arguments.cached,
        by_hand=BY_HAND if arguments.by_hand else {},
    )
    show(rows, Console())
    if arguments.csv:
        append_rows(rows, arguments.csv)


def time_presets(
    dataset: str,
    model: str,
    device: torch.device,
    *,
    rounds: int,
    backend: str = "auto",
    presets: Mapping[str, tuple[str, ...]] = PRESETS,
    cached: bool = False,
    by_hand: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One row a preset: epoch seconds and their ratio to the baseline's."""
    measured = subjects(dataset, model, device, backend=backend, presets=presets, cached=cached, by_hand=by_hand or {})
    memory = {name: memory_of(subject, device) for name, subject in measured.items()}
    seconds = _take_turns({name: subject.step for name, subject in measured.items()}, rounds, device)
    facts = environment.describe(device, backend=backends.resolve(backend, device))
    return [
        {
            "dataset": dataset,
            "model": model,
            "preset": name,
            "first_aggregate_cached": cached and name != "baseline",
            "seconds_median": statistics.median(seconds[name]),
            **_ratio_figures(seconds[name], seconds["baseline"]),
            "rounds": rounds,
            **memory[name],
            "peak_ratio": _larger_peak(memory[name]) / _larger_peak(memory["baseline"]),
            **{key: facts[key] for key in ("device_name", "torch_threads", "python", "torch", "torch_geometric")},
            "triton": facts["triton"],
            "cuda": facts["cuda"],
            "backend": facts["compression_backend"],
            "git_commit": facts["git_commit"],
        }
        for name in seconds
    ]


def subjects(
    dataset: str,
    model: str,
    device: torch.device,
    *,
    backend: str = "auto",
    presets: Mapping[str, tuple[str, ...]] = PRESETS,
    cached: bool = False,
    by_hand: Mapping[str, str] | None = None,
) -> dict[str, Subject]:
    """Plain PyG FP32 as ``baseline``, and each preset, on one graph; ``cached`` lets these keep A X as data.

    ``by_hand`` names what is done to plain PyG as well, one of the values of ``BY_HAND``.
    """
    configs = {
        name: compose_config(f"dataset={dataset}", f"model={model}", *overrides, f"compression.backend={backend}")
        for name, overrides in presets.items()
    }
    first = next(iter(configs.values()))
    problem = prepare(_dataset(dataset), first.model, inductive=False, device=device)
    baseline = _baseline(first, problem)
    if cached:
        view = problem.training
        if not isinstance(view.graph, Adjacency) or first.model.input_dropout:
            raise SystemExit(f"{model} on {dataset} has no product of the features that is the same in every step")
        view = replace(view, graph=view.graph.knowing(view.x))
        problem = replace(problem, training=view, whole=view)
    others = {name: _baseline(first, problem, by_hand=way) for name, way in (by_hand or {}).items()}
    return {"baseline": baseline} | others | {name: subject_of(each, problem) for name, each in configs.items()}


@functools.lru_cache(maxsize=1)
def _dataset(name: str) -> NodeDataset:
    return load_dataset(compose_config(f"dataset={name}").dataset)


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints the times and the memory."""
    first = rows[0]
    where = f"{first['model']} on {first['dataset']}, {first['device_name']}, {first['backend']}"
    times = {"seconds an epoch": "seconds_median", "ratio to PyG FP32": "ratio_median"}
    _print(f"time of a step, {where}", rows, times | {"p20": "ratio_p20", "p80": "ratio_p80"}, console, digits=3)
    sizes = {"data + model": "resident_mib", "saved": "saved_mib", "step peak": "peak_mib"}
    sizes |= {"evaluation peak": "evaluation_peak_mib", "peak ratio": "peak_ratio"}
    _print(f"MiB of a step and an evaluation, {where}", rows, sizes, console, digits=2)


def _print(title: str, rows: Sequence[dict[str, Any]], columns: dict[str, str], console: Console, digits: int) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("preset")
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["preset"], *(f"{row[name]:.{digits}f}" for name in columns.values()))
    console.print(table)


def append_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Adds rows to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, mode="a", header=not path.exists(), index=False)


def seeded_model(config: Config, problem: Problem, device: torch.device) -> Model:
    """The model of a configuration, the same weights each time."""
    torch.manual_seed(0)
    return build_model(
        config.model,
        in_channels=problem.in_channels,
        out_channels=problem.num_classes,
        compression=config.compression,
    ).to(device)


def subject_of(config: Config, problem: Problem) -> Subject:
    """The step of a configuration."""
    model = seeded_model(config, problem, problem.whole.x.device)
    optimization = Optimization(model, config.training)
    view = problem.training
    take_step = stepper(model, optimization, problem)
    return Subject(
        lambda epoch: take_step(seed=epoch, epoch=epoch),
        model,
        lambda: forward(model.train(), training_input(problem, seed=1)[0], view.graph, seed=1),
        lambda: evaluate(model, problem),
        problem.tensors(),
    )


class _SaveOnCpu(saved_tensors_hooks):
    """``save_on_cpu`` for what is dense; it fails to copy the graph, a CSR tensor, to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        moving = save_on_cpu(pin_memory=device.type == "cuda")
        super().__init__(
            lambda tensor: moving.pack_hook(tensor) if tensor.layout == torch.strided else tensor,
            lambda held: moving.unpack_hook(held) if isinstance(held, tuple) else held,
        )


def _baseline(config: Config, problem: Problem, *, by_hand: str | None = None) -> Subject:
    torch.manual_seed(0)
    model = build_baseline(config.model, in_channels=problem.in_channels, out_channels=problem.num_classes)
    model.to(problem.whole.x.device).train()
    if by_hand == "checkpoint":
        assert isinstance(model, PyGBaseline)
        model.block = functools.partial(checkpoint, model.block, use_reentrant=False)
    context = functools.partial(_SaveOnCpu, problem.whole.x.device) if by_hand == "save_on_cpu" else nullcontext
    optimization = Optimization(model, config.training)
    operator = baseline_graph(problem.training.graph, config.model)

    def run(epoch: int) -> float:
        features, nodes = training_input(problem, seed=epoch)
        with context():
            scores = model(features, operator)[nodes]
        loss = loss_per_node(scores, problem.training.y[nodes], kind=config.training.loss).mean()
        optimization.backward(loss)
        optimization.update(model, epoch=epoch)
        return loss.item()

    @torch.no_grad()
    def evaluate_baseline() -> None:
        model.eval()(evaluation_input(problem), operator)
        model.train()

    data = [*problem.tensors(), operator]

    def scores() -> Tensor:
        with context():
            return model(training_input(problem, seed=1)[0], operator)

    return Subject(run, model, scores, evaluate_baseline, data)


def memory_of(subject: Subject, device: torch.device) -> dict[str, float]:
    """MiB of data and model, of what the backward pass needs, and of the most that a step and an evaluation hold."""
    with SavedTensors(subject.model, excluded=subject.data) as saved:
        kept = sum(record.bytes for record in saved.kept(subject.scores()))
    subject.step(1)  # the optimizer's state is made
    with PeakMemory(device) as peak:
        subject.step(2)
    subject.model.zero_grad(set_to_none=True)
    with PeakMemory(device) as evaluation:
        subject.evaluate()
    held = total_bytes([*subject.data, *subject.model.parameters(), *subject.model.buffers()])
    sizes = {"saved_mib": kept, "resident_mib": held, "peak_mib": held + peak.bytes}
    return {name: size / MIB for name, size in (sizes | {"evaluation_peak_mib": held + evaluation.bytes}).items()}


def _larger_peak(memory: Mapping[str, float]) -> float:
    """What a run needs at once: a step or an evaluation."""
    return max(memory["peak_mib"], memory["evaluation_peak_mib"])


def _take_turns(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    for run in steps.values():  # compiles, allocates, fills caches
        run(1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name, run in steps.items():
            seconds[name].append(timed(functools.partial(run, 2 + index), device))
    return seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call."""
    start = clock(device)
    run()
    return clock(device) - start


def _ratio_figures(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    ratios = [own / other for own, other in zip(seconds, baseline, strict=True)]
    cuts = statistics.quantiles(ratios, n=10, method="inclusive")
    return {"ratio_median": statistics.median(ratios), "ratio_p20": cuts[1], "ratio_p80": cuts[7]}


if __name__ == "__main__":
    main()
