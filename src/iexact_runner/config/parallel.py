"""Fields of a run over several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from iexact_runner.config.checks import check, check_above, check_at_least, check_choice
from iexact_runner.config.sampler import PARTITIONERS

# How rows of gradients travel: float32, rounded to bfloat16, or quantized with stochastic rounding; and of activations.
BACKWARD = ("fp32", "bf16", "int8", "int4", "int2")
FORWARD = (*BACKWARD, "lowrank")


@dataclass
class NoParallelConfig:
    """One process has the whole graph.

    Args:
        name: whether several processes share a graph; ``parallel=NAME`` chooses it with the fields it needs.
    """

    name: str = MISSING

    def __post_init__(self) -> None:
        valid = f"choose one with parallel={' or parallel='.join(PARALLEL_CONFIGS)}"
        check(PARALLEL_CONFIGS.get(self.name) is type(self), "parallel.name", self.name, valid)


@dataclass
class ParallelConfig(NoParallelConfig):
    """One graph over the processes that a launcher such as torchrun started; each has a run of parts of its nodes.

    Args:
        parts: parts of the partition; null is one for each process. The numbers of a run depend on the parts, not on
            how many processes share them.
        partition: ``metis`` needs pymetis; ``label_propagation`` needs nothing, and cuts more edges; ``auto`` is METIS
            where it is installed.
        folder: of a graph that ``task=partition`` writes and of which each process reads its parts alone; null finds
            the parts at the start of a run, for which every process loads the whole graph.
        halo_sample: share of the halo's rows that travel in an exchange of a training step, drawn at random and divided
            by the share, as the boundary nodes of BNS-GCN; 1 sends all.
        timeout: seconds after which a process that does not answer counts as lost, which ends the others.
    """

    parts: int | None = None
    partition: str = "auto"
    folder: str | None = None
    halo_sample: float = 1.0
    timeout: float = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts is not None:
            check_at_least("parallel.parts", self.parts, 1)
        check_choice("parallel.partition", self.partition, PARTITIONERS)
        check(self.folder != "", "parallel.folder", "''", "must be a folder, or null")
        valid = "must be above 0 and at most 1"
        check(0.0 < self.halo_sample <= 1.0, "parallel.halo_sample", self.halo_sample, valid)
        check_above("parallel.timeout", self.timeout, 0)


@dataclass
class MessagesConfig:
    """How rows of maps travel between the processes of ``parallel=graph``.

    Args:
        forward: of activations: ``fp32``, ``bf16``, or ``int8``, ``int4``, ``int2`` with a zero and a scale a row and
            stochastic rounding, or ``lowrank``: coefficients of 8 bits in the leading directions of the rows that a
            process sends. A rounded activation goes through ReLU, so the gradient has a bias.
        backward: of gradients, likewise; what is rounded is unbiased there, for which reason ``lowrank`` is refused.
        rank: directions of ``lowrank``.
        delta: activations travel as the rounded difference to what the receiver has of them from the epoch before.
        delta_interval: epochs between two in which they travel whole; checkpoints are written before those alone.
    """

    forward: str = "fp32"
    backward: str = "fp32"
    rank: int = 32
    delta: bool = False
    delta_interval: int = 20

    def __post_init__(self) -> None:
        check_choice("messages.forward", self.forward, FORWARD)
        check_choice("messages.backward", self.backward, BACKWARD)
        check_at_least("messages.rank", self.rank, 1)
        check_at_least("messages.delta_interval", self.delta_interval, 1)
        rounded = "must be false with messages.forward=fp32, whose differences are no shorter"
        check(not self.delta or self.forward != "fp32", "messages.delta", True, rounded)


PARALLEL_CONFIGS: dict[str, type[NoParallelConfig]] = {"none": NoParallelConfig, "graph": ParallelConfig}


# Models whose layers read neighbours through products with the adjacency, or in attention.
MODELS = ("sage", "gcn", "gcn2", "gat", "graphconv")


def check_parallel(config: Any) -> None:
    """Refuses what does not work over several processes.

    Args:
        config: of the run.

    Raises:
        ConfigError: with the field.
    """
    if config.task == "partition":
        parallel = config.parallel
        needed = "task=partition writes a graph in parts: set parallel.parts and parallel.folder"
        check(parallel.parts is not None, "parallel.parts", parallel.parts, needed)
        check(parallel.folder is not None, "parallel.folder", parallel.folder, needed)
        check(config.processes == 1, "processes", config.processes, "task=partition needs one")
    compression, training = config.compression, config.training
    if config.messages.delta:
        again = "must be false under compression=recompute, which fetches rows of one pass twice"
        check(compression.scheme != "recompute", "messages.delta", True, again)
        sampled = "must be false where parallel.halo_sample is not 1: a share of the differences says little"
        check(config.parallel.halo_sample == 1.0, "messages.delta", True, sampled)
    if config.dataset.inductive:
        whole = "parts in files are of the whole graph: dataset.inductive=true needs null"
        check(config.parallel.folder is None, "parallel.folder", config.parallel.folder, whole)
    if config.model.name == "gat":
        weighed = "must be 1 for gat: attention over some neighbours is no sum of theirs"
        check(config.parallel.halo_sample == 1.0, "parallel.halo_sample", config.parallel.halo_sample, weighed)
    if compression.scheme == "auto":
        told = "parallel=graph needs what each process may keep: a share of FP32, or compression.budget_mib"
        check(compression.budget != "fit", "compression.budget", "fit", told)
    labels = getattr(config.model, "label_input", False)
    for field, value, valid in (
        ("task", config.task, ("train", "measure", "fidelity", "partition")),
        ("model", config.model.name, MODELS),
        ("model.label_input", labels, (False,)),
        ("sampler", config.sampler.name, ("none",)),
        ("compression.rounding", compression.rounding, ("nearest",)),
        ("training.cuda_graph", training.cuda_graph, (False,)),
    ):
        shown = ", ".join(str(each).lower() for each in valid)
        check(value in valid, field, value, f"parallel=graph works with {shown}")
