"""One training step, evaluation and scores of full-batch node classification."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iexact_runner.capture import CapturedStep
from iexact_runner.compression.seeds import mix
from iexact_runner.config import (
    Config,
    GATConfig,
    GCNConfig,
    GraphConvConfig,
    ModelConfig,
    SAGEConfig,
    TrainingConfig,
)
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.graph import Adjacency, Graph, training_subgraph
from iexact_runner.errors import ConfigError, TrainingError
from iexact_runner.kernels import ops
from iexact_runner.loss import node_loss
from iexact_runner.nn import Model, model_class_of
from iexact_runner.phases import phase

# Streams of one step seed that training itself draws from; the model counts its own from 0.
LABEL_MASK_STREAM = 1 << 32


@dataclass(frozen=True)
class View:
    """A graph as a model sees it: features (N, D), labels, and the training nodes."""

    x: Tensor
    y: Tensor
    graph: Graph
    train: Tensor

    def tensors(self) -> list[Tensor]:
        """All tensors that the view holds."""
        return [self.x, self.y, self.train, *self.graph.tensors()]


@dataclass(frozen=True)
class Problem:
    """What a run trains on (``training``), is scored on (``whole``), and the nodes of each score.

    Transductive training uses one and the same view for both.
    """

    training: View
    whole: View
    val: Tensor
    test: Tensor
    num_classes: int
    label_mask_rate: float | None

    @property
    def multilabel(self) -> bool:
        """Whether a node may carry several labels."""
        return self.whole.y.dim() == 2

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
        return replace(self, training=whole if self.training is self.whole else training, whole=whole)

    @property
    def in_channels(self) -> int:
        """Width of the model's input: features, and classes where labels are fed."""
        return self.whole.x.size(1) + (self.num_classes if self.label_mask_rate is not None else 0)

    def tensors(self) -> list[Tensor]:
        """All tensors that the data holds on the device."""
        views = [self.whole] if self.training is self.whole else [self.whole, self.training]
        return [tensor for view in views for tensor in view.tensors()] + [self.val, self.test]


class Scores(NamedTuple):
    """Accuracy or micro-F1 on each split, in [0, 1]."""

    train: float
    val: float
    test: float


class Epoch(NamedTuple):
    """What one epoch yields: number from 1, training loss, seconds of the training step, scores if it is evaluated."""

    number: int
    loss: float
    seconds: float
    scores: Scores | None


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


def caches_first_aggregate(config: Config, dataset: NodeDataset, *, available: int | None) -> bool:
    """What ``training.cache_first_aggregate`` comes to, with so many bytes of memory free; None if that is not known.

    Raises:
        ConfigError: if it is asked for where features change or the published layout has no use for it.
    """
    model, choice = config.model, config.training.cache_first_aggregate
    constant = isinstance(model, (SAGEConfig, GCNConfig, GraphConvConfig)) and model.input_dropout == 0
    if choice == "true" and not (constant and config.compression.scheme in ("none", "lowrank")):
        valid = "needs sage, gcn or graphconv, model.input_dropout=0, and compression=none or lowrank; use auto"
        raise ConfigError.of("training.cache_first_aggregate", choice, valid)
    if choice != "auto":
        return choice == "true"
    size = dataset.x.nbytes * (2 if config.dataset.inductive else 1)
    return constant and config.compression.scheme == "lowrank" and available is not None and 10 * size <= available


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


def evaluation_input(problem: Problem) -> Tensor:
    """Model input in evaluation; with labels as input, those of all training nodes."""
    view = problem.whole
    return view.x if problem.label_mask_rate is None else with_labels(view, view.train, problem.num_classes)


def with_labels(view: View, known: Tensor, num_classes: int) -> Tensor:
    """Features with the labels of the ``known`` nodes beside them, zeros elsewhere: (N, D + classes)."""
    labels = view.x.new_zeros(view.x.size(0), num_classes)
    labels[known] = F.one_hot(view.y[known], num_classes).to(labels) if view.y.dim() == 1 else view.y[known]
    return torch.cat([view.x, labels], dim=1)


