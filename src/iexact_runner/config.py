"""The schema of a run: plain dataclasses that Hydra merges ``conf/`` into and that check themselves.

Every check raises :class:`~iexact_runner.errors.ConfigError` with the dotted field name, the value and what is valid.
Nothing here imports torch, so that ``iexact --help`` stays fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from iexact_runner.errors import ConfigError

BITS = (1, 2, 4, 8)
BACKENDS = ("auto", "torch", "numba", "triton")
SCHEMES = ("none", "projected")
LEVELS = ("uniform", "optimal")
TASKS = ("train", "measure", "fidelity", "distribution", "bins")
PRECISIONS = ("float32", "bfloat16", "float16")
LOGGERS = ("none", "tensorboard", "mlflow")
OPTIMIZERS = ("adam", "rmsprop")
LOSSES = ("cross_entropy", "log_cross_entropy")


def _check(condition: bool, name: str, value: object, valid: str) -> None:
    if not condition:
        raise ConfigError.of(name, value, valid)


def _check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    options = tuple(choices)
    _check(value in options, name, value, f"must be one of {', '.join(map(str, options))}")


def _check_probability(name: str, value: float) -> None:
    _check(0.0 <= value < 1.0, name, value, "must be at least 0 and below 1")


def _check_at_least(name: str, value: float, low: int) -> None:
    _check(value >= low, name, value, f"must be {low} or more")


@dataclass
class ModelConfig:
    """Fields that every model has."""

    name: str = MISSING
    num_layers: int = 3
    hidden_channels: int = 128
    dropout: float = 0.5
    input_dropout: float = 0.0
    batch_norm: bool = True
    residual: bool = False

    def __post_init__(self) -> None:
        _check_at_least("model.num_layers", self.num_layers, 1)
        _check_at_least("model.hidden_channels", self.hidden_channels, 1)
        _check_probability("model.dropout", self.dropout)
        _check_probability("model.input_dropout", self.input_dropout)


@dataclass
class SAGEConfig(ModelConfig):
    """GraphSAGE with mean aggregation."""


@dataclass
class GCNConfig(ModelConfig):
    """GCN with self-loops and symmetric normalisation."""


@dataclass
class GCN2Config(ModelConfig):
    """GCNII: initial residual ``alpha`` and identity mapping ``log(theta / layer + 1)`` (null: no identity mapping)."""

    alpha: float = 0.1
    theta: float | None = 0.5
    shared_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(0.0 <= self.alpha <= 1.0, "model.alpha", self.alpha, "must be between 0 and 1")
        _check(self.theta is None or self.theta > 0, "model.theta", self.theta, "must be above 0, or null for none")


@dataclass
class GATConfig(ModelConfig):
    """GAT; ``shared_attention`` scores both ends of an edge with one vector; ``label_input`` feeds training labels."""

    heads: int = 3
    shared_attention: bool = False
    edge_dropout: float = 0.0
    label_input: bool = False
    label_mask_rate: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least("model.heads", self.heads, 1)
        _check_probability("model.edge_dropout", self.edge_dropout)
        rate = self.label_mask_rate
        _check(0.0 < rate < 1.0, "model.label_mask_rate", rate, "must be above 0 and below 1")


@dataclass
class DatasetConfig:
    """Fields that every dataset has.

    ``source`` picks the loader; ``split_seed`` draws the 60/20/20 split where no split is published.
    """

    name: str = MISSING
    source: str = MISSING
    root: str = "data"
    inductive: bool = False
    undirected: bool = False
    standardize: bool = False
    split_seed: int = 0

    def __post_init__(self) -> None:
        _check(bool(self.root), "dataset.root", repr(self.root), "must be a folder")
        _check_at_least("dataset.split_seed", self.split_seed, 0)


@dataclass
class DigitsConfig(DatasetConfig):
    """Handwritten digits as a symmetric k-nearest-neighbour graph."""

    neighbors: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(1 <= self.neighbors <= 1796, "dataset.neighbors", self.neighbors, "must be between 1 and 1796")


@dataclass
class SyntheticConfig(DatasetConfig):
    """A degree-corrected block model with label-dependent features.

    ``num_train``, ``num_val`` and ``num_test`` are node counts of the split; null for all three is 60/20/20.
    """

    num_nodes: int = 10_000
    average_degree: float = 10.0
    num_features: int = 64
    num_classes: int = 10
    homophily: float = 0.7
    degree_exponent: float = 2.5
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None
    graph_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        nodes = self.num_nodes
        _check_at_least("dataset.num_nodes", nodes, 10)
        degree = self.average_degree
        _check(
            0 < degree <= (nodes - 1) / 4,
            "dataset.average_degree",
            degree,
            f"must be above 0 and at most (num_nodes - 1) / 4 = {(nodes - 1) / 4:g}",
        )
        _check_at_least("dataset.num_features", self.num_features, 1)
        classes = self.num_classes
        _check(2 <= classes <= nodes, "dataset.num_classes", classes, "must be between 2 and num_nodes")
        _check(0.0 <= self.homophily <= 1.0, "dataset.homophily", self.homophily, "must be between 0 and 1")
        _check(self.degree_exponent > 1, "dataset.degree_exponent", self.degree_exponent, "must be above 1")
        _check_at_least("dataset.graph_seed", self.graph_seed, 0)
        sizes = (self.num_train, self.num_val, self.num_test)
        given = [size for size in sizes if size is not None]
        valid = "set num_train, num_val and num_test together, each 1 or more, at most num_nodes in all"
        _check(len(given) in (0, 3) and all(size >= 1 for size in given), "dataset.num_train", self.num_train, valid)
        _check(sum(given) <= nodes, "dataset.num_train", self.num_train, valid)


MODEL_CONFIGS = {"sage": SAGEConfig, "gcn": GCNConfig, "gcn2": GCN2Config, "gat": GATConfig}
# Of the datasets that need no files; the loaders check the names of the others.
DATASET_PREFIXES: dict[type[DatasetConfig], str] = {DigitsConfig: "digits", SyntheticConfig: "synthetic"}


@dataclass
class CompressionConfig:
    """What is kept of each activation map for the backward pass (spec symbols in brackets).

    Args:
        scheme: ``none`` keeps FP32 maps; ``projected`` is EXACT and i-EXACT.
        bits: bits of a code [b]; null keeps the (projected) map in FP32.
        kept_frac: features kept by the random projection [R = ceil(kept_frac * D)]; 1.0 is no projection.
        col_size: block size in rows [G / R]; 0 or 1 is one block a row.
        alpha: width of the first bin of 2-bit codes in units of the code; 1.0 is uniform, ``auto`` the best width
            for the size of each map's blocks.
        levels: ``uniform``, or ``optimal`` for all levels of least variance, at any number of bits.
        max_block_size: cap of G in elements, rounded to whole rows; null is no cap.
        share_maps: transform before aggregating, so that one kept map serves both weights of a SAGE layer.
        store_dropout_mask: keep dropout masks as 1 bit an element instead of regenerating them from the seed.
        backend: who runs the quantizer.
    """

    scheme: str = MISSING
    bits: int | None = None
    kept_frac: float = 1.0
    col_size: int = 0
    alpha: Any = 1.0  # a number or a word: OmegaConf fails to merge a union
    levels: str = "uniform"
    max_block_size: int | None = None
    share_maps: bool = False
    store_dropout_mask: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        _check_choice("compression.scheme", self.scheme, SCHEMES)
        _check_choice("compression.backend", self.backend, BACKENDS)
        _check(
            self.bits is None or self.bits in BITS,
            "compression.bits",
            self.bits,
            "must be one of 1, 2, 4, 8, or null to keep the projected map in FP32",
        )
        _check(0.0 < self.kept_frac <= 1.0, "compression.kept_frac", self.kept_frac, "must be above 0 and at most 1")
        _check_at_least("compression.col_size", self.col_size, 0)
        self._check_levels()
        cap = self.max_block_size
        _check(cap is None or cap >= 1, "compression.max_block_size", cap, "must be 1 or more, or null for no cap")
        if self.scheme == "none":
            self._check_unused()

    def optimal_levels(self) -> bool:
        """Whether each map's levels are chosen for the size of its blocks."""
        return self.alpha == "auto" or self.levels == "optimal"

    def _check_levels(self) -> None:
        alpha, bits = self.alpha, "null" if self.bits is None else self.bits
        number = type(alpha) in (int, float) and 0.0 < alpha < 1.5
        _check(number or alpha == "auto", "compression.alpha", alpha, "must be above 0 and below 1.5, or auto")
        _check(
            alpha == 1.0 or self.bits == 2,
            "compression.alpha",
            alpha,
            f"the width of the first bin is for compression.bits=2, which is {bits} here; "
            "compression.levels=optimal is for all bits",
        )
        _check_choice("compression.levels", self.levels, LEVELS)
        if self.levels == "optimal":
            known = self.bits is not None
            _check(known, "compression.levels", self.levels, "needs compression.bits, which is null here")
            _check(
                alpha in (1.0, "auto"),
                "compression.alpha",
                alpha,
                "compression.levels=optimal chooses the first bin itself; leave out one of the two",
            )

    def _check_unused(self) -> None:
        """With FP32 maps there is nothing to quantize: a field that would be ignored is a mistake."""
        for name, unused in (
            ("bits", None),
            ("kept_frac", 1.0),
            ("col_size", 0),
            ("max_block_size", None),
            ("share_maps", False),
            ("store_dropout_mask", False),
        ):
            value = getattr(self, name)
            _check(value == unused, f"compression.{name}", value, "compression=none keeps FP32; use exact or iexact")


