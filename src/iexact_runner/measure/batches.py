"""Sizes of the mini-batches of an epoch, and what the median, the 95th percentile and the largest of them need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from iexact_runner.config import Config
from iexact_runner.data.graph import edge_count
from iexact_runner.errors import TrainingError
from iexact_runner.measure import MIB, total_bytes
from iexact_runner.measure.step import saved_mib, step_peak_mib
from iexact_runner.nn import Model
from iexact_runner.problem import Problem

# Batches that are drawn to find the largest: the first ones of the first epoch.
MOST = 256
QUANTILES = {"p50": 0.5, "p95": 0.95, "max": 1.0}
_EPOCH = 1


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of the batches of the first epoch, and which of them stand at each quantile of the nodes.

    Args:
        nodes: of each batch that is trained on.
        edges: likewise, as the model takes them.
        places: number of the batch at each quantile.
        seed: that they were drawn with.
    """

    nodes: list[int]
    edges: list[int]
    places: dict[str, int]
    seed: int

    @classmethod
    def of(cls, problem: Problem, *, seed: int) -> BatchSizes:
        """Draws the batches of the first epoch, at most the first ``MOST``.

        Raises:
            TrainingError: if none of them has a training node.
        """
        assert problem.batches is not None
        found: list[tuple[int, int, int]] = []
        for batch in range(min(MOST, len(problem.batches))):
            view = problem.batches.view(batch, seed=seed, epoch=_EPOCH)
            if view.train.numel():
                found.append((view.x.size(0), edge_count(view.graph), batch))
        if not found:
            raise TrainingError(
                "no batch of the first epoch has two nodes, one of them to train on: take larger batches"
            )
        found.sort()
        places = {name: found[_place(share, len(found))][2] for name, share in QUANTILES.items()}
        return cls([nodes for nodes, _, _ in found], [edges for _, edges, _ in found], places, seed)

    def problem_of(self, problem: Problem, quantile: str) -> Problem:
        """The problem of the step on the batch at a quantile."""
        assert problem.batches is not None
        return problem.of_batch(problem.batches.view(self.places[quantile], seed=self.seed, epoch=_EPOCH))


def batch_figures(
    model: Model,
    problem: Problem,
    config: Config,
    sizes: BatchSizes,
    *,
    largest: Mapping[str, Any],
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    """The ``batches`` of a summary: sizes and memory at the quantiles, and what part of the graph an epoch works on.

    Args:
        model: on the device; its running statistics move.
        problem: with batches.
        config: of the run.
        sizes: of its batches.
        largest: figures of the step on the largest one.
        device: where.
        seed: of the steps that are measured and not taken.
    """
    assert problem.batches is not None
    found: dict[str, Any] = {
        "an_epoch": len(problem.batches),
        "nodes": _quantiles(sizes.nodes),
        "edges": _quantiles(sizes.edges),
        "saved_mib": {},
        "step_peak_mib": {},
        "data_mib": {},
        "partition": problem.batches.partition,
    }
    mean = sum(sizes.edges) / len(sizes.edges)
    found["edges_share"] = mean * len(problem.batches) / max(1, edge_count(problem.training.graph))
    for name in QUANTILES:
        batch = sizes.problem_of(problem, name)
        if name == "max":
            found["saved_mib"][name], found["step_peak_mib"][name] = largest["saved_mib"], largest["step_peak_mib"]
        else:
            found["saved_mib"][name] = saved_mib(model, batch, config, seed=seed)
            found["step_peak_mib"][name] = step_peak_mib(model, batch, config, device=device, seed=seed)
        found["data_mib"][name] = total_bytes(batch.training.tensors()) / MIB
    return found


def _quantiles(sizes: list[int]) -> dict[str, int]:
    ordered = sorted(sizes)
    return {name: ordered[_place(share, len(ordered))] for name, share in QUANTILES.items()}


def _place(share: float, count: int) -> int:
    """Position of a quantile among ``count`` ordered numbers."""
    return min(count - 1, int(share * count))
