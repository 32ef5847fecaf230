"""How maps are kept and gradients computed: one class of operations a scheme."""

from __future__ import annotations

import torch
from torch import Tensor

from iexact_runner.compression.directions import Directions
from iexact_runner.config import LOW_RANK, CompressionConfig
from iexact_runner.schemes.activation import Activation
from iexact_runner.schemes.evaluation import Evaluation
from iexact_runner.schemes.lowrank import LowRank
from iexact_runner.schemes.plain import Plain
from iexact_runner.schemes.projected import Projected
from iexact_runner.schemes.recompute import Recompute

__all__ = ["Activation", "LowRank", "Plain", "Projected", "start_pass"]


def start_pass(
    config: CompressionConfig,
    *,
    training: bool,
    seed: int | Tensor,
    map_seed: int | Tensor | None = None,
    directions: list[Directions] | None = None,
) -> Plain:
    """The operations of one forward pass; evaluation is exact under every scheme.

    ``map_seed`` lets projections and rounding vary while ``seed`` holds the dropout masks fixed; ``directions`` are
    those of the model's earlier passes, which the low-rank scheme renews.
    """
    if training and config.scheme in LOW_RANK:
        return LowRank(config, seed=seed, map_seed=map_seed, directions=[] if directions is None else directions)
    if training and config.scheme == "projected":
        return Projected(config, seed=seed, map_seed=map_seed)
    if training and config.scheme == "recompute":
        return Recompute(config, seed=seed)
    if not training and not torch.is_grad_enabled():
        return Evaluation(transform_first=bool(config.share_maps))
    return Plain(training=training, seed=seed, transform_first=bool(config.share_maps))