@dataclass
class TrainingConfig:
    """Full-batch training. ``grad_norm`` null is no clipping; ``warmup_epochs`` raises the learning rate linearly."""

    epochs: int = 200
    lr: float = 0.01
    optimizer: str = "adam"
    weight_decay: float = 0.0
    grad_norm: float | None = 0.5
    warmup_epochs: int = 0
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        _check_at_least("training.epochs", self.epochs, 1)
        _check(self.lr > 0, "training.lr", self.lr, "must be above 0")
        _check_choice("training.optimizer", self.optimizer, OPTIMIZERS)
        _check(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "must be 0 or more")
        norm = self.grad_norm
        _check(norm is None or norm > 0, "training.grad_norm", norm, "must be above 0, or null for no clipping")
        _check_at_least("training.warmup_epochs", self.warmup_epochs, 0)
        _check_choice("training.loss", self.loss, LOSSES)


@dataclass
class MeasureConfig:
    """Throughput of ``task=measure``; ``max_seconds`` ends the timing early, after at least three epochs.

    ``energy`` also records kWh and gCO2e of the timed epochs, on the grid of ``country`` (ISO 3166 code of three
    letters; null is the world's average).
    """

    warmup_epochs: int = 10
    timed_epochs: int = 100
    max_seconds: float = 60.0
    energy: bool = False
    country: str | None = None

    def __post_init__(self) -> None:
        _check_at_least("measure.warmup_epochs", self.warmup_epochs, 0)
        _check_at_least("measure.timed_epochs", self.timed_epochs, 1)
        _check(self.max_seconds > 0, "measure.max_seconds", self.max_seconds, "must be above 0")
        country = self.country
        letters = country is None or (len(country) == 3 and country.isascii() and country.isupper())
        _check(letters, "measure.country", country, "must be an ISO 3166 code of three letters such as DNK, or null")


