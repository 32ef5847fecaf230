"""How maps are kept and gradients computed: one class of operations a scheme."""

from __future__ import annotations

import torch
from torch import Tensor

from iexact_runner.compression.directions import Directions
from iexact_runner.config import LOW_RANK, CompressionConfig
from iexact_runner.parallel.shard import WHOLE, Shard
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
    shard: Shard = WHOLE,
) -> Plain:
    """The operations of one forward pass; evaluation is exact under every scheme.

    ``map_seed`` lets projections and rounding vary while ``seed`` holds the dropout masks fixed; ``directions`` are
    those of the model's earlier passes, which the low-rank scheme renews; ``shard`` says which rows of the whole graph
    these are.
    """
    if training and config.scheme in LOW_RANK:
        known = [] if directions is None else directions
        return LowRank(config, seed=seed, map_seed=map_seed, directions=known, shard=shard)
    if training and config.scheme == "projected":
        return Projected(config, seed=seed, map_seed=map_seed, shard=shard)
    if training and config.scheme == "recompute":
        return Recompute(config, seed=seed, shard=shard)
    if not training and not torch.is_grad_enabled():
        return Evaluation(transform_first=bool(config.share_maps))
    return Plain(training=training, seed=seed, transform_first=bool(config.share_maps), shard=shard)
