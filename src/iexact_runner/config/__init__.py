"""The schema of a run: plain dataclasses that Hydra merges ``conf/`` into and that check themselves.

Every check raises :class:`~iexact_runner.errors.ConfigError` with the dotted field name, the value and what is valid.
Nothing here imports torch, so that ``iexact --help`` stays fast.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from iexact_runner.config.checks import check, check_above, check_at_least, check_choice
from iexact_runner.config.compression import BACKENDS, BITS, LOW_RANK, CompressionConfig
from iexact_runner.config.dataset import (
    DATASET_PREFIXES,
    DatasetConfig,
    DigitsConfig,
    FileConfig,
    SyntheticConfig,
    dataset_config,
)
from iexact_runner.config.model import (
    MODEL_CONFIGS,
    DeeperGCNConfig,
    GATConfig,
    GCN2Config,
    GCNConfig,
    GraphConvConfig,
    ModelConfig,
    ModuleConfig,
    SAGEConfig,
    model_config,
)
from iexact_runner.config.parallel import (
    PARALLEL_CONFIGS,
    MessagesConfig,
    NoParallelConfig,
    ParallelConfig,
    check_parallel,
)
from iexact_runner.config.sampler import (
    SAMPLER_CONFIGS,
    BatchSamplerConfig,
    ClusterConfig,
    NeighborConfig,
    SaintConfig,
    SaintEdgeConfig,
    SaintNodeConfig,
    SaintWalkConfig,
    SamplerConfig,
)

__all__ = [
    "BACKENDS",
    "BITS",
    "BatchSamplerConfig",
    "BinsConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "CompressionConfig",
    "Config",
    "DATASET_PREFIXES",
    "DatasetConfig",
    "DigitsConfig",
    "FidelityConfig",
    "FileConfig",
    "DeeperGCNConfig",
    "GATConfig",
    "GCN2Config",
    "GCNConfig",
    "GraphConvConfig",
    "LOW_RANK",
    "MODEL_CONFIGS",
    "MeasureConfig",
    "MessagesConfig",
    "ModelConfig",
    "ModuleConfig",
    "NeighborConfig",
    "NoParallelConfig",
    "PARALLEL_CONFIGS",
    "ParallelConfig",
    "SAGEConfig",
    "SAMPLER_CONFIGS",
    "SaintConfig",
    "SaintEdgeConfig",
    "SaintNodeConfig",
    "SaintWalkConfig",
    "SamplerConfig",
    "SweepConfig",
    "SyntheticConfig",
    "TrainingConfig",
    "dataset_config",
    "model_config",
]


TASKS = ("train", "measure", "fidelity", "distribution", "inspect", "advise", "bins", "partition")
# Those that record every epoch, and so can go on after one.
RESUMABLE = ("train", "distribution")
PRECISIONS = ("float32", "bfloat16", "float16")
LOGGERS = ("none", "tensorboard", "mlflow")
OPTIMIZERS = ("adam", "rmsprop")
CACHING = ("auto", "true", "false")
# Nodes of the graph that advice is measured on: half of them are twice as many as directions are found from, so that
# what is found from them no longer decides the peak.
LEAST_SAMPLE = 16384
LOSSES = ("cross_entropy", "log_cross_entropy")


@dataclass
class TrainingConfig:
    """Training.

    Args:
        epochs: of a run; each is one step over the whole graph, or as many steps as a sampler has batches.
        lr: learning rate.
        optimizer: the optimizer of torch of that name.
        weight_decay: L2 penalty on all weights.
        grad_norm: norm that longer gradients are cut to; null is no clipping.
        warmup_epochs: epochs over which the learning rate rises linearly to ``lr``.
        loss: ``cross_entropy``, binary for several labels a node; ``log_cross_entropy`` is the published one on arxiv,
            log(eps + CE) - log(eps) with eps = 1 - ln 2 and CE the cross-entropy of a node.
        cuda_graph: capture the training step in a CUDA graph, which takes the launches off the host; the graph keeps
            its memory beside that of an evaluation.
        cache_first_aggregate: compute the product of the adjacency with the features once and keep it as data, for
            SAGE, GCN and GraphConv without dropout on the features: ``true``, ``false``, or ``auto``, which does so
            under lowrank where a tenth of the free memory holds it.
        eval_every: epochs from one evaluation to the next; the last epoch has one. The best validation score is that of
            the epochs with an evaluation.
    """

    epochs: int = 200
    lr: float = 0.01
    optimizer: str = "adam"
    weight_decay: float = 0.0
    grad_norm: float | None = 0.5
    warmup_epochs: int = 0
    loss: str = "cross_entropy"
    cuda_graph: bool = False
    cache_first_aggregate: str = "auto"
    eval_every: int = 1

    def __post_init__(self) -> None:
        check_at_least("training.epochs", self.epochs, 1)
        check_above("training.lr", self.lr, 0)
        check_choice("training.optimizer", self.optimizer, OPTIMIZERS)
        decay = self.weight_decay
        check(0 <= decay < math.inf, "training.weight_decay", decay, "must be 0 or more")
        norm = self.grad_norm
        check(
            norm is None or 0 < norm < math.inf, "training.grad_norm", norm, "must be above 0, or null for no clipping"
        )
        check_at_least("training.warmup_epochs", self.warmup_epochs, 0)
        check_at_least("training.eval_every", self.eval_every, 1)
        check_choice("training.loss", self.loss, LOSSES)
        lowered = str(self.cache_first_aggregate).lower()  # a bool on the command line is "True"
        self.cache_first_aggregate = lowered if lowered in CACHING else self.cache_first_aggregate
        check_choice("training.cache_first_aggregate", self.cache_first_aggregate, CACHING)


@dataclass
class MeasureConfig:
    """How epochs are timed.

    Args:
        warmup_epochs: epochs that are not timed, first; when training, at most half of all.
        timed_epochs: epochs that are timed after them.
        max_seconds: ends the timing early, after at least three epochs; a quarter of it ends the warm-up.
        max_wait: seconds to wait for the device to be free; after that epochs are timed beside the others at work.
        fp32: before a compressed run, also measure a few steps of the same model in FP32, where they fit.
        energy: also record kWh and gCO2e of the timed epochs.
        country: whose grid the emissions are of, as an ISO 3166 code of three letters; null is the world's average.
    """

    warmup_epochs: int = 10
    timed_epochs: int = 100
    max_seconds: float = 60.0
    max_wait: float = 600.0
    fp32: bool = True
    energy: bool = False
    country: str | None = None

    def __post_init__(self) -> None:
        check_at_least("measure.warmup_epochs", self.warmup_epochs, 0)
        check_at_least("measure.timed_epochs", self.timed_epochs, 1)
        check(self.max_seconds > 0, "measure.max_seconds", self.max_seconds, "must be above 0")
        check(0 <= self.max_wait < math.inf, "measure.max_wait", self.max_wait, "must be 0 or more")
        country = self.country
        letters = country is None or (len(country) == 3 and country.isascii() and country.isupper())
        check(letters, "measure.country", country, "must be an ISO 3166 code of three letters such as DNK, or null")


@dataclass
class FidelityConfig:
    """Gradients that ``task=fidelity`` compares with the exact one.

    Args:
        epochs: numbers of epochs of exact training after which to compare.
        draws: gradients of the scheme at each, with projections and roundings of their own.
    """

    epochs: list[int] = field(default_factory=lambda: [5, 30, 100])
    draws: int = 20

    def __post_init__(self) -> None:
        epochs = list(self.epochs)
        increasing = bool(epochs) and all(first < second for first, second in zip(epochs, epochs[1:], strict=False))
        check(increasing and epochs[0] >= 0, "fidelity.epochs", epochs, "must be increasing and 0 or more")
        check_at_least("fidelity.draws", self.draws, 2)


@dataclass
class BinsConfig:
    """The table of ``task=bins``.

    Args:
        clipped: values beyond the ends lie on them; false restricts the normal distribution to the range.
        use_d_key: block sizes 4 to 2048; false is the grid of sigma from .01 to 5 by .001 in units of 2-bit codes.
        bits: bits of a code.
    """

    clipped: bool = True
    use_d_key: bool = True
    bits: int = 2

    def __post_init__(self) -> None:
        check_choice("bins.bits", self.bits, BITS)


@dataclass
class SweepConfig:
    """What a sweep does with its jobs.

    Args:
        fail_fast: begin no job after one has failed.
        skip_completed: take up the jobs that are in the sweep's folder already, and run those that did not complete.
    """

    fail_fast: bool = False
    skip_completed: bool = False


@dataclass
class CheckpointConfig:
    """How often the state of training is written.

    Args:
        every: number of epochs, or null for never; ``auto`` spends at most half a percent of the time on it, and writes
            every 5 seconds at most.
    """

    every: Any = "auto"  # a number or a word: OmegaConf fails to merge a union

    def __post_init__(self) -> None:
        every = self.every
        valid = every is None or every == "auto" or (type(every) is int and every >= 1)
        check(valid, "checkpoint.every", every, "must be 1 or more epochs, auto, or null for never")


@dataclass
class AdviseConfig:
    """``task=advise``.

    Args:
        memory: that may be used, data included, such as ``24GiB`` or ``900MiB``; null for what is free.
        nodes: of the largest graph that steps are timed on; peaks are measured on up to four times as many.
    """

    memory: str | None = None
    nodes: int = LEAST_SAMPLE

    def __post_init__(self) -> None:
        valid = "must be a number with MiB or GiB, such as 24GiB, or null for what is free"
        check(self.memory is None or self.memory_mib is not None, "advise.memory", self.memory, valid)
        check_at_least("advise.nodes", self.nodes, LEAST_SAMPLE)

    @property
    def memory_mib(self) -> float | None:
        """``memory`` in MiB; None if it is not given."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MiB|GiB)", self.memory or "")
        return None if found is None else float(found[1]) * (1024 if found[2] == "GiB" else 1)