@dataclass
class FidelityConfig:
    """``task=fidelity``: ``draws`` gradients of the scheme at the weights after each number of training ``epochs``."""

    epochs: list[int] = field(default_factory=lambda: [5, 30, 100])
    draws: int = 20

    def __post_init__(self) -> None:
        epochs = list(self.epochs)
        increasing = bool(epochs) and all(first < second for first, second in zip(epochs, epochs[1:], strict=False))
        _check(increasing and epochs[0] >= 0, "fidelity.epochs", epochs, "must be increasing and 0 or more")
        _check_at_least("fidelity.draws", self.draws, 2)


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
        _check_choice("bins.bits", self.bits, BITS)


@dataclass
class Config:
    """One run of ``iexact``. A ``precision`` below float32 is that of autocast; weights stay float32."""

    task: str = MISSING
    runs: int = 1
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    debug: bool = False
    output_dir: str = "outputs"
    logger: str = "none"
    model: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    compression: CompressionConfig = MISSING
    training: TrainingConfig = field(default_factory=TrainingConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    bins: BinsConfig = field(default_factory=BinsConfig)

    def __post_init__(self) -> None:
        _check_choice("task", self.task, TASKS)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("logger", self.logger, LOGGERS)
        _check(bool(self.output_dir), "output_dir", repr(self.output_dir), "must be a folder")
        model, dataset = self.model, self.dataset
        fitting = MODEL_CONFIGS.get(model.name)
        _check(fitting is type(model), "model.name", model.name, "choose one with model=NAME")
        if type(dataset) in DATASET_PREFIXES:
            prefix = DATASET_PREFIXES[type(dataset)]
            valid = "choose one with dataset=NAME"
            _check(dataset.name.startswith(prefix), "dataset.name", dataset.name, valid)
        _check(self.task != "measure" or self.runs == 1, "runs", self.runs, "task=measure measures one run")
        if self.task == "distribution":
            quantized = self.compression.scheme != "none" and self.compression.bits is not None
            _check(
                quantized, "compression.bits", self.compression.bits, "task=distribution needs maps that are quantized"
            )
        energy = self.measure.energy
        _check(self.task == "measure" or not energy, "measure.energy", "true", "timed epochs are those of task=measure")
        _check_at_least("runs", self.runs, 1)
        _check(0 <= self.seed < 2**62, "seed", self.seed, "must be 0 or more and below 2**62")
