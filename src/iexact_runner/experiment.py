"""One run of the tool: seed, data, model and a task, recorded in a folder."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from iexact_runner import __version__, loggers, measure
from iexact_runner.analysis import fidelity
from iexact_runner.compression.seeds import mix
from iexact_runner.config import BatchSamplerConfig, Config, ParallelConfig
from iexact_runner.data import load_dataset
from iexact_runner.data.inspection import inspect_dataset
from iexact_runner.data.parts import GraphInParts
from iexact_runner.determinism import deterministic_algorithms
from iexact_runner.display import show_summary
from iexact_runner.errors import ConfigError, OutOfMemory, UserError
from iexact_runner.kernels import backends
from iexact_runner.measure import energy, environment, out_of_memory
from iexact_runner.measure.batches import BatchSizes, batch_figures
from iexact_runner.measure.step import fp32_figures, step_memory
from iexact_runner.nn import Model
from iexact_runner.parallel.team import Team
from iexact_runner.phases import PhaseOutOfMemory, is_out_of_memory, phase
from iexact_runner.problem import Problem, caches_first_aggregate, prepare
from iexact_runner.runs import checkpoint
from iexact_runner.runs.devices import device_lock
from iexact_runner.runs.records import SCHEMA_VERSION, RunFolder, UnwritableFolder, config_hash, mean_std
from iexact_runner.sampling import with_batches
from iexact_runner.sampling.parallel import OF_A_PROCESS, in_parts, parallel_problem, read_parts, traffic_record
from iexact_runner.tasks import TASKS, partition
from iexact_runner.tasks.context import Context, Findings
from iexact_runner.tasks.planner import Planner
from iexact_runner.training import Scores

logger = logging.getLogger(__name__)

# Of the memory of each of several processes.
MEMORY_OF_A_PROCESS = (
    "saved_mib",
    "saved_mib_fp32",
    "offloaded_mib",
    "step_peak_mib",
    "evaluation_peak_mib",
    "data_mib",
)


def resolve_device(name: str, *, local_rank: int = 0) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here.

    Of several processes on a machine, ``auto`` and ``cuda`` give each a GPU of its own.

    Raises:
        ConfigError: if there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in ("auto", "cuda") and count and local_rank:
        if local_rank >= count:
            raise ConfigError.of("device", name, f"{count} GPUs are too few for process {local_rank} of this machine")
        return torch.device("cuda", local_rank)
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


class Experiment:
    """State of one run while it goes on.

    Args:
        config: what to run; checked against this machine here.
        folder: where the records go.
        console: where progress is shown.
        team: the processes that share the graph.
    """

    def __init__(self, config: Config, folder: RunFolder, console: Console, team: Team | None = None) -> None:
        self._config = config
        self._folder = folder
        self._console = console
        self._team = team or Team()
        self._device = resolve_device(config.device, local_rank=self._team.local_rank)
        if config.training.cuda_graph and self._device.type != "cuda":
            raise ConfigError.of("training.cuda_graph", "true", f"needs device=cuda, and this is {self._device}")
        self._backend = backends.resolve(config.compression.backend, self._device)
        loggers.check_installed(config.logger)
        if config.measure.energy:
            energy.check_installed()
        self._lock = device_lock(self._device, announce=console.print, helper=self._team.local_rank)
        self._logger = loggers.Logger()
        self._findings = Findings()
        self._problem: Problem | None = None
        self._step: Problem | None = None
        self._available: int | None = None

    def run(self, resolved_yaml: str) -> dict[str, Any]:
        """Runs the task, writes the records and returns the summary.

        A failure or an interruption is recorded with all that was measured before it, then raised again.
        """
        with self._folder.in_use():
            return self.run_in_use(resolved_yaml)

    def run_in_use(self, resolved_yaml: str) -> dict[str, Any]:
        """Does what :meth:`run` does in a folder that this process has to itself already."""
        self._folder.write_config(resolved_yaml)
        status, error = "failed", None
        try:
            if self._team.first:
                self._logger = loggers.open_logger(self._config, self._folder.path, asdict(self._config))
            with self._lock, self._team.guarded():
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
            self._write(summary)
            self._logger.close(summary)
            if summary["memory"] is not None:
                show_summary(self._console, summary, folder=_shown(self._folder.path))
        return summary

    def _write(self, summary: dict[str, Any]) -> None:
        try:
            self._folder.write_summary(summary)
        except UnwritableFolder as unwritable:
            if summary["status"] == "completed":
                raise
            # What ended the run is the error to show.
            logger.warning(str(unwritable))
            return
        if summary["status"] == "completed":
            checkpoint.remove(self._folder.path)

    def _execute(self) -> None:
        """Loads the data, measures a training step, and does the task.

        Dropout of the FP32 scheme and the initial weights use torch's generators, hence the fork: the caller's
        random state is the same afterwards.
        """
        self._team.agree(
            configuration=config_hash(asdict(self._config)), iexact_runner=__version__, torch=str(torch.__version__)
        )
        if self._team.size > 1 and self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # where NCCL looks for its buffers
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), deterministic_algorithms(self._config.deterministic):
            try:
                if self._config.task == "partition":
                    with phase("data"):
                        self._findings.parallel = partition.run(self._config, self._console, self._team)
                    return
                with phase("data"):
                    self._problem = self._load()
                with phase("training step"):
                    self._run_task(self._problem)
            except PhaseOutOfMemory as error:
                error.__traceback__ = None  # its frames hold those of the failed step
                raise OutOfMemory(self._advice(error)) from error
            except RuntimeError as error:
                if "deterministic implementation" in str(error):
                    raise ConfigError.of("deterministic", "true", str(error).partition(".")[0]) from error
                raise

    def _load(self) -> Problem:
        config = self._config
        with self._console.status(f"loading {config.dataset.name}"):
            if isinstance(config.parallel, ParallelConfig):
                return self._load_part(config.parallel)
            dataset = load_dataset(config.dataset)
            if config.task == "inspect":
                self._findings.inspection = inspect_dataset(dataset)
            available = out_of_memory.available_bytes(self._device)
            batched = isinstance(config.sampler, BatchSamplerConfig)
            problem = prepare(
                dataset,
                config.model,
                inductive=config.dataset.inductive,
                device=torch.device("cpu") if batched else self._device,
                cache_first_aggregate=caches_first_aggregate(config, dataset.x.nbytes, available=available),
            )
        with self._console.status("preparing mini-batches") if batched else nullcontext():
            problem = with_batches(problem, config, dataset, device=self._device)
        if problem.multilabel and config.training.loss != "cross_entropy":
            valid = f"{config.dataset.name} has several labels a node, whose loss is BCE: leave it at cross_entropy"
            raise ConfigError.of("training.loss", config.training.loss, valid)
        return problem

    def _load_part(self, parallel: ParallelConfig) -> Problem:
        """The problem of this process, of several."""
        config, team = self._config, self._team
        graph: GraphInParts
        if parallel.folder is not None:
            graph = read_parts(config, team)
        else:
            with team.first_alone():  # who may write what it made of the files
                dataset = load_dataset(config.dataset)
            graph = in_parts(dataset, config, team)
        available = out_of_memory.available_bytes(self._device)
        cached = all(team.gathered(caches_first_aggregate(config, graph.facts.features_bytes, available=available)))
        problem, record = parallel_problem(graph, config, team, self._device, cache_first_aggregate=cached)
        peak = measure.peak_mib(torch.device("cpu"))["peak_resident_mib"]
        self._findings.parallel = record | {"loading_peak_resident_mib": peak}
        return problem

    def _run_task(self, problem: Problem) -> None:
        config = self._config
        self._findings.metric = problem.metric
        # Afterwards is too late: autograd holds the graph of a backward pass that failed.
        self._available = out_of_memory.available_bytes(self._device)
        sizes = None if problem.batches is None else BatchSizes.of(problem, seed=mix(config.seed, 0))
        context = Context(
            config,
            problem,
            self._device,
            self._lock,
            self._folder,
            self._console,
            self._logger,
            self._findings,
            sizes,
            team=self._team,
        )
        self._step = context.largest_step()
        if config.compression.scheme == "auto" and config.task not in ("inspect", "advise"):
            context = replace(context, planner=Planner(config, self._step, self._console, self._findings.plans))
        if config.task in ("inspect", "advise"):
            TASKS[config.task](context)
            return
        model, seed = context.new_model(run=0)
        step = self._step
        self._findings.memory = self._step_memory(context, model, seed)
        if sizes is not None:
            self._findings.memory["data_mib"] = measure.total_bytes(problem.tensors()) / measure.MIB
            self._findings.batches = batch_figures(
                model, problem, config, sizes, largest=self._findings.memory, device=self._device, seed=seed
            )
        del model
        plain = config.compression.scheme == "none" and not config.compression.offload
        alone = not isinstance(config.parallel, ParallelConfig)  # whether FP32 fits would differ between processes
        if config.measure.fp32 and not plain and alone and config.task in ("train", "measure"):
            with self._console.status("measuring FP32"):
                self._findings.fp32 = fp32_figures(
                    problem,
                    config,
                    device=self._device,
                    seed=seed,
                    available=self._available,
                    batch=None if sizes is None else step,
                )
        TASKS[config.task](context)
        if self._findings.parallel is not None:
            record = self._findings.parallel
            own = {name: record.pop(name) for name in OF_A_PROCESS} | traffic_record(problem)
            own |= {name: self._findings.memory[name] for name in MEMORY_OF_A_PROCESS}
            own["peak_resident_mib"] = measure.peak_mib(self._device)["peak_resident_mib"]
            record["ranks"] = ranks = self._team.gathered(own)
            # Where it has to fit decides: the figures of tables are those of the process that needs most.
            for name in MEMORY_OF_A_PROCESS:
                found = [rank[name] for rank in ranks]
                self._findings.memory[name] = None if None in found else max(found)

    def _step_memory(self, context: Context, model: Model, seed: int) -> dict[str, Any]:
        """Figures of a step, after plans with less where it runs out of memory."""
        while True:
            try:
                return step_memory(model, context.largest_step(), self._config, device=self._device, seed=seed)
            except (MemoryError, RuntimeError) as error:
                if context.planner is None or not context.planner.lowers(error):
                    raise
            context.planner.shrink(model, run=0, seed=seed, epoch=0)

    def _advice(self, error: PhaseOutOfMemory) -> str:
        """What ran out, and what would help in that phase; also completes the record of the memory."""
        amount = out_of_memory.requested(error)
        failed = f"out of memory on {self._device}" + (f" when allocating {amount}" if amount else "")
        step = self._step or self._problem
        if step is None:
            return f"{failed} for the data of {self._config.dataset.name}: a smaller graph is needed"
        try:
            memory, smaller, widest = out_of_memory.memory_by_preset(step, self._config)
        except (MemoryError, RuntimeError) as again:
            if not is_out_of_memory(again):
                raise
            return f"{failed}; not even the model without its maps fits"
        self._findings.memory = self._findings.memory or memory
        if error.phase == "evaluation":
            return f"{failed} in evaluation: {out_of_memory.evaluation_advice(step, self._config)}"
        advice = out_of_memory.step_advice(memory, smaller, widest, available=self._available)
        return f"{failed} in a training step: {advice}; iexact advise compares all ways to need less"

    def _summary(self, status: str, error: str | None) -> dict[str, Any]:
        """The record as it stands; scores are those of the runs that were completed."""
        found = self._findings
        accuracy: dict[str, Any] | None = None
        if self._config.task in ("train", "distribution") and found.metric is not None:
            accuracy = {"metric": found.metric}
            for split in Scores._fields:
                accuracy[split] = mean_std([getattr(scores, split) for scores in found.completed])
            for split in ("train", "val"):
                accuracy[f"highest_{split}"] = mean_std([getattr(scores, split) for scores in found.highest])
        compared = found.fidelities and fidelity.pooled(found.fidelities, draws=self._config.fidelity.draws)
        timed = found.timed()
        throughput = timed and timed.to_dict() | {
            "alone": self._lock.alone,
            "seconds_to_best": mean_std(found.seconds_to_best) if found.seconds_to_best else None,
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "error": error,
            "resumed": found.resumed,
            "config": asdict(self._config),
            "environment": environment.describe(self._device, backend=self._backend),
            "accuracy": accuracy,
            "fp32": found.fp32,
            "memory": found.memory and {**found.memory, **measure.peak_mib(self._device)},
            "throughput": throughput,
            "batches": found.batches_record(),
            "fidelity": compared or None,
            "energy": found.energy,
            "distribution": found.distribution,
            "inspection": found.inspection,
            "advice": found.advice,
            "plans": found.plans or None,
            "parallel": found.parallel,
        }


def _shown(path: Path) -> str:
    """A path as short as it is clear: relative where it lies below the working folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
