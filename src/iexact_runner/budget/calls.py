"""Plans for a compressed model of the user's own, from what it is called with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from iexact_runner.budget.plan import Plan
from iexact_runner.budget.planner import make_plan
from iexact_runner.compression.choices import Choice
from iexact_runner.compression.directions import Directions
from iexact_runner.config import CompressionConfig
from iexact_runner.errors import ConfigError
from iexact_runner.kept import MIB, SavedTensors, tensors_in

Loss = Callable[[Any], Tensor]
# The budget of a library user.
FIELD = "compression.budget_mib"


class CallTrial:
    """Gradients of a loss of what a compressed model returns, computed on a copy of it.

    Args:
        model: compressed under ``auto``.
        args: that it is called with.
        kwargs: likewise.
        loss: of what it returns; None if only bytes are asked for.
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, loss: Loss | None) -> None:
        self._model: Any = copy.deepcopy(model).train()
        self._args = args
        self._kwargs = kwargs
        self._loss = loss
        self._saved: SavedTensors | None = None

    def gradient(self, directions: list[Directions]) -> tuple[Tensor, int]:
        """The gradient as one vector, and the bytes that were kept."""
        assert self._loss is not None
        output, kept = self._forward(directions)
        parameters = [each for each in self._model.parameters() if each.requires_grad]
        found = torch.autograd.grad(self._loss(output), parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found]), kept

    def exact(self, maps: int) -> Tensor:
        """The gradient with so many maps in FP32, on the host meanwhile."""
        shared = self._model._compression
        usual, shared.config = shared.config, replace(shared.config, offload=True)
        try:
            return self.gradient([Directions(choice=Choice(None)) for _ in range(maps)])[0]
        finally:
            shared.config = usual

    def saved(self, directions: list[Directions]) -> int:
        """The bytes that are kept."""
        return self._forward(directions)[1]

    def layer(self) -> str:
        """The layer that runs."""
        return "" if self._saved is None else self._saved.layer

    def _forward(self, directions: list[Directions]) -> tuple[Any, int]:
        """What the model returns, and the bytes that are kept, under the same masks each time."""
        shared = self._model._compression
        shared.plan, shared.directions, shared.seeds = None, directions, (shared.seed, None)
        held = [tensor for tensor in tensors_in((self._args, self._kwargs)) if tensor.layout != torch.sparse_coo]
        with SavedTensors(self._model, excluded=held) as self._saved:
            output = self._model(*self._args, **self._kwargs)
            scores = [tensor for tensor in tensors_in([output]) if tensor.requires_grad]
            records = [record for tensor in scores[:1] for record in self._saved.kept(tensor)]
        return output, sum(record.bytes for record in records)


def budget_of(config: CompressionConfig) -> float:
    """MiB that a model of the user's may keep.

    Raises:
        ConfigError: if they are not given; what FP32 keeps, and what fits, is known in a run alone.
    """
    if config.budget_mib is None:
        raise ConfigError.of(FIELD, "null", "must be given to compress a model with auto")
    return config.budget_mib


def plan_call(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    budget_mib: float,
    loss: Loss | None = None,
) -> Plan:
    """The plan for a compressed model that is called so; without a loss, all maps count the same.

    Raises:
        ConfigError: if the budget is less than the least that the model keeps.
    """
    trial = CallTrial(model, args, kwargs, loss=loss)
    return make_plan(trial, budget=budget_mib * MIB, field=FIELD, trials=0 if loss is None else None)


def deal_budget(model: nn.Module, inputs: Sequence[Any], loss: Loss) -> Plan:
    """Measures what each map of a model means for a gradient, and deals the budget of ``compress`` accordingly.

    A model that :func:`compress` was given with ``"auto"`` deals its budget in its first pass by what its maps are
    like; this deals it anew by measurement, best after a few epochs. It computes two gradients a map, and four more.

    Args:
        model: what :func:`compress` was given, with ``"auto"`` and ``budget_mib``.
        inputs: that the model is called with.
        loss: of what it returns.

    Raises:
        ConfigError: a ValueError of one line, if the model is not compressed under ``auto``, or its budget is less than
            the least that it keeps.
    """
    shared = getattr(model, "_compression", None)
    if shared is None or shared.config.scheme != "auto":
        raise ConfigError.of(
            "model", type(model).__name__, 'must be compressed by compress(model, "auto", budget_mib=N)'
        )
    plan = plan_call(model, inputs, {}, budget_mib=budget_of(shared.config), loss=loss)
    shared.plan = plan
    return plan
