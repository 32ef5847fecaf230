"""One run of the tool: seed, data, model, training and measurement, recorded in a folder."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from iexact_runner import energy, environment, fidelity, loggers, measure
from iexact_runner.compression import backends
from iexact_runner.compression.seeds import mix
from iexact_runner.config import CompressionConfig, Config, GATConfig, ModelConfig
from iexact_runner.data import load_dataset
from iexact_runner.data.sparse import CSR
from iexact_runner.display import Display, show_fidelity, show_summary, show_tensors
from iexact_runner.errors import ConfigError, UserError
from iexact_runner.loss import node_loss
from iexact_runner.nn import Model, build_model
from iexact_runner.peak import PeakMemory
from iexact_runner.records import SCHEMA_VERSION, RunFolder, mean_std
from iexact_runner.schemes import Plain
from iexact_runner.training import (
    Epoch,
    Optimization,
    Problem,
    Scores,
    autocast,
    clock,
    prepare,
    step,
    train_epochs,
    training_input,
    training_loss,
)


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here.

    Raises:
        ConfigError: if there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and (not index or index.isdecimal()):
        if int(index or 0) < count:
            return torch.device(kind, int(index or 0))
        found = "no CUDA device was found" if not count else f"{count} CUDA devices were found"
        raise ConfigError.of("device", name, f"{found}; use device=cpu or device=auto")
    raise ConfigError.of("device", name, "must be auto, cpu, cuda or cuda:N")


def fp32_bytes(config: ModelConfig, problem: Problem) -> int:
    """What FP32 training of a model keeps, measured on its forward pass with tensors that have no memory."""
    features, graph = training_input(problem, seed=0)[0], problem.training.graph
    if isinstance(config, GATConfig) and isinstance(graph, CSR):
        # How many edges are left is a number, which tensors without memory do not have.
        graph = Plain(training=True, seed=0).drop_edges(graph, config.edge_dropout)
        config = replace(config, edge_dropout=0.0)
    with FakeTensorMode() as fake:
        features, graph = fake.from_tensor(features), graph.map(fake.from_tensor)
        plain = CompressionConfig(scheme="none")
        with torch.device(features.device):
            model = build_model(
                config, in_channels=problem.in_channels, out_channels=problem.num_classes, compression=plain
            )
        with measure.SavedTensors(model, excluded=[features, *graph.tensors()]) as saved:
            return sum(record.bytes for record in saved.kept(model(features, graph)))


class Experiment:
    """State of one run while it goes on.

    Args:
        config: what to run; checked against this machine here.
        folder: where the records go.
        console: where progress is shown.
    """

    def __init__(self, config: Config, folder: RunFolder, console: Console) -> None:
        self._config = config
        self._folder = folder
        self._console = console
        self._device = resolve_device(config.device)
        self._backend = backends.resolve(config.compression.backend, self._device)
        loggers.check_installed(config.logger)
        if config.measure.energy:
            energy.check_installed()
        self._logger = loggers.Logger()
        self._energy: dict[str, Any] | None = None
        self._distribution: list[list[dict[str, Any]]] | None = None
        self._memory: dict[str, Any] | None = None
        self._metric: str | None = None
        self._completed: list[Scores] = []
        self._throughput: measure.Throughput | None = None
        self._fidelities: list[dict[int, dict[str, Any]]] = []

    def run(self, resolved_yaml: str) -> dict[str, Any]:
        """Runs the task, writes the records and returns the summary.

        A failure or an interruption is recorded with all that was measured before it, then raised again.
        """
        self._folder.write_config(resolved_yaml)
        status, error = "failed", None
        try:
            self._logger = loggers.open_logger(self._config, self._folder.path, asdict(self._config))
            self._execute()
            status = "completed"
        except KeyboardInterrupt:
            status, error = "interrupted", "interrupted by the user"
            raise
        except UserError as failure:
            error = str(failure)
            raise
        except BaseException as failure:
            error = f"{type(failure).__name__}: {failure}"
            raise
        finally:
            summary = self._summary(status, error)
            self._folder.write_summary(summary)
            self._logger.close(summary)
            if summary["memory"] is not None:
                show_summary(self._console, summary, folder=_shown(self._folder.path))
        return summary

    def _execute(self) -> None:
        """Trains, measures, compares gradients, or observes maps.

        Dropout of the FP32 scheme and the initial weights use torch's generators, hence the fork: the caller's
        random state is the same afterwards.
        """
        config = self._config
        with self._console.status(f"loading {config.dataset.name}"):
            dataset = load_dataset(config.dataset)
            problem = prepare(dataset, config.model, inductive=config.dataset.inductive, device=self._device)
            del dataset  # two copies of a large graph would not fit
        if problem.multilabel and config.training.loss != "cross_entropy":
            valid = f"{config.dataset.name} has several labels a node, whose loss is BCE: leave it at cross_entropy"
            raise ConfigError.of("training.loss", config.training.loss, valid)
        self._metric = problem.metric
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self._memory = self._kept_memory(problem)
            if config.task == "train":
                self._train(problem)
            elif config.task == "measure":
                self._measure(problem)
            elif config.task == "fidelity":
                self._compare_gradients(problem)
            else:
                self._observe_maps(problem)

    def _summary(self, status: str, error: str | None) -> dict[str, Any]:
        """The record as it stands; scores are those of the runs that were completed."""
        accuracy: dict[str, Any] | None = None
        if self._config.task in ("train", "distribution") and self._metric is not None:
            accuracy = {"metric": self._metric}
            for split in Scores._fields:
                accuracy[split] = mean_std([getattr(scores, split) for scores in self._completed])
        compared = self._fidelities and fidelity.pooled(self._fidelities, draws=self._config.fidelity.draws)
        memory = self._memory and {**self._memory, **measure.peak_mib(self._device)}
        return {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "error": error,
            "config": asdict(self._config),
            "environment": environment.describe(self._device, backend=self._backend),
            "accuracy": accuracy,
            "memory": memory,
            "throughput": self._throughput and self._throughput.to_dict(),
            "fidelity": compared or None,
            "energy": self._energy,
            "distribution": self._distribution,
        }

    def _new_model(self, problem: Problem, run: int) -> tuple[Model, int]:
        """The model of a run, its weights freshly drawn from the run's seed, and that seed."""
        measure.reset_peak(self._device)
        seed = mix(self._config.seed, run)
        torch.manual_seed(seed)
        model = build_model(
            self._config.model,
            in_channels=problem.in_channels,
            out_channels=problem.num_classes,
            compression=self._config.compression,
        )
        return model.to(self._device), seed

    def _kept_memory(self, problem: Problem) -> dict[str, Any]:
        """Figures of one training step of a model that is then thrown away."""
        model, seed = self._new_model(problem, run=0)
        model.train()
        features, nodes = training_input(problem, seed=seed)
        before = measure.allocated(self._device)
        with measure.SavedTensors(model, excluded=[features, *problem.tensors()]) as saved:
            with autocast(self._config.precision, self._device):
                scores = model(features, problem.training.graph, seed=seed)
            kept = saved.kept(scores)
            loss = node_loss(scores, problem.training.y, nodes, kind=self._config.training.loss)
            kept_with_loss = saved.kept(loss, beside=scores)
        after = measure.allocated(self._device)
        reference = None
        if before is not None and after is not None:
            reference = (after - before - scores.nbytes - loss.nbytes) / measure.MIB
        saved_bytes = sum(record.bytes for record in kept)
        del scores, loss
        kind, precision = self._config.training.loss, self._config.precision
        with PeakMemory(self._device) as peak:
            training_loss(model, problem, kind=kind, precision=precision, seed=seed).backward()
        return {
            "saved_mib": saved_bytes / measure.MIB,
            "saved_mib_fp32": fp32_bytes(self._config.model, problem) / measure.MIB,
            "loss_mib": (sum(record.bytes for record in kept_with_loss) - saved_bytes) / measure.MIB,
            "step_peak_mib": peak.bytes / measure.MIB,
            "data_mib": measure.total_bytes(problem.tensors()) / measure.MIB,
            "model_mib": measure.total_bytes([*model.parameters(), *model.buffers()]) / measure.MIB,
            "reference_activation_mib": reference,
            "tensors": [record.to_dict() for record in kept],
        }

    def _train(self, problem: Problem, *, finish: Callable[[Model, int], None] | None = None) -> None:
        """Trains all runs; ``finish`` is called with the model of each and its seed."""
        config = self._config
        assert self._memory is not None
        warmup = min(config.measure.warmup_epochs, config.training.epochs // 2)
        timed: list[float] = []
        epochs = config.training.epochs
        with Display(self._console, runs=config.runs, epochs=epochs, metric=problem.metric) as display:
            for run in range(config.runs):
                model, seed = self._new_model(problem, run)
                display.start_run(run)
                best: Scores | None = None
                optimization = Optimization(model, config.training, precision=config.precision)
                for epoch in train_epochs(model, problem, optimization, seed=seed):
                    self._record(run, epoch)
                    self._logger.log(run, epoch)
                    if best is None or epoch.scores.val > best.val:
                        best = epoch.scores
                    if epoch.number > warmup:
                        timed.append(epoch.seconds)
                        self._throughput = measure.Throughput.of(timed, warmup_epochs=warmup)
                    display.show(run, epoch, saved_mib=self._memory["saved_mib"])
                assert best is not None
                self._completed.append(best)
                if finish is not None:
                    finish(model, seed)

    def _record(self, run: int, epoch: Epoch) -> None:
        scores = epoch.scores._asdict()
        line = {"run": run, "epoch": epoch.number, "loss": epoch.loss, **scores, "seconds": epoch.seconds}
        self._folder.append_metrics({**line, "time": time.time()})

    def _measure(self, problem: Problem) -> None:
        config = self._config
        assert self._memory is not None
        show_tensors(self._console, self._memory["tensors"])
        model, seed = self._new_model(problem, run=0)
        optimization = Optimization(model, config.training, precision=config.precision)
        numbers = itertools.count(1)

        def one_epoch() -> float:
            number = next(numbers)
            start = clock(self._device)
            step(model, optimization, problem, seed=mix(seed, number), epoch=number)
            return clock(self._device) - start

        meter = energy.EnergyMeter(self._device, country=config.measure.country) if config.measure.energy else None
        with self._console.status("timing epochs"):
            self._throughput = measure.time_epochs(
                one_epoch,
                warmup_epochs=config.measure.warmup_epochs,
                timed_epochs=config.measure.timed_epochs,
                max_seconds=config.measure.max_seconds,
                meter=meter,
            )
        self._energy = None if meter is None else meter.record

    def _compare_gradients(self, problem: Problem) -> None:
        for run in range(self._config.runs):
            model, seed = self._new_model(problem, run)
            self._fidelities.append({})
            name = f"run {run + 1}/{self._config.runs}"
            with self._console.status(f"{name}: training, then drawing gradients"):
                for epoch, figures in fidelity.checkpoints(model, problem, self._config, seed=seed):
                    self._fidelities[-1][epoch] = figures
                    line = f"{name}  after epoch {epoch}  relative error {figures['relative_error']:.4f}"
                    self._console.print(line, highlight=False)
        show_fidelity(self._console, fidelity.pooled(self._fidelities, draws=self._config.fidelity.draws))

    def _observe_maps(self, problem: Problem) -> None:
        # SciPy, which this needs, is slow to import.
        from iexact_runner.observed import observe

        bits = self._config.compression.bits
        assert bits is not None
        self._distribution = observed = []

        def finish(model: Model, seed: int) -> None:
            observed.append(observe(model, problem, bits=bits, seed=mix(seed, self._config.training.epochs + 1)))

        self._train(problem, finish=finish)


def _shown(path: Path) -> str:
    """A path as short as it is clear: relative where it lies below the working folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