class Optimization:
    """What updates a model's weights over a run: optimizer, gradient scaler, precision of the forward pass.

    Args:
        model: the model, on its device.
        config: optimizer, learning rate and clipping.
        precision: ``float32``, or the type of autocast; ``float16`` scales the loss so that small gradients survive.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, *, precision: str = "float32") -> None:
        kinds = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
        parameters = list(model.parameters())
        self.config = config
        self.optimizer = kinds[config.optimizer](parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.precision = precision
        self.scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=precision == "float16")

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients of a loss, scaled, in place of those of the step before."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()

    def apply(self, model: nn.Module, loss: float, *, epoch: int) -> None:
        """Updates the weights after a step of that loss.

        Raises:
            TrainingError: if the loss is not finite.
        """
        if not math.isfinite(loss):
            raise TrainingError(f"the training loss is {loss} at epoch {epoch}: lower training.lr or use more bits")
        self.update(model, epoch=epoch)

    def update(self, model: nn.Module, *, epoch: int) -> None:
        """Clipping and optimizer step of epoch ``epoch``, counted from 1."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, epoch / max(1, config.warmup_epochs))
        if config.grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Context of a forward pass in a precision; the loss and all scores are computed in float32 outside of it."""
    dtype = getattr(torch, precision)
    return torch.autocast(device.type, dtype if precision != "float32" else None, enabled=precision != "float32")


def train_epochs(
    model: Model, problem: Problem, optimization: Optimization, *, seed: int, done: int = 0
) -> Iterator[Epoch]:
    """Trains for as many epochs as the configuration says, yielding each as it ends; ``done`` of them are over.

    Raises:
        TrainingError: if the loss or the model's output stops being finite.
    """
    device, take_step, config = problem.whole.x.device, stepper(model, optimization, problem), optimization.config
    for epoch in range(done + 1, config.epochs + 1):
        start = clock(device)
        loss = take_step(seed=mix(seed, epoch), epoch=epoch)
        seconds = clock(device) - start
        scores = None
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            scores = evaluate(model, problem, precision=optimization.precision)
            if not all(map(math.isfinite, scores)):
                raise TrainingError(f"the model's output is not finite after epoch {epoch}: lower training.lr")
        yield Epoch(epoch, loss, seconds, scores)


def stepper(model: Model, optimization: Optimization, problem: Problem) -> Callable[..., float]:
    """What takes training steps, given ``seed`` and ``epoch``: :func:`step`, or replays of a captured one."""
    config = optimization.config
    if not config.cuda_graph:
        return partial(step, model, optimization, problem)

    def loss(seed: Tensor) -> Tensor:
        return training_loss(model, problem, kind=config.loss, precision=optimization.precision, seed=seed)

    return CapturedStep(model, optimization, loss, refresh=model.compression.refresh_on("cuda"))


def step(model: Model, optimization: Optimization, problem: Problem, *, seed: int, epoch: int) -> float:
    """One full-batch training step; returns the loss.

    Raises:
        TrainingError: if the loss is not finite; the weights are then left as they were.
    """
    model.train()
    loss = training_loss(model, problem, kind=optimization.config.loss, precision=optimization.precision, seed=seed)
    optimization.backward(loss)
    value = loss.item()  # not before the backward pass is queued: a GPU would have nothing to do meanwhile
    optimization.apply(model, value, epoch=epoch)
    return value


def training_loss(
    model: Model, problem: Problem, *, kind: str, precision: str, seed: int | Tensor, map_seed: int | None = None
) -> Tensor:
    """Loss of one forward pass over the training view."""
    features, nodes = training_input(problem, seed=seed)
    with autocast(precision, features.device):
        scores = model(features, problem.training.graph, seed=seed, map_seed=map_seed)
    return node_loss(scores, problem.training.y, nodes, kind=kind)


@phase("evaluation")
@torch.no_grad()
def evaluate(model: Model, problem: Problem, *, precision: str = "float32") -> Scores:
    """Scores of the exact forward pass."""
    model.eval()
    view, features = problem.whole, evaluation_input(problem)
    with autocast(precision, features.device):
        scores = model(features, view.graph)
    return Scores(*(score(scores[nodes], view.y[nodes]) for nodes in (view.train, problem.val, problem.test)))


def score(scores: Tensor, labels: Tensor) -> float:
    """Accuracy, or micro-F1 of positive logits for several labels a node; NaN if a score is not finite."""
    if not scores.isfinite().all():
        return math.nan
    if labels.dim() == 1:
        return (scores.argmax(dim=1) == labels).float().mean().item()
    predicted, true = scores > 0, labels > 0.5
    hits, all_marked = (predicted & true).sum(), predicted.sum() + true.sum()
    return (2 * hits / all_marked.clamp(min=1)).item()


def clock(device: torch.device) -> float:
    """Seconds on a monotonic clock, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
