"""What a run trains on: the graph as its model applies it, the nodes of each score, and what a model is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from iexact_runner.compression.seeds import mix
from iexact_runner.config import (
    LOW_RANK,
    BatchSamplerConfig,
    Config,
    GATConfig,
    GCNConfig,
    GraphConvConfig,
    ModelConfig,
    SAGEConfig,
)
from iexact_runner.config.checks import check
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.graph import Adjacency, Graph, training_subgraph
from iexact_runner.data.partitioned import shard_of, with_exact_messages
from iexact_runner.errors import ConfigError
from iexact_runner.kernels import ops
from iexact_runner.nn import model_class_of
from iexact_runner.parallel.shard import Shard

# Streams of one step seed that training itself draws from; the model counts its own from 0.
LABEL_MASK_STREAM = 1 << 32


@dataclass(frozen=True)
class View:
    """A graph as a model sees it: features (N, D), labels, the training nodes, and weights (N,) of their losses.

    Without weights, the loss is the mean over the training nodes.
    """

    x: Tensor
    y: Tensor
    graph: Graph
    train: Tensor
    loss_weights: Tensor | None = None

    @property
    def shard(self) -> Shard:
        """Which rows of the whole graph the view has."""
        return shard_of(self.graph)

    def tensors(self) -> list[Tensor]:
        """All tensors that the view holds."""
        weights = [] if self.loss_weights is None else [self.loss_weights]
        return [self.x, self.y, self.train, *weights, *self.graph.tensors()]

    def to(self, device: torch.device) -> View:
        """The view on a device."""
        weights = None if self.loss_weights is None else self.loss_weights.to(device)
        graph = self.graph.map(lambda part: part.to(device))
        return View(self.x.to(device), self.y.to(device), graph, self.train.to(device), weights)


class Batches(Protocol):
    """The mini-batches of an epoch, each drawn from (seed, epoch, batch) alone."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    @property
    def partition(self) -> dict[str, Any] | None:
        """How the graph was partitioned, if it was."""

    def tensors(self) -> list[Tensor]:
        """What batches are drawn from, beside the training view."""

    def view(self, batch: int, *, seed: int, epoch: int) -> View:
        """A batch, counted from 0, on the device; it may be without training nodes, as one of a single node is."""


@dataclass(frozen=True)
class Problem:
    """What a run trains on (``training``), is scored on (``whole``), and the nodes of each score.

    Transductive training uses one and the same view for both. With ``batches`` the steps of an epoch work on these, and
    the views lie on the host; ``layerwise`` says whether scores are computed layer by layer, and ``maps_folder`` where
    the maps between layers are held, if not in memory.
    """

    training: View
    whole: View
    val: Tensor
    test: Tensor
    num_classes: int
    label_mask_rate: float | None
    batches: Batches | None = None
    layerwise: bool = False
    maps_folder: str | None = None

    @property
    def multilabel(self) -> bool:
        """Whether a node may carry several labels."""
        return self.whole.y.dim() == 2

    @property
    def inductive(self) -> bool:
        """Whether the graph that is trained on is another than the one that scores are of."""
        return self.training is not self.whole

    @property
    def metric(self) -> str:
        """Name of the score."""
        return "micro_f1" if self.multilabel else "accuracy"

    @property
    def first_aggregate_cached(self) -> bool:
        """Whether the product of the adjacency with the features is kept as data."""
        return isinstance(self.training.graph, Adjacency) and self.training.graph.known is not None

    def without_cache(self) -> Problem:
        """The problem as plain modules have it: without a product of the adjacency with the features."""
        training, whole = (
            replace(view, graph=replace(view.graph, known=None)) if isinstance(view.graph, Adjacency) else view
            for view in (self.training, self.whole)
        )
        return replace(self, training=training if self.inductive else whole, whole=whole)

    def with_exact_messages(self) -> Problem:
        """The problem of one of several processes, whose rows travel as they are; any other is the same."""
        if not self.whole.shard.distributed:
            return self
        whole, training = (replace(view, graph=with_exact_messages(view.graph)) for view in (self.whole, self.training))
        return replace(self, whole=whole, training=training if self.inductive else whole)

    def of_batch(self, view: View) -> Problem:
        """The problem of one step, on a mini-batch."""
        return replace(self, training=view, batches=None)

    @property
    def in_channels(self) -> int:
        """Width of the model's input: features, and classes where labels are fed."""
        return self.whole.x.size(1) + (self.num_classes if self.label_mask_rate is not None else 0)

    def tensors(self) -> list[Tensor]:
        """All tensors that the data holds on the device."""
        views = [self.whole, self.training] if self.inductive else [self.whole]
        drawn_from = [] if self.batches is None else self.batches.tensors()
        return [tensor for view in views for tensor in view.tensors()] + [self.val, self.test, *drawn_from]


