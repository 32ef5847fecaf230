"""EXACT and i-EXACT: maps kept by random projection and block-wise stochastic quantization, masks in 1 bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iexact_runner.compression.maps import KeptMap, MapFormat, levels_for
from iexact_runner.compression.seeds import tensor_seed
from iexact_runner.config import CompressionConfig
from iexact_runner.schemes import functions
from iexact_runner.schemes.activation import Activation, Resident
from iexact_runner.schemes.plain import Plain


class Projected(Plain):
    """One training pass of the projected scheme; the forward pass stays exact.

    EXACT (Liu et al., ICLR 2022) is one block a row, i-EXACT (Eliassen and Selvan, ICASSP 2024) blocks of ``col_size``
    rows. An operation without a compressed twin stays as in plain FP32.
    """

    def __init__(self, config: CompressionConfig, *, seed: int | Tensor) -> None:
        super().__init__(training=True, seed=seed, transform_first=config.share_maps)
        self._format = MapFormat(
            bits=config.bits,
            kept_frac=config.kept_frac,
            col_size=config.col_size,
            levels=levels_for(config.bits, config.alpha),
            max_block_size=config.max_block_size,
            backend=config.backend,
            optimal=config.optimal_levels(),
        )
        self._store_dropout_mask = config.store_dropout_mask
        self._maps_kept = 0

    def linear(self, x: Activation, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product x W^T + b, from the one kept map that all consumers of ``x`` share."""
        if not torch.is_grad_enabled():
            return super().linear(x, weight, bias)
        if x.source.kept is None:
            x.source.kept = self._keep(x.value, project=True)
        # Plain modules keep nothing of the resident features but a reference.
        fp32_bytes = 0 if isinstance(x.source, Resident) else 4 * x.value.numel()
        product: Tensor = functions.Linear.apply(x.value, weight, bias, x.source.kept, fp32_bytes)
        return product

    def batch_norm(self, h: Tensor, norm: nn.BatchNorm1d) -> Tensor:
        """BatchNorm1d over the nodes, its input quantized without projection, for dx is not linear in it."""
        if not torch.is_grad_enabled():
            return super().batch_norm(h, norm)
        normalised: Tensor = functions.BatchNorm.apply(
            h,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            _momentum(norm),
            norm.eps,
            self._keep(h, project=False),
            4 * h.numel(),
        )
        return normalised

    def relu(self, h: Tensor) -> Tensor:
        """ReLU, its mask in 1 bit an element."""
        activated: Tensor = functions.LeakyReLU.apply(h, 0.0, self._format.backend)
        return activated

    def relu_dropout(self, h: Tensor, p: float) -> Tensor:
        """ReLU then dropout, in one pass where no dropout mask is kept."""
        if p == 0 or self._store_dropout_mask:
            return super().relu_dropout(h, p)
        dropped: Tensor = functions.LeakyReLUDropout.apply(h, 0.0, p, self.next_mask_seed(), self._format.backend)
        return dropped

    def dropout(self, h: Tensor, p: float) -> Tensor:
        """Dropout from the seed of this pass, its mask regenerated or kept in 1 bit an element."""
        if p == 0:
            return h
        dropped: Tensor
        if self._store_dropout_mask:
            dropped = functions.MaskedDropout.apply(h, p, self.next_mask_seed(), self._format.backend)
        else:
            dropped = functions.Dropout.apply(h, p, self.next_mask_seed(), self._format.backend)
        return dropped

    def _keep(self, value: Tensor, *, project: bool) -> KeptMap:
        self._maps_kept += 1
        seed = tensor_seed(self.seed, self._maps_kept - 1)
        return self._format.keep(value.detach(), seed=seed, project=project)


def _momentum(norm: nn.BatchNorm1d) -> float:
    """Weight of the new batch in the running statistics, counted as ``nn.BatchNorm1d`` does."""
    if norm.num_batches_tracked is None:
        return 0.0
    norm.num_batches_tracked.add_(1)
    return 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
