"""Plans for the training step of a run: its gradients, and the bytes that its budget comes to."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from iexact_runner.budget.plan import Plan
from iexact_runner.budget.planner import make_plan
from iexact_runner.compression.choices import Choice
from iexact_runner.compression.directions import Directions
from iexact_runner.compression.signs import SPARE
from iexact_runner.config import CompressionConfig, Config
from iexact_runner.data.partitioned import frozen_messages
from iexact_runner.errors import ConfigError
from iexact_runner.loss import node_loss
from iexact_runner.measure import MIB, SavedTensors, out_of_memory
from iexact_runner.measure.step import kept_tensors, step_peak_mib
from iexact_runner.nn import Model
from iexact_runner.problem import Problem, loss_weights, training_input
from iexact_runner.training import forward

# Of the memory that is free, what a step is planned for under ``budget=fit``.
FREE_SHARE = 0.9


class TrainingTrial:
    """Gradients of one training step that is not taken.

    Args:
        model: whose weights are used, and left as they are.
        problem: what it trains on.
        config: of the run.
        seed: of the step.
    """

    def __init__(self, model: Model, problem: Problem, config: Config, *, seed: int) -> None:
        self._model = copy.deepcopy(model).train()
        self._model.compression = config.compression
        self._problem = problem
        self._config = config
        self._seed = seed
        self._saved: SavedTensors | None = None

    def gradient(self, directions: list[Directions]) -> tuple[Tensor, int]:
        """The gradient as one vector, and the bytes that were kept."""
        config, view = self._config, self._problem.training
        scores, nodes, kept = self._forward(directions)
        loss = node_loss(scores, view.y, nodes, kind=config.training.loss, weights=loss_weights(view, nodes))
        gradients = view.shard.summed(torch.autograd.grad(loss, list(self._model.parameters())))
        return torch.cat([gradient.flatten() for gradient in gradients]), kept

    def exact(self, maps: int) -> Tensor:
        """The gradient with so many maps in FP32, on the host meanwhile."""
        usual = self._model.compression
        self._model.compression = replace(usual, offload=True)
        try:
            return self.gradient([Directions(choice=Choice(None)) for _ in range(maps)])[0]
        finally:
            self._model.compression = usual

    def saved(self, directions: list[Directions]) -> int:
        """The bytes that are kept."""
        return self._forward(directions)[2]

    def _forward(self, directions: list[Directions]) -> tuple[Tensor, Tensor, int]:
        """Scores, the nodes that are trained on, and the bytes that are kept, in the process that keeps most."""
        self._model.directions = directions
        features, nodes = training_input(self._problem, seed=self._seed)
        graph, precision = self._problem.training.graph, self._config.precision
        saved = SavedTensors(self._model, excluded=[features, *self._problem.tensors()])
        with frozen_messages(graph), saved as self._saved:
            scores = forward(self._model, features, graph, precision=precision, seed=self._seed)
            kept = sum(record.bytes for record in self._saved.kept(scores))
        return scores, nodes, int(self._problem.training.shard.largest(kept))

    def layer(self) -> str:
        """The layer that runs."""
        return "" if self._saved is None else self._saved.layer


def plan_training(
    model: Model,
    problem: Problem,
    config: Config,
    *,
    seed: int,
    scale: float = 1.0,
    trials: int | None = None,
) -> Plan:
    """The plan for a model at its present weights.

    Args:
        model: on its device.
        problem: of the step that needs most.
        config: of the run.
        seed: of the step that is tried.
        scale: what the budget is multiplied by, or what all maps take in FP32 if that is less.
        trials: gradients that may be computed; None for two of each map.

    Raises:
        ConfigError: if the budget is less than the least that the model keeps.
    """
    device = problem.training.x.device
    field, budget = _budget(model, problem, config, seed=seed)
    reserve = SPARE if device.type == "cuda" else 1.0
    trial = TrainingTrial(model, problem, config, seed=seed)
    agree = problem.training.shard.agreed
    return make_plan(trial, budget=budget, scale=scale, field=field, trials=trials, reserve=reserve, agree=agree)


def _budget(model: Model, problem: Problem, config: Config, *, seed: int) -> tuple[str, float]:
    """The field that says the budget, and what it comes to in bytes."""
    compression, device = config.compression, problem.training.x.device
    if compression.budget_mib is not None:
        return "compression.budget_mib", compression.budget_mib * MIB
    field = "compression.budget"
    if compression.budget != "fit":
        plain = kept_tensors(config.model, problem, CompressionConfig(scheme="none"))
        if plain is None:
            valid = "what FP32 keeps is not known here; use compression.budget_mib"
            raise ConfigError.of(field, compression.budget, valid)
        most = problem.training.shard.largest(sum(record.bytes for record in plain))
        return field, cast(float, compression.budget) * most
    available = out_of_memory.available_bytes(device)
    if available is None:
        raise ConfigError.of(field, "fit", f"what is free on {device} is not known; use compression.budget_mib")
    probe = copy.deepcopy(model)
    probe.compression, probe.directions = compression, []
    saved = TrainingTrial(model, problem, config, seed=seed).saved([])
    peak = MIB * step_peak_mib(probe, problem, config, device=device, seed=seed)
    return field, FREE_SHARE * available - max(0.0, peak - saved)