def prepare(
    dataset: NodeDataset,
    model: ModelConfig,
    *,
    inductive: bool,
    device: torch.device,
    cache_first_aggregate: bool = False,
) -> Problem:
    """Builds the graph operators a model needs and moves all to the device.

    ``cache_first_aggregate`` lets the operator keep its product with the features.
    """
    build_graph: Callable[..., Graph] = model_class_of(model).build_graph

    def view(x: Tensor, y: Tensor, edge_index: Tensor, train: Tensor) -> View:
        graph, x = build_graph(edge_index, x.size(0)).map(lambda part: part.to(device)), x.to(device)
        if cache_first_aggregate and isinstance(graph, Adjacency):
            graph = graph.knowing(x)
        return View(x, y.to(device), graph, train.to(device))

    whole = view(dataset.x, dataset.y, dataset.edge_index, dataset.train)
    training = whole
    if inductive:
        nodes = dataset.train
        edges = training_subgraph(dataset.edge_index, nodes, dataset.num_nodes)
        training = view(dataset.x[nodes], dataset.y[nodes], edges, torch.arange(nodes.numel()))
    label_mask_rate = model.label_mask_rate if isinstance(model, GATConfig) and model.label_input else None
    val, test = dataset.val.to(device), dataset.test.to(device)
    return Problem(training, whole, val, test, dataset.num_classes, label_mask_rate)


def caches_first_aggregate(config: Config, features_bytes: int, *, available: int | None) -> bool:
    """What ``training.cache_first_aggregate`` comes to.

    Args:
        config: of the run.
        features_bytes: size of the features of the graph.
        available: bytes of memory that are free; None if that is not known.

    Raises:
        ConfigError: if it is asked for where features change or the published layout has no use for it.
    """
    model, choice = config.model, config.training.cache_first_aggregate
    constant = isinstance(model, (SAGEConfig, GCNConfig, GraphConvConfig)) and model.input_dropout == 0
    if choice == "true" and not (constant and config.compression.scheme in ("none", *LOW_RANK)):
        valid = "needs sage, gcn or graphconv, model.input_dropout=0, and compression=none or lowrank; use auto"
        raise ConfigError.of("training.cache_first_aggregate", choice, valid)
    if isinstance(config.sampler, BatchSamplerConfig):
        check(choice != "true", "training.cache_first_aggregate", choice, "is of a whole graph: sampler=none")
        return False
    if choice != "auto":
        return choice == "true"
    size = first_aggregate_bytes(config, features_bytes)
    return constant and config.compression.scheme in LOW_RANK and available is not None and 10 * size <= available


def first_aggregate_bytes(config: Config, features_bytes: int) -> int:
    """Of the products of the graphs that are trained and scored on with their features, which take as much."""
    return features_bytes * (2 if config.dataset.inductive else 1)


def training_input(problem: Problem, *, seed: int | Tensor) -> tuple[Tensor, Tensor]:
    """Model input and the nodes of the loss; with labels as input, those whose label was not fed."""
    view = problem.training
    if problem.label_mask_rate is None:
        return view.x, view.train
    assert isinstance(seed, int)  # how many labels are fed is a number, which a captured step has none of
    fed = ~ops.keep_mask(
        view.train.numel(), p=problem.label_mask_rate, seed=mix(seed, LABEL_MASK_STREAM), device=view.x.device
    )
    if fed.all():  # a handful of training nodes: leave one to learn from
        fed[0] = False
    return with_labels(view, view.train[fed], problem.num_classes), view.train[~fed]


def loss_weights(view: View, nodes: Tensor) -> Tensor | None:
    """Weights (T,) of the losses of some training nodes, which stand for all that the view has; None is their mean."""
    if view.loss_weights is None:
        return None
    if nodes is view.train:
        return view.loss_weights[nodes]
    return view.loss_weights[nodes] * (view.train.numel() / nodes.numel())


def evaluation_input(problem: Problem) -> Tensor:
    """Model input in evaluation; with labels as input, those of all training nodes."""
    view = problem.whole
    return view.x if problem.label_mask_rate is None else with_labels(view, view.train, problem.num_classes)


def with_labels(view: View, known: Tensor, num_classes: int) -> Tensor:
    """Features with the labels of the ``known`` nodes beside them, zeros elsewhere: (N, D + classes)."""
    labels = view.x.new_zeros(view.x.size(0), num_classes)
    labels[known] = F.one_hot(view.y[known], num_classes).to(labels) if view.y.dim() == 1 else view.y[known]
    return torch.cat([view.x, labels], dim=1)
