"""Activation checkpointing: the inputs of blocks are kept, what lies between them is computed again when it is needed.

Chen et al., 2016 (arXiv 1604.06174), with ``torch.utils.checkpoint``. Masks come from the seed of the pass, so that the
second computation drops what the first one dropped, and running statistics move once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iexact_runner.config import CompressionConfig
from iexact_runner.parallel.shard import WHOLE, Shard
from iexact_runner.schemes.activation import Activation, Kept
from iexact_runner.schemes.projected import Projected

Made = TypeVar("Made", Tensor, Activation)


class Recompute(Projected):
    """One training pass in FP32, block by block; gradients are those of FP32 maps with the same masks.

    Args:
        config: how maps are kept.
        seed: seed of this pass, an int or a 0-d int64 tensor.
        shard: which rows of the whole graph these are.
    """

    def __init__(self, config: CompressionConfig, *, seed: int | Tensor, shard: Shard = WHOLE) -> None:
        super().__init__(config, seed=seed, shard=shard)
        self.uses_known_products = True
        self._again = False

    def block(self, run: Callable[..., Made], *inputs: Activation) -> Made:
        """What ``run`` makes of some activations; of all that, these alone are kept."""
        if not torch.is_grad_enabled():
            return run(*inputs)
        drawn = self._masks_drawn
        made: list[bool] = []  # of each computation, whether it made an activation

        def computed(*values: Tensor) -> Tensor:
            self._again, self._masks_drawn = bool(made), drawn
            # A value is held for the second computation, so nothing may be written over it.
            given = [
                Activation(value, Kept() if isinstance(each.source, Kept) else each.source)
                for each, value in zip(inputs, values, strict=True)
            ]
            out = run(*given)
            made.append(isinstance(out, Activation))
            return out.value if isinstance(out, Activation) else out

        value: Any = checkpoint(
            computed, *(each.value for each in inputs), use_reentrant=False, preserve_rng_state=False
        )
        return Activation(value, Kept(), owned=True) if made[0] else value  # type: ignore[return-value]

    def batch_norm(self, h: Tensor, norm: nn.BatchNorm1d) -> Tensor:
        """BatchNorm1d over the nodes, whose running statistics the second computation leaves alone."""
        if not self._again:
            return super().batch_norm(h, norm)
        return self.normalize(h, norm.weight, norm.bias, None, None, momentum=0.0, eps=norm.eps)