@dataclass
class Config:
    """One run of ``iexact``.

    Args:
        task: what to do.
        runs: repeats with seeds derived from ``seed``; ``task=measure`` takes one.
        seed: what all weights, splits, masks, projections and roundings derive from.
        device: ``auto`` is CUDA where there is a GPU, else the CPU; also ``cpu``, ``cuda`` or ``cuda:1``.
        precision: below float32 that of autocast, with gradient scaling for float16; weights stay float32.
        debug: show the traceback of an error.
        output_dir: folder below which every run gets one of its own.
        logger: what is told of every epoch beside the records.
        processes: that the command starts on this machine for ``parallel=graph``; with 1 it takes part in those that a
            launcher such as torchrun started, if any.
        resume: folder of a run to go on with, or ``auto`` for the newest of this configuration; null begins anew.
        deterministic: insist on kernels that give the same bits each time; an error where torch has none.
        model: group of the model's fields.
        dataset: group of the dataset's fields.
        compression: group of the scheme's fields.
        sampler: group of the fields of mini-batches.
        parallel: group of the fields of several processes.
        messages: group of the fields of what these send each other.
        training: group of the fields of training.
        checkpoint: group of the fields of checkpoints.
        measure: group of the fields of timing.
        fidelity: group of the fields of ``task=fidelity``.
        advise: group of the fields of ``task=advise``.
        bins: group of the fields of ``task=bins``.
        sweep: group of the fields of sweeps.
    """

    task: str = MISSING
    runs: int = 1
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    debug: bool = False
    output_dir: str = "outputs"
    logger: str = "none"
    processes: int = 1
    resume: str | None = None
    deterministic: bool = False
    model: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    compression: CompressionConfig = MISSING
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(name="none"))
    parallel: NoParallelConfig = field(default_factory=lambda: NoParallelConfig(name="none"))
    messages: MessagesConfig = field(default_factory=MessagesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    advise: AdviseConfig = field(default_factory=AdviseConfig)
    bins: BinsConfig = field(default_factory=BinsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("logger", self.logger, LOGGERS)
        check(bool(self.output_dir), "output_dir", repr(self.output_dir), "must be a folder")
        model, dataset = self.model, self.dataset
        fitting = model_config(model.name)
        check(fitting is type(model), "model.name", model.name, "choose one with model=NAME")
        if type(dataset) in DATASET_PREFIXES:
            prefix = DATASET_PREFIXES[type(dataset)]
            valid = "choose one with dataset=NAME"
            check(dataset.name.startswith(prefix), "dataset.name", dataset.name, valid)
        check(self.task != "measure" or self.runs == 1, "runs", self.runs, "task=measure measures one run")
        if self.training.cuda_graph and isinstance(model, GATConfig):
            varying = model.label_input or model.edge_dropout > 0
            check(
                not varying, "training.cuda_graph", "true", "a step needs model.label_input=false model.edge_dropout=0"
            )
        if self.training.cuda_graph:
            full = not isinstance(self.sampler, BatchSamplerConfig)
            check(full, "training.cuda_graph", "true", "mini-batches vary in size: sampler=none")
            moves = self.compression.offload or self.compression.format == "actnn"
            valid = "a captured step cannot move what it keeps or choose its sizes: no compression=offload or actnn"
            check(not moves, "training.cuda_graph", "true", valid)
        if self.task == "distribution":
            chosen = self.compression
            check(
                chosen.scheme == "projected" and chosen.bits is not None,
                "compression.bits",
                chosen.bits,
                "task=distribution needs maps that are quantized",
            )
            valid = "task=distribution is of compression.format=blocks and compression.simulate=false"
            check(chosen.format == "blocks", "compression.format", chosen.format, valid)
            check(not chosen.simulate, "compression.simulate", "true", valid)
        shared = isinstance(self.parallel, ParallelConfig)
        check(shared or self.task != "partition", "task", self.task, "writes the parts of parallel=graph: add it")
        check_at_least("processes", self.processes, 1)
        check(shared or self.processes == 1, "processes", self.processes, "is for parallel=graph: add it")
        if shared:
            check_parallel(self)
        energy = self.measure.energy
        check(self.task == "measure" or not energy, "measure.energy", "true", "timed epochs are those of task=measure")
        resumable = self.task in RESUMABLE
        check(resumable or self.resume is None, "resume", self.resume, f"is for task={' and task='.join(RESUMABLE)}")
        check(self.resume != "", "resume", "''", "must be the folder of a run, auto, or null")
        check_at_least("runs", self.runs, 1)
        check(0 <= self.seed < 2**62, "seed", self.seed, "must be 0 or more and below 2**62")
