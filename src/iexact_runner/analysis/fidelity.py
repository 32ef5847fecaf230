"""How far the gradient of a scheme is from the exact one, at the same weights and with the same dropout masks.

With g the exact gradient, g_t the t-th of T draws of the scheme's projections and roundings, e_t = g_t - g and
m = mean(e_t):

- relative error: mean of ||e_t|| / ||g||
- cosine: mean of <g_t, g> / (||g_t|| ||g||)
- bias: ||m|| / ||g||, and its standard error sqrt(sum ||e_t - m||^2 / (T (T - 1))) / ||g||, which is what ||m|| / ||g||
  comes to if there is no bias

On mini-batches each draw has a batch, and the exact gradient of that batch takes the place of g. Beside these figures
stand those of sampling, exact gradients of batches against that of the whole graph, and of both errors together.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from iexact_runner.compression.directions import Directions
from iexact_runner.compression.seeds import mix
from iexact_runner.config import LOW_RANK, CompressionConfig, Config
from iexact_runner.data.partitioned import begin_epoch, frozen_messages
from iexact_runner.errors import TrainingError
from iexact_runner.nn import Model
from iexact_runner.problem import Problem
from iexact_runner.training import Optimization, device_of, epoch_trainer, training_loss

FIGURES = ("relative_error", "cosine", "bias", "bias_standard_error")
# A gradient this much smaller than the whole is zero but for rounding, such as that of a bias before BatchNorm.
NEGLIGIBLE = 1e-6


def exact_twin(compression: CompressionConfig) -> CompressionConfig:
    """The configuration that keeps maps as they are, but draws the same dropout masks from the same seed."""
    return CompressionConfig(
        scheme="projected",
        bits=None,
        kept_frac=1.0,
        share_maps=compression.share_maps,
        store_dropout_mask=compression.store_dropout_mask,
        backend=compression.backend,
    )


class Deviations:
    """Draws of one gradient, each against an exact one, summed as they come."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._norms: list[float] = []
        self._squares: list[float] = []
        self._cosines: list[float] = []

    @property
    def norm(self) -> float:
        """Mean norm of the exact gradients."""
        return statistics.fmean(self._norms)

    def add(self, drawn: Tensor, exact: Tensor) -> None:
        """Counts one more draw, and the exact gradient that it estimates, both of one shape."""
        drawn, exact = drawn.flatten().double(), exact.flatten().double()
        error = drawn - exact
        self._sum = self._sum + error
        self._squares.append(error.square().sum().item())
        self._norms.append(exact.norm().item())
        length = drawn.norm().item() * self._norms[-1]
        self._cosines.append((drawn @ exact).item() / length if length else 0.0)

    def figures(self, *, whole: float) -> dict[str, float | None]:
        """Error, cosine and bias of two draws or more; None next to ``whole``, the norm of all gradients together."""
        norm = self.norm
        if norm <= NEGLIGIBLE * whole or min(self._norms) == 0:
            return dict.fromkeys(FIGURES)
        draws = len(self._squares)
        mean_square = (torch.as_tensor(self._sum) / draws).square().sum().item()
        variance = max(0.0, statistics.fmean(self._squares) - mean_square) * draws / (draws - 1)
        errors = [square**0.5 / own for square, own in zip(self._squares, self._norms, strict=True)]
        return {
            "relative_error": statistics.fmean(errors),
            "cosine": statistics.fmean(self._cosines),
            "bias": mean_square**0.5 / norm,
            "bias_standard_error": (variance / draws) ** 0.5 / norm,
        }


