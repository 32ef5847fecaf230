"""One training step, an epoch of them, evaluation and scores of node classification."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from iexact_runner.capture import CapturedStep
from iexact_runner.compression.seeds import StepSeed, mix
from iexact_runner.config import TrainingConfig
from iexact_runner.data.graph import Graph, edge_count
from iexact_runner.data.partitioned import begin_epoch, with_exact_messages
from iexact_runner.errors import TrainingError
from iexact_runner.layerwise import layerwise_scores
from iexact_runner.loss import node_loss
from iexact_runner.nn import Model
from iexact_runner.parallel.shard import WHOLE, Shard
from iexact_runner.phases import phase
from iexact_runner.problem import Problem, evaluation_input, loss_weights, training_input
from iexact_runner.sampling import one_ahead
from iexact_runner.schemes.offload import offloading


class Scores(NamedTuple):
    """Accuracy or micro-F1 on each split, in [0, 1]."""

    train: float
    val: float
    test: float


class BatchWork(NamedTuple):
    """What the batches of an epoch came to.

    Args:
        batches: that were trained on; those without training nodes are passed over.
        nodes: of all batches.
        edges: of all batches, as the model takes them.
        sampling_seconds: that drawing them took, beside the steps.
        waiting_seconds: that the steps waited for it.
    """

    batches: int
    nodes: int
    edges: int
    sampling_seconds: float
    waiting_seconds: float


class Epoch(NamedTuple):
    """What one epoch yields.

    Args:
        number: from 1.
        loss: of the training step, or the mean over the training nodes of the batches.
        seconds: of the training step, or of all batches, drawing them included.
        scores: if it is evaluated.
        work: of mini-batches.
    """

    number: int
    loss: float
    seconds: float
    scores: Scores | None
    work: BatchWork | None = None


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
    device, config = device_of(model), optimization.config
    train_epoch = epoch_trainer(model, optimization, problem, seed=seed)
    for epoch in range(done + 1, config.epochs + 1):
        start = clock(device)
        loss, work = train_epoch(epoch)
        seconds = clock(device) - start
        scores = None
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            scores = evaluate(model, problem, precision=optimization.precision)
            if not all(map(math.isfinite, scores)):
                raise TrainingError(f"the model's output is not finite after epoch {epoch}: lower training.lr")
        yield Epoch(epoch, loss, seconds, scores, work)


def epoch_trainer(
    model: Model, optimization: Optimization, problem: Problem, *, seed: int
) -> Callable[[int], tuple[float, BatchWork | None]]:
    """What trains for the epoch of a number, counted from 1: one step, or one a batch; it returns the loss."""
    if problem.batches is not None:
        return partial(train_on_batches, model, optimization, problem, seed=seed)
    take_step = stepper(model, optimization, problem)
    return lambda epoch: (take_step(seed=mix(seed, epoch), epoch=epoch), None)


def train_on_batches(
    model: Model, optimization: Optimization, problem: Problem, epoch: int, *, seed: int, most: int | None = None
) -> tuple[float, BatchWork]:
    """A step on each batch of an epoch, or on the first ``most`` of them; the next batch is drawn meanwhile.

    Raises:
        TrainingError: if a loss is not finite, or no batch has a training node.
    """
    assert problem.batches is not None
    count = len(problem.batches) if most is None else min(most, len(problem.batches))
    tasks = [partial(problem.batches.view, batch, seed=seed, epoch=epoch) for batch in range(count)]
    losses, shares, work = [], [], BatchWork(0, 0, 0, 0.0, 0.0)
    for batch, (view, timed) in enumerate(one_ahead(tasks)):
        trained = view.train.numel()
        if trained:
            seed_of_batch = mix(seed, epoch, batch)
            losses.append(step(model, optimization, problem.of_batch(view), seed=seed_of_batch, epoch=epoch))
            shares.append(trained if view.loss_weights is None else 1)
        work = BatchWork(
            work.batches + bool(trained),
            work.nodes + view.x.size(0),
            work.edges + edge_count(view.graph),
            work.sampling_seconds + timed.worked,
            work.waiting_seconds + timed.waited,
        )
    if not losses:
        raise TrainingError(f"no batch of epoch {epoch} has two nodes, one of them to train on: take larger batches")
    return sum(map(operator.mul, losses, shares)) / sum(shares), work


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def stepper(model: Model, optimization: Optimization, problem: Problem) -> Callable[..., float]:
    """What takes training steps, given ``seed`` and ``epoch``: :func:`step`, or replays of a captured one."""
    config = optimization.config
    if not config.cuda_graph:
        return partial(step, model, optimization, problem)

    def loss(seed: Tensor) -> Tensor:
        return training_loss(model, problem, kind=config.loss, precision=optimization.precision, seed=seed)

    return CapturedStep(model, optimization, loss)


def step(model: Model, optimization: Optimization, problem: Problem, *, seed: int, epoch: int) -> float:
    """One full-batch training step; returns the loss.

    Raises:
        TrainingError: if the loss is not finite; the weights are then left as they were.
    """
    model.train()
    begin_epoch(problem.training.graph, epoch)
    loss = training_loss(model, problem, kind=optimization.config.loss, precision=optimization.precision, seed=seed)
    optimization.backward(loss)
    shard = problem.training.shard
    shard.sum_gradients(model.parameters())
    # Not before the backward pass is queued: a GPU would have nothing to do meanwhile.
    value = shard.sum_(loss.detach()).item()
    optimization.apply(model, value, epoch=epoch)
    return value


def training_loss(
    model: Model, problem: Problem, *, kind: str, precision: str, seed: int | Tensor, map_seed: int | None = None
) -> Tensor:
    """Loss of one forward pass over the training view."""
    features, nodes = training_input(problem, seed=seed)
    view = problem.training
    scores = forward(model, features, view.graph, precision=precision, seed=seed, map_seed=map_seed)
    return node_loss(scores, view.y, nodes, kind=kind, weights=loss_weights(view, nodes))


def forward(
    model: Model,
    features: Tensor,
    graph: Graph,
    *,
    precision: str = "float32",
    seed: int | Tensor = 0,
    map_seed: int | None = None,
) -> Tensor:
    """Scores of a forward pass that is trained on: in a precision, what it keeps moved to the host if that is asked."""
    moving = offloading(model.compression, [features, *graph.tensors(), *model.buffers()])
    device = features.device
    seeds = {"seed": StepSeed.where_it_pays(device, seed)}
    if map_seed is not None:
        seeds["map_seed"] = StepSeed.where_it_pays(device, map_seed)
    with autocast(precision, device), moving:
        scores: Tensor = model(features, graph, **seeds)
    return scores


@phase("evaluation")
@torch.no_grad()
def evaluate(model: Model, problem: Problem, *, precision: str = "float32") -> Scores:
    """Scores of the exact forward pass, for which rows of other processes travel as they are."""
    model.eval()
    view, features, device = problem.whole, evaluation_input(problem), device_of(model)
    graph = with_exact_messages(view.graph)
    with autocast(precision, device):
        if problem.layerwise:
            scores = layerwise_scores(model, features, graph, device=device, maps_folder=problem.maps_folder)
        else:
            scores = model(features, graph)
    splits = (view.train, problem.val, problem.test)
    return Scores(*(score(scores[nodes], view.y[nodes], view.shard) for nodes in splits))


def score(scores: Tensor, labels: Tensor, shard: Shard = WHOLE) -> float:
    """Accuracy, or micro-F1 of positive logits for several labels a node; NaN if a score is not finite.

    Of nodes that are in several processes, of all of them.
    """
    if labels.dim() == 1:
        hits, marked = (scores.argmax(dim=1) == labels).sum(), torch.tensor(labels.numel(), device=labels.device)
    else:
        predicted, true = scores > 0, labels > 0.5
        hits, marked = 2 * (predicted & true).sum(), predicted.sum() + true.sum()
    bad = scores.numel() - scores.isfinite().sum()
    hits, marked, bad = shard.sum_(torch.stack([hits, marked, bad])).tolist()
    return math.nan if bad else hits / max(1, marked)


def clock(device: torch.device) -> float:
    """Seconds on a monotonic clock, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
