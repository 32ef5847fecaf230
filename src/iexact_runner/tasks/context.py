"""What every task works with, and what it leaves for the summary."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from iexact_runner import measure
from iexact_runner.compression.seeds import mix
from iexact_runner.config import Config
from iexact_runner.loggers import Logger
from iexact_runner.measure.batches import BatchSizes
from iexact_runner.nn import Model, build_model
from iexact_runner.parallel.team import Team
from iexact_runner.problem import Problem
from iexact_runner.runs.locks import DeviceLock
from iexact_runner.runs.records import RunFolder
from iexact_runner.tasks.planner import Planner
from iexact_runner.training import BatchWork, Scores


@dataclass
class Findings:
    """What a run has found so far; the summary is made of it, also if the run fails.

    Args:
        metric: name of the scores.
        memory: figures of one training step and one evaluation.
        fp32: peaks and speed of the same model in FP32; None where it would not fit or is not asked for.
        completed: scores at the best validation epoch of each run that was completed.
        highest: highest scores of each of them, split by split, whenever they came.
        seconds_to_best: of training until the best validation epoch, of each of them.
        resumed: how many times the run went on after its end.
        warmup_epochs: epochs of a run, and of what follows a resumption, that are not timed.
        epoch_seconds: of every timed epoch of training.
        batches: sizes and memory of mini-batches.
        work: seconds of every timed epoch of mini-batches, and what it came to.
        throughput: of the timed epochs of ``task=measure``.
        fidelities: figures of gradients by epoch, of each run.
        distribution: figures of maps, of each run.
        energy: of the timed epochs.
        inspection: facts about the graph, of ``task=inspect``.
        advice: options of ``task=advise``.
        plans: how maps were kept under ``compression=auto``, each with the run and the epoch after which it was made.
        parallel: the partition of the graph, and what each process has and sent.
    """

    metric: str | None = None
    memory: dict[str, Any] | None = None
    fp32: dict[str, Any] | None = None
    completed: list[Scores] = field(default_factory=list)
    highest: list[Scores] = field(default_factory=list)
    seconds_to_best: list[float] = field(default_factory=list)
    resumed: int = 0
    warmup_epochs: int = 0
    epoch_seconds: list[float] = field(default_factory=list)
    batches: dict[str, Any] | None = None
    work: list[tuple[float, BatchWork]] = field(default_factory=list)
    throughput: measure.Throughput | None = None
    fidelities: list[dict[int, dict[str, Any]]] = field(default_factory=list)
    distribution: list[list[dict[str, Any]]] | None = None
    energy: dict[str, Any] | None = None
    inspection: dict[str, Any] | None = None
    advice: dict[str, Any] | None = None
    plans: list[dict[str, Any]] = field(default_factory=list)
    parallel: dict[str, Any] | None = None

    def timed(self) -> measure.Throughput | None:
        """Throughput as it stands."""
        if self.epoch_seconds:
            return measure.Throughput.of(self.epoch_seconds, warmup_epochs=self.warmup_epochs)
        return self.throughput

    def batches_record(self) -> dict[str, Any] | None:
        """Sizes of mini-batches, with the medians over timed epochs of nodes a second and of what sampling took."""
        if self.batches is None or not self.work:
            return self.batches
        shares = {
            "nodes_per_second": [work.nodes / seconds for seconds, work in self.work],
            "sampling_share": [work.sampling_seconds / seconds for seconds, work in self.work],
            "waiting_share": [work.waiting_seconds / seconds for seconds, work in self.work],
        }
        return self.batches | {name: statistics.median(values) for name, values in shares.items()}


@dataclass(frozen=True)
class Context:
    """One run of a task.

    Args:
        config: what to run.
        problem: what it runs on.
        device: where.
        lock: of the device, shared with other work there.
        folder: where the records go.
        console: where progress is shown.
        logger: what is told of every epoch beside the records.
        findings: filled by the task as it goes on; its ``memory`` is there already.
        sizes: of the mini-batches, if there are any.
        planner: of ``compression=auto``.
        team: the processes that share the graph.
    """

    config: Config
    problem: Problem
    device: torch.device
    lock: DeviceLock
    folder: RunFolder
    console: Console
    logger: Logger
    findings: Findings
    sizes: BatchSizes | None = None
    planner: Planner | None = None
    team: Team = field(default_factory=Team)

    def largest_step(self) -> Problem:
        """The problem of the step that needs most: on the largest batch, or on the whole graph."""
        return self.problem if self.sizes is None else self.sizes.problem_of(self.problem, "max")

    def new_model(self, run: int) -> tuple[Model, int]:
        """The model of a run, its weights freshly drawn from the run's seed, and that seed."""
        measure.reset_peak(self.device)
        seed = mix(self.config.seed, run)
        torch.manual_seed(seed)
        model = build_model(
            self.config.model,
            in_channels=self.problem.in_channels,
            out_channels=self.problem.num_classes,
            compression=self.config.compression,
        )
        model = model.to(self.device)
        if self.planner is not None:
            self.planner.start(model, run=run, seed=seed)
        return model, seed