def checkpoints(
    model: Model, problem: Problem, config: Config, *, seed: int, passed: Callable[[int], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Trains ``model`` exactly and yields, after each of ``config.fidelity.epochs``, that epoch and its figures.

    Training and the exact gradient are in float32, what several processes send each other too; the draws are in
    ``config.precision``, with messages as configured; their differences are to what a run's earlier messages would
    have told. FP32 maps are compared as their exact twin: an error of 0 in float32, for they are what the others are
    held against. Directions of the low-rank scheme are as old as they have become in training by then. ``passed`` is
    called after every epoch, and may have the model keep its maps in another way.
    """
    twin = exact_twin(config.compression)
    compared = twin if config.compression.scheme == "none" else config.compression
    device = problem.whole.x.device.type
    oldest = {epoch: compared.oldest_directions(device, passes=epoch) for epoch in config.fidelity.epochs}
    model.compression = twin
    optimization = Optimization(model, config.training)
    names = [name for name, _ in model.named_parameters()]
    directions: dict[int, list[Directions]] = {}
    undisturbed = problem.with_exact_messages()
    train_epoch = epoch_trainer(model, optimization, undisturbed, seed=seed)
    graph = problem.training.graph
    for epoch in range(config.fidelity.epochs[-1] + 1):
        if epoch > 0:
            if config.messages.delta:
                _pass(copy.deepcopy(model), problem, config, seed=mix(seed, epoch))
            train_epoch(epoch)
            if passed is not None:
                passed(epoch)
        begin_epoch(graph, epoch + 1)
        if problem.batches is not None:
            if epoch in config.fidelity.epochs:
                yield epoch, _on_batches(model, compared, problem, config, seed=seed, epoch=epoch + 1, names=names)
            continue
        for later in config.fidelity.epochs:
            if later - oldest[later] <= epoch < later:
                directions.setdefault(later, copy.deepcopy(model.directions))
                age, seeds = oldest[later], mix(seed, epoch + 1)
                with frozen_messages(graph):
                    _update(directions[later], model, compared, problem, config, oldest=age, seed=seeds)
        if epoch in config.fidelity.epochs:
            # A copy, for a forward pass also moves the running statistics of BatchNorm.
            probe = copy.deepcopy(model)
            exact = gradients(probe, undisturbed, kind=config.training.loss, seed=mix(seed, epoch + 1))
            probe.compression = compared
            states = directions.get(epoch, model.directions)
            draws = _draws(probe, problem, config, states, seeds=(seed, epoch + 1))
            with frozen_messages(graph):
                figures = compare(((drawn, exact) for drawn in draws), names=names)
            yield epoch, figures


def _on_batches(
    model: Model,
    compared: CompressionConfig,
    problem: Problem,
    config: Config,
    *,
    seed: int,
    epoch: int,
    names: Sequence[str],
) -> dict[str, Any]:
    """Figures of the gradients of the batches of an epoch, taken over and over until there are enough draws.

    Directions of the low-rank scheme go from batch to batch as in training, and are as old when draws begin.
    """
    kind, precision, device = config.training.loss, config.precision, device_of(model)
    whole = problem.of_batch(problem.training.to(device))
    full = joined(gradients(copy.deepcopy(model), whole, kind=kind, seed=mix(seed, epoch)))
    directions = copy.deepcopy(model.directions)
    sampling, both = Deviations(), Deviations()
    older = 0
    if compared.scheme in LOW_RANK and problem.batches is not None:
        older = compared.oldest_directions(device.type, passes=epoch * len(problem.batches))

    def pairs() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        turns = itertools.islice(_batches(problem, seed=seed, epoch=epoch), older + config.fidelity.draws)
        for turn, batch in enumerate(turns):
            seeds = mix(seed, epoch, turn)
            if turn < older:
                _update(directions, model, compared, batch, config, oldest=older, seed=seeds)
                continue
            probe = copy.deepcopy(model)
            exact = gradients(probe, batch, kind=kind, seed=seeds)
            probe.compression, probe.directions = compared, directions
            estimate = gradients(probe, batch, kind=kind, precision=precision, seed=seeds, map_seed=mix(seeds, turn))
            sampling.add(joined(exact), full)
            both.add(joined(estimate), full)
            yield estimate, exact

    figures = compare(pairs(), names=names)
    return figures | {"sampling": sampling.figures(whole=0.0), "both": both.figures(whole=0.0)}


def _batches(problem: Problem, *, seed: int, epoch: int) -> Iterator[Problem]:
    """Problems of the batches of an epoch that are trained on, over and over.

    Raises:
        TrainingError: if there is none.
    """
    assert problem.batches is not None
    while True:
        trained = 0
        for batch in range(len(problem.batches)):
            view = problem.batches.view(batch, seed=seed, epoch=epoch)
            if view.train.numel():
                trained += 1
                yield problem.of_batch(view)
        if not trained:
            raise TrainingError(
                f"no batch of epoch {epoch} has two nodes, one of them to train on: take larger batches"
            )


def _update(
    directions: list[Directions],
    model: Model,
    compared: CompressionConfig,
    problem: Problem,
    config: Config,
    *,
    oldest: int,
    seed: int,
) -> None:
    """Finds directions as a training pass at these weights would, or has them follow until they are the oldest."""
    probe = copy.deepcopy(model)
    probe.compression, probe.directions = compared, directions
    _pass(probe, problem, config, seed=seed)
    for state in directions:
        state.interval = oldest + 1


def _pass(model: Model, problem: Problem, config: Config, *, seed: int) -> None:
    """The forward pass of a training step, for what it leaves behind."""
    training_loss(model.train(), problem, kind=config.training.loss, precision=config.precision, seed=seed)


def _draws(
    probe: Model, problem: Problem, config: Config, directions: list[Directions], *, seeds: tuple[int, int]
) -> Iterator[list[Tensor]]:
    """Gradients with the same dropout masks and directions, and other projections and roundings."""
    kind, precision = config.training.loss, config.precision
    for draw in range(config.fidelity.draws):
        probe.directions = copy.deepcopy(directions)
        map_seed = mix(*seeds, draw)
        yield gradients(probe, problem, kind=kind, precision=precision, seed=mix(*seeds), map_seed=map_seed)


def gradients(
    model: Model, problem: Problem, *, kind: str, seed: int, precision: str = "float32", map_seed: int | None = None
) -> list[Tensor]:
    """Gradient of every parameter in one training step that is not taken; ``seed`` draws the dropout masks."""
    model.train()
    loss = training_loss(model, problem, kind=kind, precision=precision, seed=seed, map_seed=map_seed)
    return problem.training.shard.summed(torch.autograd.grad(loss, list(model.parameters())))


def compare(draws: Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]], *, names: Sequence[str]) -> dict[str, Any]:
    """Figures of all parameters together, and in ``parameters`` of each, of gradients beside the exact ones."""
    whole, single = Deviations(), [Deviations() for _ in names]
    for drawn, exact in draws:
        whole.add(joined(drawn), joined(exact))
        for deviations, gradient, own in zip(single, drawn, exact, strict=True):
            deviations.add(gradient, own)
    parameters = {
        name: {"share": deviations.norm / whole.norm, **deviations.figures(whole=whole.norm)}
        for name, deviations in zip(names, single, strict=True)
    }
    return {**whole.figures(whole=0.0), "parameters": parameters}


def pooled(runs: Sequence[dict[int, dict[str, Any]]], *, draws: int) -> dict[str, Any]:
    """The record of some runs: every figure as the list of its values, a run each, by epoch and parameter."""
    epochs = [epoch for epoch in runs[0] if all(epoch in run for run in runs)] if runs else []
    after = {str(epoch): _listed([run[epoch] for run in runs]) for epoch in epochs}
    return {"draws": draws, "after": after}


def _listed(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: _listed([record[name] for record in records]) if isinstance(value, dict) else [r[name] for r in records]
        for name, value in records[0].items()
    }


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All elements (n,) of some tensors."""
    return torch.cat([tensor.flatten() for tensor in tensors])
